// The chunk table of an index file: checked once, before anything is allocated or read from what it says.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "format/chunk_record.h"

namespace snapstone::format {

inline constexpr std::uint64_t kChainRecordsMax = 64;  // a chunk with its reference, the reference's own, and so on
inline constexpr std::uint32_t kNoReference = std::numeric_limits<std::uint32_t>::max();

// Throws CorruptError(path, chunk) unless every record has a known codec, sizes within (0, chunk_bytes_max], codec 0
// with equal sizes, an aligned offset, and lies inside its file; files are `file_nbytes` long. Overlaps are allowed:
// tied tensors and deltas share bytes. The last `references` records are reference chunks only: there must be as many
// as records with an xor codec, each with the raw size of the record that refers to it and behind it, so that chains
// end, and no chain may have more than kChainRecordsMax records.
void check_chunk_table(std::span<const ChunkRecord> table, std::span<const std::uint64_t> file_nbytes,
                       std::uint64_t chunk_bytes_max, const std::string& path, std::uint64_t references = 0);

// The reference of every record, by its number in the table, or kNoReference: the k-th record with an xor codec has the
// k-th of the last `references` records. Empty when there are none. For tables that check_chunk_table() accepted.
std::vector<std::uint32_t> chunk_references(std::span<const ChunkRecord> records, std::uint64_t references);

}  // namespace snapstone::format
