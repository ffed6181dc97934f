#include "pipeline/placement.h"

#include <algorithm>
#include <utility>

namespace snapstone::pipeline {
namespace {

// Sources count from the start of the chunk's raw bytes, targets are addresses; in target order.
std::vector<StridedBlock> blocks_of(const LoadPlan& plan, const ReadChunk& chunk, std::int32_t device) {
  std::vector<StridedBlock> blocks;
  for (const ReadTarget& target : plan.targets(chunk)) {
    if (target.device != device) continue;
    if (target.contiguous != nullptr) {
      blocks.push_back({target.at,
                        reinterpret_cast<std::intptr_t>(target.contiguous),
                        static_cast<std::int64_t>(target.shard_end - target.shard_begin),
                        {}});
      continue;
    }
    const BoxTarget& box = plan.box(target.box);
    const auto begin = static_cast<std::int64_t>(target.shard_begin);
    const auto end = static_cast<std::int64_t>(target.shard_end);
    for (const StridedBlock& found : scatter_blocks(begin, end, box)) {
      StridedBlock block = found.in_target_order();
      block.source += target.at;
      block.target += reinterpret_cast<std::intptr_t>(box.target.data);
      blocks.push_back(std::move(block));
    }
  }
  return blocks;
}

bool is_pitch(std::int64_t stride, std::int64_t width) {
  return stride >= width && static_cast<std::uint64_t>(stride) <= Placement::kPitchMax;
}

bool has_rows(const StridedBlock& block) {
  return !block.dims.empty() && is_pitch(block.dims.back().source_stride, block.unit_bytes) &&
         is_pitch(block.dims.back().target_stride, block.unit_bytes);
}

// visit(source, target) for every index tuple of the outer `axes` dimensions.
template <typename Visit>
void for_each_index(const StridedBlock& block, std::size_t axes, Visit visit) {
  std::vector<std::int64_t> index(axes);
  std::int64_t source = block.source;
  std::int64_t target = block.target;
  while (true) {
    visit(static_cast<std::uint64_t>(source), static_cast<std::uint64_t>(target));
    std::size_t axis = axes;
    while (axis > 0) {
      const BlockDim& dim = block.dims[axis - 1];
      source += dim.source_stride;
      target += dim.target_stride;
      if (++index[axis - 1] < dim.size) break;
      source -= dim.size * dim.source_stride;
      target -= dim.size * dim.target_stride;
      index[--axis] = 0;
    }
    if (axis == 0) return;
  }
}

void add_box(StridedBlock block, Placement& placement) {
  if (block.dims.size() <= cuda::kBoxDimsMax) {
    placement.boxes.push_back(std::move(block));
    return;
  }
  const std::size_t outer = block.dims.size() - cuda::kBoxDimsMax;
  for_each_index(block, outer, [&](std::uint64_t source, std::uint64_t target) {
    placement.boxes.push_back({static_cast<std::int64_t>(source),
                               static_cast<std::int64_t>(target),
                               block.unit_bytes,
                               {block.dims.begin() + static_cast<std::ptrdiff_t>(outer), block.dims.end()}});
  });
}

bool wants_packing(const StridedBlock& block) {
  const bool backwards =
      std::any_of(block.dims.begin(), block.dims.end(), [](const BlockDim& dim) { return dim.source_stride < 0; });
  return backwards || block.packed().unit_bytes > block.unit_bytes;
}

std::uint64_t bytes_of(const std::vector<StridedBlock>& blocks) {
  std::int64_t nbytes = 0;
  for (const StridedBlock& block : blocks) nbytes += block.nbytes();
  return static_cast<std::uint64_t>(nbytes);
}

}  // namespace

void add_as_rows(const StridedBlock& block, Placement& placement) {
  const auto unit = static_cast<std::uint64_t>(block.unit_bytes);
  if (!has_rows(block)) {
    for_each_index(block, block.dims.size(), [&](std::uint64_t source, std::uint64_t target) {
      placement.runs.push_back({target, source, unit});
    });
    return;
  }
  const BlockDim& row = block.dims.back();
  for_each_index(block, block.dims.size() - 1, [&](std::uint64_t source, std::uint64_t target) {
    placement.rows.push_back({target, static_cast<std::uint64_t>(row.target_stride), source,
                              static_cast<std::uint64_t>(row.source_stride), unit,
                              static_cast<std::uint64_t>(row.size)});
  });
}

Placement place_on_device(const LoadPlan& plan, const ReadChunk& chunk, std::int32_t device) {
  std::vector<StridedBlock> blocks = blocks_of(plan, chunk, device);
  Placement placement;
  placement.raw_bytes = plan.record(chunk).raw_bytes;
  placement.nbytes = bytes_of(blocks);
  for (StridedBlock& block : blocks) {
    const bool simple = block.dims.empty() ||
                        (block.dims.size() == 1 && block.unit_bytes >= Placement::kRowBytesMin && has_rows(block));
    if (simple) {
      add_as_rows(block, placement);
    } else {
      add_box(std::move(block), placement);
    }
  }
  return placement;
}

Placement place_from_host(const LoadPlan& plan, const ReadChunk& chunk, std::int32_t device,
                          std::uint64_t packed_bytes_max) {
  std::vector<StridedBlock> blocks = blocks_of(plan, chunk, device);
  Placement placement;
  placement.raw_bytes = plan.record(chunk).raw_bytes;
  placement.nbytes = bytes_of(blocks);
  for (StridedBlock& block : blocks) {
    const auto nbytes = static_cast<std::uint64_t>(block.nbytes());
    if (!wants_packing(block) || nbytes > packed_bytes_max - placement.packed_bytes) {
      add_as_rows(block, placement);
      continue;
    }
    StridedBlock packed = block.packed();
    packed.source = static_cast<std::int64_t>(placement.raw_bytes + placement.packed_bytes);
    add_as_rows(packed, placement);
    placement.packs.push_back({std::move(block), placement.packed_bytes});
    placement.packed_bytes += nbytes;
  }
  return placement;
}

}  // namespace snapstone::pipeline
