// Stored bytes that anybody may have written, as a chunk of any codec and raw size: they fill the raw bytes exactly, as
// libzstd by itself would, or are refused. Nothing is written outside, and with an xor codec nothing at all.
#include <zstd.h>

#include <memory>
#include <optional>

#include "base/error.h"
#include "codec/byte_planes.h"
#include "codec/compress.h"
#include "codec/zstd_frame.h"
#include "fuzz_target.h"

namespace snapstone {
namespace {

using codec::Codec;
using fuzz::Bytes;
using fuzz::require;

constexpr std::uint64_t kRawBytesMax = 1 << 16;

// What the stored bytes are by libzstd's simplest function; nothing where it refuses them.
std::optional<Bytes> by_libzstd(const Bytes& stored, std::size_t raw_nbytes) {
  Bytes raw(raw_nbytes);
  const std::size_t nbytes = ZSTD_decompress(raw.data(), raw.size(), stored.data(), stored.size());
  if (ZSTD_isError(nbytes) || nbytes != raw_nbytes) return std::nullopt;
  return raw;
}

void check_decoded(const Bytes& stored, Codec codec, const Bytes& raw) {
  if (codec == Codec::kNone) {
    require(raw == stored, "without a codec the bytes are the stored ones");
    return;
  }
  const std::optional<Bytes> expected = by_libzstd(stored, raw.size());
  require(expected.has_value(), "what is accepted is a frame of that size");
  Bytes joined(raw.size());
  codec::join_planes(*expected, codec::plane_item_bytes(codec), joined);
  require(joined == raw, "decoded as libzstd does");
}

void check_frame(const Bytes& stored, std::size_t raw_nbytes) {
  Bytes raw(raw_nbytes);
  try {
    codec::decompress_zstd_frame(stored, raw);
    require(by_libzstd(stored, raw_nbytes) == raw, "a frame is decoded as libzstd does");
  } catch (const CorruptError&) {
  }
}

void check_xor(const Bytes& stored, Codec codec, const Bytes* difference, std::size_t raw_nbytes) {
  const Bytes before = fuzz::pattern(raw_nbytes, 7);
  Bytes raw = before;
  try {
    codec::decompress_xor(stored, codec, raw);
    require(difference != nullptr, "both ways of decoding accept the same");
    codec::xor_into(*difference, raw);
    require(raw == before, "the difference is added");
  } catch (const CorruptError&) {
    require(difference == nullptr, "both ways of decoding refuse the same");
    require(raw == before, "what is refused changes nothing");
  }
}

}  // namespace
}  // namespace snapstone

int snapstone::fuzz::run_input(const std::uint8_t* data, std::size_t size) {
  using namespace snapstone;
  fuzz::Input input(data, size);
  const auto codec = static_cast<Codec>(input.below(9));
  std::uint64_t raw_nbytes = input.raw<std::uint32_t>() % (kRawBytesMax + 1);
  const bool as_stored = input.flag();
  const Bytes stored = input.rest();
  if (as_stored) raw_nbytes = stored.size();
  Bytes raw(raw_nbytes);
  bool accepted = true;
  try {
    codec::decompress(stored, codec, raw);
    check_decoded(stored, codec, raw);
  } catch (const CorruptError&) {
    accepted = false;
  }
  check_frame(stored, raw_nbytes);
  check_xor(stored, codec, accepted ? &raw : nullptr, raw_nbytes);
  return 0;
}
