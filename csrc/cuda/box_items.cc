#include "cuda/box_items.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace snapstone::cuda {
namespace {

// One dimension of the box; strides in bytes, of the shard's string and of the target.
struct Dim {
  std::int64_t size;
  std::int64_t string_stride;
  std::int64_t target_stride;
};

struct Layout {
  std::vector<Dim> dims;           // outermost first
  std::int64_t run_bytes;          // contiguous in both, inside the innermost
  std::int64_t first;              // of the box, in the string
  std::vector<std::int64_t> span;  // span[d]: from the first byte to the last of one index of dims before d
};

Layout layout_of(const BoxTarget& given) {
  const BoxTarget box = given.collapsed();
  const StridedView& target = box.target;
  Layout layout{{}, target.item_bytes, 0, {}};
  std::int64_t stride = target.item_bytes;
  for (std::size_t i = target.sizes.size(); i-- > 0;) {
    layout.first += box.box_offsets[i] * stride;
    layout.dims.insert(layout.dims.begin(), {target.sizes[i], stride, target.stride_bytes[i]});
    stride *= box.shard_sizes[i];
  }
  if (!layout.dims.empty() && layout.dims.back().target_stride == target.item_bytes) {
    layout.run_bytes *= layout.dims.back().size;
    layout.dims.pop_back();
  }
  layout.span.assign(layout.dims.size() + 1, layout.run_bytes);
  for (std::size_t i = layout.dims.size(); i-- > 0;) {
    layout.span[i] = layout.span[i + 1] + (layout.dims[i].size - 1) * layout.dims[i].string_stride;
  }
  return layout;
}

class Splitter {
 public:
  Splitter(const Layout& layout, DevicePointer source, std::int64_t begin, std::int64_t end,
           std::vector<BoxItem>& items)
      : layout_(layout), source_(source), begin_(begin), end_(end), items_(items) {}

  // The part of the range in one index of the dimensions before `axis`, which begins at `string` and `target`.
  std::int64_t split(std::size_t axis, std::int64_t string, DevicePointer target) {
    const std::int64_t last = string + layout_.span[axis];
    if (last <= begin_ || string >= end_) return 0;
    if (axis == layout_.dims.size()) {
      const std::int64_t from = std::max(string, begin_);
      const std::int64_t nbytes = std::min(last, end_) - from;
      return append(axis, 0, from, target + static_cast<DevicePointer>(from - string), nbytes);
    }
    const Dim& dim = layout_.dims[axis];
    if (string >= begin_ && last <= end_) return append(axis, dim.size, string, target, layout_.run_bytes);
    // Indexes [whole, straddling) lie inside the range whole; one on either side may straddle its ends.
    const std::int64_t stride = dim.string_stride;
    const std::int64_t before = std::max<std::int64_t>(begin_ - string, 0);
    const std::int64_t whole = std::min((before + stride - 1) / stride, dim.size);
    const std::int64_t room = end_ - string - layout_.span[axis + 1];
    const std::int64_t straddling = room < 0 ? whole : std::clamp(room / stride + 1, whole, dim.size);
    const auto at = [&](std::int64_t index) { return target + static_cast<DevicePointer>(index * dim.target_stride); };
    std::int64_t copied = 0;
    if (whole > 0) copied += split(axis + 1, string + (whole - 1) * stride, at(whole - 1));
    if (straddling > whole) {
      copied += append(axis, straddling - whole, string + whole * stride, at(whole), layout_.run_bytes);
    }
    if (straddling < dim.size) copied += split(axis + 1, string + straddling * stride, at(straddling));
    return copied;
  }

 private:
  // `count` indexes of dimension `axis`, and all of those behind it.
  std::int64_t append(std::size_t axis, std::int64_t count, std::int64_t string, DevicePointer target,
                      std::int64_t run_bytes) {
    BoxItem item{};
    item.source = source_ + static_cast<DevicePointer>(string - begin_);
    item.target = target;
    item.run_bytes = static_cast<std::uint32_t>(run_bytes);
    std::int64_t nbytes = run_bytes;
    for (std::size_t i = axis; i < layout_.dims.size(); ++i) {
      const std::int64_t size = i == axis ? count : layout_.dims[i].size;
      nbytes *= size;
      item.sizes[item.dims] = static_cast<std::uint32_t>(size);
      item.source_strides[item.dims] = layout_.dims[i].string_stride;
      item.target_strides[item.dims] = layout_.dims[i].target_stride;
      ++item.dims;
    }
    items_.push_back(item);
    return nbytes;
  }

  const Layout& layout_;
  DevicePointer source_;
  std::int64_t begin_;
  std::int64_t end_;
  std::vector<BoxItem>& items_;
};

}  // namespace

bool fits_box_items(const BoxTarget& box) { return layout_of(box).dims.size() <= kBoxDimsMax; }

std::int64_t append_box_items(DevicePointer source, std::int64_t begin, std::int64_t end, const BoxTarget& box,
                              std::vector<BoxItem>& items) {
  if (begin > end || end - begin > std::numeric_limits<std::uint32_t>::max()) {
    throw std::invalid_argument("box items: bytes [" + std::to_string(begin) + ", " + std::to_string(end) + ")");
  }
  if (std::ranges::count(box.target.sizes, 0) != 0 || begin == end) return 0;
  const Layout layout = layout_of(box);
  if (layout.dims.size() > kBoxDimsMax) {
    throw std::invalid_argument("box items: " + std::to_string(layout.dims.size()) + " dimensions, at most " +
                                std::to_string(kBoxDimsMax));
  }
  const auto target = reinterpret_cast<DevicePointer>(box.target.data);
  return Splitter(layout, source, begin, end, items).split(0, layout.first, target);
}

}  // namespace snapstone::cuda
