// A box of a shard with real memory behind it, read from an input: strides in any order and direction, with gaps.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "base/strided.h"
#include "fuzz_target.h"

namespace snapstone::fuzz {

struct RealBox {
  static constexpr std::int64_t kElementsMax = 4096;

  std::int64_t item_bytes = 1;
  std::vector<std::int64_t> shard_sizes, offsets, sizes, strides;
  std::size_t memory_bytes = 0;
  std::int64_t base = 0;  // of element 0 in memory

  explicit RealBox(Input& input) {
    item_bytes = 1ll << input.below(5);
    const auto rank = static_cast<std::size_t>(input.below(6));
    std::int64_t room = kElementsMax;
    for (std::size_t i = 0; i < rank; ++i) {
      const auto size =
          static_cast<std::int64_t>(input.below(static_cast<std::uint64_t>(std::min<std::int64_t>(room, 200)) + 1));
      room = std::max<std::int64_t>(room / std::max<std::int64_t>(size, 1), 1);
      shard_sizes.push_back(size);
      offsets.push_back(static_cast<std::int64_t>(input.below(static_cast<std::uint64_t>(size) + 1)));
      sizes.push_back(static_cast<std::int64_t>(input.below(static_cast<std::uint64_t>(size - offsets.back()) + 1)));
    }
    place(input, rank);
  }

  std::int64_t shard_bytes() const {
    return std::accumulate(shard_sizes.begin(), shard_sizes.end(), item_bytes, std::multiplies<>());
  }
  BoxTarget in(Bytes& memory) const {
    return {shard_sizes, offsets, {memory.data() + base, item_bytes, sizes, strides}};
  }
  // visit(place in the shard's string, place in memory) for each byte of the box, in the order of the string.
  template <typename Visit>
  void for_each_byte(Visit visit) const {
    if (std::count(sizes.begin(), sizes.end(), 0) != 0) return;
    std::vector<std::int64_t> index(sizes.size());
    while (true) {
      std::int64_t string = 0;
      std::int64_t memory = base;
      for (std::size_t i = 0; i < sizes.size(); ++i) {
        string = string * shard_sizes[i] + offsets[i] + index[i];
        memory += index[i] * strides[i];
      }
      for (std::int64_t byte = 0; byte < item_bytes; ++byte) visit(string * item_bytes + byte, memory + byte);
      std::size_t axis = sizes.size();
      while (axis > 0 && ++index[axis - 1] == sizes[axis - 1]) index[--axis] = 0;
      if (axis == 0) return;
    }
  }

 private:
  // Dimensions in an order of their own, some backwards, some with a gap; memory ends with the last byte used.
  void place(Input& input, std::size_t rank) {
    std::vector<std::size_t> order(rank);
    std::iota(order.begin(), order.end(), std::size_t{0});
    for (std::size_t i = rank; i > 1; --i) std::swap(order[i - 1], order[input.below(i)]);
    strides.resize(rank);
    std::int64_t stride = item_bytes;
    std::int64_t used = item_bytes;
    for (const std::size_t axis : order) {
      const std::uint8_t kind = input.byte();
      stride += (kind & 2) != 0 ? item_bytes : 0;
      const std::int64_t reach = std::max<std::int64_t>(sizes[axis] - 1, 0) * stride;
      strides[axis] = (kind & 1) != 0 ? -stride : stride;
      if ((kind & 1) != 0) base += reach;
      used += reach;
      stride = used;
    }
    memory_bytes = static_cast<std::size_t>(used);
  }
};

}  // namespace snapstone::fuzz
