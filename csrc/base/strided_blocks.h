// StridedBlock: strided memory as a list of loops without bounds to check, for those who cannot walk it themselves: the
// copy engines and kernels of devices.
#pragma once

#include <cstdint>
#include <vector>

#include "base/strided.h"

namespace snapstone {

struct BlockDim {
  std::int64_t size = 1;
  std::int64_t source_stride = 0;  // bytes, any sign
  std::int64_t target_stride = 0;
};

// For every index tuple of `dims`, `unit_bytes` contiguous bytes at both ends.
struct StridedBlock {
  std::int64_t source = 0;  // offset of the first unit
  std::int64_t target = 0;
  std::int64_t unit_bytes = 0;
  std::vector<BlockDim> dims;  // outermost first; sizes are at least 2

  std::int64_t nbytes() const;
  // The same copies in the order of the target's memory: no negative target strides, the largest outermost, and what is
  // contiguous at both ends merged. Units that share target memory (stride 0) are the last of them.
  StridedBlock in_target_order() const;
  // In target order with the source as a dense string of its own, in which the block's bytes lie in the order in which
  // the target has them; `source` is then 0. Units grow to what is contiguous in the target alone.
  StridedBlock packed() const;
};

// What scatter() would copy. `source` of a block counts from the string's byte `begin`, `target` from box.target.data.
// At most two blocks per dimension and one more, in the order of the string.
std::vector<StridedBlock> scatter_blocks(std::int64_t begin, std::int64_t end, const BoxTarget& box);

// Copies the block's bytes to `target`, densely, in the order of its indices.
void gather_block(const StridedBlock& block, const std::uint8_t* source, std::uint8_t* target);

}  // namespace snapstone
