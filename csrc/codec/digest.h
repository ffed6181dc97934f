// XXH3-128, seed 0, from libxxhash with its run-time dispatch (SSE2/AVX2/AVX-512), or from base/xxh3.h in a build
// without it. Bytes are in canonical (big-endian) order, so that hex is what `xxh128sum` prints.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>

namespace snapstone::codec {

using Digest = std::array<std::uint8_t, 16>;

Digest digest(std::span<const std::uint8_t> bytes);
std::string hex(const Digest& digest);

// Copies `source` to `target` and digests the copied bytes while they are in cache.
Digest copy_and_digest(std::span<const std::uint8_t> source, std::uint8_t* target);

}  // namespace snapstone::codec
