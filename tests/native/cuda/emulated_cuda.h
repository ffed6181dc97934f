// The part of CUDA C++ that csrc/cuda/kernels.cu uses, for a host compiler: include it, then the kernels.
//
// Loads through __ldg and __ldcs are checked: aligned to their size, and with at least one byte inside one of the
// ranges that the test has declared readable. Stores are not: tests compare the bytes around their targets.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/emulated_device.h"

#define __global__
#define __device__
#define __constant__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (snapstone::emulated::Index{snapstone::emulated::current.index, 0, 0})
#define blockIdx (snapstone::emulated::current.block->index)
#define gridDim (snapstone::emulated::current.block->grid)
#define blockDim (snapstone::emulated::Index{snapstone::emulated::current.block->threads, 1, 1})

// The kernels see one memory as several types, which a device allows.
struct __attribute__((may_alias, aligned(16))) uint4 {
  std::uint32_t x, y, z, w;
};
struct __attribute__((may_alias, aligned(16))) ulonglong2 {
  std::uint64_t x, y;
};

namespace snapstone::emulated {

struct Range {
  std::uint64_t begin;
  std::uint64_t end;
};
inline std::vector<Range> readable;

inline void check_load(std::uint64_t address, std::size_t nbytes) {
  if (address % nbytes != 0) throw std::logic_error("load of " + std::to_string(nbytes) + " bytes is not aligned");
  for (const Range& range : readable) {
    if (address < range.end && address + nbytes > range.begin) return;
  }
  throw std::logic_error("load of " + std::to_string(nbytes) + " bytes outside of every range");
}

}  // namespace snapstone::emulated

template <class T>
T __ldg(const T* source) {
  snapstone::emulated::check_load(reinterpret_cast<std::uint64_t>(source), sizeof(T));
  T value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

template <class T>
T __ldcs(const T* source) {
  return __ldg(source);
}

inline std::uint32_t __funnelshift_r(std::uint32_t low, std::uint32_t high, std::uint32_t shift) {
  return static_cast<std::uint32_t>((std::uint64_t{high} << 32 | low) >> (shift & 31));
}

inline void __syncthreads() { snapstone::emulated::current.block->barrier(snapstone::emulated::current.index); }

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned from) {
  static_assert(std::is_unsigned_v<T>);
  const auto [block, thread] = snapstone::emulated::current;
  return static_cast<T>(block->shuffle(thread, mask, value, from));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned flip) {
  return __shfl_sync(mask, value, snapstone::emulated::current.index % snapstone::emulated::kLanes ^ flip);
}
