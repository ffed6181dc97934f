// Placements carried out by memcpy, against what scatter() does with the same targets.
#include "pipeline/placement.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "pipeline/random_box.h"
#include "seed.h"

namespace snapstone::pipeline {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::uint32_t kChunkBytes = 4000;

std::shared_ptr<const ChunkRecords> records_of(std::size_t count) {
  ChunkRecords records(count);
  for (std::size_t i = 0; i < count; ++i) {
    records[i].offset = i * kPageBytes;
    records[i].raw_bytes = records[i].stored_bytes = kChunkBytes;
  }
  return std::make_shared<const ChunkRecords>(std::move(records));
}

LoadPlan plan_of(std::size_t chunks) { return LoadPlan({{records_of(chunks), 0, "rank-00000.index"}}); }

std::uint64_t address_of(const std::uint8_t* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

void copy(std::uint64_t target, const std::uint8_t* source, std::uint64_t nbytes) {
  std::memcpy(reinterpret_cast<void*>(target), source, nbytes);
}

void copy_box(const StridedBlock& box, const std::uint8_t* source, std::size_t axis, std::int64_t from,
              std::int64_t to) {
  if (axis == box.dims.size()) {
    copy(static_cast<std::uint64_t>(to), source + from, static_cast<std::uint64_t>(box.unit_bytes));
    return;
  }
  for (std::int64_t i = 0; i < box.dims[axis].size; ++i) {
    copy_box(box, source, axis + 1, from + i * box.dims[axis].source_stride, to + i * box.dims[axis].target_stride);
  }
}

void carry_out(const Placement& placement, const std::uint8_t* raw) {
  Bytes both(placement.raw_bytes + placement.packed_bytes);
  std::copy_n(raw, placement.raw_bytes, both.data());
  std::uint8_t* const packed = both.data() + placement.raw_bytes;
  for (const Placement::Pack& pack : placement.packs) gather_block(pack.block, raw, packed + pack.at);
  const std::uint8_t* const source = both.data();
  for (const cuda::Copy& run : placement.runs) copy(run.dst, source + run.src, run.nbytes);
  for (const cuda::Copy2d& rows : placement.rows) {
    EXPECT_GE(rows.dst_pitch, rows.width_bytes);
    EXPECT_GE(rows.src_pitch, rows.width_bytes);
    for (std::uint64_t i = 0; i < rows.height; ++i) {
      copy(rows.dst + i * rows.dst_pitch, source + rows.src + i * rows.src_pitch, rows.width_bytes);
    }
  }
  for (const StridedBlock& box : placement.boxes) {
    EXPECT_LE(box.dims.size(), cuda::kBoxDimsMax);
    copy_box(box, source, 0, box.source, box.target);
  }
}

enum class From { kDevice, kHost, kHostUnpacked };

std::string from_test_name(const ::testing::TestParamInfo<From>& info) {
  static constexpr const char* kNames[] = {"device", "host", "unpacked"};
  return kNames[static_cast<int>(info.param)];
}

class PlacementFrom : public ::testing::TestWithParam<From> {
 protected:
  Placement place(const LoadPlan& plan, const ReadChunk& chunk, std::int32_t device) const {
    if (GetParam() == From::kDevice) return place_on_device(plan, chunk, device);
    return place_from_host(plan, chunk, device, GetParam() == From::kHost ? kChunkBytes : 0);
  }
  std::mt19937_64 random_{testing::seed()};
};

INSTANTIATE_TEST_SUITE_P(Memory, PlacementFrom, ::testing::Values(From::kDevice, From::kHost, From::kHostUnpacked),
                         from_test_name);

TEST_P(PlacementFrom, random_boxes_of_every_chunk_reach_their_targets) {
  for (int round = 0; round < 200; ++round) {
    const RandomBox box(random_, round % 3 == 0 ? 300 : 20000);
    const std::uint64_t nbytes = box.shard_nbytes();
    const std::uint64_t at = random_() % 100;
    const std::uint64_t chunk_count = (at + nbytes + kChunkBytes - 1) / kChunkBytes;
    Bytes string(nbytes);
    for (std::uint8_t& byte : string) byte = static_cast<std::uint8_t>(random_());
    Bytes target(static_cast<std::size_t>(box.memory_nbytes), 0xAA);
    Bytes expected = target;
    box.for_each_element([&](std::int64_t from, std::int64_t to) {
      std::copy_n(string.begin() + from, box.item_bytes, expected.begin() + to);
    });
    LoadPlan plan = plan_of(chunk_count);
    plan.add_box({0, 0, chunk_count, at, nbytes},
                 {box.shard_sizes, box.offsets, {target.data(), box.item_bytes, box.sizes, box.strides}}, {}, 1);
    plan.finish();
    EXPECT_EQ(plan.devices(), std::vector<std::int32_t>{1});
    Bytes stored(chunk_count * kChunkBytes);
    std::copy(string.begin(), string.end(), stored.begin() + static_cast<std::ptrdiff_t>(at));
    std::uint64_t placed = 0;
    for (const ReadChunk& chunk : plan.chunks()) {
      const Placement placement = place(plan, chunk, 1);
      EXPECT_TRUE(placement.boxes.empty() || GetParam() == From::kDevice);
      EXPECT_TRUE(placement.packs.empty() || GetParam() == From::kHost);
      carry_out(placement, stored.data() + chunk.chunk * kChunkBytes);
      placed += placement.nbytes;
      EXPECT_EQ(place(plan, chunk, 0).nbytes, 0u) << "another device has no target here";
    }
    ASSERT_EQ(target, expected) << "round " << round;
    EXPECT_EQ(placed, plan.bytes_needed());
  }
}

TEST_P(PlacementFrom, targets_of_other_devices_and_of_the_host_are_left_out) {
  Bytes raw(kChunkBytes);
  for (std::uint8_t& byte : raw) byte = static_cast<std::uint8_t>(random_());
  std::vector<Bytes> targets(3, Bytes(100, 0));
  LoadPlan plan = plan_of(1);
  for (std::int32_t i = 0; i < 3; ++i) {
    plan.add_contiguous({0, 0, 1, static_cast<std::uint64_t>(64 * i), 100}, targets[static_cast<std::size_t>(i)].data(),
                        {}, i - 1);
  }
  plan.finish();
  EXPECT_EQ(plan.devices(), (std::vector<std::int32_t>{0, 1}));
  carry_out(place(plan, plan.chunks()[0], 1), raw.data());
  EXPECT_EQ(targets[0], Bytes(100, 0));
  EXPECT_EQ(targets[1], Bytes(100, 0));
  EXPECT_EQ(targets[2], Bytes(raw.begin() + 128, raw.begin() + 228));
}

class PlacementShape : public ::testing::Test {
 protected:
  // One chunk that is a matrix of 40 rows by 100 bytes, with such a target.
  LoadPlan plan_for(StridedView target) const {
    LoadPlan plan = plan_of(1);
    const std::int64_t item = target.item_bytes;
    plan.add_box({0, 0, 1, 0, kChunkBytes}, {{40, 100 / item}, {0, 0}, std::move(target)}, {}, 0);
    plan.finish();
    return plan;
  }
  std::uint8_t* const at_ = reinterpret_cast<std::uint8_t*>(0x100000);  // never touched
};

TEST_F(PlacementShape, contiguous_targets_are_one_run) {
  const LoadPlan plan = plan_for({at_, 2, {40, 50}, {100, 2}});
  for (const Placement& placement :
       {place_on_device(plan, plan.chunks()[0], 0), place_from_host(plan, plan.chunks()[0], 0, kChunkBytes)}) {
    ASSERT_EQ(placement.runs.size(), 1u);
    EXPECT_EQ(placement.runs[0].dst, address_of(at_));
    EXPECT_EQ(placement.runs[0].src, 0u);
    EXPECT_EQ(placement.packed_bytes, 0u);
    EXPECT_EQ(placement.runs[0].nbytes, kChunkBytes);
    EXPECT_TRUE(placement.rows.empty() && placement.boxes.empty() && placement.packs.empty());
  }
}

TEST_F(PlacementShape, short_rows_are_for_the_kernel_and_without_it_copies_in_rows) {
  const LoadPlan plan = plan_for({at_, 2, {40, 50}, {128, 2}});
  const Placement with = place_on_device(plan, plan.chunks()[0], 0);
  EXPECT_TRUE(with.rows.empty() && with.runs.empty());
  ASSERT_EQ(with.boxes.size(), 1u);
  EXPECT_EQ(with.boxes[0].unit_bytes, 100);
  const Placement without = place_from_host(plan, plan.chunks()[0], 0, kChunkBytes);
  EXPECT_TRUE(without.packs.empty() && without.runs.empty());
  ASSERT_EQ(without.rows.size(), 1u);
  EXPECT_EQ(without.rows[0].width_bytes, 100u);
  EXPECT_EQ(without.rows[0].height, 40u);
  EXPECT_EQ(without.rows[0].src_pitch, 100u);
  EXPECT_EQ(without.rows[0].dst_pitch, 128u);
}

TEST_F(PlacementShape, a_transposed_target_is_packed_into_a_single_run) {
  const LoadPlan plan = plan_for({at_, 2, {40, 50}, {2, 80}});
  const Placement without = place_from_host(plan, plan.chunks()[0], 0, kChunkBytes);
  EXPECT_EQ(without.packed_bytes, kChunkBytes);
  ASSERT_EQ(without.runs.size(), 1u);
  EXPECT_EQ(without.runs[0].nbytes, kChunkBytes);
  EXPECT_EQ(without.runs[0].src, without.raw_bytes) << "the first packed byte";
  const Placement no_room = place_from_host(plan, plan.chunks()[0], 0, kChunkBytes - 1);
  EXPECT_EQ(no_room.packed_bytes, 0u);
  EXPECT_FALSE(no_room.rows.empty());
  EXPECT_EQ(place_on_device(plan, plan.chunks()[0], 0).boxes.size(), 1u);
}

TEST_F(PlacementShape, a_pitch_that_copies_in_rows_cannot_take_becomes_runs) {
  const LoadPlan plan = plan_for({at_, 2, {40, 50}, {std::int64_t{1} << 31, 2}});
  const Placement without = place_from_host(plan, plan.chunks()[0], 0, kChunkBytes);
  EXPECT_TRUE(without.rows.empty());
  ASSERT_EQ(without.runs.size(), 40u);
  EXPECT_EQ(without.runs[39].dst, address_of(at_) + 39 * (std::uint64_t{1} << 31));
  EXPECT_EQ(place_on_device(plan, plan.chunks()[0], 0).boxes.size(), 1u);
}

TEST_F(PlacementShape, what_the_kernel_has_too_few_dimensions_for_is_split) {
  // 2^11 items, every second one along each of 11 dimensions that do not merge.
  std::vector<std::int64_t> sizes(11, 2);
  std::vector<std::int64_t> strides(11);
  std::int64_t stride = 1;
  for (std::size_t i = 11; i-- > 0;) {
    strides[i] = stride;
    stride = 2 * stride + 1;
  }
  Bytes target(static_cast<std::size_t>(stride), 0);
  LoadPlan plan = plan_of(1);
  plan.add_box({0, 0, 1, 0, 2048}, {sizes, std::vector<std::int64_t>(11), {target.data(), 1, sizes, strides}}, {}, 0);
  plan.finish();
  const Placement placement = place_on_device(plan, plan.chunks()[0], 0);
  EXPECT_GT(placement.boxes.size(), 1u);
  Bytes raw(kChunkBytes);
  for (std::size_t i = 0; i < raw.size(); ++i) raw[i] = static_cast<std::uint8_t>(i * 7 + i / 256);
  carry_out(placement, raw.data());
  Bytes expected(target.size(), 0);
  scatter(raw.data(), 0, 2048, {sizes, std::vector<std::int64_t>(11), {expected.data(), 1, sizes, strides}});
  EXPECT_EQ(target, expected);
}

}  // namespace
}  // namespace snapstone::pipeline
