// DevicePlan: which chunks of a save have bytes in device memory, and of which kind each is. Pure.
//
// A chunk of one tensor on a device is copied as it is. A packed one is gathered on its device first where there are
// kernels, else copied piece by piece. It is mixed if some pieces lie on the host, and shared if they lie on several
// devices.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "format/layout.h"
#include "pipeline/save_sources.h"

namespace snapstone::pipeline {

struct DeviceChunk {
  std::uint32_t chunk = 0;       // of the layout
  std::int32_t device = 0;       // of its first piece on a device
  std::uint64_t host_bytes = 0;  // of pieces on the host
  bool packed = false;           // more than one piece, or a gap before the only one
  bool shared = false;           // pieces on several devices
};

struct DevicePlan {
  static constexpr std::uint32_t kHostChunk = UINT32_MAX;

  std::vector<DeviceChunk> chunks;      // in the layout's order; the number of one in here is its position
  std::vector<std::uint32_t> position;  // by chunk of the layout, or kHostChunk
  std::vector<std::int32_t> devices;    // ordinals, ascending

  bool empty() const { return chunks.empty(); }
};

// std::invalid_argument for sources that do not fit the layout, or strided ones on a device.
DevicePlan make_device_plan(const format::Layout& layout, const SaveSources& sources);

inline std::span<const format::Piece> pieces_of(const format::Layout& layout, std::uint64_t chunk) {
  const format::ChunkPlan& plan = layout.chunks[chunk];
  return {layout.pieces.data() + plan.first_piece, plan.piece_count};
}

inline std::uint64_t nbytes_of(const format::Piece& piece) { return piece.end - piece.begin; }

// What lies between the pieces of a packed chunk: at most kPackAlignBytes - 1 bytes each time.
template <typename Found>  // void(std::uint64_t at, std::uint64_t nbytes)
void for_each_gap(std::span<const format::Piece> pieces, Found found) {
  std::uint64_t filled = 0;
  for (const format::Piece& piece : pieces) {
    if (piece.at > filled) found(filled, piece.at - filled);
    filled = piece.at + nbytes_of(piece);
  }
}

}  // namespace snapstone::pipeline
