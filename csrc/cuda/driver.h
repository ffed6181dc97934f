// Driver: the CUDA driver API as a table of functions, found with dlopen; nothing of CUDA is linked or included.
//
// The library is $SNAPSTONE_LIBCUDA, or libcuda.so.1; SNAPSTONE_LIBCUDA=off does without. It is tried once in a
// process, and stays loaded. Whatever is amiss (no library, a symbol missing, a driver before 12.0, cuInit refused, no
// device) means "no CUDA", with the reason in absence().
//
// Trying calls cuInit, after which children of fork() can use CUDA neither through this table nor otherwise: only who
// has CUDA memory at hand, or was asked about CUDA, calls get().
// Threads: any. A fork of a process that has tried is told that there is no driver.
// Faults:  every call passes base/fault_hook.h under its exported name, with CUresults for errno
//          (cuMemHostRegister_v2:1:errno=2); an errno that is no CUresult becomes CUDA_ERROR_OPERATING_SYSTEM.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/fault_hook.h"
#include "cuda/driver_types.h"

namespace snapstone::cuda {

class CudaError : public std::runtime_error {
 public:
  static constexpr int kNoDevice = -1;

  // `name` is CUDA's ("CUDA_ERROR_OUT_OF_MEMORY"), `call` the driver's function. `device` is an ordinal or kNoDevice.
  CudaError(Result code, std::string name, std::string call, int device = kNoDevice);

  Result code() const noexcept { return code_; }
  const std::string& name() const noexcept { return name_; }
  const std::string& call() const noexcept { return call_; }
  int device() const noexcept { return device_; }

 private:
  Result code_;
  std::string name_;
  std::string call_;
  int device_;
};

// Throws CudaError unless `result` is kSuccess.
void check(Result result, const char* call, int device = CudaError::kNoDevice);

// "CUDA_ERROR_OUT_OF_MEMORY", or "CUresult 1234" for what the driver does not know.
std::string result_name(Result result);

// The open library while a table is filled from it.
class Library {
 public:
  Library() = default;
  explicit Library(const char* path);  // error() is empty when it opened

  void* find(const char* name, bool required);
  const std::string& error() const noexcept { return error_; }
  const std::vector<std::string>& missing() const noexcept { return missing_; }  // required names that find() missed

 private:
  void* handle_ = nullptr;
  std::string error_;
  std::vector<std::string> missing_;
};

// What a fault rule wants `call` to return; kSuccess: make the call.
Result injected(const char* call);

inline constexpr bool kOptional = false;

// One function of the driver.
template <class... Arguments>
class Function {
 public:
  Function(Library& library, const char* name, bool required = true)
      : name_(name), address_(reinterpret_cast<Address>(library.find(name, required))) {}

  explicit operator bool() const noexcept { return address_ != nullptr; }
  const char* name() const noexcept { return name_; }

  Result operator()(Arguments... arguments) const {
    if (fault::armed.load(std::memory_order_relaxed)) [[unlikely]] {
      if (const Result result = injected(name_); result != Result::kSuccess) return result;
    }
    return address_(arguments...);
  }

  // The same; throws CudaError naming `device` unless it succeeds.
  void must(int device, Arguments... arguments) const { check((*this)(arguments...), name_, device); }

 private:
  using Address = Result (*)(Arguments...);

  const char* name_;
  Address address_;
};

struct Driver {
  explicit Driver(Library library);

  static const Driver* get();      // nullptr: no CUDA
  static std::string absence();    // why get() is nullptr; empty when it is not
  static const Driver& require();  // throws CudaError(kNotInitialized) with absence() instead of returning nullptr
  // Whether get() would return without trying, for those who must not be the ones to initialise CUDA.
  static bool tried();

  Library library;
  int version = 0;  // 1000 * major + 10 * minor of the newest CUDA that the driver knows: 12080, 13000
  int device_count = 0;

  Function<unsigned> cuInit{library, "cuInit"};
  Function<int*> cuDriverGetVersion{library, "cuDriverGetVersion"};
  Function<Result, const char**> cuGetErrorName{library, "cuGetErrorName"};

  Function<int*> cuDeviceGetCount{library, "cuDeviceGetCount"};
  Function<DeviceHandle*, int> cuDeviceGet{library, "cuDeviceGet"};
  Function<char*, int, DeviceHandle> cuDeviceGetName{library, "cuDeviceGetName"};
  Function<char*, int, DeviceHandle> cuDeviceGetPCIBusId{library, "cuDeviceGetPCIBusId"};
  Function<int*, int, DeviceHandle> cuDeviceGetAttribute{library, "cuDeviceGetAttribute"};
  Function<std::size_t*, DeviceHandle> cuDeviceTotalMem{library, "cuDeviceTotalMem_v2"};

  Function<DeviceHandle, unsigned*, int*> cuDevicePrimaryCtxGetState{library, "cuDevicePrimaryCtxGetState"};
  Function<ContextHandle*, DeviceHandle> cuDevicePrimaryCtxRetain{library, "cuDevicePrimaryCtxRetain"};
  Function<ContextHandle> cuCtxPushCurrent{library, "cuCtxPushCurrent_v2"};
  Function<ContextHandle*> cuCtxPopCurrent{library, "cuCtxPopCurrent_v2"};
  Function<int*, int*> cuCtxGetStreamPriorityRange{library, "cuCtxGetStreamPriorityRange"};
  Function<CaptureMode*> cuThreadExchangeStreamCaptureMode{library, "cuThreadExchangeStreamCaptureMode"};

  Function<std::size_t*, std::size_t*> cuMemGetInfo{library, "cuMemGetInfo_v2"};
  Function<DevicePointer*, std::size_t> cuMemAlloc{library, "cuMemAlloc_v2"};
  Function<DevicePointer> cuMemFree{library, "cuMemFree_v2"};
  Function<DevicePointer*, std::size_t, StreamHandle> cuMemAllocAsync{library, "cuMemAllocAsync", kOptional};
  Function<DevicePointer, StreamHandle> cuMemFreeAsync{library, "cuMemFreeAsync", kOptional};
  Function<void*, std::size_t, unsigned> cuMemHostRegister{library, "cuMemHostRegister_v2"};
  Function<void*> cuMemHostUnregister{library, "cuMemHostUnregister"};

  Function<void*, DevicePointer, std::size_t, StreamHandle> cuMemcpyDtoHAsync{library, "cuMemcpyDtoHAsync_v2"};
  Function<DevicePointer, const void*, std::size_t, StreamHandle> cuMemcpyHtoDAsync{library, "cuMemcpyHtoDAsync_v2"};
  Function<DevicePointer, DevicePointer, std::size_t, StreamHandle> cuMemcpyDtoDAsync{library, "cuMemcpyDtoDAsync_v2"};
  Function<const Memcpy2D*, StreamHandle> cuMemcpy2DAsync{library, "cuMemcpy2DAsync_v2"};
  // 12.8: targets, sources, sizes, count, attributes, attribute indexes, attribute count, failed index, stream.
  Function<DevicePointer*, DevicePointer*, std::size_t*, std::size_t, BatchAttributes*, std::size_t*, std::size_t,
           std::size_t*, StreamHandle>
      cuMemcpyBatchAsync{library, "cuMemcpyBatchAsync", kOptional};
  // 13.0: the same without the failed index.
  Function<DevicePointer*, DevicePointer*, std::size_t*, std::size_t, BatchAttributes*, std::size_t*, std::size_t,
           StreamHandle>
      cuMemcpyBatchAsync_v2{library, "cuMemcpyBatchAsync_v2", kOptional};

  Function<StreamHandle*, unsigned, int> cuStreamCreateWithPriority{library, "cuStreamCreateWithPriority"};
  Function<StreamHandle> cuStreamDestroy{library, "cuStreamDestroy_v2"};
  Function<StreamHandle, EventHandle, unsigned> cuStreamWaitEvent{library, "cuStreamWaitEvent"};
  Function<StreamHandle> cuStreamSynchronize{library, "cuStreamSynchronize"};
  Function<StreamHandle, CaptureStatus*> cuStreamIsCapturing{library, "cuStreamIsCapturing"};

  Function<EventHandle*, unsigned> cuEventCreate{library, "cuEventCreate"};
  Function<EventHandle> cuEventDestroy{library, "cuEventDestroy_v2"};
  Function<EventHandle, StreamHandle> cuEventRecord{library, "cuEventRecord"};
  Function<EventHandle> cuEventQuery{library, "cuEventQuery"};
  Function<EventHandle> cuEventSynchronize{library, "cuEventSynchronize"};

  // Without these there are no kernels, which costs speed and nothing else.
  Function<ModuleHandle*, const void*> cuModuleLoadData{library, "cuModuleLoadData", kOptional};
  Function<FunctionHandle*, ModuleHandle, const char*> cuModuleGetFunction{library, "cuModuleGetFunction", kOptional};
  Function<FunctionHandle, int, int> cuFuncSetAttribute{library, "cuFuncSetAttribute", kOptional};
  // function, grid x y z, block x y z, dynamic shared bytes, stream, parameters, extra
  Function<FunctionHandle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, StreamHandle, void**,
           void**>
      cuLaunchKernel{library, "cuLaunchKernel", kOptional};
};

}  // namespace snapstone::cuda
