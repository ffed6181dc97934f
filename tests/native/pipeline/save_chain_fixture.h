// Saves that store chunks as differences from an earlier save, and what a reader makes of them.
#pragma once

#include <functional>
#include <map>
#include <numeric>

#include "pipeline/pipeline_fixture.h"

namespace snapstone::pipeline {

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
  LoadPlan plan_of_stored(const Stored& stored) const {
    return LoadPlan(
        {{std::make_shared<const ChunkRecords>(stored.table), 0, "rank-00000.index",
          std::make_shared<const ChunkReferences>(format::chunk_references(stored.table, stored.references))}});
  }
  std::shared_ptr<LoadJob> job_of_stored(const Stored& stored, LoadPlan plan, LoadOptions options) const {
    plan.finish(kTestChunkBytes);
    std::vector<os::File> files;
    for (const std::string& name : stored.files) {
      files.push_back(os::open_for_read(directory_.fd(), directory_.path(), name, false));
    }
    return std::make_shared<LoadJob>(std::move(plan), std::move(files), ring_, options);
  }
  std::vector<Bytes> loaded(const Stored& stored, const Tensors& tensors) const {
    LoadPlan plan = plan_of_stored(stored);
    std::vector<Bytes> result(tensors.bytes.size());
    const auto layout = tensors.layout();
    for (std::size_t i = 0; i < result.size(); ++i) {
      result[i].assign(tensors.bytes[i].size(), 0);
      const format::TensorPlace& place = layout->places[i];
      plan.add_contiguous({0, place.first_chunk, place.chunk_count, place.at, result[i].size()}, result[i].data());
    }
    run(job_of_stored(stored, std::move(plan), {}));
    return result;
  }
  std::size_t problems_of(const Stored& stored) const {
    LoadPlan plan = plan_of_stored(stored);
    plan.add_all_chunks();
    const auto job = job_of_stored(stored, std::move(plan), {.check_padding = true, .collect_problems = true});
    run(job);
    return job->problems().size();
  }
  void check_table(const Stored& stored) const {
    format::check_chunk_table(stored.table, file_sizes(stored), kTestChunkBytes, "index", stored.references);
  }
  // As a reader meets it: the table is accepted, every chunk loads, every record is right on its own.
  void expect_loads(const Stored& stored, const Tensors& tensors) const {
    EXPECT_NO_THROW(check_table(stored));
    EXPECT_TRUE(loaded(stored, tensors) == tensors.bytes);
    EXPECT_EQ(problems_of(stored), 0u);
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

}  // namespace snapstone::pipeline
