// Boxes of any shape: numbers that fit no memory are refused or counted without overflow; boxes that are real are
// copied by scatter(), gather() and their lists of blocks as element by element, and touch nothing else.
#include "base/strided.h"

#include <stdexcept>

#include "base/strided_blocks.h"
#include "fuzz_target.h"
#include "real_box.h"

namespace snapstone {
namespace {

using fuzz::Bytes;
using fuzz::Input;
using fuzz::RealBox;
using fuzz::require;

void copy_block(const StridedBlock& block, const std::uint8_t* source, std::uint8_t* target, std::size_t axis = 0,
                std::int64_t from = 0, std::int64_t to = 0) {
  if (axis == block.dims.size()) {
    std::memcpy(target + block.target + to, source + block.source + from, static_cast<std::size_t>(block.unit_bytes));
    return;
  }
  for (std::int64_t i = 0; i < block.dims[axis].size; ++i) {
    copy_block(block, source, target, axis + 1, from + i * block.dims[axis].source_stride,
               to + i * block.dims[axis].target_stride);
  }
}

// Bytes [begin, end) of the string, into memory that holds them exactly.
void check_part(const RealBox& real, const Bytes& string, std::int64_t begin, std::int64_t end) {
  const Bytes part(string.begin() + begin, string.begin() + end);
  Bytes expected(real.memory_bytes);
  std::int64_t count = 0;
  real.for_each_byte([&](std::int64_t at, std::int64_t place) {
    if (at < begin || at >= end) return;
    expected[static_cast<std::size_t>(place)] = string[static_cast<std::size_t>(at)];
    ++count;
  });
  Bytes scattered(real.memory_bytes);
  const BoxTarget box = real.in(scattered);
  require(scatter(part.data(), begin, end, box) == count, "scatter() counts what it copies");
  require(scattered == expected, "scatter() copies as element by element");
  Bytes collapsed(real.memory_bytes);
  scatter(part.data(), begin, end, real.in(collapsed).collapsed());
  require(collapsed == expected, "a collapsed box is the same");
  require(box.bytes_before(end) - box.bytes_before(begin) == count, "bytes_before() counts the same");
  Bytes by_blocks(real.memory_bytes);
  const BoxTarget blocks_box = real.in(by_blocks);
  for (const StridedBlock& block : scatter_blocks(begin, end, blocks_box)) {
    const StridedBlock ordered = block.in_target_order();
    if (real.base & 1) {
      Bytes packed(static_cast<std::size_t>(ordered.nbytes()));
      gather_block(ordered, part.data(), packed.data());
      copy_block(ordered.packed(), packed.data(), blocks_box.target.data);
    } else {
      copy_block(ordered, part.data(), blocks_box.target.data);
    }
  }
  require(by_blocks == expected, "blocks copy as scatter() does");
}

void check_gather(const RealBox& real, std::int64_t begin, std::int64_t end) {
  Bytes memory = fuzz::pattern(real.memory_bytes, 3);
  const StridedView view = real.in(memory).target;
  const std::int64_t nbytes = view.nbytes();
  begin = std::min(begin, nbytes);
  end = std::clamp(end, begin, nbytes);
  Bytes gathered(static_cast<std::size_t>(end - begin));
  gather(view, begin, end, gathered.data());
  Bytes by_collapsed(gathered.size());
  gather(view.collapsed(), begin, end, by_collapsed.data());
  require(gathered == by_collapsed, "a collapsed view is the same");
  std::int64_t at = 0;
  real.for_each_byte([&](std::int64_t, std::int64_t place) {
    if (at >= begin && at < end) {
      require(gathered[static_cast<std::size_t>(at - begin)] == memory[static_cast<std::size_t>(place)],
              "gather() copies as element by element");
    }
    ++at;
  });
}

// Sizes as a header may have them.
void check_any_sizes(Input& input) {
  StridedView view{nullptr, 1ll << input.below(5), {}, {}};
  for (std::uint64_t rank = input.below(6); rank > 0; --rank) {
    view.sizes.push_back(static_cast<std::int64_t>(input.number() >> 1));
  }
  try {
    require(view.nbytes() >= 0, "a number of bytes is not negative");
  } catch (const std::overflow_error&) {
  }
}

}  // namespace
}  // namespace snapstone

int snapstone::fuzz::run_input(const std::uint8_t* data, std::size_t size) {
  using namespace snapstone;
  Input input(data, size);
  const RealBox real(input);
  const Bytes string = fuzz::pattern(static_cast<std::size_t>(real.shard_bytes()), 1);
  std::int64_t begin = input.raw<std::uint16_t>() % (real.shard_bytes() + 1);
  std::int64_t end = input.flag() ? real.shard_bytes() : input.raw<std::uint16_t>() % (real.shard_bytes() + 1);
  if (begin > end) std::swap(begin, end);
  check_part(real, string, begin, end);
  check_gather(real, begin, end);
  check_any_sizes(input);
  return 0;
}
