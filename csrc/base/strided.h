// Strided tensor memory seen as the row-major byte string that is stored on disk.
//
// gather() reads bytes [begin, end) of that string out of a strided tensor; scatter() writes the part of a stored
// shard's string that falls into a box, into a strided tensor. Both touch only the runs that overlap [begin, end),
// merge adjacent dimensions into the longest contiguous runs, and allocate nothing.
#pragma once

#include <cstdint>
#include <vector>

namespace snapstone {

struct StridedView {
  std::uint8_t* data = nullptr;
  std::int64_t item_bytes = 1;
  std::vector<std::int64_t> sizes;         // elements
  std::vector<std::int64_t> stride_bytes;  // may be zero (expanded) or negative

  std::int64_t nbytes() const;  // of the row-major string; 0 when a size is 0
  // Drops size-1 dimensions and merges neighbours whose memory is contiguous; same bytes in the same order.
  StridedView collapsed() const;
};

// target[0, end - begin) = bytes [begin, end) of `source`; 0 <= begin <= end <= source.nbytes(); any byte boundary.
void gather(const StridedView& source, std::int64_t begin, std::int64_t end, std::uint8_t* target);

// A box of a stored shard and the memory it goes to.
struct BoxTarget {
  std::vector<std::int64_t> shard_sizes;  // elements, of the whole stored shard (row-major on disk)
  std::vector<std::int64_t> box_offsets;  // where the box starts inside the shard
  StridedView target;                     // sizes = sizes of the box

  // Smallest and one past the largest byte of the shard's string that the box needs; {0, 0} for an empty box.
  std::int64_t first_byte() const;
  std::int64_t last_byte() const;
  // How many bytes of the box lie before byte `position` of the shard's string. The box's own row-major string is cut
  // by chunks at these places.
  std::int64_t bytes_before(std::int64_t position) const;
  // Merges adjacent dimensions that the box covers fully and whose target memory is contiguous; same bytes.
  BoxTarget collapsed() const;
};

// `source` holds bytes [begin, end) of the shard's string; copies what the box needs of them. Returns the bytes copied.
std::int64_t scatter(const std::uint8_t* source, std::int64_t begin, std::int64_t end, const BoxTarget& box);

}  // namespace snapstone
