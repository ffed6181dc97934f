// The fake driver in a test: loaded as the engine's libcuda, told what to do, asked what it saw.
//
// A test that includes this runs on the fake, whatever the machine has. FAKECUDA_* of the environment hold.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "control.h"
#include "cuda/copies.h"
#include "cuda/device_buffer.h"
#include "cuda/host_registration.h"
#include "cuda/stream.h"
#include "seed.h"

namespace snapstone::testing {

// Before the first call of CUDA in any process of this program.
[[maybe_unused]] inline const bool fake_chosen = [] {
  ::setenv("SNAPSTONE_LIBCUDA", SNAPSTONE_FAKE_CUDA, 0);
  return true;
}();

// A function of control.h: SNAPSTONE_FAKE(fakecuda_drain)().
template <class Function>
Function* fake_function(const char* name) {
  static void* const library = ::dlopen(SNAPSTONE_FAKE_CUDA, RTLD_NOW);
  void* const address = library != nullptr ? ::dlsym(library, name) : nullptr;
  if (address == nullptr) throw std::runtime_error(std::string("the fake driver has no ") + name);
  return reinterpret_cast<Function*>(address);
}
#define SNAPSTONE_FAKE(name) (::snapstone::testing::fake_function<decltype(name)>(#name))

inline std::string fake_violations() { return SNAPSTONE_FAKE(fakecuda_violations)(); }

inline std::uint64_t fake_counter(const std::string& name) {
  const std::string json = SNAPSTONE_FAKE(fakecuda_counters)();
  const auto at = json.find('"' + name + "\": ");
  return at == std::string::npos ? 0 : std::stoull(json.substr(at + name.size() + 4));
}

// Page-aligned memory of the host.
class HostPages {
 public:
  explicit HostPages(std::uint64_t nbytes) : nbytes_(nbytes) {
    void* const begin = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) throw std::runtime_error("mmap");
    data_ = static_cast<std::uint8_t*>(begin);
  }
  ~HostPages() { ::munmap(data_, nbytes_); }
  HostPages(const HostPages&) = delete;
  HostPages& operator=(const HostPages&) = delete;

  std::uint8_t* data() const { return data_; }
  std::uint64_t address() const { return reinterpret_cast<std::uint64_t>(data_); }
  std::uint64_t nbytes() const { return nbytes_; }

 private:
  std::uint64_t nbytes_;
  std::uint8_t* data_ = nullptr;
};

class RegisteredPages : public HostPages {
 public:
  RegisteredPages(cuda::Device& device, std::uint64_t nbytes) : HostPages(nbytes) {
    std::string refusal;
    registration_ = cuda::HostRegistration::of(device, data(), nbytes, &refusal);
    if (!registration_) throw std::runtime_error(refusal);
  }

 private:
  std::optional<cuda::HostRegistration> registration_;
};

inline void await(const cuda::Event& event) {
  while (!event.done("test/done")) std::this_thread::sleep_for(std::chrono::microseconds(20));
}

inline std::vector<std::uint8_t> pattern(std::uint64_t nbytes, std::uint64_t salt) {
  std::vector<std::uint8_t> bytes(nbytes);
  for (std::uint64_t i = 0; i < nbytes; ++i) bytes[i] = static_cast<std::uint8_t>((i * 131 + salt * 29 + (i >> 8)) | 1);
  return bytes;
}

inline bool same(const std::uint8_t* data, const std::vector<std::uint8_t>& expected) {
  return std::equal(expected.begin(), expected.end(), data);
}

// Each test begins with an idle fake in chaos, and ends without violations unless it took them.
class FakeCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_NE(cuda::Driver::get(), nullptr) << cuda::Driver::absence();
    SNAPSTONE_FAKE(fakecuda_reset)();
    SNAPSTONE_FAKE(fakecuda_mode)("chaos");
    SNAPSTONE_FAKE(fakecuda_seed)(seed());
  }
  void TearDown() override {
    SNAPSTONE_FAKE(fakecuda_drain)();
    EXPECT_EQ(take_violations(), "") << "seed " << fake_counter("seed");
  }

  // What the fake complains about, at most `count` of it, forgotten.
  std::string take_violations() {
    const std::string all = fake_violations();
    std::string fresh = all.substr(std::min(taken_, all.size()));
    taken_ = all.size();
    return fresh;
  }
  cuda::Device& device(int ordinal = 0) { return cuda::Device::of(ordinal); }

 private:
  std::size_t taken_ = 0;
};

struct ChildResult {
  int status = 0;
  std::string output;
};

// Runs one (disabled) test of this program in a process of its own, with more in its environment.
ChildResult run_child(const std::string& test, const std::string& environment);

inline ChildResult run_child(const std::string& test, const std::string& environment) {
  char path[4096] = "";
  const ssize_t length = ::readlink("/proc/self/exe", path, sizeof path - 1);
  const std::string command = "env " + environment + " '" + std::string(path, static_cast<std::size_t>(length)) +
                              "' --gtest_also_run_disabled_tests --gtest_filter='" + test + "' 2>&1";
  FILE* const pipe = ::popen(command.c_str(), "r");
  ChildResult result;
  char buffer[4096];
  for (std::size_t n = 0; (n = ::fread(buffer, 1, sizeof buffer, pipe)) != 0;) result.output.append(buffer, n);
  result.status = ::pclose(pipe);
  return result;
}

}  // namespace snapstone::testing
