// Which single bit of some bytes is wrong, when their digest is known.
//
// XXH3 of a long input is a chain of blocks over eight accumulators that never mix before the end, and one word of the
// input reaches two of them. A changed bit is therefore carried through the blocks behind it in two accumulators alone,
// for all bits of a block at once; nothing else is computed again. 1 MiB takes about a second, n MiB about n * n.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>

#include "codec/digest.h"

namespace snapstone::codec {

struct FlippedBit {
  std::optional<std::uint64_t> bit;  // 8 * byte + bit of the byte, 0 being the lowest; nullopt when none was found
  bool complete = true;              // every bit was tried, or one was found
};

// The bit of `bytes` without which they have the digest `wanted`. The last bytes are tried first. Gives up when `limit`
// is over.
FlippedBit find_flipped_bit(std::span<const std::uint8_t> bytes, const Digest& wanted, std::chrono::milliseconds limit);

}  // namespace snapstone::codec
