// base/xxh3.h against libxxhash: every length in which the algorithm takes another road, seeds, any alignment.
#include "base/xxh3.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <array>
#include <memory>
#include <random>
#include <vector>

#include "seed.h"

namespace snapstone {
namespace {

constexpr std::size_t kAlignments = 16;

std::vector<std::uint64_t> seeds() {
  std::mt19937_64 random(testing::seed());
  return {0, 1, 0xffffffff00000000u, ~std::uint64_t{0}, random(), random()};
}

std::vector<std::uint8_t> noise(std::size_t nbytes) {
  std::mt19937_64 random(testing::seed());
  std::vector<std::uint8_t> bytes(nbytes);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
  return bytes;
}

using Canonical = std::array<std::uint8_t, 16>;

Canonical of_libxxhash(const std::uint8_t* data, std::size_t nbytes, std::uint64_t seed) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_withSeed(data, nbytes, seed));
  Canonical result;
  std::copy(std::begin(canonical.digest), std::end(canonical.digest), result.begin());
  return result;
}

Canonical canonical(const xxh3::Hash& hash) {
  Canonical result;
  xxh3::store_canonical(hash, result.data());
  return result;
}

// The input is a heap block of its own exact size behind `alignment` bytes, so that a sanitizer sees reads outside it.
void expect_equal(const std::vector<std::uint8_t>& bytes, std::size_t nbytes, std::size_t alignment,
                  std::uint64_t seed) {
  const auto block = std::make_unique_for_overwrite<std::uint8_t[]>(alignment + nbytes);
  std::copy_n(bytes.data() + alignment, nbytes, block.get() + alignment);
  const std::uint8_t* data = block.get() + alignment;
  ASSERT_EQ(canonical(xxh3::hash(data, nbytes, seed)), of_libxxhash(data, nbytes, seed))
      << nbytes << " bytes at " << alignment << ", seed " << seed;
}

TEST(Xxh3, is_what_xxh128sum_prints) {
  const Canonical empty = {0x99, 0xaa, 0x06, 0xd3, 0x01, 0x47, 0x98, 0xd8,
                           0x60, 0x01, 0xc3, 0x24, 0x46, 0x8d, 0x49, 0x7f};
  EXPECT_EQ(canonical(xxh3::hash(nullptr, 0)), empty);
  const Canonical abc = {0x06, 0xb0, 0x5a, 0xb6, 0x73, 0x3a, 0x61, 0x85,
                         0x78, 0xaf, 0x5f, 0x94, 0x89, 0x2f, 0x39, 0x50};
  EXPECT_EQ(canonical(xxh3::hash(reinterpret_cast<const std::uint8_t*>("abc"), 3)), abc);
}

TEST(Xxh3, equals_libxxhash_for_every_length_up_to_4096) {
  const std::vector<std::uint8_t> bytes = noise(4096 + kAlignments);
  for (const std::uint64_t seed : seeds()) {
    for (std::size_t nbytes = 0; nbytes <= 4096; ++nbytes) {
      expect_equal(bytes, nbytes, nbytes % kAlignments, seed);
    }
  }
}

TEST(Xxh3, equals_libxxhash_at_every_alignment) {
  const std::vector<std::uint8_t> bytes = noise(9000);
  for (const std::size_t nbytes : {1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 1024, 1025, 5000}) {
    for (std::size_t alignment = 0; alignment < kAlignments; ++alignment) {
      expect_equal(bytes, nbytes, alignment, 0);
    }
  }
}

TEST(Xxh3, equals_libxxhash_around_block_boundaries) {
  const std::vector<std::uint8_t> bytes = noise((5u << 20) + 4096);
  const std::vector<std::uint64_t> all = seeds();
  std::size_t count = 0;
  for (const std::size_t blocks : {5, 31, 32, 33, 63, 64, 100, 1023, 1024, 1025, 2048, 4096, 5000}) {
    for (const int offset : {-65, -64, -63, -1, 0, 1, 63, 64, 65, 511, 960, 1023}) {
      expect_equal(bytes, blocks * xxh3::kBlockBytes + static_cast<std::size_t>(offset), count % kAlignments,
                   all[count % all.size()]);
      ++count;
    }
  }
}

TEST(Xxh3, takes_blocks_in_any_portions) {
  const std::vector<std::uint8_t> bytes = noise(200 << 10);
  std::mt19937_64 random(testing::seed());
  for (const std::size_t nbytes : {241u, 1024u, 1025u, 65536u, 200000u}) {
    for (int round = 0; round < 20; ++round) {
      xxh3::Accumulators accumulators(7);
      const std::uint64_t blocks = xxh3::scrambled_blocks(nbytes);
      for (std::uint64_t done = 0; done < blocks;) {
        const std::uint64_t portion = random() % (blocks - done + 1);
        accumulators.blocks(bytes.data() + done * xxh3::kBlockBytes, portion);
        done += portion;
      }
      ASSERT_EQ(canonical(accumulators.finish(bytes.data(), nbytes)), of_libxxhash(bytes.data(), nbytes, 7)) << nbytes;
    }
  }
}

// The secret and the first accumulators are known when the compiler runs, so a kernel may have them as immediates.
static_assert(xxh3::default_secret(0) == xxh3::default_secret_word(0));
static_assert(xxh3::secret(8, 5) == xxh3::default_secret_word(1) - 5);
static_assert(xxh3::secret(3, 0) == xxh3::default_secret(3));
static_assert(xxh3::initial_accumulator(1) == xxh3::kPrime64_1);

}  // namespace
}  // namespace snapstone
