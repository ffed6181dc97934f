// Modules are PTX text; kernels run as C++ (kernel_table.h).
#include <cstring>
#include <deque>
#include <stdexcept>

#include "call.h"
#include "kernel_table.h"

using namespace fakecuda;
using snapstone::cuda::FunctionHandle;
using snapstone::cuda::ModuleHandle;
using snapstone::cuda::StreamHandle;

namespace {

constexpr Result kNoBinaryForGpu = static_cast<Result>(209);
constexpr Result kLaunchOutOfResources = static_cast<Result>(701);
constexpr unsigned kSharedBytesDefault = 48u << 10;
constexpr unsigned kSharedBytesMax = 227u << 10;  // sm_90; sm_80 has 163 KiB
constexpr unsigned kThreadsMax = 1024;

struct Module {
  std::string text;
};

struct LoadedFunction {
  const ReferenceKernel* kernel = nullptr;
  unsigned shared_bytes_max = kSharedBytesDefault;
};

// The number after `directive`, times ten: ".version 8.0" -> 80, ".target sm_80" -> 80 with `scale` 1. 0: none.
int number_after(const std::string& text, const std::string& directive) {
  const auto at = text.find(directive);
  if (at == std::string::npos) return 0;
  int value = 0;
  for (std::size_t i = at + directive.size(); i < text.size(); ++i) {
    const char c = text[i];
    if (c == '.') continue;
    if (c < '0' || c > '9') break;
    value = 10 * value + (c - '0');
  }
  return value;
}

// Newest PTX that a driver reads: https://docs.nvidia.com/cuda/parallel-thread-execution/#release-notes
int ptx_version_max(int driver) {
  constexpr int kOfTwelve[] = {80, 81, 82, 83, 84, 85, 85, 86, 87, 88};
  return driver >= 13000 ? 90 : kOfTwelve[driver % 1000 / 10];
}

class CheckedMemory : public KernelMemory {
 public:
  CheckedMemory(World& world, Work& work, int device) : world_(world), work_(work), device_(device) {}

  const std::uint8_t* read(std::uint64_t address, std::uint64_t nbytes) override { return at(address, nbytes, false); }
  std::uint8_t* write(std::uint64_t address, std::uint64_t nbytes) override { return at(address, nbytes, true); }

 private:
  std::uint8_t* at(std::uint64_t address, std::uint64_t nbytes, bool write) {
    if (nbytes == 0) return nullptr;
    const World::Lock lock(world_.mutex);
    if (!world_.memory->is_device(address)) {
      if (world_.host->covered(address, nbytes) != HostMemory::Cover::kWhole) fail(address, nbytes);
      if (world_.host->guards(address)) throw std::runtime_error("host memory that a copy is in flight to or from");
      add({address, nbytes, write});
      return reinterpret_cast<std::uint8_t*>(address);
    }
    const Block* const block = world_.memory->block_of(address);
    if (block == nullptr || address + nbytes > block->end() || block->device != device_) fail(address, nbytes);
    add({address, nbytes, write});
    return world_.memory->shadow(address);
  }

  // Accesses that follow each other at one distance become the rows of one: a kernel makes very many.
  void add(const Access& access) {
    constexpr std::uint64_t kPitchMax = 1 << 20;
    std::size_t& last = access.write ? last_write_ : last_read_;
    if (last < work_.accesses.size()) {
      Access& before = work_.accesses[last];
      const std::uint64_t pitch = before.rows == 1 ? access.begin - before.begin : before.pitch;
      const bool next = access.begin >= before.end() && access.begin - before.begin == before.rows * pitch;
      if (next && access.width == before.width && pitch <= kPitchMax) {
        before.pitch = pitch;
        ++before.rows;
        return;
      }
    }
    last = work_.accesses.size();
    work_.accesses.push_back(access);
  }

  [[noreturn]] static void fail(std::uint64_t address, std::uint64_t nbytes) {
    throw std::runtime_error("no allocation holds " + hex(address) + " to " + hex(address + nbytes));
  }

  World& world_;
  Work& work_;
  int device_;
  std::size_t last_read_ = SIZE_MAX;
  std::size_t last_write_ = SIZE_MAX;
};

struct CopiedLaunch {
  Launch launch{};
  std::vector<std::vector<std::uint8_t>> bytes;
};

}  // namespace

FAKECUDA_API Result cuModuleLoadData(ModuleHandle* handle, const void* image) {
  return call("cuModuleLoadData", Needs::kUncapturedContext, [&](World& world, auto&) {
    const std::string text(static_cast<const char*>(image));
    const int version = number_after(text, ".version ");
    const int target = number_after(text, ".target sm_");
    if (version == 0 || target == 0) return Result::kInvalidPtx;
    if (version > ptx_version_max(world.options.version)) return Result::kUnsupportedPtxVersion;
    if (target > world.options.compute_capability) return kNoBinaryForGpu;
    static auto& modules = *new std::deque<Module>;  // for good, like the engine's
    *handle = reinterpret_cast<ModuleHandle>(&modules.emplace_back(Module{text}));
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuModuleGetFunction(FunctionHandle* handle, ModuleHandle module, const char* name) {
  return call("cuModuleGetFunction", Needs::kContext, [&](World&, auto&) {
    const std::string& text = reinterpret_cast<const Module*>(module)->text;
    if (text.find(".entry " + std::string(name) + "(") == std::string::npos) return Result::kNotFound;
    for (const ReferenceKernel& kernel : reference_kernels()) {
      if (std::strcmp(kernel.name, name) != 0) continue;
      static auto& functions = *new std::deque<LoadedFunction>;
      *handle = reinterpret_cast<FunctionHandle>(&functions.emplace_back(LoadedFunction{&kernel}));
      return Result::kSuccess;
    }
    return Result::kNotFound;
  });
}

FAKECUDA_API Result cuFuncSetAttribute(FunctionHandle handle, int attribute, int value) {
  return call("cuFuncSetAttribute", Needs::kContext, [&](World&, auto&) {
    if (attribute != snapstone::cuda::kFunctionAttributeMaxDynamicSharedSizeBytes || value < 0 ||
        value > static_cast<int>(kSharedBytesMax)) {
      return Result::kInvalidValue;
    }
    reinterpret_cast<LoadedFunction*>(handle)->shared_bytes_max = static_cast<unsigned>(value);
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuLaunchKernel(FunctionHandle handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                   StreamHandle stream_handle, void** parameters, void** extra) {
  return call("cuLaunchKernel", Needs::kContext, [&](World& world, auto&) {
    Stream* const stream = world.find_stream(stream_handle, current_device());
    if (stream == nullptr) return Result::kInvalidHandle;
    const auto& function = *reinterpret_cast<const LoadedFunction*>(handle);
    const std::uint64_t threads = std::uint64_t{block_x} * block_y * block_z;
    if (threads == 0 || threads > kThreadsMax || grid_x == 0 || grid_x > 0x7fffffff || grid_y == 0 || grid_y > 65535 ||
        grid_z == 0 || grid_z > 65535 || extra != nullptr || shared_bytes > function.shared_bytes_max) {
      world.report.violation("a launch of " + std::string(function.kernel->name) + " that no device could run");
      return shared_bytes > function.shared_bytes_max ? kLaunchOutOfResources : Result::kInvalidValue;
    }
    auto copied = std::make_shared<CopiedLaunch>();
    copied->launch = {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, {}};
    for (std::size_t i = 0; i < function.kernel->parameter_bytes.size(); ++i) {
      const auto* const begin = static_cast<const std::uint8_t*>(parameters[i]);
      copied->bytes.emplace_back(begin, begin + function.kernel->parameter_bytes[i]);
    }
    for (const auto& bytes : copied->bytes) copied->launch.parameters.push_back(bytes.data());
    auto work = std::make_unique<Work>();
    work->what = std::string("kernel ") + function.kernel->name + ", stream " + std::to_string(stream->number);
    work->run = [&world, kernel = function.kernel, copied, device = stream->device](Work& running) {
      CheckedMemory memory(world, running, device);
      kernel->run(copied->launch, memory);
    };
    world.report.count(std::string("launches_") + function.kernel->name);
    world.enqueue(*stream, std::move(work));
    return Result::kSuccess;
  });
}
