#include "io/uring_engine.h"

#include <sys/mman.h>

#include "io/engine_contract.h"

namespace snapstone::io {
namespace {

INSTANTIATE_TEST_SUITE_P(Uring, EngineContract, ::testing::Values(Rung::kUringFixed, Rung::kUring), rung_test_name);

class UringEngine : public EngineContract {};
INSTANTIATE_TEST_SUITE_P(Uring, UringEngine, ::testing::Values(Rung::kUringFixed, Rung::kUring), rung_test_name);

TEST_P(UringEngine, RegisteredBuffersAndOthersMixFreely) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(8 * kPageBytes, 1);
  const Buffer target(8 * kPageBytes);
  const bool fixed = engine->register_segment(3, source.data(), source.nbytes()) &&
                     engine->register_segment(0, target.data(), target.nbytes());
  EXPECT_EQ(fixed, GetParam() == Rung::kUringFixed);
  EXPECT_EQ(engine->rung(), GetParam());
  for (const int source_segment : {3, -1}) {
    for (const int target_segment : {0, -1}) {
      Request write = transfer_request(true, file, source);
      write.segment = source_segment;
      Request read = transfer_request(false, file, target);
      read.segment = target_segment;
      std::fill_n(target.data(), target.nbytes(), std::uint8_t{0});
      EXPECT_EQ(run_one(*engine, write), 0);
      EXPECT_EQ(run_one(*engine, read), 0);
      EXPECT_TRUE(equal(target.bytes(), source.bytes()));
    }
  }
}

TEST_P(UringEngine, ShortTransferInARegisteredBufferIsContinued) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(8 * kPageBytes, 1);
  engine->register_segment(0, source.data(), source.nbytes());
  Request request = transfer_request(true, file, source);
  request.segment = 0;
  fault::arm("uring_write:1+:short=4096");
  EXPECT_EQ(run_one(*engine, request), 0);
  EXPECT_EQ(fault::seen("uring_write"), 8u);
  EXPECT_TRUE(equal(directory_.content("a"), source.bytes()));
}

TEST_P(UringEngine, RefusedRegistrationLeavesAWorkingEngineOnTheNextRung) {
  const auto engine = this->engine();
  const os::File file = create("a");
  const Buffer source(kPageBytes, 1);
  void* const hole = ::mmap(nullptr, kPageBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(hole, MAP_FAILED);
  EXPECT_FALSE(engine->register_segment(0, static_cast<std::uint8_t*>(hole), kPageBytes));
  ::munmap(hole, kPageBytes);
  EXPECT_EQ(engine->rung(), Rung::kUring);
  Request request = transfer_request(true, file, source);
  request.segment = 0;
  EXPECT_EQ(run_one(*engine, request), 0);
  EXPECT_TRUE(equal(directory_.content("a"), source.bytes()));
}

TEST_P(UringEngine, OlderKernelsGetFewerFlags) {
  constexpr unsigned kFlagSets = 6;
  const Buffer source(4 * kPageBytes, 1);
  for (unsigned refusals = 1; refusals < kFlagSets; ++refusals) {
    std::string rules;
    for (unsigned nth = 1; nth <= refusals; ++nth) {
      rules += (nth == 1 ? "" : ";") + std::string("io_uring_setup:") + std::to_string(nth) + ":errno=EINVAL";
    }
    fault::arm(rules);
    const auto engine = this->engine();
    EXPECT_EQ(fault::seen("io_uring_setup"), refusals + 1);
    const std::string name = "file-" + std::to_string(refusals);
    const os::File file = create(name);
    EXPECT_EQ(run_one(*engine, transfer_request(true, file, source)), 0);
    EXPECT_TRUE(equal(directory_.content(name), source.bytes()));
  }
  fault::arm("io_uring_setup:1+:errno=EINVAL");
  EXPECT_THROW(this->engine(), OsError);
  EXPECT_EQ(fault::seen("io_uring_setup"), kFlagSets);
}

TEST_P(UringEngine, RefusedSetupIsAnOsError) {
  fault::arm("io_uring_setup:1:errno=EPERM");
  try {
    engine();
    FAIL() << "made an engine";
  } catch (const OsError& error) {
    EXPECT_EQ(error.error_number(), EPERM);
    EXPECT_EQ(error.verb(), "io_uring_setup");
  }
}

// More files at a time than the table of registered files has slots.
TEST_P(UringEngine, ManyFilesAtOnceAllGetTheirBytes) {
  constexpr std::size_t kFiles = 24;
  const auto engine = this->engine(kFiles);
  std::vector<os::File> files;
  std::vector<std::unique_ptr<Buffer>> sources;
  for (std::size_t i = 0; i < kFiles; ++i) {
    files.push_back(create("file-" + std::to_string(i)));
    sources.push_back(std::make_unique<Buffer>(kPageBytes, i + 1));
  }
  std::vector<Request> requests;
  for (std::size_t i = 0; i < kFiles; ++i) {
    requests.push_back(transfer_request(true, files[i], *sources[i], 0, i));
  }
  run_all(*engine, requests);
  for (std::size_t i = 0; i < kFiles; ++i) {
    EXPECT_TRUE(equal(directory_.content("file-" + std::to_string(i)), sources[i]->bytes())) << i;
  }
}

}  // namespace
}  // namespace snapstone::io
