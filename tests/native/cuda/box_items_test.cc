// append_box_items() against base/strided.h scatter(), for random boxes and ranges: the same bytes go to the same
// places, each once, in as many items as promised.
#include "cuda/box_items.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "seed.h"

namespace snapstone::cuda {
namespace {

using Bytes = std::vector<std::uint8_t>;

struct RandomBox {
  BoxTarget box;
  Bytes memory;
  std::int64_t shard_nbytes;
};

std::int64_t between(std::mt19937_64& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}

// The target's dimensions lie in memory in any order, some with gaps behind them, some backwards.
RandomBox random_box(std::mt19937_64& random) {
  RandomBox made;
  const auto dims = static_cast<std::size_t>(between(random, 0, 5));
  StridedView& target = made.box.target;
  target.item_bytes = between(random, 0, 5) == 0 ? 3 : std::int64_t{1} << between(random, 0, 4);
  made.shard_nbytes = target.item_bytes;
  for (std::size_t i = 0; i < dims; ++i) {
    const std::int64_t size = between(random, 1, 6);
    made.box.shard_sizes.push_back(size);
    made.box.box_offsets.push_back(between(random, 0, 2) == 0 ? between(random, 0, size - 1) : 0);
    target.sizes.push_back(between(random, 0, 1) == 0 ? between(random, 1, size - made.box.box_offsets[i])
                                                      : size - made.box.box_offsets[i]);
    made.shard_nbytes *= size;
  }
  std::vector<std::size_t> order(dims);
  std::iota(order.rbegin(), order.rend(), std::size_t{0});
  if (between(random, 0, 1) == 0) std::shuffle(order.begin(), order.end(), random);
  target.stride_bytes.assign(dims, 0);
  std::int64_t span = target.item_bytes;
  std::int64_t first = 0;
  for (const std::size_t axis : order) {
    if (between(random, 0, 3) == 0) span += target.item_bytes * between(random, 1, 3);
    target.stride_bytes[axis] = span;
    span *= target.sizes[axis];
    if (between(random, 0, 4) == 0) {
      first += target.stride_bytes[axis] * (target.sizes[axis] - 1);
      target.stride_bytes[axis] = -target.stride_bytes[axis];
    }
  }
  made.memory.assign(static_cast<std::size_t>(span), 0xA5);
  target.data = made.memory.data() + first;
  return made;
}

// What the kernel does. Bytes that are written twice are counted twice.
void run(const BoxItem& item, std::uint32_t dim, DevicePointer source, DevicePointer target, std::int64_t& written) {
  if (dim == item.dims) {
    std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), item.run_bytes);
    written += item.run_bytes;
    return;
  }
  for (std::int64_t i = 0; i < item.sizes[dim]; ++i) {
    run(item, dim + 1, source + static_cast<DevicePointer>(i * item.source_strides[dim]),
        target + static_cast<DevicePointer>(i * item.target_strides[dim]), written);
  }
}

TEST(BoxItems, equal_what_scatter_does_on_the_host) {
  std::mt19937_64 random(testing::seed());
  for (int round = 0; round < 3000; ++round) {
    RandomBox expected = random_box(random);
    RandomBox actual{expected.box, expected.memory, expected.shard_nbytes};
    actual.box.target.data = actual.memory.data() + (expected.box.target.data - expected.memory.data());
    Bytes string(static_cast<std::size_t>(expected.shard_nbytes));
    for (std::uint8_t& byte : string) byte = static_cast<std::uint8_t>(random());
    const std::int64_t begin = between(random, 0, 3) == 0 ? 0 : between(random, 0, expected.shard_nbytes);
    const std::int64_t end =
        between(random, 0, 3) == 0 ? expected.shard_nbytes : between(random, begin, expected.shard_nbytes);
    // A heap block of its own, so that a sanitizer sees reads outside of the range.
    const Bytes chunk(string.begin() + begin, string.begin() + end);

    const std::int64_t copied = scatter(chunk.data(), begin, end, expected.box);
    std::vector<BoxItem> items;
    const auto source = reinterpret_cast<DevicePointer>(chunk.data());
    ASSERT_EQ(append_box_items(source, begin, end, actual.box, items), copied);
    ASSERT_LE(items.size(), 2 * actual.box.target.sizes.size() + 1);
    std::int64_t written = 0;
    for (const BoxItem& item : items) run(item, 0, item.source, item.target, written);
    ASSERT_EQ(written, copied);
    ASSERT_EQ(actual.memory, expected.memory) << "round " << round << ", bytes " << begin << " to " << end;
  }
}

TEST(BoxItems, of_a_chunk_inside_two_huge_rows_are_small) {
  constexpr std::int64_t kRow = std::int64_t{1} << 40;
  const BoxTarget box{{2, kRow}, {0, 0}, {nullptr, 1, {2, kRow}, {2 * kRow, 1}}};
  std::vector<BoxItem> items;
  EXPECT_EQ(append_box_items(0, kRow - 1000, kRow + 3000, box, items), 4000);
  ASSERT_EQ(items.size(), 2u);
  EXPECT_EQ(items[0].run_bytes, 1000u);
  EXPECT_EQ(items[1].run_bytes, 3000u);
  EXPECT_EQ(items[1].target, DevicePointer{2} * kRow);
}

TEST(BoxItems, refuse_what_an_item_cannot_hold) {
  BoxTarget box;
  box.target.item_bytes = 1;
  std::int64_t stride = 1;
  for (unsigned i = 0; i < kBoxDimsMax + 1; ++i) {  // reversed, so that nothing collapses
    box.shard_sizes.push_back(2);
    box.box_offsets.push_back(0);
    box.target.sizes.push_back(2);
    box.target.stride_bytes.push_back(stride);
    stride *= 2;
  }
  std::vector<BoxItem> items;
  EXPECT_FALSE(fits_box_items(box));
  EXPECT_THROW(append_box_items(0, 0, 512, box, items), std::invalid_argument);
  EXPECT_TRUE(items.empty());
  const BoxTarget whole{{8}, {0}, {nullptr, 1, {8}, {1}}};
  EXPECT_TRUE(fits_box_items(whole));
  EXPECT_THROW(append_box_items(0, 0, std::int64_t{1} << 32, whole, items), std::invalid_argument);
}

}  // namespace
}  // namespace snapstone::cuda
