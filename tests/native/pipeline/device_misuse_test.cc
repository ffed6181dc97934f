// What callers of a save from devices must not do: each is an error that says so, and harms neither streams nor slots.
#include <stdexcept>
#include <string>

#include "pipeline/device_fixture.h"

namespace snapstone::pipeline {
namespace {

class DeviceMisuse : public DeviceTest {
 protected:
  // A ring that copies can go to ahead of the job.
  void use_ring_of(std::uint64_t slots) {
    ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
    ring_->reserve(slots);
    ring_->register_with(cuda::Device::of(0));
  }
  static cuda::Stream trainer() {
    return cuda::Stream::borrowed(cuda::Device::of(0), static_cast<cuda::StreamHandle>(streams()[0]));
  }
  // What the error says; empty if there is none.
  template <typename Error, typename Function>
  static std::string said(Function&& function) {
    try {
      function();
    } catch (const Error& error) {
      return error.what();
    }
    return {};
  }
};

TEST_F(DeviceMisuse, a_start_before_the_copies_are_enqueued_is_an_error) {
  DeviceTensors state = tensors(on_one());
  const auto job = device_job(state, "a");
  EXPECT_EQ(said<std::logic_error>([&] { run(job); }),
            "a save of device memory was started before its copies were enqueued");
}

TEST_F(DeviceMisuse, copies_that_are_enqueued_twice_are_an_error) {
  DeviceTensors state = tensors(on_one());
  const auto job = device_job(state, "a");
  state.produce();
  for (int i = 0; i < 2; ++i) job->enqueue(*state.mark());
  EXPECT_EQ(said<std::logic_error>([&] { run(job); }), "the copies of a save are enqueued once");
}

TEST_F(DeviceMisuse, a_mark_that_lacks_a_device_is_an_error) {
  DeviceTensors state = tensors(mixed());
  const auto job = device_job(state, "a");
  const ProducerMark mark(std::map<std::int32_t, std::uintptr_t>{{0, reinterpret_cast<std::uintptr_t>(streams()[0])}});
  job->enqueue(mark);
  EXPECT_EQ(said<std::invalid_argument>([&] { run(job); }), "no stream was marked on device 1");
}

TEST_F(DeviceMisuse, a_stream_under_capture_cannot_be_marked) {
  SNAPSTONE_FAKE(fakecuda_capture)(0, streams()[0], 1);
  const std::string error = said<std::logic_error>([&] { tensors(on_one()).mark(); });
  EXPECT_TRUE(error.ends_with("cannot be saved from; save before or after the capture")) << error;
  SNAPSTONE_FAKE(fakecuda_capture)(0, streams()[0], 0);
}

// Waiting for what is outside of the graph would break the capture.
TEST_F(DeviceMisuse, a_stream_under_capture_cannot_be_fenced) {
  use_ring_of(48);
  DeviceTensors state = tensors(on_one());
  const auto job = device_job(state, "a");
  state.produce(2000);
  job->enqueue(*state.mark());
  ASSERT_TRUE(job->snapshot_enqueued());
  cuda::Stream stream = trainer();
  SNAPSTONE_FAKE(fakecuda_capture)(0, streams()[0], 1);
  const std::string error = said<std::logic_error>([&] { job->fence(stream); });
  EXPECT_TRUE(error.starts_with("a stream that is being captured into a CUDA graph cannot wait for a snapshot"))
      << error;
  SNAPSTONE_FAKE(fakecuda_capture)(0, streams()[0], 0);
  run(job);
}

TEST_F(DeviceMisuse, a_fence_before_the_snapshot_is_enqueued_is_an_error) {
  use_ring_of(12);
  DeviceTensors state = tensors(on_one(60 * kTestChunkBytes));
  const auto job = device_job(state, "a");
  state.produce();
  job->enqueue(*state.mark());
  cuda::Stream stream = trainer();
  EXPECT_EQ(said<std::logic_error>([&] { job->fence(stream); }),
            "a stream can wait for a snapshot once all of it is enqueued");
  run(job);
  EXPECT_NO_THROW(job->fence(stream)) << "nothing to wait for";
}

}  // namespace
}  // namespace snapstone::pipeline
