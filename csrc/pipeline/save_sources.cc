#include "pipeline/save_sources.h"

#include <cstring>

namespace snapstone::pipeline {

void SaveSources::copy(const format::Piece& piece, std::uint8_t* target) const {
  if (const std::uint8_t* source = contiguous[piece.tensor]) {
    std::memcpy(target, source + piece.begin, piece.end - piece.begin);
  } else {
    gather(strided.at(piece.tensor), static_cast<std::int64_t>(piece.begin), static_cast<std::int64_t>(piece.end),
           target);
  }
}

}  // namespace snapstone::pipeline
