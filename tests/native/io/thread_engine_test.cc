#include "io/thread_engine.h"

#include <cstdio>

#include "forked_child.h"
#include "io/engine_contract.h"
#include "refused_calls.h"

namespace snapstone::io {
namespace {

INSTANTIATE_TEST_SUITE_P(Threads, EngineContract, ::testing::Values(Rung::kThreadsDirect, Rung::kBuffered),
                         rung_test_name);

class ThreadEngineTest : public ::testing::Test {
 protected:
  const TemporaryDirectory directory_;
};

// Blocked signals of each engine thread of this process, as the kernel's bit mask.
std::vector<std::uint64_t> masks_of_engine_threads() {
  std::vector<std::uint64_t> masks;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::ifstream(entry.path() / "comm") >> name;
    if (name != "snapstone-io") {
      continue;
    }
    std::ifstream status(entry.path() / "status");
    for (std::string word; status >> word;) {
      if (word == "SigBlk:" && status >> word) {
        masks.push_back(std::stoull(word, nullptr, 16));
      }
    }
  }
  return masks;
}

TEST_F(ThreadEngineTest, ThreadsBlockAllSignals) {
  const auto engine = make_engine(Rung::kThreadsDirect, 8);
  const os::File file = directory_.create("a", true);
  const Buffer source(kPageBytes, 1);
  std::vector<Request> requests;
  for (std::uint64_t i = 0; i < 64; ++i) {
    requests.push_back(transfer_request(true, file, source, i * kPageBytes, i));
  }
  run_all(*engine, requests);  // by now at least one thread has its name
  const auto masks = masks_of_engine_threads();
  ASSERT_GE(masks.size(), 1u);
  EXPECT_LE(masks.size(), kDirectThreadsPerLane);
  for (const std::uint64_t mask : masks) {
    for (const int number : {SIGINT, SIGTERM, SIGALRM, SIGCHLD, SIGUSR1}) {
      EXPECT_NE(mask & (1ull << (number - 1)), 0u) << "signal " << number;
    }
  }
  sigset_t mine;
  ASSERT_EQ(::pthread_sigmask(SIG_SETMASK, nullptr, &mine), 0);
  EXPECT_EQ(sigismember(&mine, SIGTERM), 0) << "the owner's mask must be as before";
}

TEST_F(ThreadEngineTest, BufferedWritesNeedNoThread) {
  const auto engine = make_engine(Rung::kBuffered, 8);
  const os::File file = directory_.create("a", false);
  const Buffer source(kPageBytes, 1);
  engine->submit(transfer_request(true, file, source));
  EXPECT_TRUE(equal(directory_.content("a"), source.bytes())) << "written when submit() returns";
  EXPECT_TRUE(masks_of_engine_threads().empty());
  std::array<Completion, 1> completions;
  EXPECT_EQ(engine->complete(completions, 1), 1u);
}

TEST_F(ThreadEngineTest, NoThreadAtAllIsAnError) {
  testing::expect_child_says("^threw pthread_create " + std::to_string(EAGAIN), [] {
    testing::refuse_threads(EAGAIN);
    try {
      make_engine(Rung::kThreadsDirect, 8);
    } catch (const OsError& error) {
      std::fprintf(stderr, "threw %s %d\n", error.verb().c_str(), error.error_number());
    }
  });
}

TEST_F(ThreadEngineTest, HasNoRegisteredBuffers) {
  const Buffer buffer(kPageBytes);
  EXPECT_FALSE(make_engine(Rung::kThreadsDirect, 1)->register_segment(0, buffer.data(), buffer.nbytes()));
  EXPECT_FALSE(make_engine(Rung::kBuffered, 1)->register_segment(0, buffer.data(), buffer.nbytes()));
}

}  // namespace
}  // namespace snapstone::io
