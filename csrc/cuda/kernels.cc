#include "cuda/kernels.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

namespace snapstone::cuda {
namespace {

constexpr char kPtx[] =
#include "cuda/kernels_ptx.inc"
    ;
constexpr std::pair<int, int> kComputeCapabilityMin{8, 0};  // the target of the PTX
constexpr std::uint64_t kBlocksMax = 0x7fffffff;            // of a grid's first dimension

unsigned slices(std::uint64_t nbytes, std::uint64_t slice_bytes, unsigned most) {
  return static_cast<unsigned>(std::clamp<std::uint64_t>((nbytes + slice_bytes - 1) / slice_bytes, 1, most));
}

std::string text(std::pair<int, int> version) {
  return std::to_string(version.first) + "." + std::to_string(version.second);
}

}  // namespace

// What became of loading, by device; for the life of the process.
class LoadedKernels {
 public:
  static LoadedKernels& of(const Device& device) {
    static std::mutex& mutex = *new std::mutex;
    static auto& all = *new std::map<int, std::unique_ptr<LoadedKernels>>;
    const std::lock_guard lock(mutex);
    std::unique_ptr<LoadedKernels>& mine = all[device.ordinal()];
    if (!mine) mine.reset(new LoadedKernels);
    return *mine;
  }

  void load(Device& device) {
    std::call_once(tried_, [&] {
      try {
        kernels_ = new Kernels(device);
      } catch (const std::exception& error) {
        absence_ = error.what();
      }
    });
  }

  const Kernels* kernels() const noexcept { return kernels_; }
  const std::string& absence() const noexcept { return absence_; }  // after load()

 private:
  std::once_flag tried_;
  std::atomic<const Kernels*> kernels_{nullptr};
  std::string absence_;
};

const Kernels* Kernels::of(Device& device) {
  LoadedKernels& loaded = LoadedKernels::of(device);
  loaded.load(device);
  return loaded.kernels();
}

const Kernels* Kernels::loaded(const Device& device) { return LoadedKernels::of(device).kernels(); }

std::string Kernels::absence(Device& device) {
  LoadedKernels& loaded = LoadedKernels::of(device);
  loaded.load(device);
  return loaded.absence();
}

Kernels::Kernels(Device& device) : device_(device) {
  const Driver& driver = Driver::require();
  if (device.compute_capability() < kComputeCapabilityMin) {
    throw std::runtime_error("compute capability " + text(device.compute_capability()) + ": the kernels need " +
                             text(kComputeCapabilityMin));
  }
  if (!driver.cuModuleLoadData || !driver.cuModuleGetFunction || !driver.cuFuncSetAttribute || !driver.cuLaunchKernel) {
    throw std::runtime_error("the driver has no functions for modules and kernels");
  }
  const Scope scope(device);
  ModuleHandle module = nullptr;
  driver.cuModuleLoadData.must(device.ordinal(), &module, kPtx);
  digest_ = find(module, kDigestKernel, kDigestSharedBytes);
  gather_ = find(module, kGatherKernel, 0);
  compare_ = find(module, kCompareKernel, 0);
  scatter_ = find(module, kScatterKernel, 0);
}

FunctionHandle Kernels::find(ModuleHandle module, const char* name, unsigned shared_bytes) const {
  const Driver& driver = Driver::require();
  FunctionHandle function = nullptr;
  driver.cuModuleGetFunction.must(device_.ordinal(), &function, module, name);
  // Drivers load a kernel's code when it is first used, for which they may wait for the device ("Lazy Loading" in the
  // CUDA C++ Programming Guide): this is a use.
  driver.cuFuncSetAttribute.must(device_.ordinal(), function, kFunctionAttributeMaxDynamicSharedSizeBytes,
                                 static_cast<int>(shared_bytes));
  return function;
}

void Kernels::launch(const Stream& stream, FunctionHandle function, const Shape& shape, const void* parameters) const {
  if (shape.blocks == 0) return;
  if (shape.blocks > kBlocksMax) {
    throw std::invalid_argument("launch of " + std::to_string(shape.blocks) + " blocks: at most " +
                                std::to_string(kBlocksMax));
  }
  const Scope scope(device_);
  std::array<void*, 1> pointers{const_cast<void*>(parameters)};  // the driver copies them
  Driver::require().cuLaunchKernel.must(device_.ordinal(), function, static_cast<unsigned>(shape.blocks), shape.slices,
                                        1, shape.threads, 1, 1, shape.shared_bytes, stream.handle(), pointers.data(),
                                        nullptr);
}

void Kernels::digest(const Stream& stream, DevicePointer items, std::uint64_t count, DevicePointer digests,
                     std::uint64_t seed) const {
  const DigestParameters parameters{items, digests, seed};
  launch(stream, digest_, {count, 1, kDigestThreads, kDigestSharedBytes}, &parameters);
}

void Kernels::gather(const Stream& stream, DevicePointer items, std::uint64_t count, std::uint64_t nbytes_max) const {
  const GatherParameters parameters{items};
  launch(stream, gather_, {count, slices(nbytes_max, kGatherSliceBytes, kGatherSlicesMax), kGatherThreads, 0},
         &parameters);
}

void Kernels::compare(const Stream& stream, DevicePointer digests, DevicePointer expected, std::uint64_t count,
                      DevicePointer changed) const {
  const CompareParameters parameters{digests, expected, changed, count};
  launch(stream, compare_, {(count + kCompareThreads - 1) / kCompareThreads, 1, kCompareThreads, 0}, &parameters);
}

void Kernels::scatter(const Stream& stream, DevicePointer items, std::uint64_t count, std::uint64_t nbytes_max) const {
  const ScatterParameters parameters{items};
  launch(stream, scatter_, {count, slices(nbytes_max, kScatterSliceBytes, kScatterSlicesMax), kScatterThreads, 0},
         &parameters);
}

}  // namespace snapstone::cuda
