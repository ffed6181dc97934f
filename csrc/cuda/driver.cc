#include "cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>

namespace snapstone::cuda {
namespace {

constexpr int kVersionMin = 12000;

struct Attempt {
  std::unique_ptr<const Driver> driver;
  std::string absence;
};

std::atomic<const Attempt*> attempt{nullptr};
std::atomic<int> trying{0};  // threads inside, or at the door of, the first attempt
std::mutex attempt_mutex;

const Attempt& forked() {
  static const Attempt& instance =
      *new Attempt{nullptr, "this process was forked from one that had initialised CUDA; start it with spawn instead"};
  return instance;
}

// A fork while another thread tries leaves CUDA half initialised and the mutex locked for good.
[[maybe_unused]] const int fork_handler = [] {
  forked();
  return ::pthread_atfork(nullptr, nullptr, [] {
    const Attempt* const before = attempt.load();
    if (before != nullptr ? before->driver != nullptr : trying.load() != 0) attempt.store(&forked());
  });
}();

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string refusal(const Driver& driver, const char* call, Result result) {
  const char* name = nullptr;
  const bool known = driver.cuGetErrorName(result, &name) == Result::kSuccess && name != nullptr;
  return std::string(call) + ": " + (known ? name : "CUresult " + std::to_string(static_cast<int>(result)));
}

// Why `driver` cannot be used, or empty; fills its version and device count.
std::string start(Driver& driver) {
  if (const Result result = driver.cuDriverGetVersion(&driver.version); result != Result::kSuccess) {
    return refusal(driver, "cuDriverGetVersion", result);
  }
  if (driver.version < kVersionMin) {
    return "the driver supports CUDA " + version_text(driver.version) + "; " + version_text(kVersionMin) +
           " or newer is needed";
  }
  if (const Result result = driver.cuInit(0); result != Result::kSuccess) {
    const char* const hint =
        result == Result::kNotInitialized ? " (was this process forked from one that had initialised CUDA?)" : "";
    return refusal(driver, "cuInit", result) + hint;
  }
  if (const Result result = driver.cuDeviceGetCount(&driver.device_count); result != Result::kSuccess) {
    return refusal(driver, "cuDeviceGetCount", result);
  }
  return driver.device_count > 0 ? "" : "the driver sees no device";
}

Attempt load() {
  const char* path = std::getenv("SNAPSTONE_LIBCUDA");
  if (path == nullptr || *path == '\0') path = "libcuda.so.1";
  if (std::string(path) == "off") return {nullptr, "SNAPSTONE_LIBCUDA=off"};
  Library library(path);
  if (!library.error().empty()) return {nullptr, library.error()};
  auto driver = std::make_unique<Driver>(std::move(library));
  if (const auto& missing = driver->library.missing(); !missing.empty()) {
    return {nullptr, std::string(path) + " has no " + join(missing)};
  }
  std::string absence = start(*driver);
  if (!absence.empty()) return {nullptr, std::move(absence)};
  return {std::move(driver), ""};
}

const Attempt& tried_once() {
  if (const Attempt* done = attempt.load(std::memory_order_acquire)) return *done;
  trying.fetch_add(1);
  const std::lock_guard lock(attempt_mutex);
  const Attempt* done = attempt.load();
  if (done == nullptr) {
    done = new Attempt(load());
    attempt.store(done);
  }
  trying.fetch_sub(1);
  return *done;
}

std::string describe(const std::string& name, Result code, const std::string& call, int device) {
  std::string text = call + ": " + name + " (" + std::to_string(static_cast<int>(code)) + ")";
  if (device != CudaError::kNoDevice) text += " on device " + std::to_string(device);
  return text;
}

}  // namespace

CudaError::CudaError(Result code, std::string name, std::string call, int device)
    : std::runtime_error(describe(name, code, call, device)),
      code_(code),
      name_(std::move(name)),
      call_(std::move(call)),
      device_(device) {}

void check(Result result, const char* call, int device) {
  if (result != Result::kSuccess) [[unlikely]] {
    throw CudaError(result, result_name(result), call, device);
  }
}

std::string result_name(Result result) {
  const Attempt* done = attempt.load(std::memory_order_acquire);
  const char* name = nullptr;
  if (done != nullptr && done->driver != nullptr && done->driver->cuGetErrorName(result, &name) == Result::kSuccess &&
      name != nullptr) {
    return name;
  }
  return "CUresult " + std::to_string(static_cast<int>(result));
}

Library::Library(const char* path) : handle_(::dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
  if (handle_ == nullptr) {
    const char* const error = ::dlerror();
    error_ = error != nullptr ? error : std::string(path) + ": dlopen failed";
  }
}

void* Library::find(const char* name, bool required) {
  void* const address = handle_ != nullptr ? ::dlsym(handle_, name) : nullptr;
  if (address == nullptr && required) missing_.emplace_back(name);
  return address;
}

Result injected(const char* call) {
  const int number = fault::point(call, "").error_number;
  if (number == 0) return Result::kSuccess;
  if (number == ENOMEM) return Result::kOutOfMemory;
  switch (const auto result = static_cast<Result>(number)) {
    case Result::kInvalidValue:
    case Result::kOutOfMemory:
    case Result::kNotInitialized:
    case Result::kDeinitialized:
    case Result::kStubLibrary:
      return result;
    default:  // no errno of Linux is as large as 200, and those from 100 on are of sockets
      return number >= static_cast<int>(Result::kNoDevice) ? result : Result::kOperatingSystem;
  }
}

Driver::Driver(Library opened) : library(std::move(opened)) {}

const Driver* Driver::get() { return tried_once().driver.get(); }

std::string Driver::absence() { return tried_once().absence; }

const Driver& Driver::require() {
  const Attempt& done = tried_once();
  if (done.driver == nullptr) {
    throw CudaError(Result::kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "no CUDA, " + done.absence);
  }
  return *done.driver;
}

bool Driver::tried() { return attempt.load(std::memory_order_acquire) != nullptr; }

}  // namespace snapstone::cuda
