// What one device takes for its copies and digests, on the fake driver: everything is measured as often as asked for,
// and the memory that was measured with keeps its bytes.
#include "pipeline/device_rates.h"

#include <random>

#include "cuda/fake_cuda.h"
#include "pipeline/device_fixture.h"

namespace snapstone::pipeline {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;
constexpr std::uint64_t kNbytes = 6 * kMiB;

class DeviceRatesTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    std::mt19937_64 random(testing::seed());
    values_.resize(kNbytes);
    for (std::uint8_t& value : values_) value = static_cast<std::uint8_t>(random());
    memory_ = SNAPSTONE_FAKE(fakecuda_alloc)(0, kNbytes, streams().at(0));
    SNAPSTONE_FAKE(fakecuda_write)(memory_, values_.data(), kNbytes);
    SNAPSTONE_FAKE(fakecuda_drain)();
  }
  void TearDown() override {
    SNAPSTONE_FAKE(fakecuda_drain)();
    std::vector<std::uint8_t> found(kNbytes);
    SNAPSTONE_FAKE(fakecuda_read)(memory_, found.data(), kNbytes);
    EXPECT_TRUE(found == values_) << "the memory that was measured with has other bytes now";
    SNAPSTONE_FAKE(fakecuda_free)(memory_);
    DeviceTest::TearDown();
  }
  DeviceRates measure(std::vector<std::uint64_t> sizes, int repeat = 2) const {
    return measure_device_rates(0, memory_, sizes, {.ring_bytes = 4 * kMiB, .copy_bytes = 2 * kMiB, .repeat = repeat});
  }

  std::vector<std::uint8_t> values_;
  std::uint64_t memory_ = 0;
};

TEST_F(DeviceRatesTest, every_operation_runs_as_often_as_asked_for_and_once_more) {
  const DeviceRates rates = measure({kMiB + 17, 4 * kMiB}, 3);
  EXPECT_GE(rates.ring_bytes, 4 * kMiB);
  EXPECT_GT(rates.register_seconds, 0);
  EXPECT_EQ(rates.refusal, "");
  ASSERT_EQ(rates.rows.size(), 2u);
  for (const DeviceRatesRow& row : rates.rows) {
    EXPECT_EQ(row.to_host.size(), 3u);
    EXPECT_EQ(row.to_device.size(), 3u);
    EXPECT_EQ(row.on_device.size(), 3u);
    for (const double seconds : row.to_host) EXPECT_GT(seconds, 0);
  }
  EXPECT_EQ(rates.rows[0].digest.size(), 0u);  // not of whole chunks
  EXPECT_EQ(rates.rows[1].digest.size(), 3u);
  EXPECT_EQ(fake_counter("launches_snapstone_digest"), 4u);
  EXPECT_EQ(fake_counter("bytes_to_host"), 4 * (kMiB + 17 + 4 * kMiB));
  EXPECT_EQ(fake_counter("unregistered_copies"), 0u);
}

TEST_F(DeviceRatesTest, what_the_ring_does_not_hold_is_measured_on_the_device_alone) {
  const DeviceRates rates = measure({kNbytes});
  EXPECT_TRUE(rates.rows.at(0).to_host.empty());
  EXPECT_TRUE(rates.rows.at(0).to_device.empty());
  EXPECT_EQ(rates.rows.at(0).on_device.size(), 2u);
  EXPECT_EQ(rates.rows.at(0).digest.size(), 2u);
}

TEST_F(DeviceRatesTest, a_refused_registration_is_an_answer) {
  const ArmedFaults refuse("cuMemHostRegister_v2:1+:errno=800");
  const DeviceRates rates = measure({kMiB});
  EXPECT_NE(rates.refusal, "");
  EXPECT_EQ(rates.rows.at(0).to_host.size(), 2u);
  EXPECT_GT(fake_counter("unregistered_copies"), 0u);
}

TEST_F(DeviceRatesTest, no_memory_for_a_copy_leaves_out_what_needs_it) {
  SNAPSTONE_FAKE(fakecuda_fail)("cuMemAllocAsync:1+:2");
  const DeviceRates rates = measure({kMiB});
  EXPECT_EQ(rates.rows.at(0).to_host.size(), 2u);
  EXPECT_TRUE(rates.rows.at(0).on_device.empty());
  EXPECT_TRUE(rates.rows.at(0).digest.empty());
}

TEST_F(DeviceRatesTest, a_call_that_fails_is_an_error) {
  const ArmedFaults fail("cuEventQuery:2+:errno=700");
  EXPECT_THROW(measure({kMiB}), cuda::CudaError);
}

TEST_F(DeviceRatesTest, sizes_and_repetitions_are_checked) {
  EXPECT_THROW(measure({}), std::invalid_argument);
  EXPECT_THROW(measure({0}), std::invalid_argument);
  EXPECT_THROW(measure({kMiB}, 0), std::invalid_argument);
}

}  // namespace
}  // namespace snapstone::pipeline
