// A slot whose request may be in the kernel is neither reused nor freed, whatever the engine does. The engine here is a
// stand-in, because a real one breaks only when the kernel does; engine_test.cc breaks a real ring.
#include "pipeline/in_flight.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <stdexcept>
#include <vector>

#include "armed_faults.h"
#include "base/error.h"
#include "base/limits.h"

namespace snapstone::pipeline {
namespace {

using testing::errno_of;

class StandIn final : public io::IoEngine {
 public:
  io::Rung rung() const override { return io::Rung::kUring; }
  unsigned capacity() const override { return 4; }
  unsigned in_flight() const override { return static_cast<unsigned>(tokens_.size()); }
  void submit(const io::Request& request) override {
    if (refuses_) throw OsError(EAGAIN, "pthread_create", "");
    tokens_.push_back(request.token);
    if (broken_) throw OsError(EBADF, "io_uring_enter", "");
  }
  std::size_t complete(std::span<io::Completion> completions, std::size_t /*minimum*/) override {
    if (broken_) throw OsError(EBADF, "io_uring_enter", "");
    std::size_t count = 0;
    for (; count < completions.size() && !tokens_.empty(); ++count, tokens_.pop_back()) {
      completions[count] = {tokens_.back(), 0};
    }
    return count;
  }
  bool register_segment(int, std::uint8_t*, std::uint64_t) override { return false; }

  bool broken_ = false;   // as with a ring that is gone: what was submitted stays with the kernel
  bool refuses_ = false;  // requests are not taken

 private:
  std::vector<std::uint64_t> tokens_;
};

class InFlightTest : public ::testing::Test {
 protected:
  void SetUp() override { ring_.reserve(4); }

  void submit(InFlight& in_flight, std::uint64_t chunk) {
    io::Request request;
    request.nbytes = kPageBytes;
    in_flight.submit(request, chunk, ring_.try_acquire());
  }

  mem::SlotRing ring_{kPageBytes};
  StandIn engine_;
  LaneBooks books_{0, false};
};

TEST_F(InFlightTest, each_request_ends_once_with_its_chunk_and_slot) {
  InFlight in_flight(engine_, books_, Stage::kWrite);
  for (std::uint64_t chunk = 10; chunk < 14; ++chunk) submit(in_flight, chunk);
  EXPECT_TRUE(in_flight.full());
  std::uint64_t sum = 0;
  in_flight.complete(1, [&](std::uint64_t chunk, mem::Slot slot, int error_number) {
    EXPECT_TRUE(slot);
    EXPECT_EQ(error_number, 0);
    sum += chunk;
  });
  EXPECT_EQ(sum, 10 + 11 + 12 + 13u);
  EXPECT_EQ(in_flight.count(), 0u);
  EXPECT_EQ(ring_.free_count(), 4u);
}

TEST_F(InFlightTest, the_destructor_waits_for_the_rest) {
  {
    InFlight in_flight(engine_, books_, Stage::kWrite);
    submit(in_flight, 1);
    submit(in_flight, 2);
    EXPECT_EQ(ring_.free_count(), 2u);
  }
  EXPECT_EQ(engine_.in_flight(), 0u);
  EXPECT_EQ(ring_.free_count(), 4u);
}

TEST_F(InFlightTest, an_error_in_the_middle_of_a_batch_loses_no_slot) {
  {
    InFlight in_flight(engine_, books_, Stage::kWrite);
    for (std::uint64_t chunk = 0; chunk < 4; ++chunk) submit(in_flight, chunk);
    int calls = 0;
    const auto fail_second = [&](std::uint64_t, mem::Slot, int) {
      if (++calls == 2) throw std::runtime_error("the second one");
    };
    EXPECT_THROW(in_flight.complete(1, fail_second), std::runtime_error);
    EXPECT_FALSE(in_flight.broken()) << "the engine is as good as before";
  }
  EXPECT_EQ(ring_.free_count(), 4u);
}

TEST_F(InFlightTest, a_refused_request_gives_its_slot_back) {
  {
    InFlight in_flight(engine_, books_, Stage::kRead);
    submit(in_flight, 1);
    engine_.refuses_ = true;
    EXPECT_EQ(errno_of([&] { submit(in_flight, 2); }), EAGAIN);
    EXPECT_TRUE(in_flight.broken());
  }
  EXPECT_EQ(ring_.free_count(), 4u);
  EXPECT_EQ(ring_.slot_count(), 4u);
}

TEST_F(InFlightTest, slots_that_a_broken_engine_holds_are_never_used_again) {
  {
    InFlight in_flight(engine_, books_, Stage::kRead);
    submit(in_flight, 1);
    engine_.broken_ = true;
    EXPECT_EQ(errno_of([&] { submit(in_flight, 2); }), EBADF);
    in_flight.drain();
    EXPECT_TRUE(in_flight.broken());
  }
  EXPECT_EQ(ring_.free_count(), 2u);
  EXPECT_EQ(ring_.slot_count(), 2u) << "two slots are the kernel's";
}

TEST_F(InFlightTest, an_engine_that_breaks_while_draining_is_reported) {
  InFlight in_flight(engine_, books_, Stage::kRead);
  submit(in_flight, 1);
  engine_.broken_ = true;
  in_flight.drain();
  EXPECT_TRUE(in_flight.broken());
  EXPECT_EQ(ring_.slot_count(), 3u);
}

}  // namespace
}  // namespace snapstone::pipeline
