// DeviceRates: how long one device takes to copy to and from a staging ring, to copy within itself, and to compute
// digests: what a save or load is made of, each alone. For measurements; no job asks for it.
//
// The ring is one of its own, made and registered here, so that a caller learns what that takes.
// Seconds are by the host's clock, on a stream with nothing else in it, from before the first call of the driver until
// an event after the last one has come.
//
// Ownership: `memory` is the caller's, of the device, idle, and keeps its bytes: what comes to the ring goes back.
// Threads:   any; the caller's waits for all of it, and asks for events without a pause.
// Failure:   OsError (ENOMEM), CudaError, std::invalid_argument. Refused registration, no kernels and no memory of the
//            device for a copy are answers.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cuda/driver_types.h"

namespace snapstone::pipeline {

struct DeviceRatesRow {
  std::uint64_t nbytes = 0;
  std::vector<double> to_host;    // seconds, one for each repetition; none of what does not fit into the ring
  std::vector<double> to_device;  // from the ring
  std::vector<double> on_device;  // none without memory for the copy
  std::vector<double> digest;     // in chunks of 1 MiB; none without kernels
};

struct DeviceRates {
  std::uint64_t ring_bytes = 0;
  double reserve_seconds = 0;  // memory mapped and touched
  double register_seconds = 0;
  std::string refusal;     // why the ring is not registered, empty if it is
  std::string no_kernels;  // why there are none, empty if there are
  std::vector<DeviceRatesRow> rows;
};

struct DeviceRatesOptions {
  std::uint64_t ring_bytes = 1ull << 30;
  std::uint64_t copy_bytes = 32 << 20;  // the most that one copy moves
  int repeat = 5;                       // after one that does not count
};

// Of the first `sizes[i]` bytes at `memory`.
DeviceRates measure_device_rates(std::int32_t device, cuda::DevicePointer memory, std::span<const std::uint64_t> sizes,
                                 const DeviceRatesOptions& options);

}  // namespace snapstone::pipeline
