// The kernels as their callers see them: names, parameters, items in device memory, sizes of blocks and grids.
//
// kernels.cu is compiled against this header, kernels.cc launches by it, and so do the references that tests compare
// with: one struct, the kernel's only parameter, holds everything.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/driver_types.h"

namespace snapstone::cuda {

// ---- digest: XXH3-128 of each item, as codec::digest gives it -------------------------------------------------------

struct DigestItem {
  DevicePointer address;  // any alignment
  std::uint64_t nbytes;   // below 2^41
};

struct DigestParameters {
  DevicePointer items;    // DigestItem[], aligned to 16
  DevicePointer digests;  // 16 bytes each in canonical order, aligned to 16
  std::uint64_t seed;
};

inline constexpr char kDigestKernel[] = "snapstone_digest";
// One block of threads per item. All warps but the last add up blocks of 1 KiB; the last does what has an order.
inline constexpr unsigned kDigestAddingWarps = 7;
inline constexpr unsigned kDigestThreads = 32 * (kDigestAddingWarps + 1);
inline constexpr unsigned kDigestResidentBlocks = 3;  // per multiprocessor: what its registers are divided by
// A tile is what the adding warps hand over at a time: 4 blocks per warp, sums of 8 words each.
inline constexpr unsigned kDigestTileBlocks = 4 * kDigestAddingWarps;
inline constexpr unsigned kDigestTileWords = 8 * kDigestTileBlocks;
inline constexpr unsigned kDigestSharedBytes = 2 * 8 * kDigestTileWords;  // dynamic; two tiles

// ---- gather: many small copies
// ----------------------------------------------------------------------------------------

struct GatherItem {
  DevicePointer source;  // any alignment
  DevicePointer target;  // any alignment, overlaps no source
  std::uint64_t nbytes;  // any number
};

struct GatherParameters {
  DevicePointer items;  // GatherItem[], aligned to 8
};

inline constexpr char kGatherKernel[] = "snapstone_gather";
inline constexpr unsigned kGatherThreads = 256;
// Grid: items in x, slices in y. The slices of an item take turns of this many bytes; one would do, more are faster.
inline constexpr std::uint64_t kGatherSliceBytes = 32 << 10;
inline constexpr unsigned kGatherSlicesMax = 16;

// ---- compare: which of the digests are not as expected
// ----------------------------------------------------------------

struct CompareParameters {
  DevicePointer digests;   // 16 bytes each, aligned to 16
  DevicePointer expected;  // likewise
  DevicePointer changed;   // one byte each: 0 where they are equal, 1 where not
  std::uint64_t count;
};

inline constexpr char kCompareKernel[] = "snapstone_compare";
inline constexpr unsigned kCompareThreads = 256;  // one per digest

// ---- scatter: boxes between strided memory
// ----------------------------------------------------------------------------

inline constexpr unsigned kBoxDimsMax = 8;

// Runs of `run_bytes` contiguous bytes on both sides, repeated over `dims` dimensions, outermost first. No dimension:
// one run. Fewer than 2^32 bytes in all.
struct BoxItem {
  DevicePointer source;
  DevicePointer target;  // overlaps no source
  std::uint32_t run_bytes;
  std::uint32_t dims;
  std::uint32_t sizes[kBoxDimsMax];
  std::int64_t source_strides[kBoxDimsMax];  // bytes, any sign
  std::int64_t target_strides[kBoxDimsMax];
};

struct ScatterParameters {
  DevicePointer items;  // BoxItem[], aligned to 8
};

inline constexpr char kScatterKernel[] = "snapstone_scatter";
inline constexpr unsigned kScatterThreads = 256;
inline constexpr std::uint64_t kScatterSliceBytes = 32 << 10;  // grid as for gather
inline constexpr unsigned kScatterSlicesMax = 64;

static_assert(sizeof(DigestItem) == 16 && sizeof(DigestParameters) == 24);
static_assert(sizeof(GatherItem) == 24 && sizeof(GatherParameters) == 8);
static_assert(sizeof(CompareParameters) == 32);
static_assert(sizeof(BoxItem) == 184 && offsetof(BoxItem, source_strides) == 56 && sizeof(ScatterParameters) == 8);

}  // namespace snapstone::cuda
