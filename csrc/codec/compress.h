// zstd over one chunk. The raw size is known to the reader from elsewhere (shape and dtype); a frame is decoded into
// exactly that many bytes or refused: no content size to trust, no second frame, no dictionary.
//
// An xor codec stores the difference from a reference chunk of the same raw size, the XOR of the two. Differences add
// up in any order: XORing the raw bytes of the innermost chunk of a chain with all the differences gives the outermost.
//
// Without libzstd in the build every codec but kNone is refused with UnsupportedError, in both directions.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace snapstone::codec {

enum class Codec : std::uint16_t {
  kNone = 0,
  kZstd = 1,         // one zstd frame of the raw bytes
  kZstdPlanes2 = 2,  // byte planes of 2-, 4- and 8-byte items, then one zstd frame
  kZstdPlanes4 = 3,
  kZstdPlanes8 = 4,
  kXorZstd = 5,         // one zstd frame of the difference from the reference chunk
  kXorZstdPlanes2 = 6,  // byte planes of the difference, then one zstd frame
  kXorZstdPlanes4 = 7,
  kXorZstdPlanes8 = 8,
};
bool known_codec(std::uint16_t codec);
bool is_xor_codec(std::uint16_t codec);                // needs a reference chunk
unsigned plane_item_bytes(Codec codec);                // 1 when the codec has no planes
Codec zstd_codec_for_item_bytes(unsigned item_bytes);  // planes for 2, 4, 8; plain otherwise
Codec xor_codec_for_item_bytes(unsigned item_bytes);   // likewise
const char* codec_name(Codec codec);

// target ^= source; equal sizes, no overlap.
void xor_into(std::span<const std::uint8_t> source, std::span<std::uint8_t> target);

// Compression contexts and scratch are thread-local and reused. Returns the stored size, or nullopt when it would not
// be smaller than raw (store it as kNone then). `target` must hold at least raw.size() bytes and overlap nothing.
// std::invalid_argument for an xor codec: it needs a reference.
std::optional<std::uint64_t> compress(std::span<const std::uint8_t> raw, Codec codec, int level, std::uint8_t* target);
// With an xor codec; std::invalid_argument for any other, or a reference of another size than `raw`.
std::optional<std::uint64_t> compress(std::span<const std::uint8_t> raw, std::span<const std::uint8_t> reference,
                                      Codec codec, int level, std::uint8_t* target);
// The raw bytes, or with an xor codec the difference. Throws CorruptError (path empty; the caller knows it) unless
// `stored` decodes to exactly raw.size() bytes.
void decompress(std::span<const std::uint8_t> stored, Codec codec, std::span<std::uint8_t> raw);
// raw ^= what decompress() would give. `raw` is untouched when it throws.
void decompress_xor(std::span<const std::uint8_t> stored, Codec codec, std::span<std::uint8_t> raw);

}  // namespace snapstone::codec
