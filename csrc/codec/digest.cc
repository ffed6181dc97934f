#include "codec/digest.h"

#if SNAPSTONE_HAVE_XXHASH
#include <xxhash.h>
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h>  // replaces XXH3_128bits and its update with the run-time dispatched ones
#endif
#else
#include "base/xxh3.h"
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

namespace snapstone::codec {
namespace {

// Small enough for a piece to stay in the L2 cache between copy and digest, large enough for the per-call cost to
// vanish.
constexpr std::size_t kPieceBytes = 128 << 10;

#if SNAPSTONE_HAVE_XXHASH

Digest canonical(XXH128_hash_t hash) {
  XXH128_canonical_t bytes;
  XXH128_canonicalFromHash(&bytes, hash);
  Digest digest;
  static_assert(sizeof bytes.digest == sizeof digest);
  std::memcpy(digest.data(), bytes.digest, digest.size());
  return digest;
}

// Opaque, because its size is not part of libxxhash's stable ABI.
XXH3_state_t* thread_state() {
  struct Free {
    void operator()(XXH3_state_t* state) const noexcept { XXH3_freeState(state); }
  };
  thread_local const std::unique_ptr<XXH3_state_t, Free> state(XXH3_createState());
  if (!state) {
    throw std::bad_alloc();
  }
  return state.get();
}

Digest whole(std::span<const std::uint8_t> bytes) { return canonical(XXH3_128bits(bytes.data(), bytes.size())); }

// Of an input that is taken in pieces, each where it lies in memory.
class Pieces {
 public:
  Pieces(const std::uint8_t*, std::size_t) : state_(thread_state()) { XXH3_128bits_reset(state_); }
  void add(const std::uint8_t* piece, std::size_t nbytes) { XXH3_128bits_update(state_, piece, nbytes); }
  Digest finish() { return canonical(XXH3_128bits_digest(state_)); }

 private:
  XXH3_state_t* state_;
};

#else

Digest canonical(const xxh3::Hash& hash) {
  Digest digest;
  xxh3::store_canonical(hash, digest.data());
  return digest;
}

Digest whole(std::span<const std::uint8_t> bytes) { return canonical(xxh3::hash(bytes.data(), bytes.size())); }

static_assert(kPieceBytes % xxh3::kBlockBytes == 0 && kPieceBytes > xxh3::kShortBytesMax);

class Pieces {
 public:
  Pieces(const std::uint8_t* data, std::size_t nbytes) : data_(data), nbytes_(nbytes) {}

  void add(const std::uint8_t* piece, std::size_t nbytes) {
    // The last block belongs to finish(), even when it is whole.
    const std::uint64_t begin = static_cast<std::uint64_t>(piece - data_) / xxh3::kBlockBytes;
    const std::uint64_t end = std::min(begin + nbytes / xxh3::kBlockBytes, xxh3::scrambled_blocks(nbytes_));
    accumulators_.blocks(piece, end - begin);
  }

  Digest finish() { return canonical(accumulators_.finish(data_, nbytes_)); }

 private:
  xxh3::Accumulators accumulators_{0};
  const std::uint8_t* data_;
  std::size_t nbytes_;
};

#endif

}  // namespace

Digest digest(std::span<const std::uint8_t> bytes) { return whole(bytes); }

std::string hex(const Digest& digest) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(2 * digest.size());
  for (const std::uint8_t byte : digest) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

Digest copy_and_digest(std::span<const std::uint8_t> source, std::uint8_t* target) {
  if (source.size() <= kPieceBytes) {
    if (!source.empty()) {
      std::memcpy(target, source.data(), source.size());
    }
    return digest({target, source.size()});
  }
  Pieces pieces(target, source.size());
  for (std::size_t offset = 0; offset < source.size(); offset += kPieceBytes) {
    const std::size_t nbytes = std::min(kPieceBytes, source.size() - offset);
    std::memcpy(target + offset, source.data() + offset, nbytes);
    pieces.add(target + offset, nbytes);
  }
  return pieces.finish();
}

}  // namespace snapstone::codec
