// Every allocation of a save, a load and a scrub fails once, and from some point on for good: the job ends in
// std::bad_alloc or ENOMEM, or well. No thread dies of it, every slot and descriptor comes back, and the next save
// works.
#include <dirent.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <functional>
#include <new>

#include "failing_allocations.h"
#include "pipeline/save_chain_fixture.h"

namespace snapstone::pipeline {
namespace {

constexpr std::uint64_t kAllocationsMax = 5000;
constexpr std::uint64_t kSlots = 4;
constexpr std::uint64_t kLastingStride = 5;

// Rings do not count: a lane that has had work keeps one, and its threads.
std::size_t open_files() {
  std::size_t count = 0;
  DIR* const listing = ::opendir("/proc/self/fd");
  while (const dirent* entry = ::readdir(listing)) {
    char target[64] = {};
    const std::string path = std::string("/proc/self/fd/") + entry->d_name;
    const bool is_ring =
        ::readlink(path.c_str(), target, sizeof target - 1) > 0 && std::string(target) == "anon_inode:[io_uring]";
    count += is_ring ? 0 : 1;
  }
  ::closedir(listing);
  return count;
}

enum class Ended { kWell, kRefused, kNotReached };

// What `operation` makes of the failure.
Ended attempt(std::uint64_t nth, bool lasting, const std::function<void()>& operation) {
  bool refused = false;
  {
    const FailingAllocation failing(nth, lasting);
    try {
      operation();
    } catch (const std::bad_alloc&) {
      refused = true;
    } catch (const OsError& error) {
      FailingAllocation::stop();
      EXPECT_EQ(error.error_number(), ENOMEM) << error.what();
      refused = true;
    }
  }
  if (!FailingAllocation::reached()) return Ended::kNotReached;
  return refused ? Ended::kRefused : Ended::kWell;
}

template <class Fixture>
class AllocationSweep : public Fixture {
 protected:
  using Fixture::directory_;
  using Fixture::ring_;

  // A ring of its own for each run, so that lanes make engines of their own, too.
  void use_new_ring() {
    ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
    ring_->reserve(kSlots);
  }

  // Jobs that lanes still hold when the caller has given up end soon after; their slots and files come back then.
  void expect_nothing_left(std::size_t files) {
    for (int i = 0; i < 2000 && (ring_->free_count() != kSlots || open_files() != files); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ASSERT_EQ(ring_->free_count(), kSlots);
    ASSERT_EQ(open_files(), files);
  }

  // `run(name)` with each allocation failing, `check(name)` after each that ended well.
  void sweep(const std::function<void(const std::string&)>& run, const std::function<void(const std::string&)>& check) {
    run("warm");
    const std::size_t files = open_files();
    std::uint64_t refused = 0;
    for (const bool lasting : {false, true}) {
      std::uint64_t nth = 1;
      for (; nth < kAllocationsMax; nth += lasting ? kLastingStride : 1) {
        SCOPED_TRACE("allocation " + std::to_string(nth) + (lasting ? " and later" : ""));
        use_new_ring();
        const std::string name = std::to_string(nth) + (lasting ? "+" : "");
        const Ended ended = attempt(nth, lasting, [&] { run(name); });
        refused += ended == Ended::kRefused ? 1 : 0;
        if (ended != Ended::kRefused) check(name);
        expect_nothing_left(files);
        if (Fixture::HasFatalFailure()) return;
        run(name + ".next");
        check(name + ".next");
        for (const std::string& each : {name, name + ".next"}) ::unlink((directory_ / each).c_str());
        if (ended == Ended::kNotReached) break;
      }
      ASSERT_LT(nth, kAllocationsMax);
    }
    ::unlink((directory_ / "warm").c_str());
    EXPECT_GE(refused, 20u);
  }
};

class AllocationOnRung : public AllocationSweep<PipelineOnRung> {};
INSTANTIATE_TEST_SUITE_P(Rungs, AllocationOnRung, all_rungs(), rung_test_name);

TEST_P(AllocationOnRung, any_failing_allocation_of_a_save) {
  const Tensors tensors = some_tensors();
  for (const bool compress : {false, true}) {
    std::shared_ptr<SaveJob> job;
    const SaveOptions options{.rung = GetParam(), .compress = compress, .trace = true};
    sweep(
        [&](const std::string& name) {
          job = nullptr;
          try {
            job = save_job(tensors, name, options);
            start(job);
            while (!job->wait(kPatience)) FAIL() << "the job hangs";
            job->rethrow();
          } catch (...) {
            job = nullptr;
            throw;
          }
        },
        [&](const std::string& name) {
          const Saved saved{name, tensors.layout(), job->chunk_table()};
          if (!compress) expect_file_holds(saved, tensors);
        });
    job = nullptr;
  }
}

TEST_P(AllocationOnRung, any_failing_allocation_of_a_load_and_a_scrub) {
  const Tensors tensors = some_tensors();
  for (const bool compress : {false, true}) {
    const Saved saved = save(tensors, compress ? "zstd" : "raw", {.rung = GetParam(), .compress = compress});
    std::vector<Bytes> loaded;
    const auto run_job = [](const std::shared_ptr<LoadJob>& job) {
      start(job);
      while (!job->wait(kPatience)) FAIL() << "the job hangs";
      job->rethrow();
    };
    sweep(
        [&](const std::string&) {
          loaded.clear();
          run_job(load_all_job(saved, loaded, tensors, {.rung = GetParam(), .trace = true}));
        },
        [&](const std::string&) { ASSERT_TRUE(loaded == tensors.bytes); });
    flip(saved.name, saved.table[2].offset);
    std::size_t problems = 0;
    sweep(
        [&](const std::string&) {
          const auto job = scrub_job(saved, GetParam());
          run_job(job);
          problems = job->problems().size();
        },
        [&](const std::string&) { ASSERT_EQ(problems, 1u) << "a wrong chunk is told, or the scrub fails"; });
  }
}

// Differences from an earlier save: the layout, the base's records and files, the chunk table with its references.
class ChainAllocation : public AllocationSweep<SaveChainTest> {
 protected:
  // A tensor of floats in two chunks, one of 2-byte items, and a small one that is packed.
  Tensors few() {
    Tensors tensors;
    tensors.bytes.push_back(Bytes(kTestChunkBytes + 12344));
    each_float(tensors.bytes.back(), [&](float) { return normal_(random_) * 0.02f; });
    tensors.bytes.push_back(random_bytes(random_, kTestChunkBytes + 10));
    tensors.bytes.push_back(random_bytes(random_, 77));
    return tensors;
  }
  static SaveOptions differences_of(const Tensors& tensors) {
    SaveOptions options{.compress = true, .zstd_level = 1, .keyframe_every = 8};
    options.item_bytes.assign(tensors.bytes.size(), 4);
    options.item_bytes[1] = 2;
    options.xor_tensors.assign(tensors.bytes.size(), 1);
    return options;
  }
  // A row of saves, each a difference from the one before.
  Stored make_row(Tensors& tensors, int saves) {
    Stored stored;
    for (int step = 0; step < saves; ++step) {
      stored = save_on(stored, tensors, "row" + std::to_string(step), differences_of(tensors));
      train(tensors, 1);
    }
    return stored;
  }
};

TEST_F(ChainAllocation, any_failing_allocation_of_a_save_of_differences) {
  Tensors tensors = few();
  const Stored base = make_row(tensors, 3);
  Stored stored;
  sweep(
      [&](const std::string& name) {
        stored = {};
        const auto job = job_on(base, tensors, name, differences_of(tensors));
        start(job);
        while (!job->wait(kPatience)) FAIL() << "the job hangs";
        job->rethrow();
        stored = result_of(*job, base, name, tensors);
      },
      [&](const std::string&) {
        expect_loads(stored, tensors);
        ASSERT_EQ(longest_chain(stored), 4u);
      });
}

TEST_F(ChainAllocation, any_failing_allocation_of_a_load_of_differences) {
  Tensors tensors = few();
  const Stored base = make_row(tensors, 3);
  const Stored stored = save_on(base, tensors, "newest", differences_of(tensors));
  ASSERT_EQ(longest_chain(stored), 4u);
  std::vector<Bytes> result;
  sweep(
      [&](const std::string&) {
        result.clear();
        check_table(stored);
        result = loaded(stored, tensors);
      },
      [&](const std::string&) { ASSERT_TRUE(result == tensors.bytes); });
  const format::ChunkRecord& oldest = stored.table.back();
  flip(stored.files[oldest.file], oldest.offset);
  std::size_t problems = 0;
  sweep([&](const std::string&) { problems = problems_of(stored); },
        [&](const std::string&) { ASSERT_GE(problems, 1u) << "a wrong record is told, or the scrub fails"; });
}

// The lanes of a process are made by its first job: here each time in a child of its own.
TEST(AllocationTest, any_failing_allocation_of_the_first_job_of_a_process) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer lets a forked child start no threads";
#endif
  const testing::TemporaryDirectory directory;
  std::uint64_t refused = 0;
  for (std::uint64_t nth = 1; nth < 60; ++nth) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::alarm(60);
      const Ended ended = attempt(nth, false, [] { Engine::instance(); });
      Engine::instance().ring(kTestChunkBytes, 1);
      if (Engine::instance().lane_count() < 1) ::_exit(3);
      ::_exit(ended == Ended::kRefused ? 1 : ended == Ended::kWell ? 2 : 0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status)) << "allocation " << nth << ": signal " << WTERMSIG(status);
    if (WEXITSTATUS(status) == 0) break;
    ASSERT_NE(WEXITSTATUS(status), 3) << "an engine without lanes, in which no job ever ends";
    refused += WEXITSTATUS(status) == 1 ? 1 : 0;
  }
  EXPECT_GE(refused, 3u);
}

TEST(AllocationTest, ending_a_job_needs_no_memory) {
  struct Idle final : Job {
    Idle() : Job(false) {}
    void work(Lane&, LaneBooks&) override {}
  };
  Idle job;
  job.expect_lanes(1);
  const FailingAllocation failing(1, true);
  job.cancel();
  FailingAllocation::stop();
  EXPECT_ANY_THROW(job.rethrow());
}

}  // namespace
}  // namespace snapstone::pipeline
