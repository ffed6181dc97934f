#include "codec/flipped_bit.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <vector>

#include "seed.h"

namespace snapstone::codec {
namespace {

using Bytes = std::vector<std::uint8_t>;
constexpr std::chrono::milliseconds kLong{60'000};
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr std::uint64_t kStride = 37;
#else
constexpr std::uint64_t kStride = 3;
#endif

Bytes random_bytes(std::size_t nbytes, std::mt19937_64& random) {
  Bytes bytes(nbytes);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
  return bytes;
}

void flip(Bytes& bytes, std::uint64_t bit) { bytes[bit / 8] ^= static_cast<std::uint8_t>(1u << bit % 8); }

TEST(FlippedBit, is_found_in_inputs_of_all_sizes) {
  std::mt19937_64 random(testing::seed());
  for (const std::size_t nbytes : {1,    3,    8,    16,   17,   128,  129,  240,  241,  1023, 1024,
                                   1025, 1087, 1088, 2047, 2048, 2049, 3072, 3073, 5000, 8192, 20'000}) {
    Bytes bytes = random_bytes(nbytes, random);
    const Digest wanted = digest(bytes);
    std::vector<std::uint64_t> bits = {0, 7, 8 * nbytes - 1, 8 * (nbytes - 1)};
    for (int i = 0; i < 12; ++i) bits.push_back(random() % (8 * nbytes));
    for (const std::uint64_t bit : bits) {
      flip(bytes, bit);
      const FlippedBit found = find_flipped_bit(bytes, wanted, kLong);
      ASSERT_EQ(found.bit, bit) << nbytes << " bytes";
      ASSERT_TRUE(found.complete);
      flip(bytes, bit);
    }
  }
}

TEST(FlippedBit, is_found_at_every_bit_of_a_block_that_is_carried) {
  std::mt19937_64 random(testing::seed());
  Bytes bytes = random_bytes(3500, random);
  const Digest wanted = digest(bytes);
  for (std::uint64_t bit = 0; bit < 8 * bytes.size(); bit += kStride) {
    flip(bytes, bit);
    ASSERT_EQ(find_flipped_bit(bytes, wanted, kLong).bit, bit);
    flip(bytes, bit);
  }
}

TEST(FlippedBit, is_not_made_up) {
  std::mt19937_64 random(testing::seed());
  for (const std::size_t nbytes : {2, 100, 1000, 9000}) {
    Bytes bytes = random_bytes(nbytes, random);
    const Digest wanted = digest(bytes);
    flip(bytes, 3);
    flip(bytes, 8 * nbytes - 2);
    const FlippedBit found = find_flipped_bit(bytes, wanted, kLong);
    EXPECT_EQ(found.bit, std::nullopt) << nbytes << " bytes";
    EXPECT_TRUE(found.complete);
  }
  EXPECT_EQ(find_flipped_bit({}, digest({}), kLong).bit, std::nullopt);
}

TEST(FlippedBit, is_given_up_when_the_time_is_over) {
  std::mt19937_64 random(testing::seed());
  Bytes bytes = random_bytes(4 << 20, random);
  const Digest wanted = digest(bytes);
  flip(bytes, 1);
  const FlippedBit found = find_flipped_bit(bytes, wanted, std::chrono::milliseconds(1));
  EXPECT_EQ(found.bit, std::nullopt);
  EXPECT_FALSE(found.complete);
}

}  // namespace
}  // namespace snapstone::codec
