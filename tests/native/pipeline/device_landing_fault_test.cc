// Loads to devices when something is missing: a wait or a record left out, a call of the driver that fails, a device
// that is lost. On the fake driver, which finds accesses that nothing orders.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <thread>

#include "base/fault_hook.h"
#include "pipeline/landing_fixture.h"

namespace snapstone::pipeline {
namespace {

using namespace std::chrono_literals;
using testing::ArmedFaults;

// Loads follow each other as closely as they may, into targets that the caller uses for a while yet. Some fail on the
// way, by a wrong byte, by a file that ends early, and given up while the caller still keeps targets from being
// written.
class DeviceLoadSteps : public DeviceLoad {
 protected:
  void make_files() {
    tensors_ = some_tensors();
    good_ = save(tensors_, "good");
    bad_ = save(tensors_, "bad");
    flip("bad", bad_.table[bad_.table.size() / 3].offset);
    cut_ = save(tensors_, "cut");
    std::filesystem::resize_file(directory_ / "cut", cut_.table[cut_.table.size() / 2].offset);
  }
  // What went wrong that should not have, or nothing.
  std::string wrongs(std::uint64_t seed) {
    SNAPSTONE_FAKE(fakecuda_reset)();
    chaos(seed);
    SNAPSTONE_FAKE(fakecuda_mode)(seed % 2 == 0 ? "chaos" : "lazy");
    std::string wrong;
    std::vector<std::vector<DeviceBytes>> targets;
    for (const Saved* saved : {&good_, &bad_, &good_, &cut_, &good_}) {
      try {
        targets.push_back(targets_like(tensors_));
        SNAPSTONE_FAKE(fakecuda_enqueue_delay)(0, caller(0), 2000);
        load(load_job(plan_to(*saved, targets.back()), saved->name, options()));
      } catch (const CorruptError& error) {
        if (saved == &good_) wrong += error.what();
      }
    }
    wrong += give_up();
    for (const std::size_t i : {0, 2, 4}) {
      for (std::size_t j = 0; j < tensors_.bytes.size(); ++j) {
        if (as_caller_sees(0, targets[i][j]) != tensors_.bytes[j]) wrong += "wrong bytes";
      }
    }
    SNAPSTONE_FAKE(fakecuda_drain)();
    wrong += testing::fake_violations();
    targets.clear();
    SNAPSTONE_FAKE(fakecuda_reset)();
    return wrong;
  }

  std::string give_up() {
    const std::vector<DeviceBytes> targets = targets_like(tensors_);
    SNAPSTONE_FAKE(fakecuda_enqueue_delay)(0, caller(0), 20'000);
    const auto job = load_job(plan_to(good_, targets), good_.name, options());
    job->mark(0, caller(0));
    start(job);
    while (job->bytes_done() == 0 && !job->wait(1ms)) {
    }
    job->cancel();
    if (!job->wait(kPatience)) return "a load that was given up hangs";
    job->fence(0, caller(0));
    for (const DeviceBytes& target : targets) fill(0, target, kBefore);
    SNAPSTONE_FAKE(fakecuda_drain)();
    return "";
  }

  Tensors tensors_;
  Saved good_, bad_, cut_;
};

INSTANTIATE_TEST_SUITE_P(Settings, DeviceLoadSteps,
                         ::testing::Values(Setting{"kernels", true, true}, Setting{"host_digests", false, true}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(DeviceLoadSteps, none_can_be_left_out_unnoticed) {
  make_files();
  std::set<std::string> steps;
  {
    const ArmedFaults counted("");
    for (std::uint64_t seed = 0; seed < 5; ++seed) ASSERT_EQ(wrongs(testing::seed() + seed), "");
    for (const std::string& name : fault::seen_names()) {
      if (name.find("/load/") != std::string::npos) steps.insert(name);
    }
  }
  std::set<std::string> expected = {"record/load/mark",    "wait/load/targets", "record/load/placed",
                                    "record/load/drained", "poll/load/placed",  "poll/load/drained",
                                    "keep/load/slots"};
  if (GetParam().kernels) {
    expected.merge(std::set<std::string>{"record/load/copied", "record/load/verified", "poll/load/copied",
                                         "poll/load/verified", "wait/load/scratch", "record/load/landed",
                                         "wait/load/fence"});
  }
  EXPECT_EQ(steps, expected);
  // In processes of their own: the host may touch what it must not, and die of that.
  const std::string name = std::string("Settings/DeviceLoadSteps.DISABLED_without_one/") + GetParam().name;
  for (const std::string& step : steps) {
    const testing::ChildResult child =
        testing::run_child(name, "FAKECUDA_LATE_US=3000 FAKECUDA_GBPS=0.05 LEAVE_OUT=" + step);
    EXPECT_EQ(child.output.find("nothing is wrong"), std::string::npos) << step << " can be left out";
    EXPECT_NE(child.output.find("leaving out " + step), std::string::npos) << child.output;
  }
}

TEST_P(DeviceLoadSteps, DISABLED_without_one) {
  make_files();
  std::printf("leaving out %s\n", std::getenv("LEAVE_OUT"));
  std::fflush(stdout);
  const ArmedFaults skipped(std::getenv("LEAVE_OUT") + std::string(":1+:skip"));
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    if (!wrongs(testing::seed() + seed).empty()) return;
  }
  std::printf("nothing is wrong\n");
}

TEST_P(DeviceLoadSteps, no_failing_call_of_the_driver_does_harm) {
  make_files();
  std::vector<std::pair<std::string, std::uint64_t>> calls;
  {
    const ArmedFaults counted("");
    ASSERT_EQ(wrongs(testing::seed()), "");
    for (const std::string& name : fault::seen_names()) {
      if (name.starts_with("cu")) calls.emplace_back(name, fault::seen(name));
    }
  }
  ASSERT_GE(calls.size(), 8u);
  for (const auto& [call, count] : calls) {
    for (const std::uint64_t nth : {std::uint64_t{1}, std::uint64_t{2}, count / 3 + 1, count / 2 + 1}) {
      for (const char* const code : {"2", "719"}) {
        SNAPSTONE_FAKE(fakecuda_reset)();
        std::vector<std::shared_ptr<LoadJob>> jobs;
        const std::vector<DeviceBytes> targets = targets_like(tensors_);
        bool loaded = true;
        {
          const ArmedFaults faults(call + ":" + std::to_string(nth) + ":errno=" + code);
          for (int i = 0; i < 2 && loaded; ++i) {
            jobs.push_back(load_job(plan_to(good_, targets), "good", options()));
            try {
              load(jobs.back());
            } catch (const cuda::CudaError&) {
              loaded = false;
            }
          }
        }
        if (loaded) {
          expect_loaded(targets, tensors_.bytes);
        }
        // Whatever failed: targets are nobody's business but the caller's once that is settled, and slots are usable.
        const auto give_up = std::chrono::steady_clock::now() + 10s;
        while (!jobs.back()->settled() && std::chrono::steady_clock::now() < give_up)
          std::this_thread::sleep_for(100us);
        SNAPSTONE_FAKE(fakecuda_drain)();
        const std::vector<DeviceBytes> again = targets_like(tensors_);
        load(load_job(plan_to(good_, again), "good", options()));
        expect_loaded(again, tensors_.bytes);
        ASSERT_EQ(testing::fake_violations(), "") << call << ":" << nth << ":" << code;
        EXPECT_EQ(ring_->free_count(), ring_->slot_count());
        EXPECT_EQ(ring_->slot_count(), 16u) << call << ":" << nth << ": one failing call costs no memory";
      }
    }
  }
}

class DeviceLoadFaults : public DeviceLoadTest {};

TEST_F(DeviceLoadFaults, whether_targets_are_free_is_no_error_on_a_device_that_fails) {
  use_ring(16, true);
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  const std::vector<DeviceBytes> targets = targets_like(tensors);
  SNAPSTONE_FAKE(fakecuda_enqueue_delay)(0, caller(0), 100'000);
  const auto job = load_job(plan_to(saved, targets), "a", options());
  job->mark(0, caller(0));
  run(job);
  {
    const ArmedFaults faults("cuEventQuery:1+:errno=719");
    EXPECT_FALSE(job->settled());
  }
  SNAPSTONE_FAKE(fakecuda_drain)();
  EXPECT_TRUE(job->settled());
}

// What the caller has enqueued hangs, as a collective does that waits for a dead rank.
TEST_F(DeviceLoadFaults, a_load_that_is_given_up_does_not_wait_for_the_caller) {
  for (const bool kernels : {true, false}) {
    use_ring(16, true);
    const Tensors tensors = some_tensors(100 * kTestChunkBytes);
    const std::string name = kernels ? "a" : "b";
    const Saved saved = save(tensors, name);
    const std::vector<DeviceBytes> targets = targets_like(tensors);
    LoadOptions impatient = options(kernels);
    impatient.landing.patience = 50ms;
    SNAPSTONE_FAKE(fakecuda_enqueue_delay)(0, caller(0), 2'000'000);
    const auto job = load_job(plan_to(saved, targets), name, impatient);
    job->mark(0, caller(0));
    start(job);
    EXPECT_FALSE(job->wait(200ms)) << "did not wait for what the caller had enqueued";
    job->cancel();
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_THROW(finish(*job), CancelledError);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, 1500ms);
    SNAPSTONE_FAKE(fakecuda_drain)();
  }
}

TEST_F(DeviceLoadFaults, no_memory_to_decode_into_is_an_error) {
  use_ring(16, true);
  const Tensors tensors = some_tensors(100 * kTestChunkBytes);
  const Saved saved = save(tensors, "a", {.compress = true});
  const std::vector<DeviceBytes> targets = targets_like(tensors);
  load(load_job(plan_to(saved, targets), "a", options(false)));  // lanes have their own memory now
  LoadOptions large = options(false);
  large.landing.batch_bytes = 128 << 20;  // more than any workspace of this process has
  {
    const ArmedFaults faults("mmap:1+:errno=ENOMEM");
    EXPECT_EQ(testing::errno_of([&] { load(load_job(plan_to(saved, targets), "a", large)); }), ENOMEM);
    EXPECT_GT(fault::seen("mmap"), 0u);
  }
  EXPECT_EQ(ring_->free_count(), ring_->slot_count());
  load(load_job(plan_to(saved, targets), "a", large));
  expect_loaded(targets, tensors.bytes);
}

class DeviceLoadLost : public DeviceLoadTest {};

// In a process of its own: the device does not come back.
TEST_F(DeviceLoadLost, DISABLED_a_lost_device_ends_the_job) {
  use_ring(16, true);
  const Tensors tensors = some_tensors(40 * kTestChunkBytes);
  const Saved saved = save(tensors, "a");
  const std::vector<DeviceBytes> targets = targets_like(tensors);
  SNAPSTONE_FAKE(fakecuda_drain)();
  SNAPSTONE_FAKE(fakecuda_fail)(std::getenv("LOSE_AT"));
  const auto job = load_job(plan_to(saved, targets), "a", options());
  try {
    job->mark(0, caller(0));
    run(job);
    FAIL() << "a lost device loaded something";
  } catch (const cuda::CudaError& error) {
    EXPECT_EQ(error.device(), 0);
  }
  EXPECT_FALSE(job->settled()) << "nobody can say what the device still writes";
  std::printf("ended well\n");
}

TEST_F(DeviceLoadLost, a_device_that_is_lost_at_any_time_is_an_error_and_no_hang) {
  for (const char* const rule : {"work:1:719", "work:2:719", "work:5:719", "work:9:719", "work:14:719"}) {
    const testing::ChildResult child =
        testing::run_child("DeviceLoadLost.DISABLED_a_lost_device_ends_the_job", std::string("LOSE_AT=") + rule);
    EXPECT_NE(child.output.find("ended well"), std::string::npos) << rule << "\n" << child.output;
  }
}

}  // namespace
}  // namespace snapstone::pipeline
