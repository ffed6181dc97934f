// Invariants, over random sizes: every byte of every tensor lies in exactly one piece, pieces of a chunk do not
// overlap, chunks do not overlap in the file, and reading by places gives the bytes that writing by pieces put there.
#include "format/layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "base/limits.h"
#include "seed.h"

namespace snapstone::format {
namespace {

constexpr std::uint64_t kChunkBytes = 128ull << 10;

using Sizes = std::vector<std::uint64_t>;
using Bytes = std::vector<std::uint8_t>;

Layout layout_of(const Sizes& sizes, std::uint64_t chunk_bytes = kChunkBytes) {
  return make_layout(sizes, chunk_bytes);
}

// Around every limit of the layout, and in between.
Sizes random_sizes(std::mt19937_64& random, std::uint64_t chunk_bytes) {
  const Sizes limits = {0, 1, kPackAlignBytes, kPackThresholdBytes, chunk_bytes, 2 * chunk_bytes, 5 * chunk_bytes};
  Sizes sizes(random() % 60);
  for (std::uint64_t& size : sizes) {
    switch (random() % 3) {
      case 0:
        size = limits[random() % limits.size()] + random() % 3;
        size -= std::min<std::uint64_t>(size, random() % 2);
        break;
      case 1:
        size = random() % 300;
        break;
      default:
        size = random() % (3 * chunk_bytes);
    }
  }
  return sizes;
}

Bytes random_bytes(std::mt19937_64& random, std::uint64_t nbytes) {
  Bytes bytes(nbytes);
  for (std::size_t i = 0; i < bytes.size(); i += sizeof(std::uint64_t)) {
    const std::uint64_t word = random();
    std::memcpy(&bytes[i], &word, std::min(sizeof word, bytes.size() - i));
  }
  return bytes;
}

void expect_pieces_cover_each_tensor_once(const Layout& layout, const Sizes& sizes) {
  std::vector<std::uint64_t> covered(sizes.size());
  for (const ChunkPlan& chunk : layout.chunks) {
    std::uint64_t end = 0;
    ASSERT_GT(chunk.piece_count, 0u);
    for (std::uint32_t i = chunk.first_piece; i < chunk.first_piece + chunk.piece_count; ++i) {
      const Piece& piece = layout.pieces.at(i);
      EXPECT_GE(piece.at, end) << "pieces of a chunk overlap";
      EXPECT_EQ(piece.begin, covered.at(piece.tensor)) << "bytes of a tensor are missing, doubled or out of order";
      ASSERT_LT(piece.begin, piece.end);
      covered[piece.tensor] = piece.end;
      end = piece.at + (piece.end - piece.begin);
    }
    EXPECT_EQ(end, chunk.raw_bytes);
    EXPECT_LE(end, layout.chunk_bytes);
  }
  EXPECT_EQ(covered, sizes);
}

void expect_chunks_follow_each_other(const Layout& layout) {
  std::uint64_t offset = 0;
  std::uint32_t pieces = 0;
  for (const ChunkPlan& chunk : layout.chunks) {
    EXPECT_EQ(chunk.offset, offset);
    EXPECT_EQ(chunk.first_piece, pieces);
    offset += round_up(chunk.raw_bytes, kPageBytes);
    pieces += chunk.piece_count;
  }
  EXPECT_EQ(layout.file_bytes, offset);
  EXPECT_EQ(layout.pieces.size(), pieces);
}

Bytes write_by_pieces(const Layout& layout, const std::vector<Bytes>& tensors) {
  Bytes file(layout.file_bytes);
  for (const ChunkPlan& chunk : layout.chunks) {
    for (std::uint32_t i = chunk.first_piece; i < chunk.first_piece + chunk.piece_count; ++i) {
      const Piece& piece = layout.pieces[i];
      std::memcpy(&file[chunk.offset + piece.at], &tensors[piece.tensor][piece.begin], piece.end - piece.begin);
    }
  }
  return file;
}

// What a reader does, who has places and chunks and no pieces.
Bytes read_by_place(const Layout& layout, const Bytes& file, const TensorPlace& place, std::uint64_t nbytes) {
  Bytes bytes;
  for (std::uint64_t i = 0; i < place.chunk_count; ++i) {
    const ChunkPlan& chunk = layout.chunks.at(place.first_chunk + i);
    const std::uint64_t at = i == 0 ? place.at : 0;
    const std::uint64_t count = std::min(nbytes - bytes.size(), chunk.raw_bytes - at);
    const auto begin = file.begin() + static_cast<std::ptrdiff_t>(chunk.offset + at);
    bytes.insert(bytes.end(), begin, begin + static_cast<std::ptrdiff_t>(count));
  }
  return bytes;
}

TEST(LayoutTest, random_tensors_are_stored_once_and_read_back) {
  std::mt19937_64 random(testing::seed());
  for (int round = 0; round < 40; ++round) {
    const std::uint64_t chunk_bytes = kPackThresholdBytes + random() % 30 * kPageBytes;
    const Sizes sizes = random_sizes(random, chunk_bytes);
    const Layout layout = layout_of(sizes, chunk_bytes);
    ASSERT_EQ(layout.places.size(), sizes.size());
    ASSERT_NO_FATAL_FAILURE(expect_pieces_cover_each_tensor_once(layout, sizes));
    expect_chunks_follow_each_other(layout);
    std::vector<Bytes> tensors;
    for (const std::uint64_t size : sizes) tensors.push_back(random_bytes(random, size));
    const Bytes file = write_by_pieces(layout, tensors);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      ASSERT_EQ(read_by_place(layout, file, layout.places[i], sizes[i]), tensors[i]) << "tensor " << i;
    }
  }
}

TEST(LayoutTest, the_same_sizes_give_the_same_layout) {
  std::mt19937_64 random(testing::seed());
  const Sizes sizes = random_sizes(random, kChunkBytes);
  const Layout a = layout_of(sizes);
  const Layout b = layout_of(sizes);
  ASSERT_EQ(a.chunks.size(), b.chunks.size());
  ASSERT_EQ(a.pieces.size(), b.pieces.size());
  for (std::size_t i = 0; i < a.chunks.size(); ++i) {
    EXPECT_EQ(a.chunks[i].offset, b.chunks[i].offset);
    EXPECT_EQ(a.chunks[i].raw_bytes, b.chunks[i].raw_bytes);
    EXPECT_EQ(a.chunks[i].first_piece, b.chunks[i].first_piece);
  }
  for (std::size_t i = 0; i < a.pieces.size(); ++i) {
    EXPECT_EQ(a.pieces[i].tensor, b.pieces[i].tensor);
    EXPECT_EQ(a.pieces[i].at, b.pieces[i].at);
    EXPECT_EQ(a.pieces[i].begin, b.pieces[i].begin);
  }
}

TEST(LayoutTest, small_tensors_share_a_chunk_at_aligned_places) {
  const Layout layout = layout_of({1, 64, 65, 1000});
  ASSERT_EQ(layout.chunks.size(), 1u);
  EXPECT_EQ(layout.chunks[0].raw_bytes, 64 + 64 + 128 + 1000u);
  const std::vector<std::uint64_t> at = {0, 64, 128, 256};
  for (std::size_t i = 0; i < at.size(); ++i) {
    EXPECT_EQ(layout.places[i].at, at[i]);
    EXPECT_EQ(layout.places[i].chunk_count, 1u);
  }
  EXPECT_EQ(layout.payload_bytes, 1130u);
}

TEST(LayoutTest, the_threshold_decides_who_shares) {
  const Layout layout = layout_of({kPackThresholdBytes - 1, 10, kPackThresholdBytes, 20});
  ASSERT_EQ(layout.chunks.size(), 2u) << "only the third tensor has a chunk of its own";
  EXPECT_EQ(layout.places[0].first_chunk, 0u);
  EXPECT_EQ(layout.places[1].first_chunk, 0u);
  EXPECT_EQ(layout.places[2].first_chunk, 1u);
  EXPECT_EQ(layout.places[2].at, 0u);
  EXPECT_EQ(layout.places[3].first_chunk, 0u) << "packing goes on while large tensors pass by";
}

TEST(LayoutTest, a_full_chunk_is_followed_by_another) {
  const Sizes sizes(5, kPackThresholdBytes - kPackAlignBytes);  // two to a chunk of 128 KiB
  const Layout layout = layout_of(sizes);
  ASSERT_EQ(layout.chunks.size(), 3u);
  EXPECT_EQ(layout.chunks[0].piece_count, 2u);
  EXPECT_EQ(layout.chunks[2].piece_count, 1u);
}

TEST(LayoutTest, a_chunk_is_filled_to_the_last_byte_and_no_further) {
  constexpr std::uint64_t kHalf = kPackThresholdBytes - kPackAlignBytes;
  const Layout layout = layout_of({kHalf, kHalf, 2 * kPackAlignBytes, 1});
  ASSERT_EQ(layout.chunks.size(), 2u);
  EXPECT_EQ(layout.chunks[0].raw_bytes, kChunkBytes);
  EXPECT_EQ(layout.places[3].first_chunk, 1u);
}

TEST(LayoutTest, large_tensors_are_cut_at_the_chunk_size) {
  const Layout layout = layout_of({2 * kChunkBytes + 1, kChunkBytes});
  ASSERT_EQ(layout.chunks.size(), 4u);
  EXPECT_EQ(layout.chunks[0].raw_bytes, kChunkBytes);
  EXPECT_EQ(layout.chunks[2].raw_bytes, 1u);
  EXPECT_EQ(layout.chunks[3].offset, 2 * kChunkBytes + kPageBytes);
  EXPECT_EQ(layout.places[0].chunk_count, 3u);
  EXPECT_EQ(layout.places[1].first_chunk, 3u);
}

TEST(LayoutTest, nothing_to_store_is_an_empty_file) {
  for (const Sizes& sizes : {Sizes{}, Sizes{0, 0, 0}}) {
    const Layout layout = layout_of(sizes);
    EXPECT_EQ(layout.places.size(), sizes.size());
    EXPECT_TRUE(layout.chunks.empty());
    EXPECT_EQ(layout.file_bytes, 0u);
    for (const TensorPlace& place : layout.places) EXPECT_EQ(place.chunk_count, 0u);
  }
}

TEST(LayoutTest, chunk_sizes_out_of_range_are_refused) {
  for (const std::uint64_t chunk_bytes :
       {std::uint64_t{0}, kPageBytes, kPackThresholdBytes - kPageBytes, kPackThresholdBytes + 1, kChunkBytes + 512,
        kChunkBytesMax + kPageBytes, ~std::uint64_t{0}}) {
    EXPECT_THROW(layout_of({1}, chunk_bytes), std::invalid_argument) << chunk_bytes;
  }
  EXPECT_NO_THROW(layout_of({1}, kPackThresholdBytes));
  EXPECT_NO_THROW(layout_of({1}, kChunkBytesMax));
}

TEST(LayoutTest, sizes_that_no_file_can_have_are_refused) {
  EXPECT_THROW(layout_of({~std::uint64_t{0}}), std::invalid_argument);
  EXPECT_THROW(layout_of({(1ull << 62) + 1}), std::invalid_argument);
  EXPECT_THROW(layout_of({1, 1ull << 62}), std::invalid_argument);
}

}  // namespace
}  // namespace snapstone::format
