#include "base/strided_blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "seed.h"

namespace snapstone {
namespace {

using Bytes = std::vector<std::uint8_t>;

// The definition: every index tuple, one after the other.
void copy_naively(const StridedBlock& block, const std::uint8_t* source, std::uint8_t* target, std::size_t axis = 0) {
  if (axis == block.dims.size()) {
    std::memcpy(target + block.target, source + block.source, static_cast<std::size_t>(block.unit_bytes));
    return;
  }
  StridedBlock inner = block;
  for (std::int64_t i = 0; i < block.dims[axis].size; ++i) {
    copy_naively(inner, source, target, axis + 1);
    inner.source += block.dims[axis].source_stride;
    inner.target += block.dims[axis].target_stride;
  }
}

struct Case {
  BoxTarget box;
  std::int64_t string_nbytes = 0;
  std::int64_t memory_begin = 0;  // where box.target.data lies in the memory
  std::int64_t memory_nbytes = 0;
};

// Dimensions in any order in memory, with gaps, some backwards.
Case random_case(std::mt19937_64& random) {
  Case result;
  const std::size_t rank = random() % 5;
  BoxTarget& box = result.box;
  box.target.item_bytes = std::int64_t{1} << random() % 4;
  result.string_nbytes = box.target.item_bytes;
  for (std::size_t i = 0; i < rank; ++i) {
    const auto size = static_cast<std::int64_t>(1 + random() % 7);
    const bool whole = random() % 2 == 0;
    const std::int64_t offset = whole ? 0 : static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(size));
    box.shard_sizes.push_back(size);
    box.box_offsets.push_back(offset);
    const std::int64_t left = size - box.box_offsets.back();
    box.target.sizes.push_back(whole ? left
                                     : 1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(left)));
    result.string_nbytes *= size;
  }
  std::vector<std::size_t> order(rank);
  for (std::size_t i = 0; i < rank; ++i) order[i] = i;
  if (random() % 2 == 0) std::shuffle(order.begin(), order.end(), random);
  box.target.stride_bytes.resize(rank);
  std::int64_t stride = box.target.item_bytes;
  for (std::size_t i = rank; i-- > 0;) {
    const std::size_t axis = order[i];
    const std::int64_t size = box.target.sizes[axis];
    box.target.stride_bytes[axis] = stride;
    const std::int64_t extent = (size - 1) * stride;
    if (random() % 4 == 0) {
      box.target.stride_bytes[axis] = -stride;
      result.memory_begin += extent;
    }
    stride = extent + stride + static_cast<std::int64_t>(random() % 2) * box.target.item_bytes;
  }
  result.memory_nbytes = stride;
  return result;
}

class StridedBlocks : public ::testing::Test {
 protected:
  std::mt19937_64 random_{testing::seed()};

  Bytes string_of(std::int64_t nbytes) {
    Bytes string(static_cast<std::size_t>(nbytes));
    for (std::uint8_t& byte : string) byte = static_cast<std::uint8_t>(random_());
    return string;
  }
};

TEST_F(StridedBlocks, blocks_copy_what_scatter_copies_from_any_cut_of_the_string) {
  for (int round = 0; round < 2000; ++round) {
    Case one = random_case(random_);
    const Bytes string = string_of(one.string_nbytes);
    const auto length = static_cast<std::uint64_t>(one.string_nbytes);
    const auto begin = static_cast<std::int64_t>(random_() % (length + 1));
    const auto end = begin + static_cast<std::int64_t>(random_() % (length - static_cast<std::uint64_t>(begin) + 1));
    Bytes expected(static_cast<std::size_t>(one.memory_nbytes), 0xEE);
    one.box.target.data = expected.data() + one.memory_begin;
    const std::int64_t scattered = scatter(string.data() + begin, begin, end, one.box);
    const std::vector<StridedBlock> blocks = scatter_blocks(begin, end, one.box);
    EXPECT_LE(blocks.size(), 2 * one.box.shard_sizes.size() + 1);
    Bytes as_is(expected.size(), 0xEE);
    Bytes ordered = as_is;
    Bytes packed = as_is;
    std::int64_t nbytes = 0;
    for (const StridedBlock& block : blocks) {
      nbytes += block.nbytes();
      copy_naively(block, string.data() + begin, as_is.data() + one.memory_begin);
      const StridedBlock in_order = block.in_target_order();
      copy_naively(in_order, string.data() + begin, ordered.data() + one.memory_begin);
      Bytes dense(static_cast<std::size_t>(block.nbytes()));
      gather_block(in_order, string.data() + begin, dense.data());
      copy_naively(block.packed(), dense.data(), packed.data() + one.memory_begin);
    }
    EXPECT_EQ(nbytes, scattered);
    ASSERT_EQ(as_is, expected) << "round " << round;
    ASSERT_EQ(ordered, expected) << "round " << round;
    ASSERT_EQ(packed, expected) << "round " << round;
  }
}

TEST_F(StridedBlocks, target_order_has_falling_strides_and_nothing_left_to_merge) {
  for (int round = 0; round < 500; ++round) {
    const Case one = random_case(random_);
    for (const StridedBlock& block : scatter_blocks(0, one.string_nbytes, one.box)) {
      const StridedBlock ordered = block.in_target_order();
      for (std::size_t i = 0; i < ordered.dims.size(); ++i) {
        EXPECT_GT(ordered.dims[i].size, 1);
        EXPECT_GT(ordered.dims[i].target_stride, 0);
        if (i > 0) {
          EXPECT_GE(ordered.dims[i - 1].target_stride, ordered.dims[i].target_stride);
        }
      }
      const StridedBlock packed = block.packed();
      if (!packed.dims.empty()) {
        EXPECT_GT(packed.dims.back().target_stride, packed.unit_bytes);
      }
    }
  }
}

TEST_F(StridedBlocks, a_transposed_target_packs_into_rows_of_its_own) {
  // 6 x 5 items of 2 bytes, stored by rows, wanted by columns with a gap after each.
  const BoxTarget box{{6, 5}, {0, 0}, {nullptr, 2, {6, 5}, {2, 16}}};
  const std::vector<StridedBlock> blocks = scatter_blocks(0, 60, box);
  ASSERT_EQ(blocks.size(), 1u);
  const StridedBlock packed = blocks[0].packed();
  EXPECT_EQ(packed.unit_bytes, 12);
  ASSERT_EQ(packed.dims.size(), 1u);
  EXPECT_EQ(packed.dims[0].size, 5);
  EXPECT_EQ(packed.dims[0].source_stride, 12);
  EXPECT_EQ(packed.dims[0].target_stride, 16);
}

TEST_F(StridedBlocks, memory_that_indices_share_gets_the_last_of_them) {
  const StridedBlock block{0, 0, 1, {{4, 1, 0}}};
  const StridedBlock ordered = block.in_target_order();
  EXPECT_TRUE(ordered.dims.empty());
  EXPECT_EQ(ordered.source, 3);
  EXPECT_EQ(ordered.nbytes(), 1);
}

TEST_F(StridedBlocks, nothing_wanted_is_no_block) {
  EXPECT_TRUE(scatter_blocks(0, 20, {{4, 5}, {0, 0}, {nullptr, 1, {0, 5}, {5, 1}}}).empty());
  EXPECT_TRUE(scatter_blocks(7, 7, {{4, 5}, {0, 0}, {nullptr, 1, {4, 5}, {5, 1}}}).empty());
  EXPECT_TRUE(scatter_blocks(0, 5, {{4, 5}, {1, 0}, {nullptr, 1, {1, 5}, {5, 1}}}).empty());
}

}  // namespace
}  // namespace snapstone
