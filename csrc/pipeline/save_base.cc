#include "pipeline/save_base.h"

#include <cstddef>
#include <stdexcept>

#include "codec/compress.h"

namespace snapstone::pipeline {

void SaveBase::check(std::uint64_t chunk_count) const {
  if (empty()) return;
  if (record_of_chunk.size() != chunk_count || references.size() != records.size()) {
    throw std::invalid_argument("one record of the base per chunk, and one reference per record, are needed");
  }
  for (std::uint64_t at : record_of_chunk) {
    while (at != kNoRecord) {
      if (at >= records.size()) throw std::invalid_argument("the base names records that it does not have");
      const std::uint32_t reference = references[at];
      if (codec::is_xor_codec(records[at].codec) != (reference != kNoRecord) || reference <= at) {
        throw std::invalid_argument("a record of the base has no reference that fits");
      }
      at = reference;
    }
  }
}

const format::ChunkRecord* SaveBase::record(std::uint64_t chunk, std::uint64_t raw_bytes) const {
  if (empty() || record_of_chunk[chunk] == kNoRecord) return nullptr;
  const format::ChunkRecord& found = records[record_of_chunk[chunk]];
  return found.raw_bytes == raw_bytes ? &found : nullptr;
}

void SaveBase::append_references(std::vector<format::ChunkRecord>& table) const {
  const std::size_t chunk_count = table.size();
  std::vector<std::uint32_t> added;  // of each reference record in the table: its number in the base
  for (std::size_t chunk = 0; chunk < chunk_count; ++chunk) {
    if (!codec::is_xor_codec(table[chunk].codec)) continue;
    const std::uint32_t met = record_of_chunk.at(chunk);
    added.push_back(table[chunk].file == 0 ? met : references.at(met));
  }
  for (std::size_t i = 0; i < added.size(); ++i) {
    const format::ChunkRecord& record = records.at(added[i]);
    table.push_back(record);
    if (codec::is_xor_codec(record.codec)) added.push_back(references.at(added[i]));
  }
}

}  // namespace snapstone::pipeline
