// SlotRing: the process's staging memory, fixed-size page-aligned slots in segments that are allocated once and reused
// by every save and load.
//
// Ownership: a slot belongs to exactly one of free list, stage (lane), kernel. Slot is move-only; dropping it frees the
//            slot, forfeit() gives it up to a kernel that may never answer. The ring outlives its slots.
// Threads:   any; reserve() is serialised inside.
// Limits:    slot_count() * slot_bytes(); grows only in reserve(), by whole segments, never on the step path.
// Devices:   register_with() lets them reach every segment by DMA. Memory that a driver refuses stays usable: copies to
//            and from it are slow, and hold the thread that asks for them.
// Fork:      a child does not inherit the memory; it must not use the ring, and may drop it.
// Failure:   the constructor throws std::invalid_argument; reserve() throws OsError (ENOMEM) and keeps the segments
//            that it got; acquire_run() may throw std::bad_alloc, register_with() CudaError without a device;
//            everything else is noexcept.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/host_registration.h"
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
  std::uint32_t number_ = 0;
};

struct Segment {
  std::uint8_t* data;
  std::uint64_t nbytes;
};

struct RegisteredBytes {
  std::uint64_t registered = 0;
  std::uint64_t refused = 0;
  std::string refusal;  // of the driver, the last one
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

  // Grows until at least `slots` exist; new ones on `numa_node` while that has pages to give.
  void reserve(std::uint64_t slots, int numa_node = os::kAnyNumaNode);

  // Registers the segments that no device can reach yet, for all devices. Each is tried once: a refusal stands. Takes
  // 0.1 s or more per GiB, and threads that come meanwhile wait.
  void register_with(cuda::Device& device);
  bool registered() const;  // every segment, and there is one
  bool registered(int segment) const;
  RegisteredBytes registered_bytes() const;

  Slot try_acquire() noexcept;                               // empty when none is free
  Slot acquire(std::chrono::milliseconds timeout) noexcept;  // empty at the timeout
  // At most `most` slots of one segment with adjacent addresses, in their order, around the slot that try_acquire()
  // would give; `leave` slots stay free. Empty when that is impossible. Takes time in proportion to its result.
  std::vector<Slot> acquire_run(std::uint64_t most, std::uint64_t leave);

 private:
  friend class Slot;
  static constexpr std::uint32_t kNone = UINT32_MAX;

  enum class Registered : std::uint8_t { kNot, kDone, kRefused };

  // What there is to know of a slot, by its number. Numbers of one segment follow each other as its addresses do.
  struct Place {
    std::uint8_t* data;
    int segment;
    bool free;
    std::uint32_t freed_before;  // the neighbours in the list of free slots, or kNone
    std::uint32_t freed_after;
  };

  bool free_in(std::uint32_t number, int segment) const noexcept;
  void push(std::uint32_t number) noexcept;
  Slot take(std::uint32_t number) noexcept;
  void release(std::uint32_t number) noexcept;
  void forfeit() noexcept;
  bool register_next(cuda::Device& device);

  const std::uint64_t slot_bytes_;
  const std::int64_t process_id_;
  mutable std::mutex mutex_;
  std::mutex grow_mutex_;
  std::unique_ptr<std::condition_variable> freed_;
  std::mutex register_mutex_;
  struct Memory {
    std::deque<os::MappedMemory> segments;
    std::deque<cuda::HostRegistration> registrations;  // of segments; ended before those are unmapped
    Memory* kept_before = nullptr;
  };
  static std::atomic<Memory*> kept_;  // of rings that are gone, never unmapped
  std::unique_ptr<Memory> memory_;
  std::vector<Place> places_;
  std::uint32_t freed_last_ = kNone;  // given first: it is the warmest in cache
  std::uint64_t free_count_ = 0;
  std::uint64_t slot_count_ = 0;
  std::vector<Registered> registered_;  // by segment
  std::string refusal_;
  bool forfeited_ = false;
};

}  // namespace snapstone::mem
