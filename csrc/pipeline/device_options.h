// DeviceOptions: how a job treats tensors in device memory; DeviceStats: what that came to.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace snapstone::pipeline {

struct DeviceOptions {
  std::uint64_t dma_bytes = 32 << 20;      // the most that one copy moves: the trainer's own copies queue up behind it
  std::uint64_t batch_bytes = 64 << 20;    // behind which an event tells lanes: 1.2 ms of PCIe 5.0
  std::uint64_t scratch_bytes = 64 << 20;  // of device memory, to gather small tensors in; at least one chunk
  double dma_gbps = 0;                     // copy at most 1e9 times as many bytes per second and job; 0: no limit
  bool digests = true;                     // on the device where there are kernels, else on the host
  // What finds no slots is copied within the device, into this share of the memory that is free there.
  double overflow_fraction = 0;
  // With a base: learn first which chunks changed, and copy only those. The snapshot takes a little longer to begin.
  bool two_phase = false;
  // How long the end of a failed job waits for copies in flight, before it gives their memory up for good.
  std::chrono::milliseconds drain_patience{10'000};
};

struct DeviceStats {
  std::uint64_t copied_bytes = 0;        // from devices to slots
  std::uint64_t unregistered_bytes = 0;  // of those: to slots that no device reaches by DMA
  std::uint64_t gathered_bytes = 0;      // of small tensors, by a kernel
  std::uint64_t overflow_bytes = 0;      // copied within a device for lack of slots
  std::uint64_t digested_bytes = 0;      // by a kernel
  std::uint64_t late_bytes = 0;          // not yet enqueued when the caller went on: its fence waits for lanes
  std::string no_kernels;                // why kernels did not run where they could have; empty if they did
};

}  // namespace snapstone::pipeline
