// DeviceBuffer: device memory of our own, in the order of one stream: there from what is enqueued next, gone after what
// was enqueued before its destructor ran.
//
// The stream outlives the buffer. Where the device has no stream-ordered memory (some virtual GPUs), freeing first
// waits for the stream, and the driver may wait for the whole device.
// Failure: out of memory is an empty optional; all else is CudaError.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/stream.h"

namespace snapstone::cuda {

class DeviceBuffer {
 public:
  static std::optional<DeviceBuffer> allocate(const Stream& stream, std::uint64_t nbytes);

  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();

  DevicePointer address() const noexcept { return address_; }  // a multiple of 256
  std::uint64_t nbytes() const noexcept { return nbytes_; }

 private:
  DeviceBuffer(const Stream& stream, DevicePointer address, std::uint64_t nbytes);

  Device* device_;
  StreamHandle stream_;
  DevicePointer address_;
  std::uint64_t nbytes_;
};

}  // namespace snapstone::cuda
