// Byte-plane split of floating-point arrays: all first bytes of the items, then all second bytes, ... Exponent bytes
// stand together and compress; mantissa bytes do not get in their way. A tail shorter than one item is kept as it is,
// at the end.
#pragma once

#include <cstdint>
#include <span>

namespace snapstone::codec {

// source.size() == target.size(); no overlap; item_bytes in {1, 2, 4, 8, 16}, 1 copies.
void split_planes(std::span<const std::uint8_t> source, unsigned item_bytes, std::span<std::uint8_t> target);
void join_planes(std::span<const std::uint8_t> source, unsigned item_bytes, std::span<std::uint8_t> target);

}  // namespace snapstone::codec
