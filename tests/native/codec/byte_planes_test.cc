#include "codec/byte_planes.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "seed.h"

namespace snapstone::codec {
namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes naive_planes(const Bytes& source, std::size_t item_bytes) {
  const std::size_t count = source.size() / item_bytes;
  Bytes target;
  for (std::size_t plane = 0; plane < item_bytes; ++plane) {
    for (std::size_t item = 0; item < count; ++item) {
      target.push_back(source[item * item_bytes + plane]);
    }
  }
  target.insert(target.end(), source.begin() + static_cast<std::ptrdiff_t>(count * item_bytes), source.end());
  return target;
}

TEST(BytePlanes, put_equal_bytes_of_the_items_together) {
  const std::string source = "a1b2c3d4?";
  Bytes target(source.size());
  split_planes({reinterpret_cast<const std::uint8_t*>(source.data()), source.size()}, 2, target);
  EXPECT_EQ(std::string(target.begin(), target.end()), "abcd1234?");
}

TEST(BytePlanes, equal_the_definition_and_join_again_for_every_size) {
  std::mt19937_64 random(testing::seed());
  for (const unsigned item_bytes : {1u, 2u, 4u, 8u, 16u}) {
    for (std::size_t nbytes = 0; nbytes < 1200; nbytes += nbytes < 300 ? 1 : 37) {
      Bytes source(nbytes);
      for (std::uint8_t& byte : source) {
        byte = static_cast<std::uint8_t>(random());
      }
      Bytes planes(nbytes);
      split_planes(source, item_bytes, planes);
      ASSERT_EQ(planes, naive_planes(source, item_bytes)) << item_bytes << " of " << nbytes;
      Bytes joined(nbytes);
      join_planes(planes, item_bytes, joined);
      ASSERT_EQ(joined, source) << item_bytes << " of " << nbytes;
    }
  }
}

}  // namespace
}  // namespace snapstone::codec
