#include "pipeline/engine.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <thread>

#include "base/fault_hook.h"
#include "pipeline/pipeline_fixture.h"
#include "refused_calls.h"

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;  // a forked child of several threads may not start threads under it
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

namespace snapstone::pipeline {
namespace {

using namespace std::chrono_literals;
using testing::ArmedFaults;
using testing::errno_of;

// A job that calls back, and counts.
class ProbeJob : public Job {
 public:
  explicit ProbeJob(std::function<void(ProbeJob&, int lane)> on_work = {}) : Job(false), on_work_(std::move(on_work)) {}

  using Job::stopped;
  std::atomic<int> worked{0};
  std::atomic<int> finishes{0};
  std::atomic<int> abandons{0};
  std::function<void()> on_finish;

 protected:
  void work(Lane& lane, LaneBooks& /*books*/) override {
    if (on_work_) on_work_(*this, lane.number());
    ++worked;
  }
  void finish() override {
    EXPECT_EQ(worked, Engine::instance().lane_count()) << "finish() before the last lane left";
    ++finishes;
    if (on_finish) on_finish();
  }
  void abandon() noexcept override { ++abandons; }

 private:
  const std::function<void(ProbeJob&, int lane)> on_work_;
};

class EngineTest : public PipelineTest {
 protected:
  std::shared_ptr<Job> started(const std::shared_ptr<Job>& job) {
    start(job);
    return job;
  }
  // Exit status of a forked child that runs `function`; -1 when it did not end by itself.
  template <typename Function>
  static int in_child(Function function) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(60);
      int status = 1;
      try {
        status = function();
      } catch (const std::exception& error) {
        std::fprintf(stderr, "child: %s\n", error.what());
      }
      ::_exit(status);
    }
    int status = 0;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  bool saves_and_loads(io::Rung rung, const std::string& name) {
    const Tensors tensors = some_tensors();
    const Saved saved = save(tensors, name, {.rung = rung});
    std::vector<Bytes> loaded;
    run(load_all_job(saved, loaded, tensors, {.rung = rung}));
    return loaded == tensors.bytes;
  }
};

TEST_F(EngineTest, every_lane_works_on_a_job_once_and_the_last_one_finishes_it) {
  const auto job = std::make_shared<ProbeJob>();
  run(job);
  EXPECT_EQ(job->worked, Engine::instance().lane_count());
  EXPECT_EQ(job->finishes, 1);
  EXPECT_EQ(job->abandons, 0);
}

TEST_F(EngineTest, each_lane_works_on_jobs_in_the_order_given) {
  constexpr int kJobs = 50;
  std::mutex mutex;
  std::vector<std::vector<int>> order(static_cast<std::size_t>(Engine::instance().lane_count()));
  std::vector<std::shared_ptr<Job>> jobs;
  for (int number = 0; number < kJobs; ++number) {
    jobs.push_back(started(std::make_shared<ProbeJob>([&, number](ProbeJob&, int lane) {
      const std::lock_guard lock(mutex);
      order[static_cast<std::size_t>(lane)].push_back(number);
    })));
  }
  for (const auto& job : jobs) finish(*job);
  for (const auto& lane : order) {
    ASSERT_EQ(lane.size(), static_cast<std::size_t>(kJobs));
    EXPECT_TRUE(std::is_sorted(lane.begin(), lane.end()));
  }
}

TEST_F(EngineTest, jobs_started_from_many_threads_have_one_order_on_all_lanes) {
  std::mutex mutex;
  std::vector<std::vector<int>> order(static_cast<std::size_t>(Engine::instance().lane_count()));
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      std::vector<std::shared_ptr<Job>> jobs;
      for (int i = 0; i < 50; ++i) {
        jobs.push_back(started(std::make_shared<ProbeJob>([&, number = thread * 1000 + i](ProbeJob&, int lane) {
          const std::lock_guard lock(mutex);
          order[static_cast<std::size_t>(lane)].push_back(number);
        })));
      }
      for (const auto& job : jobs) finish(*job);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& lane : order) EXPECT_EQ(lane, order[0]);
}

TEST_F(EngineTest, a_lane_without_work_goes_on_to_the_next_job) {
  if (Engine::instance().lane_count() < 2) GTEST_SKIP() << "one lane";
  std::atomic<bool> go{false};
  const auto slow = std::make_shared<ProbeJob>([&](ProbeJob&, int lane) {
    while (lane == 0 && !go) std::this_thread::sleep_for(1ms);
  });
  const auto next = std::make_shared<ProbeJob>();
  start(slow);
  start(next);
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (next->worked == 0 && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(1ms);
  EXPECT_GT(next->worked, 0);
  EXPECT_FALSE(slow->finished());
  go = true;
  finish(*slow);
  finish(*next);
}

TEST_F(EngineTest, the_first_failure_wins_and_stops_the_others) {
  const int lanes = Engine::instance().lane_count();
  std::atomic<int> entered{0};
  std::atomic<int> failures{0};
  const auto job = std::make_shared<ProbeJob>([&](ProbeJob& self, int lane) {
    ++entered;
    while (entered < lanes) std::this_thread::sleep_for(1ms);
    if (lane == 0) throw OsError(EIO, "first", "");
    while (!self.stopped()) std::this_thread::sleep_for(1ms);
    ++failures;
    throw OsError(ENOSPC, "second", "");
  });
  start(job);
  EXPECT_EQ(errno_of([&] { finish(*job); }), EIO);
  EXPECT_EQ(failures, lanes - 1);
  EXPECT_EQ(job->finishes, 0);
  EXPECT_EQ(job->abandons, 1);
}

TEST_F(EngineTest, whatever_is_thrown_ends_the_job_and_not_the_lane) {
  EXPECT_THROW(run(std::make_shared<ProbeJob>([](ProbeJob&, int) { throw 7; })), int);
  const auto job = std::make_shared<ProbeJob>();
  job->on_finish = [] { throw std::bad_alloc(); };
  EXPECT_THROW(run(job), std::bad_alloc);
  EXPECT_EQ(job->abandons, 1);
  run(std::make_shared<ProbeJob>());
}

TEST_F(EngineTest, a_cancel_during_the_finish_is_a_failure) {
  const auto job = std::make_shared<ProbeJob>();
  job->on_finish = [&] { job->cancel(); };
  EXPECT_THROW(run(job), CancelledError);
  EXPECT_EQ(job->abandons, 1);
  job->cancel();
  EXPECT_THROW(job->rethrow(), CancelledError);
}

// The engine holds the job until its lanes have left it, whoever else lets go.
TEST_F(EngineTest, a_job_may_be_dropped_while_it_runs) {
  std::atomic<int> worked{0};
  for (int i = 0; i < 20; ++i) {
    start(std::make_shared<ProbeJob>([&](ProbeJob&, int) {
      std::this_thread::sleep_for(1ms);
      ++worked;
    }));
  }
  run(std::make_shared<ProbeJob>());
  EXPECT_EQ(worked, 20 * Engine::instance().lane_count());
}

TEST_F(EngineTest, the_ring_grows_and_larger_slots_replace_it) {
  Engine& engine = Engine::instance();
  const auto small = engine.ring(kTestChunkBytes, 4);
  EXPECT_GE(small->slot_count(), 4u);
  EXPECT_EQ(engine.ring(kTestChunkBytes, 9), small);
  EXPECT_GE(small->slot_count(), 9u);
  const auto large = engine.ring(small->slot_bytes() + 1, 2);
  EXPECT_NE(large, small);
  EXPECT_EQ(engine.current_ring(), large);
  EXPECT_EQ(engine.ring(kTestChunkBytes, 2), large) << "smaller chunks fit larger slots";
}

// Slots of segments that came after a lane registered its buffers are written all the same.
TEST_F(EngineTest, the_ring_may_grow_while_jobs_use_it) {
  for (const io::Rung rung : {io::Rung::kUringFixed, io::Rung::kBuffered}) {
    if (!rung_works(rung)) continue;
    ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
    ring_->reserve(2);
    std::atomic<bool> stop{false};
    std::thread grower([&] {
      for (std::uint64_t slots = 3; slots < 40 && !stop; ++slots) {
        ring_->reserve(slots);
        std::this_thread::sleep_for(1ms);
      }
    });
    for (int round = 0; round < 5; ++round) {
      EXPECT_TRUE(saves_and_loads(rung, std::string(io::rung_name(rung)) + std::to_string(round)));
    }
    stop = true;
    grower.join();
    EXPECT_GT(ring_->segments().size(), 1u);
    EXPECT_EQ(ring_->free_count(), ring_->slot_count());
  }
}

TEST_F(EngineTest, a_lane_that_cannot_build_its_io_engine_fails_the_job_and_tries_again_for_the_next) {
  if (!rung_works(io::Rung::kUring)) GTEST_SKIP() << "no io_uring";
  const Tensors tensors = some_tensors();
  {
    const ArmedFaults faults("io_uring_setup:1+:errno=ENOMEM");
    EXPECT_EQ(errno_of([&] { run(save_job(tensors, "a", {.rung = io::Rung::kUring})); }), ENOMEM);
  }
  expect_file_holds(save(tensors, "b", {.rung = io::Rung::kUring}), tensors);
}

// Replaces this process's rings by /dev/null, as a library that closes descriptors which are not its own would.
int break_all_rings() {
  int broken = 0;
  DIR* const list = ::opendir("/proc/self/fd");
  const int null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  while (const dirent* entry = ::readdir(list)) {
    char target[64]{};
    const std::string path = std::string("/proc/self/fd/") + entry->d_name;
    if (::readlink(path.c_str(), target, sizeof target - 1) > 0 && std::string(target) == "anon_inode:[io_uring]") {
      ::dup2(null, std::atoi(entry->d_name));
      ++broken;
    }
  }
  ::close(null);
  ::closedir(list);
  return broken;
}

TEST_F(EngineTest, after_a_broken_ring_the_next_job_gets_another) {
  for (const io::Rung rung : {io::Rung::kUring, io::Rung::kUringFixed}) {
    if (!rung_works(rung)) GTEST_SKIP() << "no io_uring";
    const Tensors tensors = some_tensors(40 * kTestChunkBytes);
    const std::string name = io::rung_name(rung);
    const Saved saved = save(tensors, name, {.rung = rung});
    ASSERT_GT(break_all_rings(), 0);
    try {
      run(save_job(tensors, name + "-broken", {.rung = rung}));
      FAIL() << "saved through a ring that is gone";
    } catch (const OsError& error) {
      EXPECT_EQ(error.verb(), "io_uring_enter");
    }
    EXPECT_EQ(ring_->free_count(), ring_->slot_count());
    ring_->reserve(16);  // as Engine::ring() does for each job: forfeited slots are replaced
    // A lane that had no share in the failed job may still have its broken ring.
    for (int i = 0; i < Engine::instance().lane_count(); ++i) {
      try {
        run(save_job(tensors, name + std::to_string(i), {.rung = rung}));
      } catch (const OsError& error) {
        EXPECT_EQ(error.verb(), "io_uring_enter");
      }
    }
    ring_->reserve(16);
    EXPECT_TRUE(saves_and_loads(rung, name + "-after"));
    std::vector<Bytes> loaded;
    run(load_all_job(saved, loaded, tensors, {.rung = rung}));
    EXPECT_EQ(loaded, tensors.bytes);
  }
}

TEST_F(EngineTest, a_forked_child_gets_a_working_engine_of_its_own) {
  if (kThreadSanitizer) GTEST_SKIP() << "threads after fork";
  const Tensors tensors = some_tensors(30 * kTestChunkBytes);
  std::vector<Saved> saved;
  for (int i = 0; i < 4; ++i) {
    const auto rung = static_cast<io::Rung>(i);
    if (!rung_works(rung)) continue;
    const std::string name = io::rung_name(rung);
    const auto job = save_job(tensors, name, {.rung = rung});
    start(job);                           // the parent is busy while it forks
    if (kAddressSanitizer) finish(*job);  // whose allocator a fork leaves locked
    const int status = in_child([&] {
      ring_ = Engine::instance().ring(kTestChunkBytes, 8);
      return saves_and_loads(rung, name + "-child") && ring_->free_count() == ring_->slot_count() ? 0 : 2;
    });
    EXPECT_EQ(status, 0) << name;
    finish(*job);
    expect_file_holds({name, tensors.layout(), job->chunk_table()}, tensors);
  }
}

TEST_F(EngineTest, a_forked_child_may_drop_an_inherited_job_and_not_start_it) {
  if (kThreadSanitizer) GTEST_SKIP() << "threads after fork";
  std::atomic<bool> go{false};
  std::shared_ptr<Job> running = std::make_shared<ProbeJob>([&](ProbeJob&, int) {
    while (!go) std::this_thread::sleep_for(1ms);
  });
  std::shared_ptr<Job> idle = std::make_shared<ProbeJob>();
  start(running);
  std::thread waiter([&running] { running->wait(kPatience); });
  std::this_thread::sleep_for(20ms);
  const int status = in_child([&] {
    bool refused = false;
    try {
      Engine::instance().start(idle);
    } catch (const std::logic_error&) {
      refused = true;
    }
    const bool inherited = running->inherited() && idle->inherited();
    running.get()->~Job();  // what the last reference would do; those of the lanes went with the lanes
    return refused && inherited ? 0 : 2;
  });
  EXPECT_EQ(status, 0);
  go = true;
  waiter.join();
  finish(*running);
}

TEST_F(EngineTest, an_engine_without_any_thread_is_an_error) {
  if (kThreadSanitizer) GTEST_SKIP() << "threads after fork";
  EXPECT_EQ(in_child([] {
              testing::refuse_threads(EAGAIN);
              try {
                Engine::instance();
              } catch (const OsError& error) {
                return error.verb() == "pthread_create" ? error.error_number() : 1;
              }
              return 2;
            }),
            EAGAIN);
}

TEST_F(EngineTest, the_number_of_lanes_can_be_chosen) {
  if (kThreadSanitizer) GTEST_SKIP() << "threads after fork";
  for (const auto& [text, expected] : std::vector<std::pair<const char*, int>>{{"1", 1}, {"5", 5}, {"64", 64}}) {
    EXPECT_EQ(in_child([text = text] {
                ::setenv("SNAPSTONE_LANES", text, 1);
                return Engine::instance().lane_count();
              }),
              expected);
  }
  for (const char* const text : {"0", "65", "-1", "many", ""}) {
    EXPECT_EQ(in_child([text] {
                ::setenv("SNAPSTONE_LANES", text, 1);
                try {
                  Engine::instance();
                } catch (const std::invalid_argument&) {
                  return 0;
                }
                return 2;
              }),
              0)
        << text;
  }
}

}  // namespace
}  // namespace snapstone::pipeline
