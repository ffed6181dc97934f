// Any bytes through every codec and back; then the stored ones with a few bytes changed, which decode to something or
// are refused.
#include "codec/compress.h"

#include <optional>

#include "base/error.h"
#include "codec/byte_planes.h"
#include "codec/digest.h"
#include "fuzz_target.h"

namespace snapstone {
namespace {

using codec::Codec;
using fuzz::Bytes;
using fuzz::Input;
using fuzz::require;

void check_planes(const Bytes& raw, unsigned item_bytes) {
  Bytes split(raw.size());
  Bytes joined(raw.size());
  codec::split_planes(raw, item_bytes, split);
  codec::join_planes(split, item_bytes, joined);
  require(joined == raw, "planes joined are what was split");
  const std::size_t items = raw.size() / item_bytes;
  for (std::size_t i = 0; i < items * item_bytes; ++i) {
    require(split[i % item_bytes * items + i / item_bytes] == raw[i], "a plane holds its bytes in order");
  }
}

void check_damaged(Input& input, Bytes stored, Codec codec, std::size_t raw_nbytes) {
  if (stored.empty()) return;
  for (std::uint64_t changes = input.below(4); changes-- > 0;)
    stored[input.raw<std::uint16_t>() % stored.size()] ^= input.byte();
  if (input.flag()) stored.resize(input.raw<std::uint16_t>() % (stored.size() + 8));
  Bytes raw(raw_nbytes);
  try {
    codec::decompress(stored, codec, raw);
  } catch (const CorruptError&) {
  }
}

}  // namespace
}  // namespace snapstone

int snapstone::fuzz::run_input(const std::uint8_t* data, std::size_t size) {
  using namespace snapstone;
  Input input(data, size);
  const auto codec = static_cast<Codec>(input.below(9));
  const int level = 1 + static_cast<int>(input.below(4));
  const std::uint64_t repeats = 1 + input.below(32);
  const Bytes seeds = input.bytes(8);
  const Bytes piece = input.bytes(std::min<std::size_t>(size, 4096));
  Bytes raw;
  for (std::uint64_t i = 0; i < repeats; ++i) raw.insert(raw.end(), piece.begin(), piece.end());
  check_planes(raw, 1u << (seeds[0] % 5));
  const Bytes reference = fuzz::pattern(raw.size(), seeds[1]);
  Bytes stored(raw.size());
  const bool with_xor = codec::is_xor_codec(static_cast<std::uint16_t>(codec));
  const std::optional<std::uint64_t> nbytes = with_xor ? codec::compress(raw, reference, codec, level, stored.data())
                                                       : codec::compress(raw, codec, level, stored.data());
  if (nbytes) {
    require(*nbytes < raw.size(), "a frame is smaller than what it holds");
    stored.resize(*nbytes);
    Bytes decoded = with_xor ? reference : Bytes(raw.size());
    if (with_xor) {
      codec::decompress_xor(stored, codec, decoded);
    } else {
      codec::decompress(stored, codec, decoded);
    }
    require(decoded == raw, "decoded is what was encoded");
    Input seed(seeds.data() + 2, seeds.size() - 2);
    check_damaged(seed, stored, codec, raw.size());
  }
  Bytes copy(raw.size());
  require(codec::copy_and_digest(raw, copy.data()) == codec::digest(raw) && copy == raw, "a digest is of the bytes");
  return 0;
}
