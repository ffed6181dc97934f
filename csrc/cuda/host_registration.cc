#include "cuda/host_registration.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace snapstone::cuda {
namespace {

// All that is registered.
class Ranges {
 public:
  static Ranges& instance() {
    static Ranges& only = *new Ranges;
    return only;
  }

  void add(std::uint64_t begin, std::uint64_t nbytes) {
    const std::lock_guard lock(mutex_);
    ends_[begin] = begin + nbytes;
  }

  void remove(std::uint64_t begin) {
    const std::lock_guard lock(mutex_);
    ends_.erase(begin);
  }

  HostRegistration::Range around(std::uint64_t address) {
    const std::lock_guard lock(mutex_);
    auto found = ends_.upper_bound(address);
    if (found == ends_.begin()) return {};
    --found;
    return address < found->second ? HostRegistration::Range{found->first, found->second} : HostRegistration::Range{};
  }

 private:
  std::mutex mutex_;
  std::map<std::uint64_t, std::uint64_t> ends_;  // by beginning
};

}  // namespace

std::optional<HostRegistration> HostRegistration::of(Device& device, void* begin, std::uint64_t nbytes,
                                                     std::string* refusal) {
  if (nbytes == 0 || nbytes > kRegistrationBytesMax) {
    throw std::invalid_argument("a registration covers 1 to " + std::to_string(kRegistrationBytesMax) + " bytes");
  }
  try {
    const Scope scope(device);
    Driver::require().cuMemHostRegister.must(device.ordinal(), begin, nbytes, kHostRegisterPortable);
  } catch (const CudaError& error) {
    *refusal = error.what();
    return std::nullopt;
  }
  HostRegistration registration(device, begin, nbytes);
  Ranges::instance().add(reinterpret_cast<std::uintptr_t>(begin), nbytes);
  return registration;
}

HostRegistration::Range HostRegistration::around(std::uint64_t address) { return Ranges::instance().around(address); }

HostRegistration::HostRegistration(Device& device, void* begin, std::uint64_t nbytes)
    : device_(&device), begin_(begin), nbytes_(nbytes) {}

HostRegistration::HostRegistration(HostRegistration&& other) noexcept
    : device_(other.device_), begin_(std::exchange(other.begin_, nullptr)), nbytes_(std::exchange(other.nbytes_, 0)) {}

HostRegistration& HostRegistration::operator=(HostRegistration&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(begin_, other.begin_);
  std::swap(nbytes_, other.nbytes_);
  return *this;
}

HostRegistration::~HostRegistration() {
  if (begin_ == nullptr) return;
  release(*device_, [this](const Driver& driver) {
    Ranges::instance().remove(reinterpret_cast<std::uintptr_t>(begin_));
    driver.cuMemHostUnregister(begin_);
  });
}

}  // namespace snapstone::cuda
