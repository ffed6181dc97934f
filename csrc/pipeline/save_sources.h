// SaveSources: the memory of the tensors of a Layout, in its order, on the host and on devices.
//
// Ownership: the memory belongs to the caller; see SaveJob for how long it is needed.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "base/strided.h"
#include "format/layout.h"

namespace snapstone::pipeline {

inline constexpr std::int32_t kOnHost = -1;

struct SaveSources {
  std::vector<const std::uint8_t*> contiguous;  // row-major memory, or nullptr where `strided` has the tensor
  std::unordered_map<std::uint32_t, StridedView> strided;
  // Ordinal of the device whose memory `contiguous` names, or kOnHost; empty: all on the host. What is on a device is
  // row-major.
  std::vector<std::int32_t> devices = {};

  std::int32_t device_of(std::uint32_t tensor) const { return devices.empty() ? kOnHost : devices[tensor]; }
  std::uint64_t device_address(const format::Piece& piece) const {
    return reinterpret_cast<std::uintptr_t>(contiguous[piece.tensor]) + piece.begin;
  }
  // The bytes of a piece in host memory.
  void copy(const format::Piece& piece, std::uint8_t* target) const;
};

}  // namespace snapstone::pipeline
