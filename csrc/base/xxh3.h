// XXH3-128 with a seed, every length, for host and device code. Same value as libxxhash's XXH3_128bits_withSeed.
//
// Written from doc/xxhash_spec.md of github.com/Cyan4973/xxHash ("XXH3 Algorithm Description"), whose names it keeps:
// a stripe is 64 bytes, a block 16 stripes, the accumulators are 8 words. Words of the input are little-endian.
//
// hash() takes everything at once. Inputs above 240 bytes can be taken block by block through Accumulators, and within
// a block all additions commute: only scramble(), once per block, has an order. The device kernels rest on that.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SNAPSTONE_HOST_DEVICE __host__ __device__
#else
#define SNAPSTONE_HOST_DEVICE
#endif

namespace snapstone::xxh3 {

static_assert(std::endian::native == std::endian::little, "words of the input are read as they lie in memory");

struct Hash {
  std::uint64_t low;
  std::uint64_t high;
};

inline constexpr std::uint32_t kPrime32_1 = 0x9E3779B1u;
inline constexpr std::uint32_t kPrime32_2 = 0x85EBCA77u;
inline constexpr std::uint32_t kPrime32_3 = 0xC2B2AE3Du;
inline constexpr std::uint64_t kPrime64_1 = 0x9E3779B185EBCA87u;
inline constexpr std::uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4Fu;
inline constexpr std::uint64_t kPrime64_3 = 0x165667B19E3779F9u;
inline constexpr std::uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63u;
inline constexpr std::uint64_t kPrime64_5 = 0x27D4EB2F165667C5u;
inline constexpr std::uint64_t kPrimeMx1 = 0x165667919E3779F9u;
inline constexpr std::uint64_t kPrimeMx2 = 0x9FB21C651E98DF25u;

inline constexpr std::size_t kShortBytesMax = 240;  // longer inputs are stripes and blocks
inline constexpr unsigned kLanes = 8;               // accumulators, and words of a stripe
inline constexpr std::size_t kStripeBytes = 64;
inline constexpr std::size_t kBlockBytes = 1024;
inline constexpr unsigned kBlockStripes = 16;
inline constexpr unsigned kSecretBytes = 192;
inline constexpr unsigned kSecretScramble = kSecretBytes - 64;  // offset of the words of scramble()
inline constexpr unsigned kSecretLastStripe = kSecretBytes - 71;
inline constexpr unsigned kSecretMergeLow = 11;
inline constexpr unsigned kSecretMergeHigh = kSecretBytes - 75;

struct SecretWords {
  std::uint64_t words[kSecretBytes / 8];
};
inline constexpr SecretWords kDefaultSecret = {{
    0xbe4ba423396cfeb8u, 0x1cad21f72c81017cu, 0xdb979083e96dd4deu, 0x1f67b3b7a4a44072u, 0x78e5c0cc4ee679cbu,
    0x2172ffcc7dd05a82u, 0x8e2443f7744608b8u, 0x4c263a81e69035e0u, 0xcb00c391bb52283cu, 0xa32e531b8b65d088u,
    0x4ef90da297486471u, 0xd8acdea946ef1938u, 0x3f349ce33f76faa8u, 0x1d4f0bc7c7bbdcf9u, 0x3159b4cd4be0518au,
    0x647378d9c97e9fc8u, 0xc3ebd33483acc5eau, 0xeb6313faffa081c5u, 0x49daf0b751dd0d17u, 0x9e68d429265516d3u,
    0xfca1477d58be162bu, 0xce31d07ad1b8f88fu, 0x280416958f3acb45u, 0x7e404bbbcafbd7afu,
}};
#if defined(__CUDACC__)
__constant__ const SecretWords kDefaultSecretOnDevice = kDefaultSecret;  // a local copy would live on the stack
#endif

// Word `index` of the default secret.
SNAPSTONE_HOST_DEVICE constexpr std::uint64_t default_secret_word(unsigned index) {
#if defined(__CUDA_ARCH__)
  return kDefaultSecretOnDevice.words[index];
#else
  return kDefaultSecret.words[index];
#endif
}

// The 8 bytes at byte `offset` of the default secret.
SNAPSTONE_HOST_DEVICE constexpr std::uint64_t default_secret(unsigned offset) {
  const unsigned shift = 8 * (offset % 8);
  const std::uint64_t low = default_secret_word(offset / 8) >> shift;
  return shift == 0 ? low : low | default_secret_word(offset / 8 + 1) << (64 - shift);
}

// Word `index` of the secret that inputs above 240 bytes derive from the seed.
SNAPSTONE_HOST_DEVICE constexpr std::uint64_t secret_word(unsigned index, std::uint64_t seed) {
  return index % 2 == 0 ? default_secret_word(index) + seed : default_secret_word(index) - seed;
}

SNAPSTONE_HOST_DEVICE constexpr std::uint64_t secret(unsigned offset, std::uint64_t seed) {
  const unsigned shift = 8 * (offset % 8);
  const std::uint64_t low = secret_word(offset / 8, seed) >> shift;
  return shift == 0 ? low : low | secret_word(offset / 8 + 1, seed) << (64 - shift);
}

// What accumulator `lane` starts with.
SNAPSTONE_HOST_DEVICE constexpr std::uint64_t initial_accumulator(unsigned lane) {
  switch (lane) {
    case 0:
      return kPrime32_3;
    case 1:
      return kPrime64_1;
    case 2:
      return kPrime64_2;
    case 3:
      return kPrime64_3;
    case 4:
      return kPrime64_4;
    case 5:
      return kPrime32_2;
    case 6:
      return kPrime64_5;
    default:
      return kPrime32_1;
  }
}

SNAPSTONE_HOST_DEVICE inline std::uint32_t read32(const std::uint8_t* bytes) {
  std::uint32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

SNAPSTONE_HOST_DEVICE inline std::uint64_t read64(const std::uint8_t* bytes) {
  std::uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

SNAPSTONE_HOST_DEVICE constexpr std::uint32_t swap_bytes(std::uint32_t word) {
  return word << 24 | (word & 0xff00u) << 8 | (word >> 8 & 0xff00u) | word >> 24;
}

SNAPSTONE_HOST_DEVICE constexpr std::uint64_t swap_bytes(std::uint64_t word) {
  return std::uint64_t{swap_bytes(static_cast<std::uint32_t>(word))} << 32 |
         swap_bytes(static_cast<std::uint32_t>(word >> 32));
}

// The full product of two words.
SNAPSTONE_HOST_DEVICE inline Hash multiply(std::uint64_t a, std::uint64_t b) {
#if defined(__CUDA_ARCH__)
  return {a * b, __umul64hi(a, b)};
#else
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return {static_cast<std::uint64_t>(product), static_cast<std::uint64_t>(product >> 64)};
#endif
}

// The same of two half words.
SNAPSTONE_HOST_DEVICE inline std::uint64_t multiply_halves(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  // nvcc makes a 64-bit multiplication of the other form, with additions of zeros where the upper halves would count.
  std::uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return std::uint64_t{a} * b;
#endif
}

SNAPSTONE_HOST_DEVICE inline std::uint64_t multiply_fold(std::uint64_t a, std::uint64_t b) {
  const Hash product = multiply(a, b);
  return product.low ^ product.high;
}

SNAPSTONE_HOST_DEVICE constexpr std::uint64_t avalanche(std::uint64_t x) {
  x = (x ^ x >> 37) * kPrimeMx1;
  return x ^ x >> 32;
}

SNAPSTONE_HOST_DEVICE constexpr std::uint64_t avalanche_xxh64(std::uint64_t x) {
  x = (x ^ x >> 33) * kPrime64_2;
  x = (x ^ x >> 29) * kPrime64_3;
  return x ^ x >> 32;
}

// ---- up to 16 bytes -------------------------------------------------------------------------------------------------

SNAPSTONE_HOST_DEVICE inline Hash hash_empty(std::uint64_t seed) {
  return {avalanche_xxh64(seed ^ default_secret(64) ^ default_secret(72)),
          avalanche_xxh64(seed ^ default_secret(80) ^ default_secret(88))};
}

SNAPSTONE_HOST_DEVICE inline Hash hash_1_to_3(const std::uint8_t* data, std::size_t nbytes, std::uint64_t seed) {
  const std::uint32_t combined = std::uint32_t{data[nbytes - 1]} | static_cast<std::uint32_t>(nbytes) << 8 |
                                 std::uint32_t{data[0]} << 16 | std::uint32_t{data[nbytes / 2]} << 24;
  const std::uint32_t swapped = swap_bytes(combined);
  const std::uint32_t rotated = swapped << 13 | swapped >> 19;
  // The four 32-bit words at the start of the secret.
  const std::uint64_t first = default_secret(0);
  const std::uint64_t second = default_secret(8);
  const std::uint64_t flip_low = static_cast<std::uint32_t>(first) ^ first >> 32;
  const std::uint64_t flip_high = static_cast<std::uint32_t>(second) ^ second >> 32;
  return {avalanche_xxh64((flip_low + seed) ^ combined), avalanche_xxh64((flip_high - seed) ^ rotated)};
}

SNAPSTONE_HOST_DEVICE inline Hash hash_4_to_8(const std::uint8_t* data, std::size_t nbytes, std::uint64_t seed) {
  const std::uint64_t mixed_seed = seed ^ std::uint64_t{swap_bytes(static_cast<std::uint32_t>(seed))} << 32;
  const std::uint64_t combined = read32(data) | std::uint64_t{read32(data + nbytes - 4)} << 32;
  const std::uint64_t value = ((default_secret(16) ^ default_secret(24)) + mixed_seed) ^ combined;
  auto [low, high] = multiply(value, kPrime64_1 + (nbytes << 2));
  high += low << 1;
  low ^= high >> 3;
  low = (low ^ low >> 35) * kPrimeMx2;
  return {low ^ low >> 28, avalanche(high)};
}

SNAPSTONE_HOST_DEVICE inline Hash hash_9_to_16(const std::uint8_t* data, std::size_t nbytes, std::uint64_t seed) {
  const std::uint64_t first = read64(data);
  const std::uint64_t last = read64(data + nbytes - 8);
  const std::uint64_t a = ((default_secret(32) ^ default_secret(40)) - seed) ^ first ^ last;
  const std::uint64_t b = ((default_secret(48) ^ default_secret(56)) + seed) ^ last;
  auto [low, high] = multiply(a, kPrime64_1);
  low += static_cast<std::uint64_t>(nbytes - 1) << 54;
  high += b + std::uint64_t{static_cast<std::uint32_t>(b)} * (kPrime32_2 - 1);
  low ^= swap_bytes(high);
  const Hash product = multiply(low, kPrime64_2);
  return {avalanche(product.low), avalanche(product.high + high * kPrime64_2)};
}

// ---- 17 to 240 bytes ------------------------------------------------------------------------------------------------

SNAPSTONE_HOST_DEVICE inline std::uint64_t mix_step(const std::uint8_t* data, unsigned offset, std::uint64_t seed) {
  return multiply_fold(read64(data) ^ (default_secret(offset) + seed),
                       read64(data + 8) ^ (default_secret(offset + 8) - seed));
}

// Adds 16 bytes at `first` and 16 at `second`, with the 32 bytes of secret at `offset`, to both halves of `sums`.
SNAPSTONE_HOST_DEVICE inline void mix_two(Hash& sums, const std::uint8_t* first, const std::uint8_t* second,
                                          unsigned offset, std::uint64_t seed) {
  sums.low = (sums.low + mix_step(first, offset, seed)) ^ (read64(second) + read64(second + 8));
  sums.high = (sums.high + mix_step(second, offset + 16, seed)) ^ (read64(first) + read64(first + 8));
}

SNAPSTONE_HOST_DEVICE inline Hash hash_17_to_240(const std::uint8_t* data, std::size_t nbytes, std::uint64_t seed) {
  Hash sums{nbytes * kPrime64_1, 0};
  if (nbytes <= 128) {
    // 16 bytes from the front and 16 from the back, outermost last.
    for (unsigned pair = static_cast<unsigned>((nbytes - 1) / 32) + 1; pair-- > 0;) {
      mix_two(sums, data + pair * 16, data + nbytes - pair * 16 - 16, pair * 32, seed);
    }
  } else {
    for (unsigned piece = 0; piece < 4; ++piece) {
      mix_two(sums, data + piece * 32, data + piece * 32 + 16, piece * 32, seed);
    }
    sums = {avalanche(sums.low), avalanche(sums.high)};
    for (unsigned piece = 4; piece < nbytes / 32; ++piece) {
      mix_two(sums, data + piece * 32, data + piece * 32 + 16, (piece - 4) * 32 + 3, seed);
    }
    // The last 32 bytes: halves in the other order, seed negated.
    mix_two(sums, data + nbytes - 16, data + nbytes - 32, 103, 0 - seed);
  }
  const std::uint64_t high = sums.low * kPrime64_1 + sums.high * kPrime64_4 + (nbytes - seed) * kPrime64_2;
  return {avalanche(sums.low + sums.high), 0 - avalanche(high)};
}

// Of at most kShortBytesMax bytes.
SNAPSTONE_HOST_DEVICE inline Hash hash_short(const std::uint8_t* data, std::size_t nbytes, std::uint64_t seed) {
  if (nbytes > 16) return hash_17_to_240(data, nbytes, seed);
  if (nbytes > 8) return hash_9_to_16(data, nbytes, seed);
  if (nbytes > 3) return hash_4_to_8(data, nbytes, seed);
  if (nbytes > 0) return hash_1_to_3(data, nbytes, seed);
  return hash_empty(seed);
}

// ---- above 240 bytes ------------------------------------------------------------------------------------------------

// What a word and its word of the secret add to the word's own accumulator; its neighbour's gets the word itself.
SNAPSTONE_HOST_DEVICE inline std::uint64_t product(std::uint64_t word, std::uint64_t secret_word) {
  const std::uint64_t value = word ^ secret_word;
  return multiply_halves(static_cast<std::uint32_t>(value), static_cast<std::uint32_t>(value >> 32));
}

SNAPSTONE_HOST_DEVICE constexpr std::uint64_t scramble(std::uint64_t accumulator, std::uint64_t secret_word) {
  return (accumulator ^ accumulator >> 47 ^ secret_word) * kPrime32_1;
}

// Blocks that are followed by a scramble; the rest of the input, 1 to 1024 bytes, has none.
SNAPSTONE_HOST_DEVICE constexpr std::uint64_t scrambled_blocks(std::uint64_t nbytes) {
  return (nbytes - 1) / kBlockBytes;
}

// Whole stripes of that rest which precede the last stripe: the last 64 bytes of the input, which may overlap them.
SNAPSTONE_HOST_DEVICE constexpr unsigned tail_stripes(std::uint64_t nbytes) {
  return static_cast<unsigned>((nbytes - 1) % kBlockBytes / kStripeBytes);
}

SNAPSTONE_HOST_DEVICE constexpr std::uint64_t merge_start_low(std::uint64_t nbytes) { return nbytes * kPrime64_1; }
SNAPSTONE_HOST_DEVICE constexpr std::uint64_t merge_start_high(std::uint64_t nbytes) { return ~(nbytes * kPrime64_2); }

// The state of one input above kShortBytesMax. Call blocks() for the first scrambled_blocks(nbytes) blocks, in order
// and in any portions, then finish() once.
class Accumulators {
 public:
  SNAPSTONE_HOST_DEVICE explicit Accumulators(std::uint64_t seed) : seed_(seed) {
    for (unsigned lane = 0; lane < kLanes; ++lane) words_[lane] = initial_accumulator(lane);
    for (unsigned index = 0; index < kSecretBytes / 8; ++index) secret_[index] = secret_word(index, seed);
  }

  // `count` blocks of kBlockBytes at `data`.
  SNAPSTONE_HOST_DEVICE void blocks(const std::uint8_t* data, std::uint64_t count) {
    // Locals, which the stripes cannot alias.
    std::uint64_t words[kLanes];
    for (unsigned lane = 0; lane < kLanes; ++lane) words[lane] = words_[lane];
    for (std::uint64_t block = 0; block < count; ++block) {
      for (unsigned stripe = 0; stripe < kBlockStripes; ++stripe) {
        accumulate(words, data + block * kBlockBytes + stripe * kStripeBytes, secret_ + stripe);
      }
      for (unsigned lane = 0; lane < kLanes; ++lane) {
        words[lane] = scramble(words[lane], secret_[kSecretScramble / 8 + lane]);
      }
    }
    for (unsigned lane = 0; lane < kLanes; ++lane) words_[lane] = words[lane];
  }

  // `data` and `nbytes` are of the whole input, of which only the bytes after the scrambled blocks and the last 64 are
  // read.
  SNAPSTONE_HOST_DEVICE Hash finish(const std::uint8_t* data, std::uint64_t nbytes) {
    const std::uint8_t* tail = data + scrambled_blocks(nbytes) * kBlockBytes;
    for (unsigned stripe = 0; stripe < tail_stripes(nbytes); ++stripe) {
      accumulate(words_, tail + stripe * kStripeBytes, secret_ + stripe);
    }
    std::uint64_t last[kLanes];
    for (unsigned lane = 0; lane < kLanes; ++lane) last[lane] = secret(kSecretLastStripe + 8 * lane, seed_);
    accumulate(words_, data + nbytes - kStripeBytes, last);
    return {merge(merge_start_low(nbytes), kSecretMergeLow), merge(merge_start_high(nbytes), kSecretMergeHigh)};
  }

 private:
  SNAPSTONE_HOST_DEVICE static void accumulate(std::uint64_t* words, const std::uint8_t* stripe,
                                               const std::uint64_t* secret_words) {
    std::uint64_t input[kLanes];
    std::memcpy(input, stripe, sizeof input);
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      words[lane] += product(input[lane], secret_words[lane]) + input[lane ^ 1];
    }
  }

  SNAPSTONE_HOST_DEVICE std::uint64_t merge(std::uint64_t start, unsigned offset) const {
    for (unsigned lane = 0; lane < kLanes; lane += 2) {
      start += multiply_fold(words_[lane] ^ secret(offset + 8 * lane, seed_),
                             words_[lane + 1] ^ secret(offset + 8 * lane + 8, seed_));
    }
    return avalanche(start);
  }

  std::uint64_t words_[kLanes];
  std::uint64_t secret_[kSecretBytes / 8];
  std::uint64_t seed_;
};

SNAPSTONE_HOST_DEVICE inline Hash hash(const std::uint8_t* data, std::size_t nbytes, std::uint64_t seed = 0) {
  if (nbytes <= kShortBytesMax) return hash_short(data, nbytes, seed);
  Accumulators accumulators(seed);
  accumulators.blocks(data, scrambled_blocks(nbytes));
  return accumulators.finish(data, nbytes);
}

// The 16 bytes that xxh128sum prints: the high word first, each word big-endian.
SNAPSTONE_HOST_DEVICE inline void store_canonical(const Hash& hash, std::uint8_t* target) {
  const std::uint64_t words[2] = {swap_bytes(hash.high), swap_bytes(hash.low)};
  std::memcpy(target, words, sizeof words);
}

}  // namespace snapstone::xxh3
