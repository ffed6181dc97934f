// Copies. Those to or from host memory that is not registered end before the call does, and are counted.
#include <algorithm>
#include <cstring>
#include <limits>
#include <span>

#include "call.h"

using namespace fakecuda;
using snapstone::cuda::BatchAttributes;
using snapstone::cuda::DevicePointer;
using snapstone::cuda::Memcpy2D;
using snapstone::cuda::MemoryType;
using snapstone::cuda::SourceAccessOrder;
using snapstone::cuda::StreamHandle;

namespace {

struct Transfer {
  Access source;
  Access target;
};

enum class Kind { kToHost, kToDevice, kOnDevice, kOnHost };

Kind kind_of(const World& world, const Transfer& transfer) {
  const bool from_device = world.memory->is_device(transfer.source.begin);
  const bool to_device = world.memory->is_device(transfer.target.begin);
  if (from_device) return to_device ? Kind::kOnDevice : Kind::kToHost;
  return to_device ? Kind::kToDevice : Kind::kOnHost;
}

constexpr const char* name_of(Kind kind) {
  constexpr const char* kNames[] = {"device to host", "host to device", "device to device", "host to host"};
  return kNames[static_cast<int>(kind)];
}

constexpr const char* counter_of(Kind kind) {
  constexpr const char* kNames[] = {"bytes_to_host", "bytes_to_device", "bytes_on_device", "bytes_on_host"};
  return kNames[static_cast<int>(kind)];
}

std::string describe(Kind kind, const Transfer& transfer, const Stream& stream) {
  return std::string("copy ") + name_of(kind) + " of " + std::to_string(transfer.source.width * transfer.source.rows) +
         " bytes, " + hex(transfer.source.begin) + " to " + hex(transfer.target.begin) + ", stream " +
         std::to_string(stream.number);
}

// Why these bytes are not there, or empty.
std::string check_device_range(World& world, const Access& access, int device) {
  const Block* const block = world.memory->block_of(access.begin);
  const std::string where = hex(access.begin) + " to " + hex(access.end());
  if (block == nullptr || access.end() > block->end()) return "no allocation holds " + where;
  if (block->freed) return "memory that was freed: " + where;
  if (block->device != device) return "memory of another device: " + where;
  return "";
}

std::uint8_t* bytes_of(const World& world, std::uint64_t address) {
  return world.memory->is_device(address) ? world.memory->shadow(address) : reinterpret_cast<std::uint8_t*>(address);
}

void move(const World& world, const Transfer& transfer) {
  const std::uint8_t* const source = bytes_of(world, transfer.source.begin);
  std::uint8_t* const target = bytes_of(world, transfer.target.begin);
  for (std::uint64_t row = 0; row < transfer.source.rows; ++row) {
    std::memcpy(target + row * transfer.target.pitch, source + row * transfer.source.pitch, transfer.source.width);
  }
}

// Copies of one call may run in any order: whether one touches what another writes.
bool entangled(std::span<const Transfer> transfers) {
  std::vector<Access> all;
  for (const Transfer& transfer : transfers) {
    all.push_back(transfer.source);
    all.push_back(transfer.target);
  }
  std::sort(all.begin(), all.end(), [](const Access& a, const Access& b) { return a.begin < b.begin; });
  std::uint64_t touched = 0;
  std::uint64_t written = 0;
  for (const Access& access : all) {
    if (access.begin < written || (access.write && access.begin < touched)) return true;
    touched = std::max(touched, access.end());
    if (access.write) written = std::max(written, access.end());
  }
  return false;
}

class Submission {
 public:
  Submission(World& world, Stream& stream) : world_(world), stream_(stream), work_(std::make_unique<Work>()) {}

  // False: refused, and said why.
  bool add(const Transfer& transfer, Kind wanted) {
    if (transfer.source.width == 0 || transfer.source.rows == 0) return true;
    const Kind kind = kind_of(world_, transfer);
    const std::string what = describe(kind, transfer, stream_);
    if (kind != wanted) return refuse(what + ", but it was to be " + name_of(wanted));
    for (const Access* access : {&transfer.source, &transfer.target}) {
      if (world_.memory->is_device(access->begin)) {
        const std::string problem = check_device_range(world_, *access, stream_.device);
        if (!problem.empty()) return refuse(what + ": " + problem);
        continue;
      }
      switch (world_.host->covered(access->begin, access->end() - access->begin)) {
        case HostMemory::Cover::kWhole:
          break;
        case HostMemory::Cover::kPartly:
          return refuse(what + ": it reaches over the end of a registration");
        case HostMemory::Cover::kNone:
          registered_ = false;
      }
    }
    if (work_->what.empty()) work_->what = what;
    const std::uint64_t nbytes = transfer.source.width * transfer.source.rows;
    world_.report.count(counter_of(kind), nbytes);
    world_.report.count("copies");
    if (kind == Kind::kToDevice) work_->link = 2 * stream_.device;
    if (kind == Kind::kToHost) work_->link = 2 * stream_.device + 1;
    if (kind != Kind::kOnDevice) work_->link_bytes += nbytes;
    transfers_.push_back(transfer);
    return true;
  }

  // The device is given the addresses of a batch as they are.
  bool has_device_addresses() const { return registered_ && (work_->link_bytes == 0 || world_.options.host_pointers); }

  Result submit(World::Lock& lock) {
    if (transfers_.empty()) return Result::kSuccess;
    if (stream_.capturing) {
      world_.report.violation(work_->what + " in a stream that is captured");
      return Result::kStreamCaptureUnsupported;
    }
    if (entangled(transfers_)) world_.report.violation(work_->what + ": copies of one call touch each other's bytes");
    for (const Transfer& transfer : transfers_) {
      work_->accesses.push_back(transfer.source);
      work_->accesses.push_back(transfer.target);
    }
    std::shuffle(transfers_.begin(), transfers_.end(), world_.random);
    work_->run = [&world = world_, transfers = std::move(transfers_)](Work&) {
      for (const Transfer& transfer : transfers) move(world, transfer);
    };
    const Place place = world_.enqueue(stream_, std::move(work_));
    if (registered_) return Result::kSuccess;
    world_.report.count("unregistered_copies");
    const Clock clock = stream_.clock;
    world_.wait_for(lock, place);
    world_.host_clock.join(clock);
    return lost_or_success(world_, stream_.device);
  }

 private:
  bool refuse(const std::string& why) {
    world_.report.violation(why);
    return false;
  }

  World& world_;
  Stream& stream_;
  std::unique_ptr<Work> work_;
  std::vector<Transfer> transfers_;
  bool registered_ = true;
};

Transfer line(std::uint64_t target, std::uint64_t source, std::uint64_t nbytes) {
  return {{source, nbytes, false}, {target, nbytes, true}};
}

Result copy(const char* name, Kind kind, const Transfer& transfer, StreamHandle handle) {
  return call(name, Needs::kContext, [&](World& world, World::Lock& lock) {
    Stream* const stream = world.find_stream(handle, current_device());
    if (stream == nullptr) return Result::kInvalidHandle;
    Submission submission(world, *stream);
    return submission.add(transfer, kind) ? submission.submit(lock) : Result::kInvalidValue;
  });
}

// The one set of attributes that the engine uses.
bool sound(World& world, const BatchAttributes* attributes, const std::size_t* first, std::size_t attribute_count,
           std::size_t count) {
  if (attribute_count != 1 || first[0] != 0 || count == 0) return false;
  if (attributes[0].source_access_order != SourceAccessOrder::kStream) {
    world.report.violation("a batch whose sources are not read in the order of the stream");
  }
  if (attributes[0].flags != 0) world.report.violation("a batch with flags");
  return true;
}

Result copy_batch(const char* name, DevicePointer* targets, DevicePointer* sources, std::size_t* sizes,
                  std::size_t count, BatchAttributes* attributes, std::size_t* first, std::size_t attribute_count,
                  StreamHandle handle) {
  return call(name, Needs::kContext, [&](World& world, World::Lock& lock) {
    Stream* const stream = world.find_stream(handle, current_device());
    if (stream == nullptr || handle == nullptr) return Result::kInvalidValue;
    if (!sound(world, attributes, first, attribute_count, count)) return Result::kInvalidValue;
    Submission submission(world, *stream);
    for (std::size_t i = 0; i < count; ++i) {
      const Transfer transfer = line(targets[i], sources[i], sizes[i]);
      if (sizes[i] == 0) return Result::kInvalidValue;
      if (!submission.add(transfer, kind_of(world, transfer))) return Result::kInvalidValue;
    }
    if (!submission.has_device_addresses()) {
      world.report.violation("a batch with addresses of the host that devices do not know");
      world.lose(stream->device, static_cast<int>(Result::kIllegalAddress));
      return Result::kSuccess;
    }
    world.report.count("batches");
    return submission.submit(lock);
  });
}

Access rows_of(std::uint64_t base, std::size_t x, std::size_t y, std::size_t pitch, const Memcpy2D& copy, bool write) {
  return {base + y * pitch + x, copy.width_bytes, write, pitch, copy.height};
}

}  // namespace

FAKECUDA_API Result cuMemcpyDtoHAsync_v2(void* target, DevicePointer source, std::size_t nbytes, StreamHandle stream) {
  return copy("cuMemcpyDtoHAsync_v2", Kind::kToHost, line(reinterpret_cast<std::uint64_t>(target), source, nbytes),
              stream);
}

FAKECUDA_API Result cuMemcpyHtoDAsync_v2(DevicePointer target, const void* source, std::size_t nbytes,
                                         StreamHandle stream) {
  return copy("cuMemcpyHtoDAsync_v2", Kind::kToDevice, line(target, reinterpret_cast<std::uint64_t>(source), nbytes),
              stream);
}

FAKECUDA_API Result cuMemcpyDtoDAsync_v2(DevicePointer target, DevicePointer source, std::size_t nbytes,
                                         StreamHandle stream) {
  return copy("cuMemcpyDtoDAsync_v2", Kind::kOnDevice, line(target, source, nbytes), stream);
}

FAKECUDA_API Result cuMemcpy2DAsync_v2(const Memcpy2D* arguments, StreamHandle stream) {
  const Memcpy2D& copied = *arguments;
  const bool from_host = copied.src_type == MemoryType::kHost;
  const bool to_host = copied.dst_type == MemoryType::kHost;
  if ((!from_host && copied.src_type != MemoryType::kDevice) || (!to_host && copied.dst_type != MemoryType::kDevice) ||
      copied.src_pitch < copied.width_bytes + copied.src_x_bytes ||
      copied.dst_pitch < copied.width_bytes + copied.dst_x_bytes ||
      std::max(copied.src_pitch, copied.dst_pitch) > std::numeric_limits<int>::max()) {
    return Result::kInvalidValue;
  }
  const std::uint64_t source = from_host ? reinterpret_cast<std::uint64_t>(copied.src_host) : copied.src_device;
  const std::uint64_t target = to_host ? reinterpret_cast<std::uint64_t>(copied.dst_host) : copied.dst_device;
  const Transfer transfer{rows_of(source, copied.src_x_bytes, copied.src_y, copied.src_pitch, copied, false),
                          rows_of(target, copied.dst_x_bytes, copied.dst_y, copied.dst_pitch, copied, true)};
  const Kind kind =
      to_host ? (from_host ? Kind::kOnHost : Kind::kToHost) : (from_host ? Kind::kToDevice : Kind::kOnDevice);
  return copy("cuMemcpy2DAsync_v2", kind, transfer, stream);
}

FAKECUDA_API Result cuMemcpyBatchAsync(DevicePointer* targets, DevicePointer* sources, std::size_t* sizes,
                                       std::size_t count, BatchAttributes* attributes, std::size_t* first,
                                       std::size_t attribute_count, std::size_t* failed, StreamHandle stream) {
  const Result result =
      copy_batch("cuMemcpyBatchAsync", targets, sources, sizes, count, attributes, first, attribute_count, stream);
  if (result != Result::kSuccess && failed != nullptr) *failed = std::numeric_limits<std::size_t>::max();
  return result;
}

FAKECUDA_API Result cuMemcpyBatchAsync_v2(DevicePointer* targets, DevicePointer* sources, std::size_t* sizes,
                                          std::size_t count, BatchAttributes* attributes, std::size_t* first,
                                          std::size_t attribute_count, StreamHandle stream) {
  return copy_batch("cuMemcpyBatchAsync_v2", targets, sources, sizes, count, attributes, first, attribute_count,
                    stream);
}
