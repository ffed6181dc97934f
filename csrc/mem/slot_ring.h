// SlotRing: the process's staging memory, fixed-size page-aligned slots in segments that are allocated once and reused
// by every save and load.
//
// Ownership: a slot belongs to exactly one of free list, stage (lane), kernel. Slot is move-only; dropping it frees the
//            slot, forfeit() gives it up to a kernel that may never answer. The ring outlives its slots.
// Threads:   any; reserve() is serialised inside.
// Limits:    slot_count() * slot_bytes(); grows only in reserve(), by whole segments, never on the step path.
// Fork:      a child does not inherit the memory; it must not use the ring, and may drop it.
// Failure:   the constructor throws std::invalid_argument; reserve() throws OsError (ENOMEM) and keeps the segments
// that
//            it got; everything else is noexcept.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "os/memory.h"

namespace snapstone::mem {

class SlotRing;

class Slot {
 public:
  Slot() = default;
  Slot(Slot&& other) noexcept;
  Slot& operator=(Slot&& other) noexcept;
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot();

  std::uint8_t* data() const noexcept { return data_; }
  int segment() const noexcept { return segment_; }
  explicit operator bool() const noexcept { return ring_ != nullptr; }

  // Gives the slot up for good: its memory is neither used nor unmapped again, and reserve() replaces it.
  void forfeit() noexcept;

 private:
  friend class SlotRing;
  SlotRing* ring_ = nullptr;
  std::uint8_t* data_ = nullptr;
  int segment_ = -1;
};

struct Segment {
  std::uint8_t* data;
  std::uint64_t nbytes;
};

class SlotRing {
 public:
  explicit SlotRing(std::uint64_t slot_bytes);  // in (0, kChunkBytesMax], rounded up to whole pages
  ~SlotRing();                                  // every slot must be back or forfeited
  SlotRing(const SlotRing&) = delete;
  SlotRing& operator=(const SlotRing&) = delete;

  std::uint64_t slot_bytes() const noexcept { return slot_bytes_; }
  std::uint64_t slot_count() const;  // without forfeited ones
  std::uint64_t free_count() const;
  std::uint64_t nbytes() const;
  bool huge() const;                      // the kernel gave huge pages to every segment
  std::vector<Segment> segments() const;  // append-only: position is the segment number

  // Grows until at least `slots` exist.
  void reserve(std::uint64_t slots);

  Slot try_acquire() noexcept;                               // empty when none is free
  Slot acquire(std::chrono::milliseconds timeout) noexcept;  // empty at the timeout

 private:
  friend class Slot;
  void release(std::uint8_t* data, int segment) noexcept;
  void forfeit() noexcept;

  struct Free {
    std::uint8_t* data;
    int segment;
  };

  const std::uint64_t slot_bytes_;
  const std::int64_t process_id_;
  mutable std::mutex mutex_;
  std::mutex grow_mutex_;
  std::unique_ptr<std::condition_variable> freed_;
  struct Memory {
    std::deque<os::MappedMemory> segments;
    Memory* kept_before = nullptr;
  };
  static std::atomic<Memory*> kept_;  // of rings that are gone, never unmapped
  std::unique_ptr<Memory> memory_;
  std::vector<Free> free_;  // a stack: the slot freed last is the warmest in cache
  std::uint64_t slot_count_ = 0;
  bool forfeited_ = false;
};

}  // namespace snapstone::mem
