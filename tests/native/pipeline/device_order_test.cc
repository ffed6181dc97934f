// Work of devices runs late and in any order that is allowed: every seed gives the same file. Each wait, record and
// keep-alive is needed: without it, a run of the same scenario goes wrong.
#include <cstdlib>
#include <set>

#include "base/fault_hook.h"
#include "pipeline/device_fixture.h"

namespace snapstone::pipeline {
namespace {

class DeviceOrder : public DeviceTest {
 protected:
  // Fails a test as soon as anything is wrong: bytes, violations, slots.
  void expect_sound(std::uint64_t seed) {
    SNAPSTONE_FAKE(fakecuda_drain)();
    ASSERT_EQ(testing::fake_violations(), "") << "seed " << seed;
    ASSERT_EQ(ring_->free_count(), ring_->slot_count()) << "seed " << seed;
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
  }
  void save_once(std::uint64_t seed) {
    random_.seed(seed);
    options_.device.overflow_fraction = seed % 3 == 0 ? 0.5 : 0;
    options_.device.batch_bytes = (1 + seed % 6) * kTestChunkBytes;
    options_.device.dma_bytes = (1 + seed % 4) * kTestChunkBytes;
    options_.device.scratch_bytes = (1 + seed % 5) * kTestChunkBytes;
    DeviceTensors state = tensors(mixed((4 + seed % 30) * kTestChunkBytes + seed % 5000));
    const auto job = device_job(state, "a" + std::to_string(seed));
    save_behind_fence(state, job);
    expect_saved(*job, "a" + std::to_string(seed), state);
  }
  // A save that finds out first what changed.
  void save_changes(std::uint64_t seed) {
    random_.seed(seed);
    DeviceTensors state = tensors({{0, 20 * kTestChunkBytes}});
    const std::string name = "b" + std::to_string(seed);
    const Saved base_saved = save(state.values(), name + "base");
    SaveBase base{base_saved.table, std::vector<std::uint32_t>(base_saved.table.size(), SaveBase::kNoRecord), {}};
    for (std::uint32_t i = 0; i < base.records.size(); ++i) {
      base.records[i].file = 1;
      base.record_of_chunk.push_back(i);
    }
    state.values().bytes[0][7 * kTestChunkBytes] ^= 1;
    SaveOptions options = options_;
    options.device.two_phase = true;
    const auto job = device_job(state, name, options, std::move(base));
    save_behind_fence(state, job);
    EXPECT_EQ(job->device_stats().copied_bytes, kTestChunkBytes);
    EXPECT_EQ(job->file_bytes(), kTestChunkBytes);
  }
  // A save that is given up with copies in flight; its memory is used again at once.
  void give_up(std::uint64_t seed) {
    random_.seed(seed);
    {
      DeviceTensors state = tensors({{0, 40 * kTestChunkBytes}});
      const auto job = device_job(state, "c" + std::to_string(seed));
      state.produce(200);
      job->enqueue(*state.mark());
      start(job);
      job->cancel();
      EXPECT_THROW(finish(*job), CancelledError);
      EXPECT_TRUE(job->device_drained());
    }
    const Tensors tensors = Tensors::random(random_, {20 * kTestChunkBytes});
    expect_file_holds(save(tensors, "d" + std::to_string(seed)), tensors);
  }
  void scenario(std::uint64_t first, std::uint64_t count) {
    ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
    ring_->reserve(24);
    for (std::uint64_t seed = first; seed < first + count && !HasFatalFailure(); ++seed) {
      SNAPSTONE_FAKE(fakecuda_seed)(seed);
      save_once(seed);
      if (cuda::Kernels::of(cuda::Device::of(0)) != nullptr) save_changes(seed);
      give_up(seed);
      expect_sound(seed);
    }
  }
};

std::uint64_t seed_count() {
  const char* text = std::getenv("SNAPSTONE_TEST_SEEDS");
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  constexpr std::uint64_t kDefault = 30;
#else
  constexpr std::uint64_t kDefault = 150;
#endif
  return text != nullptr ? std::strtoull(text, nullptr, 10) : kDefault;
}

TEST_F(DeviceOrder, every_seed_gives_the_values_of_the_snapshot) {
  scenario(testing::seed() % 1'000'000, seed_count());
}

TEST_F(DeviceOrder, DISABLED_scenario) { scenario(1, 8); }

constexpr const char* kSteps[] = {"wait/save/producer",  "wait/save/fence",     "record/save/mark",
                                  "record/save/batch",   "record/save/sources", "record/save/digests",
                                  "record/save/drained", "poll/save/batch",     "poll/save/sources",
                                  "poll/save/digests",   "poll/save/drained",   "keep/save/buffers"};

TEST_F(DeviceOrder, no_step_can_be_left_out) {
  if (cuda::Kernels::of(cuda::Device::of(0)) == nullptr) GTEST_SKIP() << "no kernels";
  const testing::ChildResult whole = testing::run_child("DeviceOrder.DISABLED_scenario", "SNAPSTONE_FAULT=");
  ASSERT_EQ(whole.status, 0) << whole.output;
  for (const std::string step : kSteps) {
    const testing::ChildResult child =
        testing::run_child("DeviceOrder.DISABLED_scenario", "SNAPSTONE_FAULT=" + step + ":1+:skip");
    EXPECT_NE(child.status, 0) << "nothing notices the lack of " << step;
  }
}

// What the test above does without is all there is.
TEST_F(DeviceOrder, all_steps_are_known) {
  if (cuda::Kernels::of(cuda::Device::of(0)) == nullptr) GTEST_SKIP() << "no kernels";
  const ArmedFaults faults("");
  scenario(1, 8);
  std::set<std::string> seen;
  for (const std::string& name : fault::seen_names()) {
    if (name.find("/save/") != std::string::npos) seen.insert(name);
  }
  EXPECT_EQ(seen, std::set<std::string>(std::begin(kSteps), std::end(kSteps)));
}

}  // namespace
}  // namespace snapstone::pipeline
