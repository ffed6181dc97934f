// What tests of the pipeline on devices share: the fake driver, memory on its devices, streams of a caller.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/fake_cuda.h"
#include "pipeline/pipeline_fixture.h"

namespace snapstone::pipeline {

// Memory as torch's allocator gives it; nothing may be in flight when it goes.
class DeviceBytes {
 public:
  DeviceBytes(int device, cuda::StreamHandle stream, std::uint64_t nbytes)
      : nbytes_(nbytes), address_(nbytes == 0 ? 0 : SNAPSTONE_FAKE(fakecuda_alloc)(device, nbytes, stream)) {
    if (nbytes != 0 && address_ == 0) throw std::runtime_error("fakecuda_alloc");
  }
  DeviceBytes(DeviceBytes&& other) noexcept : nbytes_(other.nbytes_), address_(std::exchange(other.address_, 0)) {}
  DeviceBytes& operator=(DeviceBytes&&) = delete;
  ~DeviceBytes() {
    if (address_ != 0) SNAPSTONE_FAKE(fakecuda_free)(address_);
  }

  std::uint64_t nbytes() const { return nbytes_; }
  std::uint64_t address() const { return address_; }
  std::uint8_t* data() const { return reinterpret_cast<std::uint8_t*>(address_); }  // for plans; not to be followed

  Bytes read() const {  // when the host has seen all work on it end
    Bytes bytes(nbytes_);
    const int refused = nbytes_ == 0 ? 0 : SNAPSTONE_FAKE(fakecuda_read)(address_, bytes.data(), nbytes_);
    EXPECT_EQ(refused, 0);
    return bytes;
  }

 private:
  std::uint64_t nbytes_;
  std::uint64_t address_;
};

class DevicePipelineTest : public PipelineTest {
 protected:
  static constexpr int kDevices = 2;

  explicit DevicePipelineTest(std::uint64_t slots = 16) : PipelineTest(slots) {}

  void SetUp() override {
    ASSERT_NE(cuda::Driver::get(), nullptr) << cuda::Driver::absence();
    SNAPSTONE_FAKE(fakecuda_reset)();
    SNAPSTONE_FAKE(fakecuda_mode)("chaos");
    SNAPSTONE_FAKE(fakecuda_seed)(testing::seed());
  }
  void TearDown() override {
    SNAPSTONE_FAKE(fakecuda_drain)();
    EXPECT_EQ(testing::fake_violations(), "") << "seed " << testing::fake_counter("seed");
    PipelineTest::TearDown();
  }

  static cuda::Device& device(int ordinal = 0) { return cuda::Device::of(ordinal); }
  // The caller's, one per device, as torch has them; made once, as the fake keeps them for good.
  static cuda::StreamHandle caller(int ordinal) {
    static const std::vector<cuda::StreamHandle> streams = [] {
      std::vector<cuda::StreamHandle> made;
      for (int i = 0; i < kDevices; ++i) {
        made.push_back(static_cast<cuda::StreamHandle>(SNAPSTONE_FAKE(fakecuda_stream)(i)));
      }
      return made;
    }();
    return streams.at(static_cast<std::size_t>(ordinal));
  }
  static void chaos(std::uint64_t seed) {
    SNAPSTONE_FAKE(fakecuda_drain)();
    SNAPSTONE_FAKE(fakecuda_seed)(seed);
  }
  static void fill(int ordinal, const DeviceBytes& bytes, int value) {
    if (bytes.nbytes() != 0) {
      SNAPSTONE_FAKE(fakecuda_enqueue_fill)(ordinal, caller(ordinal), bytes.address(), value, bytes.nbytes());
    }
  }
  // What work that the caller enqueues now finds in these bytes.
  static Bytes as_caller_sees(int ordinal, const DeviceBytes& bytes) {
    if (bytes.nbytes() == 0) return {};
    const DeviceBytes copy(ordinal, caller(ordinal), bytes.nbytes());
    cuda::Stream stream = cuda::Stream::borrowed(device(ordinal), caller(ordinal));
    const cuda::Copy whole{copy.address(), bytes.address(), bytes.nbytes()};
    cuda::copy_on_device(stream, {&whole, 1});
    stream.synchronize();
    return copy.read();
  }
};

}  // namespace snapstone::pipeline
