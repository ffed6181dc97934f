#include "pipeline/load_job.h"

#include <atomic>
#include <cerrno>
#include <set>
#include <stdexcept>
#include <thread>

#include "base/fault_hook.h"
#include "pipeline/pipeline_fixture.h"
#include "pipeline/random_box.h"

namespace snapstone::pipeline {
namespace {

using namespace std::chrono_literals;
using testing::ArmedFaults;
using testing::errno_of;

class LoadJobTest : public PipelineTest {};
class LoadJobOnRung : public PipelineOnRung {};
INSTANTIATE_TEST_SUITE_P(Rungs, LoadJobOnRung, all_rungs(), rung_test_name);

TEST_P(LoadJobOnRung, random_boxes_get_what_a_naive_copy_gives) {
  for (int round = 0; round < 12; ++round) {
    std::vector<RandomBox> boxes;
    Sizes sizes;
    for (int i = 0; i < 6; ++i) {
      boxes.emplace_back(random_, i % 2 == 0 ? 20000 : 5 * static_cast<std::int64_t>(kTestChunkBytes));
      sizes.push_back(boxes.back().shard_nbytes());
    }
    const Tensors tensors = Tensors::random(random_, sizes);
    const Saved saved = save(tensors, std::to_string(round), {.rung = GetParam(), .compress = round % 2 == 1});
    LoadPlan plan = plan_of(saved);
    std::vector<Bytes> targets;
    for (const RandomBox& box : boxes) targets.emplace_back(box.memory_nbytes, 0xAA);
    std::vector<Bytes> expected = targets;
    for (std::size_t i = 0; i < boxes.size(); ++i) {
      const RandomBox& box = boxes[i];
      box.for_each_element([&](std::int64_t string, std::int64_t memory) {
        std::copy_n(tensors.bytes[i].begin() + string, box.item_bytes, expected[i].begin() + memory);
      });
      plan.add_box(shard_of(saved, i, sizes[i]),
                   {box.shard_sizes, box.offsets, {targets[i].data(), box.item_bytes, box.sizes, box.strides}});
    }
    const auto job = load_job(std::move(plan), saved.name, {.rung = GetParam()});
    run(job);
    EXPECT_TRUE(targets == expected) << "round " << round;
    EXPECT_EQ(job->bytes_done(), job->plan().bytes_needed());
  }
}

TEST_P(LoadJobOnRung, a_wrong_byte_is_named_and_never_loaded) {
  const Tensors tensors = some_tensors();
  for (const bool compress : {false, true}) {
    const std::string name = compress ? "zstd" : "raw";
    const Saved saved = save(tensors, name, {.rung = GetParam(), .compress = compress});
    const std::uint64_t bad = random_() % saved.table.size();
    flip(name, saved.table[bad].offset + random_() % saved.table[bad].stored_bytes);
    std::vector<Bytes> loaded;
    const auto job = load_all_job(saved, loaded, tensors, {.rung = GetParam()});
    try {
      run(job);
      FAIL() << "loaded a wrong byte";
    } catch (const CorruptError& error) {
      EXPECT_EQ(error.path(), directory_ / name);
      EXPECT_EQ(error.chunk(), static_cast<std::int64_t>(bad));
      EXPECT_FALSE(error.reason().empty());
    }
    const format::ChunkPlan& chunk = saved.layout->chunks[bad];
    for (std::uint32_t i = chunk.first_piece; i < chunk.first_piece + chunk.piece_count; ++i) {
      const format::Piece& piece = saved.layout->pieces[i];
      EXPECT_TRUE(std::all_of(&loaded[piece.tensor][piece.begin], loaded[piece.tensor].data() + piece.end,
                              [](std::uint8_t byte) { return byte == 0; }))
          << "a byte of the bad chunk reached its target";
    }
  }
}

TEST_P(LoadJobOnRung, a_file_that_ends_early_is_corrupt) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a", {.rung = GetParam()});
  std::filesystem::resize_file(directory_ / "a", saved.table.back().offset);
  std::vector<Bytes> loaded;
  try {
    run(load_all_job(saved, loaded, tensors, {.rung = GetParam()}));
    FAIL() << "loaded what is not there";
  } catch (const CorruptError& error) {
    EXPECT_EQ(error.chunk(), static_cast<std::int64_t>(saved.table.size() - 1));
  }
}

TEST_P(LoadJobOnRung, a_failing_read_ends_the_job_and_frees_all_slots) {
  const Tensors tensors = some_tensors(100 * kTestChunkBytes);
  const Saved saved = save(tensors, "a", {.rung = GetParam()});
  std::vector<Bytes> loaded;
  for (const char* const nth : {":1:", ":1+:", ":50:"}) {
    const auto job = load_all_job(saved, loaded, tensors, {.rung = GetParam()});
    const ArmedFaults faults(read_seam(GetParam()) + nth + "errno=EIO");
    EXPECT_EQ(errno_of([&] { run(job); }), EIO) << nth;
    EXPECT_EQ(ring_->free_count(), ring_->slot_count());
  }
  run(load_all_job(saved, loaded, tensors, {.rung = GetParam()}));
  EXPECT_EQ(loaded, tensors.bytes);
}

TEST_P(LoadJobOnRung, cancelling_at_any_moment_ends_the_job) {
  const Tensors tensors = some_tensors(60 * kTestChunkBytes);
  const Saved saved = save(tensors, "a", {.rung = GetParam(), .compress = true});
  int cancelled = 0;
  for (int round = 0; round < 24; ++round) {
    std::vector<Bytes> loaded;
    const auto job = load_all_job(saved, loaded, tensors, {.rung = GetParam()});
    start(job);
    std::this_thread::sleep_for(std::chrono::microseconds(random_() % 3000));
    job->cancel();
    try {
      finish(*job);
      EXPECT_TRUE(loaded == tensors.bytes) << "a success lacks bytes";
    } catch (const CancelledError&) {
      ++cancelled;
    }
    EXPECT_EQ(ring_->free_count(), ring_->slot_count()) << "round " << round;
  }
  EXPECT_GT(cancelled, 0);
}

TEST_P(LoadJobOnRung, a_scrub_finds_everything_that_is_wrong) {
  const Tensors tensors = some_tensors(40 * kTestChunkBytes + 99);
  const Saved saved = save(tensors, "a", {.rung = GetParam()});
  const auto padded = std::find_if(saved.table.begin(), saved.table.end(),
                                   [](const format::ChunkRecord& record) { return record.stored_bytes % kPageBytes; });
  ASSERT_NE(padded, saved.table.end());
  flip("a", padded->offset + padded->stored_bytes);
  std::set<std::uint64_t> bad = {static_cast<std::uint64_t>(padded - saved.table.begin())};
  while (bad.size() < 10) {
    const std::uint64_t chunk = random_() % saved.table.size();
    if (bad.insert(chunk).second) flip("a", saved.table[chunk].offset + random_() % saved.table[chunk].raw_bytes);
  }
  const auto job = scrub_job(saved, GetParam());
  run(job);
  std::set<std::uint64_t> found;
  for (const Problem& problem : job->problems()) {
    found.insert(problem.chunk);
    EXPECT_EQ(problem.table, 0u);
    EXPECT_EQ(problem.path, job->problems().front().path);
    EXPECT_FALSE(problem.path.empty());
    EXPECT_TRUE(problem.reason == "digest mismatch" || problem.reason == "padding after the chunk is not zero");
    EXPECT_EQ(problem.expected.empty(), problem.reason != "digest mismatch");
  }
  EXPECT_EQ(found, bad);
  EXPECT_EQ(job->bytes_done(), job->plan().bytes_read());
  EXPECT_EQ(job->bytes_done(), file_bytes("a").size());
}

TEST_F(LoadJobTest, a_scrub_reports_a_file_that_ends_early_and_goes_on) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  flip("a", 0);
  std::filesystem::resize_file(directory_ / "a", saved.table[saved.table.size() - 2].offset);
  const auto job = scrub_job(saved);
  run(job);
  EXPECT_EQ(job->problems().size(), 3u);
}

TEST_F(LoadJobTest, problems_are_bounded) {
  Saved saved = save(some_tensors(), "a");
  saved.table[0].digest[0] ^= 1;
  saved.table.assign(LoadJob::kProblemsMax + 500, saved.table[0]);
  const auto job = scrub_job(saved);
  run(job);
  EXPECT_EQ(job->problems().size(), LoadJob::kProblemsMax);
  EXPECT_EQ(job->bytes_done(), job->plan().bytes_read());
}

TEST_F(LoadJobTest, verification_can_be_turned_off) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  flip("a", saved.table[0].offset);
  std::vector<Bytes> loaded;
  run(load_all_job(saved, loaded, tensors, {.verify = false}));
  EXPECT_NE(loaded, tensors.bytes);
  loaded[0][0] ^= 0x10;
  EXPECT_EQ(loaded, tensors.bytes);
}

TEST_F(LoadJobTest, a_frame_that_does_not_decode_is_named) {
  const Tensors tensors = some_tensors();
  Saved saved = save(tensors, "a", {.compress = true});
  const auto coded = std::find_if(saved.table.begin(), saved.table.end(),
                                  [](const format::ChunkRecord& record) { return record.codec != 0; });
  ASSERT_NE(coded, saved.table.end());
  flip("a", coded->offset);  // the magic number of the frame
  std::vector<Bytes> loaded;
  try {
    run(load_all_job(saved, loaded, tensors, {.verify = false}));
    FAIL() << "decoded garbage";
  } catch (const CorruptError& error) {
    EXPECT_EQ(error.path(), directory_ / "a");
    EXPECT_EQ(error.chunk(), coded - saved.table.begin());
  }
}

TEST_F(LoadJobTest, tied_tensors_share_one_read) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  LoadPlan plan = plan_of(saved);
  std::vector<Bytes> targets(5, Bytes(tensors.bytes[3].size()));
  for (Bytes& target : targets) plan.add_contiguous(shard_of(saved, 3, target.size()), target.data());
  const auto job = load_job(std::move(plan), "a");
  run(job);
  for (const Bytes& target : targets) EXPECT_EQ(target, tensors.bytes[3]);
  EXPECT_EQ(job->bytes_done(), 5 * tensors.bytes[3].size());
  EXPECT_EQ(job->totals().count[static_cast<std::size_t>(Stage::kRead)], saved.layout->places[3].chunk_count);
}

TEST_F(LoadJobTest, nothing_to_read_is_a_success) {
  const Saved saved = save(some_tensors(), "a");
  const auto job = load_job(plan_of(saved), "a");
  run(job);
  EXPECT_EQ(job->bytes_done(), 0u);
}

TEST_F(LoadJobTest, a_plan_that_files_or_slots_do_not_fit_is_refused) {
  Saved saved = save(some_tensors(), "a");
  ring_ = std::make_shared<mem::SlotRing>(kPageBytes);
  EXPECT_THROW(scrub_job(saved), std::invalid_argument);
  ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
  saved.table[1].file = 1;
  EXPECT_THROW(scrub_job(saved), std::invalid_argument);
}

TEST_F(LoadJobTest, a_ring_without_slots_is_an_error_and_no_hang) {
  const Saved saved = save(some_tensors(), "a");
  ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
  EXPECT_EQ(errno_of([&] { run(scrub_job(saved)); }), ENOMEM);
}

TEST_F(LoadJobTest, a_job_that_waits_for_slots_gets_them_when_they_come_back) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  std::vector<mem::Slot> held;
  for (mem::Slot slot = ring_->try_acquire(); slot; slot = ring_->try_acquire()) held.push_back(std::move(slot));
  std::vector<Bytes> loaded;
  const auto job = load_all_job(saved, loaded, tensors);
  start(job);
  EXPECT_FALSE(job->wait(50ms));
  held.resize(1);  // one slot stays away
  finish(*job);
  EXPECT_EQ(loaded, tensors.bytes);
}

}  // namespace
}  // namespace snapstone::pipeline
