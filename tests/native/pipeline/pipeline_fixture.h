// What tests of the pipeline share: tensors with random contents, saves and loads of them, and the one check that every
// test ends in: all slots are back.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "armed_faults.h"
#include "base/error.h"
#include "base/limits.h"
#include "codec/digest.h"
#include "format/chunk_table.h"
#include "format/layout.h"
#include "io/rung.h"
#include "mem/slot_ring.h"
#include "os/file.h"
#include "pipeline/engine.h"
#include "pipeline/load_job.h"
#include "pipeline/save_job.h"
#include "seed.h"
#include "temporary_directory.h"

namespace snapstone::pipeline {

using Bytes = std::vector<std::uint8_t>;
using Sizes = std::vector<std::uint64_t>;

inline constexpr std::uint64_t kTestChunkBytes = 64ull << 10;
inline constexpr std::chrono::seconds kPatience{60};

// Half of it compresses.
inline Bytes random_bytes(std::mt19937_64& random, std::uint64_t nbytes) {
  Bytes bytes(nbytes);
  for (std::size_t i = 0; i < bytes.size(); i += sizeof(std::uint64_t)) {
    const std::uint64_t word = random() & 0xFF00FF00FF00FF00;
    std::memcpy(&bytes[i], &word, std::min(sizeof word, bytes.size() - i));
  }
  return bytes;
}

struct Tensors {
  std::vector<Bytes> bytes;

  static Tensors random(std::mt19937_64& random, const Sizes& sizes) {
    Tensors tensors;
    for (const std::uint64_t size : sizes) tensors.bytes.push_back(random_bytes(random, size));
    return tensors;
  }
  std::shared_ptr<const format::Layout> layout() const {
    Sizes sizes;
    for (const Bytes& tensor : bytes) sizes.push_back(tensor.size());
    return std::make_shared<const format::Layout>(format::make_layout(sizes, kTestChunkBytes));
  }
  SaveSources sources() const {
    SaveSources sources;
    for (const Bytes& tensor : bytes) sources.contiguous.push_back(tensor.data());
    return sources;
  }
};

// A data file and what is needed to read it.
struct Saved {
  std::string name;
  std::shared_ptr<const format::Layout> layout;
  std::vector<format::ChunkRecord> table;
};

class PipelineTest : public ::testing::Test {
 protected:
  explicit PipelineTest(std::uint64_t slots = 16) { ring_->reserve(slots); }
  void TearDown() override { EXPECT_EQ(ring_->free_count(), ring_->slot_count()) << "a slot was lost"; }

  bool rung_works(io::Rung rung) const { return io::try_rung(directory_.directory(), rung).empty(); }

  // Mixed: packed, large, empty, with tails.
  Tensors some_tensors(std::uint64_t large_nbytes = 10 * kTestChunkBytes + 12345) {
    return Tensors::random(random_, {3, 1000, 0, large_nbytes, kPackThresholdBytes - 1, kTestChunkBytes, 77,
                                     3 * kTestChunkBytes + 1, kPageBytes});
  }

  std::shared_ptr<SaveJob> save_job(const Tensors& tensors, const std::string& name, SaveOptions options = {}) {
    os::File file = os::create_file(directory_.fd(), directory_.path(), name, io::rung_is_direct(options.rung));
    if (options.compress) options.item_bytes.assign(tensors.bytes.size(), 2);
    return std::make_shared<SaveJob>(tensors.layout(), tensors.sources(), std::move(file), ring_, std::move(options));
  }
  static void start(const std::shared_ptr<Job>& job) { Engine::instance().start(job); }
  // Waits for a started job; what it threw is rethrown.
  static void finish(Job& job) {
    ASSERT_TRUE(job.wait(kPatience)) << "the job hangs";
    job.rethrow();
  }
  static void run(const std::shared_ptr<Job>& job) {
    start(job);
    finish(*job);
  }

  Saved save(const Tensors& tensors, const std::string& name, const SaveOptions& options = {}) {
    const auto job = save_job(tensors, name, options);
    run(job);
    EXPECT_EQ(file_bytes(name).size(), job->file_bytes());
    return {name, tensors.layout(), job->chunk_table()};
  }

  LoadPlan plan_of(const Saved& saved) const {
    return LoadPlan({{std::make_shared<const ChunkRecords>(saved.table), 0, "rank-00000.index"}});
  }
  StoredShard shard_of(const Saved& saved, std::size_t tensor, std::uint64_t nbytes) const {
    const format::TensorPlace& place = saved.layout->places.at(tensor);
    return {0, place.first_chunk, place.chunk_count, place.at, nbytes};
  }
  std::shared_ptr<LoadJob> load_job(LoadPlan plan, const std::string& name, LoadOptions options = {}) const {
    plan.finish(kTestChunkBytes);
    std::vector<os::File> files;
    files.push_back(os::open_for_read(directory_.fd(), directory_.path(), name, io::rung_is_direct(options.rung)));
    return std::make_shared<LoadJob>(std::move(plan), std::move(files), ring_, options);
  }
  // Loads every tensor into `targets`, which are resized.
  std::shared_ptr<LoadJob> load_all_job(const Saved& saved, std::vector<Bytes>& targets, const Tensors& like,
                                        LoadOptions options = {}) const {
    LoadPlan plan = plan_of(saved);
    targets.resize(like.bytes.size());
    for (std::size_t i = 0; i < targets.size(); ++i) {
      targets[i].assign(like.bytes[i].size(), 0);
      plan.add_contiguous(shard_of(saved, i, targets[i].size()), targets[i].data());
    }
    return load_job(std::move(plan), saved.name, options);
  }
  std::shared_ptr<LoadJob> scrub_job(const Saved& saved, io::Rung rung = io::Rung::kBuffered) const {
    LoadPlan plan = plan_of(saved);
    plan.add_all_chunks();
    return load_job(std::move(plan), saved.name, {.rung = rung, .check_padding = true, .collect_problems = true});
  }

  Bytes file_bytes(const std::string& name) const {
    std::ifstream stream(directory_ / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  }
  void flip(const std::string& name, std::uint64_t offset) const {
    std::fstream stream(directory_ / name, std::ios::binary | std::ios::in | std::ios::out);
    stream.seekg(static_cast<std::streamoff>(offset));
    const char byte = static_cast<char>(stream.get() ^ 0x10);
    stream.seekp(static_cast<std::streamoff>(offset));
    stream.put(byte);
    ASSERT_TRUE(stream.good());
  }

  // The file, read as docs/format.md says, holds the tensors; raw chunks only.
  void expect_file_holds(const Saved& saved, const Tensors& tensors) const {
    const Bytes file = file_bytes(saved.name);
    EXPECT_NO_THROW(
        format::check_chunk_table(saved.table, std::vector<std::uint64_t>{file.size()}, kTestChunkBytes, ""));
    for (const format::ChunkRecord& record : saved.table) {
      const std::span<const std::uint8_t> stored(&file[record.offset], record.stored_bytes);
      ASSERT_EQ(record.codec, 0);
      EXPECT_EQ(codec::digest(stored), record.digest);
      const std::uint64_t end = record.offset + round_up(record.stored_bytes, kPageBytes);
      EXPECT_TRUE(std::all_of(&file[record.offset] + record.stored_bytes, file.data() + end, [](std::uint8_t byte) {
        return byte == 0;
      })) << "padding";
    }
    for (std::size_t i = 0; i < tensors.bytes.size(); ++i) {
      const format::TensorPlace& place = saved.layout->places[i];
      if (place.chunk_count == 0) continue;
      const auto begin = file.begin() + static_cast<std::ptrdiff_t>(saved.table[place.first_chunk].offset + place.at);
      EXPECT_TRUE(std::equal(tensors.bytes[i].begin(), tensors.bytes[i].end(), begin)) << "tensor " << i;
    }
  }

  testing::TemporaryDirectory directory_;
  std::mt19937_64 random_{testing::seed()};
  std::shared_ptr<mem::SlotRing> ring_ = std::make_shared<mem::SlotRing>(kTestChunkBytes);
};

// For each rung that this directory has; the others are skipped.
class PipelineOnRung : public PipelineTest, public ::testing::WithParamInterface<io::Rung> {
 protected:
  void SetUp() override {
    if (!rung_works(GetParam())) GTEST_SKIP() << io::try_rung(directory_.directory(), GetParam());
  }
};

inline auto all_rungs() {
  return ::testing::Values(io::Rung::kUringFixed, io::Rung::kUring, io::Rung::kThreadsDirect, io::Rung::kBuffered);
}

inline std::string rung_test_name(const ::testing::TestParamInfo<io::Rung>& info) {
  std::string name = io::rung_name(info.param);
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

// Seam of the rung's transfers, as in fault rules.
inline std::string write_seam(io::Rung rung) { return io::rung_is_uring(rung) ? "uring_write" : "pwrite"; }
inline std::string read_seam(io::Rung rung) { return io::rung_is_uring(rung) ? "uring_read" : "pread"; }

}  // namespace snapstone::pipeline
