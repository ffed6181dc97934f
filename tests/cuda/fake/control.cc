#include "control.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <tuple>

#include "call.h"

using namespace fakecuda;

#define FAKECUDA_CONTROL extern "C" __attribute__((visibility("default")))

namespace {

// Blocks of fakecuda_alloc that are free, by device, stream and size; the one freed last first.
using Cache = std::map<std::tuple<int, void*, std::uint64_t>, std::vector<std::uint64_t>>;

Cache& cache() {
  static Cache& instance = *new Cache;
  return instance;
}

// Whether the host may touch these bytes now; else says why not.
bool host_may(World& world, const Access& access, const std::string& what) {
  if (access.width == 0) return true;
  std::string other = world.pending(access);
  if (!other.empty()) {
    world.report.violation(what + " of " + hex(access.begin) + " to " + hex(access.end()) + " before the end of " +
                           other);
    return false;
  }
  other = world.races.against_host(access, world.host_clock);
  if (!other.empty()) {
    world.report.violation(what + " of " + hex(access.begin) + " to " + hex(access.end()) +
                           " by a host that has not seen the end of " + other);
    return false;
  }
  return true;
}

bool live(World& world, std::uint64_t address, std::uint64_t nbytes, const std::string& what) {
  const Block* const block = world.memory->block_of(address);
  if (block != nullptr && !block->freed && address + nbytes <= block->end()) return true;
  world.report.violation(what + " of " + hex(address) + ": no allocation");
  return false;
}

int enqueue_bytes(int device, void* handle, std::uint64_t address, std::vector<std::uint8_t> bytes,
                  const std::string& what) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  Stream* const stream = world.find_stream(handle, device);
  if (stream == nullptr || world.lost(device) != 0 || !live(world, address, bytes.size(), what)) return -1;
  auto work = std::make_unique<Work>();
  work->what = what + " at " + hex(address) + ", stream " + std::to_string(stream->number);
  work->accesses = {{address, bytes.size(), true}};
  std::uint8_t* const target = world.memory->shadow(address);
  work->run = [target, bytes = std::move(bytes)](Work&) { std::memcpy(target, bytes.data(), bytes.size()); };
  world.enqueue(*stream, std::move(work));
  return 0;
}

const char* keep(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

}  // namespace

FAKECUDA_CONTROL int fakecuda_read(std::uint64_t address, void* target, std::uint64_t nbytes) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  if (!live(world, address, nbytes, "a read")) return -1;
  const bool fine = host_may(world, {address, nbytes, false}, "a read");
  std::memcpy(target, world.memory->shadow(address), nbytes);
  return fine ? 0 : -1;
}

FAKECUDA_CONTROL int fakecuda_write(std::uint64_t address, const void* source, std::uint64_t nbytes) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  if (!live(world, address, nbytes, "a write")) return -1;
  const bool fine = host_may(world, {address, nbytes, true}, "a write");
  std::memcpy(world.memory->shadow(address), source, nbytes);
  return fine ? 0 : -1;
}

FAKECUDA_CONTROL std::uint64_t fakecuda_alloc(int device, std::uint64_t nbytes, void* stream) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  const Stream* const owner = world.find_stream(stream, device);
  if (nbytes == 0 || owner == nullptr) return 0;
  std::vector<std::uint64_t>& free = cache()[{device, stream, nbytes}];
  if (!free.empty()) {
    const std::uint64_t address = free.back();
    free.pop_back();
    world.memory->block_of(address)->freed = false;
    return address;
  }
  // Calls cudaMalloc; with care only for a stream that is captured itself.
  if (world.captures != 0 && !owner->capturing && capture_mode() == snapstone::cuda::CaptureMode::kGlobal) {
    world.report.violation("torch allocates while a graph is captured");
  }
  Block* const block = world.memory->allocate(device, nbytes);
  if (block == nullptr) return 0;
  world.races.forget(block->begin, block->end());
  block->torch = true;
  block->stream = stream;
  return block->begin;
}

FAKECUDA_CONTROL void fakecuda_free(std::uint64_t address) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  Block* const block = world.memory->block_of(address);
  if (block == nullptr || block->begin != address || !block->torch || block->freed) {
    world.report.violation("fakecuda_free of what is not allocated: " + hex(address));
    return;
  }
  block->freed = true;
  Stream* const stream = world.find_stream(block->stream, block->device);
  if (stream != nullptr && world.lost(block->device) == 0) {
    auto work = std::make_unique<Work>();
    work->what = "the next owner of freed memory at " + hex(address) + ", stream " + std::to_string(stream->number);
    work->accesses = {{address, block->nbytes, true}};
    work->run = [target = world.memory->shadow(address), nbytes = block->nbytes](Work&) {
      std::memset(target, 0xDE, nbytes);
    };
    world.enqueue(*stream, std::move(work));
  }
  cache()[{block->device, block->stream, block->nbytes}].push_back(address);
}

FAKECUDA_CONTROL void* fakecuda_stream(int device) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  return world.make_stream(device);
}

FAKECUDA_CONTROL int fakecuda_enqueue_write(int device, void* stream, std::uint64_t address, const void* source,
                                            std::uint64_t nbytes) {
  const auto* const bytes = static_cast<const std::uint8_t*>(source);
  return enqueue_bytes(device, stream, address, {bytes, bytes + nbytes}, "a write");
}

FAKECUDA_CONTROL int fakecuda_enqueue_fill(int device, void* stream, std::uint64_t address, int byte,
                                           std::uint64_t nbytes) {
  return enqueue_bytes(device, stream, address, std::vector<std::uint8_t>(nbytes, static_cast<std::uint8_t>(byte)),
                       "a fill");
}

FAKECUDA_CONTROL int fakecuda_enqueue_delay(int device, void* handle, std::uint64_t microseconds) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  Stream* const stream = world.find_stream(handle, device);
  if (stream == nullptr) return -1;
  auto work = std::make_unique<Work>();
  work->what = "a delay";
  work->duration = std::chrono::microseconds(microseconds);
  world.enqueue(*stream, std::move(work));
  return 0;
}

FAKECUDA_CONTROL int fakecuda_enqueue_hold(int device, void* handle) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  Stream* const stream = world.find_stream(handle, device);
  if (stream == nullptr) return -1;
  auto work = std::make_unique<Work>();
  work->what = "a hold";
  work->held = true;
  world.enqueue(*stream, std::move(work));
  return 0;
}

FAKECUDA_CONTROL void fakecuda_let_go() {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  world.let_go();
}

FAKECUDA_CONTROL int fakecuda_enqueue_copy(int device, void* handle, std::uint64_t target, std::uint64_t source,
                                           std::uint64_t width, std::uint64_t rows, std::uint64_t target_pitch,
                                           std::uint64_t source_pitch) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  Stream* const stream = world.find_stream(handle, device);
  if (width == 0 || rows == 0) return 0;
  const std::uint64_t source_bytes = (rows - 1) * source_pitch + width;
  const std::uint64_t target_bytes = (rows - 1) * target_pitch + width;
  if (stream == nullptr || world.lost(device) != 0 || !live(world, source, source_bytes, "a copy") ||
      !live(world, target, target_bytes, "a copy")) {
    return -1;
  }
  auto work = std::make_unique<Work>();
  work->what = "a copy from " + hex(source) + " to " + hex(target) + ", stream " + std::to_string(stream->number);
  work->accesses = {{source, width, false, source_pitch, rows}, {target, width, true, target_pitch, rows}};
  work->run = [from = world.memory->shadow(source), to = world.memory->shadow(target), width, rows, target_pitch,
               source_pitch](Work&) {
    for (std::uint64_t row = 0; row < rows; ++row)
      std::memcpy(to + row * target_pitch, from + row * source_pitch, width);
  };
  world.enqueue(*stream, std::move(work));
  return 0;
}

FAKECUDA_CONTROL int fakecuda_host_access(const void* begin, std::uint64_t nbytes, int write) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  const Access access{reinterpret_cast<std::uint64_t>(begin), nbytes, write != 0};
  return host_may(world, access, write != 0 ? "a write by the host" : "a read by the host") ? 0 : -1;
}

FAKECUDA_CONTROL int fakecuda_capture(int device, void* handle, int on) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  Stream* const stream = world.find_stream(handle, device);
  if (stream == nullptr || stream->capturing == (on != 0)) return -1;
  stream->capturing = on != 0;
  world.captures += on != 0 ? 1 : -1;
  return 0;
}

FAKECUDA_CONTROL void fakecuda_drain() {
  World& world = World::get();
  World::Lock lock(world.mutex);
  world.drain(lock);
}

FAKECUDA_CONTROL int fakecuda_fail(const char* rules) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  try {
    world.set_fail_rules(parse_fail_rules(rules));
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}

FAKECUDA_CONTROL int fakecuda_mode(const char* mode) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  try {
    world.options.mode = parse_mode(mode);
  } catch (const std::exception&) {
    return -1;
  }
  world.changed.notify_all();
  return 0;
}

FAKECUDA_CONTROL void fakecuda_seed(std::uint64_t seed) {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  world.options.seed = seed;
  world.random.seed(seed);
}

FAKECUDA_CONTROL int fakecuda_violation_count() {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  return static_cast<int>(world.report.violations().size());
}

FAKECUDA_CONTROL const char* fakecuda_violations() {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  std::string text;
  for (const std::string& violation : world.report.violations()) text += violation + "\n";
  return keep(std::move(text));
}

FAKECUDA_CONTROL const char* fakecuda_counters() {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  return keep(world.report.json({{"seed", world.options.seed},
                                 {"registered_bytes", world.host ? world.host->registered_bytes() : 0},
                                 {"pending", world.pending_count()}}));
}

FAKECUDA_CONTROL void fakecuda_reset() {
  World& world = World::get();
  World::Lock lock(world.mutex);
  world.drain(lock);
  world.report.clear();
  world.races.clear();
  world.set_fail_rules({});
}

FAKECUDA_CONTROL std::uint64_t fakecuda_pending() {
  World& world = World::get();
  const World::Lock lock(world.mutex);
  return world.pending_count();
}
