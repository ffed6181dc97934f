// Placement: how the bytes of one chunk reach its targets on one device, as work that a device can do: copies of runs,
// copies of rows, boxes for a kernel. Pure arithmetic.
//
// The chunk's raw bytes lie in memory of the device, where a kernel can go through boxes, or in memory of the host,
// from which a device copies runs and rows only. Where those would be too short (a transposed target), the host first
// packs the bytes into the order in which the target has them.
#pragma once

#include <cstdint>
#include <vector>

#include "base/strided_blocks.h"
#include "cuda/copies.h"
#include "cuda/kernel_parameters.h"
#include "pipeline/load_plan.h"

namespace snapstone::pipeline {

struct Placement {
  static constexpr std::uint64_t kPitchMax = (1u << 31) - 1;  // of copies in rows
  static constexpr std::int64_t kRowBytesMin = 512;           // shorter rows are for the kernel, where there is one

  struct Pack {
    StridedBlock block;  // gather_block(block, raw, packed + at)
    std::uint64_t at = 0;
  };

  // Sources are offsets in the chunk's raw bytes or, from raw_bytes on, in the packed ones. Targets are addresses.
  std::uint64_t raw_bytes = 0;
  std::vector<Pack> packs;
  std::uint64_t packed_bytes = 0;
  std::vector<cuda::Copy> runs;
  std::vector<cuda::Copy2d> rows;
  std::vector<StridedBlock> boxes;  // of at most cuda::kBoxDimsMax dimensions
  std::uint64_t nbytes = 0;         // that reach targets
};

// From memory of the device, with the kernels. No packs.
Placement place_on_device(const LoadPlan& plan, const ReadChunk& chunk, std::int32_t device);

// From memory of the host. No boxes. What does not fit into `packed_bytes_max` is copied as it is.
Placement place_from_host(const LoadPlan& plan, const ReadChunk& chunk, std::int32_t device,
                          std::uint64_t packed_bytes_max);

// What a box is without kernels; adds to `placement`.
void add_as_rows(const StridedBlock& block, Placement& placement);

}  // namespace snapstone::pipeline
