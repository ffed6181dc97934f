#include "cuda/host_registration.h"

#include <stdexcept>
#include <utility>

namespace snapstone::cuda {

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
  return HostRegistration(device, begin, nbytes);
}

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
  if (begin_ != nullptr) release(*device_, [this](const Driver& driver) { driver.cuMemHostUnregister(begin_); });
}

}  // namespace snapstone::cuda
