#include "pipeline/reference_chain.h"

#include <cerrno>
#include <functional>
#include <set>

#include "pipeline/chain_fixture.h"

namespace snapstone::pipeline {
namespace {

using testing::ArmedFaults;
using testing::errno_of;

constexpr std::size_t kVersions = 5;
constexpr std::size_t kChunks = 40;

class ReferenceChainTest : public ChainTest {
 protected:
  // What loading all chunks is refused with.
  CorruptError refusal(const std::vector<format::ChunkRecord>& table, LoadOptions options = {}) {
    try {
      std::vector<Bytes> loaded;
      run(load_chunks_job(table, loaded, kChunks, kVersions, options));
    } catch (const CorruptError& error) {
      return error;
    }
    return CorruptError("", "");
  }
};

class ReferenceChainOnRung : public ReferenceChainTest, public ::testing::WithParamInterface<io::Rung> {
 protected:
  void SetUp() override {
    if (!rung_works(GetParam())) GTEST_SKIP() << io::try_rung(directory_.directory(), GetParam());
  }
};
INSTANTIATE_TEST_SUITE_P(Rungs, ReferenceChainOnRung, all_rungs(), rung_test_name);

TEST_P(ReferenceChainOnRung, every_chunk_of_every_chain_is_what_was_stored) {
  for (const codec::Codec keyframe : {codec::Codec::kZstdPlanes2, codec::Codec::kNone}) {
    const auto versions = make_versions(kVersions, kChunks);
    const auto table = write_chain(versions, keyframe);
    std::vector<Bytes> loaded;
    const auto job = load_chunks_job(table, loaded, kChunks, kVersions, {.rung = GetParam()});
    run(job);
    EXPECT_TRUE(loaded == versions.back());
    EXPECT_EQ(job->bytes_done(), job->plan().bytes_needed());
  }
}

TEST_P(ReferenceChainOnRung, a_reference_in_a_file_that_ends_early_is_named) {
  const auto table = write_chain(make_versions(kVersions, kChunks));
  const format::ChunkRecord& last = table.back();
  ASSERT_EQ(last.file, 0u);
  std::filesystem::resize_file(directory_ / file_name(0), last.offset + last.stored_bytes / 2);
  const CorruptError error = refusal(table, {.rung = GetParam()});
  EXPECT_EQ(error.path(), directory_ / file_name(0));
  EXPECT_EQ(error.chunk(), static_cast<std::int64_t>(kChunks - 1));
  EXPECT_EQ(error.reason(),
            "reference chunk " + std::to_string(table.size() - 1) + ": file ends before the chunk does");
}

TEST_F(ReferenceChainTest, any_record_of_a_table_can_be_read) {
  const auto versions = make_versions(kVersions, 3);
  const auto table = write_chain(versions);
  const auto references = format::chunk_references(table, table.size() - 3);
  const std::vector<os::File> files = open_files(kVersions);
  const ReferenceChain chain(table, references, files);
  os::MappedMemory scratch(ReferenceChain::scratch_bytes(kRawBytes));
  LaneBooks books(0, false);
  for (std::size_t record = 0; record < table.size(); ++record) {
    const std::size_t version = kVersions - 1 - record / 3;
    EXPECT_EQ(chain.length(record), version + 1);
    const auto raw = chain.read(record, scratch.data(), books);
    EXPECT_TRUE(std::ranges::equal(raw, versions[version][record % 3])) << "record " << record;
    EXPECT_EQ(chain.first_wrong(record, scratch.data(), books), record);
  }
}

TEST_F(ReferenceChainTest, a_wrong_byte_in_a_reference_is_found_and_the_reference_named) {
  const auto table = write_chain(make_versions(kVersions, kChunks), codec::Codec::kNone);
  const std::size_t bad = table.size() - 7;
  flip(file_name(0), table[bad].offset + random_() % kRawBytes);
  const CorruptError error = refusal(table);
  EXPECT_EQ(error.path(), directory_ / file_name(0));
  EXPECT_EQ(error.chunk(), static_cast<std::int64_t>(kChunks - 7));
  EXPECT_EQ(error.reason(), "reference chunk " + std::to_string(bad) + ": digest mismatch");
}

TEST_F(ReferenceChainTest, a_reference_that_does_not_decode_is_named) {
  for (std::size_t version = 0; version + 1 < kVersions; ++version) {
    const auto table = write_chain(make_versions(kVersions, kChunks));
    const std::size_t bad = (kVersions - 1 - version) * kChunks + 3;
    flip(file_name(version), table[bad].offset);  // the magic number of the frame
    const CorruptError error = refusal(table);
    EXPECT_EQ(error.path(), directory_ / file_name(version));
    EXPECT_EQ(error.chunk(), 3);
    EXPECT_EQ(error.reason(), "reference chunk " + std::to_string(bad) + ": zstd: not a zstd frame");
  }
}

TEST_F(ReferenceChainTest, a_reference_that_is_another_chunk_gives_no_bytes) {
  auto table = write_chain(make_versions(kVersions, kChunks));
  for (std::size_t level = 1; level < kVersions; ++level) std::swap(table[level * kChunks], table[level * kChunks + 4]);
  const CorruptError error = refusal(table);
  EXPECT_NE(error.reason(), "");
  EXPECT_EQ(error.path(), directory_ / file_name(kVersions - 1)) << "the records are right, each on its own";
  EXPECT_EQ(error.reason(), "digest mismatch");
}

TEST_F(ReferenceChainTest, references_that_lead_nowhere_or_back_are_refused) {
  const auto good = write_chain(make_versions(kVersions, kChunks));
  const ChunkReferences references = format::chunk_references(good, good.size() - kChunks);
  const auto refused = [&](const std::vector<format::ChunkRecord>& table,
                           std::shared_ptr<const ChunkReferences> given) {
    LoadPlan plan({{std::make_shared<const ChunkRecords>(table), 0, "rank-00000.index", std::move(given)}});
    Bytes loaded(kRawBytes);
    plan.add_contiguous({0, 0, 1, 0, kRawBytes}, loaded.data());
    try {
      run(chain_job(std::move(plan), kVersions));
    } catch (const CorruptError& error) {
      EXPECT_TRUE(error.reason().ends_with("fits") || error.reason().ends_with("does not fit")) << error.reason();
      return true;
    }
    return false;
  };
  EXPECT_TRUE(refused(good, nullptr));
  EXPECT_TRUE(refused(good, std::make_shared<const ChunkReferences>()));
  for (const std::uint32_t wrong : {0u, format::kNoReference, static_cast<std::uint32_t>(good.size())}) {
    ChunkReferences changed = references;
    changed[0] = wrong;
    EXPECT_TRUE(refused(good, std::make_shared<const ChunkReferences>(changed))) << wrong;
    changed = references;
    changed[kChunks] = wrong;
    EXPECT_TRUE(refused(good, std::make_shared<const ChunkReferences>(changed))) << wrong;
  }
  for (const std::function<void(format::ChunkRecord&)>& change : std::vector<std::function<void(format::ChunkRecord&)>>{
           [](format::ChunkRecord& r) { r.raw_bytes -= 1; }, [](format::ChunkRecord& r) { r.file = kVersions; },
           [](format::ChunkRecord& r) { r.stored_bytes = 1 << 30; }}) {
    auto table = good;
    change(table[kChunks]);
    EXPECT_TRUE(refused(table, std::make_shared<const ChunkReferences>(references)));
  }
}

TEST_F(ReferenceChainTest, files_of_references_are_needed_and_others_are_not) {
  auto table = write_chain(make_versions(3, 2));
  for (format::ChunkRecord& record : table) record.file = 2 * record.file + 1;
  for (const bool referring : {true, false}) {
    LoadPlan plan(
        {{std::make_shared<const ChunkRecords>(table), 10, "rank-00000.index",
          referring ? std::make_shared<const ChunkReferences>(format::chunk_references(table, 4)) : nullptr}});
    Bytes loaded(kRawBytes);
    plan.add_contiguous({0, 0, 1, 0, kRawBytes}, loaded.data());
    plan.finish(kTestChunkBytes);
    std::vector<bool> expected(16);
    expected[11] = expected[13] = referring;
    expected[15] = true;
    EXPECT_EQ(plan.files_needed(), expected);
  }
}

TEST_F(ReferenceChainTest, a_failing_read_of_a_reference_ends_the_job) {
  const auto versions = make_versions(kVersions, kChunks);
  const auto table = write_chain(versions);
  std::vector<Bytes> loaded;
  {
    const auto job = load_chunks_job(table, loaded, kChunks, kVersions);
    const ArmedFaults faults("pread:100:errno=EIO");
    EXPECT_EQ(errno_of([&] { run(job); }), EIO);
  }
  run(load_chunks_job(table, loaded, kChunks, kVersions));
  EXPECT_TRUE(loaded == versions.back());
}

TEST_F(ReferenceChainTest, without_verification_chains_are_decoded_all_the_same) {
  const auto versions = make_versions(kVersions, kChunks);
  const auto table = write_chain(versions);
  std::vector<Bytes> loaded;
  run(load_chunks_job(table, loaded, kChunks, kVersions, {.verify = false}));
  EXPECT_TRUE(loaded == versions.back());
}

TEST_F(ReferenceChainTest, a_scrub_checks_every_record_on_its_own) {
  const auto versions = make_versions(kVersions, kChunks);
  auto table = write_chain(versions);
  const std::uint64_t alone = 2 * kChunks + 5;
  const auto problems = [&] {
    LoadPlan plan = chain_plan(table, kChunks);
    plan.add_all_chunks();
    const auto job = chain_job(std::move(plan), kVersions, {.check_padding = true, .collect_problems = true});
    run(job);
    EXPECT_EQ(job->bytes_done(), job->plan().bytes_read());
    std::set<std::uint64_t> found;
    for (const Problem& problem : job->problems()) {
      found.insert(problem.chunk);
      const bool of_reference = problem.reason.starts_with("reference chunk");
      EXPECT_EQ(problem.path, directory_ / file_name(table[of_reference ? alone : problem.chunk].file));
    }
    return found;
  };
  EXPECT_EQ(problems(), std::set<std::uint64_t>());
  // A reference whose digest no chain compares.
  table[alone].digest[3] ^= 1;
  EXPECT_EQ(problems(), std::set<std::uint64_t>{alone});
  table[alone].digest[3] ^= 1;
  // Its bytes: everything that refers to it is wrong, too.
  flip(file_name(table[alone].file), table[alone].offset + 1);
  EXPECT_EQ(problems(), (std::set<std::uint64_t>{5, kChunks + 5, alone}));
  flip(file_name(table[alone].file), table[alone].offset + 1);
  // Padding of a reference.
  flip(file_name(table[alone].file), table[alone].offset + table[alone].stored_bytes);
  EXPECT_EQ(problems(), std::set<std::uint64_t>{alone});
}

}  // namespace
}  // namespace snapstone::pipeline
