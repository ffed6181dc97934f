// DeviceWorkspace: what a job needs of one device besides its tensors: a stream of its own, and a table in memory of
// either end, to hand kernels their work and to bring their results.
//
// Ownership: leased to one job at a time and kept for the next, so that a save makes neither streams nor allocations.
//            One with work in flight is never given back: who cannot wait for its end abandons it.
// Threads:   lease() and give_back() any; an object belongs to whoever holds it.
// Failure:   CudaError; a table that cannot be had is a value.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "cuda/device_buffer.h"
#include "cuda/host_registration.h"
#include "cuda/stream.h"
#include "mem/slot_ring.h"
#include "os/memory.h"

namespace snapstone::pipeline {

class DeviceWorkspace {
 public:
  static std::unique_ptr<DeviceWorkspace> lease(std::int32_t ordinal);
  static void give_back(std::unique_ptr<DeviceWorkspace> workspace) noexcept;
  static void abandon(std::unique_ptr<DeviceWorkspace> workspace, const char* why) noexcept;

  explicit DeviceWorkspace(cuda::Device& device) : stream_(device) {}

  cuda::Device& device() const { return stream_.device(); }
  cuda::Stream& stream() { return stream_; }

  // Room for `nbytes` at either end; nothing of it may be in use. False where the host's end cannot be registered or
  // the device has no memory.
  bool reserve_table(std::uint64_t nbytes);
  std::uint8_t* host_table() const { return host_.data(); }  // null: there is none
  std::uint64_t host_table_bytes() const { return host_.nbytes(); }
  cuda::DevicePointer device_table() const { return device_->address(); }

 private:
  cuda::Stream stream_;
  os::MappedMemory host_;
  std::optional<cuda::HostRegistration> registration_;
  std::optional<cuda::DeviceBuffer> device_;
};

// Makes what a first job of this device would have to wait for: the ring registered, a workspace with its table,
// kernels loaded.
void prepare_device(std::int32_t ordinal, mem::SlotRing& ring);

}  // namespace snapstone::pipeline
