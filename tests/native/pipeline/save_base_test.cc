// A save that is compared with an earlier one: what the base has is not written, and everything else is.
#include <cerrno>
#include <numeric>

#include "base/fault_hook.h"
#include "pipeline/pipeline_fixture.h"

namespace snapstone::pipeline {
namespace {

using testing::ArmedFaults;
using testing::errno_of;

class SaveBaseTest : public PipelineTest {
 protected:
  // Every chunk is compared with the chunk of the same number.
  static SaveBase base_of(const Saved& saved) {
    SaveBase base{saved.table, std::vector<std::uint32_t>(saved.table.size(), SaveBase::kNoRecord), {}};
    for (format::ChunkRecord& record : base.records) record.file = 1;
    base.record_of_chunk.resize(saved.table.size());
    std::iota(base.record_of_chunk.begin(), base.record_of_chunk.end(), 0u);
    return base;
  }
  std::shared_ptr<SaveJob> job_on(const Saved& saved, const Tensors& tensors, const std::string& name,
                                  SaveOptions options = {}) {
    os::File file = os::create_file(directory_.fd(), directory_.path(), name, io::rung_is_direct(options.rung));
    if (options.compress) options.item_bytes.assign(tensors.bytes.size(), 2);
    return std::make_shared<SaveJob>(tensors.layout(), tensors.sources(), std::move(file), ring_, std::move(options),
                                     base_of(saved));
  }
  // Chunks in the new file cover it exactly, in chunk order.
  void expect_packed(const SaveJob& job, const std::string& name) const {
    std::uint64_t end = 0;
    for (const format::ChunkRecord& record : job.chunk_table()) {
      if (record.file != 0) continue;
      EXPECT_EQ(record.offset, end);
      end += round_up(record.stored_bytes, kPageBytes);
    }
    EXPECT_EQ(job.file_bytes(), end);
    EXPECT_EQ(file_bytes(name).size(), end);
  }
  void expect_loads(const SaveJob& job, const Saved& saved, const std::string& name, const Tensors& tensors) {
    LoadPlan plan({{std::make_shared<const ChunkRecords>(job.chunk_table()), 0, "rank-00000.index"}});
    std::vector<Bytes> loaded(tensors.bytes.size());
    for (std::size_t i = 0; i < loaded.size(); ++i) {
      loaded[i].assign(tensors.bytes[i].size(), 0);
      plan.add_contiguous(shard_of({name, tensors.layout(), job.chunk_table()}, i, loaded[i].size()), loaded[i].data());
    }
    plan.finish(kTestChunkBytes);
    std::vector<os::File> files;
    for (const std::string& one : {name, saved.name}) {
      files.push_back(os::open_for_read(directory_.fd(), directory_.path(), one, false));
    }
    run(std::make_shared<LoadJob>(std::move(plan), std::move(files), ring_, LoadOptions{}));
    EXPECT_EQ(loaded, tensors.bytes);
  }
  static std::size_t written_chunks(const SaveJob& job) {
    return static_cast<std::size_t>(
        std::ranges::count_if(job.chunk_table(), [](const auto& r) { return r.file == 0; }));
  }
};

class SaveBaseOnRung : public SaveBaseTest, public ::testing::WithParamInterface<io::Rung> {
 protected:
  void SetUp() override {
    if (!rung_works(GetParam())) GTEST_SKIP() << io::try_rung(directory_.directory(), GetParam());
  }
};
INSTANTIATE_TEST_SUITE_P(Rungs, SaveBaseOnRung, all_rungs(), rung_test_name);

TEST_P(SaveBaseOnRung, what_the_base_has_is_not_written) {
  const Tensors tensors = some_tensors();
  const Saved base = save(tensors, "base", {.rung = GetParam()});
  for (const bool compress : {false, true}) {
    const std::string name = compress ? "zstd" : "raw";
    const auto job = job_on(base, tensors, name, {.rung = GetParam(), .compress = compress});
    const ArmedFaults faults(write_seam(GetParam()) + ":1:errno=EIO");
    run(job);
    EXPECT_EQ(written_chunks(*job), 0u);
    EXPECT_EQ(job->bytes_done(), tensors.layout()->payload_bytes);
    EXPECT_TRUE(file_bytes(name).empty());
    for (std::size_t i = 0; i < base.table.size(); ++i) {
      EXPECT_EQ(job->chunk_table()[i].offset, base.table[i].offset);
      EXPECT_EQ(job->chunk_table()[i].file, 1u);
    }
  }
}

TEST_P(SaveBaseOnRung, only_changed_chunks_are_written_and_the_rest_is_the_bases) {
  Tensors tensors = some_tensors(40 * kTestChunkBytes + 99);
  const Saved base = save(tensors, "base", {.rung = GetParam()});
  for (int round = 0; round < 12; ++round) {
    for (std::uint64_t count = random_() % 12; count > 0; --count) {
      const std::size_t tensor = random_() % tensors.bytes.size();
      if (tensors.bytes[tensor].empty()) continue;
      const std::uint64_t byte = random_() % tensors.bytes[tensor].size();
      tensors.bytes[tensor][byte] ^= 0x20;
    }
    const std::string name = std::to_string(round);
    const auto job = job_on(base, tensors, name, {.rung = GetParam(), .compress = round % 3 == 2});
    run(job);
    for (std::size_t i = 0; i < base.table.size(); ++i) {
      const format::ChunkRecord& record = job->chunk_table()[i];
      EXPECT_EQ(record.file == 1, record.digest == base.table[i].digest) << "chunk " << i;
    }
    expect_packed(*job, name);
    expect_loads(*job, base, name, tensors);
  }
}

TEST_P(SaveBaseOnRung, a_state_that_changed_everywhere_is_written_whole) {
  Tensors tensors = some_tensors();
  const Saved base = save(tensors, "base", {.rung = GetParam()});
  for (Bytes& tensor : tensors.bytes) {
    for (std::uint8_t& byte : tensor) byte ^= 1;
  }
  const auto job = job_on(base, tensors, "a", {.rung = GetParam()});
  run(job);
  EXPECT_EQ(written_chunks(*job), base.table.size());
  save(tensors, "full", {.rung = GetParam()});
  EXPECT_EQ(file_bytes("a"), file_bytes("full"));
}

TEST_F(SaveBaseTest, a_chunk_without_a_record_of_its_size_is_written) {
  const Tensors tensors = some_tensors();
  const Saved saved = save(tensors, "base");
  SaveBase base = base_of(saved);
  base.record_of_chunk[0] = SaveBase::kNoRecord;
  base.records[1].raw_bytes -= 1;
  os::File file = os::create_file(directory_.fd(), directory_.path(), "a", false);
  const auto job = std::make_shared<SaveJob>(tensors.layout(), tensors.sources(), std::move(file), ring_, SaveOptions{},
                                             std::move(base));
  run(job);
  EXPECT_EQ(written_chunks(*job), 2u);
  expect_packed(*job, "a");
  expect_loads(*job, saved, "a", tensors);
}

TEST_F(SaveBaseTest, a_base_for_another_number_of_chunks_is_refused) {
  const Tensors tensors = some_tensors();
  SaveBase base = base_of(save(tensors, "base"));
  base.record_of_chunk.pop_back();
  os::File file = os::create_file(directory_.fd(), directory_.path(), "a", false);
  EXPECT_THROW(SaveJob(tensors.layout(), tensors.sources(), std::move(file), ring_, {}, std::move(base)),
               std::invalid_argument);
}

TEST_F(SaveBaseTest, a_base_that_names_a_record_which_it_lacks_is_refused_before_that_is_looked_at) {
  const Tensors tensors = some_tensors();
  SaveBase base = base_of(save(tensors, "base"));
  base.record_of_chunk.back() = base.records.size();
  std::string message;
  try {
    base.check(base.record_of_chunk.size());
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  EXPECT_EQ(message, "the base names records that it does not have");
}

TEST_P(SaveBaseOnRung, the_file_does_not_depend_on_the_ring) {
  Tensors tensors = some_tensors(60 * kTestChunkBytes);
  const Saved base = save(tensors, "base", {.rung = GetParam()});
  for (std::size_t byte = 0; byte < tensors.bytes[3].size(); byte += 3 * kTestChunkBytes) tensors.bytes[3][byte] ^= 1;
  for (const bool compress : {false, true}) {
    const std::string prefix = compress ? "z" : "r";
    for (const std::uint64_t slots : {1, 2, 50}) {
      ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
      ring_->reserve(slots);
      const std::string name = prefix + std::to_string(slots);
      const auto job = job_on(base, tensors, name, {.rung = GetParam(), .compress = compress});
      run(job);
      EXPECT_EQ(file_bytes(prefix + "1"), file_bytes(name));
      expect_loads(*job, base, name, tensors);
    }
  }
}

TEST_P(SaveBaseOnRung, room_is_taken_for_what_is_written_and_not_for_the_state) {
  if (!io::rung_is_direct(GetParam())) GTEST_SKIP() << "only direct files are preallocated";
  Tensors tensors = some_tensors();
  const Saved base = save(tensors, "base", {.rung = GetParam()});
  {
    const ArmedFaults faults("fallocate:1+:errno=ENOSPC");
    run(job_on(base, tensors, "same", {.rung = GetParam()}));
  }
  tensors.bytes[5][0] ^= 1;
  const ArmedFaults faults("fallocate:1+:errno=ENOSPC");
  EXPECT_EQ(errno_of([&] { run(job_on(base, tensors, "changed", {.rung = GetParam()})); }), ENOSPC);
}

TEST_P(SaveBaseOnRung, when_the_room_expected_is_not_there_the_room_needed_is_enough) {
  if (!io::rung_is_direct(GetParam())) GTEST_SKIP() << "only direct files are preallocated";
  Tensors tensors = some_tensors();
  const Saved base = save(tensors, "base", {.rung = GetParam()});
  tensors.bytes[5][0] ^= 1;
  const auto job = job_on(base, tensors, "a", {.rung = GetParam()});
  const ArmedFaults faults("fallocate:1:errno=ENOSPC");
  run(job);
  EXPECT_EQ(written_chunks(*job), 1u);
  expect_loads(*job, base, "a", tensors);
}

TEST_P(SaveBaseOnRung, a_disk_that_fails_to_make_room_ends_the_job) {
  if (!io::rung_is_direct(GetParam())) GTEST_SKIP() << "only direct files are preallocated";
  Tensors tensors = some_tensors();
  const Saved base = save(tensors, "base", {.rung = GetParam()});
  tensors.bytes[5][0] ^= 1;
  const auto job = job_on(base, tensors, "a", {.rung = GetParam()});
  const ArmedFaults faults("fallocate:1:errno=EIO");
  EXPECT_EQ(errno_of([&] { run(job); }), EIO);
}

TEST_P(SaveBaseOnRung, a_failing_write_ends_the_job_and_frees_all_slots) {
  Tensors tensors = some_tensors(60 * kTestChunkBytes);
  const Saved base = save(tensors, "base", {.rung = GetParam()});
  for (std::size_t byte = 0; byte < tensors.bytes[3].size(); byte += 2 * kTestChunkBytes) tensors.bytes[3][byte] ^= 1;
  int number = 0;
  for (const char* const nth : {":1:", ":7:", ":20+:"}) {
    for (const bool compress : {false, true}) {
      const auto job = job_on(base, tensors, std::to_string(number++), {.rung = GetParam(), .compress = compress});
      const ArmedFaults faults(write_seam(GetParam()) + nth + "errno=EIO");
      EXPECT_EQ(errno_of([&] { run(job); }), EIO) << nth;
      EXPECT_EQ(ring_->free_count(), ring_->slot_count());
    }
  }
}

}  // namespace
}  // namespace snapstone::pipeline
