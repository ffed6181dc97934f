#include "mem/slot_ring.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "armed_faults.h"
#include "base/limits.h"
#include "seed.h"

namespace snapstone::mem {
namespace {

using namespace std::chrono_literals;
using testing::ArmedFaults;
using testing::errno_of;

constexpr std::uint64_t kSlotBytes = 64ull << 10;

class SlotRingTest : public ::testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(ring_->free_count(), ring_->slot_count()) << "a slot was lost"; }

  std::unique_ptr<SlotRing> ring_ = std::make_unique<SlotRing>(kSlotBytes);
};

TEST_F(SlotRingTest, slots_are_whole_pages) {
  EXPECT_EQ(SlotRing(1).slot_bytes(), kPageBytes);
  EXPECT_EQ(SlotRing(kPageBytes + 1).slot_bytes(), 2 * kPageBytes);
  EXPECT_EQ(SlotRing(kChunkBytesMax).slot_bytes(), kChunkBytesMax);
}

TEST_F(SlotRingTest, impossible_slot_sizes_are_refused) {
  EXPECT_THROW(SlotRing(0), std::invalid_argument);
  EXPECT_THROW(SlotRing(kChunkBytesMax + 1), std::invalid_argument);
  EXPECT_THROW(SlotRing(~std::uint64_t{0}), std::invalid_argument);
}

TEST_F(SlotRingTest, each_slot_has_memory_of_its_own) {
  constexpr std::uint64_t kSlots = 20;
  ring_->reserve(kSlots);
  std::vector<Slot> slots;
  std::set<std::uint8_t*> places;
  for (std::uint64_t i = 0; i < kSlots; ++i) {
    slots.push_back(ring_->try_acquire());
    ASSERT_TRUE(slots.back());
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(slots.back().data()) % kPageBytes, 0u);
    std::memset(slots.back().data(), static_cast<int>(i + 1), kSlotBytes);
    places.insert(slots.back().data());
  }
  EXPECT_EQ(places.size(), kSlots);
  EXPECT_FALSE(ring_->try_acquire()) << "more slots than were reserved";
  for (std::uint64_t i = 0; i < kSlots; ++i) {
    EXPECT_EQ(slots[i].data()[0], i + 1);
    EXPECT_EQ(slots[i].data()[kSlotBytes - 1], i + 1);
  }
}

TEST_F(SlotRingTest, a_slot_names_the_segment_that_holds_it) {
  SlotRing ring(kSegmentBytes / 2);
  ring.reserve(1);
  ring.reserve(4);  // one slot, then two to a segment, then the rest
  const std::vector<Segment> segments = ring.segments();
  ASSERT_EQ(segments.size(), 3u);
  std::vector<Slot> slots;
  std::set<int> seen;
  for (int i = 0; i < 4; ++i) {
    slots.push_back(ring.try_acquire());
    const Slot& slot = slots.back();
    const Segment& segment = segments.at(static_cast<std::size_t>(slot.segment()));
    EXPECT_GE(slot.data(), segment.data);
    EXPECT_LE(slot.data() + ring.slot_bytes(), segment.data + segment.nbytes);
    seen.insert(slot.segment());
  }
  EXPECT_EQ(seen, (std::set<int>{0, 1, 2}));
}

TEST_F(SlotRingTest, reserve_grows_and_never_shrinks_or_moves) {
  ring_->reserve(3);
  const Slot held = ring_->try_acquire();
  std::uint8_t* const before = ring_->segments()[0].data;
  ring_->reserve(2);
  EXPECT_EQ(ring_->slot_count(), 3u);
  ring_->reserve(50);
  EXPECT_EQ(ring_->slot_count(), 50u);
  EXPECT_EQ(ring_->free_count(), 49u);
  EXPECT_EQ(ring_->nbytes(), 50 * kSlotBytes);
  EXPECT_EQ(ring_->segments()[0].data, before);
}

TEST_F(SlotRingTest, without_memory_the_ring_keeps_what_it_has) {
  ring_->reserve(2);
  {
    const ArmedFaults faults("mmap:1+:errno=ENOMEM");
    EXPECT_EQ(errno_of([&] { ring_->reserve(100); }), ENOMEM);
  }
  EXPECT_EQ(ring_->slot_count(), 2u);
  EXPECT_EQ(ring_->segments().size(), 1u);
  ring_->reserve(3);
  EXPECT_EQ(ring_->slot_count(), 3u);
}

TEST_F(SlotRingTest, moves_hand_the_slot_on) {
  ring_->reserve(2);
  Slot a = ring_->try_acquire();
  std::uint8_t* const data = a.data();
  Slot b = std::move(a);
  EXPECT_FALSE(a);  // NOLINT(bugprone-use-after-move): the empty state is the promise
  EXPECT_EQ(a.data(), nullptr);
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(ring_->free_count(), 1u);
  Slot c = ring_->try_acquire();
  c = std::move(b);
  EXPECT_EQ(ring_->free_count(), 1u) << "assignment frees the slot that was there";
  EXPECT_EQ(c.data(), data);
  Slot& same = c;
  c = std::move(same);
  EXPECT_EQ(c.data(), data) << "self-assignment keeps the slot";
  c = {};
  EXPECT_EQ(ring_->free_count(), 2u);
}

TEST_F(SlotRingTest, the_slot_freed_last_is_given_first) {
  ring_->reserve(4);
  Slot a = ring_->try_acquire();
  Slot b = ring_->try_acquire();
  std::uint8_t* const warm = a.data();
  b = {};
  a = {};
  EXPECT_EQ(ring_->try_acquire().data(), warm);
}

// A run is one piece of memory, in order, and all of it the caller's.
void expect_run(const std::vector<Slot>& run, std::size_t count) {
  ASSERT_EQ(run.size(), count);
  for (std::size_t i = 1; i < run.size(); ++i) {
    EXPECT_EQ(run[i].data(), run[i - 1].data() + kSlotBytes);
    EXPECT_EQ(run[i].segment(), run[0].segment());
  }
}

TEST_F(SlotRingTest, a_run_is_adjacent_memory) {
  ring_->reserve(16);
  const std::vector<Slot> first = ring_->acquire_run(5, 0);
  expect_run(first, 5);
  const std::vector<Slot> rest = ring_->acquire_run(100, 0);
  expect_run(rest, 11);
  EXPECT_EQ(rest[0].data(), first[4].data() + kSlotBytes);
  EXPECT_TRUE(ring_->acquire_run(1, 0).empty());
  EXPECT_FALSE(ring_->try_acquire());
}

TEST_F(SlotRingTest, a_run_leaves_what_it_was_told_to_leave) {
  ring_->reserve(10);
  EXPECT_TRUE(ring_->acquire_run(4, 10).empty());
  EXPECT_TRUE(ring_->acquire_run(0, 0).empty());
  EXPECT_TRUE(ring_->acquire_run(4, UINT64_MAX).empty());
  const std::vector<Slot> run = ring_->acquire_run(100, 7);
  expect_run(run, 3);
  EXPECT_EQ(ring_->free_count(), 7u);
}

TEST_F(SlotRingTest, a_run_reaches_both_ways_from_the_slot_freed_last_and_stops_at_slots_in_use) {
  ring_->reserve(12);
  std::vector<Slot> all = ring_->acquire_run(12, 0);
  expect_run(all, 12);
  std::uint8_t* const begin = all[0].data();
  for (const std::size_t i : {1, 2, 4, 5, 6, 7, 9}) all[i] = {};  // 0, 3, 8, 10 and 11 stay in use
  all[5] = ring_->try_acquire();
  ASSERT_EQ(all[5].data(), begin + 9 * kSlotBytes) << "freed last";
  all[9] = std::move(all[5]);
  all[8] = {};
  const std::vector<Slot> run = ring_->acquire_run(100, 0);
  expect_run(run, 5);
  EXPECT_EQ(run[0].data(), begin + 4 * kSlotBytes);
  expect_run(ring_->acquire_run(100, 0), 2);
}

TEST_F(SlotRingTest, a_run_stays_within_one_segment) {
  SlotRing ring(kSegmentBytes / 4);
  ring.reserve(10);
  std::multiset<std::size_t> sizes;
  std::vector<std::vector<Slot>> runs;
  while (ring.free_count() > 0) {
    runs.push_back(ring.acquire_run(100, 0));
    sizes.insert(runs.back().size());
    for (const Slot& slot : runs.back()) EXPECT_EQ(slot.segment(), runs.back()[0].segment());
  }
  EXPECT_EQ(sizes, (std::multiset<std::size_t>{2, 4, 4}));
}

TEST_F(SlotRingTest, runs_do_not_change_which_slot_is_given_next) {
  ring_->reserve(8);
  std::vector<Slot> all = ring_->acquire_run(8, 0);
  std::uint8_t* const begin = all[0].data();
  for (const std::size_t i : {6, 0, 3, 4}) all[i] = {};
  const std::vector<Slot> run = ring_->acquire_run(2, 0);  // out of the middle of the list
  expect_run(run, 2);
  EXPECT_EQ(run[0].data(), begin + 3 * kSlotBytes);
  const Slot next = ring_->try_acquire();
  EXPECT_EQ(next.data(), begin);
  const Slot last = ring_->try_acquire();
  EXPECT_EQ(last.data(), begin + 6 * kSlotBytes);
}

// Any sequence of acquiring, runs, freeing and growing: free slots are counted right, given in the order in which they
// were freed last, and no slot is given twice.
TEST_F(SlotRingTest, random_use_agrees_with_a_list) {
  std::mt19937_64 random(testing::seed());
  ring_->reserve(24);
  std::vector<Slot> held = ring_->acquire_run(24, 0);
  std::vector<std::uint8_t*> freed;  // the model: the last one is given next
  for (int round = 0; round < 20000; ++round) {
    switch (random() % 4) {
      case 0:
      case 1:
        if (held.empty()) break;
        std::swap(held[random() % held.size()], held.back());
        freed.push_back(held.back().data());
        held.pop_back();
        break;
      case 2:
        if (freed.empty()) break;
        held.push_back(ring_->try_acquire());
        ASSERT_EQ(held.back().data(), freed.back());
        freed.pop_back();
        break;
      default: {
        const std::uint64_t leave = random() % 4;
        std::vector<Slot> run = ring_->acquire_run(1 + random() % 6, leave);
        ASSERT_EQ(run.empty(), freed.size() <= leave);
        for (Slot& slot : run) {
          ASSERT_EQ(std::erase(freed, slot.data()), 1u) << "given twice";
          held.push_back(std::move(slot));
        }
      }
    }
    ASSERT_EQ(ring_->free_count(), freed.size());
  }
}

TEST_F(SlotRingTest, acquire_gives_up_at_the_timeout) {
  ring_->reserve(1);
  const Slot held = ring_->try_acquire();
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_FALSE(ring_->acquire(30ms));
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 30ms);
}

TEST_F(SlotRingTest, a_waiting_acquire_wakes_when_a_slot_comes_back) {
  ring_->reserve(1);
  Slot held = ring_->try_acquire();
  Slot got;
  std::thread waiter([&] { got = ring_->acquire(60s); });
  std::this_thread::sleep_for(20ms);
  const auto begin = std::chrono::steady_clock::now();
  held = {};
  waiter.join();
  EXPECT_TRUE(got);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 30s) << "woken by the timeout, not by the slot";
}

TEST_F(SlotRingTest, waiting_acquires_wake_when_the_ring_grows) {
  std::vector<std::thread> waiters;
  std::atomic<int> served{0};
  for (int i = 0; i < 3; ++i) {
    waiters.emplace_back([&] {
      const Slot slot = ring_->acquire(60s);
      served += slot ? 1 : 0;
    });
  }
  std::this_thread::sleep_for(20ms);
  ring_->reserve(3);
  for (std::thread& waiter : waiters) waiter.join();
  EXPECT_EQ(served, 3);
}

// Each thread writes its number into its slots and finds it there again: a slot given twice would show.
TEST_F(SlotRingTest, threads_never_share_a_slot) {
  constexpr int kThreads = 6;
  constexpr int kRounds = 2000;
  ring_->reserve(3);
  std::atomic<int> clashes{0};
  std::atomic<int> starved{0};
  std::vector<std::thread> threads;
  for (int number = 1; number <= kThreads; ++number) {
    threads.emplace_back([&, number] {
      for (int round = 0; round < kRounds; ++round) {
        const Slot slot = ring_->acquire(60s);
        if (!slot) {
          ++starved;
          continue;
        }
        std::memset(slot.data(), number, 256);
        for (int i = 0; i < 256; ++i) clashes += slot.data()[i] != number ? 1 : 0;
      }
    });
  }
  std::thread grower([&] {
    for (std::uint64_t slots = 4; slots < 12; ++slots) ring_->reserve(slots);
  });
  for (std::thread& thread : threads) thread.join();
  grower.join();
  EXPECT_EQ(clashes, 0);
  EXPECT_EQ(starved, 0);
  EXPECT_EQ(ring_->slot_count(), 11u);
}

TEST_F(SlotRingTest, a_forfeited_slot_is_replaced_and_its_memory_stays) {
  ring_->reserve(2);
  Slot lost = ring_->try_acquire();
  std::uint8_t* const data = lost.data();
  lost.forfeit();
  EXPECT_FALSE(lost);
  lost.forfeit();  // nothing more to give up
  EXPECT_EQ(ring_->slot_count(), 1u);
  EXPECT_EQ(ring_->free_count(), 1u);
  ring_->reserve(2);
  EXPECT_EQ(ring_->slot_count(), 2u);
  std::vector<Slot> all;
  for (Slot slot = ring_->try_acquire(); slot; slot = ring_->try_acquire()) all.push_back(std::move(slot));
  for (const Slot& slot : all) EXPECT_NE(slot.data(), data);
  all.clear();
  ring_ = std::make_unique<SlotRing>(kSlotBytes);
  std::memset(data, 1, kSlotBytes);  // what a kernel that still holds it would do: it is mapped
}

TEST_F(SlotRingTest, a_forked_child_may_drop_the_ring) {
  ring_->reserve(1);
  Slot held = ring_->try_acquire();
  std::thread waiter([&] { ring_->acquire(60s); });
  std::this_thread::sleep_for(20ms);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);     // a destructor that waits for the parent's thread ends here
    held.forfeit();  // not destroyed: the lock may have been held at the fork
    ring_.reset();
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  held = {};
  waiter.join();
}

}  // namespace
}  // namespace snapstone::mem
