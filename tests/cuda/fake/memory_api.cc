// Memory of devices, and registration of the host's.
#include <sys/mman.h>

#include "call.h"

using namespace fakecuda;
using snapstone::cuda::DevicePointer;
using snapstone::cuda::StreamHandle;

namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kRegistrationMax = 1ull << 30;

bool mapped(std::uint64_t begin, std::uint64_t nbytes) {
  const std::uint64_t first = begin / kPage * kPage;
  const std::uint64_t end = begin + nbytes;
  std::vector<unsigned char> residency((end - first + kPage - 1) / kPage);
  return ::mincore(reinterpret_cast<void*>(first), end - first, residency.data()) == 0;
}

Result bad(World& world, const std::string& text, Result result = Result::kInvalidValue) {
  world.report.violation(text);
  return result;
}

// A live block that begins at `address`, of cuMemAlloc*.
Block* owned_block(World& world, DevicePointer address) {
  Block* const block = world.memory->block_of(address);
  return block != nullptr && block->begin == address && !block->freed && !block->torch ? block : nullptr;
}

}  // namespace

FAKECUDA_API Result cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  return call("cuMemGetInfo_v2", Needs::kContext, [&](World& world, auto&) {
    *free = world.memory->free_bytes(current_device());
    *total = world.options.memory_bytes;
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuMemAlloc_v2(DevicePointer* address, std::size_t nbytes) {
  return call("cuMemAlloc_v2", Needs::kUncapturedContext, [&](World& world, auto&) {
    if (nbytes == 0) return Result::kInvalidValue;
    const Block* const block = world.memory->allocate(current_device(), nbytes);
    if (block == nullptr) return Result::kOutOfMemory;
    world.races.forget(block->begin, block->end());
    *address = block->begin;
    return Result::kSuccess;
  });
}

// Waits for the whole device, as the driver may; who counts on that is told off.
FAKECUDA_API Result cuMemFree_v2(DevicePointer address) {
  return call("cuMemFree_v2", Needs::kUncapturedContext, [&](World& world, World::Lock& lock) {
    Block* const block = owned_block(world, address);
    if (block == nullptr) return bad(world, "cuMemFree_v2 of what is not allocated: " + hex(address));
    block->freed = true;
    const std::string other = world.pending({block->begin, block->nbytes, true});
    if (!other.empty()) world.report.violation("device memory is freed before " + other + " has ended");
    world.report.count("device_syncs");
    world.drain(lock);
    world.memory->release(address);
    return lost_or_success(world, current_device());
  });
}

FAKECUDA_API Result cuMemAllocAsync(DevicePointer* address, std::size_t nbytes, StreamHandle handle) {
  return call("cuMemAllocAsync", Needs::kContext, [&](World& world, World::Lock& lock) {
    if (!world.options.pools) return Result::kNotSupported;
    Stream* const stream = world.find_stream(handle, current_device());
    if (stream == nullptr || nbytes == 0) return Result::kInvalidValue;
    Block* block = world.memory->allocate(stream->device, nbytes);
    if (block == nullptr) {  // what this stream has freed counts as free for it at once
      world.wait_for(lock, {stream, stream->enqueued});
      block = world.memory->allocate(stream->device, nbytes);
    }
    if (block == nullptr) return Result::kOutOfMemory;
    world.races.forget(block->begin, block->end());
    auto work = std::make_unique<Work>();
    work->what = "allocation";
    work->accesses = {{block->begin, block->nbytes, true}};
    world.enqueue(*stream, std::move(work));
    *address = block->begin;
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuMemFreeAsync(DevicePointer address, StreamHandle handle) {
  return call("cuMemFreeAsync", Needs::kContext, [&](World& world, auto&) {
    Stream* const stream = world.find_stream(handle, current_device());
    Block* const block = owned_block(world, address);
    if (stream == nullptr || block == nullptr) {
      return bad(world, "cuMemFreeAsync of what is not allocated: " + hex(address));
    }
    block->freed = true;
    auto work = std::make_unique<Work>();
    work->what = "free";
    work->accesses = {{block->begin, block->nbytes, true}};
    work->finish = [&world, address] { world.memory->release(address); };
    world.enqueue(*stream, std::move(work));
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuMemHostRegister_v2(void* begin, std::size_t nbytes, unsigned flags) {
  return call("cuMemHostRegister_v2", Needs::kUncapturedContext, [&](World& world, auto&) {
    const auto at = reinterpret_cast<std::uint64_t>(begin);
    if (flags != snapstone::cuda::kHostRegisterPortable) world.report.violation("a registration that is not portable");
    if (nbytes > kRegistrationMax) return bad(world, "a registration of more than 1 GiB");
    if (nbytes == 0 || world.memory->is_device(at) || !mapped(at, nbytes)) return Result::kInvalidValue;
    if (!world.host->add(at, nbytes)) return Result::kHostMemoryAlreadyRegistered;
    world.races.forget(at, at + nbytes);
    return Result::kSuccess;
  });
}

FAKECUDA_API Result cuMemHostUnregister(void* begin) {
  return call("cuMemHostUnregister", Needs::kUncapturedContext, [&](World& world, auto&) {
    const auto at = reinterpret_cast<std::uint64_t>(begin);
    const std::uint64_t nbytes = world.host->remove(at);
    if (nbytes == 0) return Result::kHostMemoryNotRegistered;
    const std::string other = world.pending({at, nbytes, true});
    if (!other.empty()) world.report.violation("host memory is unregistered before " + other + " has ended");
    world.races.forget(at, at + nbytes);
    return Result::kSuccess;
  });
}
