#include "format/layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/limits.h"

namespace snapstone::format {
namespace {

constexpr std::uint64_t kPayloadBytesMax = 1ull << 62;  // file offsets, padding included, stay below 2^63

class Builder {
 public:
  explicit Builder(std::uint64_t chunk_bytes) { layout_.chunk_bytes = chunk_bytes; }

  void add(std::uint32_t tensor, std::uint64_t nbytes) {
    if (nbytes > kPayloadBytesMax - layout_.payload_bytes) {
      throw std::invalid_argument("tensors of more than 2^62 bytes in one file");
    }
    layout_.payload_bytes += nbytes;
    if (nbytes == 0) {
      layout_.places.push_back({});
    } else if (nbytes < kPackThresholdBytes) {
      add_packed(tensor, nbytes);
    } else {
      add_large(tensor, nbytes);
    }
  }

  Layout finish() {
    // Packed chunks are filled while large tensors pass by, so offsets are known only now, in chunk order.
    std::uint64_t offset = 0;
    for (ChunkPlan& chunk : layout_.chunks) {
      chunk.offset = offset;
      offset += round_up(chunk.raw_bytes, kPageBytes);
    }
    layout_.file_bytes = offset;
    group_pieces();
    return std::move(layout_);
  }

 private:
  void add_packed(std::uint32_t tensor, std::uint64_t nbytes) {
    std::uint64_t at = pack_ < 0 ? 0 : round_up(layout_.chunks[pack_].raw_bytes, kPackAlignBytes);
    if (pack_ < 0 || at + nbytes > layout_.chunk_bytes) {
      pack_ = static_cast<std::int64_t>(layout_.chunks.size());
      layout_.chunks.push_back({});
      at = 0;
    }
    place_piece(static_cast<std::uint64_t>(pack_), {tensor, static_cast<std::uint32_t>(at), 0, nbytes});
    layout_.places.push_back({static_cast<std::uint64_t>(pack_), 1, at});
  }

  void add_large(std::uint32_t tensor, std::uint64_t nbytes) {
    const std::uint64_t first = layout_.chunks.size();
    for (std::uint64_t begin = 0; begin < nbytes; begin += layout_.chunk_bytes) {
      const std::uint64_t end = std::min(nbytes, begin + layout_.chunk_bytes);
      layout_.chunks.push_back({});
      place_piece(layout_.chunks.size() - 1, {tensor, 0, begin, end});
    }
    layout_.places.push_back({first, layout_.chunks.size() - first, 0});
  }

  void place_piece(std::uint64_t chunk, const Piece& piece) {
    layout_.chunks[chunk].raw_bytes = static_cast<std::uint32_t>(piece.at + (piece.end - piece.begin));
    ++layout_.chunks[chunk].piece_count;
    layout_.pieces.push_back(piece);
    piece_chunk_.push_back(chunk);
  }

  void group_pieces() {
    std::uint32_t first = 0;
    for (ChunkPlan& chunk : layout_.chunks) {
      chunk.first_piece = first;
      first += chunk.piece_count;
      chunk.piece_count = 0;
    }
    std::vector<Piece> grouped(layout_.pieces.size());
    for (std::size_t i = 0; i < layout_.pieces.size(); ++i) {
      ChunkPlan& chunk = layout_.chunks[piece_chunk_[i]];
      grouped[chunk.first_piece + chunk.piece_count++] = layout_.pieces[i];
    }
    layout_.pieces = std::move(grouped);
  }

  Layout layout_;
  std::int64_t pack_ = -1;
  std::vector<std::uint64_t> piece_chunk_;
};

}  // namespace

Layout make_layout(std::span<const std::uint64_t> tensor_nbytes, std::uint64_t chunk_bytes) {
  if (chunk_bytes % kPageBytes != 0 || chunk_bytes < kPackThresholdBytes || chunk_bytes > kChunkBytesMax) {
    throw std::invalid_argument("chunk_bytes=" + std::to_string(chunk_bytes) + ": must be a multiple of " +
                                std::to_string(kPageBytes) + " between " + std::to_string(kPackThresholdBytes) +
                                " and " + std::to_string(kChunkBytesMax));
  }
  Builder builder(chunk_bytes);
  for (std::size_t i = 0; i < tensor_nbytes.size(); ++i) {
    builder.add(static_cast<std::uint32_t>(i), tensor_nbytes[i]);
  }
  return builder.finish();
}

}  // namespace snapstone::format
