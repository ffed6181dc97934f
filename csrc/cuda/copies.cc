#include "cuda/copies.h"

#include <vector>

#include "cuda/host_registration.h"

namespace snapstone::cuda {
namespace {

constexpr std::size_t kBatchMin = 2;     // below, the plain call costs less
constexpr std::size_t kBatchMax = 4096;  // bounds the arrays, and the time that one call takes

void copy_one(const Driver& driver, const Stream& stream, Direction direction, const Copy& copy) {
  const int device = stream.device().ordinal();
  switch (direction) {
    case Direction::kToHost:
      return driver.cuMemcpyDtoHAsync.must(device, reinterpret_cast<void*>(copy.dst), copy.src, copy.nbytes,
                                           stream.handle());
    case Direction::kToDevice:
      return driver.cuMemcpyHtoDAsync.must(device, copy.dst, reinterpret_cast<const void*>(copy.src), copy.nbytes,
                                           stream.handle());
    case Direction::kOnDevice:
      return driver.cuMemcpyDtoDAsync.must(device, copy.dst, copy.src, copy.nbytes, stream.handle());
  }
}

// The driver's form of a batch; kept by the thread, because the step path should not allocate.
struct Batch {
  std::vector<DevicePointer> targets;
  std::vector<DevicePointer> sources;
  std::vector<std::size_t> sizes;

  void clear() {
    targets.clear();
    sources.clear();
    sizes.clear();
  }
};

// No flags: PREFER_OVERLAP_WITH_COMPUTE moves copies within a device to the copy engine, at a tenth of the speed.
Result submit(const Driver& driver, const Stream& stream, Batch& batch) {
  BatchAttributes attributes{SourceAccessOrder::kStream, {}, {}, 0};
  std::size_t first = 0;
  const std::size_t count = batch.sizes.size();
  if (driver.cuMemcpyBatchAsync_v2) {
    return driver.cuMemcpyBatchAsync_v2(batch.targets.data(), batch.sources.data(), batch.sizes.data(), count,
                                        &attributes, &first, 1, stream.handle());
  }
  std::size_t failed = 0;
  return driver.cuMemcpyBatchAsync(batch.targets.data(), batch.sources.data(), batch.sizes.data(), count, &attributes,
                                   &first, 1, &failed, stream.handle());
}

// Bytes that were copied before the refusal are copied again, which changes nothing: no copy reads what another writes.
void submit_or_copy(const Driver& driver, const Stream& stream, Direction direction, Batch& batch) {
  const Result result = submit(driver, stream, batch);
  if (result == Result::kInvalidValue || result == Result::kNotSupported) {
    for (std::size_t i = 0; i < batch.sizes.size(); ++i) {
      copy_one(driver, stream, direction, {batch.targets[i], batch.sources[i], batch.sizes[i]});
    }
  } else {
    const char* const name =
        driver.cuMemcpyBatchAsync_v2 ? driver.cuMemcpyBatchAsync_v2.name() : driver.cuMemcpyBatchAsync.name();
    check(result, name, stream.device().ordinal());
  }
  batch.clear();
}

// Batches take addresses as the device sees them, where single copies translate those of the host.
bool has_device_addresses(const Stream& stream, Direction direction, std::span<const Copy> copies) {
  if (direction == Direction::kOnDevice) return true;
  if (!stream.device().registered_host_pointers()) return false;
  HostRegistration::Range range;
  for (const Copy& copy : copies) {
    if (copy.nbytes == 0) continue;
    const std::uint64_t begin = direction == Direction::kToHost ? copy.dst : copy.src;
    if (begin < range.begin || begin >= range.end) range = HostRegistration::around(begin);
    if (begin >= range.end || range.end - begin < copy.nbytes) return false;
  }
  return true;
}

void copy_all(const Stream& stream, Direction direction, std::span<const Copy> copies) {
  const Driver& driver = Driver::require();
  const Scope scope(stream.device());
  const bool batched = (driver.cuMemcpyBatchAsync_v2 || driver.cuMemcpyBatchAsync) && copies.size() >= kBatchMin &&
                       stream.handle() != nullptr &&  // batches are refused on the legacy default stream
                       has_device_addresses(stream, direction, copies);
  if (!batched) {
    for (const Copy& copy : copies) {
      if (copy.nbytes != 0) copy_one(driver, stream, direction, copy);
    }
    return;
  }
  thread_local Batch batch;
  batch.clear();
  for (const Copy& copy : copies) {
    if (copy.nbytes == 0) continue;
    batch.targets.push_back(copy.dst);
    batch.sources.push_back(copy.src);
    batch.sizes.push_back(copy.nbytes);
    if (batch.sizes.size() == kBatchMax) submit_or_copy(driver, stream, direction, batch);
  }
  if (!batch.sizes.empty()) submit_or_copy(driver, stream, direction, batch);
}

void copy_rows(const Stream& stream, const Copy2d& copy) {
  std::vector<Copy> rows;
  rows.reserve(copy.height);
  for (std::uint64_t row = 0; row < copy.height; ++row) {
    rows.push_back({copy.dst + row * copy.dst_pitch, copy.src + row * copy.src_pitch, copy.width_bytes});
  }
  copy_all(stream, Direction::kOnDevice, rows);
}

}  // namespace

void copy_to_host(const Stream& stream, std::span<const Copy> copies) { copy_all(stream, Direction::kToHost, copies); }

void copy_to_device(const Stream& stream, std::span<const Copy> copies) {
  copy_all(stream, Direction::kToDevice, copies);
}

void copy_on_device(const Stream& stream, std::span<const Copy> copies) {
  copy_all(stream, Direction::kOnDevice, copies);
}

void copy_2d(const Stream& stream, Direction direction, const Copy2d& copy) {
  if (copy.width_bytes == 0 || copy.height == 0) return;
  Memcpy2D arguments{};
  arguments.width_bytes = copy.width_bytes;
  arguments.height = copy.height;
  arguments.src_pitch = copy.src_pitch;
  arguments.dst_pitch = copy.dst_pitch;
  if (direction == Direction::kToDevice) {
    arguments.src_type = MemoryType::kHost;
    arguments.src_host = reinterpret_cast<const void*>(copy.src);
  } else {
    arguments.src_type = MemoryType::kDevice;
    arguments.src_device = copy.src;
  }
  if (direction == Direction::kToHost) {
    arguments.dst_type = MemoryType::kHost;
    arguments.dst_host = reinterpret_cast<void*>(copy.dst);
  } else {
    arguments.dst_type = MemoryType::kDevice;
    arguments.dst_device = copy.dst;
  }
  const Scope scope(stream.device());
  const Driver& driver = Driver::require();
  const Result result = driver.cuMemcpy2DAsync(&arguments, stream.handle());
  // Within a device the driver may refuse pitches other than those of its own allocations.
  if (result == Result::kInvalidValue && direction == Direction::kOnDevice) return copy_rows(stream, copy);
  check(result, driver.cuMemcpy2DAsync.name(), stream.device().ordinal());
}

}  // namespace snapstone::cuda
