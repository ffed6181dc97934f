#include "codec/digest.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "seed.h"

namespace snapstone::codec {
namespace {

using Bytes = std::vector<std::uint8_t>;

// What the vectors below were made of: byte i is 7 * i mod 251.
Bytes pattern(std::size_t nbytes) {
  Bytes bytes(nbytes);
  for (std::size_t i = 0; i < nbytes; ++i) {
    bytes[i] = static_cast<std::uint8_t>(i * 7 % 251);
  }
  return bytes;
}

TEST(Digest, is_what_xxh128sum_prints) {
  const auto hex_of = [](const std::string& text) {
    return hex(digest({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}));
  };
  EXPECT_EQ(hex_of(""), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(hex_of("a"), "a96faf705af16834e6c632b61e964e1f");
  EXPECT_EQ(hex_of("abc"), "06b05ab6733a618578af5f94892f3950");
  EXPECT_EQ(hex(digest(pattern(1000))), "5ed35fc6b4f0ef20d1eb8367bf3294e7");
  EXPECT_EQ(hex(digest(pattern(300001))), "e1dd65711a4dd4ff453cd7565c62e319");
  EXPECT_EQ(hex(digest(pattern(1 << 20))), "63c6b140bb692ff5931fb38ab0469ad0");
}

TEST(Digest, changes_with_every_flipped_bit) {
  Bytes bytes = pattern(3000);
  const Digest before = digest(bytes);
  for (std::size_t bit = 0; bit < bytes.size() * 8; bit += 13) {
    bytes[bit / 8] ^= static_cast<std::uint8_t>(1u << (bit % 8));
    ASSERT_NE(digest(bytes), before) << "bit " << bit;
    bytes[bit / 8] ^= static_cast<std::uint8_t>(1u << (bit % 8));
  }
  EXPECT_EQ(digest(bytes), before);
}

void expect_copied(const Bytes& source, std::size_t begin, std::size_t nbytes) {
  Bytes target(nbytes + 2, 0xA5);
  const std::span<const std::uint8_t> part = std::span(source).subspan(begin, nbytes);
  ASSERT_EQ(copy_and_digest(part, target.data() + 1), digest(part)) << nbytes << " bytes";
  ASSERT_TRUE(std::equal(part.begin(), part.end(), target.begin() + 1)) << nbytes << " bytes";
  ASSERT_EQ(target.front(), 0xA5);
  ASSERT_EQ(target.back(), 0xA5);
}

TEST(CopyAndDigest, copies_and_equals_the_digest_around_its_piece_size) {
  const Bytes source = pattern(600 << 10);
  for (const std::size_t pieces : {1, 2, 4}) {
    const std::size_t nbytes = pieces * (128 << 10);
    expect_copied(source, 0, nbytes - 1);
    expect_copied(source, 3, nbytes);
    expect_copied(source, 1, nbytes + 1);
  }
  expect_copied(source, 0, 0);
  expect_copied(source, 0, 1);
}

TEST(CopyAndDigest, equals_the_digest_for_random_sizes_on_several_threads) {
  const Bytes source = pattern(1 << 20);
  std::vector<std::jthread> threads;
  for (std::uint64_t i = 0; i < 3; ++i) {
    threads.emplace_back([&source, i] {
      std::mt19937_64 random(testing::seed() + i);
      for (int round = 0; round < 60; ++round) {
        const std::size_t nbytes = random() % source.size();
        expect_copied(source, random() % (source.size() - nbytes), nbytes);
      }
    });
  }
}

}  // namespace
}  // namespace snapstone::codec
