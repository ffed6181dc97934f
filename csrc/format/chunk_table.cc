#include "format/chunk_table.h"

#include <algorithm>
#include <stdexcept>

#include "base/error.h"
#include "base/limits.h"
#include "codec/compress.h"

namespace snapstone::format {
namespace {

const char* problem(const ChunkRecord& record, std::span<const std::uint64_t> file_nbytes,
                    std::uint64_t chunk_bytes_max) {
  if (record.reserved != 0) return "chunk record: reserved field is not zero";
  if (!codec::known_codec(record.codec)) return "chunk record: unknown codec";
  if (record.raw_bytes == 0 || record.raw_bytes > chunk_bytes_max) return "chunk record: raw size out of range";
  if (record.stored_bytes == 0 || record.stored_bytes > record.raw_bytes)
    return "chunk record: stored size out of range";
  if (record.codec == 0 && record.stored_bytes != record.raw_bytes)
    return "chunk record: stored and raw size differ without a codec";
  if (record.offset % kPageBytes != 0) return "chunk record: offset is not aligned";
  if (record.file >= file_nbytes.size()) return "chunk record: no such file";
  const std::uint64_t nbytes = file_nbytes[record.file];
  if (record.offset > nbytes || round_up(record.stored_bytes, kPageBytes) > nbytes - record.offset) {
    return "chunk record: reaches past the end of its file";
  }
  return nullptr;
}

std::uint64_t count_xor(std::span<const ChunkRecord> table) {
  return static_cast<std::uint64_t>(
      std::ranges::count_if(table, [](const ChunkRecord& record) { return codec::is_xor_codec(record.codec); }));
}

const char* chain_problem(std::span<const ChunkRecord> table, std::span<const std::uint32_t> reference_of,
                          std::vector<std::uint8_t>& chain_records, std::size_t i) {
  chain_records[i] = 1;
  const std::uint32_t reference = reference_of[i];
  if (reference == kNoReference) return nullptr;
  if (reference <= i) return "chunk record: its reference does not stand behind it";
  if (table[reference].raw_bytes != table[i].raw_bytes) return "chunk record: its reference has another raw size";
  chain_records[i] += chain_records[reference];
  return chain_records[i] > kChainRecordsMax ? "chunk record: too many references in a chain" : nullptr;
}

}  // namespace

void check_chunk_table(std::span<const ChunkRecord> table, std::span<const std::uint64_t> file_nbytes,
                       std::uint64_t chunk_bytes_max, const std::string& path, std::uint64_t references) {
  for (std::size_t i = 0; i < table.size(); ++i) {
    if (const char* reason = problem(table[i], file_nbytes, chunk_bytes_max)) {
      throw CorruptError(reason, path, static_cast<std::int64_t>(i));
    }
  }
  if (const std::uint64_t needed = count_xor(table); needed != references) {
    throw CorruptError("chunk table: references are not as many as chunks with an xor codec", path,
                       CorruptError::kNoChunk, std::to_string(needed), std::to_string(references));
  }
  if (references == 0) return;
  const std::vector<std::uint32_t> reference_of = chunk_references(table, references);
  std::vector<std::uint8_t> chain_records(table.size());
  for (std::size_t i = table.size(); i-- > 0;) {
    if (const char* reason = chain_problem(table, reference_of, chain_records, i)) {
      throw CorruptError(reason, path, static_cast<std::int64_t>(i));
    }
  }
}

std::vector<std::uint32_t> chunk_references(std::span<const ChunkRecord> records, std::uint64_t references) {
  if (references == 0) return {};
  if (references > records.size()) throw std::invalid_argument("more references than chunks");
  std::vector<std::uint32_t> found(records.size(), kNoReference);
  std::uint64_t next = records.size() - references;
  for (std::size_t i = 0; i < records.size() && next < records.size(); ++i) {
    if (codec::is_xor_codec(records[i].codec)) found[i] = static_cast<std::uint32_t>(next++);
  }
  return found;
}

}  // namespace snapstone::format
