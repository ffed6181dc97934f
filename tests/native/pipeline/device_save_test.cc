// Saves of tensors in device memory, on the fake driver: the file holds the values at the mark, whatever order work
// runs in, whatever the driver lacks, and however few slots there are.
//
// The invariants of every test: no access that order does not allow (the fake's violations), all slots back.
#include <atomic>
#include <thread>

#include "pipeline/device_fixture.h"
#include "pipeline/device_workspace.h"

namespace snapstone::pipeline {
namespace {

using namespace std::chrono_literals;

class DeviceSave : public DeviceTest {
 protected:
  void use_ring_of(std::uint64_t slots, std::uint64_t slot_bytes = kTestChunkBytes) {
    ring_ = std::make_shared<mem::SlotRing>(slot_bytes);
    ring_->reserve(slots);
  }
  // A save behind a fence, and its file compared with one that is written from host memory.
  void expect_right(const std::vector<Where>& where, const std::string& name) {
    DeviceTensors state = tensors(where);
    const auto job = device_job(state, name);
    save_behind_fence(state, job);
    expect_saved(*job, name, state);
    SaveOptions on_host = options_;
    save(state.values(), name + "-host", on_host);
    EXPECT_TRUE(file_bytes(name) == file_bytes(name + "-host"));
  }
};

TEST_F(DeviceSave, one_large_tensor) { expect_right({{0, 20 * kTestChunkBytes + 17}}, "a"); }

TEST_F(DeviceSave, small_tensors_packed) {
  std::vector<Where> where;
  for (int i = 0; i < 200; ++i) where.push_back({0, random_() % 3000});
  expect_right(where, "a");
}

TEST_F(DeviceSave, host_and_devices_mixed_in_chunks) { expect_right(mixed(), "a"); }

TEST_F(DeviceSave, the_second_device_alone) { expect_right({{1, 5 * kTestChunkBytes}, {1, 100}, {1, 10}}, "a"); }

TEST_F(DeviceSave, every_rung) {
  for (int i = 0; i < 4; ++i) {
    options_.rung = static_cast<io::Rung>(i);
    if (rung_works(options_.rung)) expect_right(mixed(), std::to_string(i));
  }
}

TEST_F(DeviceSave, compressed) {
  options_.compress = true;
  DeviceTensors state = tensors(mixed(30 * kTestChunkBytes));
  const auto job = device_job(state, "a");
  save_behind_fence(state, job);
  std::vector<Bytes> loaded;
  run(load_all_job({"a", state.layout(), job->chunk_table()}, loaded, state.values()));
  EXPECT_TRUE(loaded == state.values().bytes);
}

TEST_F(DeviceSave, few_slots_are_enough) {
  for (const std::uint64_t slots : {1, 2, 3, 5, 9, 17}) {
    for (const bool compress : {false, true}) {
      use_ring_of(slots);
      options_.compress = compress;
      DeviceTensors state = tensors(mixed(40 * kTestChunkBytes));
      const std::string name = std::to_string(slots) + (compress ? "zstd" : "raw");
      const auto job = device_job(state, name);
      save_behind_fence(state, job);
      std::vector<Bytes> loaded;
      run(load_all_job({name, state.layout(), job->chunk_table()}, loaded, state.values()));
      EXPECT_TRUE(loaded == state.values().bytes) << name;
      EXPECT_EQ(ring_->free_count(), slots) << name;
    }
  }
}

// Lanes that claim the last chunks at the same moment: each of them gets a slot.
TEST_F(DeviceSave, many_short_saves_with_few_slots) {
  use_ring_of(4);
  for (int round = 0; round < 150; ++round) {
    DeviceTensors state = tensors({{0, (2 + random_() % 6) * kTestChunkBytes}, {1, kTestChunkBytes}});
    options_.compress = round % 2 == 0;
    const auto job = device_job(state, std::to_string(round));
    state.produce();
    job->enqueue(*state.mark());
    start(job);
    ASSERT_TRUE(job->wait(10s)) << "round " << round;
    job->rethrow();
  }
}

TEST_F(DeviceSave, slots_larger_than_chunks) {
  use_ring_of(40, 3 * kTestChunkBytes);
  expect_right(mixed(20 * kTestChunkBytes), "a");
}

TEST_F(DeviceSave, copies_of_any_size) {
  for (const std::uint64_t nbytes : {std::uint64_t{1}, kTestChunkBytes, 5 * kTestChunkBytes}) {
    options_.device.dma_bytes = nbytes;
    expect_right(mixed(20 * kTestChunkBytes), std::to_string(nbytes));
  }
}

TEST_F(DeviceSave, batches_of_any_size) {
  for (const std::uint64_t nbytes : {std::uint64_t{1}, 3 * kTestChunkBytes}) {
    options_.device.batch_bytes = nbytes;
    expect_right(mixed(20 * kTestChunkBytes), std::to_string(nbytes));
  }
}

// Chunks that follow each other in a tensor go to slots that follow each other, in few copies.
TEST_F(DeviceSave, adjacent_chunks_are_one_copy) {
  use_ring_of(200);
  ring_->register_with(cuda::Device::of(0));
  options_.device.digests = false;
  DeviceTensors state = tensors({{0, 64 * kTestChunkBytes}});
  const auto job = device_job(state, "a");
  const std::uint64_t before = fake_counter("copies");
  save_behind_fence(state, job);
  EXPECT_EQ(fake_counter("copies") - before, 1u);
  expect_saved(*job, "a", state);
}

// Values that nobody computes any more once the caller has gone on.
TEST_F(DeviceSave, a_ring_that_is_ready_takes_the_whole_snapshot_at_the_call) {
  use_ring_of(400);
  ring_->register_with(cuda::Device::of(0));
  DeviceTensors state = tensors(on_one(100 * kTestChunkBytes));
  const auto job = device_job(state, "a");
  state.produce(3000);
  job->enqueue(*state.mark());
  EXPECT_TRUE(job->snapshot_enqueued());
  EXPECT_FALSE(job->staged());
  EXPECT_EQ(job->device_stats().late_bytes, 0u);
  fence(*job);
  state.overwrite();
  EXPECT_EQ(fake_counter("cuStreamSynchronize"), 0u);
  EXPECT_EQ(fake_counter("cuEventSynchronize"), 0u);
  start(job);
  ASSERT_TRUE(job->wait_staged(kPatience));
  EXPECT_TRUE(job->staged());
  finish(*job);
  expect_saved(*job, "a", state);
  EXPECT_EQ(fake_counter("unregistered_copies"), 0u);
}

TEST_F(DeviceSave, a_ring_that_is_too_small_is_overflowed_into_device_memory) {
  use_ring_of(12);
  ring_->register_with(cuda::Device::of(0));
  options_.device.overflow_fraction = 0.5;
  DeviceTensors state = tensors(on_one(100 * kTestChunkBytes));
  const auto job = device_job(state, "a");
  state.produce(3000);
  job->enqueue(*state.mark());
  EXPECT_TRUE(job->snapshot_enqueued());
  EXPECT_GT(job->device_stats().overflow_bytes, 50 * kTestChunkBytes);
  fence(*job);
  state.overwrite();
  start(job);
  finish(*job);
  expect_saved(*job, "a", state);
  const StageTotals totals = job->totals();
  EXPECT_EQ(totals.nbytes[static_cast<std::size_t>(Stage::kOverflow)], job->device_stats().overflow_bytes);
}

TEST_F(DeviceSave, a_device_without_room_keeps_the_caller_waiting_and_nothing_else) {
  use_ring_of(12);
  options_.device.overflow_fraction = 0.5;
  const ArmedFaults faults("cuMemAllocAsync:1+:errno=2;cuMemAlloc_v2:1+:errno=2");
  expect_right(mixed(60 * kTestChunkBytes), "a");
}

TEST_F(DeviceSave, overflow_of_mixed_chunks) {
  use_ring_of(6);
  options_.device.overflow_fraction = 0.5;
  expect_right(mixed(60 * kTestChunkBytes), "a");
}

// The fraction counts: what does not fit stays where it is.
TEST_F(DeviceSave, overflow_ends_at_its_share_of_free_memory) {
  use_ring_of(12);
  ring_->register_with(cuda::Device::of(0));
  const auto free = static_cast<double>(cuda::Device::of(0).free_bytes());
  DeviceTensors state = tensors({{0, 100 * kTestChunkBytes}});
  options_.device.overflow_fraction = 20.5 * static_cast<double>(kTestChunkBytes) / free;
  const auto job = device_job(state, "a");
  state.produce();
  job->enqueue(*state.mark());
  EXPECT_FALSE(job->snapshot_enqueued());
  EXPECT_EQ(job->device_stats().overflow_bytes, 20 * kTestChunkBytes);
  EXPECT_GT(job->device_stats().late_bytes, 60 * kTestChunkBytes);
  start(job);
  fence(*job);
  state.overwrite();
  finish(*job);
  expect_saved(*job, "a", state);
}

TEST_F(DeviceSave, refused_registration_costs_speed_only) {
  const ArmedFaults faults("cuMemHostRegister_v2:1+:errno=801");
  DeviceTensors state = tensors(mixed());
  const auto job = device_job(state, "a");
  save_behind_fence(state, job);
  expect_saved(*job, "a", state);
  EXPECT_EQ(job->device_stats().unregistered_bytes, job->device_stats().copied_bytes);
  EXPECT_GT(fake_counter("unregistered_copies"), 0u);
  EXPECT_NE(ring_->registered_bytes().refusal, "");
}

TEST_F(DeviceSave, a_slow_rate_is_kept) {
  use_ring_of(200);
  ring_->register_with(cuda::Device::of(0));
  options_.device.dma_bytes = kTestChunkBytes;
  options_.device.batch_bytes = 4 * kTestChunkBytes;
  options_.device.dma_gbps = 0.02;
  DeviceTensors state = tensors({{0, 100 * kTestChunkBytes}});
  const auto job = device_job(state, "a");
  state.produce();
  const auto begin = std::chrono::steady_clock::now();
  job->enqueue(*state.mark());
  EXPECT_FALSE(job->snapshot_enqueued());
  start(job);
  finish(*job);
  // The first batch needs no allowance.
  const double expected = 96.0 * kTestChunkBytes / 0.02e9;
  EXPECT_GE(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(), expected);
  expect_saved(*job, "a", state);
}

TEST_F(DeviceSave, jobs_that_share_a_small_ring_end) {
  use_ring_of(9);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int number = 0; number < 3; ++number) {
    const std::uint64_t seed = random_();
    threads.emplace_back([&, number, seed] {
      std::mt19937_64 random(seed);
      for (int round = 0; round < 6; ++round) {
        DeviceTensors state(random, mixed((10 + random() % 30) * kTestChunkBytes), streams());
        SaveOptions options = options_;
        options.compress = random() % 2 == 0;
        options.device.overflow_fraction = random() % 2 == 0 ? 0.3 : 0;
        const std::string name = std::to_string(number) + "-" + std::to_string(round);
        const auto job = device_job(state, name, options);
        state.produce(random() % 1000);
        job->enqueue(*state.mark());
        start(job);
        finish(*job);
        std::vector<Bytes> loaded;
        run(load_all_job({name, state.layout(), job->chunk_table()}, loaded, state.values()));
        wrong += loaded == state.values().bytes ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// Two snapshots of one state, taken one after the other while the first is still being written.
TEST_F(DeviceSave, a_second_save_before_the_first_has_ended) {
  use_ring_of(30);
  DeviceTensors state = tensors(on_one(80 * kTestChunkBytes));
  const Tensors first_values = state.values();
  const auto first = device_job(state, "first");
  state.produce(500);
  first->enqueue(*state.mark());
  start(first);
  fence(*first);
  for (Bytes& bytes : state.values().bytes) {
    for (std::uint8_t& byte : bytes) byte ^= 0x55;
  }
  const auto second = device_job(state, "second");
  save_behind_fence(state, second);
  finish(*first);
  expect_saved(*second, "second", state);
  expect_file_holds({"first", state.layout(), first->chunk_table()}, first_values);
}

TEST_F(DeviceSave, staged_means_that_sources_may_go) {
  options_.device.overflow_fraction = 0.5;
  use_ring_of(8);
  auto state = std::make_unique<DeviceTensors>(random_, on_one(60 * kTestChunkBytes), streams());
  const Tensors values = state->values();
  const auto layout = state->layout();
  const auto job = device_job(*state, "a");
  state->produce(1000);
  job->enqueue(*state->mark());
  start(job);
  ASSERT_TRUE(job->wait_staged(kPatience));
  ASSERT_TRUE(job->staged());
  state.reset();  // overwrites the memory, and without a fence
  finish(*job);
  expect_file_holds({"a", layout, job->chunk_table()}, values);
}

TEST_F(DeviceSave, books_tell_what_devices_did) {
  DeviceTensors state = tensors(mixed());
  options_.trace = true;
  const auto job = device_job(state, "a");
  save_behind_fence(state, job);
  const StageTotals totals = job->totals();
  const auto nbytes = [&](Stage stage) { return totals.nbytes[static_cast<std::size_t>(stage)]; };
  const DeviceStats stats = job->device_stats();
  EXPECT_EQ(nbytes(Stage::kDeviceCopy), stats.copied_bytes);
  EXPECT_EQ(nbytes(Stage::kGather), stats.gathered_bytes);
  EXPECT_EQ(nbytes(Stage::kDeviceDigest), stats.digested_bytes);
  EXPECT_EQ(job->bytes_done(), state.layout()->payload_bytes);
}

TEST_F(DeviceSave, kernels_gather_and_digest_what_is_on_one_device) {
  if (cuda::Kernels::of(cuda::Device::of(0)) == nullptr) GTEST_SKIP() << "no kernels";
  DeviceTensors state = tensors(on_one());
  const auto job = device_job(state, "a");
  save_behind_fence(state, job);
  const DeviceStats stats = job->device_stats();
  EXPECT_EQ(stats.no_kernels, "");
  EXPECT_EQ(stats.digested_bytes, stats.copied_bytes);
  EXPECT_GT(stats.gathered_bytes, 60000u);
  EXPECT_EQ(job->totals().count[static_cast<std::size_t>(Stage::kDigest)], 0u) << "the host digested";
  expect_saved(*job, "a", state);
}

TEST_F(DeviceSave, digests_of_the_host_are_the_same) {
  options_.device.digests = false;
  expect_right(mixed(), "a");
}

TEST_F(DeviceSave, more_packed_chunks_than_the_scratch_holds) {
  std::vector<Where> where;
  for (int i = 0; i < 40; ++i) where.push_back({0, 30000 + random_() % 35000});
  use_ring_of(40);
  options_.device.scratch_bytes = 7 * kTestChunkBytes;
  for (const double fraction : {0.0, 0.5}) {
    options_.device.overflow_fraction = fraction;
    expect_right(where, std::to_string(fraction));
  }
}

TEST_F(DeviceSave, a_job_that_is_never_started_gives_everything_back) {
  ring_->register_with(cuda::Device::of(0));
  {
    DeviceTensors state = tensors(on_one(100 * kTestChunkBytes));
    const auto job = device_job(state, "a");
    state.produce(2000);
    job->enqueue(*state.mark());
    EXPECT_LT(ring_->free_count(), ring_->slot_count());
  }
  EXPECT_EQ(ring_->free_count(), ring_->slot_count());
}

TEST_F(DeviceSave, cancelling_at_any_moment_ends_the_job) {
  use_ring_of(20);
  int cancelled = 0;
  for (int round = 0; round < 24; ++round) {
    options_.device.overflow_fraction = round % 2 == 0 ? 0.5 : 0;
    DeviceTensors state = tensors(mixed(60 * kTestChunkBytes));
    const auto job = device_job(state, std::to_string(round));
    state.produce(random_() % 3000);
    job->enqueue(*state.mark());
    start(job);
    std::this_thread::sleep_for(std::chrono::microseconds(random_() % 6000));
    job->cancel();
    try {
      finish(*job);
    } catch (const CancelledError&) {
      ++cancelled;
    }
    EXPECT_TRUE(job->device_drained());
    EXPECT_EQ(ring_->free_count(), ring_->slot_count()) << "round " << round;
  }
  EXPECT_GT(cancelled, 0);
}

// A process that saves for the first time, and was not prepared.
class DeviceUnprepared : public DeviceSave {
 protected:
  void SetUp() override {
    ASSERT_NE(cuda::Driver::get(), nullptr) << cuda::Driver::absence();
    streams()[0] = SNAPSTONE_FAKE(fakecuda_stream)(0);
    options_.device.drain_patience = kPatience;
  }
};

TEST_F(DeviceUnprepared, DISABLED_first_save) {
  for (const char* name : {"first", "second"}) {
    const bool first = name == std::string("first");
    DeviceTensors state(random_, on_one(30 * kTestChunkBytes), {{0, streams()[0]}});
    const auto job = device_job(state, name);
    state.produce(1000);
    job->enqueue(*state.mark());
    EXPECT_EQ(job->snapshot_enqueued(), !first);
    EXPECT_EQ(fake_counter("cuModuleLoadData") == 0, first) << "the caller loaded kernels";
    EXPECT_EQ(ring_->registered(), !first);
    run(job);
    EXPECT_EQ(job->device_stats().digested_bytes == 0, first);
    EXPECT_EQ(job->device_stats().no_kernels == "", !first);
    EXPECT_EQ(fake_counter("unregistered_copies"), 0u);
    expect_saved(*job, name, state);
  }
}

TEST_F(DeviceUnprepared, DISABLED_prepared_save) {
  prepare_device(0, *ring_);
  const std::vector<const char*> slow = {"cuMemHostRegister_v2", "cuModuleLoadData", "cuStreamCreateWithPriority"};
  std::map<std::string, std::uint64_t> before;
  for (const char* call : slow) before[call] = fake_counter(call);
  EXPECT_TRUE(ring_->registered());
  DeviceTensors state(random_, on_one(10 * kTestChunkBytes), {{0, streams()[0]}});
  const auto job = device_job(state, "a");
  state.produce(1000);
  job->enqueue(*state.mark());
  EXPECT_TRUE(job->snapshot_enqueued());
  run(job);
  for (const char* call : slow) EXPECT_EQ(fake_counter(call), before[call]) << call;
  EXPECT_EQ(job->device_stats().digested_bytes, job->device_stats().copied_bytes);
  expect_saved(*job, "a", state);
}

TEST(DeviceSaveUnprepared, a_first_save_leaves_to_lanes_what_takes_long_unless_it_was_prepared) {
  for (const char* test : {"DeviceUnprepared.DISABLED_first_save", "DeviceUnprepared.DISABLED_prepared_save"}) {
    const testing::ChildResult child = testing::run_child(test, "FAKECUDA_DEVICES=1");
    EXPECT_EQ(child.status, 0) << child.output;
  }
}

// What a driver may lack or refuse, each in a process of its own, since a process tries its driver once.
TEST(DeviceSaveOnLesserDrivers, is_the_same) {
  const std::string all = "DeviceSave.*:-*slow_rate*:*adjacent*:*more_packed*:*every_rung*:*cancelling*:*jobs*";
  // Without registered memory nothing is enqueued at the call.
  const std::string late = "*mixed*:*small_tensors*:*few_slots*:*compressed*";
  const std::vector<std::pair<std::string, std::string>> lesser = {{"FAKECUDA_HIDE=cuModuleLoadData", all},
                                                                   {"FAKECUDA_FAIL=cuModuleLoadData:1+:222", all},
                                                                   {"FAKECUDA_VERSION=12000", all},
                                                                   {"FAKECUDA_VERSION=12080", all},
                                                                   {"FAKECUDA_POOLS=0", all},
                                                                   {"FAKECUDA_MODE=lazy", all},
                                                                   {"FAKECUDA_MODE=eager", all},
                                                                   {"FAKECUDA_FAIL=cuMemHostRegister_v2:1+:801", late}};
  for (const auto& [environment, filter] : lesser) {
    const testing::ChildResult child = testing::run_child(filter, environment);
    EXPECT_EQ(child.status, 0) << environment << "\n" << child.output;
  }
}

}  // namespace
}  // namespace snapstone::pipeline
