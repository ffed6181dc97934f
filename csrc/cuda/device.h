// Device: one GPU of this process, by its ordinal; Scope: its context, current on this thread for one block.
//
// The context is the device's primary one, which torch uses as well. It is retained at the first Scope, never released.
// Device objects live as long as the process. Nothing here synchronises a device.
// Threads: any.
// Failure: CudaError; an ordinal that the driver does not have is kInvalidDevice.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/driver.h"

namespace snapstone::cuda {

class Device {
 public:
  static Device& of(int ordinal);

  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int ordinal() const noexcept { return ordinal_; }
  const std::string& name() const noexcept { return name_; }
  std::pair<int, int> compute_capability() const noexcept { return compute_capability_; }
  std::uint64_t total_bytes() const noexcept { return total_bytes_; }
  int multiprocessors() const noexcept { return multiprocessors_; }
  int numa_node() const noexcept { return numa_node_; }  // of the host, closest to the device; -1: unknown, or only one
  bool stream_ordered_memory() const noexcept { return stream_ordered_memory_; }  // cuMemAllocAsync works
  // Whether registered memory of the host has one address for both; else only some calls translate it.
  bool registered_host_pointers() const noexcept { return registered_host_pointers_; }

  std::uint64_t free_bytes();  // needs the context
  // Whether the primary context is there, by whomever: no memory of the device is in use otherwise. Makes none.
  bool in_use();
  ContextHandle context();

 private:
  explicit Device(int ordinal);

  int ordinal_;
  DeviceHandle handle_ = 0;
  std::string name_;
  std::pair<int, int> compute_capability_{0, 0};
  std::uint64_t total_bytes_ = 0;
  int multiprocessors_ = 0;
  int numa_node_ = -1;
  bool stream_ordered_memory_ = false;
  bool registered_host_pointers_ = false;
  std::once_flag retained_;
  ContextHandle context_ = nullptr;
};

// Also lets this thread make calls that are forbidden while some other thread captures a graph, such as asking an
// event: none of them concerns a capturing stream. Inside a Scope of the same device a Scope costs nothing.
class Scope {
 public:
  explicit Scope(Device& device);
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  const Device* outer_;
  bool entered_;
  CaptureMode capture_mode_ = CaptureMode::kRelaxed;
};

// Lets this thread make those calls for good, outside of Scopes too. Returns whether that could be had.
bool ignore_captures() noexcept;

// Runs `free` in a Scope of `device`, for destructors: swallows what it throws, and does nothing in a forked child.
template <class Free>
void release(Device& device, Free&& free) noexcept {
  try {
    if (const Driver* const driver = Driver::get()) {
      const Scope scope(device);
      free(*driver);
    }
  } catch (...) {  // a lost device has taken the object with it
  }
}

}  // namespace snapstone::cuda
