// A commit in the place of a predecessor: of that directory, and of nothing else.
#include "store/predecessor.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>

#include "armed_faults.h"
#include "base/fault_hook.h"
#include "store/names.h"
#include "store/staging_fixture.h"

namespace snapstone::store {
namespace {

using PredecessorTest = StagingTest;

// At once, and not after hours of copying.
TEST_F(PredecessorTest, an_owner_that_cannot_be_kept_is_refused_before_anything_is_copied) {
  save(kOldSaveId, "old", false);
  if (::chown((run_ / kFinal).c_str(), 12345, 12345) != 0) GTEST_SKIP() << "only root may give files away";
  const auto predecessor = std::make_shared<Predecessor>(Predecessor::open(run_.path(), kFinal));
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  {
    const ArmedFaults faults("fchown:1:errno=EPERM");
    EXPECT_EQ(errno_of([&] { staging.succeed(predecessor); }), EPERM);
  }
  staging.succeed(predecessor);
  struct stat facts{};
  ASSERT_EQ(::stat((run_ / staging_name(kSaveId)).c_str(), &facts), 0);
  EXPECT_EQ(facts.st_uid, 12345u);
}

TEST_F(PredecessorTest, only_the_predecessor_is_replaced) {
  save(kOldSaveId, "old", false);
  const auto predecessor = std::make_shared<Predecessor>(Predecessor::open(run_.path(), kFinal));
  save(std::string(32, 'b'), "newer", true);
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  staging.succeed(predecessor);
  {
    const ArmedFaults faults("");
    EXPECT_EQ(errno_of([&] { staging.commit(bytes_of("new"), bytes_of("new"), kFinal, true); }), ESTALE);
    EXPECT_EQ(fault::seen("renameat2"), 0u) << "the newer one was away for a moment";
  }
  EXPECT_EQ(checkpoint(), "newer");
  std::filesystem::remove_all(run_ / kFinal);
  Staging second = Staging::create(run_.path(), std::string(32, 'c'), {"boot"});
  second.succeed(predecessor);
  EXPECT_EQ(errno_of([&] { second.commit(bytes_of("new"), bytes_of("new"), kFinal, true); }), ESTALE);
  EXPECT_FALSE(exists(kFinal)) << "brought back what was removed";
  staging.discard();
  second.discard();
  EXPECT_EQ(names(), std::vector<std::string>{});
}

// Steps 7 and 8 with what moves in between the look and the exchange.
TEST_F(PredecessorTest, what_moved_into_the_place_of_the_predecessor_is_put_back) {
  for (const bool fails : {false, true}) {
    std::filesystem::remove_all(run_ / kFinal);
    save(std::string(32, 'b'), "newer", false);
    std::filesystem::rename(run_ / kFinal, run_ / "newer");
    save(kOldSaveId, "old", false);
    Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
    staging.succeed(std::make_shared<Predecessor>(Predecessor::open(run_.path(), kFinal)));
    const ArmedFaults faults(fails ? "renameat2:1:delay=200;renameat2:2:errno=EIO" : "renameat2:1:delay=200");
    std::thread mover([&] {
      while (fault::seen("renameat2") == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      std::filesystem::rename(run_ / kFinal, run_ / "aside");
      std::filesystem::rename(run_ / "newer", run_ / kFinal);
    });
    const int error = errno_of([&] { staging.commit(bytes_of("new"), bytes_of("new"), kFinal, true); });
    mover.join();
    staging.discard();
    EXPECT_EQ(error, fails ? EIO : ESTALE);
    EXPECT_EQ(read((fails ? staging_name(kSaveId) : kFinal) + "/" + kManifestName), "newer") << "it was removed";
    EXPECT_EQ(exists(staging_name(kSaveId)), fails);
    std::filesystem::remove_all(run_ / "aside");
  }
}

// What was taken out by the exchange is gone when it is looked for: a rank that was too late trashed it.
TEST_F(PredecessorTest, what_is_gone_before_it_is_put_back_ends_the_save) {
  save(std::string(32, 'b'), "newer", false);
  std::filesystem::rename(run_ / kFinal, run_ / "newer");
  save(kOldSaveId, "old", false);
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  staging.succeed(std::make_shared<Predecessor>(Predecessor::open(run_.path(), kFinal)));
  // The looks: at the old manifest files for their modes, at what stands there, at what was taken, at that to put it
  // back.
  const ArmedFaults faults("renameat2:1:delay=200;stat:5:delay=200");
  std::thread mover([&] {
    while (fault::seen("renameat2") == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::filesystem::rename(run_ / kFinal, run_ / "aside");
    std::filesystem::rename(run_ / "newer", run_ / kFinal);
    while (fault::seen("stat") < 5) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::filesystem::rename(run_ / staging_name(kSaveId), run_ / trash_name(kSaveId));
  });
  try {
    staging.commit(bytes_of("new"), bytes_of("new"), kFinal, true);
    ADD_FAILURE() << "committed";
  } catch (const OsError& error) {
    EXPECT_EQ(error.error_number(), ENOENT);
    EXPECT_EQ(error.verb(), "stat");
  }
  mover.join();
  staging.discard();
  EXPECT_EQ(read(trash_name(kSaveId) + "/" + kManifestName), "newer");
  EXPECT_EQ(read(kFinal + "/" + kManifestName), "new");
}

}  // namespace
}  // namespace snapstone::store
