// ChunkRecord: one row of the chunk table at the end of an index file. Little-endian, fixed size, read with one
// numpy.frombuffer.
//
// Every field is covered by the index file's digest, which the manifest records. `digest` is of the raw (decoded)
// bytes, so it protects against flipped, stale, swapped and misplaced data alike: the place of the record says which
// bytes are meant.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace snapstone::format {

static_assert(std::endian::native == std::endian::little, "the on-disk structs are little-endian");

struct ChunkRecord {
  std::uint64_t offset;                 // in the data file; a multiple of 4096
  std::uint32_t stored_bytes;           // in the data file, without the zero padding up to the next 4096
  std::uint32_t raw_bytes;              // decoded; equals stored_bytes when codec is 0
  std::uint32_t file;                   // position in the index header's "files"
  std::uint16_t codec;                  // codec::Codec
  std::uint16_t reserved;               // zero
  std::array<std::uint8_t, 16> digest;  // XXH3-128 of the raw bytes, canonical byte order
};

static_assert(sizeof(ChunkRecord) == 40);
static_assert(alignof(ChunkRecord) == 8);
static_assert(offsetof(ChunkRecord, offset) == 0);
static_assert(offsetof(ChunkRecord, stored_bytes) == 8);
static_assert(offsetof(ChunkRecord, raw_bytes) == 12);
static_assert(offsetof(ChunkRecord, file) == 16);
static_assert(offsetof(ChunkRecord, codec) == 20);
static_assert(offsetof(ChunkRecord, reserved) == 22);
static_assert(offsetof(ChunkRecord, digest) == 24);

}  // namespace snapstone::format
