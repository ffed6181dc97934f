// What the fuzz targets share: numbers and bytes taken from an input, and a check that ends the process.
//
// A target is one run_input(), which limited_input.cc calls, and holds to limits of time and memory. Built with
// libFuzzer it runs on inputs that libFuzzer makes up
// (`make fuzz`); built with corpus_main.cc it runs on the files of its corpus, as one of the native tests. Whatever an
// input says, a target may end in the typed errors of its subject alone: every other exception, every report of a
// sanitizer and every failed require() is a finding.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

namespace snapstone::fuzz {

using Bytes = std::vector<std::uint8_t>;

int run_input(const std::uint8_t* data, std::size_t size);

inline void require(bool condition, const char* promise) {
  if (condition) return;
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::abort();
}

// The input from its start on; zeros once it is used up.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : left_(data, size) {}

  bool empty() const { return left_.empty(); }

  template <typename Number>
  Number raw() {
    Number number{};
    const std::size_t nbytes = std::min(sizeof number, left_.size());
    if (nbytes != 0) std::memcpy(&number, left_.data(), nbytes);
    left_ = left_.subspan(nbytes);
    return number;
  }
  std::uint8_t byte() { return raw<std::uint8_t>(); }
  bool flag() { return (byte() & 1) != 0; }
  std::uint64_t below(std::uint64_t count) {  // of one byte where that is enough
    const std::uint64_t number = count <= 256 ? byte() : count <= 65536 ? raw<std::uint16_t>() : raw<std::uint64_t>();
    return count == 0 ? 0 : number % count;
  }
  // Any number: mostly small ones, the edges of integer types, or eight bytes as they are.
  std::uint64_t number() {
    constexpr std::uint64_t kMax = std::numeric_limits<std::uint64_t>::max();
    static constexpr std::uint64_t kEdges[] = {0,           1,
                                               4095,        4096,
                                               4097,        65535,
                                               65536,       1u << 31,
                                               kMax >> 32,  (kMax >> 32) + 1,
                                               kMax >> 2,   (kMax >> 2) + 1,
                                               kMax >> 1,   (kMax >> 1) + 1,
                                               kMax - 4095, kMax - 1,
                                               kMax};
    switch (const std::uint8_t kind = byte(); kind % 8) {
      case 0:
        return kEdges[byte() % std::size(kEdges)];
      case 1:
        return raw<std::uint64_t>();
      case 2:
        return raw<std::uint32_t>();
      case 3:
      case 4:
        return raw<std::uint16_t>();
      default:
        return kind / 8;
    }
  }
  std::int64_t signed_number() { return static_cast<std::int64_t>(number()); }
  Bytes bytes(std::size_t count) {
    Bytes taken(count);
    const std::size_t there = std::min(count, left_.size());
    std::copy_n(left_.begin(), there, taken.begin());
    left_ = left_.subspan(there);
    return taken;
  }
  Bytes rest() { return bytes(left_.size()); }

 private:
  std::span<const std::uint8_t> left_;
};

// `count` bytes that differ from place to place and compress a little, for contents that an input need not carry.
inline Bytes pattern(std::size_t count, std::uint32_t seed) {
  Bytes made(count);
  std::uint32_t state = seed * 2654435761u + 1;
  for (std::size_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    made[i] = static_cast<std::uint8_t>(i % 4 == 3 ? seed : state >> 24);
  }
  return made;
}

}  // namespace snapstone::fuzz
