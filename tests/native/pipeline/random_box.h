// Random strided targets, and the naive copy that says what must reach them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace snapstone::pipeline {

// A random box of a random shape, with the strides of a random larger tensor around it.
struct RandomBox {
  std::vector<std::int64_t> shard_sizes, offsets, sizes, strides;
  std::int64_t memory_nbytes = 0;
  std::int64_t item_bytes = 1;

  RandomBox(std::mt19937_64& random, std::int64_t nbytes_max) {
    item_bytes = 1ll << random() % 4;
    const std::size_t rank = 1 + random() % 4;
    std::int64_t room = nbytes_max / item_bytes;
    for (std::size_t i = 0; i < rank; ++i) {
      const std::int64_t size =
          1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(i + 1 < rank ? 12 : room));
      shard_sizes.push_back(size);
      room = std::max<std::int64_t>(room / size, 1);
      offsets.push_back(static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(size)));
      sizes.push_back(1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(size - offsets.back())));
    }
    strides.resize(rank);
    std::vector<std::size_t> order(rank);
    for (std::size_t i = 0; i < rank; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    std::int64_t stride = item_bytes;
    for (const std::size_t i : order) {
      strides[i] = stride;
      stride *= sizes[i] + static_cast<std::int64_t>(random() % 2);
    }
    memory_nbytes = stride;
  }
  std::uint64_t shard_nbytes() const {
    std::int64_t nbytes = item_bytes;
    for (const std::int64_t size : shard_sizes) nbytes *= size;
    return static_cast<std::uint64_t>(nbytes);
  }
  // Calls visit(offset in the shard's string, offset in memory) for each element of the box.
  template <typename Visit>
  void for_each_element(Visit visit) const {
    std::vector<std::int64_t> index(sizes.size());
    while (true) {
      std::int64_t string = 0;
      std::int64_t memory = 0;
      for (std::size_t i = 0; i < sizes.size(); ++i) {
        string = string * shard_sizes[i] + offsets[i] + index[i];
        memory += index[i] * strides[i];
      }
      visit(string * item_bytes, memory);
      std::size_t axis = sizes.size();
      while (axis > 0 && ++index[axis - 1] == sizes[axis - 1]) index[--axis] = 0;
      if (axis == 0) return;
    }
  }
};

}  // namespace snapstone::pipeline
