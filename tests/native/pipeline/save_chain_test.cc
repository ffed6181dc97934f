// Saves that store chunks as differences from an earlier save: every one of a row of saves gives back its bytes, from
// files of its own and those before it.
#include <cmath>

#include "pipeline/save_chain_fixture.h"

namespace snapstone::pipeline {
namespace {

using testing::ArmedFaults;

class SaveChainOnRung : public SaveChainTest, public ::testing::WithParamInterface<io::Rung> {
 protected:
  void SetUp() override {
    if (!rung_works(GetParam())) GTEST_SKIP() << io::try_rung(directory_.directory(), GetParam());
  }
};
INSTANTIATE_TEST_SUITE_P(Rungs, SaveChainOnRung, all_rungs(), rung_test_name);

TEST_P(SaveChainOnRung, every_save_of_a_row_gives_back_its_bytes) {
  Tensors tensors = model();
  Stored stored;
  for (int step = 0; step < 7; ++step) {
    SaveOptions options = differences(tensors, 3);
    options.rung = GetParam();
    stored = save_on(stored, tensors, std::to_string(step), options);
    expect_loads(stored, tensors);
    EXPECT_EQ(codecs(stored, tensors, 0)[kXor4] > 0, step % 3 != 0) << "a keyframe every 3 records, step " << step;
    EXPECT_LE(longest_chain(stored), 3u);
    train(tensors);
  }
}

TEST_F(SaveChainTest, differences_are_smaller_than_keyframes) {
  Tensors tensors = model();
  const Stored base = save_on({}, tensors, "base", differences(tensors));
  train(tensors);
  save_on(base, tensors, "xor", differences(tensors));
  save_on(base, tensors, "key", differences(tensors, 1));
  EXPECT_LT(file_bytes("xor").size(), file_bytes("key").size() * 9 / 10);
}

TEST_F(SaveChainTest, what_did_not_change_keeps_its_chain) {
  Tensors tensors = model();
  const Stored first = save_on({}, tensors, "0", differences(tensors));
  train(tensors);
  const Stored second = save_on(first, tensors, "1", differences(tensors));
  ASSERT_GT(second.references, 0u);
  for (const bool compress : {true, false}) {
    const std::string name = compress ? "same" : "same-raw";
    const Stored same = save_on(second, tensors, name, compress ? differences(tensors) : SaveOptions{});
    EXPECT_TRUE(file_bytes(name).empty());
    EXPECT_EQ(same.references, second.references);
    expect_loads(same, tensors);
  }
  // Some chunks change, others stay: chains of different lengths in one table.
  each_float(tensors.bytes[1], [&](float value) { return value * (1 + 1e-4f * normal_(random_)); });
  const Stored mixed = save_on(second, tensors, "mixed", differences(tensors));
  EXPECT_EQ(longest_chain(mixed), 3u);
  EXPECT_GT(mixed.references, second.references);
  expect_loads(mixed, tensors);
}

TEST_F(SaveChainTest, only_chunks_of_one_floating_point_tensor_become_differences) {
  Tensors tensors = model();
  const Stored base = save_on({}, tensors, "base", differences(tensors));
  train(tensors);
  const Stored stored = save_on(base, tensors, "a", differences(tensors));
  EXPECT_GT(codecs(stored, tensors, 0)[kXor4], 0);
  EXPECT_GT(codecs(stored, tensors, 2)[static_cast<int>(codec::Codec::kXorZstdPlanes2)], 0);
  for (const std::size_t tensor : {3, 4, 5, 6}) {
    for (const auto& [codec, count] : codecs(stored, tensors, tensor)) {
      EXPECT_LE(codec, static_cast<int>(codec::Codec::kZstd)) << "tensor " << tensor;
    }
  }
}

TEST_F(SaveChainTest, what_does_not_pay_is_a_keyframe_or_raw) {
  Tensors tensors = model();
  const Stored base = save_on({}, tensors, "base", differences(tensors));
  // Other values altogether: the planes are smaller than any difference.
  for (const std::size_t i : {0, 1}) {
    each_float(tensors.bytes[i], [&](float) { return normal_(random_) * 0.02f; });
  }
  for (std::uint8_t& byte : tensors.bytes[2]) byte = static_cast<std::uint8_t>(random_());
  const Stored stored = save_on(base, tensors, "a", differences(tensors));
  const auto chunks = static_cast<int>(tensors.layout()->places[0].chunk_count);
  EXPECT_EQ(codecs(stored, tensors, 0)[kPlanes4], chunks);
  EXPECT_EQ(codecs(stored, tensors, 2)[0], static_cast<int>(tensors.layout()->places[2].chunk_count));
  EXPECT_EQ(stored.references, 0u);
  expect_loads(stored, tensors);
}

TEST_F(SaveChainTest, a_base_of_which_nothing_is_known_or_that_is_not_open_gives_keyframes) {
  Tensors tensors = model();
  const Stored saved = save_on({}, tensors, "base", differences(tensors));
  train(tensors);
  for (const bool open : {true, false}) {
    SaveBase base = base_of(saved);
    if (open) std::ranges::fill(base.record_of_chunk, SaveBase::kNoRecord);
    if (!open) base.files.clear();
    os::File file = os::create_file(directory_.fd(), directory_.path(), open ? "none" : "closed", false);
    const auto job = std::make_shared<SaveJob>(tensors.layout(), tensors.sources(), std::move(file), ring_,
                                               differences(tensors), std::move(base));
    run(job);
    EXPECT_EQ(job->chunk_table().size(), tensors.layout()->chunks.size());
    EXPECT_EQ(job->unreadable_references(), 0u);
  }
}

TEST_F(SaveChainTest, a_chunk_of_the_base_that_is_wrong_is_not_built_upon) {
  Tensors tensors = model();
  const Stored first = save_on({}, tensors, "0", differences(tensors));
  train(tensors);
  const Stored second = save_on(first, tensors, "1", differences(tensors));
  train(tensors);
  const std::uint64_t bad = tensors.layout()->places[0].first_chunk + 2;
  ASSERT_EQ(second.table[bad].codec, kXor4);
  const std::uint64_t expected = save_on(second, tensors, "good", differences(tensors)).references;
  const auto check = [&](const std::string& name, std::uint64_t unreadable) {
    const auto job = job_on(second, tensors, name, differences(tensors));
    run(job);
    EXPECT_EQ(job->unreadable_references(), unreadable);
    EXPECT_EQ(job->chunk_table()[bad].codec, kPlanes4);
    EXPECT_EQ(job->chunk_table()[bad].file, 0u);
    EXPECT_EQ(job->chunk_table().size() - tensors.layout()->chunks.size(), expected - 2 * unreadable);
    return result_of(*job, second, name, tensors);
  };
  flip("0", first.table[bad].offset + 100);
  const Stored stored = check("flipped", 1);
  flip("0", first.table[bad].offset + 100);
  expect_loads(stored, tensors);
  flip("1", second.table[bad].offset);
  check("not-a-frame", 1);
  flip("1", second.table[bad].offset);
  expect_loads(save_on(second, tensors, "healed", differences(tensors)), tensors);
}

TEST_F(SaveChainTest, a_base_that_cannot_be_read_does_not_fail_the_save) {
  Tensors tensors = model();
  const Stored base = save_on({}, tensors, "base", differences(tensors));
  train(tensors);
  const auto job = job_on(base, tensors, "a", differences(tensors));
  {
    const ArmedFaults faults("pread:1+:errno=EIO");
    run(job);
  }
  EXPECT_GT(job->unreadable_references(), 10u);
  EXPECT_EQ(job->chunk_table().size(), tensors.layout()->chunks.size()) << "no references";
  expect_loads(result_of(*job, base, "a", tensors), tensors);
}

TEST_F(SaveChainTest, the_file_and_the_table_do_not_depend_on_the_ring) {
  Tensors tensors = model();
  const Stored base = save_on({}, tensors, "base", differences(tensors));
  train(tensors);
  std::vector<std::vector<std::uint8_t>> tables;
  for (const std::uint64_t slots : {1, 2, 50}) {
    ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
    ring_->reserve(slots);
    const std::string name = std::to_string(slots);
    const Stored stored = save_on(base, tensors, name, differences(tensors));
    EXPECT_EQ(file_bytes(name), file_bytes("1"));
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(stored.table.data());
    tables.emplace_back(bytes, bytes + stored.table.size() * sizeof(format::ChunkRecord));
    EXPECT_EQ(tables.back(), tables.front());
  }
}

TEST_F(SaveChainTest, encoding_is_timed_for_each_chunk_that_was_encoded) {
  Tensors tensors = model();
  const Stored base = save_on({}, tensors, "base", differences(tensors));
  each_float(tensors.bytes[1], [&](float value) { return value * (1 + 1e-4f * normal_(random_)); });
  const auto job = job_on(base, tensors, "a", differences(tensors));
  run(job);
  ASSERT_EQ(job->encode_us().size(), tensors.layout()->chunks.size());
  for (std::size_t i = 0; i < job->encode_us().size(); ++i) {
    EXPECT_EQ(job->encode_us()[i] > 0, job->chunk_table()[i].file == 0) << "chunk " << i;
  }
  const auto raw = save_job(tensors, "raw");
  run(raw);
  EXPECT_TRUE(raw->encode_us().empty());
}

TEST_F(SaveChainTest, options_that_do_not_fit_are_refused) {
  const Tensors tensors = model();
  const auto refused = [&](const std::function<void(SaveOptions&)>& change) {
    SaveOptions options = differences(tensors);
    change(options);
    os::File file;
    EXPECT_THROW(SaveJob(tensors.layout(), tensors.sources(), std::move(file), ring_, options), std::invalid_argument);
  };
  refused([](SaveOptions& options) { options.keyframe_every = 0; });
  refused([](SaveOptions& options) { options.keyframe_every = format::kChainRecordsMax + 1; });
  refused([](SaveOptions& options) { options.xor_tensors.pop_back(); });
  refused([](SaveOptions& options) { options.item_bytes.pop_back(); });
}

TEST_F(SaveChainTest, a_base_whose_references_lead_nowhere_or_back_is_refused) {
  Tensors tensors = model();
  const Stored first = save_on({}, tensors, "0", differences(tensors));
  train(tensors);
  const Stored second = save_on(first, tensors, "1", differences(tensors));
  const auto refused = [&](const std::function<void(SaveBase&)>& change) {
    SaveBase base = base_of(second);
    change(base);
    EXPECT_THROW(SaveJob(tensors.layout(), tensors.sources(), {}, ring_, differences(tensors), std::move(base)),
                 std::invalid_argument);
  };
  const auto referring = static_cast<std::size_t>(
      std::ranges::find_if(second.table, [](const auto& record) { return codec::is_xor_codec(record.codec); }) -
      second.table.begin());
  ASSERT_LT(referring, second.table.size());
  refused([&](SaveBase& base) { base.references[referring] = SaveBase::kNoRecord; });
  refused([&](SaveBase& base) { base.references[referring] = static_cast<std::uint32_t>(referring); });
  refused([&](SaveBase& base) { base.references[referring] = static_cast<std::uint32_t>(base.records.size()); });
  refused([&](SaveBase& base) { base.references.back() = 0; });
  refused([&](SaveBase& base) { base.references.pop_back(); });
  refused([&](SaveBase& base) { base.record_of_chunk.back() = static_cast<std::uint32_t>(base.records.size()); });
  refused([&](SaveBase& base) { base.record_of_chunk.pop_back(); });
}

}  // namespace
}  // namespace snapstone::pipeline
