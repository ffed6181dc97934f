// What libcuda.so.1 takes and returns, declared here so that building needs no CUDA: the part of its ABI that is used.
//
// As in <cuda.h> of CUDA 12.0 to 13.0. Names with a suffix (_v2) are ABI versions: the driver keeps each for good, with
// the parameters it had when it came. https://docs.nvidia.com/cuda/cuda-driver-api/
#pragma once

#include <cstddef>
#include <cstdint>

namespace snapstone::cuda {

// CUresult. A driver may return values that are not named here.
enum class Result : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kDeinitialized = 4,
  kStubLibrary = 34,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kInvalidPtx = 218,
  kUnsupportedPtxVersion = 222,
  kOperatingSystem = 304,
  kInvalidHandle = 400,
  kNotFound = 500,
  kNotReady = 600,
  kIllegalAddress = 700,
  kHostMemoryAlreadyRegistered = 712,
  kHostMemoryNotRegistered = 713,
  kLaunchFailed = 719,
  kNotPermitted = 800,
  kNotSupported = 801,
  kStreamCaptureUnsupported = 900,
  kStreamCaptureIsolation = 905,
  kStreamCaptureImplicit = 906,
  kUnknown = 999,
};

using DeviceHandle = int;             // CUdevice
using DevicePointer = std::uint64_t;  // CUdeviceptr_v2
using ContextHandle = struct Context*;
using StreamHandle = struct StreamObject*;  // the same object as cudaStream_t; null: the legacy default stream
using EventHandle = struct EventObject*;
using ModuleHandle = struct ModuleObject*;
using FunctionHandle = struct FunctionObject*;

// CUdevice_attribute
inline constexpr int kAttributeComputeCapabilityMajor = 75;
inline constexpr int kAttributeComputeCapabilityMinor = 76;
inline constexpr int kAttributeMultiprocessorCount = 16;
inline constexpr int kAttributeRegisteredHostPointers = 91;  // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
inline constexpr int kAttributeMemoryPoolsSupported = 115;
inline constexpr int kAttributeHostNumaId = 134;  // from 12.2 on

inline constexpr int kFunctionAttributeMaxDynamicSharedSizeBytes = 8;  // CUfunction_attribute

inline constexpr unsigned kStreamNonBlocking = 1;     // CU_STREAM_NON_BLOCKING: no ties with the legacy default stream
inline constexpr unsigned kEventDisableTiming = 2;    // CU_EVENT_DISABLE_TIMING
inline constexpr unsigned kHostRegisterPortable = 1;  // CU_MEMHOSTREGISTER_PORTABLE: pinned for every context

enum class CaptureMode : int { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };      // CUstreamCaptureMode
enum class CaptureStatus : int { kNone = 0, kActive = 1, kInvalidated = 2 };       // CUstreamCaptureStatus
enum class MemoryType : int { kHost = 1, kDevice = 2, kArray = 3, kUnified = 4 };  // CUmemorytype

// CUDA_MEMCPY2D_v2
struct Memcpy2D {
  std::size_t src_x_bytes;
  std::size_t src_y;
  MemoryType src_type;
  const void* src_host;
  DevicePointer src_device;
  void* src_array;
  std::size_t src_pitch;
  std::size_t dst_x_bytes;
  std::size_t dst_y;
  MemoryType dst_type;
  void* dst_host;
  DevicePointer dst_device;
  void* dst_array;
  std::size_t dst_pitch;
  std::size_t width_bytes;
  std::size_t height;
};
static_assert(sizeof(Memcpy2D) == 128 && offsetof(Memcpy2D, src_host) == 24 && offsetof(Memcpy2D, dst_host) == 80);

// CUmemcpySrcAccessOrder: only kStream keeps a read of the source behind what the stream waits for.
enum class SourceAccessOrder : int { kStream = 1, kDuringCall = 2, kAny = 3 };

// CUmemLocation
struct MemoryLocation {
  int type;
  int id;
};

// CUmemcpyAttributes, from 12.8 on
struct BatchAttributes {
  SourceAccessOrder source_access_order;
  MemoryLocation source_hint;
  MemoryLocation target_hint;
  unsigned flags;
};
static_assert(sizeof(BatchAttributes) == 24 && offsetof(BatchAttributes, flags) == 20);

}  // namespace snapstone::cuda
