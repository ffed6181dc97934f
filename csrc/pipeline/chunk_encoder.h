// ChunkEncoder: how the bytes of a chunk are stored: as they are, as a zstd frame, or as the difference from the base's
// chunk.
//
// Codec zstd: a frame, with byte planes for floating-point items, wherever it is smaller than the raw bytes.
// Codec xor-zstd, for chunks of one floating-point tensor: the difference where it pays, else a keyframe, that is a
// frame of the chunk itself where that pays, else the raw bytes. A difference pays below 0.9 of the raw size if it is
// also smaller than the keyframe would be; from a ratio of 1.7 on nobody asks. A keyframe pays below 0.97: raw bytes
// are the faster ones to load. Every keyframe_every records a chain begins anew.
//
// Threads: encode() from any, for different chunks. Limits: scratch for two chunks, of the caller.
// Failure: a chunk of the base that cannot be read, or is not what its digest says, is no failure: the chunk becomes a
//          keyframe, and unreadable_references() counts it.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/compress.h"
#include "format/layout.h"
#include "pipeline/job.h"
#include "pipeline/save_base.h"

namespace snapstone::pipeline {

struct EncodeOptions {
  int zstd_level = 3;
  std::vector<std::uint8_t> item_bytes = {};  // one per tensor: of floating-point items, others 1
  std::vector<std::uint8_t> xor_tensors =
      {};                            // one per tensor: nonzero for real floating-point ones; empty: codec zstd
  std::uint64_t keyframe_every = 8;  // the most records of a chain
};

struct EncodedChunk {
  codec::Codec codec = codec::Codec::kNone;
  std::uint32_t stored_bytes = 0;
};

class ChunkEncoder {
 public:
  // std::invalid_argument for options that do not fit the layout. Both must outlive the encoder.
  ChunkEncoder(const format::Layout& layout, const SaveBase& base, EncodeOptions options);

  // Replaces the raw bytes in `slot` by the stored ones. `scratch`: page-aligned, scratch_bytes().
  EncodedChunk encode(std::uint64_t chunk, std::uint8_t* slot, std::uint8_t* scratch, LaneBooks& books);
  std::uint64_t scratch_bytes() const { return ReferenceChain::scratch_bytes(layout_.chunk_bytes); }

  // Of each chunk what encoding it took, with reading the base's chunk; 0 for those that were not encoded.
  const std::vector<std::uint32_t>& encode_us() const { return encode_us_; }
  std::uint64_t unreadable_references() const { return unreadable_references_.load(std::memory_order_relaxed); }

 private:
  EncodedChunk encode_zstd(std::span<std::uint8_t> raw, unsigned item_bytes, std::uint8_t* scratch) const;
  // `reference`: empty, or in the first half of `scratch`.
  EncodedChunk encode_floats(std::span<std::uint8_t> raw, std::span<const std::uint8_t> reference, unsigned item_bytes,
                             std::uint8_t* scratch) const;
  // The raw bytes of the base's chunk, in the first half of `scratch`; empty when there are none to differ from.
  std::span<const std::uint8_t> read_reference(std::uint64_t chunk, std::uint64_t raw_bytes, std::uint8_t* scratch,
                                               LaneBooks& books);

  const format::Layout& layout_;
  const SaveBase& base_;
  const EncodeOptions options_;
  std::vector<std::uint32_t> encode_us_;
  std::atomic<std::uint64_t> unreadable_references_{0};
};

}  // namespace snapstone::pipeline
