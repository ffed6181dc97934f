// A CUDA device on the CPU: runs a kernel's blocks one after the other, each thread of a block on its own, with
// barriers, shuffles and shared memory. It proves the kernel's arithmetic, and that its barriers suffice.
//
// FiberBlock:  the threads of a block take turns in one thread of the process, in a seeded random order that changes at
//              every barrier and shuffle, so that what lacks a barrier gives wrong bytes.
// ThreadBlock: a thread of the process for each, so that ThreadSanitizer sees races between the kernel's threads. Slow.
//
// Failure: both throw, instead of hanging, where threads wait for others that never come. The stack of a fiber that
// waits then is not unwound, which costs nothing: kernels own nothing.
#pragma once

#include <ucontext.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace snapstone::emulated {

inline constexpr unsigned kLanes = 32;

struct Index {
  unsigned x = 0;
  unsigned y = 0;
  unsigned z = 0;
};

// Where threads wait until all of them have come.
struct Meeting {
  std::vector<unsigned> waiting;  // FiberBlock: who
  std::mutex mutex;               // ThreadBlock, and what follows
  std::condition_variable opened;
  unsigned arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Meeting meeting;
  std::array<std::uint64_t, kLanes> words{};
  std::atomic<unsigned> ended{0};
};

class Block {
 public:
  Block(Index index, Index grid, unsigned threads) : index(index), grid(grid), threads(threads) {
    for (unsigned first = 0; first < threads; first += kLanes) warps_.push_back(std::make_unique<Warp>());
  }
  virtual ~Block() = default;

  virtual void run(const std::function<void()>& kernel) = 0;
  virtual void barrier(unsigned thread) = 0;

  // The word that lane `from` of the thread's warp gives.
  std::uint64_t shuffle(unsigned thread, unsigned mask, std::uint64_t word, unsigned from) {
    Warp& warp = *warps_[thread / kLanes];
    if (mask != 0xffffffffu || warp.ended != 0) throw std::logic_error("shuffle: not all lanes of the warp take part");
    if (from >= kLanes) throw std::logic_error("shuffle: from a lane that does not exist");
    warp.words[thread % kLanes] = word;
    meet(warp.meeting, thread);
    const std::uint64_t result = warp.words[from];
    meet(warp.meeting, thread);
    return result;
  }

  const Index index;
  const Index grid;
  const unsigned threads;

 protected:
  // Of all lanes of a warp.
  virtual void meet(Meeting& meeting, unsigned thread) = 0;

  std::vector<std::unique_ptr<Warp>> warps_;
  Meeting all_;
  unsigned ended_ = 0;
};

struct Thread {
  Block* block = nullptr;
  unsigned index = 0;
};
inline thread_local Thread current;

class FiberBlock final : public Block {
 public:
  FiberBlock(Index index, Index grid, unsigned threads, std::uint64_t seed)
      : Block(index, grid, threads), random_(seed), fibers_(threads) {}

  void run(const std::function<void()>& kernel) override {
    kernel_ = &kernel;
    for (unsigned thread = 0; thread < threads; ++thread) {
      Fiber& fiber = fibers_[thread];
      fiber.stack = take_stack();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.context, &FiberBlock::enter, 0);
      ready_.push_back(thread);
    }
    while (!ready_.empty() && !error_) {
      std::swap(ready_[random_() % ready_.size()], ready_.back());
      const unsigned thread = ready_.back();
      ready_.pop_back();
      resume(thread);
    }
    for (Fiber& fiber : fibers_) free_stacks().push_back(std::move(fiber.stack));
    if (error_) std::rethrow_exception(error_);
    if (ended_ != threads) throw std::logic_error("threads wait for others that never come");
  }

  void barrier(unsigned thread) override {
    all_.waiting.push_back(thread);
    open_if_complete(all_, threads - ended_);
    leave(false);
  }

 private:
  static constexpr std::size_t kStackBytes = 256 << 10;
  using Stack = std::unique_ptr<std::uint8_t[]>;

  struct Fiber {
    ucontext_t context{};
    Stack stack;
  };

  static std::vector<Stack>& free_stacks() {
    static std::vector<Stack> stacks;
    return stacks;
  }

  static Stack take_stack() {
    if (free_stacks().empty()) return std::make_unique_for_overwrite<std::uint8_t[]>(kStackBytes);
    Stack stack = std::move(free_stacks().back());
    free_stacks().pop_back();
    return stack;
  }

  static void enter() {
    auto& block = static_cast<FiberBlock&>(*current.block);
    block.arrived_in_fiber(nullptr);
    try {
      (*block.kernel_)();
    } catch (...) {
      block.error_ = std::current_exception();
    }
    ++block.ended_;
    block.warps_[current.index / kLanes]->ended |= 1u << current.index % kLanes;
    block.open_if_complete(block.all_, block.threads - block.ended_);
    block.leave(true);
  }

  void meet(Meeting& meeting, unsigned thread) override {
    meeting.waiting.push_back(thread);
    open_if_complete(meeting, kLanes);
    leave(false);
  }

  void open_if_complete(Meeting& meeting, unsigned expected) {
    if (meeting.waiting.size() < expected) return;
    ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }

  // AddressSanitizer must know the stack that is switched to.
  void resume(unsigned thread) {
    current = {this, thread};
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fibers_[thread].stack.get(), kStackBytes);
#endif
    swapcontext(&main_, &fibers_[thread].context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  void leave([[maybe_unused]] bool for_good) {
    void* fake_stack = nullptr;
    const unsigned thread = current.index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, main_stack_, main_stack_bytes_);
#endif
    swapcontext(&fibers_[thread].context, &main_);
    arrived_in_fiber(fake_stack);
  }

  void arrived_in_fiber([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &main_stack_, &main_stack_bytes_);
#endif
  }

  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  std::vector<unsigned> ready_;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr error_;
  ucontext_t main_{};
  const void* main_stack_ = nullptr;
  std::size_t main_stack_bytes_ = 0;
};

class ThreadBlock final : public Block {
 public:
  using Block::Block;

  void run(const std::function<void()>& kernel) override {
    std::mutex error_mutex;
    std::exception_ptr error;
    {
      std::vector<std::jthread> running;
      for (unsigned thread = 0; thread < threads; ++thread) {
        running.emplace_back([&, thread] {
          current = {this, thread};
          try {
            kernel();
          } catch (...) {
            const std::lock_guard lock(error_mutex);
            error = std::current_exception();
          }
          end(thread);
        });
      }
    }
    if (error) std::rethrow_exception(error);
  }

  void barrier(unsigned) override {
    std::unique_lock lock(all_.mutex);
    ++all_.arrived;
    wait(all_, lock, threads - ended_);
  }

 private:
  void meet(Meeting& meeting, unsigned) override {
    std::unique_lock lock(meeting.mutex);
    ++meeting.arrived;
    wait(meeting, lock, kLanes);
  }

  static bool open_if_complete(Meeting& meeting, unsigned expected) {
    if (meeting.arrived < expected) return false;
    meeting.arrived = 0;
    ++meeting.generation;
    meeting.opened.notify_all();
    return true;
  }

  static void wait(Meeting& meeting, std::unique_lock<std::mutex>& lock, unsigned expected) {
    const unsigned generation = meeting.generation;
    if (open_if_complete(meeting, expected)) return;
    if (!meeting.opened.wait_for(lock, std::chrono::seconds(60), [&] { return meeting.generation != generation; })) {
      throw std::logic_error("threads wait for others that never come");
    }
  }

  void end(unsigned thread) {
    warps_[thread / kLanes]->ended |= 1u << thread % kLanes;
    const std::lock_guard lock(all_.mutex);
    ++ended_;
    open_if_complete(all_, threads - ended_);
  }
};

}  // namespace snapstone::emulated
