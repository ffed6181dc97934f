// Saves that store chunks as differences from an earlier save: every one of a row of saves gives back its bytes, from
// files of its own and those before it.
#include <cmath>
#include <functional>
#include <map>
#include <numeric>

#include "pipeline/pipeline_fixture.h"

namespace snapstone::pipeline {
namespace {

using testing::ArmedFaults;

// A table and the files that it counts.
struct Stored {
  std::vector<std::string> files;
  std::vector<format::ChunkRecord> table;
  std::uint64_t references = 0;
};

class SaveChainTest : public PipelineTest {
 protected:
  // Two tensors of 4-byte floats, one of 2-byte items, one of integers, and small ones that are packed.
  Tensors model() {
    Tensors tensors;
    for (const std::uint64_t nbytes : {10 * kTestChunkBytes + 12344, 3 * kTestChunkBytes}) {
      tensors.bytes.push_back(Bytes(nbytes));
      each_float(tensors.bytes.back(), [&](float) { return normal_(random_) * 0.02f; });
    }
    tensors.bytes.push_back(random_bytes(random_, 3 * kTestChunkBytes + 10));
    tensors.bytes.push_back(random_bytes(random_, 2 * kTestChunkBytes));
    for (const std::uint64_t nbytes : {77, 4096, 1000}) tensors.bytes.push_back(random_bytes(random_, nbytes));
    return tensors;
  }
  static SaveOptions differences(const Tensors& tensors, std::uint64_t keyframe_every = 8) {
    SaveOptions options{.compress = true, .zstd_level = 1, .keyframe_every = keyframe_every};
    options.item_bytes.assign(tensors.bytes.size(), 4);
    options.xor_tensors.assign(tensors.bytes.size(), 1);
    options.item_bytes[2] = 2;
    options.item_bytes[3] = 1;
    options.xor_tensors[3] = 0;
    return options;
  }
  static void each_float(Bytes& bytes, const std::function<float(float)>& change) {
    for (std::size_t i = 0; i + sizeof(float) <= bytes.size(); i += sizeof(float)) {
      float value;
      std::memcpy(&value, &bytes[i], sizeof value);
      value = change(value);
      std::memcpy(&bytes[i], &value, sizeof value);
    }
  }
  // One step: relative changes of about 1e-4 in the floats, single bytes elsewhere.
  void train(Tensors& tensors, std::size_t floats = 2) {
    for (std::size_t i = 0; i < floats; ++i) {
      each_float(tensors.bytes[i], [&](float value) { return value * (1 + 1e-4f * normal_(random_)); });
    }
    for (std::size_t i = 2; i < tensors.bytes.size(); ++i) tensors.bytes[i][random_() % tensors.bytes[i].size()] ^= 1;
  }

  // Numbers of files move up by one: 0 becomes the new save's.
  SaveBase base_of(const Stored& stored) const {
    SaveBase base;
    base.records = stored.table;
    for (format::ChunkRecord& record : base.records) ++record.file;
    base.references = format::chunk_references(stored.table, stored.references);
    base.references.resize(base.records.size(), SaveBase::kNoRecord);
    base.record_of_chunk.resize(stored.table.size() - stored.references);
    std::iota(base.record_of_chunk.begin(), base.record_of_chunk.end(), 0u);
    base.files.resize(1);
    for (const std::string& name : stored.files) {
      base.files.push_back(os::open_for_read(directory_.fd(), directory_.path(), name, false));
    }
    return base;
  }
  std::shared_ptr<SaveJob> job_on(const Stored& stored, const Tensors& tensors, const std::string& name,
                                  SaveOptions options) {
    os::File file = os::create_file(directory_.fd(), directory_.path(), name, io::rung_is_direct(options.rung));
    return std::make_shared<SaveJob>(tensors.layout(), tensors.sources(), std::move(file), ring_, std::move(options),
                                     stored.files.empty() ? SaveBase{} : base_of(stored));
  }
  Stored result_of(const SaveJob& job, const Stored& base, const std::string& name, const Tensors& tensors) const {
    Stored stored{{name}, job.chunk_table(), job.chunk_table().size() - tensors.layout()->chunks.size()};
    stored.files.insert(stored.files.end(), base.files.begin(), base.files.end());
    return stored;
  }
  Stored save_on(const Stored& base, const Tensors& tensors, const std::string& name, SaveOptions options) {
    const auto job = job_on(base, tensors, name, std::move(options));
    run(job);
    const Stored stored = result_of(*job, base, name, tensors);
    EXPECT_EQ(file_bytes(name).size(), job->file_bytes());
    return stored;
  }

  std::vector<std::uint64_t> file_sizes(const Stored& stored) const {
    std::vector<std::uint64_t> sizes;
    for (const std::string& name : stored.files) sizes.push_back(file_bytes(name).size());
    return sizes;
  }
  // As a reader meets it: the table is accepted, every chunk loads, every record is right on its own.
  void expect_loads(const Stored& stored, const Tensors& tensors) {
    EXPECT_NO_THROW(
        format::check_chunk_table(stored.table, file_sizes(stored), kTestChunkBytes, "index", stored.references));
    const auto plan = [&] {
      return LoadPlan(
          {{std::make_shared<const ChunkRecords>(stored.table), 0, "rank-00000.index",
            std::make_shared<const ChunkReferences>(format::chunk_references(stored.table, stored.references))}});
    };
    const auto job_of = [&](LoadPlan ready, LoadOptions options) {
      ready.finish(kTestChunkBytes);
      std::vector<os::File> files;
      for (const std::string& name : stored.files) {
        files.push_back(os::open_for_read(directory_.fd(), directory_.path(), name, false));
      }
      return std::make_shared<LoadJob>(std::move(ready), std::move(files), ring_, options);
    };
    LoadPlan load = plan();
    std::vector<Bytes> loaded(tensors.bytes.size());
    const auto layout = tensors.layout();
    for (std::size_t i = 0; i < loaded.size(); ++i) {
      loaded[i].assign(tensors.bytes[i].size(), 0);
      const format::TensorPlace& place = layout->places[i];
      load.add_contiguous({0, place.first_chunk, place.chunk_count, place.at, loaded[i].size()}, loaded[i].data());
    }
    run(job_of(std::move(load), {}));
    EXPECT_TRUE(loaded == tensors.bytes);
    LoadPlan scrub = plan();
    scrub.add_all_chunks();
    const auto scrubbed = job_of(std::move(scrub), {.check_padding = true, .collect_problems = true});
    run(scrubbed);
    EXPECT_TRUE(scrubbed->problems().empty());
  }
  // Of the chunks of one tensor.
  static std::map<int, int> codecs(const Stored& stored, const Tensors& tensors, std::size_t tensor) {
    const format::TensorPlace place = tensors.layout()->places[tensor];
    std::map<int, int> found;
    for (std::uint64_t i = 0; i < place.chunk_count; ++i) ++found[stored.table[place.first_chunk + i].codec];
    return found;
  }
  static std::uint64_t longest_chain(const Stored& stored) {
    const auto references = format::chunk_references(stored.table, stored.references);
    const ReferenceChain chain(stored.table, references, {});
    std::uint64_t longest = 0;
    for (std::size_t i = 0; i < stored.table.size(); ++i) longest = std::max(longest, chain.length(i));
    return longest;
  }
  static constexpr int kXor4 = static_cast<int>(codec::Codec::kXorZstdPlanes4);
  static constexpr int kPlanes4 = static_cast<int>(codec::Codec::kZstdPlanes4);

  std::normal_distribution<float> normal_{0.0f, 1.0f};
};

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
