// csrc/cuda/kernels.h: what is launched, and what is not, with the kernels themselves done by the fake driver's
// references.
#include "cuda/kernels.h"

#include <cstring>

#include "armed_faults.h"
#include "base/xxh3.h"
#include "cuda/box_items.h"
#include "fake_cuda.h"

namespace snapstone::cuda {
namespace {

using testing::ArmedFaults;
using testing::fake_counter;
using testing::pattern;
using testing::run_child;

class KernelsTest : public testing::FakeCuda {
 protected:
  // Device memory with these bytes, once the stream comes to it.
  template <class T>
  DeviceBuffer upload(const std::vector<T>& values) {
    const std::uint64_t nbytes = values.size() * sizeof(T);
    auto buffer = DeviceBuffer::allocate(stream_, nbytes);
    if (!buffer) throw std::runtime_error("out of memory");
    SNAPSTONE_FAKE(fakecuda_enqueue_write)(0, stream_.handle(), buffer->address(), values.data(), nbytes);
    return std::move(*buffer);
  }

  std::vector<std::uint8_t> download(DevicePointer address, std::uint64_t nbytes) {
    SNAPSTONE_FAKE(fakecuda_drain)();
    std::vector<std::uint8_t> bytes(nbytes);
    EXPECT_EQ(SNAPSTONE_FAKE(fakecuda_read)(address, bytes.data(), nbytes), 0);
    return bytes;
  }

  const Kernels& kernels() {
    const Kernels* const loaded = Kernels::of(device());
    if (loaded == nullptr) throw std::runtime_error(Kernels::absence(device()));
    return *loaded;
  }

  Stream stream_{device()};
};

TEST_F(KernelsTest, digest_in_the_order_of_the_stream) {
  const std::vector<std::uint8_t> bytes = pattern(300000, 3);
  const DeviceBuffer data = upload(bytes);
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> pieces = {
      {0, 0}, {5, 17}, {1, 240}, {0, 241}, {16, 299000}};
  std::vector<DigestItem> items;
  for (const auto& [begin, nbytes] : pieces) items.push_back({data.address() + begin, nbytes});
  const DeviceBuffer item_memory = upload(items);
  const DeviceBuffer digests = upload(std::vector<std::uint8_t>(16 * pieces.size(), 0));
  for (const std::uint64_t seed : {0u, 99u}) {
    kernels().digest(stream_, item_memory.address(), pieces.size(), digests.address(), seed);
    const std::vector<std::uint8_t> actual = download(digests.address(), digests.nbytes());
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      std::uint8_t expected[16];
      xxh3::store_canonical(xxh3::hash(bytes.data() + pieces[i].first, pieces[i].second, seed), expected);
      EXPECT_EQ(std::memcmp(expected, actual.data() + 16 * i, 16), 0) << i;
    }
  }
}

TEST_F(KernelsTest, compare_what_was_digested_with_what_was_expected) {
  std::vector<std::uint8_t> digests = pattern(16 * 1000, 1);
  const DeviceBuffer expected = upload(digests);
  digests[16 * 700 + 3] ^= 0x40;
  const DeviceBuffer actual = upload(digests);
  const DeviceBuffer changed = upload(std::vector<std::uint8_t>(1000, 0xEE));
  kernels().compare(stream_, actual.address(), expected.address(), 1000, changed.address());
  std::vector<std::uint8_t> flags(1000, 0);
  flags[700] = 1;
  EXPECT_EQ(download(changed.address(), 1000), flags);
}

TEST_F(KernelsTest, gather_into_one_buffer) {
  const std::vector<std::uint8_t> bytes = pattern(200000, 2);
  const DeviceBuffer data = upload(bytes);
  const DeviceBuffer packed = upload(std::vector<std::uint8_t>(150100, 0));
  const DeviceBuffer items = upload(std::vector<GatherItem>{{data.address() + 7, packed.address(), 100},
                                                            {data.address() + 40000, packed.address() + 100, 150000}});
  kernels().gather(stream_, items.address(), 2, 150000);
  std::vector<std::uint8_t> expected(bytes.begin() + 7, bytes.begin() + 107);
  expected.insert(expected.end(), bytes.begin() + 40000, bytes.begin() + 190000);
  EXPECT_EQ(download(packed.address(), packed.nbytes()), expected);
}

TEST_F(KernelsTest, scatter_a_chunk_into_a_transposed_target) {
  constexpr std::int64_t kRows = 300;
  constexpr std::int64_t kColumns = 50;
  const std::vector<std::uint8_t> bytes = pattern(kRows * kColumns * 4, 8);
  const DeviceBuffer target = upload(std::vector<std::uint8_t>(bytes.size(), 0));
  const BoxTarget box{{kRows, kColumns},
                      {0, 0},
                      {reinterpret_cast<std::uint8_t*>(target.address()), 4, {kRows, kColumns}, {4, 4 * kRows}}};
  const std::int64_t half = static_cast<std::int64_t>(bytes.size()) / 2 + 2;  // inside an element
  const std::vector<std::uint8_t> first(bytes.begin(), bytes.begin() + half);
  const std::vector<std::uint8_t> second(bytes.begin() + half, bytes.end());
  const DeviceBuffer chunks[] = {upload(first), upload(second)};
  std::vector<BoxItem> items;
  append_box_items(chunks[0].address(), 0, half, box, items);
  append_box_items(chunks[1].address(), half, static_cast<std::int64_t>(bytes.size()), box, items);
  const DeviceBuffer item_memory = upload(items);
  kernels().scatter(stream_, item_memory.address(), items.size(), static_cast<std::uint64_t>(half));
  const std::vector<std::uint8_t> actual = download(target.address(), target.nbytes());
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t column = 0; column < kColumns; ++column) {
      ASSERT_EQ(
          std::memcmp(actual.data() + 4 * (column * kRows + row), bytes.data() + 4 * (row * kColumns + column), 4), 0)
          << row << ", " << column;
    }
  }
}

TEST_F(KernelsTest, nothing_is_launched_for_nothing) {
  kernels().digest(stream_, 16, 0, 16);
  kernels().gather(stream_, 16, 0, 0);
  kernels().compare(stream_, 16, 16, 0, 16);
  kernels().scatter(stream_, 16, 0, 0);
  EXPECT_EQ(fake_counter("launches_snapstone_digest"), 0u);
  EXPECT_EQ(fake_counter("launches_snapstone_scatter"), 0u);
}

TEST_F(KernelsTest, a_refused_launch_is_an_error_that_names_it) {
  const Kernels& loaded = kernels();
  const ArmedFaults faults("cuLaunchKernel:1:errno=719");
  try {
    loaded.gather(stream_, 16, 1, 0);
    FAIL() << "no error";
  } catch (const CudaError& error) {
    EXPECT_EQ(error.call(), "cuLaunchKernel");
    EXPECT_EQ(error.device(), 0);
  }
}

TEST_F(KernelsTest, are_loaded_once_and_only_when_asked_for) {
  Device& other = device(1);
  EXPECT_EQ(Kernels::loaded(other), nullptr);
  const Kernels* const kernels = Kernels::of(other);
  ASSERT_NE(kernels, nullptr) << Kernels::absence(other);
  EXPECT_EQ(Kernels::loaded(other), kernels);
  EXPECT_EQ(Kernels::of(other), kernels);
  EXPECT_EQ(Kernels::absence(other), "");
}

// A process of its own each, because a device's answer is for good.
class AbsentKernels : public testing::FakeCuda {};

TEST_F(AbsentKernels, DISABLED_say_why) {
  EXPECT_EQ(Kernels::of(device()), nullptr);
  std::printf("absence: %s\n", Kernels::absence(device()).c_str());
}

std::string absence_with(const std::string& environment) {
  const std::string output = run_child("AbsentKernels.DISABLED_say_why", environment).output;
  const auto begin = output.find("absence: ");
  return begin == std::string::npos ? output : output.substr(begin + 9, output.find('\n', begin) - begin - 9);
}

TEST(AbsentKernelsTest, have_a_reason) {
  EXPECT_EQ(absence_with("FAKECUDA_CC=75"), "compute capability 7.5: the kernels need 8.0");
  EXPECT_EQ(absence_with("FAKECUDA_HIDE=cuLaunchKernel"), "the driver has no functions for modules and kernels");
  EXPECT_EQ(absence_with("FAKECUDA_HIDE=cuModuleLoadData"), "the driver has no functions for modules and kernels");
  EXPECT_NE(absence_with("SNAPSTONE_FAULT=cuModuleLoadData:1:errno=218").find("cuModuleLoadData: "), std::string::npos);
  EXPECT_NE(absence_with("SNAPSTONE_FAULT=cuModuleGetFunction:2:errno=500").find("cuModuleGetFunction: "),
            std::string::npos);
}

TEST(AbsentKernelsTest, drivers_from_12_0_on_take_the_ptx) {
  for (const char* version : {"12000", "12020", "12080", "13000"}) {
    const auto result = run_child("KernelsTest.are_loaded_once*", std::string("FAKECUDA_VERSION=") + version);
    EXPECT_EQ(result.status, 0) << result.output;
  }
}

}  // namespace
}  // namespace snapstone::cuda
