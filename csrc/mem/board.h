// Board: one counter per process, in memory that the processes share, to keep them in step at the pace of memory.
//
// Guarantee: what a process wrote before post() is seen by every process whose wait_for() saw the value.
// Ownership: the memory is the caller's, zeroed before anybody posts; counters lie kStride bytes apart.
// Threads:   a counter is posted by one thread at a time; anybody may wait.
// Limits:    counters grow; kFailed is the end of one.
// Failure:   none; a process that dies posts nothing more, so every wait has a limit.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace snapstone::mem {

class Board {
 public:
  enum class Outcome { kReached, kFailed, kTimedOut };

  static constexpr std::size_t kStride = 64;  // a cache line
  static constexpr std::uint64_t kFailed = UINT64_MAX;

  Board(std::uint8_t* counters, std::size_t count) : counters_(counters), count_(count) {}

  void post(std::size_t counter, std::uint64_t value) noexcept;
  // Until every counter is at least `value`, or one is kFailed.
  Outcome wait_for(std::uint64_t value, std::chrono::nanoseconds limit) const noexcept;

 private:
  std::uint64_t* at(std::size_t counter) const noexcept;

  std::uint8_t* counters_;
  std::size_t count_;
};

}  // namespace snapstone::mem
