// Makes one allocation of the process fail: operator new and its kin, of any thread, replaced in the binary that
// includes this. One translation unit of a binary may.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace snapstone::testing {

// Allocations since it was made count from 1, and the `nth` throws std::bad_alloc; so do all later ones, if `lasting`.
class FailingAllocation {
 public:
  explicit FailingAllocation(std::uint64_t nth, bool lasting = false) {
    seen_ = 0;
    failing_ = nth;
    lasting_ = lasting;
    armed_ = true;
  }
  ~FailingAllocation() { armed_ = false; }
  FailingAllocation(const FailingAllocation&) = delete;
  FailingAllocation& operator=(const FailingAllocation&) = delete;

  static void stop() { armed_ = false; }
  static bool reached() { return seen_ >= failing_; }
  static void* allocate(std::size_t nbytes, std::size_t alignment = 0) noexcept {
    if (armed_.load(std::memory_order_relaxed)) {
      const std::uint64_t number = seen_.fetch_add(1) + 1;
      if (number == failing_ || (lasting_ && number > failing_)) return nullptr;
    }
    const std::size_t whole = nbytes == 0 ? 1 : nbytes;
    return alignment == 0 ? std::malloc(whole)
                          : std::aligned_alloc(alignment, (whole + alignment - 1) / alignment * alignment);
  }
  static void* allocate_or_throw(std::size_t nbytes, std::size_t alignment = 0) {
    if (void* const memory = allocate(nbytes, alignment)) return memory;
    throw std::bad_alloc();
  }

 private:
  static inline std::atomic<bool> armed_{false};
  static inline std::atomic<bool> lasting_{false};
  static inline std::atomic<std::uint64_t> seen_{0};
  static inline std::atomic<std::uint64_t> failing_{0};
};

}  // namespace snapstone::testing

using snapstone::testing::FailingAllocation;

// Not inline: GCC would see malloc() where it expects operator new, and warn.
[[gnu::noinline]] void* operator new(std::size_t nbytes) { return FailingAllocation::allocate_or_throw(nbytes); }
[[gnu::noinline]] void* operator new[](std::size_t nbytes) { return FailingAllocation::allocate_or_throw(nbytes); }
[[gnu::noinline]] void* operator new(std::size_t nbytes, std::align_val_t alignment) {
  return FailingAllocation::allocate_or_throw(nbytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new[](std::size_t nbytes, std::align_val_t alignment) {
  return FailingAllocation::allocate_or_throw(nbytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new(std::size_t nbytes, const std::nothrow_t&) noexcept {
  return FailingAllocation::allocate(nbytes);
}
[[gnu::noinline]] void* operator new[](std::size_t nbytes, const std::nothrow_t&) noexcept {
  return FailingAllocation::allocate(nbytes);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
