#include "codec/compress.h"

#include <cassert>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "base/error.h"
#include "codec/byte_planes.h"
#include "codec/zstd_frame.h"

namespace snapstone::codec {
namespace {

// Grows to the largest chunk that this thread has seen.
std::span<std::uint8_t> thread_scratch(std::size_t nbytes) {
  thread_local std::unique_ptr<std::uint8_t[]> scratch;
  thread_local std::size_t scratch_nbytes = 0;
  if (scratch_nbytes < nbytes) {
    scratch_nbytes = 0;
    scratch.reset();
    scratch = std::make_unique_for_overwrite<std::uint8_t[]>(nbytes);
    scratch_nbytes = nbytes;
  }
  return {scratch.get(), nbytes};
}

}  // namespace

bool known_codec(std::uint16_t codec) { return codec <= static_cast<std::uint16_t>(Codec::kXorZstdPlanes8); }

bool is_xor_codec(std::uint16_t codec) {
  return codec >= static_cast<std::uint16_t>(Codec::kXorZstd) && known_codec(codec);
}

unsigned plane_item_bytes(Codec codec) {
  switch (codec) {
    case Codec::kZstdPlanes2:
    case Codec::kXorZstdPlanes2:
      return 2;
    case Codec::kZstdPlanes4:
    case Codec::kXorZstdPlanes4:
      return 4;
    case Codec::kZstdPlanes8:
    case Codec::kXorZstdPlanes8:
      return 8;
    case Codec::kNone:
    case Codec::kZstd:
    case Codec::kXorZstd:
      break;
  }
  return 1;
}

Codec zstd_codec_for_item_bytes(unsigned item_bytes) {
  switch (item_bytes) {
    case 2:
      return Codec::kZstdPlanes2;
    case 4:
      return Codec::kZstdPlanes4;
    case 8:
      return Codec::kZstdPlanes8;
    default:
      return Codec::kZstd;
  }
}

Codec xor_codec_for_item_bytes(unsigned item_bytes) {
  switch (item_bytes) {
    case 2:
      return Codec::kXorZstdPlanes2;
    case 4:
      return Codec::kXorZstdPlanes4;
    case 8:
      return Codec::kXorZstdPlanes8;
    default:
      return Codec::kXorZstd;
  }
}

const char* codec_name(Codec codec) {
  switch (codec) {
    case Codec::kNone:
      return "none";
    case Codec::kZstd:
      return "zstd";
    case Codec::kZstdPlanes2:
      return "zstd-planes2";
    case Codec::kZstdPlanes4:
      return "zstd-planes4";
    case Codec::kZstdPlanes8:
      return "zstd-planes8";
    case Codec::kXorZstd:
      return "xor-zstd";
    case Codec::kXorZstdPlanes2:
      return "xor-zstd-planes2";
    case Codec::kXorZstdPlanes4:
      return "xor-zstd-planes4";
    case Codec::kXorZstdPlanes8:
      return "xor-zstd-planes8";
  }
  return "unknown";
}

void xor_into(std::span<const std::uint8_t> source, std::span<std::uint8_t> target) {
  assert(source.size() == target.size());
  // Words through memcpy: any alignment, and no two pointers of one type for the vectoriser to keep apart.
  constexpr std::size_t kWordBytes = sizeof(std::uint64_t);
  const std::uint8_t* __restrict from = source.data();
  std::uint8_t* __restrict to = target.data();
  std::size_t i = 0;
  for (; i + kWordBytes <= target.size(); i += kWordBytes) {
    std::uint64_t a;
    std::uint64_t b;
    std::memcpy(&a, from + i, kWordBytes);
    std::memcpy(&b, to + i, kWordBytes);
    b ^= a;
    std::memcpy(to + i, &b, kWordBytes);
  }
  for (; i < target.size(); ++i) {
    to[i] ^= from[i];
  }
}

std::optional<std::uint64_t> compress(std::span<const std::uint8_t> raw, Codec codec, int level, std::uint8_t* target) {
  if (is_xor_codec(static_cast<std::uint16_t>(codec))) {
    throw std::invalid_argument(std::string(codec_name(codec)) + ": a reference is needed");
  }
  if (codec == Codec::kNone || raw.empty()) {
    return std::nullopt;
  }
  std::span<const std::uint8_t> source = raw;
  if (const unsigned item_bytes = plane_item_bytes(codec); item_bytes != 1) {
    const std::span<std::uint8_t> scratch = thread_scratch(raw.size());
    split_planes(raw, item_bytes, scratch);
    source = scratch;
  }
  return compress_zstd_frame(source, level, target);
}

std::optional<std::uint64_t> compress(std::span<const std::uint8_t> raw, std::span<const std::uint8_t> reference,
                                      Codec codec, int level, std::uint8_t* target) {
  if (!is_xor_codec(static_cast<std::uint16_t>(codec)) || reference.size() != raw.size()) {
    throw std::invalid_argument(std::string(codec_name(codec)) + " of " + std::to_string(raw.size()) +
                                " bytes: a reference of " + std::to_string(reference.size()) + " bytes does not fit");
  }
  if (raw.empty()) {
    return std::nullopt;
  }
  const std::span<std::uint8_t> scratch = thread_scratch(2 * raw.size());
  const std::span<std::uint8_t> difference = scratch.first(raw.size());
  std::memcpy(difference.data(), raw.data(), raw.size());
  xor_into(reference, difference);
  const unsigned item_bytes = plane_item_bytes(codec);
  if (item_bytes == 1) {
    return compress_zstd_frame(difference, level, target);
  }
  const std::span<std::uint8_t> planes = scratch.last(raw.size());
  split_planes(difference, item_bytes, planes);
  return compress_zstd_frame(planes, level, target);
}

void decompress(std::span<const std::uint8_t> stored, Codec codec, std::span<std::uint8_t> raw) {
  if (codec == Codec::kNone) {
    if (stored.size() != raw.size()) {
      throw CorruptError("stored chunk has another size", "", CorruptError::kNoChunk,
                         std::to_string(raw.size()) + " bytes", std::to_string(stored.size()) + " bytes");
    }
    if (!raw.empty()) {
      std::memcpy(raw.data(), stored.data(), raw.size());
    }
    return;
  }
  const unsigned item_bytes = plane_item_bytes(codec);
  if (item_bytes == 1) {
    decompress_zstd_frame(stored, raw);
    return;
  }
  const std::span<std::uint8_t> scratch = thread_scratch(raw.size());
  decompress_zstd_frame(stored, scratch);
  join_planes(scratch, item_bytes, raw);
}

void decompress_xor(std::span<const std::uint8_t> stored, Codec codec, std::span<std::uint8_t> raw) {
  if (codec == Codec::kNone && stored.size() == raw.size()) {
    xor_into(stored, raw);
    return;
  }
  // decompress() takes the first half of the same scratch for its planes.
  const std::span<std::uint8_t> decoded = thread_scratch(2 * raw.size()).last(raw.size());
  decompress(stored, codec, decoded);
  xor_into(decoded, raw);
}

}  // namespace snapstone::codec
