// make_layout() on any sizes: every byte of every tensor has a place of its own, in order, inside the file.
#include "format/layout.h"

#include <stdexcept>

#include "base/limits.h"
#include "fuzz_target.h"

namespace snapstone {
namespace {

using fuzz::require;

constexpr std::uint64_t kChunksMax = 64;  // of a tensor; a layout takes memory for each

void check_layout(const format::Layout& layout, const std::vector<std::uint64_t>& sizes) {
  std::uint64_t offset = 0;
  for (const format::ChunkPlan& chunk : layout.chunks) {
    require(chunk.offset == offset, "chunks lie one after the other");
    require(chunk.raw_bytes != 0 && chunk.raw_bytes <= layout.chunk_bytes, "chunks are at most chunk_bytes long");
    offset += round_up(chunk.raw_bytes, kPageBytes);
    std::uint64_t filled = 0;
    for (std::uint32_t i = 0; i < chunk.piece_count; ++i) {
      const format::Piece& piece = layout.pieces.at(chunk.first_piece + i);
      require(piece.at >= filled && piece.end > piece.begin && piece.end <= sizes.at(piece.tensor),
              "pieces do not overlap");
      filled = piece.at + (piece.end - piece.begin);
    }
    require(filled == chunk.raw_bytes, "a chunk ends with its last piece");
  }
  require(offset == layout.file_bytes, "the file ends with its last chunk");
  std::vector<std::uint64_t> covered(sizes.size());
  for (const format::Piece& piece : layout.pieces) {
    require(covered[piece.tensor] == piece.begin, "the pieces of a tensor are in order");
    covered[piece.tensor] = piece.end;
  }
  require(covered == sizes, "every byte has a place");
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const format::TensorPlace& place = layout.places.at(i);
    require((place.chunk_count == 0) == (sizes[i] == 0), "empty tensors have no chunk");
    if (place.chunk_count == 0) continue;
    std::uint64_t there = 0;
    for (std::uint64_t c = 0; c < place.chunk_count; ++c) {
      there += layout.chunks.at(place.first_chunk + c).raw_bytes - (c == 0 ? place.at : 0);
    }
    require(there >= sizes[i], "a place is as long as its tensor");
  }
}

}  // namespace
}  // namespace snapstone

int snapstone::fuzz::run_input(const std::uint8_t* data, std::size_t size) {
  using namespace snapstone;
  fuzz::Input input(data, size);
  const std::uint64_t chunk_bytes = input.flag() ? input.number() : kPackThresholdBytes + input.byte() * kPageBytes;
  std::vector<std::uint64_t> sizes;
  while (!input.empty() && sizes.size() < 60) {
    const std::uint64_t nbytes = input.number();
    // What is refused is refused at once, whatever stands before it.
    const bool refused = nbytes > 1ull << 62 || chunk_bytes < kPackThresholdBytes;
    sizes.push_back(refused ? nbytes : std::min(nbytes, kChunksMax * kPackThresholdBytes));
  }
  try {
    check_layout(format::make_layout(sizes, chunk_bytes), sizes);
  } catch (const std::invalid_argument&) {
  }
  return 0;
}
