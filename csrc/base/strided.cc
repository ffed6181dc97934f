// One walk serves both directions: gather() is the case where the box is the whole shard.
//
// Layout and Clip (strided_layout.h) say which bytes go where. Where the last two dimensions are transposed in memory,
// whole planes are copied in tiles, so that a cache line of the tensor is used up before it is evicted.
#include "base/strided.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "base/strided_layout.h"

namespace snapstone {
namespace {

using strided::Clip;
using strided::Dim;
using strided::kDimsMax;
using strided::Layout;

enum class Direction { kGather, kScatter };

// kGather only reads `memory`; kScatter only reads `linear`.
template <Direction kDirection>
class Walk {
 public:
  using Linear = std::conditional_t<kDirection == Direction::kGather, std::uint8_t*, const std::uint8_t*>;

  Walk(const Layout& layout, std::uint8_t* memory, Linear linear) : layout_(layout), memory_(memory), linear_(linear) {}

  void run(std::int64_t linear, std::int64_t memory, std::int64_t nbytes) { copy_bytes(linear, memory, nbytes); }

  // `count` children of `axis`, all inside the bounds; `linear` is an offset from begin.
  void whole(std::size_t axis, std::int64_t count, std::int64_t linear, std::int64_t memory) {
    const Dim& dim = layout_.dims[axis];
    if (axis + 1 == layout_.rank) {
      units({count, dim.memory_stride, dim.string_stride}, linear, memory);
      return;
    }
    if (axis + 2 == layout_.rank && is_transposed(dim, layout_.dims[axis + 1])) {
      plane({count, dim.memory_stride, dim.string_stride}, layout_.dims[axis + 1], linear, memory);
      return;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      whole(axis + 1, layout_.dims[axis + 1].size, linear + i * dim.string_stride, memory + i * dim.memory_stride);
    }
  }

 private:
  bool is_transposed(const Dim& outer, const Dim& inner) const {
    return layout_.unit_bytes <= 16 && std::abs(outer.memory_stride) < std::abs(inner.memory_stride);
  }

  // Tiles of four cache lines along the dimension that is dense in memory by 8 along the other: power-of-two strides
  // put the lines of a tile into one set of the L1 cache, which has 8 to 16 ways.
  void plane(const Dim& outer, const Dim& inner, std::int64_t linear, std::int64_t memory) {
    constexpr std::int64_t kInnerTile = 8;
    const std::int64_t outer_tile = 256 / layout_.unit_bytes;
    with_unit([&](auto unit) {
      for (std::int64_t i = 0; i < outer.size; i += outer_tile) {
        const std::int64_t i_end = std::min(i + outer_tile, outer.size);
        for (std::int64_t j = 0; j < inner.size; j += kInnerTile) {
          const std::int64_t j_count = std::min(kInnerTile, inner.size - j);
          for (std::int64_t k = i; k < i_end; ++k) {
            const std::int64_t row_linear = linear + k * outer.string_stride + j * inner.string_stride;
            const std::int64_t row_memory = memory + k * outer.memory_stride + j * inner.memory_stride;
            if (j_count == kInnerTile) {  // a constant count: unrolled
              copy_row<unit>(inner, kInnerTile, row_linear, row_memory);
            } else {
              copy_row<unit>(inner, j_count, row_linear, row_memory);
            }
          }
        }
      }
    });
  }

  void units(const Dim& row, std::int64_t linear, std::int64_t memory) {
    with_unit([&](auto unit) {
      if (row.string_stride == layout_.unit_bytes && unit != kAnyUnit) {
        copy_row<unit>({row.size, row.memory_stride, static_cast<std::int64_t>(unit)}, row.size, linear, memory);
      } else {
        copy_row<unit>(row, row.size, linear, memory);
      }
    });
  }

  // Calls function(std::integral_constant): a constant size turns each memcpy into one load and one store.
  static constexpr std::size_t kAnyUnit = 0;
  template <class Function>
  void with_unit(Function&& function) {
    switch (layout_.unit_bytes) {
      case 1:
        return function(std::integral_constant<std::size_t, 1>{});
      case 2:
        return function(std::integral_constant<std::size_t, 2>{});
      case 4:
        return function(std::integral_constant<std::size_t, 4>{});
      case 8:
        return function(std::integral_constant<std::size_t, 8>{});
      case 16:
        return function(std::integral_constant<std::size_t, 16>{});
      default:
        return function(std::integral_constant<std::size_t, kAnyUnit>{});
    }
  }

  template <std::size_t kUnit>
  [[gnu::always_inline]] void copy_row(const Dim& row, std::int64_t count, std::int64_t linear, std::int64_t memory) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t nbytes = kUnit == kAnyUnit ? layout_.unit_bytes : static_cast<std::int64_t>(kUnit);
      copy_bytes(linear + i * row.string_stride, memory + i * row.memory_stride, nbytes);
    }
  }

  [[gnu::always_inline]] void copy_bytes(std::int64_t linear, std::int64_t memory, std::int64_t nbytes) {
    if constexpr (kDirection == Direction::kGather) {
      std::memcpy(linear_ + linear, memory_ + memory, static_cast<std::size_t>(nbytes));
    } else {
      std::memcpy(memory_ + memory, linear_ + linear, static_cast<std::size_t>(nbytes));
    }
  }

  const Layout& layout_;
  std::uint8_t* memory_;
  Linear linear_;
};

void check_ranks(std::size_t sizes, std::size_t others, const char* what) {
  if (sizes > kDimsMax || sizes != others) {
    throw std::invalid_argument(std::string("strided: ") + what + ": " + std::to_string(sizes) + " sizes, " +
                                std::to_string(others) + " strides or offsets, at most " + std::to_string(kDimsMax));
  }
}

std::int64_t checked_product(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) {
    throw std::overflow_error("strided: more than 2^63 bytes");
  }
  return product;
}

bool has_zero(const std::vector<std::int64_t>& sizes) {
  return std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
}

// Byte distance in the string between the shard's elements 0 and `index`.
std::int64_t string_offset(const BoxTarget& box, bool last) {
  std::int64_t offset = 0;
  std::int64_t stride = box.target.item_bytes;
  for (std::size_t i = box.shard_sizes.size(); i-- > 0;) {
    offset += (box.box_offsets[i] + (last ? box.target.sizes[i] - 1 : 0)) * stride;
    stride *= box.shard_sizes[i];
  }
  return offset;
}

void check_box(const BoxTarget& box) {
  check_ranks(box.shard_sizes.size(), box.box_offsets.size(), "box offsets");
  check_ranks(box.shard_sizes.size(), box.target.sizes.size(), "box sizes");
  check_ranks(box.shard_sizes.size(), box.target.stride_bytes.size(), "box strides");
}

}  // namespace

std::int64_t StridedView::nbytes() const {
  if (has_zero(sizes)) {
    return 0;
  }
  std::int64_t product = item_bytes;
  for (const std::int64_t size : sizes) {
    product = checked_product(product, size);
  }
  return product;
}

StridedView StridedView::collapsed() const {
  check_ranks(sizes.size(), stride_bytes.size(), "view");
  if (has_zero(sizes)) {
    return {data, item_bytes, {0}, {item_bytes}};
  }
  StridedView result{data, item_bytes, {}, {}};
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 1) {
      continue;
    }
    if (!result.sizes.empty() && result.stride_bytes.back() == stride_bytes[i] * sizes[i]) {
      result.sizes.back() *= sizes[i];
      result.stride_bytes.back() = stride_bytes[i];
    } else {
      result.sizes.push_back(sizes[i]);
      result.stride_bytes.push_back(stride_bytes[i]);
    }
  }
  return result;
}

void gather(const StridedView& source, std::int64_t begin, std::int64_t end, std::uint8_t* target) {
  if (begin >= end) {
    return;
  }
  check_ranks(source.sizes.size(), source.stride_bytes.size(), "view");
  const std::int64_t nbytes = source.nbytes();
  if (begin < 0 || end > nbytes) {
    throw std::out_of_range("gather: bytes [" + std::to_string(begin) + ", " + std::to_string(end) + ") of " +
                            std::to_string(nbytes));
  }
  Layout layout;
  std::int64_t string_stride = nbytes;
  for (std::size_t i = 0; i < source.sizes.size(); ++i) {
    string_stride /= source.sizes[i];
    layout.push({source.sizes[i], source.stride_bytes[i], string_stride});
  }
  layout.finish(source.item_bytes);
  Walk<Direction::kGather> walk(layout, source.data, target);
  Clip(layout, walk, begin, end).clipped(0, 0, 0);
}

std::int64_t BoxTarget::first_byte() const {
  check_box(*this);
  return has_zero(target.sizes) ? 0 : string_offset(*this, false);
}

std::int64_t BoxTarget::last_byte() const {
  check_box(*this);
  return has_zero(target.sizes) ? 0 : string_offset(*this, true) + target.item_bytes;
}

std::int64_t BoxTarget::bytes_before(std::int64_t position) const {
  check_box(*this);
  if (has_zero(target.sizes) || has_zero(shard_sizes)) return 0;
  std::int64_t shard_stride = target.item_bytes;
  std::int64_t box_stride = target.item_bytes;
  for (const std::int64_t size : shard_sizes) shard_stride = checked_product(shard_stride, size);
  for (const std::int64_t size : target.sizes) box_stride *= size;
  if (position >= shard_stride) return box_stride;
  std::int64_t rest = std::max<std::int64_t>(position, 0);
  std::int64_t before = 0;
  for (std::size_t i = 0; i < shard_sizes.size(); ++i) {
    shard_stride /= shard_sizes[i];
    box_stride /= target.sizes[i];
    const std::int64_t index = rest / shard_stride - box_offsets[i];  // the position's, within the box
    rest %= shard_stride;
    before += std::clamp<std::int64_t>(index, 0, target.sizes[i]) * box_stride;
    if (index < 0 || index >= target.sizes[i]) return before;
  }
  return before + rest;  // inside an element
}

BoxTarget BoxTarget::collapsed() const {
  check_box(*this);
  BoxTarget result{{}, {}, {target.data, target.item_bytes, {}, {}}};
  for (std::size_t i = 0; i < shard_sizes.size(); ++i) {
    const std::int64_t size = target.sizes[i];
    const std::int64_t stride = target.stride_bytes[i];
    if (shard_sizes[i] == 1 && size == 1) {
      continue;
    }
    // A single outer index folds into this dimension wherever it points; several fold if this dimension is whole and
    // contiguous with them.
    const bool foldable =
        !result.shard_sizes.empty() && (result.target.sizes.back() == 1 ||
                                        (size == shard_sizes[i] && result.target.stride_bytes.back() == stride * size));
    if (foldable) {
      result.box_offsets.back() = result.box_offsets.back() * shard_sizes[i] + box_offsets[i];
      result.shard_sizes.back() *= shard_sizes[i];
      result.target.sizes.back() *= size;
      result.target.stride_bytes.back() = stride;
    } else {
      result.shard_sizes.push_back(shard_sizes[i]);
      result.box_offsets.push_back(box_offsets[i]);
      result.target.sizes.push_back(size);
      result.target.stride_bytes.push_back(stride);
    }
  }
  return result;
}

strided::BoxLayout::BoxLayout(const BoxTarget& box) : string_begin(string_offset(box, false)) {
  std::int64_t string_stride = box.target.item_bytes;
  for (const std::int64_t size : box.shard_sizes) {
    string_stride = checked_product(string_stride, size);
  }
  for (std::size_t i = 0; i < box.shard_sizes.size(); ++i) {
    string_stride /= box.shard_sizes[i];
    layout.push({box.target.sizes[i], box.target.stride_bytes[i], string_stride});
  }
  layout.finish(box.target.item_bytes);
}

bool strided::BoxLayout::is_empty(const BoxTarget& box) {
  check_box(box);
  return has_zero(box.target.sizes) || has_zero(box.shard_sizes);
}

std::int64_t scatter(const std::uint8_t* source, std::int64_t begin, std::int64_t end, const BoxTarget& box) {
  if (strided::BoxLayout::is_empty(box) || begin >= end) {
    return 0;
  }
  const strided::BoxLayout placed(box);
  Walk<Direction::kScatter> walk(placed.layout, box.target.data, source);
  return Clip(placed.layout, walk, begin, end).clipped(0, placed.string_begin, 0);
}

}  // namespace snapstone
