// Loads into memory of devices, on the fake driver: it delays and reorders what streams allow, and finds accesses that
// nothing orders (tests/cuda/fake). Invariants of every load that ends well:
//   - who comes after fence() in the caller's stream finds the saved bytes, and no others around them
//   - what the caller did with the targets before mark() is over when they are written
//   - all slots are back, and no device is still to read from one
#include "pipeline/device_landing.h"

#include "pipeline/chain_fixture.h"
#include "pipeline/device_workspace.h"
#include "pipeline/landing_fixture.h"

namespace snapstone::pipeline {
namespace {

using namespace std::chrono_literals;
using testing::ArmedFaults;

INSTANTIATE_TEST_SUITE_P(Settings, DeviceLoad,
                         ::testing::Values(Setting{"kernels", true, true}, Setting{"host_digests", false, true},
                                           Setting{"kernels_unregistered", true, false},
                                           Setting{"host_digests_unregistered", false, false}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(DeviceLoad, whoever_follows_the_fence_finds_the_saved_bytes_in_any_order_of_streams) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    chaos(testing::seed() + seed);
    const std::vector<DeviceBytes> targets = targets_like(tensors);
    const auto job = load_job(plan_to(saved, targets), "a", options());
    load(job);
    expect_loaded(targets, tensors.bytes);
    const std::uint64_t digested = job->totals().nbytes[static_cast<std::size_t>(Stage::kDeviceDigest)];
    EXPECT_EQ(digested > 0, GetParam().kernels) << digested;
    EXPECT_GE(job->totals().nbytes[static_cast<std::size_t>(Stage::kDeviceCopy)], job->plan().bytes_needed());
    ASSERT_EQ(testing::fake_violations(), "") << "seed " << testing::seed() + seed;
  }
}

TEST_P(DeviceLoad, eager_and_lazy_drivers_give_the_same_bytes) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  for (const char* const mode : {"eager", "lazy"}) {
    SNAPSTONE_FAKE(fakecuda_drain)();
    SNAPSTONE_FAKE(fakecuda_mode)(mode);
    const std::vector<DeviceBytes> targets = targets_like(tensors);
    load(load_job(plan_to(saved, targets), "a", options()));
    expect_loaded(targets, tensors.bytes);
  }
}

TEST_P(DeviceLoad, random_boxes_get_what_a_naive_copy_gives_and_nothing_around_them) {
  for (int round = 0; round < 15; ++round) {
    std::vector<RandomBox> boxes;
    Sizes sizes;
    for (int i = 0; i < 6; ++i) {
      boxes.push_back(random_box(i % 2 == 0 ? 20000 : 5 * static_cast<std::int64_t>(kTestChunkBytes)));
      sizes.push_back(boxes.back().shard_nbytes());
    }
    const Tensors tensors = Tensors::random(random_, sizes);
    const Saved saved = save(tensors, std::to_string(round), {.compress = round % 3 == 2});
    LoadPlan plan = plan_of(saved);
    std::vector<DeviceBytes> targets;
    std::vector<Bytes> expected;
    for (std::size_t i = 0; i < boxes.size(); ++i) {
      const RandomBox& box = boxes[i];
      targets.emplace_back(0, caller(0), static_cast<std::uint64_t>(box.memory_nbytes));
      fill(0, targets.back(), kBefore);
      expected.emplace_back(box.memory_nbytes, kBefore);
      box.for_each_element([&](std::int64_t string, std::int64_t memory) {
        std::copy_n(tensors.bytes[i].begin() + string, box.item_bytes, expected[i].begin() + memory);
      });
      plan.add_box(shard_of(saved, i, sizes[i]),
                   {box.shard_sizes, box.offsets, {targets[i].data(), box.item_bytes, box.sizes, box.strides}}, {}, 0);
    }
    load(load_job(std::move(plan), saved.name, options()));
    expect_loaded(targets, expected);
  }
}

struct Strided {
  const char* name;
  std::vector<std::int64_t> sizes, strides;  // bytes
  std::int64_t item_bytes;
  std::uint64_t memory_nbytes;
};

// Row-major strings of the sizes, into such memory.
TEST_P(DeviceLoad, strided_targets_of_every_kind_are_filled) {
  const std::vector<Strided> kinds = {
      {"rows with gaps", {300, 1000}, {1040, 1}, 1, 300 * 1040},
      {"short rows with gaps", {3000, 20}, {60, 2}, 2, 3000 * 60},
      {"a column", {5000, 1}, {48, 4}, 4, 5000 * 48},
      {"columns", {5000, 3}, {48, 4}, 4, 5000 * 48},
      {"transposed", {400, 300}, {2, 800}, 2, 400 * 300 * 2},
      {"transposed with gaps", {400, 300}, {2, 832}, 2, 300 * 832},
      {"transposed blocks", {40, 50, 60}, {4, 4 * 40 * 60, 4 * 40}, 4, 4 * 40 * 50 * 60},
      {"every other item", {20000}, {16}, 8, 20000 * 16},
      {"gaps in two dimensions", {50, 60, 8}, {9000, 140, 2}, 2, 50 * 9000},
      {"one element", {1}, {8}, 8, 8},
      {"no dimension", {}, {}, 8, 8},
      {"nothing", {0, 5}, {5, 1}, 1, 8},
  };
  Sizes sizes;
  for (const Strided& kind : kinds) {
    std::uint64_t nbytes = static_cast<std::uint64_t>(kind.item_bytes);
    for (const std::int64_t size : kind.sizes) nbytes *= static_cast<std::uint64_t>(size);
    sizes.push_back(nbytes);
  }
  const Tensors tensors = Tensors::random(random_, sizes);
  const Saved saved = save(tensors, "a");
  LoadPlan plan = plan_of(saved);
  std::vector<DeviceBytes> targets;
  std::vector<Bytes> expected;
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    const Strided& kind = kinds[i];
    targets.emplace_back(0, caller(0), kind.memory_nbytes);
    fill(0, targets.back(), kBefore);
    expected.emplace_back(kind.memory_nbytes, kBefore);
    const std::vector<std::int64_t> zeros(kind.sizes.size());
    scatter(tensors.bytes[i].data(), 0, static_cast<std::int64_t>(sizes[i]),
            {kind.sizes, zeros, {expected[i].data(), kind.item_bytes, kind.sizes, kind.strides}});
    plan.add_box(shard_of(saved, i, sizes[i]),
                 {kind.sizes, zeros, {targets[i].data(), kind.item_bytes, kind.sizes, kind.strides}}, {}, 0);
  }
  load(load_job(std::move(plan), "a", options()));
  for (std::size_t i = 0; i < kinds.size(); ++i) EXPECT_EQ(as_caller_sees(0, targets[i]), expected[i]) << kinds[i].name;
}

TEST_P(DeviceLoad, chunks_that_hosts_and_devices_share_reach_all_of_them) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    chaos(testing::seed() + seed);
    // Small tensors share a chunk; each tensor goes to a place of its own, and the large one to all of them.
    LoadPlan plan = plan_of(saved);
    std::vector<DeviceBytes> on_device;
    std::vector<int> ordinals;
    std::vector<Bytes> on_host(tensors.bytes.size() + 1);
    std::vector<std::size_t> tensor_of;
    for (std::size_t i = 0; i < tensors.bytes.size(); ++i) {
      for (int place = -1; place < kDevices; ++place) {
        const std::size_t nbytes = tensors.bytes[i].size();
        if (i != 3 && static_cast<int>((i + seed) % (kDevices + 1)) != place + 1) continue;
        if (place < 0) {
          on_host[i].resize(nbytes);
          plan.add_contiguous(shard_of(saved, i, nbytes), on_host[i].data());
        } else {
          on_device.emplace_back(place, caller(place), nbytes);
          ordinals.push_back(place);
          tensor_of.push_back(i);
          fill(place, on_device.back(), kBefore);
          plan.add_contiguous(shard_of(saved, i, nbytes), on_device.back().data(), {}, place);
        }
      }
    }
    load(load_job(std::move(plan), "a", options()));
    for (std::size_t i = 0; i < on_device.size(); ++i) {
      EXPECT_EQ(as_caller_sees(ordinals[i], on_device[i]), tensors.bytes[tensor_of[i]]);
    }
    for (std::size_t i = 0; i < tensors.bytes.size(); ++i) {
      EXPECT_TRUE(on_host[i].empty() || on_host[i] == tensors.bytes[i]);
    }
  }
}

TEST_P(DeviceLoad, several_devices_are_loaded_at_once) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  LoadPlan plan = plan_of(saved);
  std::vector<std::vector<DeviceBytes>> targets;
  for (int ordinal = 0; ordinal < kDevices; ++ordinal) {
    targets.push_back(targets_like(tensors, ordinal));
    for (std::size_t i = 0; i < targets.back().size(); ++i) {
      if (static_cast<int>(i % kDevices) != ordinal) continue;
      plan.add_contiguous(shard_of(saved, i, tensors.bytes[i].size()), targets.back()[i].data(), {}, ordinal);
    }
  }
  load(load_job(std::move(plan), "a", options()));
  for (int ordinal = 0; ordinal < kDevices; ++ordinal) {
    for (std::size_t i = 0; i < tensors.bytes.size(); ++i) {
      const Bytes untouched(tensors.bytes[i].size(), kBefore);
      const bool wanted = static_cast<int>(i % kDevices) == ordinal;
      EXPECT_EQ(as_caller_sees(ordinal, targets[static_cast<std::size_t>(ordinal)][i]),
                wanted ? tensors.bytes[i] : untouched);
    }
  }
}

TEST_P(DeviceLoad, compressed_chunks_are_loaded) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a", {.compress = true});
  ASSERT_TRUE(
      std::any_of(saved.table.begin(), saved.table.end(), [](const auto& record) { return record.codec != 0; }));
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    chaos(testing::seed() + seed);
    const std::vector<DeviceBytes> targets = targets_like(tensors);
    load(load_job(plan_to(saved, targets), "a", options()));
    expect_loaded(targets, tensors.bytes);
  }
}

TEST_P(DeviceLoad, tied_targets_all_get_the_bytes) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a", {.compress = true});
  LoadPlan plan = plan_of(saved);
  std::vector<DeviceBytes> targets;
  for (int i = 0; i < 5; ++i) {
    targets.emplace_back(0, caller(0), tensors.bytes[3].size());
    plan.add_contiguous(shard_of(saved, 3, tensors.bytes[3].size()), targets.back().data(), {}, 0);
  }
  load(load_job(std::move(plan), "a", options()));
  expect_loaded(targets, std::vector<Bytes>(5, tensors.bytes[3]));
}

TEST_P(DeviceLoad, thousands_of_tiny_targets_in_one_chunk_are_loaded) {
  const Tensors tensors = Tensors::random(random_, Sizes(900, 7));
  const Saved saved = save(tensors, "a");
  const DeviceBytes memory(0, caller(0), 20 * 900 * 8);
  fill(0, memory, kBefore);
  Bytes expected(memory.nbytes(), kBefore);
  LoadPlan plan = plan_of(saved);
  for (std::size_t copy = 0; copy < 20; ++copy) {  // more pieces than the table of a batch holds
    for (std::size_t i = 0; i < 900; ++i) {
      const std::size_t at = (copy * 900 + i) * 8;
      plan.add_contiguous(shard_of(saved, i, 7), memory.data() + at, {}, 0);
      std::copy(tensors.bytes[i].begin(), tensors.bytes[i].end(), expected.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
  load(load_job(std::move(plan), "a", options()));
  EXPECT_EQ(as_caller_sees(0, memory), expected);
}

TEST_P(DeviceLoad, a_wrong_byte_is_named_and_never_reaches_its_target) {
  const Tensors tensors = some_tensors();
  for (int round = 0; round < 10; ++round) {
    const std::string name = std::to_string(round);
    const Saved saved = save(tensors, name, {.compress = round % 3 == 2});
    const std::uint64_t bad = random_() % saved.table.size();
    flip(name, saved.table[bad].offset + random_() % saved.table[bad].stored_bytes);
    const std::vector<DeviceBytes> targets = targets_like(tensors);
    const auto job = load_job(plan_to(saved, targets), name, options());
    job->mark(0, caller(0));
    try {
      run(job);
      FAIL() << "loaded a wrong byte";
    } catch (const CorruptError& error) {
      EXPECT_EQ(error.path(), directory_ / name);
      EXPECT_EQ(error.chunk(), static_cast<std::int64_t>(bad));
      EXPECT_FALSE(error.reason().empty());
    }
    ASSERT_EQ(job->problems().size(), 1u);
    EXPECT_EQ(job->problems()[0].chunk, bad);
    job->fence(0, caller(0));
    const format::ChunkPlan& chunk = saved.layout->chunks[bad];
    for (std::uint32_t i = chunk.first_piece; i < chunk.first_piece + chunk.piece_count; ++i) {
      const format::Piece& piece = saved.layout->pieces[i];
      const Bytes found = as_caller_sees(0, targets[piece.tensor]);
      EXPECT_TRUE(std::all_of(&found[piece.begin], found.data() + piece.end, [](std::uint8_t byte) {
        return byte == kBefore;
      })) << "a byte of the bad chunk reached its target";
    }
    EXPECT_EQ(ring_->free_count(), ring_->slot_count());
  }
}

TEST_P(DeviceLoad, a_failing_read_ends_the_job_and_frees_all_slots) {
  const Tensors tensors = some_tensors(100 * kTestChunkBytes);
  const Saved saved = save(tensors, "a");
  for (const char* const nth : {":1:", ":50:"}) {
    const std::vector<DeviceBytes> targets = targets_like(tensors);
    const auto job = load_job(plan_to(saved, targets), "a", options());
    job->mark(0, caller(0));
    const ArmedFaults faults(read_seam(io::Rung::kBuffered) + nth + "errno=EIO");
    EXPECT_EQ(testing::errno_of([&] { run(job); }), EIO) << nth;
    EXPECT_EQ(ring_->free_count(), ring_->slot_count());
    job->fence(0, caller(0));
  }
}

TEST_P(DeviceLoad, a_ring_of_one_slot_is_enough) {
  const Tensors tensors = some_tensors();
  const Saved plain = save(tensors, "a");
  const Saved coded = save(tensors, "b", {.compress = true});
  for (const std::uint64_t slots : {1, 2, 3}) {
    use_ring(slots, GetParam().registered);
    for (const Saved* saved : {&plain, &coded}) {
      const std::vector<DeviceBytes> targets = targets_like(tensors);
      load(load_job(plan_to(*saved, targets), saved->name, options()));
      expect_loaded(targets, tensors.bytes);
    }
  }
}

TEST_P(DeviceLoad, verification_can_be_turned_off) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  flip("a", saved.table[0].offset);
  const std::vector<DeviceBytes> targets = targets_like(tensors);
  LoadOptions unverified = options();
  unverified.verify = false;
  load(load_job(plan_to(saved, targets), "a", unverified));
  std::vector<Bytes> expected = tensors.bytes;
  expected[0][0] ^= 0x10;
  expect_loaded(targets, expected);
}

TEST_P(DeviceLoad, settled_says_when_targets_may_go) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  const std::vector<DeviceBytes> targets = targets_like(tensors);
  const auto job = load_job(plan_to(saved, targets), "a", options());
  job->mark(0, caller(0));
  run(job);
  while (!job->settled()) std::this_thread::sleep_for(100us);
  for (std::size_t i = 0; i < targets.size(); ++i) EXPECT_EQ(targets[i].read(), tensors.bytes[i]);
}

TEST_P(DeviceLoad, a_stream_that_is_captured_into_a_graph_is_refused) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "a");
  const std::vector<DeviceBytes> targets = targets_like(tensors);
  const auto job = load_job(plan_to(saved, targets), "a", options());
  SNAPSTONE_FAKE(fakecuda_drain)();
  ASSERT_EQ(SNAPSTONE_FAKE(fakecuda_capture)(0, caller(0), 1), 0);
  EXPECT_THROW(job->mark(0, caller(0)), std::logic_error);
  run(job);  // lanes are not disturbed by somebody's capture, nor disturb it
  EXPECT_THROW(job->fence(0, caller(0)), std::logic_error);
  ASSERT_EQ(SNAPSTONE_FAKE(fakecuda_capture)(0, caller(0), 0), 0);
  job->fence(0, caller(0));
  expect_loaded(targets, tensors.bytes);
}

class DeviceLoadAhead : public DeviceLoadTest {};

// Of training steps, say: targets are written when those are over, but the chunks are there and verified by then.
TEST_F(DeviceLoadAhead, the_host_does_not_wait_for_what_the_caller_has_enqueued) {
  use_ring(16, true);
  const Tensors tensors = some_tensors(4 * kTestChunkBytes);
  const Saved saved = save(tensors, "a");
  LoadOptions roomy = options();
  roomy.landing.batch_bytes = 4 << 20;
  const std::vector<DeviceBytes> targets = targets_like(tensors);
  SNAPSTONE_FAKE(fakecuda_enqueue_delay)(0, caller(0), 1'000'000);
  const auto job = load_job(plan_to(saved, targets), "a", roomy);
  job->mark(0, caller(0));
  run(job);
  EXPECT_FALSE(job->settled()) << "targets are in use for a second";
  EXPECT_EQ(ring_->free_count(), ring_->slot_count());
  job->fence(0, caller(0));
  expect_loaded(targets, tensors.bytes);
  EXPECT_TRUE(job->settled());
}

TEST_F(DeviceLoadAhead, a_registered_ring_makes_no_slow_copy) {
  use_ring(16, true);
  const Tensors tensors = some_tensors();
  for (const bool compress : {false, true}) {
    const Saved saved = save(tensors, compress ? "zstd" : "raw", {.compress = compress});
    const std::vector<DeviceBytes> targets = targets_like(tensors);
    load(load_job(plan_to(saved, targets), saved.name, options()));
    expect_loaded(targets, tensors.bytes);
  }
  EXPECT_EQ(testing::fake_counter("unregistered_copies"), 0u);
}

// In a process of its own: its first workspace was made for a save, with less memory than the batch may need.
TEST_F(DeviceLoadTest, DISABLED_a_batch_fits_into_the_workspace_that_it_gets) {
  use_ring(16, true);
  prepare_device(0, *ring_);
  const Tensors tensors = Tensors::random(random_, {120 * kTestChunkBytes});
  const Saved saved = save(tensors, "a");
  const std::vector<DeviceBytes> targets = targets_like(tensors);
  LoadPlan plan = plan_to(saved, targets);
  plan.finish(kTestChunkBytes);
  LaneBooks books(0, false);
  cuda::Stream stream = cuda::Stream::borrowed(device(), caller(0));
  LandingBatch batch(plan, 0, nullptr, 8 << 20, books);
  for (const ReadChunk& chunk : plan.chunks()) {
    ASSERT_TRUE(batch.add({&chunk, tensors.bytes[0].data() + chunk.chunk * kTestChunkBytes, nullptr, false}));
  }
  EXPECT_EQ(batch.submit(stream), tensors.bytes[0].size());
  while (!batch.free()) batch.advance(stream, {});
  EXPECT_EQ(testing::fake_counter("unregistered_copies"), 0u) << "beyond the workspace's memory";
  expect_loaded(targets, tensors.bytes);
}

TEST_F(DeviceLoadTest, a_batch_fits_into_the_workspace_that_it_gets) {
  const testing::ChildResult child =
      testing::run_child("DeviceLoadTest.DISABLED_a_batch_fits_into_the_workspace_that_it_gets", "FAKECUDA_SEED=1");
  EXPECT_EQ(child.status, 0) << child.output;
}

class DeviceLoadDrivers : public DeviceLoadTest {};

// In processes of their own: what a driver has is learnt once.
TEST_F(DeviceLoadDrivers, older_and_poorer_ones_load_the_same) {
  const std::vector<std::string> drivers = {
      "FAKECUDA_VERSION=12000",
      "FAKECUDA_VERSION=12080",
      "FAKECUDA_HIDE=cuModuleLoadData",         // no kernels
      "FAKECUDA_FAIL=cuModuleLoadData:1+:222",  // that this driver cannot compile
      "FAKECUDA_CC=75",
      "FAKECUDA_POOLS=0",                    // no stream-ordered memory
      "FAKECUDA_FAIL=cuMemAllocAsync:1+:2",  // no memory at all
      "FAKECUDA_FAIL=cuMemAllocAsync:3+:2",  // for two batches only
      "FAKECUDA_FAIL=cuMemHostRegister_v2:1+:800",
  };
  for (const std::string& driver : drivers) {
    const testing::ChildResult child = testing::run_child("*DeviceLoadDrivers.DISABLED_any", driver);
    EXPECT_EQ(child.status, 0) << driver << "\n" << child.output;
    EXPECT_NE(child.output.find("[  PASSED  ] 1 test."), std::string::npos) << driver << "\n" << child.output;
  }
}

TEST_F(DeviceLoadDrivers, DISABLED_any) {
  const Tensors tensors = some_tensors();
  for (int round = 0; round < 6; ++round) {
    const Saved saved = save(tensors, std::to_string(round), {.compress = round % 2 == 1});
    const std::vector<DeviceBytes> targets = targets_like(tensors);
    LoadPlan plan = plan_of(saved);
    for (std::size_t i = 0; i < targets.size(); ++i) {
      if (i != 1) plan.add_contiguous(shard_of(saved, i, targets[i].nbytes()), targets[i].data(), {}, 0);
    }
    const StridedView by_columns{targets[1].data(), 2, {20, 25}, {2, 40}};
    plan.add_box(shard_of(saved, 1, 1000), {{20, 25}, {0, 0}, by_columns}, {}, 0);
    std::vector<Bytes> expected = tensors.bytes;
    scatter(tensors.bytes[1].data(), 0, 1000, {{20, 25}, {0, 0}, {expected[1].data(), 2, {20, 25}, {2, 40}}});
    load(load_job(std::move(plan), saved.name, options()));
    expect_loaded(targets, expected);
  }
}

}  // namespace
}  // namespace snapstone::pipeline
