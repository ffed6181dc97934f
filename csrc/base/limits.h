// Every fixed size of the engine in one place.
#pragma once

#include <cstddef>
#include <cstdint>

namespace snapstone {

inline constexpr std::uint64_t kPageBytes = 4096;            // alignment of chunks in files and of slots in memory
inline constexpr std::uint64_t kHugePageBytes = 2ull << 20;  // x86-64 and arm64 (4 KiB granule) THP size
inline constexpr std::uint64_t kPackAlignBytes = 64;         // small tensors inside a packed chunk
inline constexpr std::uint64_t kPackThresholdBytes = 64ull << 10;  // tensors below this share chunks
inline constexpr std::uint64_t kChunkBytesDefault = 1ull << 20;
inline constexpr std::uint64_t kChunkBytesMax = 64ull << 20;       // readers refuse more: bounds every allocation
inline constexpr std::uint64_t kIndexHeaderBytesMax = 1ull << 30;  // JSON header of an index file
inline constexpr std::uint64_t kManifestBytesMax = 256ull << 20;
inline constexpr std::uint64_t kSegmentBytes = 64ull << 20;          // the slot ring grows by segments of this size
inline constexpr std::uint64_t kLoadStagingBytesMax = 256ull << 20;  // slots of one load, however large its chunks
inline constexpr unsigned kQueueDepth = 64;                          // I/O requests in flight per lane
inline constexpr unsigned kDirectThreadsPerLane = 4;                 // blocking I/O threads behind one lane
inline constexpr int kTensorDimsMax = 64;                            // torch's own limit

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace snapstone
