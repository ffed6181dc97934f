// What the kernels of csrc/cuda/kernels.cu do, written plainly: the fake driver runs these for them, and the tests of
// the kernels compare with them. They share with the kernels the structs of their parameters, and nothing else.
#include <cstring>
#include <stdexcept>
#include <string>

#include "base/xxh3.h"
#include "cuda/kernel_parameters.h"
#include "kernel_table.h"

namespace fakecuda {
namespace {

using namespace snapstone::cuda;

template <class Parameters>
Parameters parameters_of(const Launch& launch) {
  Parameters parameters;
  std::memcpy(&parameters, launch.parameters.at(0), sizeof parameters);
  return parameters;
}

void require(bool condition, const char* kernel, const char* what) {
  if (!condition) throw std::invalid_argument(std::string(kernel) + ": " + what);
}

// Grid x runs over items; y, where there are slices of them, over those.
void check_shape(const Launch& launch, const char* kernel, unsigned threads, unsigned shared_bytes,
                 unsigned slices_max) {
  require(launch.grid[0] > 0 && launch.grid[1] > 0 && launch.grid[1] <= slices_max && launch.grid[2] == 1, kernel,
          "wrong grid");
  require(launch.block[0] == threads && launch.block[1] == 1 && launch.block[2] == 1, kernel, "wrong block");
  require(launch.shared_bytes == shared_bytes, kernel, "wrong size of shared memory");
}

template <class Item>
Item item_at(KernelMemory& memory, DevicePointer items, std::uint64_t index) {
  Item item;
  std::memcpy(&item, memory.read(items + index * sizeof item, sizeof item), sizeof item);
  return item;
}

void digest(const Launch& launch, KernelMemory& memory) {
  check_shape(launch, kDigestKernel, kDigestThreads, kDigestSharedBytes, 1);
  const auto parameters = parameters_of<DigestParameters>(launch);
  require(parameters.items % 16 == 0 && parameters.digests % 16 == 0, kDigestKernel, "misaligned parameters");
  for (std::uint64_t i = 0; i < launch.grid[0]; ++i) {
    const auto item = item_at<DigestItem>(memory, parameters.items, i);
    const std::uint8_t* data = item.nbytes == 0 ? nullptr : memory.read(item.address, item.nbytes);
    const snapstone::xxh3::Hash hash = snapstone::xxh3::hash(data, item.nbytes, parameters.seed);
    snapstone::xxh3::store_canonical(hash, memory.write(parameters.digests + 16 * i, 16));
  }
}

void gather(const Launch& launch, KernelMemory& memory) {
  check_shape(launch, kGatherKernel, kGatherThreads, 0, kGatherSlicesMax);
  const auto parameters = parameters_of<GatherParameters>(launch);
  require(parameters.items % alignof(GatherItem) == 0, kGatherKernel, "misaligned parameters");
  for (std::uint64_t i = 0; i < launch.grid[0]; ++i) {
    const auto item = item_at<GatherItem>(memory, parameters.items, i);
    if (item.nbytes == 0) continue;
    std::memcpy(memory.write(item.target, item.nbytes), memory.read(item.source, item.nbytes), item.nbytes);
  }
}

void compare(const Launch& launch, KernelMemory& memory) {
  check_shape(launch, kCompareKernel, kCompareThreads, 0, 1);
  const auto parameters = parameters_of<CompareParameters>(launch);
  require(parameters.digests % 16 == 0 && parameters.expected % 16 == 0, kCompareKernel, "misaligned parameters");
  require((parameters.count + kCompareThreads - 1) / kCompareThreads == launch.grid[0], kCompareKernel, "wrong grid");
  const std::uint8_t* digests = memory.read(parameters.digests, 16 * parameters.count);
  const std::uint8_t* expected = memory.read(parameters.expected, 16 * parameters.count);
  std::uint8_t* changed = memory.write(parameters.changed, parameters.count);
  for (std::uint64_t i = 0; i < parameters.count; ++i) {
    changed[i] = std::memcmp(digests + 16 * i, expected + 16 * i, 16) == 0 ? 0 : 1;
  }
}

// Offsets of the first byte and past the last of dimensions `dim` and inner, from where they begin.
struct Span {
  std::int64_t first = 0;
  std::int64_t last = 0;
  std::int64_t nbytes = 0;  // of the runs in it
};

Span span_of(const BoxItem& box, const std::int64_t (&strides)[kBoxDimsMax], std::uint32_t dim) {
  Span span{0, box.run_bytes, box.run_bytes};
  for (; dim < box.dims; ++dim) {
    const std::int64_t reach = (std::int64_t{box.sizes[dim]} - 1) * strides[dim];
    (reach < 0 ? span.first : span.last) += reach;
    span.nbytes *= box.sizes[dim];
  }
  return span;
}

void copy_runs(const BoxItem& box, std::uint32_t dim, const std::uint8_t* source, std::uint8_t* target) {
  if (dim == box.dims) {
    std::memcpy(target, source, box.run_bytes);
    return;
  }
  for (std::int64_t i = 0; i < box.sizes[dim]; ++i) {
    copy_runs(box, dim + 1, source + i * box.source_strides[dim], target + i * box.target_strides[dim]);
  }
}

// Asks for what is written in the largest pieces without gaps: a check of each run would take long.
void scatter_dims(const BoxItem& box, std::uint32_t dim, const std::uint8_t* source, DevicePointer target,
                  KernelMemory& memory) {
  const Span span = span_of(box, box.target_strides, dim);
  if (span.nbytes == span.last - span.first) {
    const auto first = static_cast<DevicePointer>(span.first);
    copy_runs(box, dim, source, memory.write(target + first, static_cast<std::uint64_t>(span.nbytes)) - span.first);
    return;
  }
  for (std::int64_t i = 0; i < box.sizes[dim]; ++i) {
    scatter_dims(box, dim + 1, source + i * box.source_strides[dim],
                 target + static_cast<DevicePointer>(i * box.target_strides[dim]), memory);
  }
}

void scatter(const Launch& launch, KernelMemory& memory) {
  check_shape(launch, kScatterKernel, kScatterThreads, 0, kScatterSlicesMax);
  const auto parameters = parameters_of<ScatterParameters>(launch);
  require(parameters.items % alignof(BoxItem) == 0, kScatterKernel, "misaligned parameters");
  for (std::uint64_t i = 0; i < launch.grid[0]; ++i) {
    const auto box = item_at<BoxItem>(memory, parameters.items, i);
    require(box.dims <= kBoxDimsMax && box.run_bytes > 0, kScatterKernel, "wrong box");
    const Span span = span_of(box, box.source_strides, 0);
    const std::uint8_t* const source = memory.read(box.source + static_cast<DevicePointer>(span.first),
                                                   static_cast<std::uint64_t>(span.last - span.first));
    scatter_dims(box, 0, source - span.first, box.target, memory);
  }
}

}  // namespace

std::span<const ReferenceKernel> reference_kernels() {
  static const ReferenceKernel kKernels[] = {
      {kDigestKernel, {sizeof(DigestParameters)}, &digest},
      {kGatherKernel, {sizeof(GatherParameters)}, &gather},
      {kCompareKernel, {sizeof(CompareParameters)}, &compare},
      {kScatterKernel, {sizeof(ScatterParameters)}, &scatter},
  };
  return kKernels;
}

}  // namespace fakecuda
