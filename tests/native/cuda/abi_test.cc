// csrc/cuda/driver_types.h and the table of driver.h against a toolkit's own headers, where one is installed.
#include <gtest/gtest.h>

#include "cuda/driver.h"

#if __has_include(<cuda.h>) && __has_include(<cudaTypedefs.h>)
#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstddef>
#include <iterator>
#include <type_traits>

namespace snapstone::cuda {
namespace {

static_assert(sizeof(Memcpy2D) == sizeof(CUDA_MEMCPY2D));
static_assert(offsetof(Memcpy2D, src_x_bytes) == offsetof(CUDA_MEMCPY2D, srcXInBytes));
static_assert(offsetof(Memcpy2D, src_type) == offsetof(CUDA_MEMCPY2D, srcMemoryType));
static_assert(offsetof(Memcpy2D, src_host) == offsetof(CUDA_MEMCPY2D, srcHost));
static_assert(offsetof(Memcpy2D, src_device) == offsetof(CUDA_MEMCPY2D, srcDevice));
static_assert(offsetof(Memcpy2D, src_pitch) == offsetof(CUDA_MEMCPY2D, srcPitch));
static_assert(offsetof(Memcpy2D, dst_x_bytes) == offsetof(CUDA_MEMCPY2D, dstXInBytes));
static_assert(offsetof(Memcpy2D, dst_type) == offsetof(CUDA_MEMCPY2D, dstMemoryType));
static_assert(offsetof(Memcpy2D, dst_host) == offsetof(CUDA_MEMCPY2D, dstHost));
static_assert(offsetof(Memcpy2D, dst_device) == offsetof(CUDA_MEMCPY2D, dstDevice));
static_assert(offsetof(Memcpy2D, dst_pitch) == offsetof(CUDA_MEMCPY2D, dstPitch));
static_assert(offsetof(Memcpy2D, width_bytes) == offsetof(CUDA_MEMCPY2D, WidthInBytes));
static_assert(offsetof(Memcpy2D, height) == offsetof(CUDA_MEMCPY2D, Height));
#if CUDA_VERSION >= 12080
static_assert(sizeof(BatchAttributes) == sizeof(CUmemcpyAttributes));
static_assert(offsetof(BatchAttributes, source_access_order) == offsetof(CUmemcpyAttributes, srcAccessOrder));
static_assert(offsetof(BatchAttributes, source_hint) == offsetof(CUmemcpyAttributes, srcLocHint));
static_assert(offsetof(BatchAttributes, target_hint) == offsetof(CUmemcpyAttributes, dstLocHint));
static_assert(offsetof(BatchAttributes, flags) == offsetof(CUmemcpyAttributes, flags));
static_assert(static_cast<int>(SourceAccessOrder::kStream) == CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
#endif
static_assert(kAttributeComputeCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(kAttributeComputeCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(kAttributeMultiprocessorCount == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
static_assert(kAttributeRegisteredHostPointers == CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM);
static_assert(kAttributeMemoryPoolsSupported == CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED);
#if CUDA_VERSION >= 12020
static_assert(kAttributeHostNumaId == CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID);
#endif
static_assert(kFunctionAttributeMaxDynamicSharedSizeBytes == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(kStreamNonBlocking == CU_STREAM_NON_BLOCKING && kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(kHostRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(static_cast<int>(CaptureMode::kRelaxed) == CU_STREAM_CAPTURE_MODE_RELAXED);
static_assert(static_cast<int>(CaptureStatus::kActive) == CU_STREAM_CAPTURE_STATUS_ACTIVE);
static_assert(static_cast<int>(MemoryType::kHost) == CU_MEMORYTYPE_HOST);
static_assert(static_cast<int>(MemoryType::kDevice) == CU_MEMORYTYPE_DEVICE);
static_assert(static_cast<int>(Result::kNotReady) == CUDA_ERROR_NOT_READY);
static_assert(static_cast<int>(Result::kOutOfMemory) == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(static_cast<int>(Result::kStubLibrary) == CUDA_ERROR_STUB_LIBRARY);
static_assert(static_cast<int>(Result::kNotSupported) == CUDA_ERROR_NOT_SUPPORTED);
static_assert(static_cast<int>(Result::kStreamCaptureImplicit) == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
static_assert(static_cast<int>(Result::kStreamCaptureIsolation) == CUDA_ERROR_STREAM_CAPTURE_ISOLATION);

// Two types that are passed alike: integers of one size (enumerations too), or pointers.
template <class Ours, class Theirs>
constexpr bool alike() {
  if constexpr (std::is_pointer_v<Ours> || std::is_pointer_v<Theirs>) {
    return std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>;
  } else {
    return sizeof(Ours) == sizeof(Theirs);
  }
}

template <class Ours, class Theirs>
constexpr bool matches = false;
template <class... Ours, class... Theirs>
constexpr bool matches<Function<Ours...>, CUresult (*)(Theirs...)> = [] {
  if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
    return (alike<Ours, Theirs>() && ...);
  } else {
    return false;
  }
}();

// Member of Driver, type of the function pointer. Without the batches, which have two types.
#define SNAPSTONE_TABLE(each)                                                                                          \
  each(cuInit, PFN_cuInit_v2000) each(cuDriverGetVersion, PFN_cuDriverGetVersion_v2020)                                \
      each(cuGetErrorName, PFN_cuGetErrorName_v6000) each(cuDeviceGetCount, PFN_cuDeviceGetCount_v2000) each(          \
          cuDeviceGet, PFN_cuDeviceGet_v2000) each(cuDeviceGetName, PFN_cuDeviceGetName_v2000)                         \
          each(cuDeviceGetPCIBusId, PFN_cuDeviceGetPCIBusId_v4010) each(                                               \
              cuDeviceGetAttribute, PFN_cuDeviceGetAttribute_v2000) each(cuDeviceTotalMem, PFN_cuDeviceTotalMem_v3020) \
              each(cuDevicePrimaryCtxRetain, PFN_cuDevicePrimaryCtxRetain_v7000)                                       \
                  each(cuDevicePrimaryCtxGetState, PFN_cuDevicePrimaryCtxGetState_v7000) each(                         \
                      cuCtxPushCurrent, PFN_cuCtxPushCurrent_v4000) each(cuCtxPopCurrent, PFN_cuCtxPopCurrent_v4000)   \
                      each(cuCtxGetStreamPriorityRange, PFN_cuCtxGetStreamPriorityRange_v5050) each(                   \
                          cuThreadExchangeStreamCaptureMode, PFN_cuThreadExchangeStreamCaptureMode_v10010)             \
                          each(cuMemGetInfo, PFN_cuMemGetInfo_v3020) each(cuMemAlloc, PFN_cuMemAlloc_v3020) each(      \
                              cuMemFree, PFN_cuMemFree_v3020) each(cuMemAllocAsync, PFN_cuMemAllocAsync_v11020)        \
                              each(cuMemFreeAsync, PFN_cuMemFreeAsync_v11020) each(                                    \
                                  cuMemHostRegister, PFN_cuMemHostRegister_v6050) each(cuMemHostUnregister,            \
                                                                                       PFN_cuMemHostUnregister_v4000)  \
                                  each(cuMemcpyDtoHAsync, PFN_cuMemcpyDtoHAsync_v3020) each(                           \
                                      cuMemcpyHtoDAsync, PFN_cuMemcpyHtoDAsync_v3020)                                  \
                                      each(cuMemcpyDtoDAsync, PFN_cuMemcpyDtoDAsync_v3020) each(                       \
                                          cuMemcpy2DAsync, PFN_cuMemcpy2DAsync_v3020)                                  \
                                          each(cuStreamCreateWithPriority, PFN_cuStreamCreateWithPriority_v5050) each( \
                                              cuStreamDestroy, PFN_cuStreamDestroy_v4000)                              \
                                              each(cuStreamWaitEvent, PFN_cuStreamWaitEvent_v3020) each(               \
                                                  cuStreamSynchronize, PFN_cuStreamSynchronize_v2000)                  \
                                                  each(cuStreamIsCapturing, PFN_cuStreamIsCapturing_v10000) each(      \
                                                      cuEventCreate, PFN_cuEventCreate_v2000)                          \
                                                      each(cuEventDestroy, PFN_cuEventDestroy_v4000) each(             \
                                                          cuEventRecord, PFN_cuEventRecord_v2000)                      \
                                                          each(cuEventQuery, PFN_cuEventQuery_v2000) each(             \
                                                              cuEventSynchronize, PFN_cuEventSynchronize_v2000)        \
                                                              each(cuModuleLoadData, PFN_cuModuleLoadData_v2000) each( \
                                                                  cuModuleGetFunction, PFN_cuModuleGetFunction_v2000)  \
                                                                  each(cuFuncSetAttribute,                             \
                                                                       PFN_cuFuncSetAttribute_v9000)                   \
                                                                      each(cuLaunchKernel, PFN_cuLaunchKernel_v4000)

// The toolkit's macros turn names into those of the ABI; then they must go, or they would rename Driver's members.
#define SNAPSTONE_TEXT(name) #name
#define SNAPSTONE_EXPORTED(member, type) SNAPSTONE_TEXT(member),
constexpr const char* kExported[] = {SNAPSTONE_TABLE(SNAPSTONE_EXPORTED)};
#undef cuDeviceTotalMem
#undef cuCtxPushCurrent
#undef cuCtxPopCurrent
#undef cuMemGetInfo
#undef cuMemAlloc
#undef cuMemFree
#undef cuMemHostRegister
#undef cuMemcpyDtoHAsync
#undef cuMemcpyHtoDAsync
#undef cuMemcpyDtoDAsync
#undef cuMemcpy2DAsync
#undef cuMemcpyBatchAsync
#undef cuStreamDestroy
#undef cuEventDestroy

#define SNAPSTONE_MATCHES(member, type) static_assert(matches<decltype(Driver::member), type>, #member);
SNAPSTONE_TABLE(SNAPSTONE_MATCHES)
#if CUDA_VERSION >= 12080
static_assert(matches<decltype(Driver::cuMemcpyBatchAsync), PFN_cuMemcpyBatchAsync_v12080>);
#endif
#if CUDA_VERSION >= 13000
static_assert(matches<decltype(Driver::cuMemcpyBatchAsync_v2), PFN_cuMemcpyBatchAsync_v13000>);
#endif

TEST(Abi, is_that_of_the_toolkit) {
  const Driver driver{Library()};
#define SNAPSTONE_NAME(member, type) driver.member.name(),
  const char* const names[] = {SNAPSTONE_TABLE(SNAPSTONE_NAME)};
  for (std::size_t i = 0; i < std::size(names); ++i) EXPECT_STREQ(names[i], kExported[i]);
}

}  // namespace
}  // namespace snapstone::cuda

#else

TEST(Abi, is_that_of_the_toolkit) { GTEST_SKIP() << "no <cuda.h> and <cudaTypedefs.h>"; }

#endif
