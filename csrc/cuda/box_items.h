// What base/strided.h scatter() copies on the host, as items of the scatter kernel: the part of a stored shard's bytes
// that falls into a box, into strided device memory.
#pragma once

#include <cstdint>
#include <vector>

#include "base/strided.h"
#include "cuda/kernel_parameters.h"

namespace snapstone::cuda {

// `source` holds bytes [begin, end) of the shard's row-major string, fewer than 2^32, on the device, where the box's
// target lies as well (its `data` is an address there). Appends items that copy what the box needs of them, each byte
// once: as few as the ends of the range allow, at most 2 * dimensions + 1. Returns the bytes that they copy.
//
// Boxes that collapse to more than kBoxDimsMax dimensions have no such items: std::invalid_argument. fits_box_items()
// says so beforehand.
std::int64_t append_box_items(DevicePointer source, std::int64_t begin, std::int64_t end, const BoxTarget& box,
                              std::vector<BoxItem>& items);
bool fits_box_items(const BoxTarget& box);

}  // namespace snapstone::cuda
