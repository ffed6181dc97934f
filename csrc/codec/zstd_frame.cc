#include "codec/zstd_frame.h"

#include "base/error.h"

#if SNAPSTONE_HAVE_ZSTD

#include <zstd.h>
#include <zstd_errors.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

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

}  // namespace

bool zstd_compiled_in() { return true; }

void decompress_zstd_frame(std::span<const std::uint8_t> stored, std::span<std::uint8_t> raw) {
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

std::optional<std::uint64_t> compress_zstd_frame(std::span<const std::uint8_t> source, int level,
                                                 std::uint8_t* target) {
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

}  // namespace snapstone::codec

#else

namespace snapstone::codec {
namespace {

[[noreturn]] void refuse() {
  throw UnsupportedError("zstd: this build has none; install libzstd with its headers and build snapstone again");
}

}  // namespace

bool zstd_compiled_in() { return false; }
void decompress_zstd_frame(std::span<const std::uint8_t>, std::span<std::uint8_t>) { refuse(); }
std::optional<std::uint64_t> compress_zstd_frame(std::span<const std::uint8_t>, int, std::uint8_t*) { refuse(); }

}  // namespace snapstone::codec

#endif
