// Kernels: those of kernels.cu on one device, launched in streams. Without them everything works, on the host's cores.
//
// They come as PTX, which the driver compiles for the device when they are loaded: half a second once on a machine,
// later from its cache. Loaded once per device, never unloaded.
//
// What a launch is given (items, sources, targets) is device memory that stays alive and untouched until an event that
// is recorded after it is done. A count of 0 launches nothing.
// Threads: any.
// Failure: of() never throws: no kernels is an answer. Launches throw CudaError.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/kernel_parameters.h"
#include "cuda/stream.h"

namespace snapstone::cuda {

class Kernels {
 public:
  // nullptr: not on this device. Loads them if nobody has, so not on the step path.
  static const Kernels* of(Device& device);
  // The same without loading: nullptr also while they are not loaded.
  static const Kernels* loaded(const Device& device);
  // Why of() is nullptr; empty if it is not. Loads like of().
  static std::string absence(Device& device);

  // Of `count` items, DigestItem at `items`; 16 bytes each go to `digests`. Both addresses are multiples of 16.
  void digest(const Stream& stream, DevicePointer items, std::uint64_t count, DevicePointer digests,
              std::uint64_t seed = 0) const;
  // GatherItem at `items`, a multiple of 8. `nbytes_max`, of the largest item, decides how many blocks share one.
  void gather(const Stream& stream, DevicePointer items, std::uint64_t count, std::uint64_t nbytes_max) const;
  // `changed` gets a byte per digest: 1 where the 16 bytes at `digests` and `expected` differ, else 0.
  void compare(const Stream& stream, DevicePointer digests, DevicePointer expected, std::uint64_t count,
               DevicePointer changed) const;
  // BoxItem (box_items.h makes them) at `items`, a multiple of 8; `nbytes_max` as for gather.
  void scatter(const Stream& stream, DevicePointer items, std::uint64_t count, std::uint64_t nbytes_max) const;

  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

 private:
  struct Shape {
    std::uint64_t blocks;
    unsigned slices;
    unsigned threads;
    unsigned shared_bytes;
  };

  explicit Kernels(Device& device);  // CudaError
  FunctionHandle find(ModuleHandle module, const char* name, unsigned shared_bytes) const;
  void launch(const Stream& stream, FunctionHandle function, const Shape& shape, const void* parameters) const;

  Device& device_;
  FunctionHandle digest_ = nullptr;
  FunctionHandle gather_ = nullptr;
  FunctionHandle compare_ = nullptr;
  FunctionHandle scatter_ = nullptr;

  friend class LoadedKernels;
};

}  // namespace snapstone::cuda
