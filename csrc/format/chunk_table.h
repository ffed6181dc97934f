// The chunk table of an index file: checked once, before anything is allocated or read from what it says.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "format/chunk_record.h"

namespace snapstone::format {

// Throws CorruptError(path, chunk) unless every record has a known codec, sizes within (0, chunk_bytes_max], codec 0
// with equal sizes, an aligned offset, and lies inside its file; files are `file_nbytes` long. Overlaps are allowed:
// tied tensors and deltas share bytes.
void check_chunk_table(std::span<const ChunkRecord> table, std::span<const std::uint64_t> file_nbytes,
                       std::uint64_t chunk_bytes_max, const std::string& path);

}  // namespace snapstone::format
