// HostMemory: the ranges that were registered, and what guards them while copies are in flight.
//
// Whole pages that work is going to write are without permissions until it has run, and those that it is going to read
// are read-only: a CPU that comes too early faults, and so does an I/O call (EFAULT), except through buffers that
// io_uring holds. What those would read is poison: 0xDD from the call to the copy.
// Threads: the caller's lock, except for the bytes.
#pragma once

#include <cstdint>
#include <list>
#include <map>

#include "access.h"

namespace fakecuda {

class HostMemory {
 public:
  static constexpr int kPoison = 0xDD;

  explicit HostMemory(bool guard) : guard_(guard) {}

  enum class Cover { kNone, kWhole, kPartly };

  bool add(std::uint64_t begin, std::uint64_t nbytes);  // false: overlaps a registered range
  std::uint64_t remove(std::uint64_t begin);            // its size; 0: not registered
  // kPartly also when a range reaches over several registrations, which the driver refuses.
  Cover covered(std::uint64_t begin, std::uint64_t nbytes) const;
  std::uint64_t registered_bytes() const;

  void guard(const Access& access);
  void unguard(const Access& access);  // one that was guarded, once
  // Makes the bytes accessible while the fake works on them; close() brings the guards back.
  void open(const Access& access);
  void close(const Access& access);
  void poison(const Access& access);
  bool guards(std::uint64_t address) const;

 private:
  struct Pages {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    bool write = false;
    bool operator==(const Pages&) const = default;
  };

  template <class Each>
  static void each_row(const Access& access, Each&& each);
  static Pages whole_pages(std::uint64_t begin, std::uint64_t end, bool write);
  void apply(std::uint64_t begin, std::uint64_t end);

  bool guard_;
  std::map<std::uint64_t, std::uint64_t> registered_;  // begin -> nbytes
  std::list<Pages> guarded_;
};

}  // namespace fakecuda
