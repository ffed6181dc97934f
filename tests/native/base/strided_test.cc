// Properties, for random shapes, strides (permuted, stepped, reversed, expanded) and byte ranges:
//   gather(view, b, e)  == bytes [b, e) of the naive row-major string, and nothing beside target[0, e - b) is written
//   scatter(range, box) == element-wise copy of the box's bytes inside the range; the sum over a partition covers the
//   box exactly once collapsed() changes neither
#include "base/strided.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "seed.h"

namespace snapstone {
namespace {

using Bytes = std::vector<std::uint8_t>;
using Index = std::vector<std::int64_t>;
constexpr std::uint8_t kUntouched = 0xA5;

class Random {
 public:
  explicit Random(std::uint64_t salt) : engine_(testing::seed() + salt) {}
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  bool one_in(std::int64_t n) { return between(1, n) == 1; }
  template <class T>
  void shuffle(std::vector<T>& values) {
    std::shuffle(values.begin(), values.end(), engine_);
  }

 private:
  std::mt19937_64 engine_;
};

// Calls visit(index) for every index of `sizes` in row-major order.
template <class Visit>
void for_each_index(const Index& sizes, Visit&& visit) {
  Index index(sizes.size(), 0);
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) {
    return;
  }
  for (;;) {
    visit(index);
    std::size_t axis = sizes.size();
    while (axis > 0 && ++index[axis - 1] == sizes[axis - 1]) {
      index[--axis] = 0;
    }
    if (axis == 0) {
      return;
    }
  }
}

std::int64_t dot(const Index& a, const Index& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), std::int64_t{0});
}

Bytes naive_string(const StridedView& view) {
  Bytes string;
  for_each_index(view.sizes, [&](const Index& index) {
    const std::uint8_t* item = view.data + dot(index, view.stride_bytes);
    string.insert(string.end(), item, item + view.item_bytes);
  });
  return string;
}

struct Tensor {
  Bytes memory;
  StridedView view;
};

// A view inside a buffer of its own, so that the address sanitizer sees every byte outside.
Tensor random_tensor(Random& random, const Index& sizes, std::int64_t item_bytes, bool may_expand) {
  std::vector<std::size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (!random.one_in(3)) {
    random.shuffle(order);
  }
  Tensor tensor;
  tensor.view = {nullptr, item_bytes, sizes, Index(sizes.size(), 0)};
  std::int64_t stride = item_bytes;
  std::int64_t lowest = 0;
  for (std::size_t i = order.size(); i-- > 0;) {
    const std::size_t axis = order[i];
    if (may_expand && random.one_in(8)) {
      continue;  // stride 0
    }
    if (random.one_in(6)) {
      stride += item_bytes * random.between(1, 3);  // padded rows
    }
    const bool reversed = random.one_in(6);
    tensor.view.stride_bytes[axis] = reversed ? -stride : stride;
    const std::int64_t extent = std::max<std::int64_t>(sizes[axis], 1);
    lowest += reversed ? -stride * (extent - 1) : 0;
    stride *= extent;
  }
  tensor.memory.resize(static_cast<std::size_t>(stride));
  for (std::uint8_t& byte : tensor.memory) {
    byte = static_cast<std::uint8_t>(random.between(0, 255));
  }
  tensor.view.data = tensor.memory.data() - lowest;
  return tensor;
}

Index random_sizes(Random& random) {
  Index sizes(static_cast<std::size_t>(random.between(0, 5)));
  for (std::int64_t& size : sizes) {
    size = random.one_in(25) ? 0 : random.one_in(4) ? 1 : random.between(1, random.one_in(5) ? 40 : 6);
  }
  return sizes;
}

std::int64_t random_item_bytes(Random& random) {
  constexpr std::int64_t kChoices[] = {1, 2, 3, 4, 8, 12, 16};
  return kChoices[random.between(0, 6)];
}

std::string describe(const StridedView& view) {
  std::string text = "item " + std::to_string(view.item_bytes);
  for (std::size_t i = 0; i < view.sizes.size(); ++i) {
    text += " [" + std::to_string(view.sizes[i]) + " x " + std::to_string(view.stride_bytes[i]) + "]";
  }
  return text;
}

Bytes gathered(const StridedView& view, std::int64_t begin, std::int64_t end) {
  Bytes target(static_cast<std::size_t>(end - begin) + 2, kUntouched);
  gather(view, begin, end, target.data() + 1);
  EXPECT_EQ(target.front(), kUntouched);
  EXPECT_EQ(target.back(), kUntouched);
  return Bytes(target.begin() + 1, target.end() - 1);
}

TEST(Gather, equals_the_naive_string_for_random_views_and_ranges) {
  Random random(1);
  for (int round = 0; round < 3000; ++round) {
    const Tensor tensor = random_tensor(random, random_sizes(random), random_item_bytes(random), true);
    const Bytes expected = naive_string(tensor.view);
    const auto nbytes = static_cast<std::int64_t>(expected.size());
    ASSERT_EQ(tensor.view.nbytes(), nbytes);
    ASSERT_EQ(gathered(tensor.view, 0, nbytes), expected) << describe(tensor.view);
    const StridedView collapsed = tensor.view.collapsed();
    ASSERT_LE(collapsed.sizes.size(), std::max<std::size_t>(tensor.view.sizes.size(), 1));
    for (int i = 0; i < 4; ++i) {
      const std::int64_t begin = random.between(0, nbytes);
      const std::int64_t end = random.between(begin, nbytes);
      const Bytes part(expected.begin() + begin, expected.begin() + end);
      ASSERT_EQ(gathered(tensor.view, begin, end), part) << describe(tensor.view) << " " << begin << ".." << end;
      ASSERT_EQ(gathered(collapsed, begin, end), part) << describe(tensor.view) << " " << begin << ".." << end;
    }
  }
}

TEST(Gather, transposed_planes_larger_than_a_tile_keep_their_order) {
  for (const std::int64_t item : {1, 2, 4, 8, 16}) {
    Bytes memory(static_cast<std::size_t>(item * 150 * 90));
    for (std::size_t i = 0; i < memory.size(); ++i) {
      memory[i] = static_cast<std::uint8_t>(i * 31 + i / 251);
    }
    const StridedView view{memory.data(), item, {150, 90}, {item, item * 150}};
    const Bytes expected = naive_string(view);
    EXPECT_EQ(gathered(view, 0, view.nbytes()), expected);
    EXPECT_EQ(gathered(view, 777, view.nbytes() - 333), Bytes(expected.begin() + 777, expected.end() - 333));
  }
}

TEST(Gather, refuses_ranges_outside_the_view) {
  Bytes memory(16);
  std::uint8_t target[32];
  const StridedView view{memory.data(), 4, {4}, {4}};
  EXPECT_THROW(gather(view, 0, 17, target), std::out_of_range);
  EXPECT_THROW(gather(view, -1, 4, target), std::out_of_range);
  EXPECT_THROW(gather({memory.data(), 4, {4}, {}}, 0, 4, target), std::invalid_argument);
}

TEST(StridedView, nbytes_that_do_not_fit_are_refused) {
  const StridedView view{nullptr, 8, {std::int64_t{1} << 40, std::int64_t{1} << 40}, {0, 0}};
  EXPECT_THROW(view.nbytes(), std::overflow_error);
}

TEST(StridedView, contiguous_views_collapse_to_one_dimension) {
  Bytes memory(4 * 3 * 1 * 5 * 2);
  const StridedView view{memory.data(), 2, {4, 3, 1, 5}, {30, 10, 999, 2}};
  const StridedView collapsed = view.collapsed();
  EXPECT_EQ(collapsed.sizes, Index{60});
  EXPECT_EQ(collapsed.stride_bytes, Index{2});
}

struct RandomBox {
  Tensor tensor;
  BoxTarget box;
  Bytes shard;  // the stored string
};

RandomBox random_box(Random& random) {
  RandomBox result;
  Index sizes;
  result.box.shard_sizes = random_sizes(random);
  for (const std::int64_t size : result.box.shard_sizes) {
    const bool all = random.one_in(2);
    const std::int64_t offset = all ? 0 : random.between(0, size);
    result.box.box_offsets.push_back(offset);
    sizes.push_back(all ? size : random.between(0, size - offset));
  }
  result.tensor = random_tensor(random, sizes, random_item_bytes(random), false);
  result.box.target = result.tensor.view;
  const Index& shard_sizes = result.box.shard_sizes;
  const std::int64_t nbytes =
      std::accumulate(shard_sizes.begin(), shard_sizes.end(), result.box.target.item_bytes, std::multiplies<>());
  result.shard.resize(static_cast<std::size_t>(nbytes));
  for (std::uint8_t& byte : result.shard) {
    byte = static_cast<std::uint8_t>(random.between(0, 255));
  }
  return result;
}

// Byte by byte: what the box needs of [begin, end). Returns the bytes copied and widens [first, last).
std::int64_t naive_scatter(const RandomBox& source, std::int64_t begin, std::int64_t end, std::uint8_t* data,
                           std::int64_t& first, std::int64_t& last) {
  const BoxTarget& box = source.box;
  const std::int64_t item = box.target.item_bytes;
  std::int64_t copied = 0;
  first = last = 0;
  for_each_index(box.target.sizes, [&](const Index& index) {
    std::int64_t position = 0;
    for (std::size_t i = 0; i < index.size(); ++i) {
      position = position * box.shard_sizes[i] + box.box_offsets[i] + index[i];
    }
    first = last == 0 ? position * item : std::min(first, position * item);
    last = std::max(last, (position + 1) * item);
    for (std::int64_t byte = position * item; byte < (position + 1) * item; ++byte) {
      if (byte >= begin && byte < end) {
        data[dot(index, box.target.stride_bytes) + byte - position * item] =
            source.shard[static_cast<std::size_t>(byte)];
        ++copied;
      }
    }
  });
  return copied;
}

TEST(Scatter, equals_the_naive_copy_for_random_boxes_and_ranges) {
  Random random(2);
  for (int round = 0; round < 3000; ++round) {
    RandomBox source = random_box(random);
    const auto nbytes = static_cast<std::int64_t>(source.shard.size());
    const std::int64_t begin = random.one_in(3) ? 0 : random.between(0, nbytes);
    const std::int64_t end = random.one_in(3) ? nbytes : random.between(begin, nbytes);
    // An exact copy of the range: reads outside of it are reads outside of a heap block.
    const Bytes range(source.shard.begin() + begin, source.shard.begin() + end);
    const Bytes before = source.tensor.memory;
    Bytes expected = before;
    std::int64_t first = 0;
    std::int64_t last = 0;
    const std::int64_t copied = naive_scatter(
        source, begin, end, expected.data() + (source.box.target.data - source.tensor.memory.data()), first, last);
    ASSERT_EQ(source.box.first_byte(), first);
    ASSERT_EQ(source.box.last_byte(), last);
    for (const BoxTarget& box : {source.box, source.box.collapsed()}) {
      source.tensor.memory.assign(before.begin(), before.end());
      ASSERT_EQ(scatter(range.data(), begin, end, box), copied) << describe(box.target);
      ASSERT_EQ(source.tensor.memory, expected) << describe(box.target) << " " << begin << ".." << end;
      ASSERT_EQ(box.first_byte(), first);
      ASSERT_EQ(box.last_byte(), last);
      ASSERT_EQ(box.bytes_before(end) - box.bytes_before(begin), copied) << "[" << begin << ", " << end << ")";
    }
  }
}

TEST(Scatter, the_pieces_of_a_partition_fill_the_box_exactly_once) {
  Random random(3);
  for (int round = 0; round < 300; ++round) {
    RandomBox source = random_box(random);
    const auto nbytes = static_cast<std::int64_t>(source.shard.size());
    const std::int64_t step = random.between(1, std::max<std::int64_t>(nbytes / 3, 1));
    std::int64_t copied = 0;
    for (std::int64_t begin = 0; begin < nbytes; begin += step) {
      copied += scatter(source.shard.data() + begin, begin, std::min(begin + step, nbytes), source.box);
    }
    ASSERT_EQ(copied, source.box.target.nbytes());
  }
}

TEST(Scatter, a_box_of_whole_rows_collapses_to_one_dimension) {
  Bytes memory(3 * 8 * 4);
  const BoxTarget box{{10, 8}, {2, 0}, {memory.data(), 4, {3, 8}, {32, 4}}};
  const BoxTarget collapsed = box.collapsed();
  EXPECT_EQ(collapsed.shard_sizes, Index{80});
  EXPECT_EQ(collapsed.box_offsets, Index{16});
  EXPECT_EQ(collapsed.target.sizes, Index{24});
}

TEST(Scatter, rows_before_the_range_cost_nothing) {
  // 2^40 rows, one in range: a scan of the rows would not end within the test's time limit.
  std::uint8_t item = 0;
  const std::int64_t rows = std::int64_t{1} << 40;
  const BoxTarget box{{rows, 2}, {0, 1}, {&item, 1, {rows, 1}, {0, 0}}};
  const std::uint8_t source[4] = {1, 2, 3, 4};
  EXPECT_EQ(scatter(source, rows, rows + 4, box), 2);
  EXPECT_EQ(item, 4);
}

TEST(Scatter, refuses_a_box_of_another_rank) {
  std::uint8_t item = 0;
  const BoxTarget box{{4, 4}, {0}, {&item, 1, {1, 1}, {1, 1}}};
  EXPECT_THROW(scatter(&item, 0, 1, box), std::invalid_argument);
  EXPECT_THROW(box.first_byte(), std::invalid_argument);
}

}  // namespace
}  // namespace snapstone
