// Layout and Clip: how strided memory relates to the row-major string that is stored, for those who copy between them.
//
// 1. Layout: per dimension its size, its stride in memory and its stride in the stored string. Size-1 dimensions go,
//    neighbours that are contiguous on both sides merge, and a contiguous innermost dimension becomes the unit of
//    copying.
// 2. Clip: string offsets grow with the indices and siblings never overlap, so at every dimension at most two children
//    straddle `begin` or `end`. It descends into those (clipped) and gives all children between them away without
//    looking at the bounds again (whole).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "base/limits.h"
#include "base/strided.h"

namespace snapstone::strided {

inline constexpr std::size_t kDimsMax = static_cast<std::size_t>(kTensorDimsMax);

struct Dim {
  std::int64_t size;
  std::int64_t memory_stride;  // bytes, any sign
  std::int64_t string_stride;  // bytes, positive
};

struct Layout {
  std::size_t rank = 0;
  std::array<Dim, kDimsMax> dims;
  std::int64_t unit_bytes = 0;  // contiguous on both sides
  std::array<std::int64_t, kDimsMax + 1>
      span_bytes;  // string bytes from first to last unit under dimension i, inclusive
  std::array<std::int64_t, kDimsMax + 1> payload_bytes;  // bytes of units under dimension i

  void push(const Dim& dim) {
    if (dim.size != 1) {
      dims[rank++] = dim;
    }
  }

  void finish(std::int64_t item_bytes) {
    std::size_t merged = 0;
    for (std::size_t i = 0; i < rank; ++i) {
      const Dim& inner = dims[i];
      if (merged != 0 && dims[merged - 1].memory_stride == inner.memory_stride * inner.size &&
          dims[merged - 1].string_stride == inner.string_stride * inner.size) {
        dims[merged - 1] = {dims[merged - 1].size * inner.size, inner.memory_stride, inner.string_stride};
      } else {
        dims[merged++] = inner;
      }
    }
    rank = merged;
    unit_bytes = item_bytes;
    if (rank != 0 && dims[rank - 1].memory_stride == item_bytes && dims[rank - 1].string_stride == item_bytes) {
      unit_bytes *= dims[--rank].size;
    }
    span_bytes[rank] = payload_bytes[rank] = unit_bytes;
    for (std::size_t i = rank; i-- > 0;) {
      span_bytes[i] = (dims[i].size - 1) * dims[i].string_stride + span_bytes[i + 1];
      payload_bytes[i] = dims[i].size * payload_bytes[i + 1];
    }
  }
};

// The layout of a box that is not empty; checks nothing but the overflow of sizes, for which it throws.
struct BoxLayout {
  explicit BoxLayout(const BoxTarget& box);

  // Throws std::invalid_argument where the numbers of dimensions differ, or there are too many.
  static bool is_empty(const BoxTarget& box);

  Layout layout;
  std::int64_t string_begin;  // of the box's first byte
};

// The part of a box that lies in bytes [begin, end) of the string, given to a sink:
//     sink.run(linear, memory, nbytes)           bytes of one unit, of which the rest lies outside
//     sink.whole(axis, count, linear, memory)    `count` children of dimension `axis`, all of them inside
// `linear` counts from begin, `memory` is an offset, too.
template <class Sink>
class Clip {
 public:
  Clip(const Layout& layout, Sink& sink, std::int64_t begin, std::int64_t end)
      : layout_(layout), sink_(sink), begin_(begin), end_(end) {}

  // The box below dimension `axis` whose first unit is at `string` and, in memory, at `memory` bytes from the start.
  // Returns the bytes given.
  std::int64_t clipped(std::size_t axis, std::int64_t string, std::int64_t memory) {
    if (string >= end_ || string + layout_.span_bytes[axis] <= begin_) {
      return 0;
    }
    if (axis == layout_.rank) {
      const std::int64_t first = std::max(string, begin_);
      const std::int64_t last = std::min(string + layout_.unit_bytes, end_);
      sink_.run(first - begin_, memory + (first - string), last - first);
      return last - first;
    }
    const Dim& dim = layout_.dims[axis];
    const std::int64_t span = layout_.span_bytes[axis + 1];
    const auto descend = [&](std::int64_t i) {
      return clipped(axis + 1, string + i * dim.string_stride, memory + i * dim.memory_stride);
    };
    // Children [whole_first, whole_last) lie inside [begin, end); one on either side may straddle.
    const std::int64_t before = begin_ - string;
    const std::int64_t whole_first =
        before <= 0 ? 0 : std::min((before + dim.string_stride - 1) / dim.string_stride, dim.size);
    const std::int64_t room = end_ - string - span;
    const std::int64_t whole_last =
        room < 0 ? whole_first : std::clamp(room / dim.string_stride + 1, whole_first, dim.size);
    std::int64_t given = 0;
    if (whole_first > 0) {
      given += descend(whole_first - 1);
    }
    if (whole_last > whole_first) {
      const std::int64_t count = whole_last - whole_first;
      sink_.whole(axis, count, string + whole_first * dim.string_stride - begin_,
                  memory + whole_first * dim.memory_stride);
      given += count * layout_.payload_bytes[axis + 1];
    }
    if (whole_last < dim.size) {
      given += descend(whole_last);
    }
    return given;
  }

 private:
  const Layout& layout_;
  Sink& sink_;
  const std::int64_t begin_;
  const std::int64_t end_;
};

}  // namespace snapstone::strided
