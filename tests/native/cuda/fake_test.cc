// The fake driver is the judge of everything that uses csrc/cuda: each thing that it is to catch is done here once.
#include <csignal>
#include <cstring>

#include "fake_cuda.h"

namespace snapstone::cuda {
namespace {

using testing::await;
using testing::fake_counter;
using testing::HostPages;
using testing::pattern;
using testing::RegisteredPages;

constexpr std::uint64_t kBytes = 16 << 10;

class FakeTest : public testing::FakeCuda {
 protected:
  void SetUp() override {
    FakeCuda::SetUp();
    SNAPSTONE_FAKE(fakecuda_mode)("lazy");  // what nobody waits for does not happen
    buffer_.emplace(*DeviceBuffer::allocate(stream_, kBytes));
    stream_.synchronize();
  }
  void TearDown() override {
    buffer_.reset();
    FakeCuda::TearDown();
  }

  void to_host(const Stream& stream, std::uint64_t offset = 0) {
    copy_to_host(stream, std::vector<Copy>{{pages_.address() + offset, buffer_->address(), 8192}});
  }
  void to_device(const Stream& stream, std::uint64_t offset = 0) {
    copy_to_device(stream, std::vector<Copy>{{buffer_->address(), pages_.address() + offset, 8192}});
  }
  void finish() {
    Event event(device());
    stream_.record(event, "test");
    await(event);
    other_.synchronize();
  }

  RegisteredPages pages_{Device::of(0), kBytes};
  Stream stream_{Device::of(0)};
  Stream other_{Device::of(0)};
  std::optional<DeviceBuffer> buffer_;
};

using FakeDeathTest = FakeTest;

TEST_F(FakeDeathTest, the_host_dies_of_touching_device_memory) {
  const auto* const address = reinterpret_cast<volatile const char*>(buffer_->address());
  EXPECT_DEATH(static_cast<void>(*address), "the host touched device memory");
}

TEST_F(FakeDeathTest, the_host_dies_of_touching_the_target_of_a_copy_in_flight) {
  to_host(stream_);
  const volatile std::uint8_t* const data = pages_.data();
  EXPECT_DEATH(static_cast<void>(data[5000]), "a copy is in flight");
  finish();
  EXPECT_EQ(data[5000], 0xCD) << "as allocated";
}

TEST_F(FakeDeathTest, the_host_dies_of_writing_the_source_of_a_copy_in_flight_and_may_read_it) {
  pages_.data()[5000] = 42;
  to_device(stream_);
  EXPECT_EQ(pages_.data()[5000], 42);
  EXPECT_DEATH(pages_.data()[5000] = 43, "a copy is in flight");
  finish();
  pages_.data()[5000] = 43;
}

TEST_F(FakeTest, io_into_the_target_of_a_copy_in_flight_fails) {
  int ends[2] = {-1, -1};
  ASSERT_EQ(::pipe(ends), 0);
  to_host(stream_);
  EXPECT_EQ(::write(ends[1], pages_.data(), 4096), -1);
  EXPECT_EQ(errno, EFAULT);
  finish();
  EXPECT_EQ(::write(ends[1], pages_.data(), 4096), 4096);
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_F(FakeTest, a_target_is_poison_from_the_call_to_the_copy) {
  std::memset(pages_.data(), 1, kBytes);
  copy_to_host(stream_, std::vector<Copy>{{pages_.address() + 10, buffer_->address(), 100}});  // no whole page
  EXPECT_EQ(pages_.data()[9], 1);
  EXPECT_EQ(pages_.data()[10], 0xDD);
  EXPECT_EQ(pages_.data()[109], 0xDD);
  EXPECT_EQ(pages_.data()[110], 1);
  finish();
  EXPECT_EQ(pages_.data()[10], 0xCD);
}

TEST_F(FakeTest, copies_of_two_streams_into_one_slot_are_caught) {
  to_host(stream_);
  to_host(other_, 4096);
  finish();
  EXPECT_NE(take_violations().find("nothing orders copy device to host"), std::string::npos);
  to_host(stream_);
  to_host(other_, 8192);
  finish();
  EXPECT_EQ(take_violations(), "") << "neighbours";
}

TEST_F(FakeTest, a_slot_that_is_read_and_written_at_once_is_caught) {
  to_device(stream_);
  to_host(other_);
  finish();
  EXPECT_NE(take_violations(), "");
  to_device(stream_);
  to_host(stream_);
  finish();
  EXPECT_EQ(take_violations(), "") << "in the order of one stream";
}

TEST_F(FakeTest, two_streams_that_read_the_same_bytes_are_fine) {
  to_host(stream_);
  to_host(other_, 8192);
  finish();
  copy_to_device(stream_, std::vector<Copy>{{buffer_->address(), pages_.address(), 8192}});
  copy_to_device(other_, std::vector<Copy>{{buffer_->address() + 8192, pages_.address(), 8192}});
  finish();
  EXPECT_EQ(take_violations(), "");
}

TEST_F(FakeTest, a_race_is_found_though_the_work_never_overlapped_in_time) {
  SNAPSTONE_FAKE(fakecuda_mode)("eager");
  to_host(stream_);
  while (SNAPSTONE_FAKE(fakecuda_pending)() != 0) std::this_thread::yield();  // which no program can know
  to_device(other_);
  finish();
  EXPECT_NE(take_violations(), "");
}

TEST_F(FakeTest, what_the_host_has_seen_end_comes_before_what_it_enqueues) {
  to_host(stream_);
  Event event(device());
  stream_.record(event, "test");
  await(event);
  to_device(other_);
  finish();
  EXPECT_EQ(take_violations(), "");
}

TEST_F(FakeTest, host_accesses_are_checked_where_they_are_announced) {
  const auto may = [&](bool write) {
    return SNAPSTONE_FAKE(fakecuda_host_access)(pages_.data() + 100, 50, write ? 1 : 0) == 0;
  };
  EXPECT_TRUE(may(true));
  to_device(stream_);
  EXPECT_TRUE(may(false)) << "both read";
  EXPECT_FALSE(may(true));
  finish();
  EXPECT_TRUE(may(true));
  SNAPSTONE_FAKE(fakecuda_mode)("eager");
  to_host(stream_);
  while (SNAPSTONE_FAKE(fakecuda_pending)() != 0) std::this_thread::yield();
  EXPECT_FALSE(may(false)) << "ended, but nobody has asked";
  finish();
  EXPECT_TRUE(may(false));
  EXPECT_NE(take_violations(), "");
}

TEST_F(FakeTest, lazy_work_waits_until_somebody_waits) {
  Event event(device());
  to_host(stream_);
  stream_.record(event, "test");
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_EQ(SNAPSTONE_FAKE(fakecuda_pending)(), 2u);
  EXPECT_FALSE(event.done("test/done")) << "the first answer is always no";
  await(event);
  EXPECT_EQ(SNAPSTONE_FAKE(fakecuda_pending)(), 0u);
}

TEST_F(FakeTest, copies_of_unregistered_memory_are_counted) {
  const HostPages pageable(8192);
  EXPECT_EQ(fake_counter("unregistered_copies"), 0u);
  copy_to_device(stream_, std::vector<Copy>{{buffer_->address(), pageable.address(), 8192}});
  EXPECT_EQ(SNAPSTONE_FAKE(fakecuda_pending)(), 0u) << "it has waited";
  EXPECT_EQ(fake_counter("unregistered_copies"), 1u);
}

TEST_F(FakeTest, a_copy_may_not_reach_over_the_end_of_a_registration) {
  const HostPages pages(16384);
  std::string refusal;
  const auto first = HostRegistration::of(device(), pages.data(), 8192, &refusal);
  const auto second = HostRegistration::of(device(), pages.data() + 8192, 8192, &refusal);
  ASSERT_TRUE(first && second) << refusal;
  EXPECT_THROW(copy_to_host(stream_, std::vector<Copy>{{pages.address() + 4096, buffer_->address(), 8192}}), CudaError);
  EXPECT_NE(take_violations().find("reaches over the end"), std::string::npos);
}

TEST_F(FakeTest, memory_that_is_not_there_or_not_yours_is_refused) {
  const auto refused = [&](std::uint64_t source, std::uint64_t nbytes) {
    EXPECT_THROW(copy_to_host(stream_, std::vector<Copy>{{pages_.address(), source, nbytes}}), CudaError);
    EXPECT_NE(take_violations(), "");
  };
  refused(buffer_->address() + 8192, 8193);
  refused(buffer_->address() + kBytes + 100, 1);
  refused(pages_.address() + 8192, 64);  // the host's
  Stream elsewhere(device(1));
  const auto theirs = DeviceBuffer::allocate(elsewhere, 64);
  refused(theirs->address(), 64);
  std::uint64_t freed = 0;
  {
    const auto gone = DeviceBuffer::allocate(stream_, 8192);
    freed = gone->address();
  }
  refused(freed, 64);
}

TEST_F(FakeTest, memory_freed_while_another_stream_uses_it_is_caught) {
  {
    const auto buffer = DeviceBuffer::allocate(stream_, 8192);
    Event allocated(device());
    stream_.record(allocated, "test");
    other_.wait(allocated, "test");
    copy_to_host(other_, std::vector<Copy>{{pages_.address(), buffer->address(), 8192}});
  }
  finish();
  EXPECT_NE(take_violations().find("nothing orders"), std::string::npos);
}

TEST_F(FakeTest, torch_memory_is_given_again_at_once_and_its_next_owner_writes_to_it) {
  void* const training = SNAPSTONE_FAKE(fakecuda_stream)(0);
  const std::uint64_t first = SNAPSTONE_FAKE(fakecuda_alloc)(0, 8192, training);
  const std::vector<std::uint8_t> bytes = pattern(8192, 1);
  SNAPSTONE_FAKE(fakecuda_write)(first, bytes.data(), bytes.size());
  copy_to_host(other_, std::vector<Copy>{{pages_.address(), first, 8192}});
  SNAPSTONE_FAKE(fakecuda_free)(first);
  EXPECT_EQ(SNAPSTONE_FAKE(fakecuda_alloc)(0, 8192, training), first);
  SNAPSTONE_FAKE(fakecuda_free)(first);
  finish();
  SNAPSTONE_FAKE(fakecuda_drain)();
  EXPECT_NE(take_violations().find("next owner of freed memory"), std::string::npos);
}

TEST_F(FakeTest, unregistering_before_the_copy_has_ended_is_caught) {
  const HostPages pages(8192);
  std::string refusal;
  auto registration = HostRegistration::of(device(), pages.data(), 8192, &refusal);
  copy_to_host(stream_, std::vector<Copy>{{pages.address(), buffer_->address(), 8192}});
  registration.reset();
  finish();
  EXPECT_NE(take_violations().find("unregistered before"), std::string::npos);
}

TEST_F(FakeTest, copies_of_one_call_that_touch_each_other_are_caught) {
  copy_on_device(stream_, std::vector<Copy>{{buffer_->address() + 4096, buffer_->address(), 4096},
                                            {buffer_->address() + 8192, buffer_->address() + 4096, 4096}});
  finish();
  EXPECT_NE(take_violations().find("touch each other"), std::string::npos);
}

TEST_F(FakeTest, calls_without_a_context_are_caught) {
  const Driver& driver = Driver::require();
  EventHandle handle = nullptr;
  EXPECT_EQ(driver.cuEventCreate(&handle, kEventDisableTiming), Result::kInvalidContext);
  EXPECT_NE(take_violations(), "");
}

TEST_F(FakeTest, calls_that_break_a_capture_are_caught) {
  void* const training = SNAPSTONE_FAKE(fakecuda_stream)(0);
  const Driver& driver = Driver::require();
  Event event(device());
  ASSERT_EQ(SNAPSTONE_FAKE(fakecuda_capture)(0, training, 1), 0);
  {
    const Scope scope(device());
    CaptureMode careless = CaptureMode::kGlobal;
    driver.cuThreadExchangeStreamCaptureMode(&careless);
    EXPECT_EQ(driver.cuEventQuery(event.handle()), Result::kStreamCaptureUnsupported);
    driver.cuThreadExchangeStreamCaptureMode(&careless);
    EXPECT_EQ(driver.cuEventQuery(event.handle()), Result::kSuccess);
  }
  ASSERT_EQ(SNAPSTONE_FAKE(fakecuda_capture)(0, training, 0), 0);
  EXPECT_NE(take_violations().find("while a graph is captured"), std::string::npos);
}

// Run in a process of its own, on a slow link.
TEST(FakeChild, DISABLED_slow_link) {
  Device& gpu = Device::of(0);
  constexpr std::uint64_t kMiB = 1 << 20;
  RegisteredPages pages(gpu, 4 * kMiB);
  Stream stream(gpu);
  Stream other(gpu);
  const auto buffer = DeviceBuffer::allocate(stream, 4 * kMiB);
  stream.synchronize();
  const auto begin = std::chrono::steady_clock::now();
  copy_to_host(stream, std::vector<Copy>{{pages.address(), buffer->address(), 2 * kMiB}});
  copy_to_host(other, std::vector<Copy>{{pages.address() + 2 * kMiB, buffer->address(), 2 * kMiB}});
  Event copied(gpu);
  stream.record(copied, "test");
  Stream compute(gpu);
  Event computed(gpu);
  SNAPSTONE_FAKE(fakecuda_enqueue_delay)(0, compute.handle(), 1000);
  compute.record(computed, "test");
  await(computed);
  EXPECT_FALSE(copied.done("test/done")) << "the link holds up nobody else";
  stream.synchronize();
  other.synchronize();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  EXPECT_GE(took.count(), 4.0 * kMiB / 0.01e9) << "two streams share one direction of the link";
  std::printf("slow<1>\n");
}

TEST(FakeAlone, the_link_has_the_speed_that_was_asked_for) {
  const testing::ChildResult child =
      testing::run_child("FakeChild.DISABLED_slow_link", "FAKECUDA_GBPS=0.01 FAKECUDA_MODE=eager");
  EXPECT_EQ(child.status, 0) << child.output;
  EXPECT_NE(child.output.find("slow<1>"), std::string::npos) << child.output;
}

TEST(FakeChild, DISABLED_fail_rules) {
  Device& gpu = Device::of(0);
  Stream stream(gpu);
  EXPECT_THROW(stream.synchronize(), CudaError);
  EXPECT_NO_THROW(stream.synchronize());
  Event event(gpu);
  EXPECT_NO_THROW(stream.record(event, "test"));
  EXPECT_THROW(stream.record(event, "test"), CudaError);
  EXPECT_THROW(stream.record(event, "test"), CudaError);
  std::printf("failed<3>\n");
}

TEST(FakeAlone, calls_fail_as_the_environment_says) {
  const testing::ChildResult child = testing::run_child("FakeChild.DISABLED_fail_rules",
                                                        "'FAKECUDA_FAIL=cuStreamSynchronize:1:999;cuEventRecord:2+:1'");
  EXPECT_EQ(child.status, 0) << child.output;
  EXPECT_NE(child.output.find("failed<3>"), std::string::npos) << child.output;
  EXPECT_NE(testing::run_child("*DISABLED_fail_rules", "FAKECUDA_HIDE=cuTypo").status, 0) << "a typo must not pass";
}

TEST_F(FakeTest, a_seed_gives_one_order) {
  EXPECT_EQ(fake_counter("seed"), testing::seed());
  SNAPSTONE_FAKE(fakecuda_seed)(7);
  EXPECT_EQ(fake_counter("seed"), 7u);
}

}  // namespace
}  // namespace snapstone::cuda
