// SaveBase: what an earlier save stored, as the chunks of a new one meet it.
//
// The number of a record's file is that of the new index: 0 is the file that is being written, which no record of the
// base names.
#pragma once

#include <cstdint>
#include <vector>

#include "format/chunk_record.h"
#include "format/chunk_table.h"
#include "os/file.h"
#include "pipeline/reference_chain.h"

namespace snapstone::pipeline {

struct SaveBase {
  static constexpr std::uint32_t kNoRecord = format::kNoReference;

  std::vector<format::ChunkRecord> records;
  std::vector<std::uint32_t> references;       // of each record: the one that its codec refers to, or kNoRecord
  std::vector<std::uint32_t> record_of_chunk;  // of each chunk of the layout, or kNoRecord; empty without a base
  std::vector<os::File> files = {};            // by number, 0 left empty; only where chunks are read back

  bool empty() const { return record_of_chunk.empty(); }
  // std::invalid_argument unless there is one record, or none, per chunk, and every chain leads to later records.
  void check(std::uint64_t chunk_count) const;
  // The record that a chunk of `raw_bytes` is compared with, or nullptr.
  const format::ChunkRecord* record(std::uint64_t chunk, std::uint64_t raw_bytes) const;
  ReferenceChain chain() const { return ReferenceChain(records, references, files); }
  // `table` has a record for each chunk: the base's, or one of file 0 that with an xor codec refers to the base's.
  // Appends the reference records that these need, in the order of docs/format.md.
  void append_references(std::vector<format::ChunkRecord>& table) const;
};

}  // namespace snapstone::pipeline
