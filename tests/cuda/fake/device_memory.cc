#include "device_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fakecuda {
namespace {

constexpr std::uint64_t kAlignment = 512;  // as cuMemAlloc's
constexpr std::uint64_t kPage = 2 << 20;   // whole ones lie next to each other, as they do on devices
constexpr std::uint64_t kFillMax = 4ull << 20;
constexpr int kFresh = 0xCD;
constexpr int kReleased = 0xDF;

std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

DeviceMemory::DeviceMemory(int devices, std::uint64_t bytes_each, std::uint64_t gap_bytes)
    : bytes_each_(bytes_each), gap_bytes_(gap_bytes) {
  for (int i = 0; i < devices; ++i) {
    Arena arena;
    arena.nbytes = 2 * round_up(bytes_each, 4096);  // room for gaps and fragments
    arena.file = ::memfd_create("fakecuda", MFD_CLOEXEC);
    if (arena.file < 0 || ::ftruncate(arena.file, static_cast<off_t>(arena.nbytes)) != 0) {
      throw std::runtime_error("fakecuda: memfd");
    }
    void* const device = ::mmap(nullptr, arena.nbytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, arena.file, 0);
    void* const shadow =
        ::mmap(nullptr, arena.nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, arena.file, 0);
    if (device == MAP_FAILED || shadow == MAP_FAILED) throw std::runtime_error("fakecuda: mmap");
    arena.begin = reinterpret_cast<std::uint64_t>(device);
    arena.shadow = static_cast<std::uint8_t*>(shadow);
    arenas_.push_back(std::move(arena));
  }
}

std::uint64_t DeviceMemory::room_of(std::uint64_t nbytes) const {
  return nbytes % kPage == 0 ? nbytes : round_up(nbytes, kAlignment) + gap_bytes_;
}

Block* DeviceMemory::allocate(int device, std::uint64_t nbytes) {
  Arena& arena = arenas_[static_cast<std::size_t>(device)];
  if (nbytes > bytes_each_ - arena.used) return nullptr;
  const std::uint64_t room = room_of(nbytes);
  std::uint64_t begin = arena.begin;  // the first gap that is large enough: what was freed last is often reused first
  for (const auto& [at, block] : arena.blocks) {
    if (at - begin >= room) break;
    begin = at + room_of(block.nbytes);
  }
  if (begin + room > arena.begin + arena.nbytes) return nullptr;
  arena.used += nbytes;
  Block& block = arena.blocks[begin];
  block.begin = begin;
  block.nbytes = nbytes;
  block.device = device;
  std::memset(shadow(begin), kFresh, std::min(nbytes, kFillMax));
  return &block;
}

void DeviceMemory::release(std::uint64_t begin) {
  Arena& arena = arenas_[static_cast<std::size_t>(device_of(begin))];
  const auto found = arena.blocks.find(begin);
  const std::uint64_t nbytes = found->second.nbytes;
  arena.used -= nbytes;
  std::memset(shadow(begin), kReleased, std::min(nbytes, kFillMax));
  if (nbytes > kFillMax) {
    ::fallocate(arena.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                static_cast<off_t>(begin - arena.begin + kFillMax), static_cast<off_t>(nbytes - kFillMax));
  }
  arena.blocks.erase(found);
}

Block* DeviceMemory::block_of(std::uint64_t address) {
  if (!is_device(address)) return nullptr;
  auto& blocks = arenas_[static_cast<std::size_t>(device_of(address))].blocks;
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return nullptr;
  Block& block = std::prev(after)->second;
  return address < block.end() ? &block : nullptr;
}

const DeviceMemory::Arena* DeviceMemory::arena_of(std::uint64_t address) const {
  for (const Arena& arena : arenas_) {
    if (address >= arena.begin && address < arena.begin + arena.nbytes) return &arena;
  }
  return nullptr;
}

bool DeviceMemory::is_device(std::uint64_t address) const { return arena_of(address) != nullptr; }

int DeviceMemory::device_of(std::uint64_t address) const {
  return static_cast<int>(arena_of(address) - arenas_.data());
}

std::uint8_t* DeviceMemory::shadow(std::uint64_t address) const {
  const Arena* const arena = arena_of(address);
  return arena->shadow + (address - arena->begin);
}

std::uint64_t DeviceMemory::free_bytes(int device) const {
  return bytes_each_ - arenas_[static_cast<std::size_t>(device)].used;
}

}  // namespace fakecuda
