#include "cuda/copies.h"

#include <numeric>
#include <random>

#include "armed_faults.h"
#include "fake_cuda.h"

namespace snapstone::cuda {
namespace {

using testing::ArmedFaults;
using testing::await;
using testing::fake_counter;
using testing::HostPages;
using testing::pattern;
using testing::RegisteredPages;
using testing::same;

class CopiesTest : public testing::FakeCuda {
 protected:
  // Bytes of the device, once all is done.
  std::vector<std::uint8_t> bytes_at(DevicePointer address, std::uint64_t nbytes) {
    SNAPSTONE_FAKE(fakecuda_drain)();
    std::vector<std::uint8_t> bytes(nbytes);
    EXPECT_EQ(SNAPSTONE_FAKE(fakecuda_read)(address, bytes.data(), nbytes), 0);
    return bytes;
  }
};

TEST_F(CopiesTest, go_out_and_come_back) {
  constexpr std::uint64_t kBytes = 300001;
  Stream stream(device());
  RegisteredPages out(device(), 1 << 19);
  RegisteredPages back(device(), 1 << 19);
  const auto a = DeviceBuffer::allocate(stream, kBytes);
  const auto b = DeviceBuffer::allocate(stream, kBytes);
  const std::vector<std::uint8_t> bytes = pattern(kBytes, 5);
  std::copy(bytes.begin(), bytes.end(), out.data());
  copy_to_device(stream, std::vector<Copy>{{a->address(), out.address(), kBytes}});
  copy_on_device(stream, std::vector<Copy>{{b->address(), a->address(), kBytes}});
  copy_to_host(stream, std::vector<Copy>{{back.address() + 3, b->address(), kBytes}});
  Event event(device());
  stream.record(event, "test");
  await(event);
  EXPECT_TRUE(same(back.data() + 3, bytes));
  EXPECT_EQ(fake_counter("unregistered_copies"), 0u);
  EXPECT_EQ(fake_counter("bytes_to_host"), kBytes);
}

// Pieces of all sizes, shuffled, through each of the forms that a driver may have.
void shuffled_round_trip(Device& device, int count) {
  std::mt19937_64 random(testing::seed());
  std::vector<std::uint64_t> sizes(static_cast<std::size_t>(count));
  for (std::uint64_t& size : sizes) size = random() % 7 == 0 ? 0 : random() % 900 + 1;
  std::vector<std::uint64_t> begins(sizes.size());
  std::exclusive_scan(sizes.begin(), sizes.end(), begins.begin(), std::uint64_t{0});
  const std::uint64_t total = begins.back() + sizes.back() + 1;
  std::vector<std::size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);

  Stream stream(device);
  RegisteredPages host(device, (total / 4096 + 1) * 4096);
  const auto packed = DeviceBuffer::allocate(stream, total);
  const auto shuffled = DeviceBuffer::allocate(stream, total);
  ASSERT_TRUE(packed && shuffled);
  const std::vector<std::uint8_t> bytes = pattern(total, 9);
  SNAPSTONE_FAKE(fakecuda_enqueue_write)(0, stream.handle(), packed->address(), bytes.data(), total);
  std::vector<Copy> scatter;
  std::vector<Copy> gather;
  std::uint64_t at = 0;
  for (const std::size_t i : order) {
    scatter.push_back({shuffled->address() + at, packed->address() + begins[i], sizes[i]});
    gather.push_back({host.address() + begins[i], shuffled->address() + at, sizes[i]});
    at += sizes[i];
  }
  copy_on_device(stream, scatter);
  copy_to_host(stream, gather);
  Event event(device);
  stream.record(event, "test");
  await(event);
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end() - 1, host.data()));
  copy_to_device(stream, std::vector<Copy>{{packed->address(), host.address(), total - 1},
                                           {shuffled->address(), host.address(), total - 1}});
  copy_to_device(stream, {});
  copy_to_device(stream, std::vector<Copy>{{packed->address(), host.address(), 0}});
  stream.synchronize();
}

TEST_F(CopiesTest, many_go_in_one_call) {
  shuffled_round_trip(device(), 3000);
  EXPECT_EQ(fake_counter("cuMemcpyBatchAsync_v2"), 3u);
  EXPECT_EQ(fake_counter("cuMemcpyDtoHAsync_v2"), 0u);
  shuffled_round_trip(device(), 9000);
  EXPECT_EQ(fake_counter("cuMemcpyBatchAsync_v2"), 3u + 2 * 2 + 1)
      << "9000 copies, less the empty ones: two calls each";
}

TEST(CopiesChild, DISABLED_round_trip) {
  shuffled_round_trip(Device::of(0), 1000);
  EXPECT_EQ(testing::fake_violations(), "");
  std::printf("v1<%d> v2<%d> single<%d>\n", static_cast<int>(fake_counter("cuMemcpyBatchAsync")),
              static_cast<int>(fake_counter("cuMemcpyBatchAsync_v2")),
              static_cast<int>(fake_counter("cuMemcpyDtoHAsync_v2")));
}

TEST(CopiesAlone, every_driver_copies_in_the_form_that_it_has) {
  const testing::ChildResult old = testing::run_child("CopiesChild.DISABLED_round_trip", "FAKECUDA_VERSION=12080");
  EXPECT_NE(old.output.find("v1<3> v2<0> single<0>"), std::string::npos) << old.output;
  EXPECT_EQ(old.status, 0);
  const testing::ChildResult older = testing::run_child("CopiesChild.DISABLED_round_trip", "FAKECUDA_VERSION=12000");
  EXPECT_NE(older.output.find("v1<0> v2<0> single<"), std::string::npos) << older.output;
  EXPECT_EQ(older.output.find("single<0>"), std::string::npos) << older.output;
  EXPECT_EQ(older.status, 0);
}

TEST_F(CopiesTest, rows_are_copied_alone) {
  constexpr std::uint64_t kRows = 37;
  constexpr std::uint64_t kWidth = 100;
  constexpr std::uint64_t kHostPitch = 128;
  constexpr std::uint64_t kDevicePitch = 256;
  Stream stream(device());
  RegisteredPages host(device(), 8192);
  const auto matrix = DeviceBuffer::allocate(stream, kRows * kDevicePitch);
  const auto other = DeviceBuffer::allocate(stream, kRows * kDevicePitch);
  const std::vector<std::uint8_t> bytes = pattern(kRows * kHostPitch, 3);
  std::copy(bytes.begin(), bytes.end(), host.data());
  SNAPSTONE_FAKE(fakecuda_enqueue_fill)(0, stream.handle(), matrix->address(), 0x11, matrix->nbytes());
  SNAPSTONE_FAKE(fakecuda_enqueue_fill)(0, stream.handle(), other->address(), 0x22, other->nbytes());
  copy_2d(stream, Direction::kToDevice,
          {matrix->address() + 8, kDevicePitch, host.address(), kHostPitch, kWidth, kRows});
  copy_2d(stream, Direction::kOnDevice,
          {other->address(), kDevicePitch, matrix->address() + 8, kDevicePitch, kWidth, kRows});
  stream.synchronize();
  std::fill(host.data(), host.data() + 8192, 0x33);
  copy_2d(stream, Direction::kToHost, {host.address() + 4, kHostPitch, other->address(), kDevicePitch, kWidth, kRows});
  copy_2d(stream, Direction::kToHost, {host.address(), kHostPitch, other->address(), kDevicePitch, 0, kRows});
  Event event(device());
  stream.record(event, "test");
  await(event);
  const std::vector<std::uint8_t> on_device = bytes_at(matrix->address(), matrix->nbytes());
  for (std::uint64_t row = 0; row < kRows; ++row) {
    const std::uint8_t* const expected = bytes.data() + row * kHostPitch;
    EXPECT_TRUE(std::equal(expected, expected + kWidth, on_device.data() + row * kDevicePitch + 8)) << row;
    EXPECT_EQ(on_device[row * kDevicePitch + 7], 0x11);
    EXPECT_EQ(on_device[row * kDevicePitch + 8 + kWidth], 0x11);
    EXPECT_TRUE(std::equal(expected, expected + kWidth, host.data() + row * kHostPitch + 4)) << row;
    EXPECT_EQ(host.data()[row * kHostPitch + 3], 0x33);
    EXPECT_EQ(host.data()[row * kHostPitch + 4 + kWidth], 0x33);
  }
}

// The driver's documentation: "cuMemcpy2DAsync() may fail for pitches not computed by cuMemAllocPitch()".
TEST_F(CopiesTest, a_pitch_that_the_driver_refuses_within_a_device_is_copied_row_by_row) {
  constexpr std::uint64_t kRows = 20;
  Stream stream(device());
  const auto from = DeviceBuffer::allocate(stream, kRows * 111);
  const auto to = DeviceBuffer::allocate(stream, kRows * 77);
  const std::vector<std::uint8_t> bytes = pattern(kRows * 111, 8);
  SNAPSTONE_FAKE(fakecuda_enqueue_write)(0, stream.handle(), from->address(), bytes.data(), bytes.size());
  {
    const ArmedFaults faults("cuMemcpy2DAsync_v2:1:errno=1");
    copy_2d(stream, Direction::kOnDevice, {to->address(), 77, from->address(), 111, 70, kRows});
  }
  stream.synchronize();
  const std::vector<std::uint8_t> found = bytes_at(to->address(), kRows * 77);
  for (std::uint64_t row = 0; row < kRows; ++row) {
    EXPECT_TRUE(std::equal(found.data() + row * 77, found.data() + row * 77 + 70, bytes.data() + row * 111)) << row;
  }
}

TEST_F(CopiesTest, columns_of_one_matrix_may_be_written_by_streams_that_know_nothing_of_each_other) {
  Stream left(device());
  Stream right(device());
  RegisteredPages host(device(), 8192);
  const auto matrix = DeviceBuffer::allocate(left, 8192);
  Event allocated(device());
  left.record(allocated, "test");
  right.wait(allocated, "test");
  copy_2d(left, Direction::kToDevice, {matrix->address(), 128, host.address(), 128, 64, 64});
  copy_2d(right, Direction::kToDevice, {matrix->address() + 64, 128, host.address() + 64, 128, 64, 64});
  left.synchronize();
  right.synchronize();
  EXPECT_EQ(take_violations(), "");
  copy_2d(left, Direction::kToDevice, {matrix->address(), 128, host.address(), 128, 65, 64});
  copy_2d(right, Direction::kToDevice, {matrix->address() + 64, 128, host.address() + 64, 128, 64, 64});
  left.synchronize();
  right.synchronize();
  EXPECT_NE(take_violations(), "") << "one column too many";
}

TEST_F(CopiesTest, unregistered_memory_is_copied_at_once_and_right) {
  Stream stream(device());
  const HostPages host(1 << 20);
  const auto buffer = DeviceBuffer::allocate(stream, 1 << 20);
  const std::vector<std::uint8_t> bytes = pattern(1 << 20, 4);
  SNAPSTONE_FAKE(fakecuda_enqueue_write)(0, stream.handle(), buffer->address(), bytes.data(), bytes.size());
  copy_to_host(stream, std::vector<Copy>{{host.address(), buffer->address(), 1 << 20}});
  EXPECT_TRUE(same(host.data(), bytes)) << "no event was asked";
  EXPECT_EQ(fake_counter("unregistered_copies"), 1u);
}

// A batch is given to the device as it is: what is not registered, or not as a whole, has to be translated by the
// driver.
TEST_F(CopiesTest, batches_hold_registered_memory_alone) {
  Stream stream(device());
  const HostPages loose(8192);
  RegisteredPages registered(device(), 8192);
  const auto buffer = DeviceBuffer::allocate(stream, 8192);
  const std::vector<std::uint8_t> bytes = pattern(8192, 4);
  SNAPSTONE_FAKE(fakecuda_enqueue_write)(0, stream.handle(), buffer->address(), bytes.data(), bytes.size());
  copy_to_host(stream, std::vector<Copy>{{registered.address(), buffer->address(), 4096},
                                         {loose.address(), buffer->address() + 4096, 4096}});
  stream.synchronize();
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.begin() + 4096, registered.data()));
  EXPECT_TRUE(std::equal(bytes.begin() + 4096, bytes.end(), loose.data()));
  EXPECT_EQ(fake_counter("batches"), 0u);
  copy_to_host(stream, std::vector<Copy>{{registered.address(), buffer->address(), 4096},
                                         {registered.address() + 4096, buffer->address() + 4096, 4096}});
  stream.synchronize();
  EXPECT_EQ(fake_counter("batches"), 1u);
}

TEST(CopiesAlone, no_batch_holds_the_host_where_registered_memory_has_two_addresses) {
  const testing::ChildResult child = testing::run_child("CopiesChild.DISABLED_round_trip", "FAKECUDA_HOST_POINTERS=0");
  EXPECT_NE(child.output.find("v1<0> v2<1> single<"), std::string::npos) << "within the device alone\n" << child.output;
  EXPECT_EQ(child.output.find("single<0>"), std::string::npos) << child.output;
  EXPECT_EQ(child.status, 0);
}

TEST_F(CopiesTest, a_batch_that_the_driver_refuses_is_copied_one_by_one) {
  for (const char* const refusal : {"1", "801"}) {
    const ArmedFaults faults(std::string("cuMemcpyBatchAsync_v2:1+:errno=") + refusal);
    shuffled_round_trip(device(), 300);
    EXPECT_GT(fake_counter("cuMemcpyDtoHAsync_v2"), 0u);
    EXPECT_EQ(fake_counter("batches"), 0u);
  }
}

TEST_F(CopiesTest, a_refused_copy_is_an_error_with_the_name_of_its_call) {
  Stream stream(device());
  RegisteredPages host(device(), 8192);
  const auto buffer = DeviceBuffer::allocate(stream, 8192);
  const auto call_of = [&](const std::string& rule, const std::function<void()>& copy) {
    const ArmedFaults faults(rule + ":1:errno=999");
    try {
      copy();
    } catch (const CudaError& error) {
      return error.call();
    }
    return std::string("nothing");
  };
  const std::vector<Copy> one = {{host.address(), buffer->address(), 64}};
  const std::vector<Copy> two = {{host.address(), buffer->address(), 64}, {host.address() + 64, buffer->address(), 64}};
  const std::vector<Copy> up = {{buffer->address(), host.address(), 64}};
  const std::vector<Copy> across = {{buffer->address() + 64, buffer->address(), 64}};
  EXPECT_EQ(call_of("cuMemcpyDtoHAsync_v2", [&] { copy_to_host(stream, one); }), "cuMemcpyDtoHAsync_v2");
  EXPECT_EQ(call_of("cuMemcpyBatchAsync_v2", [&] { copy_to_host(stream, two); }), "cuMemcpyBatchAsync_v2");
  EXPECT_EQ(call_of("cuMemcpyHtoDAsync_v2", [&] { copy_to_device(stream, up); }), "cuMemcpyHtoDAsync_v2");
  EXPECT_EQ(call_of("cuMemcpyDtoDAsync_v2", [&] { copy_on_device(stream, across); }), "cuMemcpyDtoDAsync_v2");
  EXPECT_EQ(call_of("cuMemcpy2DAsync_v2",
                    [&] { copy_2d(stream, Direction::kToHost, {host.address(), 8, buffer->address(), 8, 8, 8}); }),
            "cuMemcpy2DAsync_v2");
  copy_to_host(stream, two);
  stream.synchronize();
}

}  // namespace
}  // namespace snapstone::cuda
