#include "pipeline/load_plan.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "base/limits.h"

namespace snapstone::pipeline {
namespace {

// Chunks of 10000 raw bytes, stored one after the other in data file 0.
std::shared_ptr<const ChunkRecords> records_of(std::size_t count) {
  ChunkRecords records(count);
  for (std::size_t i = 0; i < count; ++i) {
    records[i].offset = i * 3 * kPageBytes;
    records[i].raw_bytes = records[i].stored_bytes = 10000;
  }
  return std::make_shared<const ChunkRecords>(std::move(records));
}

class LoadPlanTest : public ::testing::Test {
 protected:
  LoadPlan plan_{{{records_of(6), 0, "rank-00000.index"}, {records_of(3), 1, "rank-00001.index"}}};
  std::uint8_t target_[1]{};  // an address; nothing is written through it here
};

TEST_F(LoadPlanTest, a_shard_over_several_chunks_becomes_one_piece_of_each) {
  plan_.add_contiguous({0, 1, 3, 0, 25000}, target_);
  plan_.finish();
  ASSERT_EQ(plan_.chunks().size(), 3u);
  ASSERT_EQ(plan_.targets().size(), 3u);
  for (std::uint64_t i = 0; i < 3; ++i) {
    EXPECT_EQ(plan_.chunks()[i].chunk, 1 + i);
    const ReadTarget& target = plan_.targets()[plan_.chunks()[i].first_target];
    EXPECT_EQ(target.contiguous, target_ + i * 10000);
    EXPECT_EQ(target.shard_begin, i * 10000);
    EXPECT_EQ(target.shard_end, i == 2 ? 25000 : (i + 1) * 10000);
    EXPECT_EQ(target.at, 0u);
  }
  EXPECT_EQ(plan_.bytes_needed(), 25000u);
  EXPECT_EQ(plan_.bytes_read(), 3 * 3 * kPageBytes);
}

TEST_F(LoadPlanTest, each_chunk_is_read_once_whoever_wants_it) {
  plan_.add_contiguous({0, 2, 1, 0, 100}, target_);
  plan_.add_contiguous({0, 2, 1, 128, 100}, target_);
  plan_.add_contiguous({0, 0, 1, 0, 100}, target_);
  plan_.add_contiguous({0, 2, 1, 0, 100}, target_);  // tied: the same bytes again
  plan_.finish();
  ASSERT_EQ(plan_.chunks().size(), 2u);
  EXPECT_EQ(plan_.chunks()[0].chunk, 0u);
  EXPECT_EQ(plan_.chunks()[0].target_count, 1u);
  EXPECT_EQ(plan_.chunks()[1].target_count, 3u);
  EXPECT_EQ(plan_.chunks()[1].first_target, 1u);
  EXPECT_EQ(plan_.bytes_needed(), 400u);
  EXPECT_EQ(plan_.requests().size(), 1u) << "the chunk between them is cheaper to read than to skip";
  EXPECT_EQ(plan_.bytes_read(), 3 * 3 * kPageBytes);
}

TEST_F(LoadPlanTest, reads_go_through_the_files_in_order) {
  plan_.add_contiguous({1, 2, 1, 0, 1}, target_);
  plan_.add_contiguous({0, 5, 1, 0, 1}, target_);
  plan_.add_contiguous({1, 0, 1, 0, 1}, target_);
  plan_.add_contiguous({0, 3, 1, 0, 1}, target_);
  plan_.finish();
  std::vector<std::tuple<std::uint32_t, std::uint64_t>> order;
  for (const ReadChunk& chunk : plan_.chunks()) order.emplace_back(plan_.file(chunk), plan_.record(chunk).offset);
  EXPECT_EQ(order.size(), 4u);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
}

TEST_F(LoadPlanTest, a_box_reads_only_the_chunks_that_it_touches) {
  // Rows 11 to 14 of a 30 x 1000 byte matrix: bytes [11000, 15000), all in the second chunk.
  plan_.add_box({0, 0, 3, 0, 30000}, {{30, 1000}, {11, 0}, {target_, 1, {4, 1000}, {1000, 1}}});
  plan_.finish();
  ASSERT_EQ(plan_.chunks().size(), 1u);
  EXPECT_EQ(plan_.chunks()[0].chunk, 1u);
  EXPECT_EQ(plan_.bytes_needed(), 4000u);
}

TEST_F(LoadPlanTest, a_box_does_not_read_chunks_between_its_rows) {
  // Column 999 of a 2 x 30000 byte matrix over six chunks: bytes 999 and 30999.
  plan_.add_box({0, 0, 6, 0, 60000}, {{2, 30000}, {0, 999}, {target_, 1, {2, 1}, {1, 1}}});
  plan_.finish();
  ASSERT_EQ(plan_.chunks().size(), 2u);
  EXPECT_EQ(plan_.chunks()[0].chunk, 0u);
  EXPECT_EQ(plan_.chunks()[1].chunk, 3u);
  EXPECT_EQ(plan_.bytes_needed(), 2u);
}

TEST_F(LoadPlanTest, a_window_leaves_out_the_other_chunks) {
  plan_.add_contiguous({0, 0, 6, 0, 60000}, target_, {2, 3});
  plan_.add_box({1, 0, 3, 0, 30000}, {{30, 1000}, {5, 0}, {target_, 1, {20, 1000}, {1000, 1}}}, {0, 1});
  plan_.finish();
  std::vector<std::tuple<std::uint32_t, std::uint64_t>> chunks;
  for (const ReadChunk& chunk : plan_.chunks()) chunks.emplace_back(chunk.table, chunk.chunk);
  EXPECT_EQ(chunks, (std::vector<std::tuple<std::uint32_t, std::uint64_t>>{{0, 2}, {0, 3}, {0, 4}, {1, 0}}));
  EXPECT_EQ(plan_.targets()[0].contiguous, target_ + 20000) << "the place that the whole shard would give it";
  EXPECT_EQ(plan_.bytes_needed(), 30000u + 5000u);
}

TEST(LoadPlanRequests, neighbours_share_a_request_up_to_its_size_and_a_gap) {
  constexpr std::uint64_t kStored = 256 << 10;
  const std::uint64_t gap = LoadPlan::kGapBytes;
  std::vector<format::ChunkRecord> records(8);
  std::uint64_t offset = 0;
  for (std::size_t i = 0; i < records.size(); ++i) {
    records[i].raw_bytes = records[i].stored_bytes = kStored - (i == 1 ? 100 : 0);  // padded up to the page
    records[i].offset = offset;
    offset += kStored + (i == 4 ? gap : i == 5 ? gap + kPageBytes : 0);
  }
  LoadPlan plan({{std::make_shared<const ChunkRecords>(records), 0, "index"}});
  plan.add_all_chunks();
  plan.finish();
  std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>> requests;
  for (const ReadRequest& one : plan.requests()) requests.emplace_back(one.first_chunk, one.chunk_count, one.nbytes);
  const std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>> expected{
      {0, 4, 4 * kStored}, {4, 2, 2 * kStored + gap}, {6, 2, 2 * kStored}};
  EXPECT_EQ(requests, expected);
  EXPECT_EQ(plan.bytes_read(), 8 * kStored + gap);
  EXPECT_EQ(plan.request_bytes_max(), kChunkBytesDefault);
}

TEST(LoadPlanRequests, files_do_not_share_a_request) {
  std::vector<format::ChunkRecord> records(2);
  for (std::uint32_t i = 0; i < 2; ++i) {
    records[i].raw_bytes = records[i].stored_bytes = 100;
    records[i].offset = i * kPageBytes;
    records[i].file = i;
  }
  LoadPlan plan({{std::make_shared<const ChunkRecords>(records), 0, "index"}});
  plan.add_all_chunks();
  plan.finish();
  ASSERT_EQ(plan.requests().size(), 2u);
  EXPECT_EQ(plan.requests()[0].file, 0u);
  EXPECT_EQ(plan.requests()[1].file, 1u);
}

TEST_F(LoadPlanTest, an_empty_box_reads_nothing) {
  plan_.add_box({0, 0, 3, 0, 30000}, {{30, 1000}, {11, 0}, {target_, 1, {0, 1000}, {1000, 1}}});
  plan_.finish();
  EXPECT_TRUE(plan_.chunks().empty());
  EXPECT_EQ(plan_.bytes_needed(), 0u);
}

TEST_F(LoadPlanTest, nothing_wanted_is_an_empty_plan) {
  plan_.add_contiguous({0, 0, 0, 0, 0}, target_);
  plan_.finish();
  EXPECT_TRUE(plan_.chunks().empty());
  EXPECT_EQ(plan_.request_bytes_max(), 0u);
}

TEST_F(LoadPlanTest, a_scrub_reads_every_chunk_of_every_table) {
  plan_.add_all_chunks();
  plan_.finish();
  EXPECT_EQ(plan_.chunks().size(), 9u);
  EXPECT_TRUE(plan_.targets().empty());
  EXPECT_EQ(plan_.bytes_read(), 9 * 3 * kPageBytes);
  EXPECT_EQ(plan_.raw_bytes_max(), 10000u);
}

TEST_F(LoadPlanTest, shards_that_do_not_fit_their_chunks_are_corrupt) {
  const std::vector<StoredShard> bad = {
      {0, 7, 1, 0, 1},                  // no such chunk
      {0, 5, 2, 0, 1},                  // the second does not exist
      {0, 1, ~std::uint64_t{0}, 0, 1},  // a count that overflows
      {0, ~std::uint64_t{0}, 2, 0, 1},  // a first chunk that overflows
      {0, 0, 1, 0, 10001},              // longer than its chunk
      {0, 0, 1, 9999, 2},               // reaches past the end of its chunk
      {0, 0, 1, 10000, 1},              // begins at the end
      {0, 0, 1, ~std::uint64_t{0}, 1},  // begins far away
      {0, 0, 6, 0, ~std::uint64_t{0}},  // longer than anything
      {0, 0, 0, 0, 1},                  // bytes without a chunk
  };
  for (std::size_t i = 0; i < bad.size(); ++i) {
    LoadPlan plan = plan_;
    try {
      plan.add_contiguous(bad[i], target_);
      ADD_FAILURE() << "shard " << i << " was accepted";
    } catch (const CorruptError& error) {
      EXPECT_EQ(error.path(), "rank-00000.index");
    }
  }
  EXPECT_THROW(plan_.add_contiguous({2, 0, 1, 0, 1}, target_), std::out_of_range) << "no such table";
}

// Part of such a box would stay as it was, silently, or take the bytes of other elements.
TEST_F(LoadPlanTest, boxes_that_do_not_fit_their_shard_are_corrupt) {
  const StoredShard shard{0, 0, 3, 0, 30000};
  const StridedView whole{target_, 1, {30, 1000}, {1000, 1}};
  const std::vector<BoxTarget> bad = {
      {{30, 1001}, {0, 0}, whole},                                // another shape
      {{30, 1000}, {1, 0}, whole},                                // one row too far
      {{30, 1000}, {-1, 0}, whole},                               // one row too early
      {{30, 1000}, {0, 0}, {target_, 2, {30, 1000}, {2000, 2}}},  // another item size
      {{30, 1000}, {0, 0}, {target_, 1, {30, 1001}, {1001, 1}}},  // wider
      {{30, 1000}, {0, 0}, {target_, 1, {-1, 1000}, {1000, 1}}},  // nonsense
      {{-30, -1000}, {0, 0}, whole},                              // nonsense
      {{1ll << 62, 1ll << 62}, {0, 0}, whole},                    // a size that overflows
      {{30, 1000}, {1ll << 62, 1ll << 62}, whole},                // an offset that overflows
      {{30, 1000}, {0}, whole},                                   // ranks differ
      {{30, 1000}, {0, 0}, {target_, 1, {30}, {1000}}},           // ranks differ
  };
  for (std::size_t i = 0; i < bad.size(); ++i) {
    LoadPlan plan = plan_;
    EXPECT_THROW(plan.add_box(shard, bad[i]), CorruptError) << "box " << i;
  }
  EXPECT_THROW(plan_.add_box(shard, {{30, 1000}, {0, 0}, {target_, 1, {30, 1000}, {1000}}}), std::invalid_argument);
  EXPECT_NO_THROW(plan_.add_box(shard, {{30, 1000}, {0, 0}, whole}));
}

}  // namespace
}  // namespace snapstone::pipeline
