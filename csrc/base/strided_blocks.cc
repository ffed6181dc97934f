#include "base/strided_blocks.h"

#include <algorithm>

#include "base/strided_layout.h"

namespace snapstone {
namespace {

struct BlockSink {
  const strided::Layout& layout;
  std::vector<StridedBlock>& blocks;

  void run(std::int64_t linear, std::int64_t memory, std::int64_t nbytes) {
    blocks.push_back({linear, memory, nbytes, {}});
  }

  void whole(std::size_t axis, std::int64_t count, std::int64_t linear, std::int64_t memory) {
    StridedBlock block{linear, memory, layout.unit_bytes, {}};
    for (std::size_t i = axis; i < layout.rank; ++i) {
      const strided::Dim& dim = layout.dims[i];
      const std::int64_t size = i == axis ? count : dim.size;
      if (size != 1) block.dims.push_back({size, dim.string_stride, dim.memory_stride});
    }
    blocks.push_back(std::move(block));
  }
};

// Merges neighbours that are contiguous at both ends, and the innermost dimension into the unit.
void merge(StridedBlock& block) {
  std::vector<BlockDim> merged;
  for (const BlockDim& dim : block.dims) {
    const bool contiguous = !merged.empty() && merged.back().source_stride == dim.source_stride * dim.size &&
                            merged.back().target_stride == dim.target_stride * dim.size;
    if (contiguous) {
      merged.back() = {merged.back().size * dim.size, dim.source_stride, dim.target_stride};
    } else {
      merged.push_back(dim);
    }
  }
  while (!merged.empty() && merged.back().source_stride == block.unit_bytes &&
         merged.back().target_stride == block.unit_bytes) {
    block.unit_bytes *= merged.back().size;
    merged.pop_back();
  }
  block.dims = std::move(merged);
}

}  // namespace

std::int64_t StridedBlock::nbytes() const {
  std::int64_t product = unit_bytes;
  for (const BlockDim& dim : dims) product *= dim.size;
  return product;
}

StridedBlock StridedBlock::in_target_order() const {
  StridedBlock result{source, target, unit_bytes, {}};
  for (BlockDim dim : dims) {
    if (dim.target_stride <= 0) {  // from the last index to the first, or the last alone
      result.source += (dim.size - 1) * dim.source_stride;
      result.target += (dim.size - 1) * dim.target_stride;
      if (dim.target_stride == 0) continue;
      dim = {dim.size, -dim.source_stride, -dim.target_stride};
    }
    result.dims.push_back(dim);
  }
  std::stable_sort(result.dims.begin(), result.dims.end(),
                   [](const BlockDim& a, const BlockDim& b) { return a.target_stride > b.target_stride; });
  merge(result);
  return result;
}

StridedBlock StridedBlock::packed() const {
  StridedBlock result = in_target_order();
  result.source = 0;
  std::int64_t stride = result.unit_bytes;
  for (std::size_t i = result.dims.size(); i-- > 0;) {
    result.dims[i].source_stride = stride;
    stride *= result.dims[i].size;
  }
  merge(result);
  return result;
}

std::vector<StridedBlock> scatter_blocks(std::int64_t begin, std::int64_t end, const BoxTarget& box) {
  std::vector<StridedBlock> blocks;
  if (strided::BoxLayout::is_empty(box) || begin >= end) return blocks;
  const strided::BoxLayout placed(box);
  BlockSink sink{placed.layout, blocks};
  strided::Clip(placed.layout, sink, begin, end).clipped(0, placed.string_begin, 0);
  return blocks;
}

void gather_block(const StridedBlock& block, const std::uint8_t* source, std::uint8_t* target) {
  StridedView view{const_cast<std::uint8_t*>(source) + block.source, block.unit_bytes, {}, {}};
  for (const BlockDim& dim : block.dims) {
    view.sizes.push_back(dim.size);
    view.stride_bytes.push_back(dim.source_stride);
  }
  gather(view, 0, block.nbytes(), target);
}

}  // namespace snapstone
