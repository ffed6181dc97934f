#include "mem/slot_ring.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "armed_faults.h"
#include "base/limits.h"

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
