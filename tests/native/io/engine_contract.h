// What every engine promises, as tests with the rung as parameter; the test files of the engines instantiate them.
//
// Invariants: the bytes of a file are the bytes given, whatever the kernel did to single transfers; every request is
// answered exactly once; a buffer is untouched after its completion and after the destructor.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/time.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/fault_hook.h"
#include "io/engine_fixture.h"

namespace snapstone::io {

class EngineContract : public ::testing::TestWithParam<Rung> {
 protected:
  void SetUp() override {
    try {
      make_engine(GetParam(), 1);
    } catch (const OsError& error) {
      const char* const required = std::getenv("FAIL_WITHOUT_IO_URING");
      ASSERT_FALSE(required != nullptr && std::string(required) == "1") << error.what();
      GTEST_SKIP() << error.what();
    }
  }
  void TearDown() override { fault::disarm(); }

  std::unique_ptr<IoEngine> engine(unsigned queue_depth = 8) const { return make_engine(GetParam(), queue_depth); }
  os::File create(const std::string& name) const { return directory_.create(name, rung_is_direct(GetParam())); }
  // Seam name of one transfer.
  std::string seam(bool write) const {
    return rung_is_uring(GetParam()) ? (write ? "uring_write" : "uring_read") : (write ? "pwrite" : "pread");
  }

  const TemporaryDirectory directory_;
};

inline std::string rung_test_name(const ::testing::TestParamInfo<Rung>& info) {
  std::string name = rung_name(info.param);
  std::erase(name, '-');
  return name;
}

TEST_P(EngineContract, BytesComeBackFromManyRequestsInFlight) {
  constexpr std::size_t kCount = 101;
  const auto engine = this->engine(16);
  const std::array<os::File, 3> files = {create("a"), create("b"), create("c")};
  std::vector<std::unique_ptr<Buffer>> sources;
  std::vector<std::unique_ptr<Buffer>> targets;
  std::vector<Request> writes;
  std::vector<Request> reads;
  for (std::size_t i = 0; i < kCount; ++i) {
    const std::uint64_t nbytes = (1 + i % 7) * kPageBytes;
    const std::uint64_t offset = i * 8 * kPageBytes;
    sources.push_back(std::make_unique<Buffer>(nbytes, i + 1));
    targets.push_back(std::make_unique<Buffer>(nbytes));
    writes.push_back(transfer_request(true, files[i % 3], *sources.back(), offset, i));
    reads.push_back(transfer_request(false, files[i % 3], *targets.back(), offset, i));
  }
  for (const auto& requests : {writes, reads}) {
    const auto answers = run_all(*engine, requests);
    ASSERT_EQ(answers.size(), kCount);
    for (const auto& [token, error_number] : answers) {
      EXPECT_EQ(error_number, 0) << "request " << token;
    }
  }
  for (std::size_t i = 0; i < kCount; ++i) {
    EXPECT_TRUE(equal(sources[i]->bytes(), targets[i]->bytes())) << "request " << i;
  }
  EXPECT_EQ(engine->in_flight(), 0u);
}

TEST_P(EngineContract, CompletesWithoutWaitingWhenPolled) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(16 * kPageBytes, 1);
  engine->submit(transfer_request(true, file, source, 0, 7));
  EXPECT_EQ(engine->in_flight(), 1u);
  std::array<Completion, 2> completions;
  std::size_t count = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (count == 0 && std::chrono::steady_clock::now() < deadline) {
    count = engine->complete(completions, 0);
    std::this_thread::yield();
  }
  ASSERT_EQ(count, 1u);
  EXPECT_EQ(completions[0].token, 7u);
  EXPECT_EQ(completions[0].error_number, 0);
  EXPECT_TRUE(equal(directory_.content("a"), source.bytes()));
}

TEST_P(EngineContract, ShortTransfersAreContinued) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(8 * kPageBytes, 1);
  const Buffer target(8 * kPageBytes);
  for (const char* const limit : {":1:short=4096", ":1:short=512", ":1+:short=8192"}) {
    SCOPED_TRACE(limit);
    for (const bool write : {true, false}) {
      fault::arm(seam(write) + limit);
      EXPECT_EQ(run_one(*engine, transfer_request(write, file, write ? source : target)), 0);
      EXPECT_GE(fault::seen(seam(write)), 2u) << "the rest was never asked for";
    }
    EXPECT_TRUE(equal(directory_.content("a"), source.bytes()));
    EXPECT_TRUE(equal(target.bytes(), source.bytes()));
    std::fill_n(target.data(), target.nbytes(), std::uint8_t{0});
  }
}

// The kernel takes the bytes up to RLIMIT_FSIZE, and refuses the rest with EFBIG when it is asked again.
TEST_P(EngineContract, ErrorOfTheRestIsDelivered) {
  constexpr std::uint64_t kLimitBytes = 4 * kPageBytes;
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(8 * kPageBytes, 1);
  rlimit previous{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &previous), 0);
  const rlimit limit{kLimitBytes, previous.rlim_max};
  const auto handler = ::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  const int answer = run_one(*engine, transfer_request(true, file, source));
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &previous), 0);
  ::signal(SIGXFSZ, handler);
  EXPECT_EQ(answer, EFBIG);
  EXPECT_TRUE(equal(directory_.content("a"), source.bytes().first(kLimitBytes)));
}

TEST_P(EngineContract, TransientErrorsAreRetried) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(4 * kPageBytes, 1);
  const Buffer target(4 * kPageBytes);
  for (const char* const error : {":1:errno=EINTR", ":1:errno=EAGAIN"}) {
    for (const bool write : {true, false}) {
      fault::arm(seam(write) + error);
      EXPECT_EQ(run_one(*engine, transfer_request(write, file, write ? source : target)), 0) << error;
      EXPECT_EQ(fault::seen(seam(write)), 2u) << error;
    }
  }
  EXPECT_TRUE(equal(target.bytes(), source.bytes()));
}

TEST_P(EngineContract, EndlessEagainIsDelivered) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(kPageBytes, 1);
  fault::arm(seam(true) + ":1+:errno=EAGAIN");
  EXPECT_EQ(run_one(*engine, transfer_request(true, file, source)), EAGAIN);
  EXPECT_EQ(fault::seen(seam(true)), kTransientRetriesMax + 1u);
}

TEST_P(EngineContract, ErrorIsDeliveredToItsRequestAlone) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(kPageBytes, 1);
  std::vector<Request> requests;
  for (std::uint64_t i = 0; i < 6; ++i) {
    requests.push_back(transfer_request(true, file, source, i * kPageBytes, i));
  }
  for (const int expected : {EIO, ENOSPC, ECANCELED}) {
    fault::arm(seam(true) + ":3:errno=" + std::to_string(expected));
    std::map<int, int> counts;
    for (const auto& [token, error_number] : run_all(*engine, requests)) {
      ++counts[error_number];
    }
    EXPECT_EQ(counts, (std::map<int, int>{{0, 5}, {expected, 1}}));
  }
}

TEST_P(EngineContract, EndOfFileIsReported) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(2 * kPageBytes, 1);
  const Buffer target(4 * kPageBytes);
  ASSERT_EQ(run_one(*engine, transfer_request(true, file, source)), 0);
  EXPECT_EQ(run_one(*engine, transfer_request(false, file, target)), Completion::kEndOfFile);
  EXPECT_EQ(run_one(*engine, transfer_request(false, file, target, 64 * kPageBytes)), Completion::kEndOfFile);
  os::truncate(file, kPageBytes + 100);  // ends inside a page
  EXPECT_EQ(run_one(*engine, transfer_request(false, file, target)), Completion::kEndOfFile);
  EXPECT_TRUE(equal(target.bytes().first(kPageBytes + 100), source.bytes().first(kPageBytes + 100)));
}

TEST_P(EngineContract, WriteThatTakesNothingIsNoSpace) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(kPageBytes, 1);
  fault::arm(seam(true) + ":1+:short=0");
  EXPECT_EQ(run_one(*engine, transfer_request(true, file, source)), ENOSPC);
}

TEST_P(EngineContract, RefusedODirectIsDroppedAndTheTransferRepeated) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(4 * kPageBytes, 1);
  fault::arm(seam(true) + ":1:errno=EINVAL");
  if (!file.direct) {
    EXPECT_EQ(run_one(*engine, transfer_request(true, file, source)), EINVAL) << "nothing to drop";
    return;
  }
  EXPECT_EQ(run_one(*engine, transfer_request(true, file, source)), 0);
  EXPECT_FALSE(still_direct(file));
  EXPECT_TRUE(equal(directory_.content("a"), source.bytes()));
  fault::arm(seam(true) + ":1+:errno=EINVAL");
  EXPECT_EQ(run_one(*engine, transfer_request(true, file, source)), EINVAL) << "must not repeat for ever";
}

// Counts, and here offsets too, that O_DIRECT does not take: the engine falls back by itself.
TEST_P(EngineContract, UnalignedTransfersWork) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(3 * kPageBytes + 777, 1);
  const Buffer target(3 * kPageBytes + 777);
  EXPECT_EQ(run_one(*engine, transfer_request(true, file, source, 13)), 0);
  EXPECT_EQ(run_one(*engine, transfer_request(false, file, target, 13)), 0);
  EXPECT_TRUE(equal(target.bytes(), source.bytes()));
}

// Enough bytes to keep the device busy for longer than it takes to mark all pages of all buffers.
TEST_P(EngineContract, DestructorLeavesNoTransferBehind) {
  constexpr std::size_t kCount = 32;
  constexpr std::uint8_t kMark = 0x5A;
  const Buffer source(1024 * kPageBytes);
  std::vector<std::unique_ptr<Buffer>> targets;
  for (std::size_t i = 0; i < kCount; ++i) {
    targets.push_back(std::make_unique<Buffer>(source.nbytes()));
  }
  const os::File file = create("a");
  {
    const auto engine = this->engine(kCount);
    ASSERT_EQ(run_one(*engine, transfer_request(true, file, source)), 0);
    for (std::size_t i = 0; i < kCount; ++i) {
      engine->submit(transfer_request(false, file, *targets[i], 0, i));
    }
    EXPECT_EQ(engine->in_flight(), kCount);
  }
  for (auto target = targets.rbegin(); target != targets.rend(); ++target) {
    for (std::uint64_t at = 0; at < source.nbytes(); at += kPageBytes) {
      (*target)->data()[at] = kMark;
    }
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  std::uint64_t overwritten = 0;
  for (const auto& target : targets) {
    for (std::uint64_t at = 0; at < source.nbytes(); at += kPageBytes) {
      overwritten += target->data()[at] == kMark ? 0 : 1;
    }
  }
  EXPECT_EQ(overwritten, 0u) << "pages written after the destructor returned";
}

TEST_P(EngineContract, SignalsDoNotDisturb) {
  struct sigaction action{};
  struct sigaction previous{};
  action.sa_handler = [](int) {};  // without SA_RESTART: calls that wait end with EINTR
  ASSERT_EQ(::sigaction(SIGALRM, &action, &previous), 0);
  const itimerval often{.it_interval = {0, 200}, .it_value = {0, 200}};
  const itimerval never{};
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(64 * kPageBytes, 1);
  std::vector<Request> requests;
  for (std::uint64_t i = 0; i < 64; ++i) {
    requests.push_back(transfer_request(true, file, source, i * source.nbytes(), i));
  }
  ASSERT_EQ(::setitimer(ITIMER_REAL, &often, nullptr), 0);
  const auto answers = run_all(*engine, requests);
  ::setitimer(ITIMER_REAL, &never, nullptr);
  ::sigaction(SIGALRM, &previous, nullptr);
  ASSERT_EQ(answers.size(), requests.size());
  for (const auto& [token, error_number] : answers) {
    EXPECT_EQ(error_number, 0);
  }
}

TEST_P(EngineContract, ReusedDescriptorMeansTheNewFile) {
  const auto engine = this->engine();
  const Buffer first(kPageBytes, 1);
  const Buffer second(kPageBytes, 2);
  os::File a = create("a");
  const int fd = a.fd.get();
  ASSERT_EQ(run_one(*engine, transfer_request(true, a, first)), 0);
  a.fd.close(a.path);  // without forget_file()
  const os::File b = create("b");
  ASSERT_EQ(b.fd.get(), fd) << "the number was meant to be reused";
  EXPECT_EQ(run_one(*engine, transfer_request(true, b, second)), 0);
  EXPECT_TRUE(equal(directory_.content("a"), first.bytes()));
  EXPECT_TRUE(equal(directory_.content("b"), second.bytes()));
}

// A lock of flock(2) lives until the last reference to the open file is gone.
TEST_P(EngineContract, ForgottenFileIsClosedByItsOwner) {
  const auto engine = this->engine();
  const Buffer source(kPageBytes, 1);
  os::File file = create("a");
  ASSERT_EQ(::flock(file.fd.get(), LOCK_EX | LOCK_NB), 0);
  ASSERT_EQ(run_one(*engine, transfer_request(true, file, source)), 0);
  engine->forget_file(file);
  file.fd.close(file.path);
  const os::File again = os::open_for_read(directory_.get().fd.get(), directory_.get().path, "a", false);
  EXPECT_EQ(::flock(again.fd.get(), LOCK_EX | LOCK_NB), 0);
}

}  // namespace snapstone::io
