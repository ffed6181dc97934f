// Sixteen items at a time, in 16-byte vectors (SSE2, NEON; the compiler splits them elsewhere).
//
// Number the bytes of 16 items of N bytes by p = item * N + byte. Collecting the even bytes of the whole block before
// the odd ones moves the lowest bit of p to the top. After log2(N) such rounds the bits of `byte` are the top bits:
// vector k holds plane k. Joining is the same rounds backwards.
#include "codec/byte_planes.h"

#include <array>
#include <cassert>
#include <cstring>

namespace snapstone::codec {
namespace {

using Vector = std::uint8_t __attribute__((vector_size(16)));
constexpr std::size_t kVectorBytes = sizeof(Vector);

template <unsigned kItemBytes>
using Block = std::array<Vector, kItemBytes>;

inline Vector even_bytes(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
inline Vector odd_bytes(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
inline Vector low_zip(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Vector high_zip(Vector a, Vector b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

template <unsigned kItemBytes>
inline Block<kItemBytes> split_round(const Block<kItemBytes>& block) {
  Block<kItemBytes> result;
#pragma GCC unroll 16
  for (unsigned i = 0; i < kItemBytes / 2; ++i) {
    result[i] = even_bytes(block[2 * i], block[2 * i + 1]);
    result[kItemBytes / 2 + i] = odd_bytes(block[2 * i], block[2 * i + 1]);
  }
  return result;
}

template <unsigned kItemBytes>
inline Block<kItemBytes> join_round(const Block<kItemBytes>& block) {
  Block<kItemBytes> result;
#pragma GCC unroll 16
  for (unsigned i = 0; i < kItemBytes / 2; ++i) {
    result[2 * i] = low_zip(block[i], block[kItemBytes / 2 + i]);
    result[2 * i + 1] = high_zip(block[i], block[kItemBytes / 2 + i]);
  }
  return result;
}

template <unsigned kItemBytes>
void split(const std::uint8_t* source, std::size_t count, std::uint8_t* target) {
  std::size_t item = 0;
  for (; item + kVectorBytes <= count; item += kVectorBytes) {
    Block<kItemBytes> block;
    std::memcpy(&block, source + item * kItemBytes, sizeof block);
#pragma GCC unroll 4
    for (unsigned bit = 1; bit < kItemBytes; bit *= 2) {
      block = split_round<kItemBytes>(block);
    }
#pragma GCC unroll 16
    for (unsigned plane = 0; plane < kItemBytes; ++plane) {
      std::memcpy(target + plane * count + item, &block[plane], kVectorBytes);
    }
  }
  for (; item < count; ++item) {
    for (unsigned plane = 0; plane < kItemBytes; ++plane) {
      target[plane * count + item] = source[item * kItemBytes + plane];
    }
  }
}

template <unsigned kItemBytes>
void join(const std::uint8_t* source, std::size_t count, std::uint8_t* target) {
  std::size_t item = 0;
  for (; item + kVectorBytes <= count; item += kVectorBytes) {
    Block<kItemBytes> block;
#pragma GCC unroll 16
    for (unsigned plane = 0; plane < kItemBytes; ++plane) {
      std::memcpy(&block[plane], source + plane * count + item, kVectorBytes);
    }
#pragma GCC unroll 4
    for (unsigned bit = 1; bit < kItemBytes; bit *= 2) {
      block = join_round<kItemBytes>(block);
    }
    std::memcpy(target + item * kItemBytes, &block, sizeof block);
  }
  for (; item < count; ++item) {
    for (unsigned plane = 0; plane < kItemBytes; ++plane) {
      target[item * kItemBytes + plane] = source[plane * count + item];
    }
  }
}

// The tail that is not a whole item stays where it is. Returns how many whole items there are to split; 1-byte items
// are all tail.
std::size_t copy_tail(std::span<const std::uint8_t> source, unsigned item_bytes, std::span<std::uint8_t> target) {
  assert(source.size() == target.size());
  const std::size_t count = item_bytes == 1 ? 0 : source.size() / item_bytes;
  const std::size_t begin = count * item_bytes;
  if (begin != source.size()) {
    std::memcpy(target.data() + begin, source.data() + begin, source.size() - begin);
  }
  return count;
}

}  // namespace

void split_planes(std::span<const std::uint8_t> source, unsigned item_bytes, std::span<std::uint8_t> target) {
  const std::size_t count = copy_tail(source, item_bytes, target);
  switch (item_bytes) {
    case 2:
      return split<2>(source.data(), count, target.data());
    case 4:
      return split<4>(source.data(), count, target.data());
    case 8:
      return split<8>(source.data(), count, target.data());
    case 16:
      return split<16>(source.data(), count, target.data());
    default:
      assert(item_bytes == 1);
  }
}

void join_planes(std::span<const std::uint8_t> source, unsigned item_bytes, std::span<std::uint8_t> target) {
  const std::size_t count = copy_tail(source, item_bytes, target);
  switch (item_bytes) {
    case 2:
      return join<2>(source.data(), count, target.data());
    case 4:
      return join<4>(source.data(), count, target.data());
    case 8:
      return join<8>(source.data(), count, target.data());
    case 16:
      return join<16>(source.data(), count, target.data());
    default:
      assert(item_bytes == 1);
  }
}

}  // namespace snapstone::codec
