#include "mem/board.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <thread>
#include <vector>

namespace snapstone::mem {
namespace {

using namespace std::chrono_literals;

class BoardTest : public ::testing::Test {
 protected:
  alignas(Board::kStride) std::array<std::uint8_t, 3 * Board::kStride> memory_{};
  Board board_{memory_.data(), 3};
};

TEST_F(BoardTest, a_wait_ends_when_the_last_counter_is_there) {
  board_.post(0, 2);
  board_.post(2, 1);
  EXPECT_EQ(board_.wait_for(1, 1ms), Board::Outcome::kTimedOut);
  board_.post(1, 1);
  EXPECT_EQ(board_.wait_for(1, 1ms), Board::Outcome::kReached);
  EXPECT_EQ(board_.wait_for(2, 1ms), Board::Outcome::kTimedOut);
}

TEST_F(BoardTest, a_failure_ends_every_wait) {
  board_.post(0, 5);
  board_.post(1, Board::kFailed);
  board_.post(2, 5);
  EXPECT_EQ(board_.wait_for(5, 1s), Board::Outcome::kFailed);
}

// Each thread writes plain memory, posts, waits, and reads what the others wrote; TSan watches.
TEST_F(BoardTest, what_was_written_before_a_post_is_seen_after_the_wait) {
  constexpr std::uint64_t kRounds = 300;
  std::vector<std::uint64_t> written(3 * (kRounds + 1));
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (std::size_t me = 0; me < 3; ++me) {
    threads.emplace_back([&, me] {
      for (std::uint64_t round = 1; round <= kRounds; ++round) {
        written[3 * round + me] = round * 10 + me;
        board_.post(me, round);
        if (board_.wait_for(round, 10s) != Board::Outcome::kReached) ++wrong;
        for (std::size_t other = 0; other < 3; ++other) wrong += written[3 * round + other] != round * 10 + other;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong.load(), 0);
}

}  // namespace
}  // namespace snapstone::mem
