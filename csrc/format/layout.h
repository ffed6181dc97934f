// Layout: where each tensor's bytes go. Pure arithmetic over sizes; the same sizes always give the same layout.
//
// A tensor of kPackThresholdBytes or more starts a chunk of its own and is cut every chunk_bytes. Smaller ones are
// packed, 64-byte aligned, in the order given, into shared chunks of at most chunk_bytes. Chunks start at 4 KiB
// boundaries, in order, without gaps but padding.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace snapstone::format {

struct TensorPlace {
  std::uint64_t first_chunk = 0;
  std::uint64_t chunk_count = 0;  // 0 for an empty tensor
  std::uint64_t at = 0;           // byte offset inside the first chunk; nonzero only in packed chunks
};

// One piece of a tensor inside a chunk.
struct Piece {
  std::uint32_t tensor = 0;
  std::uint32_t at = 0;     // where it starts in the chunk
  std::uint64_t begin = 0;  // bytes [begin, end) of the tensor's row-major string
  std::uint64_t end = 0;
};

struct ChunkPlan {
  std::uint64_t offset = 0;  // in the data file, when chunks are stored raw
  std::uint32_t raw_bytes = 0;
  std::uint32_t first_piece = 0;
  std::uint32_t piece_count = 0;
};

struct Layout {
  std::uint64_t chunk_bytes = 0;
  std::uint64_t file_bytes = 0;     // of the data file, when chunks are stored raw
  std::uint64_t payload_bytes = 0;  // sum of the tensors
  std::vector<TensorPlace> places;  // one per tensor, in the order given
  std::vector<ChunkPlan> chunks;
  std::vector<Piece> pieces;
};

// chunk_bytes: a multiple of 4096 in [64 KiB, kChunkBytesMax]; at most 2^62 bytes in all. std::invalid_argument
// otherwise.
Layout make_layout(std::span<const std::uint64_t> tensor_nbytes, std::uint64_t chunk_bytes);

}  // namespace snapstone::format
