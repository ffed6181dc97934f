#include "codec/compress.h"

#include <zstd.h>
#include <zstd_errors.h>

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "base/error.h"
#include "codec/byte_planes.h"

namespace snapstone::codec {
namespace {

struct FreeContext {
  void operator()(ZSTD_CCtx* context) const noexcept { ZSTD_freeCCtx(context); }
  void operator()(ZSTD_DCtx* context) const noexcept { ZSTD_freeDCtx(context); }
};

template <class Context, Context* (*kCreate)()>
Context* thread_context() {
  thread_local std::unique_ptr<Context, FreeContext> context(kCreate());
  if (!context) {
    context.reset(kCreate());
  }
  if (!context) {
    throw std::bad_alloc();
  }
  return context.get();
}

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

[[noreturn]] void refuse(const std::string& reason, std::uint64_t expected, const std::string& actual) {
  throw CorruptError("zstd: " + reason, "", CorruptError::kNoChunk, std::to_string(expected) + " bytes", actual);
}

void set_parameter(ZSTD_CCtx* context, ZSTD_cParameter parameter, int value) {
  const std::size_t result = ZSTD_CCtx_setParameter(context, parameter, value);
  if (ZSTD_isError(result)) {
    throw std::invalid_argument(std::string("zstd: ") + ZSTD_getErrorName(result));
  }
}

// Window of the frame at the start of `stored`, from its header (RFC 8878, 3.1.1.1); refuses everything that compress()
// never writes: other magics (skippable and pre-1.0 frames), reserved bits, dictionaries.
std::uint64_t frame_window_bytes(std::span<const std::uint8_t> stored, std::uint64_t raw_nbytes) {
  constexpr std::uint8_t kMagic[] = {0x28, 0xB5, 0x2F, 0xFD};
  constexpr std::size_t kDescriptor = sizeof kMagic;
  constexpr unsigned kDictionaryBits = 0x03;
  constexpr unsigned kReservedBit = 0x08;
  constexpr unsigned kSingleSegmentBit = 0x20;
  if (stored.size() < kDescriptor + 2 || std::memcmp(stored.data(), kMagic, sizeof kMagic) != 0) {
    refuse("not a zstd frame", raw_nbytes, "");
  }
  const unsigned descriptor = stored[kDescriptor];
  if ((descriptor & kReservedBit) != 0) {
    refuse("reserved bit in the frame header", raw_nbytes, "");
  }
  if ((descriptor & kDictionaryBits) != 0) {
    refuse("frame needs a dictionary", raw_nbytes, "");
  }
  if ((descriptor & kSingleSegmentBit) != 0) {
    return ZSTD_getFrameContentSize(stored.data(), stored.size());  // the window is the content; errors are huge values
  }
  const unsigned window = stored[kDescriptor + 1];
  const std::uint64_t base = std::uint64_t{1} << (10 + (window >> 3));
  return base + base / 8 * (window & 7);
}

void decompress_frame(std::span<const std::uint8_t> stored, std::span<std::uint8_t> raw) {
  constexpr std::uint64_t kWindowBytesMin = 1 << 10;  // the format has none smaller
  const std::uint64_t window = frame_window_bytes(stored, raw.size());
  if (window > std::bit_ceil(std::max<std::uint64_t>(raw.size(), kWindowBytesMin))) {
    refuse("window is larger than the chunk", raw.size(), std::to_string(window) + " bytes");
  }
  const std::size_t frame_nbytes = ZSTD_findFrameCompressedSize(stored.data(), stored.size());
  if (ZSTD_isError(frame_nbytes)) {
    refuse(ZSTD_getErrorName(frame_nbytes), raw.size(), "");
  }
  if (frame_nbytes != stored.size()) {
    refuse("bytes after the frame", frame_nbytes, std::to_string(stored.size()) + " bytes");
  }
  ZSTD_DCtx* context = thread_context<ZSTD_DCtx, ZSTD_createDCtx>();
  const std::size_t nbytes = ZSTD_decompressDCtx(context, raw.data(), raw.size(), stored.data(), stored.size());
  if (ZSTD_isError(nbytes)) {
    if (ZSTD_getErrorCode(nbytes) == ZSTD_error_memory_allocation) {
      throw std::bad_alloc();
    }
    refuse(ZSTD_getErrorName(nbytes), raw.size(), "");
  }
  if (nbytes != raw.size()) {
    refuse("frame has another size", raw.size(), std::to_string(nbytes) + " bytes");
  }
}

// nullopt when the frame would not be smaller than its source.
std::optional<std::uint64_t> compress_frame(std::span<const std::uint8_t> source, int level, std::uint8_t* target) {
  ZSTD_CCtx* context = thread_context<ZSTD_CCtx, ZSTD_createCCtx>();
  ZSTD_CCtx_reset(context, ZSTD_reset_session_only);  // a frame that did not fit stays open
  set_parameter(context, ZSTD_c_compressionLevel, level);
  set_parameter(context, ZSTD_c_contentSizeFlag, 0);  // the chunk record has the size
  set_parameter(context, ZSTD_c_checksumFlag, 0);     // and the digest
  // One byte short of raw: a frame that does not fit is not worth keeping.
  const std::size_t nbytes = ZSTD_compress2(context, target, source.size() - 1, source.data(), source.size());
  if (!ZSTD_isError(nbytes)) {
    return nbytes;
  }
  switch (ZSTD_getErrorCode(nbytes)) {
    case ZSTD_error_dstSize_tooSmall:
      return std::nullopt;
    case ZSTD_error_memory_allocation:
      throw std::bad_alloc();
    default:
      throw std::runtime_error(std::string("zstd: ") + ZSTD_getErrorName(nbytes));
  }
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
  return compress_frame(source, level, target);
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
    return compress_frame(difference, level, target);
  }
  const std::span<std::uint8_t> planes = scratch.last(raw.size());
  split_planes(difference, item_bytes, planes);
  return compress_frame(planes, level, target);
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
    decompress_frame(stored, raw);
    return;
  }
  const std::span<std::uint8_t> scratch = thread_scratch(raw.size());
  decompress_frame(stored, scratch);
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
