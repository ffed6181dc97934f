#include "cuda/device.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <map>

namespace snapstone::cuda {
namespace {

thread_local const Device* scoped = nullptr;

// "0000:1B:00.0" as the driver writes it; sysfs has lower case.
int numa_node_of(std::string bus_id) {
  std::transform(bus_id.begin(), bus_id.end(), bus_id.begin(), [](unsigned char c) { return std::tolower(c); });
  std::ifstream file("/sys/bus/pci/devices/" + bus_id + "/numa_node");
  int node = -1;
  return file >> node ? node : -1;
}

}  // namespace

Device& Device::of(int ordinal) {
  static std::mutex& mutex = *new std::mutex;
  static std::map<int, Device*>& devices = *new std::map<int, Device*>;
  const Driver& driver = Driver::require();
  if (ordinal < 0 || ordinal >= driver.device_count) check(Result::kInvalidDevice, "cuDeviceGet", ordinal);
  const std::lock_guard lock(mutex);
  Device*& device = devices[ordinal];
  if (device == nullptr) device = new Device(ordinal);
  return *device;
}

Device::Device(int ordinal) : ordinal_(ordinal) {
  const Driver& driver = Driver::require();
  driver.cuDeviceGet.must(ordinal, &handle_, ordinal);
  char text[256] = "";
  driver.cuDeviceGetName.must(ordinal, text, sizeof text, handle_);
  name_ = text;
  const auto attribute = [&](int which) {
    int value = 0;
    driver.cuDeviceGetAttribute.must(ordinal, &value, which, handle_);
    return value;
  };
  compute_capability_ = {attribute(kAttributeComputeCapabilityMajor), attribute(kAttributeComputeCapabilityMinor)};
  multiprocessors_ = attribute(kAttributeMultiprocessorCount);
  stream_ordered_memory_ =
      driver.cuMemAllocAsync && driver.cuMemFreeAsync && attribute(kAttributeMemoryPoolsSupported) != 0;
  registered_host_pointers_ = attribute(kAttributeRegisteredHostPointers) != 0;
  std::size_t total = 0;
  driver.cuDeviceTotalMem.must(ordinal, &total, handle_);
  total_bytes_ = total;
  if (driver.cuDeviceGetPCIBusId(text, sizeof text, handle_) == Result::kSuccess) numa_node_ = numa_node_of(text);
  int node = -1;
  if (numa_node_ < 0 && driver.cuDeviceGetAttribute(&node, kAttributeHostNumaId, handle_) == Result::kSuccess) {
    numa_node_ = node;
  }
}

ContextHandle Device::context() {
  std::call_once(retained_, [this] { Driver::require().cuDevicePrimaryCtxRetain.must(ordinal_, &context_, handle_); });
  return context_;
}

bool Device::in_use() {
  unsigned flags = 0;
  int active = 0;
  Driver::require().cuDevicePrimaryCtxGetState.must(ordinal_, handle_, &flags, &active);
  return active != 0;
}

std::uint64_t Device::free_bytes() {
  const Scope scope(*this);
  std::size_t free = 0;
  std::size_t total = 0;
  Driver::require().cuMemGetInfo.must(ordinal_, &free, &total);
  return free;
}

Scope::Scope(Device& device) : outer_(scoped), entered_(scoped != &device) {
  const Driver& driver = Driver::require();
  if (!entered_) return;
  driver.cuCtxPushCurrent.must(device.ordinal(), device.context());
  if (driver.cuThreadExchangeStreamCaptureMode(&capture_mode_) != Result::kSuccess) {
    capture_mode_ = CaptureMode::kRelaxed;
  }
  scoped = &device;
}

Scope::~Scope() {
  if (!entered_) return;
  scoped = outer_;
  const Driver* const driver = Driver::get();
  if (driver == nullptr) return;
  driver->cuThreadExchangeStreamCaptureMode(&capture_mode_);
  ContextHandle popped = nullptr;
  driver->cuCtxPopCurrent(&popped);
}

bool ignore_captures() noexcept {
  CaptureMode mode = CaptureMode::kRelaxed;
  const Driver* const driver = Driver::get();
  return driver != nullptr && driver->cuThreadExchangeStreamCaptureMode(&mode) == Result::kSuccess;
}

}  // namespace snapstone::cuda
