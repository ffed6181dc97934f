#include "cuda/driver.h"

#include <sys/wait.h>
#include <unistd.h>

#include <list>
#include <map>

#include "armed_faults.h"
#include "fake_cuda.h"

namespace snapstone::cuda {
namespace {

using testing::ChildResult;
using testing::run_child;

// Run in processes of their own by the tests below.

TEST(DriverChild, DISABLED_report) {
  const Driver* const driver = Driver::get();
  std::printf("absence<%s>\n", Driver::absence().c_str());
  if (driver == nullptr) return;
  std::printf("version<%d> devices<%d> pools<%d> batch<%d> second<%d> launch<%d>\n", driver->version,
              driver->device_count, driver->cuMemAllocAsync ? 1 : 0, driver->cuMemcpyBatchAsync ? 1 : 0,
              driver->cuMemcpyBatchAsync_v2 ? 1 : 0, driver->cuLaunchKernel ? 1 : 0);
}

TEST(DriverChild, DISABLED_many_threads) {
  std::vector<const Driver*> found(8);
  {
    std::vector<std::jthread> threads;
    for (const Driver*& driver : found) threads.emplace_back([&driver] { driver = Driver::get(); });
  }
  for (const Driver* driver : found) EXPECT_EQ(driver, found[0]);
  std::printf("inits<%d>\n", static_cast<int>(testing::fake_counter("cuInit")));
}

// Exit status of a forked child that reports what it found: 0 a driver, 1 none, 2 none because of the fork.
int fork_and_try() {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);
    const bool found = Driver::get() != nullptr;
    ::_exit(found ? 0 : Driver::absence().find("forked") != std::string::npos ? 2 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(DriverChild, DISABLED_fork) {
  EXPECT_FALSE(Driver::tried());
  EXPECT_EQ(fork_and_try(), 0) << "a child forked before anybody tried may try";
  ASSERT_NE(Driver::get(), nullptr);
  EXPECT_TRUE(Driver::tried());
  Event event(Device::of(0));
  EXPECT_EQ(fork_and_try(), 2);
  EXPECT_EXIT(
      {
        {
          ::alarm(20);
          Stream gone(Stream::borrowed(event.device(), nullptr));
          Event moved(std::move(event));  // destroyed without a driver
          EXPECT_THROW(Device::of(0), CudaError);
        }
        ::_exit(::testing::Test::HasFailure() ? 1 : 0);
      },
      ::testing::ExitedWithCode(0), "");
  ASSERT_NE(Driver::get(), nullptr) << "the parent keeps its driver";
  std::printf("forks<3>\n");
}

// What stands between `key`< and > in a report.
std::string reported(const std::string& environment, const std::string& key) {
  static std::map<std::string, ChildResult> reports;
  if (!reports.contains(environment)) reports[environment] = run_child("DriverChild.DISABLED_report", environment);
  const ChildResult& child = reports[environment];
  EXPECT_EQ(child.status, 0) << child.output;
  const auto begin = child.output.find(key + "<");
  if (begin == std::string::npos) return "no report";
  const auto value = begin + key.size() + 1;
  return child.output.substr(value, child.output.find('>', value) - value);
}

std::string absence_with(const std::string& environment) { return reported(environment, "absence"); }

int value_with(const std::string& environment, const std::string& key) {
  const std::string text = reported(environment, key);
  return text.empty() || text[0] < '0' || text[0] > '9' ? -1 : std::stoi(text);
}

TEST(Driver, is_found) {
  EXPECT_EQ(absence_with(""), "");
  EXPECT_EQ(value_with("FAKECUDA_DEVICES=3", "devices"), 3);
}

TEST(Driver, without_a_library_there_is_no_cuda) {
  EXPECT_NE(absence_with("SNAPSTONE_LIBCUDA=/nonexistent/libcuda.so.1").find("/nonexistent/libcuda.so.1"),
            std::string::npos);
  EXPECT_EQ(absence_with("SNAPSTONE_LIBCUDA=off"), "SNAPSTONE_LIBCUDA=off");
  EXPECT_NE(absence_with("SNAPSTONE_LIBCUDA=/dev/null").find("/dev/null"), std::string::npos);
  EXPECT_NE(absence_with("SNAPSTONE_LIBCUDA=libm.so.6").find("libm.so.6 has no cuInit, "), std::string::npos);
}

TEST(Driver, missing_symbols_are_named_unless_they_are_optional) {
  // In the order of the table.
  const std::vector<std::string> required = {
      "cuInit",
      "cuDriverGetVersion",
      "cuGetErrorName",
      "cuDeviceGetCount",
      "cuDeviceGet",
      "cuDeviceGetName",
      "cuDeviceGetPCIBusId",
      "cuDeviceGetAttribute",
      "cuDeviceTotalMem_v2",
      "cuDevicePrimaryCtxRetain",
      "cuCtxPushCurrent_v2",
      "cuCtxPopCurrent_v2",
      "cuCtxGetStreamPriorityRange",
      "cuThreadExchangeStreamCaptureMode",
      "cuMemGetInfo_v2",
      "cuMemAlloc_v2",
      "cuMemFree_v2",
      "cuMemHostRegister_v2",
      "cuMemHostUnregister",
      "cuMemcpyDtoHAsync_v2",
      "cuMemcpyHtoDAsync_v2",
      "cuMemcpyDtoDAsync_v2",
      "cuMemcpy2DAsync_v2",
      "cuStreamCreateWithPriority",
      "cuStreamDestroy_v2",
      "cuStreamWaitEvent",
      "cuStreamSynchronize",
      "cuStreamIsCapturing",
      "cuEventCreate",
      "cuEventDestroy_v2",
      "cuEventRecord",
      "cuEventQuery",
      "cuEventSynchronize",
  };
  std::string all;
  for (const std::string& name : required) all += (all.empty() ? "" : ",") + name;
  std::string named = " has no " + all;
  for (std::size_t at = 0; (at = named.find(',', at)) != std::string::npos; at += 2) named.replace(at, 1, ", ");
  EXPECT_TRUE(absence_with("FAKECUDA_HIDE=" + all).ends_with(named)) << absence_with("FAKECUDA_HIDE=" + all);
  EXPECT_TRUE(absence_with("FAKECUDA_HIDE=cuInit,cuEventQuery").ends_with(" has no cuInit, cuEventQuery"));
  EXPECT_EQ(value_with("FAKECUDA_HIDE=cuMemAllocAsync", "pools"), 0);
  EXPECT_EQ(value_with("FAKECUDA_HIDE=cuLaunchKernel", "launch"), 0);
  EXPECT_EQ(absence_with("FAKECUDA_HIDE=cuMemFreeAsync,cuModuleLoadData,cuModuleGetFunction,cuFuncSetAttribute"), "");
}

TEST(Driver, versions_decide_what_there_is) {
  EXPECT_EQ(absence_with("FAKECUDA_VERSION=11080"), "the driver supports CUDA 11.8; 12.0 or newer is needed");
  const std::map<int, std::pair<int, int>> batches = {{12000, {0, 0}}, {12070, {0, 0}}, {12080, {1, 0}},
                                                      {12090, {1, 0}}, {13000, {1, 1}}, {13010, {1, 1}}};
  for (const auto& [version, expected] : batches) {
    const std::string environment = "FAKECUDA_VERSION=" + std::to_string(version);
    EXPECT_EQ(value_with(environment, "version"), version);
    EXPECT_EQ(value_with(environment, "batch"), expected.first) << version;
    EXPECT_EQ(value_with(environment, "second"), expected.second) << version;
  }
}

TEST(Driver, a_start_that_fails_says_which_call_and_why) {
  EXPECT_EQ(absence_with("FAKECUDA_FAIL=cuDriverGetVersion:1:999"), "cuDriverGetVersion: CUDA_ERROR_UNKNOWN");
  EXPECT_EQ(absence_with("FAKECUDA_FAIL=cuInit:1:34"), "cuInit: CUDA_ERROR_STUB_LIBRARY");
  EXPECT_EQ(absence_with("FAKECUDA_FAIL=cuInit:1:802"), "cuInit: CUDA_ERROR_SYSTEM_NOT_READY");
  EXPECT_EQ(absence_with("FAKECUDA_FAIL=cuInit:1:4321"), "cuInit: CUresult 4321");
  EXPECT_EQ(absence_with("FAKECUDA_DEVICES=0"), "cuInit: CUDA_ERROR_NO_DEVICE");
  EXPECT_EQ(absence_with("FAKECUDA_FAIL=cuDeviceGetCount:1:3"), "cuDeviceGetCount: CUDA_ERROR_NOT_INITIALIZED");
  EXPECT_NE(absence_with("FAKECUDA_FAIL=cuInit:1:3").find("forked"), std::string::npos);
}

TEST(Driver, is_tried_once_however_many_threads_ask) {
  const ChildResult child = run_child("DriverChild.DISABLED_many_threads", "A=b");
  EXPECT_EQ(child.status, 0) << child.output;
  EXPECT_NE(child.output.find("inits<1>"), std::string::npos) << child.output;
}

TEST(Driver, a_child_forked_after_the_start_has_none) {
  const ChildResult child = run_child("DriverChild.DISABLED_fork", "A=b");
  EXPECT_EQ(child.status, 0) << child.output;
  EXPECT_NE(child.output.find("forks<3>"), std::string::npos) << child.output;
}

class DriverCalls : public testing::FakeCuda {};

TEST_F(DriverCalls, errors_say_what_failed_and_where) {
  try {
    check(Result::kOutOfMemory, "cuMemAlloc_v2", 1);
    FAIL();
  } catch (const CudaError& error) {
    EXPECT_STREQ(error.what(), "cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY (2) on device 1");
    EXPECT_EQ(error.code(), Result::kOutOfMemory);
    EXPECT_EQ(error.name(), "CUDA_ERROR_OUT_OF_MEMORY");
    EXPECT_EQ(error.call(), "cuMemAlloc_v2");
    EXPECT_EQ(error.device(), 1);
  }
  EXPECT_EQ(result_name(static_cast<Result>(1234)), "CUresult 1234");
  EXPECT_NO_THROW(check(Result::kSuccess, "cuInit"));
}

TEST_F(DriverCalls, fault_rules_reach_every_call) {
  const std::map<std::string, Result> injected_results = {{"2", Result::kOutOfMemory},
                                                          {"719", Result::kLaunchFailed},
                                                          {"ENOMEM", Result::kOutOfMemory},
                                                          {"EIO", Result::kOperatingSystem},
                                                          {"EPERM", Result::kInvalidValue}};
  for (const auto& [text, result] : injected_results) {
    const testing::ArmedFaults faults("cuStreamIsCapturing:2:errno=" + text);
    const Stream stream(device());
    EXPECT_FALSE(stream.capturing());
    try {
      stream.capturing();
      ADD_FAILURE() << text;
    } catch (const CudaError& error) {
      EXPECT_EQ(error.code(), result) << text;
      EXPECT_EQ(error.call(), "cuStreamIsCapturing");
    }
    EXPECT_FALSE(stream.capturing()) << "the call after the one that was to fail";
  }
}

// What a save and a load do, in small. `pages` outlive what is in flight when a call fails.
void round_trip(Device& device, const testing::HostPages& pages) {
  std::string refusal;
  const auto registration = HostRegistration::of(device, pages.data(), pages.nbytes(), &refusal);
  if (!registration) throw std::runtime_error(refusal);
  Stream stream(device);
  Stream other(device);
  auto buffer = DeviceBuffer::allocate(stream, 8192);
  if (!buffer) throw CudaError(Result::kOutOfMemory, "", "cuMemAllocAsync");
  Event event(device);
  const std::vector<Copy> up = {{buffer->address(), pages.address(), 4096},
                                {buffer->address() + 4096, pages.address(), 4096}};
  copy_to_device(stream, up);
  stream.record(event, "test/up");
  other.wait(event, "test/up");
  copy_2d(other, Direction::kToHost, {pages.address() + 4096, 64, buffer->address(), 128, 64, 32});
  other.record(event, "test/down");
  stream.wait(event, "test/free");
  testing::await(event);
  event.synchronize();
  other.synchronize();
  static_cast<void>(device.free_bytes());
}

// Every call of a round trip fails once: the error names it, or the engine can do without it. Nothing is lost: the same
// round trip works afterwards.
TEST_F(DriverCalls, any_call_may_fail) {
  std::list<testing::HostPages> pages;  // an unregistration may be what fails
  std::vector<std::string> names;
  {
    const testing::ArmedFaults counting("none:1:kill");
    round_trip(device(), pages.emplace_back(8192));
    names = fault::seen_names();
  }
  EXPECT_GT(names.size(), 15u);
  const std::vector<std::string> dispensable = {"cuCtxPopCurrent_v2", "cuMemHostUnregister", "cuMemFreeAsync",
                                                "cuStreamDestroy_v2", "cuThreadExchangeStreamCaptureMode"};
  for (const std::string& name : names) {
    if (name.find('/') != std::string::npos) continue;  // a step, not a call
    if (name == "cuEventCreate") continue;              // events come from the pool by now
    std::string caught;
    {
      const testing::ArmedFaults faults(name + ":1:errno=999");
      try {
        round_trip(device(), pages.emplace_back(8192));
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
    }
    const bool may = std::find(dispensable.begin(), dispensable.end(), name) != dispensable.end();
    EXPECT_EQ(caught.find(name) != std::string::npos, !may) << name << ": " << caught;
    SNAPSTONE_FAKE(fakecuda_drain)();
    take_violations();  // what a failed call left behind is the test's
    EXPECT_NO_THROW(round_trip(device(), pages.emplace_back(8192))) << "after " << name;
  }
  const testing::ArmedFaults faults("cuEventCreate:1:errno=2");
  std::vector<Event> events;
  EXPECT_THROW(while (events.size() < 1000) events.emplace_back(device()), CudaError);
}

}  // namespace
}  // namespace snapstone::cuda
