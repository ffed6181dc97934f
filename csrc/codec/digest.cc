#include "codec/digest.h"

#include <xxhash.h>
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h>  // replaces XXH3_128bits and its update with the run-time dispatched ones
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

}  // namespace

Digest digest(std::span<const std::uint8_t> bytes) { return canonical(XXH3_128bits(bytes.data(), bytes.size())); }

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
  XXH3_state_t* state = thread_state();
  XXH3_128bits_reset(state);
  for (std::size_t offset = 0; offset < source.size(); offset += kPieceBytes) {
    const std::size_t nbytes = std::min(kPieceBytes, source.size() - offset);
    std::memcpy(target + offset, source.data() + offset, nbytes);
    XXH3_128bits_update(state, target + offset, nbytes);
  }
  return canonical(XXH3_128bits_digest(state));
}

}  // namespace snapstone::codec
