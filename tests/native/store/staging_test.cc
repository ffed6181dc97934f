// Invariants: a run directory holds the previous checkpoint or the new one under the final name, whole, whatever call
// failed and wherever the process died; what else is left has a name that reap() removes.
#include "store/staging.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "armed_faults.h"
#include "base/fault_hook.h"
#include "store/names.h"
#include "store/reap.h"
#include "store/staging_fixture.h"

namespace snapstone::store {
namespace {

TEST_F(StagingTest, create_makes_a_private_locked_directory_with_owners) {
  const Staging staging = Staging::create(run_.path(), kSaveId, {"boot1", "boot2"});
  EXPECT_EQ(staging.save_id(), kSaveId);
  EXPECT_EQ(staging.path(), run_ / staging_name(kSaveId));
  struct stat facts{};
  ASSERT_EQ(::stat(staging.path().c_str(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0777, 0700u);
  EXPECT_EQ(read(staging_name(kSaveId) + "/" + kOwnerName), "boot1\nboot2\n");
  EXPECT_FALSE(is_lockable(staging_name(kSaveId)));
}

TEST_F(StagingTest, the_lock_ends_with_the_last_writer) {
  auto lead = std::make_unique<Staging>(Staging::create(run_.path(), kSaveId, {"boot"}));
  auto other = std::make_unique<Staging>(Staging::join(run_.path(), kSaveId));
  lead.reset();
  EXPECT_FALSE(is_lockable(staging_name(kSaveId)));
  other.reset();
  EXPECT_TRUE(is_lockable(staging_name(kSaveId)));
}

TEST_F(StagingTest, a_save_id_is_used_once) {
  const Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  EXPECT_EQ(errno_of([&] { Staging::create(run_.path(), kSaveId, {"boot"}); }), EEXIST);
  EXPECT_TRUE(exists(staging_name(kSaveId))) << "the save that has the directory lost it";
}

TEST_F(StagingTest, joining_before_the_directory_shows_is_enoent) {
  EXPECT_EQ(errno_of([&] { Staging::join(run_.path(), kSaveId); }), ENOENT);
}

TEST_F(StagingTest, a_create_that_fails_leaves_nothing) {
  for (const char* const rules : {"open:2:errno=EMFILE", "flock:1:errno=ENOLCK", "open:3:errno=ENOSPC",
                                  "pwrite:1:errno=EDQUOT", "close:1:errno=EIO"}) {
    {
      const ArmedFaults faults(rules);
      EXPECT_NE(errno_of([&] { Staging::create(run_.path(), kSaveId, {"boot"}); }), 0) << rules;
    }
    EXPECT_EQ(names(), std::vector<std::string>{}) << rules;
  }
}

TEST_F(StagingTest, a_directory_for_shared_files_that_cannot_be_made_says_why) {
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  const ArmedFaults faults("mkdir:1:errno=ENOSPC");
  EXPECT_EQ(errno_of([&] { staging.link_shared(run_.path(), {}, {}); }), ENOSPC);
}

TEST_F(StagingTest, a_file_system_without_locks_is_no_obstacle) {
  for (const char* const rules : {"flock:1+:errno=EOPNOTSUPP", "flock:1+:errno=ENOSYS"}) {
    const ArmedFaults faults(rules);
    Staging lead = Staging::create(run_.path(), kSaveId, {os::boot_id()});
    EXPECT_NO_THROW(Staging::join(run_.path(), kSaveId));
    EXPECT_EQ(reap(run_.path()), std::vector<std::string>{}) << "without locks nothing is provably dead";
    lead.discard();
  }
}

TEST_F(StagingTest, a_file_system_that_has_locks_and_gives_none_is_an_error) {
  const ArmedFaults faults("flock:1+:errno=ENOLCK");
  try {
    Staging::create(run_.path(), kSaveId, {"boot"});
    FAIL() << "went on without the lock";
  } catch (const OsError& error) {
    EXPECT_EQ(error.error_number(), ENOLCK);
  }
  EXPECT_FALSE(os::stat_at(run_.directory(), staging_name(kSaveId)));
}

// reap() of another process holds the lock exclusively for a moment: a save that went on without it would be taken for
// dead by the next one.
TEST_F(StagingTest, the_lock_is_waited_for_while_a_reaper_looks) {
  const Staging lead = Staging::create(run_.path(), kSaveId, {"boot"});
  ::rename(lead.path().c_str(), (run_ / staging_name(kOldSaveId)).c_str());
  os::make_directory_at(run_.directory(), staging_name(kSaveId));
  auto reaper = std::make_unique<os::Directory>(os::open_directory_at(run_.directory(), staging_name(kSaveId)));
  ASSERT_TRUE(os::try_lock_exclusive(*reaper));
  std::thread release([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    reaper.reset();
  });
  const Staging joined = Staging::join(run_.path(), kSaveId);
  release.join();
  EXPECT_FALSE(is_lockable(staging_name(kSaveId))) << "joined without the lock";
}

TEST_F(StagingTest, a_lock_that_nobody_gives_back_ends_the_save) {
  os::make_directory_at(run_.directory(), staging_name(kSaveId));
  const os::Directory holder = os::open_directory_at(run_.directory(), staging_name(kSaveId));
  ASSERT_TRUE(os::try_lock_exclusive(holder));
  EXPECT_EQ(errno_of([&] { Staging::join(run_.path(), kSaveId); }), EWOULDBLOCK) << "joined without the lock";
}

TEST_F(StagingTest, files_are_created_once_and_never_through_a_link) {
  const Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  staging.create_file("rank-00000.data", false);
  EXPECT_EQ(errno_of([&] { staging.create_file("rank-00000.data", false); }), EEXIST);
  ASSERT_EQ(::symlink("/dev/null", (staging.path() + "/planted").c_str()), 0);
  EXPECT_EQ(errno_of([&] { staging.write_file("planted", bytes_of("x")); }), EEXIST);
  EXPECT_EQ(errno_of([&] { staging.create_file("../escaped", false); }), EINVAL);
}

TEST_F(StagingTest, commit_makes_the_checkpoint_appear_whole) {
  save(kSaveId, "new", false);
  EXPECT_EQ(checkpoint(), "new");
  EXPECT_EQ(names(), std::vector<std::string>{kFinal});
}

TEST_F(StagingTest, the_path_of_a_committed_staging_is_the_checkpoint) {
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  staging.commit(bytes_of("m"), bytes_of("d"), kFinal, false);
  EXPECT_EQ(staging.path(), run_ / kFinal);
  staging.discard();
  EXPECT_TRUE(exists(kFinal)) << "discard after the commit removed the checkpoint";
}

TEST_F(StagingTest, an_existing_checkpoint_is_kept_unless_overwritten) {
  save(kOldSaveId, "old", false);
  EXPECT_EQ(errno_of([&] { save(kSaveId, "new", false); }), EEXIST);
  EXPECT_EQ(checkpoint(), "old");
  EXPECT_EQ(names(), std::vector<std::string>{kFinal});
  save(kSaveId, "new", true);
  EXPECT_EQ(checkpoint(), "new");
  EXPECT_EQ(names(), std::vector<std::string>{kFinal}) << "the old one was not removed";
}

TEST_F(StagingTest, overwrite_without_a_target_is_a_plain_commit) {
  save(kSaveId, "new", true);
  EXPECT_EQ(checkpoint(), "new");
}

TEST_F(StagingTest, only_checkpoints_are_overwritten) {
  os::make_directory_at(run_.directory(), kFinal);
  std::ofstream(run_ / (kFinal + "/thesis.tex")) << "precious";
  EXPECT_EQ(errno_of([&] { save(kSaveId, "new", true); }), EEXIST);
  EXPECT_EQ(read(kFinal + "/thesis.tex"), "precious");
  std::filesystem::remove_all(run_ / kFinal);
  std::ofstream(run_ / kFinal) << "a file";
  EXPECT_NE(errno_of([&] { save(kSaveId, "new", true); }), 0);
  EXPECT_EQ(read(kFinal), "a file");
  std::filesystem::remove(run_ / kFinal);
  std::filesystem::create_directory_symlink("/", run_ / kFinal);
  EXPECT_NE(errno_of([&] { save(kSaveId, "new", true); }), 0);
  EXPECT_TRUE(std::filesystem::is_symlink(run_ / kFinal));
}

TEST_F(StagingTest, without_rename_flags_commits_work_and_overwrites_are_refused) {
  const ArmedFaults faults("renameat2:1+:errno=EINVAL");
  save(kOldSaveId, "old", false);
  EXPECT_EQ(checkpoint(), "old");
  EXPECT_EQ(errno_of([&] { save(kSaveId, "new", false); }), EEXIST);
  EXPECT_EQ(errno_of([&] { save(kSaveId, "new", true); }), EINVAL) << "two renames would not be atomic";
  EXPECT_EQ(checkpoint(), "old");
  EXPECT_EQ(names(), std::vector<std::string>{kFinal});
}

TEST_F(StagingTest, discard_removes_everything_of_the_save) {
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  staging.create_file("rank-00000.data", false);
  staging.discard();
  EXPECT_EQ(names(), std::vector<std::string>{});
  staging.discard();
}

TEST_F(StagingTest, discard_removes_what_a_writer_adds_meanwhile) {
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  const ArmedFaults faults("rmdir:1:errno=ENOTEMPTY");
  staging.discard();
  EXPECT_EQ(names(), std::vector<std::string>{});
}

TEST_F(StagingTest, a_rank_that_cannot_withdraw_the_save_says_so) {
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  {
    const ArmedFaults faults("rename:1:errno=EIO");
    EXPECT_EQ(errno_of([&] { staging.withdraw(); }), EIO);
  }
  EXPECT_TRUE(exists(staging_name(kSaveId)));
  staging.withdraw();
  EXPECT_EQ(names(), std::vector<std::string>{trash_name(kSaveId)});
  EXPECT_NO_THROW(staging.withdraw()) << "another rank did it";
}

TEST_F(StagingTest, files_of_a_base_that_was_never_linked_cannot_be_synced) {
  const Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  try {
    staging.sync(std::vector<std::string>{"rank-00000.data"});
    FAIL() << "synced nothing";
  } catch (const OsError& error) {
    EXPECT_EQ(error.error_number(), ENOENT);
    EXPECT_TRUE(error.path().ends_with("/base/rank-00000.data")) << error.path();
  }
}

// Steps 5 to 8: each check arms the call that comes next, and counts those that came before.
TEST_F(StagingTest, everything_is_synced_before_the_commit_point) {
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  {
    const ArmedFaults faults("renameat2:1:errno=EIO");
    EXPECT_EQ(errno_of([&] { staging.commit(bytes_of("m"), bytes_of("d"), kFinal, false); }), EIO);
    EXPECT_EQ(fault::seen("fsync"), 3u) << "manifest, its digest, the staging directory";
    EXPECT_EQ(fault::seen("close"), 2u);
    EXPECT_EQ(fault::seen("unlink"), 1u) << "OWNER";
  }
  EXPECT_FALSE(exists(staging_name(kSaveId) + "/" + kOwnerName));
  EXPECT_EQ(checkpoint(), "");
}

TEST_F(StagingTest, a_manifest_or_digest_that_is_not_what_was_written_is_not_committed) {
  for (const auto& [nth, name] : {std::pair{1, kManifestName}, std::pair{2, kManifestDigestName}}) {
    Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
    const ArmedFaults faults("fsync:" + std::to_string(nth) + ":delay=300");
    std::thread other([&] {
      while (fault::seen("fsync") < static_cast<std::uint64_t>(nth)) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      std::ofstream(run_ / (staging_name(kSaveId) + "/" + name)) << "another!!";
    });
    EXPECT_THROW(staging.commit(bytes_of("manifest!"), bytes_of("a digest!"), kFinal, false, true), CorruptError);
    other.join();
    EXPECT_FALSE(exists(kFinal)) << name;
    staging.discard();
  }
}

TEST_F(StagingTest, the_parent_is_synced_before_the_old_checkpoint_goes) {
  save(kOldSaveId, "old", false);
  const ArmedFaults faults("fsync:5:errno=EIO");  // data, manifest, digest, staging directory, parent
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  staging.write_file("rank-00000.data", bytes_of("new"));
  EXPECT_EQ(errno_of([&] { staging.commit(bytes_of("new"), bytes_of("new"), kFinal, true); }), EIO);
  EXPECT_EQ(fault::seen("renameat2"), 1u);
  EXPECT_EQ(fault::seen("rename"), 0u) << "moved to the trash";
  staging.discard();
  EXPECT_EQ(checkpoint(), "new");
  EXPECT_EQ(read(staging_name(kSaveId) + "/" + kManifestName), "old")
      << "perhaps the exchange did not reach the disk, and this is the only checkpoint there";
}

TEST_F(StagingTest, a_replaced_checkpoint_is_not_reaped_while_the_exchange_is_not_durable) {
  save(kOldSaveId, "old", false);
  std::filesystem::last_write_time(run_ / kFinal,
                                   std::filesystem::file_time_type::clock::now() - std::chrono::hours(1));
  Staging staging = Staging::create(run_.path(), kSaveId, {"boot"});
  const ArmedFaults faults("fsync:4:delay=300");  // manifest, digest, staging directory, parent
  std::vector<std::string> reaped;
  std::thread reaper([&] {
    while (fault::seen("renameat2") == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    reaped = reap(run_.path());
  });
  staging.commit(bytes_of("new"), bytes_of("new"), kFinal, true);
  reaper.join();
  EXPECT_EQ(reaped, std::vector<std::string>{});
}

TEST_F(StagingTest, what_cannot_be_trashed_after_the_commit_is_no_failure) {
  save(kOldSaveId, "old", false);
  for (const char* const rules : {"rename:1:errno=EIO", "rmdir:1:errno=EIO"}) {
    const ArmedFaults faults(rules);
    EXPECT_NO_THROW(save(kSaveId, "new", true)) << rules;
    EXPECT_EQ(checkpoint(), "new") << rules;
    for (const std::string& name : names()) {
      EXPECT_TRUE(name == kFinal || is_staging_name(name) || is_trash_name(name)) << name;
      if (name != kFinal) std::filesystem::remove_all(run_ / name);
    }
  }
}

// A failing call at every place in turn: the save reports it, and old or new is there, whole.
TEST_F(StagingTest, any_failing_call_leaves_old_or_new) {
  for (const bool overwrite : {false, true}) {
    for (std::uint64_t nth = 1;; ++nth) {
      std::filesystem::remove_all(run_ / kFinal);
      if (overwrite) save(kOldSaveId, "old", false);
      bool failed = false;
      bool reached = true;
      {
        const ArmedFaults faults("*:" + std::to_string(nth) + ":errno=EIO");
        failed = errno_of([&] { save(kSaveId, "new", overwrite); }) != 0;
        reached = fault::seen("*") >= nth;
      }
      const std::string found = checkpoint();
      EXPECT_TRUE(found == "new" || (failed && found == (overwrite ? "old" : ""))) << "call " << nth << ": " << found;
      for (const std::string& name : names()) {
        EXPECT_TRUE(name == kFinal || is_staging_name(name) || is_trash_name(name)) << name;
        if (name != kFinal) std::filesystem::remove_all(run_ / name);
      }
      if (!reached) break;
      ASSERT_LT(nth, 200u);
    }
  }
}

// SIGKILL at every call in turn: old or new is there, the leftovers are reaped, and the next save works.
TEST_F(StagingTest, a_crash_at_any_call_leaves_old_or_new) {
  for (const bool overwrite : {false, true}) {
    int kills = 0;
    int news = 0;
    for (std::uint64_t nth = 1;; ++nth) {
      std::filesystem::remove_all(run_ / kFinal);
      if (overwrite) save(kOldSaveId, "old", false);
      const pid_t child = ::fork();
      if (child == 0) {
        fault::arm("*:" + std::to_string(nth) + ":kill");
        save(kSaveId, "new", overwrite);
        ::_exit(0);
      }
      int status = 0;
      ASSERT_EQ(::waitpid(child, &status, 0), child);
      const bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
      const std::string found = checkpoint();
      news += found == "new" ? 1 : 0;
      EXPECT_TRUE(found == "new" || (killed && found == (overwrite ? "old" : ""))) << "call " << nth << ": " << found;
      for (const std::string& name : names()) {
        if (name == kFinal) continue;
        ASSERT_TRUE(is_staging_name(name) || is_trash_name(name)) << name;
        // Without OWNER a leftover must be old before it is reaped.
        std::filesystem::last_write_time(run_ / name,
                                         std::filesystem::file_time_type::clock::now() - std::chrono::hours(1));
      }
      reap(run_.path());
      EXPECT_EQ(names(), found.empty() ? std::vector<std::string>{} : std::vector<std::string>{kFinal});
      EXPECT_EQ(checkpoint(), found) << "reap changed the checkpoint";
      if (!killed) break;
      ++kills;
      ASSERT_LT(nth, 200u);
    }
    EXPECT_GT(kills, 20);
    EXPECT_GE(news, 2) << "no crash after the commit point was tried";
    save(kSaveId, "again", true);
    EXPECT_EQ(checkpoint(), "again");
  }
}

}  // namespace
}  // namespace snapstone::store
