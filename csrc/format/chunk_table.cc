#include "format/chunk_table.h"

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

}  // namespace

void check_chunk_table(std::span<const ChunkRecord> table, std::span<const std::uint64_t> file_nbytes,
                       std::uint64_t chunk_bytes_max, const std::string& path) {
  for (std::size_t i = 0; i < table.size(); ++i) {
    if (const char* reason = problem(table[i], file_nbytes, chunk_bytes_max)) {
      throw CorruptError(reason, path, static_cast<std::int64_t>(i));
    }
  }
}

}  // namespace snapstone::format
