#include "pipeline/save_job.h"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "base/fault_hook.h"
#include "pipeline/pipeline_fixture.h"

namespace snapstone::pipeline {
namespace {

using namespace std::chrono_literals;
using testing::ArmedFaults;
using testing::errno_of;

class SaveJobOnRung : public PipelineOnRung {};
INSTANTIATE_TEST_SUITE_P(Rungs, SaveJobOnRung, all_rungs(), rung_test_name);

class SaveJobTest : public PipelineTest {
 protected:
  std::shared_ptr<mem::SlotRing> ring_of(std::uint64_t slots) {
    auto ring = std::make_shared<mem::SlotRing>(kTestChunkBytes);
    ring->reserve(slots);
    return ring;
  }
};

TEST_P(SaveJobOnRung, what_was_saved_is_in_the_file_and_loads) {
  const Tensors tensors = some_tensors();
  for (const bool compress : {false, true}) {
    const Saved saved = save(tensors, compress ? "zstd" : "raw", {.rung = GetParam(), .compress = compress});
    if (!compress) expect_file_holds(saved, tensors);
    std::vector<Bytes> loaded;
    run(load_all_job(saved, loaded, tensors, {.rung = GetParam()}));
    EXPECT_EQ(loaded, tensors.bytes);
    const auto scrub = scrub_job(saved, GetParam());
    run(scrub);
    EXPECT_TRUE(scrub->problems().empty());
  }
}

TEST_P(SaveJobOnRung, all_rungs_give_identical_files) {
  const Tensors tensors = some_tensors();
  for (const bool compress : {false, true}) {
    const std::string suffix = compress ? "zstd" : "raw";
    save(tensors, "a" + suffix, {.rung = io::Rung::kBuffered, .compress = compress});
    save(tensors, "b" + suffix, {.rung = GetParam(), .compress = compress});
    EXPECT_EQ(file_bytes("a" + suffix), file_bytes("b" + suffix));
  }
}

TEST_P(SaveJobOnRung, few_slots_are_enough_for_a_large_state) {
  const Tensors tensors = some_tensors(80 * kTestChunkBytes + 5);
  for (const std::uint64_t slots : {1, 2, 3}) {
    ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
    ring_->reserve(slots);
    for (const bool compress : {false, true}) {
      const std::string name = std::to_string(slots) + (compress ? "zstd" : "raw");
      const Saved saved = save(tensors, name, {.rung = GetParam(), .compress = compress});
      std::vector<Bytes> loaded;
      run(load_all_job(saved, loaded, tensors, {.rung = GetParam()}));
      EXPECT_TRUE(loaded == tensors.bytes) << name;
      EXPECT_EQ(ring_->free_count(), slots) << name;
    }
  }
}

TEST_P(SaveJobOnRung, a_failing_write_ends_the_job_and_frees_all_slots) {
  const Tensors tensors = some_tensors(100 * kTestChunkBytes);
  int number = 0;
  for (const char* const nth : {":1:", ":1+:", ":40:", ":90+:"}) {
    for (const bool compress : {false, true}) {
      const auto job = save_job(tensors, std::to_string(number++), {.rung = GetParam(), .compress = compress});
      {
        const ArmedFaults faults(write_seam(GetParam()) + nth + "errno=EIO");
        EXPECT_EQ(errno_of([&] { run(job); }), EIO) << nth;
        EXPECT_EQ(fault::seen("fsync"), 0u) << "a file that lacks bytes is not synced";
      }
      EXPECT_TRUE(job->finished());
      EXPECT_EQ(ring_->free_count(), ring_->slot_count());
    }
  }
  expect_file_holds(save(tensors, "after", {.rung = GetParam()}), tensors);  // the lanes are as good as before
}

TEST_P(SaveJobOnRung, a_full_disk_is_enospc_with_path_and_place) {
  const Tensors tensors = some_tensors();
  const ArmedFaults faults(write_seam(GetParam()) + ":5+:errno=ENOSPC");
  try {
    run(save_job(tensors, "rank-00000.data", {.rung = GetParam()}));
    FAIL() << "saved to a full disk";
  } catch (const OsError& error) {
    EXPECT_EQ(error.error_number(), ENOSPC);
    EXPECT_EQ(error.path(), directory_ / "rank-00000.data");
    EXPECT_EQ(error.offset() % kPageBytes, 0u);
    EXPECT_GT(error.nbytes(), 0u);
  }
}

TEST_P(SaveJobOnRung, cancelling_at_any_moment_ends_the_job) {
  const Tensors tensors = some_tensors(60 * kTestChunkBytes);
  int cancelled = 0;
  for (int round = 0; round < 24; ++round) {
    const auto job = save_job(tensors, std::to_string(round), {.rung = GetParam(), .compress = round % 2 == 1});
    start(job);
    std::this_thread::sleep_for(std::chrono::microseconds(random_() % 6000));
    job->cancel();
    try {
      finish(*job);
      EXPECT_TRUE(job->staged());
    } catch (const CancelledError&) {
      ++cancelled;
    }
    EXPECT_EQ(ring_->free_count(), ring_->slot_count()) << "round " << round;
    job->cancel();
  }
  EXPECT_GT(cancelled, 0);
}

TEST_P(SaveJobOnRung, sync_truncate_and_close_errors_end_the_job) {
  const Tensors tensors = some_tensors();
  int number = 0;
  for (const std::string rules : {"fsync:1:errno=EIO", "ftruncate:1:errno=EIO", "close:1:errno=EIO"}) {
    if (rules.starts_with("ftruncate") && !io::rung_is_direct(GetParam())) continue;  // nothing was preallocated
    const auto job = save_job(tensors, std::to_string(number++), {.rung = GetParam(), .compress = true});
    const ArmedFaults faults(rules);
    EXPECT_EQ(errno_of([&] { run(job); }), EIO) << rules;
    EXPECT_LE(fault::seen("fsync"), 1u) << "a failed fsync is never repeated";
  }
}

TEST_P(SaveJobOnRung, a_disk_without_room_is_found_before_anything_is_staged) {
  if (!io::rung_is_direct(GetParam())) GTEST_SKIP() << "only direct files are preallocated";
  const Tensors tensors = some_tensors();
  const ArmedFaults faults("fallocate:1:errno=ENOSPC");
  EXPECT_EQ(errno_of([&] { save_job(tensors, "a", {.rung = GetParam()}); }), ENOSPC);
}

TEST_P(SaveJobOnRung, a_file_system_without_fallocate_gives_the_same_file) {
  const Tensors tensors = some_tensors();
  save(tensors, "a", {.rung = GetParam()});
  save(tensors, "c", {.rung = GetParam(), .compress = true});
  const ArmedFaults faults("fallocate:1+:errno=EOPNOTSUPP");
  save(tensors, "b", {.rung = GetParam()});
  save(tensors, "d", {.rung = GetParam(), .compress = true});
  EXPECT_EQ(file_bytes("a"), file_bytes("b"));
  EXPECT_EQ(file_bytes("c"), file_bytes("d"));
}

TEST_F(SaveJobTest, the_file_does_not_depend_on_ring_or_lanes) {
  const Tensors tensors = some_tensors(40 * kTestChunkBytes);
  save(tensors, "a", {.compress = true});
  for (const std::uint64_t slots : {1, 2, 200}) {
    ring_ = ring_of(slots);
    save(tensors, std::to_string(slots), {.compress = true});
    EXPECT_EQ(file_bytes("a"), file_bytes(std::to_string(slots))) << slots << " slots";
  }
}

TEST_F(SaveJobTest, compression_makes_the_file_smaller) {
  Tensors tensors;
  tensors.bytes.emplace_back(20 * kTestChunkBytes, std::uint8_t{1});
  const Saved saved = save(tensors, "a", {.compress = true});
  EXPECT_EQ(file_bytes("a").size(), 20 * kPageBytes);
  for (const format::ChunkRecord& record : saved.table) EXPECT_NE(record.codec, 0);
}

TEST_F(SaveJobTest, nothing_to_save_is_an_empty_file) {
  for (const Sizes& sizes : {Sizes{}, Sizes{0, 0}}) {
    for (const bool compress : {false, true}) {
      const std::string name = std::to_string(sizes.size()) + (compress ? "zstd" : "raw");
      const auto job = save_job(Tensors::random(random_, sizes), name, {.compress = compress});
      EXPECT_TRUE(job->staged());
      run(job);
      EXPECT_TRUE(file_bytes(name).empty());
      EXPECT_EQ(job->file_bytes(), 0u);
      EXPECT_TRUE(job->chunk_table().empty());
    }
  }
}

// Expanded, transposed, reversed and sliced memory is stored as the row-major string of its elements.
TEST_F(SaveJobTest, strided_sources_are_stored_row_major) {
  const Bytes memory = random_bytes(random_, 4 * 300 * 400);
  auto* data = const_cast<std::uint8_t*>(memory.data());
  const std::vector<StridedView> views = {
      {data, 4, {400, 300}, {4, 1600}},               // transposed
      {data + 4 * 399, 4, {300, 400}, {1600, -4}},    // reversed
      {data, 4, {5, 300, 20}, {0, 1600, 80}},         // expanded and sliced
      {data + 16, 2, {10, 11}, {700, 6}},             // small: packed
      {data, 1, {kTestChunkBytes + 100, 2}, {1, 3}},  // overlapping
  };
  Tensors expected;
  SaveSources sources;
  for (const StridedView& view : views) {
    Bytes& bytes = expected.bytes.emplace_back(view.nbytes());
    gather(view, 0, view.nbytes(), bytes.data());
    sources.strided[static_cast<std::uint32_t>(sources.contiguous.size())] = view.collapsed();
    sources.contiguous.push_back(nullptr);
  }
  expected.bytes.push_back(memory);
  sources.contiguous.push_back(memory.data());
  os::File file = os::create_file(directory_.fd(), directory_.path(), "a", false);
  const auto job =
      std::make_shared<SaveJob>(expected.layout(), std::move(sources), std::move(file), ring_, SaveOptions{});
  run(job);
  expect_file_holds({"a", expected.layout(), job->chunk_table()}, expected);
}

TEST_F(SaveJobTest, a_source_without_memory_ends_the_job) {
  const Tensors tensors = some_tensors();
  SaveSources sources = tensors.sources();
  sources.contiguous[3] = nullptr;
  os::File file = os::create_file(directory_.fd(), directory_.path(), "a", false);
  const auto job =
      std::make_shared<SaveJob>(tensors.layout(), std::move(sources), std::move(file), ring_, SaveOptions{});
  EXPECT_THROW(run(job), std::out_of_range);
}

// The value at the snapshot instant is stored, whatever the trainer does once everything is staged.
TEST_F(SaveJobTest, sources_may_change_once_staged) {
  ring_ = ring_of(64);
  Tensors tensors = some_tensors();
  const Tensors before = tensors;
  for (const bool compress : {false, true}) {
    const std::string name = compress ? "zstd" : "raw";
    const ArmedFaults faults("pwrite:1:delay=200");
    const auto job = save_job(tensors, name, {.compress = compress});
    start(job);
    ASSERT_TRUE(job->wait_staged(kPatience));
    EXPECT_TRUE(job->staged());
    for (Bytes& tensor : tensors.bytes) std::fill(tensor.begin(), tensor.end(), 0xEE);
    finish(*job);
    std::vector<Bytes> loaded;
    run(load_all_job({name, tensors.layout(), job->chunk_table()}, loaded, tensors));
    EXPECT_EQ(loaded, before.bytes);
    tensors = before;
  }
}

TEST_F(SaveJobTest, waiting_for_staging_ends_with_a_failed_job) {
  ring_ = ring_of(2);
  const Tensors tensors = some_tensors(50 * kTestChunkBytes);
  const ArmedFaults faults("pwrite:3+:errno=EIO");
  const auto job = save_job(tensors, "a");
  EXPECT_FALSE(job->wait_staged(1ms));
  start(job);
  EXPECT_TRUE(job->wait_staged(kPatience));
  EXPECT_FALSE(job->staged());
  EXPECT_TRUE(job->finished());
  EXPECT_EQ(errno_of([&] { job->rethrow(); }), EIO);
}

TEST_F(SaveJobTest, progress_ends_at_the_bytes_of_the_tensors) {
  const Tensors tensors = some_tensors();
  for (const bool compress : {false, true}) {
    const auto job = save_job(tensors, compress ? "zstd" : "raw", {.compress = compress});
    EXPECT_EQ(job->bytes_done(), 0u);
    run(job);
    EXPECT_EQ(job->bytes_done(), tensors.layout()->payload_bytes);
  }
}

TEST_F(SaveJobTest, books_tell_what_each_stage_did) {
  const Tensors tensors = some_tensors();
  const auto job = save_job(tensors, "a", {.compress = true, .trace = true});
  run(job);
  const StageTotals totals = job->totals();
  const std::size_t chunks = tensors.layout()->chunks.size();
  const auto count = [&](Stage stage) { return totals.count[static_cast<std::size_t>(stage)]; };
  EXPECT_EQ(count(Stage::kStage), chunks);
  EXPECT_EQ(count(Stage::kEncode), chunks);
  EXPECT_EQ(count(Stage::kWrite), chunks);
  EXPECT_EQ(count(Stage::kSync), 1u);
  EXPECT_EQ(count(Stage::kRead), 0u);
  std::size_t events = 0;
  for (const std::uint64_t stage_count : totals.count) events += stage_count;
  EXPECT_EQ(job->events().size(), events);
  for (const TraceEvent& event : job->events()) EXPECT_LE(event.begin_ns, event.end_ns);
}

TEST_F(SaveJobTest, a_cancel_after_the_end_changes_nothing) {
  const Tensors tensors = some_tensors();
  const auto job = save_job(tensors, "a");
  run(job);
  job->cancel();
  EXPECT_NO_THROW(job->rethrow());
  expect_file_holds({"a", tensors.layout(), job->chunk_table()}, tensors);
}

TEST_F(SaveJobTest, a_cancel_before_the_start_ends_the_job_at_once) {
  const auto job = save_job(some_tensors(), "a");
  job->cancel();
  EXPECT_THROW(run(job), CancelledError);
  EXPECT_EQ(job->bytes_done(), 0u);
}

TEST_F(SaveJobTest, a_job_that_waits_for_slots_can_be_cancelled) {
  ring_ = ring_of(1);
  mem::Slot held = ring_->try_acquire();
  const auto job = save_job(some_tensors(), "a");
  start(job);
  EXPECT_FALSE(job->wait(50ms));
  job->cancel();
  EXPECT_THROW(finish(*job), CancelledError);
  held = {};
}

TEST_F(SaveJobTest, a_ring_without_slots_is_an_error_and_no_hang) {
  ring_ = ring_of(1);
  mem::Slot lost = ring_->try_acquire();
  lost.forfeit();
  EXPECT_EQ(errno_of([&] { run(save_job(some_tensors(), "a")); }), ENOMEM);
}

TEST_F(SaveJobTest, slots_smaller_than_a_chunk_are_refused) {
  ring_ = std::make_shared<mem::SlotRing>(kPageBytes);
  EXPECT_THROW(save_job(some_tensors(), "a"), std::invalid_argument);
}

// Saves and loads of several threads at once, raw and compressed, on every rung there is, with fewer slots than lanes
// and jobs would like: nobody starves, nobody gets another's bytes.
TEST_F(SaveJobTest, many_jobs_at_once_share_few_slots) {
  constexpr int kThreads = 4;
  constexpr int kRounds = 4;
  ring_ = ring_of(3);
  std::vector<io::Rung> rungs;
  for (int i = 0; i < 4; ++i) {
    if (rung_works(static_cast<io::Rung>(i))) rungs.push_back(static_cast<io::Rung>(i));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int number = 0; number < kThreads; ++number) {
    const std::uint64_t thread_seed = random_();
    threads.emplace_back([&, number, thread_seed] {
      std::mt19937_64 random(thread_seed);
      for (int round = 0; round < kRounds; ++round) {
        const io::Rung rung = rungs[random() % rungs.size()];
        const std::string name = std::to_string(number) + "-" + std::to_string(round);
        const Tensors tensors =
            Tensors::random(random, {100, 5 * kTestChunkBytes, 9, random() % (8 * kTestChunkBytes)});
        const Saved saved = save(tensors, name, {.rung = rung, .compress = random() % 2 == 0});
        std::vector<Bytes> loaded;
        run(load_all_job(saved, loaded, tensors, {.rung = rung}));
        wrong += loaded == tensors.bytes ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace snapstone::pipeline
