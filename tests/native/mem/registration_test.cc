// Rings that devices reach by DMA, on the fake driver.
#include <thread>

#include "armed_faults.h"
#include "base/limits.h"
#include "cuda/fake_cuda.h"
#include "mem/slot_ring.h"

namespace snapstone::mem {
namespace {

using testing::ArmedFaults;
using testing::fake_counter;

constexpr std::uint64_t kSlotBytes = kSegmentBytes / 4;

class RingRegistration : public testing::FakeCuda {
 protected:
  SlotRing ring_{kSlotBytes};
};

TEST_F(RingRegistration, every_segment_is_registered_once) {
  EXPECT_FALSE(ring_.registered());
  ring_.reserve(6);
  EXPECT_FALSE(ring_.registered());
  ring_.register_with(device());
  EXPECT_TRUE(ring_.registered());
  EXPECT_TRUE(ring_.registered(0));
  EXPECT_TRUE(ring_.registered(1));
  EXPECT_EQ(ring_.registered_bytes().registered, 6 * kSlotBytes);
  const std::uint64_t calls = fake_counter("cuMemHostRegister_v2");
  EXPECT_EQ(calls, 2u);
  ring_.register_with(device(1));
  EXPECT_EQ(fake_counter("cuMemHostRegister_v2"), calls) << "once for all devices";
  ring_.reserve(7);
  EXPECT_FALSE(ring_.registered());
  ring_.register_with(device());
  EXPECT_TRUE(ring_.registered());
  EXPECT_EQ(fake_counter("cuMemHostRegister_v2"), calls + 1);
}

TEST_F(RingRegistration, copies_into_any_run_are_copies_by_dma) {
  ring_.reserve(8);
  ring_.register_with(device());
  const cuda::Stream stream(device());
  const auto buffer = cuda::DeviceBuffer::allocate(stream, 4 * kSlotBytes);
  for (int i = 0; i < 2; ++i) {
    const std::vector<Slot> run = ring_.acquire_run(4, 0);
    ASSERT_EQ(run.size(), 4u);
    const cuda::Copy copy{reinterpret_cast<std::uint64_t>(run[0].data()), buffer->address(), 4 * kSlotBytes};
    cuda::copy_to_host(stream, {&copy, 1});
    stream.synchronize();
  }
  EXPECT_EQ(fake_counter("unregistered_copies"), 0u);
}

TEST_F(RingRegistration, a_refusal_is_told_and_not_repeated) {
  ring_.reserve(8);
  {
    const ArmedFaults faults("cuMemHostRegister_v2:1:errno=800");
    ring_.register_with(device());
  }
  EXPECT_FALSE(ring_.registered());
  EXPECT_FALSE(ring_.registered(0));
  EXPECT_TRUE(ring_.registered(1));
  const RegisteredBytes bytes = ring_.registered_bytes();
  EXPECT_EQ(bytes.registered, 4 * kSlotBytes);
  EXPECT_EQ(bytes.refused, 4 * kSlotBytes);
  EXPECT_NE(bytes.refusal.find("cuMemHostRegister"), std::string::npos) << bytes.refusal;
  ring_.register_with(device());
  EXPECT_FALSE(ring_.registered(0));
}

TEST_F(RingRegistration, threads_share_the_work) {
  ring_.reserve(12);
  std::vector<std::thread> threads;
  std::atomic<int> unregistered{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      ring_.register_with(device());
      unregistered += ring_.registered() ? 0 : 1;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(unregistered, 0) << "somebody did not wait for the others";
  EXPECT_EQ(fake_counter("cuMemHostRegister_v2"), 3u);
}

TEST_F(RingRegistration, memory_is_unregistered_before_it_goes) {
  {
    SlotRing ring(kSlotBytes);
    ring.reserve(2);
    ring.register_with(device());
    EXPECT_GT(fake_counter("registered_bytes"), 0u);
  }
  EXPECT_EQ(fake_counter("registered_bytes"), 0u);
}

}  // namespace
}  // namespace snapstone::mem
