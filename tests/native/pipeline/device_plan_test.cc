#include "pipeline/device_plan.h"

#include <gtest/gtest.h>

#include <stdexcept>

#include "base/limits.h"

namespace snapstone::pipeline {
namespace {

constexpr std::uint64_t kChunkBytes = 64ull << 10;

struct State {
  std::vector<std::uint64_t> nbytes;
  std::vector<std::int32_t> devices;

  format::Layout layout() const { return format::make_layout(nbytes, kChunkBytes); }
  SaveSources sources() const {
    SaveSources sources;
    for (std::size_t i = 0; i < nbytes.size(); ++i) {
      sources.contiguous.push_back(reinterpret_cast<const std::uint8_t*>((i + 1) << 32));
    }
    sources.devices = devices;
    return sources;
  }
  DevicePlan plan() const { return make_device_plan(layout(), sources()); }
};

TEST(DevicePlan, a_state_of_the_host_has_none) {
  EXPECT_TRUE((State{{100, kChunkBytes}, {}}).plan().empty());
  EXPECT_TRUE((State{{100, kChunkBytes}, {kOnHost, kOnHost}}).plan().empty());
}

TEST(DevicePlan, chunks_of_a_large_tensor_are_whole) {
  const State state{{3 * kChunkBytes + 1, kChunkBytes}, {1, kOnHost}};
  const DevicePlan plan = state.plan();
  ASSERT_EQ(plan.chunks.size(), 4u);
  EXPECT_EQ(plan.devices, (std::vector<std::int32_t>{1}));
  for (std::uint32_t i = 0; i < 4; ++i) {
    EXPECT_EQ(plan.chunks[i].chunk, i);
    EXPECT_EQ(plan.chunks[i].device, 1);
    EXPECT_FALSE(plan.chunks[i].packed);
    EXPECT_FALSE(plan.chunks[i].shared);
    EXPECT_EQ(plan.chunks[i].host_bytes, 0u);
    EXPECT_EQ(plan.position[i], i);
  }
  EXPECT_EQ(plan.position[4], DevicePlan::kHostChunk);
}

TEST(DevicePlan, packed_chunks_say_what_they_mix) {
  const DevicePlan one = State{{100, 200}, {0, 0}}.plan();
  ASSERT_EQ(one.chunks.size(), 1u);
  EXPECT_TRUE(one.chunks[0].packed);
  EXPECT_FALSE(one.chunks[0].shared);
  EXPECT_EQ(one.chunks[0].host_bytes, 0u);
  const DevicePlan mixed = State{{100, 200, 7}, {kOnHost, 1, kOnHost}}.plan();
  EXPECT_EQ(mixed.chunks[0].device, 1);
  EXPECT_EQ(mixed.chunks[0].host_bytes, 107u);
  const DevicePlan shared = State{{100, 200, 300}, {1, 0, 1}}.plan();
  EXPECT_TRUE(shared.chunks[0].shared);
  EXPECT_EQ(shared.chunks[0].device, 1);
  EXPECT_EQ(shared.devices, (std::vector<std::int32_t>{0, 1}));
  EXPECT_FALSE((State{{100}, {0}}).plan().chunks[0].packed) << "one small tensor alone";
}

TEST(DevicePlan, gaps_are_what_no_piece_covers) {
  const format::Layout layout = format::make_layout(std::vector<std::uint64_t>{100, 64, 1, 5}, kChunkBytes);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> gaps;
  for_each_gap(pieces_of(layout, 0), [&](std::uint64_t at, std::uint64_t nbytes) { gaps.emplace_back(at, nbytes); });
  EXPECT_EQ(gaps, (std::vector<std::pair<std::uint64_t, std::uint64_t>>{{100, 28}, {193, 63}}));
  for (const auto& gap : gaps) EXPECT_LT(gap.second, kPackAlignBytes);
}

TEST(DevicePlan, sources_that_do_not_fit_are_refused) {
  State state{{100, 200}, {0}};
  EXPECT_THROW(state.plan(), std::invalid_argument);
  SaveSources strided = State{{100, 200}, {kOnHost, 0}}.sources();
  strided.contiguous[1] = nullptr;
  EXPECT_THROW(make_device_plan(state.layout(), strided), std::invalid_argument);
  const State empty{{0, 200}, {0, kOnHost}};
  EXPECT_TRUE(empty.plan().empty()) << "an empty tensor has no chunk";
}

}  // namespace
}  // namespace snapstone::pipeline
