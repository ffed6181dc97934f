#include "mem/board.h"

#include <algorithm>
#include <atomic>
#include <thread>

namespace snapstone::mem {
namespace {

constexpr std::chrono::nanoseconds kNapMin{20'000};
constexpr std::chrono::nanoseconds kNapMax{500'000};

}  // namespace

std::uint64_t* Board::at(std::size_t counter) const noexcept {
  return reinterpret_cast<std::uint64_t*>(counters_ + counter * kStride);
}

void Board::post(std::size_t counter, std::uint64_t value) noexcept {
  std::atomic_ref(*at(counter)).store(value, std::memory_order_release);
}

Board::Outcome Board::wait_for(std::uint64_t value, std::chrono::nanoseconds limit) const noexcept {
  const auto end = std::chrono::steady_clock::now() + limit;
  std::chrono::nanoseconds nap = kNapMin;
  std::size_t reached = 0;  // counters never fall back, so those before this one need no second look for the value
  while (true) {
    for (std::size_t i = 0; i < count_; ++i) {
      const std::uint64_t posted = std::atomic_ref(*at(i)).load(std::memory_order_acquire);
      if (posted == kFailed) return Outcome::kFailed;
      if (i == reached && posted >= value) ++reached;
    }
    if (reached == count_) return Outcome::kReached;
    if (std::chrono::steady_clock::now() >= end) return Outcome::kTimedOut;
    std::this_thread::sleep_for(nap);
    nap = std::min(nap * 2, kNapMax);
  }
}

}  // namespace snapstone::mem
