#include "cuda/device_buffer.h"

#include <stdexcept>
#include <utility>

#include "base/fault_hook.h"

namespace snapstone::cuda {

std::optional<DeviceBuffer> DeviceBuffer::allocate(const Stream& stream, std::uint64_t nbytes) {
  if (nbytes == 0) throw std::invalid_argument("a device buffer has at least one byte");
  Device& device = stream.device();
  const Driver& driver = Driver::require();
  const Scope scope(device);
  const bool ordered = device.stream_ordered_memory();
  DevicePointer address = 0;
  const Result result =
      ordered ? driver.cuMemAllocAsync(&address, nbytes, stream.handle()) : driver.cuMemAlloc(&address, nbytes);
  if (result == Result::kOutOfMemory) return std::nullopt;
  check(result, ordered ? driver.cuMemAllocAsync.name() : driver.cuMemAlloc.name(), device.ordinal());
  return DeviceBuffer(stream, address, nbytes);
}

DeviceBuffer::DeviceBuffer(const Stream& stream, DevicePointer address, std::uint64_t nbytes)
    : device_(&stream.device()), stream_(stream.handle()), address_(address), nbytes_(nbytes) {}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : device_(other.device_),
      stream_(other.stream_),
      address_(std::exchange(other.address_, 0)),
      nbytes_(std::exchange(other.nbytes_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(stream_, other.stream_);
  std::swap(address_, other.address_);
  std::swap(nbytes_, other.nbytes_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (address_ == 0) return;
  release(*device_, [this](const Driver& driver) {
    if (device_->stream_ordered_memory()) {
      driver.cuMemFreeAsync(address_, stream_);
    } else {
      if (!fault::skipped("wait", "buffer/freed")) driver.cuStreamSynchronize(stream_);
      driver.cuMemFree(address_);
    }
  });
}

}  // namespace snapstone::cuda
