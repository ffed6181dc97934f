// What tests of loads to devices share: the fake driver, memory on its devices, streams of a caller who uses targets
// before and after.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/fake_cuda.h"
#include "pipeline/pipeline_fixture.h"
#include "pipeline/random_box.h"

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

class LandingTest : public PipelineTest {
 protected:
  static constexpr int kDevices = 2;

  explicit LandingTest(std::uint64_t slots = 16) : PipelineTest(slots) {}

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

inline constexpr int kBefore = 0xB7;  // what the caller has in targets before a load

struct Setting {
  const char* name;
  bool kernels;
  bool registered;
};

class DeviceLoadTest : public LandingTest {
 protected:
  // Small batches, so that each is used more than once.
  LoadOptions options(bool kernels = true) const {
    LoadOptions options;
    options.landing.batch_bytes = 3 * kTestChunkBytes;
    options.landing.batches = 2;
    options.landing.kernels = kernels;
    return options;
  }

  std::vector<DeviceBytes> targets_like(const Tensors& tensors, int ordinal = 0) {
    std::vector<DeviceBytes> targets;
    for (const Bytes& tensor : tensors.bytes) {
      targets.emplace_back(ordinal, caller(ordinal), tensor.size());
      fill(ordinal, targets.back(), kBefore);
    }
    return targets;
  }
  LoadPlan plan_to(const Saved& saved, const std::vector<DeviceBytes>& targets, int ordinal = 0) const {
    LoadPlan plan = plan_of(saved);
    for (std::size_t i = 0; i < targets.size(); ++i) {
      plan.add_contiguous(shard_of(saved, i, targets[i].nbytes()), targets[i].data(), {}, ordinal);
    }
    return plan;
  }
  // Marked, run and fenced.
  void load(const std::shared_ptr<LoadJob>& job) const {
    for (const std::int32_t ordinal : job->plan().devices()) job->mark(ordinal, caller(ordinal));
    run(job);
    EXPECT_EQ(job->bytes_done(), job->plan().bytes_needed());
    for (const std::int32_t ordinal : job->plan().devices()) job->fence(ordinal, caller(ordinal));
  }
  // The fake keeps books of every element that a kernel touches.
  RandomBox random_box(std::int64_t nbytes_max) {
    while (true) {
      RandomBox box(random_, nbytes_max);
      std::int64_t elements = 1;
      for (const std::int64_t size : box.sizes) elements *= size;
      if (elements <= 5000) return box;
    }
  }
  static void expect_loaded(const std::vector<DeviceBytes>& targets, const std::vector<Bytes>& expected,
                            int ordinal = 0) {
    for (std::size_t i = 0; i < targets.size(); ++i) {
      EXPECT_EQ(as_caller_sees(ordinal, targets[i]), expected[i]) << "tensor " << i;
    }
  }
  void use_ring(std::uint64_t slots, bool registered) {
    ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
    ring_->reserve(slots);
    if (!registered) SNAPSTONE_FAKE(fakecuda_fail)("cuMemHostRegister_v2:1+:1");
    ring_->register_with(device());  // a refusal stands
    SNAPSTONE_FAKE(fakecuda_fail)("");
    ASSERT_EQ(ring_->registered(), registered);
  }
};

class DeviceLoad : public DeviceLoadTest, public ::testing::WithParamInterface<Setting> {
 protected:
  void SetUp() override {
    DeviceLoadTest::SetUp();
    use_ring(16, GetParam().registered);
  }
  LoadOptions options() const { return DeviceLoadTest::options(GetParam().kernels); }
};

}  // namespace snapstone::pipeline
