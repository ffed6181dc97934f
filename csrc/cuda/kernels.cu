// The device's side of kernel_parameters.h. No target of the build compiles this file: tools/kernels.py turns it into
// kernels_ptx.inc, and tests/native/cuda/emulated_kernels_test.cc runs it on the CPU, thread by thread.
//
// Digest. Within a block of 1 KiB all additions of XXH3 commute (base/xxh3.h), so that sums of blocks can be had in any
// order; only the scramble after each block is serial. One thread block takes one item, in tiles of kDigestTileBlocks:
//
//   adding warps:  16 bytes per thread and load, 4 loads per block and 2 blocks per thread in a tile. Each load is
//                  replaced by that of the next tile as soon as it is used, so that 8 are in flight across the barrier.
//                  16 lanes share a block; two shuffles bring their sums together.
//   last warp:     one lane per accumulator; takes the sums of the tile before through the scrambles, 3 dependent
//                  instructions each, while the others are at the next tile. It also adds what follows the last whole
//                  block, which it can do first, since that is scrambled no more.
//
// Loads are of aligned vectors. An item at another alignment is put together from pairs of them; each vector that is
// touched holds at least one byte of the item, so nothing outside its 16-byte granules is read.
#include "base/xxh3.h"
#include "cuda/kernel_parameters.h"

namespace snapstone::cuda {
namespace {

using U32 = std::uint32_t;
using U64 = std::uint64_t;

constexpr unsigned kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr unsigned kVectorBytes = sizeof(uint4);

__device__ __forceinline__ U32 low_half(U64 word) { return static_cast<U32>(word); }
__device__ __forceinline__ U32 high_half(U64 word) { return static_cast<U32>(word >> 32); }
__device__ __forceinline__ U64 whole(U32 low, U32 high) { return U64{high} << 32 | low; }

template <class T>
__device__ __forceinline__ T* pointer(DevicePointer address) {
  return reinterpret_cast<T*>(address);
}

// Bytes that are read once and need not stay in a cache.
__device__ __forceinline__ uint4 load_once(DevicePointer address) { return __ldcs(pointer<const uint4>(address)); }

// The 16 bytes at an address that is not a multiple of 16.
__device__ __forceinline__ uint4 load_across(DevicePointer address) {
  const unsigned shift = address % kVectorBytes;
  const uint4 low = __ldg(pointer<const uint4>(address - shift));
  const uint4 high = __ldg(pointer<const uint4>(address - shift + kVectorBytes));
  U32 words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  // By 8 bytes, by 4, and by bits: all with compile-time indexes, so that the words stay in registers.
#pragma unroll
  for (unsigned i = 0; i < 6; ++i) words[i] = (shift & 8) != 0 ? words[i + 2] : words[i];
#pragma unroll
  for (unsigned i = 0; i < 5; ++i) words[i] = (shift & 4) != 0 ? words[i + 1] : words[i];
  const unsigned bits = 8 * (shift & 3);
  return {__funnelshift_r(words[0], words[1], bits), __funnelshift_r(words[1], words[2], bits),
          __funnelshift_r(words[2], words[3], bits), __funnelshift_r(words[3], words[4], bits)};
}

template <bool kAligned>
__device__ __forceinline__ uint4 load(DevicePointer address) {
  return kAligned ? load_once(address) : load_across(address);
}

// The 8 bytes at any address.
__device__ __forceinline__ U64 load_word(DevicePointer address) {
  const unsigned shift = address % 8;
  const U64 low = __ldg(pointer<const U64>(address - shift));
  if (shift == 0) return low;
  return low >> 8 * shift | __ldg(pointer<const U64>(address - shift + 8)) << (64 - 8 * shift);
}

// ---- digest
// -----------------------------------------------------------------------------------------------------------

// One thread of an adding warp. Of its 16 lanes' block it adds, in each of 4 steps of 256 bytes, the 16 at 16 * column:
// words 2 * pair and 2 * pair + 1 of stripe 4 * step + column / 4.
template <bool kAligned>
class Adder {
 public:
  static constexpr unsigned kSteps = 4;
  static constexpr unsigned kBlocks = 2;
  static constexpr unsigned kLanesPerBlock = 16;
  static constexpr unsigned kGroups =
      kDigestTileBlocks / kBlocks;  // a thread's second block is that many behind its first
  static_assert(kGroups * kLanesPerBlock == kDigestAddingWarps * kWarp);

  __device__ __forceinline__ Adder(DevicePointer data, U64 seed, U32 blocks, unsigned thread)
      : block_(thread / kLanesPerBlock),
        blocks_(blocks),
        address_(data + block_ * xxh3::kBlockBytes + thread % kLanesPerBlock * kVectorBytes) {
    const unsigned column = thread % kLanesPerBlock;
#pragma unroll
    for (unsigned step = 0; step < kSteps; ++step) {
      const unsigned index = 4 * step + column / 4 + 2 * (column % 4);
      secret_[step][0] = xxh3::secret_word(index, seed);
      secret_[step][1] = xxh3::secret_word(index + 1, seed);
    }
    if constexpr (kAligned) {
#pragma unroll
      for (unsigned block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (unsigned step = 0; step < kSteps; ++step) {
          vectors_[block][step] = {0, 0, 0, 0};
          if (has(block)) vectors_[block][step] = load_once(at(block, step));
        }
      }
    }
  }

  // Leaves the sums of the next tile's blocks in `sums`, those of blocks that do not exist undefined.
  __device__ __forceinline__ void add(U64* sums) {
    U64 even[kBlocks] = {0, 0};
    U64 odd[kBlocks] = {0, 0};
    if constexpr (kAligned) advance();
#pragma unroll
    for (unsigned block = 0; block < kBlocks; ++block) {
      const bool wanted = has(block);
      if constexpr (!kAligned) {
        if (!wanted) continue;
#pragma unroll
        for (unsigned step = 0; step < kSteps; ++step) vectors_[0][step] = load_across(at(block, step));
      }
#pragma unroll
      for (unsigned step = 0; step < kSteps; ++step) {
        uint4& place = vectors_[kAligned ? block : 0][step];
        const uint4 vector = place;
        if constexpr (kAligned) {
          if (wanted) place = load_once(at(block, step));
        }
        const U64 first = whole(vector.x, vector.y);
        const U64 second = whole(vector.z, vector.w);
        even[block] += xxh3::product(first, secret_[step][0]) + second;
        odd[block] += xxh3::product(second, secret_[step][1]) + first;
      }
    }
    if constexpr (!kAligned) advance();
    hand_over(even, odd, sums);
  }

 private:
  __device__ __forceinline__ bool has(unsigned block) const { return block_ + block * kGroups < blocks_; }

  __device__ __forceinline__ DevicePointer at(unsigned block, unsigned step) const {
    return address_ + block * (kGroups * xxh3::kBlockBytes) + step * (kLanesPerBlock * kVectorBytes);
  }

  __device__ __forceinline__ void advance() {
    block_ += kDigestTileBlocks;
    address_ += kDigestTileBlocks * xxh3::kBlockBytes;
  }

  // Four lanes hold the sums of one pair for both blocks. Each half of them gives one block away and keeps the other.
  __device__ __forceinline__ static void hand_over(const U64 (&even)[kBlocks], const U64 (&odd)[kBlocks], U64* sums) {
    const unsigned column = threadIdx.x % kLanesPerBlock;
    const bool second = (column & 8) != 0;
    U64 my_even = second ? even[1] : even[0];
    U64 my_odd = second ? odd[1] : odd[0];
    my_even += __shfl_xor_sync(kAll, second ? even[0] : even[1], 8);
    my_odd += __shfl_xor_sync(kAll, second ? odd[0] : odd[1], 8);
    my_even += __shfl_xor_sync(kAll, my_even, 4);
    my_odd += __shfl_xor_sync(kAll, my_odd, 4);
    if ((column & 4) == 0) {
      const unsigned block = threadIdx.x / kLanesPerBlock + (second ? kGroups : 0);
      *reinterpret_cast<ulonglong2*>(sums + block * xxh3::kLanes + 2 * (column % 4)) = {my_even, my_odd};
    }
  }

  U32 block_;  // of the tile that is loaded next
  U32 blocks_;
  DevicePointer address_;
  U64 secret_[kSteps][2];
  uint4 vectors_[kAligned ? kBlocks : 1][kSteps];
};

// One lane of the last warp; lanes of the same remainder by 8 hold the same accumulator.
class Scrambler {
 public:
  __device__ __forceinline__ Scrambler(const DigestItem& item, U64 seed, unsigned lane)
      : lane_(lane),
        word_(xxh3::initial_accumulator(lane % xxh3::kLanes)),
        key_(xxh3::secret_word(xxh3::kSecretScramble / 8 + lane % xxh3::kLanes, seed)),
        rest_(add_rest(item, seed, lane)) {}

  // Takes the accumulators through `blocks` of at least one whole blocks.
  __device__ __forceinline__ void take(const U64* sums, U32 blocks) {
    const U64* const mine = sums + lane_ % xxh3::kLanes;
    U64 word = word_ + mine[0];
#pragma unroll 4
    for (U32 block = 1; block < blocks; ++block) word = scramble_and_add(word, mine[block * xxh3::kLanes]);
    word_ = scramble_and_add(word, 0);
  }

  // Lane 0 returns the low word of the digest, lane 4 the high one.
  __device__ __forceinline__ U64 finish(U64 nbytes, U64 seed) const {
    const U64 word = word_ + rest_;
    const unsigned pair = lane_ % 4;
    const bool high = (lane_ & 4) != 0;
    const unsigned offset = (high ? xxh3::kSecretMergeHigh : xxh3::kSecretMergeLow) + 16 * pair;
    const U64 even = __shfl_sync(kAll, word, 2 * pair);
    const U64 odd = __shfl_sync(kAll, word, 2 * pair + 1);
    U64 sum = xxh3::multiply_fold(even ^ xxh3::secret(offset, seed), odd ^ xxh3::secret(offset + 8, seed));
    sum += __shfl_xor_sync(kAll, sum, 1);
    sum += __shfl_xor_sync(kAll, sum, 2);
    return xxh3::avalanche(sum + (high ? xxh3::merge_start_high(nbytes) : xxh3::merge_start_low(nbytes)));
  }

 private:
  // xxh3::scramble(word, key_) + sum. Halves: the shift by 47 reaches the low one only; the product takes the sum.
  __device__ __forceinline__ U64 scramble_and_add(U64 word, U64 sum) const {
    const U32 low = low_half(word) ^ high_half(word) >> 15 ^ low_half(key_);
    const U32 high = (high_half(word) ^ high_half(key_)) * xxh3::kPrime32_1 + high_half(sum);
    return xxh3::multiply_halves(low, xxh3::kPrime32_1) + whole(low_half(sum), high);
  }

  // What the stripes after the whole blocks, and the last stripe, add to this lane's accumulator. Lanes of 8
  // take every fourth stripe.
  __device__ __forceinline__ static U64 add_rest(const DigestItem& item, U64 seed, unsigned lane) {
    const unsigned column = lane % xxh3::kLanes;
    const DevicePointer rest = item.address + xxh3::scrambled_blocks(item.nbytes) * xxh3::kBlockBytes + 8 * column;
    U64 own = 0;
    U64 words = 0;
    for (unsigned stripe = lane / xxh3::kLanes; stripe < xxh3::tail_stripes(item.nbytes); stripe += 4) {
      const U64 word = load_word(rest + stripe * xxh3::kStripeBytes);
      own += xxh3::product(word, xxh3::secret_word(stripe + column, seed));
      words += word;
    }
    if (lane / xxh3::kLanes == 3) {
      const U64 word = load_word(item.address + item.nbytes - xxh3::kStripeBytes + 8 * column);
      own += xxh3::product(word, xxh3::secret(xxh3::kSecretLastStripe + 8 * column, seed));
      words += word;
    }
    own += __shfl_xor_sync(kAll, words, 1);
    own += __shfl_xor_sync(kAll, own, 8);
    own += __shfl_xor_sync(kAll, own, 16);
    return own;
  }

  unsigned lane_;
  U64 word_;
  U64 key_;
  U64 rest_;
};

__device__ __forceinline__ void store_half(DevicePointer digest, bool high, U64 word) {
  *pointer<U64>(digest + (high ? 0 : 8)) = xxh3::swap_bytes(word);
}

__device__ __forceinline__ U32 tiles_of(U32 blocks) { return (blocks + kDigestTileBlocks - 1) / kDigestTileBlocks; }

// The roles meet at a barrier after each tile, and take turns at two places for sums. From Volta on a barrier counts
// warps, at whichever instruction they arrive, so that each role may have a loop of its own.
template <bool kAligned>
__device__ __forceinline__ void add_blocks(const DigestItem& item, U64 seed, U64* sums) {
  const U32 blocks = static_cast<U32>(xxh3::scrambled_blocks(item.nbytes));
  Adder<kAligned> adder(item.address, seed, blocks, threadIdx.x);
  for (U32 left = tiles_of(blocks); left > 0; --left) {
    adder.add(sums + left % 2 * kDigestTileWords);
    __syncthreads();
  }
}

__device__ __forceinline__ void scramble_blocks(const DigestItem& item, U64 seed, DevicePointer digest,
                                                const U64* sums) {
  const unsigned lane = threadIdx.x % kWarp;
  Scrambler scrambler(item, seed, lane);
  U32 blocks = static_cast<U32>(xxh3::scrambled_blocks(item.nbytes));
  for (U32 left = tiles_of(blocks); left > 0; --left) {
    __syncthreads();
    scrambler.take(sums + left % 2 * kDigestTileWords, blocks < kDigestTileBlocks ? blocks : kDigestTileBlocks);
    blocks -= kDigestTileBlocks;
  }
  const U64 word = scrambler.finish(item.nbytes, seed);
  if (lane % 4 == 0 && lane < xxh3::kLanes) store_half(digest, lane == 4, word);
}

// ---- gather
// -----------------------------------------------------------------------------------------------------------

template <bool kAligned>
__device__ __forceinline__ void copy_vectors(DevicePointer target, DevicePointer source, U64 count) {
  constexpr unsigned kInFlight = 4;
  for (U64 first = threadIdx.x; first < count; first += kInFlight * blockDim.x) {
    uint4 vectors[kInFlight];
#pragma unroll
    for (unsigned i = 0; i < kInFlight; ++i) {
      if (first + i * blockDim.x < count) vectors[i] = load<kAligned>(source + (first + i * blockDim.x) * kVectorBytes);
    }
#pragma unroll
    for (unsigned i = 0; i < kInFlight; ++i) {
      if (first + i * blockDim.x < count)
        *pointer<uint4>(target + (first + i * blockDim.x) * kVectorBytes) = vectors[i];
    }
  }
}

// By all threads of a block. Whole vectors of the target, and single bytes before and behind them.
__device__ __forceinline__ void copy(DevicePointer target, DevicePointer source, U64 nbytes) {
  const U64 misaligned = (kVectorBytes - target % kVectorBytes) % kVectorBytes;
  const U64 before = misaligned < nbytes ? misaligned : nbytes;
  const U64 vectors = (nbytes - before) / kVectorBytes;
  const U64 behind = (nbytes - before) % kVectorBytes;
  if (threadIdx.x < before) *pointer<std::uint8_t>(target + threadIdx.x) = *pointer<std::uint8_t>(source + threadIdx.x);
  if (threadIdx.x < behind) {
    const U64 at = nbytes - behind + threadIdx.x;
    *pointer<std::uint8_t>(target + at) = *pointer<std::uint8_t>(source + at);
  }
  if ((source + before) % kVectorBytes == 0) {
    copy_vectors<true>(target + before, source + before, vectors);
  } else {
    copy_vectors<false>(target + before, source + before, vectors);
  }
}

// ---- scatter
// ----------------------------------------------------------------------------------------------------------

// A power of 2, at most 16, that divides every address and run of the box.
__device__ __forceinline__ unsigned unit_bytes(const BoxItem& box) {
  U64 all = box.source | box.target | box.run_bytes | kVectorBytes;
  for (U32 dim = 0; dim < box.dims; ++dim) {
    all |= static_cast<U64>(box.source_strides[dim]) | static_cast<U64>(box.target_strides[dim]);
  }
  return static_cast<unsigned>(all & (~all + 1));
}

template <class Unit>
__device__ __forceinline__ void scatter_units(const BoxItem& box) {
  const U32 units_per_run = box.run_bytes / sizeof(Unit);
  U32 count = units_per_run;
  for (U32 dim = 0; dim < box.dims; ++dim) count *= box.sizes[dim];
  const U64 step = U64{gridDim.y} * blockDim.x;
  for (U64 at = U64{blockIdx.y} * blockDim.x + threadIdx.x; at < count; at += step) {
    U32 run = static_cast<U32>(at) / units_per_run;
    const U64 inside = (static_cast<U32>(at) - run * units_per_run) * sizeof(Unit);
    DevicePointer source = box.source + inside;
    DevicePointer target = box.target + inside;
    for (U32 dim = box.dims; dim-- > 0;) {
      const U32 next = run / box.sizes[dim];
      const U64 index = run - next * box.sizes[dim];
      source += index * static_cast<U64>(box.source_strides[dim]);
      target += index * static_cast<U64>(box.target_strides[dim]);
      run = next;
    }
    *pointer<Unit>(target) = __ldg(pointer<const Unit>(source));
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kDigestThreads, kDigestResidentBlocks)
    snapstone_digest(const DigestParameters parameters) {
  extern __shared__ uint4 shared[];
  const DigestItem item = pointer<const DigestItem>(parameters.items)[blockIdx.x];
  const DevicePointer digest = parameters.digests + U64{blockIdx.x} * 16;
  if (item.nbytes <= xxh3::kShortBytesMax) {
    if (threadIdx.x == 0) {
      const xxh3::Hash hash = xxh3::hash_short(pointer<const std::uint8_t>(item.address), item.nbytes, parameters.seed);
      store_half(digest, false, hash.low);
      store_half(digest, true, hash.high);
    }
    return;
  }
  auto* const sums = reinterpret_cast<U64*>(shared);
  if (threadIdx.x >= kDigestAddingWarps * kWarp) {
    scramble_blocks(item, parameters.seed, digest, sums);
  } else if (item.address % kVectorBytes == 0) {
    add_blocks<true>(item, parameters.seed, sums);
  } else {
    add_blocks<false>(item, parameters.seed, sums);
  }
}

extern "C" __global__ void __launch_bounds__(kGatherThreads) snapstone_gather(const GatherParameters parameters) {
  const GatherItem item = pointer<const GatherItem>(parameters.items)[blockIdx.x];
  for (U64 at = blockIdx.y * kGatherSliceBytes; at < item.nbytes; at += gridDim.y * kGatherSliceBytes) {
    const U64 left = item.nbytes - at;
    copy(item.target + at, item.source + at, left < kGatherSliceBytes ? left : kGatherSliceBytes);
  }
}

extern "C" __global__ void __launch_bounds__(kCompareThreads) snapstone_compare(const CompareParameters parameters) {
  const U64 at = U64{blockIdx.x} * kCompareThreads + threadIdx.x;
  if (at >= parameters.count) return;
  const uint4 digest = pointer<const uint4>(parameters.digests)[at];
  const uint4 expected = pointer<const uint4>(parameters.expected)[at];
  const U32 different =
      (digest.x ^ expected.x) | (digest.y ^ expected.y) | (digest.z ^ expected.z) | (digest.w ^ expected.w);
  pointer<std::uint8_t>(parameters.changed)[at] = different != 0;
}

extern "C" __global__ void __launch_bounds__(kScatterThreads) snapstone_scatter(const ScatterParameters parameters) {
  const BoxItem& box = pointer<const BoxItem>(parameters.items)[blockIdx.x];
  switch (unit_bytes(box)) {
    case 16:
      return scatter_units<uint4>(box);
    case 8:
      return scatter_units<U64>(box);
    case 4:
      return scatter_units<U32>(box);
    case 2:
      return scatter_units<std::uint16_t>(box);
    default:
      return scatter_units<std::uint8_t>(box);
  }
}

}  // namespace snapstone::cuda
