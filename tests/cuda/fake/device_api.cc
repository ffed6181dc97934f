// cuInit, devices, contexts, errors.
#include <cstdio>
#include <cstring>
#include <exception>

#include "call.h"

using namespace fakecuda;
using snapstone::cuda::CaptureMode;
using snapstone::cuda::ContextHandle;
using snapstone::cuda::DeviceHandle;

namespace {

// A fake that does not do as it was told proves nothing.
[[maybe_unused]] const bool loaded = [] {
  try {
    hide_symbols(World::get().options.version);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fakecuda: %s\n", error.what());
    std::abort();
  }
  return true;
}();

struct ErrorName {
  int code;
  const char* name;
};

constexpr ErrorName kErrorNames[] = {
    {0, "CUDA_SUCCESS"},
    {1, "CUDA_ERROR_INVALID_VALUE"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {3, "CUDA_ERROR_NOT_INITIALIZED"},
    {4, "CUDA_ERROR_DEINITIALIZED"},
    {34, "CUDA_ERROR_STUB_LIBRARY"},
    {100, "CUDA_ERROR_NO_DEVICE"},
    {101, "CUDA_ERROR_INVALID_DEVICE"},
    {200, "CUDA_ERROR_INVALID_IMAGE"},
    {201, "CUDA_ERROR_INVALID_CONTEXT"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE"},
    {218, "CUDA_ERROR_INVALID_PTX"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
    {304, "CUDA_ERROR_OPERATING_SYSTEM"},
    {400, "CUDA_ERROR_INVALID_HANDLE"},
    {500, "CUDA_ERROR_NOT_FOUND"},
    {600, "CUDA_ERROR_NOT_READY"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
    {719, "CUDA_ERROR_LAUNCH_FAILED"},
    {800, "CUDA_ERROR_NOT_PERMITTED"},
    {801, "CUDA_ERROR_NOT_SUPPORTED"},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"},
    {999, "CUDA_ERROR_UNKNOWN"},
};

Result copy_text(const std::string& text, char* out, int nbytes) {
  if (nbytes <= static_cast<int>(text.size())) return Result::kInvalidValue;
  std::memcpy(out, text.c_str(), text.size() + 1);
  return Result::kSuccess;
}

bool valid(const World& world, DeviceHandle device) { return device >= 0 && device < world.options.devices; }

}  // namespace

FAKECUDA_API Result cuInit(unsigned flags) {
  return call("cuInit", Needs::kNothing, [&](World& world, auto&) {
    if (flags != 0) return Result::kInvalidValue;
    if (world.options.devices == 0) return Result::kNoDevice;
    world.start();
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuDriverGetVersion(int* version) {
  return call("cuDriverGetVersion", Needs::kNothing, [&](World& world, auto&) {
    *version = world.options.version;
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuGetErrorName(Result error, const char** name) {
  for (const ErrorName& known : kErrorNames) {
    if (known.code != static_cast<int>(error)) continue;
    *name = known.name;
    return Result::kSuccess;
  }
  *name = nullptr;
  return Result::kInvalidValue;
}

FAKECUDA_API Result cuDeviceGetCount(int* count) {
  return call("cuDeviceGetCount", Needs::kInit, [&](World& world, auto&) {
    *count = world.options.devices;
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuDeviceGet(DeviceHandle* device, int ordinal) {
  return call("cuDeviceGet", Needs::kInit, [&](World& world, auto&) {
    if (!valid(world, ordinal)) return Result::kInvalidDevice;
    *device = ordinal;
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuDeviceGetName(char* name, int nbytes, DeviceHandle device) {
  return call("cuDeviceGetName", Needs::kInit, [&](World& world, auto&) {
    if (!valid(world, device)) return Result::kInvalidDevice;
    return copy_text("Fake CUDA device " + std::to_string(device), name, nbytes);
  });
}

FAKECUDA_API Result cuDeviceGetPCIBusId(char* id, int nbytes, DeviceHandle device) {
  return call("cuDeviceGetPCIBusId", Needs::kInit, [&](World& world, auto&) {
    if (!valid(world, device)) return Result::kInvalidDevice;
    return copy_text("FACE:0" + std::to_string(device % 10) + ":1F.7", id, nbytes);  // not in any machine's sysfs
  });
}

FAKECUDA_API Result cuDeviceGetAttribute(int* value, int attribute, DeviceHandle device) {
  return call("cuDeviceGetAttribute", Needs::kInit, [&](World& world, auto&) {
    if (!valid(world, device)) return Result::kInvalidDevice;
    switch (attribute) {
      case snapstone::cuda::kAttributeComputeCapabilityMajor:
        *value = world.options.compute_capability / 10;
        return Result::kSuccess;
      case snapstone::cuda::kAttributeComputeCapabilityMinor:
        *value = world.options.compute_capability % 10;
        return Result::kSuccess;
      case snapstone::cuda::kAttributeMultiprocessorCount:
        *value = 132;
        return Result::kSuccess;
      case snapstone::cuda::kAttributeMemoryPoolsSupported:
        *value = world.options.pools ? 1 : 0;
        return Result::kSuccess;
      case snapstone::cuda::kAttributeRegisteredHostPointers:
        *value = world.options.host_pointers ? 1 : 0;
        return Result::kSuccess;
      case snapstone::cuda::kAttributeHostNumaId:
        if (world.options.version < 12020) return Result::kInvalidValue;
        *value = world.options.numa_node;
        return Result::kSuccess;
      default:
        return Result::kInvalidValue;
    }
  });
}

FAKECUDA_API Result cuDeviceTotalMem_v2(std::size_t* nbytes, DeviceHandle device) {
  return call("cuDeviceTotalMem_v2", Needs::kInit, [&](World& world, auto&) {
    if (!valid(world, device)) return Result::kInvalidDevice;
    *nbytes = world.options.memory_bytes;
    return Result::kSuccess;
  });
}

// Whoever has memory on a device has made the context.
FAKECUDA_API Result cuDevicePrimaryCtxGetState(DeviceHandle device, unsigned* flags, int* active) {
  return call("cuDevicePrimaryCtxGetState", Needs::kInit, [&](World& world, auto&) {
    if (!valid(world, device)) return Result::kInvalidDevice;
    *flags = 0;
    *active = world.contexts[static_cast<std::size_t>(device)].retained > 0 ||
              world.memory->free_bytes(device) < world.options.memory_bytes;
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuDevicePrimaryCtxRetain(ContextHandle* context, DeviceHandle device) {
  return call("cuDevicePrimaryCtxRetain", Needs::kInit, [&](World& world, auto&) {
    if (!valid(world, device)) return Result::kInvalidDevice;
    Context& primary = world.contexts[static_cast<std::size_t>(device)];
    ++primary.retained;
    *context = reinterpret_cast<ContextHandle>(&primary);
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuCtxPushCurrent_v2(ContextHandle handle) {
  return call("cuCtxPushCurrent_v2", Needs::kInit, [&](World& world, auto&) {
    for (Context& context : world.contexts) {
      if (reinterpret_cast<ContextHandle>(&context) != handle || context.retained == 0) continue;
      context_stack().push_back(&context);
      return Result::kSuccess;
    }
    return Result::kInvalidContext;
  });
}

// Works on a lost device, too: a thread must be able to leave it.
FAKECUDA_API Result cuCtxPopCurrent_v2(ContextHandle* context) {
  World& world = World::get();
  if (world.forked) return Result::kNotInitialized;
  const World::Lock lock(world.mutex);
  world.report.count("cuCtxPopCurrent_v2");
  if (context_stack().empty()) return Result::kInvalidContext;
  *context = reinterpret_cast<ContextHandle>(context_stack().back());
  context_stack().pop_back();
  return Result::kSuccess;
}

FAKECUDA_API Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return call("cuCtxGetStreamPriorityRange", Needs::kContext, [&](World&, auto&) {
    *least = 0;
    *greatest = -5;
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuThreadExchangeStreamCaptureMode(CaptureMode* mode) {
  return call("cuThreadExchangeStreamCaptureMode", Needs::kInit, [&](World&, auto&) {
    std::swap(*mode, capture_mode());
    return Result::kSuccess;
  });
}
