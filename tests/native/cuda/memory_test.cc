// csrc/cuda/host_registration.h and device_buffer.h.
#include "armed_faults.h"
#include "fake_cuda.h"

namespace snapstone::cuda {
namespace {

using testing::ArmedFaults;
using testing::fake_counter;
using testing::HostPages;

class HostRegistrationTest : public testing::FakeCuda {};

TEST_F(HostRegistrationTest, lasts_as_long_as_the_object) {
  HostPages pages(1 << 20);
  std::string refusal;
  {
    auto registration = HostRegistration::of(device(), pages.data(), pages.nbytes(), &refusal);
    ASSERT_TRUE(registration) << refusal;
    EXPECT_EQ(registration->begin(), pages.data());
    EXPECT_EQ(registration->nbytes(), pages.nbytes());
    EXPECT_EQ(fake_counter("registered_bytes"), pages.nbytes());
    HostRegistration moved = std::move(*registration);
    registration.reset();
    EXPECT_EQ(fake_counter("registered_bytes"), pages.nbytes()) << "the new owner has it";
  }
  EXPECT_EQ(fake_counter("registered_bytes"), 0u);
}

TEST_F(HostRegistrationTest, refusal_is_a_value_with_a_reason) {
  HostPages pages(1 << 20);
  std::string refusal;
  for (const char* code : {"2", "1", "801", "ENOMEM"}) {
    const ArmedFaults faults("cuMemHostRegister_v2:1:errno=" + std::string(code));
    EXPECT_FALSE(HostRegistration::of(device(), pages.data(), pages.nbytes(), &refusal));
    EXPECT_EQ(refusal.find("cuMemHostRegister_v2: "), 0u) << refusal;
  }
  EXPECT_FALSE(HostRegistration::of(device(), reinterpret_cast<void*>(4096), 4096, &refusal)) << "nothing is there";
  const auto first = HostRegistration::of(device(), pages.data(), 8192, &refusal);
  ASSERT_TRUE(first);
  EXPECT_FALSE(HostRegistration::of(device(), pages.data() + 4096, 8192, &refusal));
  EXPECT_EQ(refusal, "cuMemHostRegister_v2: CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED (712) on device 0");
  EXPECT_EQ(fake_counter("registered_bytes"), 8192u);
}

TEST_F(HostRegistrationTest, sizes_that_drivers_choke_on_are_refused_before_they_are_tried) {
  HostPages pages(4096);
  std::string refusal;
  EXPECT_THROW(HostRegistration::of(device(), pages.data(), 0, &refusal), std::invalid_argument);
  EXPECT_THROW(HostRegistration::of(device(), pages.data(), kRegistrationBytesMax + 1, &refusal),
               std::invalid_argument);
}

class DeviceBufferTest : public testing::FakeCuda {};

TEST_F(DeviceBufferTest, is_given_back_in_the_order_of_its_stream) {
  Stream stream(device());
  const std::uint64_t before = device().free_bytes();
  {
    const auto buffer = DeviceBuffer::allocate(stream, 1 << 20);
    ASSERT_TRUE(buffer);
    EXPECT_EQ(buffer->nbytes(), 1u << 20);
    EXPECT_EQ(buffer->address() % 256, 0u);
    EXPECT_EQ(device().free_bytes(), before - (1 << 20));
    SNAPSTONE_FAKE(fakecuda_enqueue_delay)(0, stream.handle(), 1000);
    SNAPSTONE_FAKE(fakecuda_enqueue_fill)(0, stream.handle(), buffer->address(), 7, buffer->nbytes());
  }
  stream.synchronize();
  EXPECT_EQ(device().free_bytes(), before);
  EXPECT_EQ(fake_counter("device_syncs"), 0u);
}

TEST_F(DeviceBufferTest, out_of_memory_is_an_empty_optional) {
  Stream stream(device());
  EXPECT_FALSE(DeviceBuffer::allocate(stream, device().total_bytes() + 1));
  {
    const ArmedFaults faults("cuMemAllocAsync:1:errno=2");
    EXPECT_FALSE(DeviceBuffer::allocate(stream, 4096));
  }
  {
    const ArmedFaults faults("cuMemAllocAsync:1:errno=719");
    EXPECT_THROW(DeviceBuffer::allocate(stream, 4096), CudaError);
  }
  EXPECT_THROW(DeviceBuffer::allocate(stream, 0), std::invalid_argument);
  EXPECT_TRUE(DeviceBuffer::allocate(stream, 4096));
}

TEST_F(DeviceBufferTest, what_the_stream_frees_is_there_for_it_at_once) {
  SNAPSTONE_FAKE(fakecuda_mode)("lazy");
  Stream stream(device());
  for (int i = 0; i < 5; ++i) {
    const auto buffer = DeviceBuffer::allocate(stream, device().total_bytes() / 4 * 3);
    EXPECT_TRUE(buffer) << i;
  }
}

// Run in a process of its own, on a device without memory pools, or a driver without the calls.
TEST(DeviceBufferChild, DISABLED_no_pools) {
  Device& gpu = Device::of(0);
  EXPECT_FALSE(gpu.stream_ordered_memory());
  Stream stream(gpu);
  testing::RegisteredPages pages(gpu, 1 << 20);
  {
    const auto buffer = DeviceBuffer::allocate(stream, 1 << 20);
    ASSERT_TRUE(buffer);
    copy_to_device(stream, std::vector<Copy>{{buffer->address(), pages.address(), 1 << 20}});
  }
  EXPECT_EQ(fake_counter("pending"), 0u) << "freed before the copy had ended";
  EXPECT_FALSE(DeviceBuffer::allocate(stream, gpu.total_bytes() + 1));
  EXPECT_EQ(testing::fake_violations(), "");
  std::printf("pools<0>\n");
}

TEST(DeviceBufferAlone, works_without_stream_ordered_memory) {
  for (const char* environment :
       {"FAKECUDA_POOLS=0", "FAKECUDA_HIDE=cuMemFreeAsync", "FAKECUDA_HIDE=cuMemAllocAsync"}) {
    const testing::ChildResult child = testing::run_child("DeviceBufferChild.DISABLED_no_pools", environment);
    EXPECT_EQ(child.status, 0) << child.output;
    EXPECT_NE(child.output.find("pools<0>"), std::string::npos) << child.output;
  }
}

TEST(DeviceBufferAlone, without_stream_ordered_memory_it_waits_for_its_stream) {
  const testing::ChildResult child =
      testing::run_child("DeviceBufferChild.DISABLED_no_pools",
                         "FAKECUDA_POOLS=0 FAKECUDA_LATE_US=3000 'SNAPSTONE_FAULT=wait/buffer/freed:1+:skip'");
  EXPECT_NE(child.status, 0) << "nothing notices the lack of the wait";
}

}  // namespace
}  // namespace snapstone::cuda
