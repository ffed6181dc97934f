// Chunks that refer to chunks of earlier data files, written by hand as docs/format.md says.
#pragma once

#include <fstream>
#include <string>
#include <vector>

#include "codec/compress.h"
#include "format/chunk_table.h"
#include "pipeline/pipeline_fixture.h"

namespace snapstone::pipeline {

// One file per version of the chunks: file v holds version v of each chunk, as the difference from version v - 1.
class ChainTest : public PipelineTest {
 protected:
  static constexpr std::uint32_t kRawBytes = 20001;  // a tail that is no whole item, and padding

  // versions[v][chunk]; each differs from the one before in a few bytes.
  std::vector<std::vector<Bytes>> make_versions(std::size_t versions, std::size_t chunks) {
    std::vector<std::vector<Bytes>> result(versions);
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) result[0].push_back(random_bytes(random_, kRawBytes));
    for (std::size_t version = 1; version < versions; ++version) {
      result[version] = result[version - 1];
      for (Bytes& bytes : result[version]) {
        for (int i = 0; i < 100; ++i) bytes[random_() % bytes.size()] = static_cast<std::uint8_t>(random_());
      }
    }
    return result;
  }

  static std::string file_name(std::size_t version) { return std::to_string(version) + ".data"; }

  // The table of the newest version, with all others as reference records; file v of it is version v.
  std::vector<format::ChunkRecord> write_chain(const std::vector<std::vector<Bytes>>& versions,
                                               codec::Codec keyframe = codec::Codec::kZstdPlanes2) {
    std::vector<format::ChunkRecord> table;
    for (std::size_t version = versions.size(); version-- > 0;) {
      Bytes file;
      for (std::size_t chunk = 0; chunk < versions[version].size(); ++chunk) {
        const Bytes& raw = versions[version][chunk];
        format::ChunkRecord record{file.size(), 0, kRawBytes,         static_cast<std::uint32_t>(version),
                                   0,           0, codec::digest(raw)};
        const codec::Codec codec = version == 0 ? keyframe : kXorCodecs[(version + chunk) % 4];
        const Bytes stored = version == 0 ? encoded(raw, codec) : encoded(raw, versions[version - 1][chunk], codec);
        record.codec = static_cast<std::uint16_t>(codec);
        record.stored_bytes = static_cast<std::uint32_t>(stored.size());
        file.insert(file.end(), stored.begin(), stored.end());
        file.resize(round_up(file.size(), kPageBytes));
        table.push_back(record);
      }
      std::ofstream(directory_ / file_name(version), std::ios::binary)
          .write(reinterpret_cast<const char*>(file.data()), static_cast<std::streamsize>(file.size()));
    }
    return table;
  }

  std::vector<os::File> open_files(std::size_t versions, io::Rung rung = io::Rung::kBuffered) const {
    std::vector<os::File> files;
    for (std::size_t version = 0; version < versions; ++version) {
      files.push_back(
          os::open_for_read(directory_.fd(), directory_.path(), file_name(version), io::rung_is_direct(rung)));
    }
    return files;
  }

  // References are all records but the first `chunks`.
  static LoadPlan chain_plan(const std::vector<format::ChunkRecord>& table, std::size_t chunks) {
    return LoadPlan(
        {{std::make_shared<const ChunkRecords>(table), 0, "rank-00000.index",
          std::make_shared<const ChunkReferences>(format::chunk_references(table, table.size() - chunks))}});
  }
  std::shared_ptr<LoadJob> chain_job(LoadPlan plan, std::size_t versions, LoadOptions options = {}) const {
    plan.finish(kTestChunkBytes);
    return std::make_shared<LoadJob>(std::move(plan), open_files(versions, options.rung), ring_, options);
  }
  // Loads every chunk of the table's newest version.
  std::shared_ptr<LoadJob> load_chunks_job(const std::vector<format::ChunkRecord>& table, std::vector<Bytes>& loaded,
                                           std::size_t chunks, std::size_t versions, LoadOptions options = {}) const {
    LoadPlan plan = chain_plan(table, chunks);
    loaded.assign(chunks, Bytes(kRawBytes));
    for (std::size_t i = 0; i < chunks; ++i) plan.add_contiguous({0, i, 1, 0, kRawBytes}, loaded[i].data());
    return chain_job(std::move(plan), versions, options);
  }

  static constexpr codec::Codec kXorCodecs[] = {codec::Codec::kXorZstd, codec::Codec::kXorZstdPlanes2,
                                                codec::Codec::kXorZstdPlanes4, codec::Codec::kXorZstdPlanes8};

 private:
  static Bytes encoded(const Bytes& raw, codec::Codec codec) {
    if (codec == codec::Codec::kNone) return raw;
    Bytes target(raw.size());
    target.resize(codec::compress(raw, codec, 1, target.data()).value());
    return target;
  }
  static Bytes encoded(const Bytes& raw, const Bytes& reference, codec::Codec codec) {
    Bytes target(raw.size());
    target.resize(codec::compress(raw, reference, codec, 1, target.data()).value());
    return target;
  }
};

}  // namespace snapstone::pipeline
