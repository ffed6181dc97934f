#include "codec/flipped_bit.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>
#include <vector>

#include "base/xxh3.h"

// The inner loop is made for wider vectors too, and the machine's best is chosen when the program starts.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SNAPSTONE_FOR_EACH_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SNAPSTONE_FOR_EACH_VECTOR
#endif

namespace snapstone::codec {
namespace {

using Clock = std::chrono::steady_clock;
using Words = std::array<std::uint64_t, xxh3::kLanes>;

constexpr unsigned kBitsPerWord = 64;
constexpr std::size_t kCandidates = std::size_t{xxh3::kBlockStripes} * kBitsPerWord;  // bits of a block, in one lane

std::uint64_t secret_of(unsigned stripe, unsigned lane) { return xxh3::secret_word(stripe + lane, 0); }

xxh3::Hash parse(const Digest& digest) {
  std::uint64_t words[2];
  std::memcpy(words, digest.data(), sizeof words);
  return {xxh3::swap_bytes(words[1]), xxh3::swap_bytes(words[0])};
}

void add_stripe(Words& sums, const std::uint8_t* stripe, unsigned secret_word) {
  for (unsigned lane = 0; lane < xxh3::kLanes; ++lane) {
    const std::uint64_t word = xxh3::read64(stripe + 8 * lane);
    sums[lane] += xxh3::product(word, secret_of(secret_word, lane));
    sums[lane ^ 1] += word;
  }
}

// `values` through the blocks whose sums stand `stride` apart.
SNAPSTONE_FOR_EACH_VECTOR
void carry(std::uint64_t* values, std::size_t count, const std::uint64_t* sums, std::size_t blocks, std::size_t stride,
           std::uint64_t secret) {
  for (std::size_t block = 0; block < blocks; ++block) {
    const std::uint64_t sum = sums[block * stride];
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint64_t value = values[i] + sum;
      values[i] = (value ^ value >> 47 ^ secret) * xxh3::kPrime32_1;
    }
  }
}

// Every bit of a short input, and of the end of a long one: each is flipped and hashed.
template <typename HashOf>
std::optional<std::uint64_t> try_each(std::span<std::uint8_t> bytes, std::size_t begin, const xxh3::Hash& wanted,
                                      const HashOf& hash_of) {
  for (std::size_t at = bytes.size(); at-- > begin;) {
    for (unsigned bit = 0; bit < 8; ++bit) {
      const auto mask = static_cast<std::uint8_t>(1u << bit);
      bytes[at] ^= mask;
      const xxh3::Hash found = hash_of(bytes);
      bytes[at] ^= mask;
      if (found.low == wanted.low && found.high == wanted.high) return 8 * at + bit;
    }
  }
  return std::nullopt;
}

// The blocks of a long input that are followed by others: bits of these are carried to the end.
class Blocks {
 public:
  // `count` blocks, all followed by a scramble, at the beginning of `bytes`.
  Blocks(std::span<const std::uint8_t> bytes, std::size_t count)
      : bytes_(bytes), count_(count), sums_(count), before_(count) {
    Words state;
    for (unsigned lane = 0; lane < xxh3::kLanes; ++lane) state[lane] = xxh3::initial_accumulator(lane);
    for (std::size_t block = 0; block < count; ++block) {
      before_[block] = state;
      for (unsigned stripe = 0; stripe < xxh3::kBlockStripes; ++stripe)
        add_stripe(sums_[block], at(block, stripe), stripe);
      for (unsigned lane = 0; lane < xxh3::kLanes; ++lane) {
        state[lane] = xxh3::scramble(state[lane] + sums_[block][lane], scramble_secret(lane));
      }
    }
    const std::uint8_t* tail = bytes.data() + count * xxh3::kBlockBytes;
    for (unsigned stripe = 0; stripe < xxh3::tail_stripes(bytes.size()); ++stripe) {
      add_stripe(tail_, tail + stripe * xxh3::kStripeBytes, stripe);
    }
    const std::uint8_t* last = bytes.data() + bytes.size() - xxh3::kStripeBytes;
    for (unsigned lane = 0; lane < xxh3::kLanes; ++lane) {
      const std::uint64_t word = xxh3::read64(last + 8 * lane);
      tail_[lane] += xxh3::product(word, xxh3::secret(xxh3::kSecretLastStripe + 8 * lane, 0));
      tail_[lane ^ 1] += word;
    }
    for (unsigned lane = 0; lane < xxh3::kLanes; ++lane) end_[lane] = state[lane] + tail_[lane];
  }

  // The bit of `block` that must be flipped, if it is one.
  std::optional<std::uint64_t> find(std::size_t block, const xxh3::Hash& wanted) {
    for (unsigned lane = 0; lane < xxh3::kLanes; ++lane) {
      fill(block, lane);
      carry_to_end(values_.data(), kCandidates, block, lane);
      carry_to_end(plus_.data(), kBitsPerWord, block, lane ^ 1);
      carry_to_end(minus_.data(), kBitsPerWord, block, lane ^ 1);
      for (std::size_t i = 0; i < kCandidates; ++i) {
        const unsigned stripe = static_cast<unsigned>(i / kBitsPerWord);
        const unsigned bit = i % kBitsPerWord;
        const bool was_set = xxh3::read64(at(block, stripe) + 8 * lane) >> bit & 1;
        Words end = end_;
        end[lane] = values_[i];
        end[lane ^ 1] = was_set ? minus_[bit] : plus_[bit];
        if (merge(end, xxh3::merge_start_low(bytes_.size()), xxh3::kSecretMergeLow) == wanted.low &&
            merge(end, xxh3::merge_start_high(bytes_.size()), xxh3::kSecretMergeHigh) == wanted.high) {
          return 8 * (block * xxh3::kBlockBytes + stripe * xxh3::kStripeBytes + std::size_t{8} * lane) + bit;
        }
      }
    }
    return std::nullopt;
  }

 private:
  static std::uint64_t scramble_secret(unsigned lane) { return xxh3::secret_word(xxh3::kSecretScramble / 8 + lane, 0); }

  static std::uint64_t merge(const Words& words, std::uint64_t start, unsigned offset) {
    for (unsigned lane = 0; lane < xxh3::kLanes; lane += 2) {
      start += xxh3::multiply_fold(words[lane] ^ xxh3::secret(offset + 8 * lane, 0),
                                   words[lane + 1] ^ xxh3::secret(offset + 8 * lane + 8, 0));
    }
    return xxh3::avalanche(start);
  }

  const std::uint8_t* at(std::size_t block, unsigned stripe) const {
    return bytes_.data() + block * xxh3::kBlockBytes + stripe * xxh3::kStripeBytes;
  }

  // What the two accumulators hold before the block's scramble, for each bit of the words that are multiplied into
  // `lane`: that one for every bit, its neighbour for every distance that a flipped bit makes.
  void fill(std::size_t block, unsigned lane) {
    const std::uint64_t own = before_[block][lane];
    for (unsigned stripe = 0; stripe < xxh3::kBlockStripes; ++stripe) {
      const std::uint64_t word = xxh3::read64(at(block, stripe) + 8 * lane);
      const std::uint64_t secret = secret_of(stripe, lane);
      const std::uint64_t others = own - xxh3::product(word, secret);
      for (unsigned bit = 0; bit < kBitsPerWord; ++bit) {
        values_[stripe * kBitsPerWord + bit] = others + xxh3::product(word ^ std::uint64_t{1} << bit, secret);
      }
    }
    for (unsigned bit = 0; bit < kBitsPerWord; ++bit) {
      plus_[bit] = before_[block][lane ^ 1] + (std::uint64_t{1} << bit);
      minus_[bit] = before_[block][lane ^ 1] - (std::uint64_t{1} << bit);
    }
  }

  void carry_to_end(std::uint64_t* values, std::size_t count, std::size_t block, unsigned lane) const {
    carry(values, count, &sums_[block][lane], count_ - block, xxh3::kLanes, scramble_secret(lane));
    for (std::size_t i = 0; i < count; ++i) values[i] += tail_[lane];
  }

  std::span<const std::uint8_t> bytes_;
  std::size_t count_;
  std::vector<Words> sums_;    // what each block adds
  std::vector<Words> before_;  // the accumulators before each
  Words tail_{};               // what comes after the last scramble
  Words end_{};                // the accumulators at the end
  std::array<std::uint64_t, kCandidates> values_;
  std::array<std::uint64_t, kBitsPerWord> plus_;
  std::array<std::uint64_t, kBitsPerWord> minus_;
};

}  // namespace

FlippedBit find_flipped_bit(std::span<const std::uint8_t> bytes, const Digest& wanted,
                            std::chrono::milliseconds limit) {
  const Clock::time_point deadline = Clock::now() + limit;
  const xxh3::Hash hash = parse(wanted);
  if (bytes.empty()) return {};
  if (bytes.size() <= xxh3::kShortBytesMax) {
    std::vector<std::uint8_t> copy(bytes.begin(), bytes.end());
    const auto hash_of = [](std::span<const std::uint8_t> all) { return xxh3::hash(all.data(), all.size()); };
    return {try_each(copy, 0, hash, hash_of), true};
  }
  // The last stripe may reach back into the last block that is scrambled, so that one counts as part of the end.
  const std::size_t scrambled = xxh3::scrambled_blocks(bytes.size());
  const std::size_t carried = scrambled == 0 ? 0 : scrambled - 1;
  const std::size_t begin = carried * xxh3::kBlockBytes;
  xxh3::Accumulators before_end(0);
  before_end.blocks(bytes.data(), carried);
  std::vector<std::uint8_t> copy(bytes.begin(), bytes.end());
  const auto hash_of = [&](std::span<const std::uint8_t> all) {
    xxh3::Accumulators accumulators = before_end;
    accumulators.blocks(all.data() + begin, scrambled - carried);
    return accumulators.finish(all.data(), all.size());
  };
  if (const auto bit = try_each(copy, begin, hash, hash_of)) return {bit, true};
  if (carried == 0) return {};
  Blocks blocks(bytes, scrambled);
  for (std::size_t block = carried; block-- > 0;) {
    if (const auto bit = blocks.find(block, hash)) return {bit, true};
    if (Clock::now() >= deadline) return {std::nullopt, block == 0};
  }
  return {};
}

}  // namespace snapstone::codec
