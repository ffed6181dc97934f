// Copies of bytes, enqueued in a stream: between device and host, within a device, whole or in rows.
//
// The bytes are read and written when the stream comes to them: source and target stay alive and untouched until an
// event recorded after the copies is done. Copies of one call run in any order and beside each other: none reads what
// another writes. Host memory that is not registered (host_registration.h) makes the call wait for its copy.
// Many copies go to the driver in one call where it can take them (CUDA 12.8 on): all memory of the host is registered,
// and has one address for both sides. A call that it refuses as a whole is made copy by copy.
// Failure: CudaError; some of the copies may be enqueued then.
#pragma once

#include <cstdint>
#include <span>

#include "cuda/stream.h"

namespace snapstone::cuda {

// Addresses are of device or host memory, as the function says. nbytes may be 0.
struct Copy {
  std::uint64_t dst = 0;
  std::uint64_t src = 0;
  std::uint64_t nbytes = 0;
};

void copy_to_host(const Stream& stream, std::span<const Copy> copies);
void copy_to_device(const Stream& stream, std::span<const Copy> copies);
void copy_on_device(const Stream& stream, std::span<const Copy> copies);  // both ends on the stream's device

// `height` rows of `width_bytes`, each row a pitch after the one before. A pitch is at least the width, and less than 2
// GiB.
struct Copy2d {
  std::uint64_t dst = 0;
  std::uint64_t dst_pitch = 0;
  std::uint64_t src = 0;
  std::uint64_t src_pitch = 0;
  std::uint64_t width_bytes = 0;
  std::uint64_t height = 0;
};

enum class Direction { kToHost, kToDevice, kOnDevice };

void copy_2d(const Stream& stream, Direction direction, const Copy2d& copy);

}  // namespace snapstone::cuda
