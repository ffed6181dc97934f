// DeviceMemory: what a fake device has for memory: a memory file, mapped twice. The addresses that the driver hands out
// are of a mapping without permissions, so that the host faults when it touches them; the fake works in the other one.
//
// Threads: the caller's lock, except for the bytes behind shadow().
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace fakecuda {

struct Block {
  std::uint64_t begin = 0;
  std::uint64_t nbytes = 0;
  int device = 0;
  bool freed = false;  // by its owner, though the memory may be there until a stream comes to it
  bool torch = false;  // of fakecuda_alloc
  void* stream = nullptr;

  std::uint64_t end() const { return begin + nbytes; }
};

class DeviceMemory {
 public:
  // `gap_bytes`: at least, between blocks.
  DeviceMemory(int devices, std::uint64_t bytes_each, std::uint64_t gap_bytes);

  // Null when there is no room. The bytes are whatever was there, or 0xCD.
  Block* allocate(int device, std::uint64_t nbytes);
  // Its bytes become 0xDF, and the next allocation gets them.
  void release(std::uint64_t begin);

  Block* block_of(std::uint64_t address);  // the one that contains it, freed or not; null: none
  bool is_device(std::uint64_t address) const;
  int device_of(std::uint64_t address) const;
  std::uint8_t* shadow(std::uint64_t address) const;
  std::uint64_t free_bytes(int device) const;

 private:
  struct Arena {
    std::uint64_t begin = 0;
    std::uint64_t nbytes = 0;
    std::uint8_t* shadow = nullptr;
    int file = -1;
    std::uint64_t used = 0;
    std::map<std::uint64_t, Block> blocks;
  };

  const Arena* arena_of(std::uint64_t address) const;
  // What a block takes up, with the gap behind it.
  std::uint64_t room_of(std::uint64_t nbytes) const;

  std::uint64_t bytes_each_;
  std::uint64_t gap_bytes_;
  std::vector<Arena> arenas_;
};

}  // namespace fakecuda
