// Invariant: reap() removes directories that a dead save made, and nothing else.
#include "store/reap.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "armed_faults.h"
#include "os/directory.h"
#include "os/file_system.h"
#include "store/names.h"
#include "store/staging.h"
#include "temporary_directory.h"

namespace snapstone::store {
namespace {

using testing::ArmedFaults;
using testing::errno_of;
using testing::TemporaryDirectory;
using Names = std::vector<std::string>;

std::string save_id(char digit) { return std::string(32, digit); }

class ReapTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const os::FileSystemFacts facts = os::file_system_facts(run_.directory());
    if (facts.network || facts.name.starts_with("0x")) GTEST_SKIP() << "not a local file system: " << facts.name;
  }

  void make(const std::string& name) const {
    std::filesystem::create_directory(run_ / name);
    std::ofstream(run_ / (name + "/rank-00000.data")) << "bytes";
  }
  void own(const std::string& name, const std::string& owners) const {
    std::ofstream(run_ / (name + "/" + kOwnerName)) << owners;
  }
  void age(const std::string& name, std::chrono::minutes by = std::chrono::minutes(11)) const {
    std::filesystem::last_write_time(run_ / name, std::filesystem::file_time_type::clock::now() - by);
  }
  // Neither a file nor a directory vanished from `name`.
  bool whole(const std::string& name) const { return std::filesystem::exists(run_ / (name + "/rank-00000.data")); }

  const TemporaryDirectory run_;
};

TEST_F(ReapTest, a_live_save_is_kept) {
  const Staging live = Staging::create(run_.path(), save_id('a'), {os::boot_id()});
  age(staging_name(save_id('a')));
  EXPECT_EQ(reap(run_.path()), Names{});
  EXPECT_TRUE(std::filesystem::exists(live.path()));
}

TEST_F(ReapTest, a_dead_save_of_this_boot_is_removed_at_once) {
  {
    const Staging dead = Staging::create(run_.path(), save_id('a'), {os::boot_id(), os::boot_id()});
  }
  EXPECT_EQ(reap(run_.path()), Names{staging_name(save_id('a'))});
  EXPECT_FALSE(std::filesystem::exists(run_ / staging_name(save_id('a'))));
}

TEST_F(ReapTest, on_a_local_file_system_owners_of_other_boots_are_dead) {
  const std::string name = staging_name(save_id('a'));
  make(name);
  own(name, os::boot_id() + "\nanother-boot\n");
  EXPECT_EQ(reap(run_.path()), Names{name});
}

TEST_F(ReapTest, without_an_owner_only_old_ones_are_removed) {
  const std::string young = staging_name(save_id('a'));
  const std::string old = staging_name(save_id('b'));
  const std::string old_empty_owner = staging_name(save_id('c'));
  const std::string of_a_wrong_clock = staging_name(save_id('d'));
  for (const std::string& name : {young, old, old_empty_owner, of_a_wrong_clock}) make(name);
  own(old_empty_owner, "");
  age(old);
  age(old_empty_owner);
  age(of_a_wrong_clock, -std::chrono::hours(24 * 3650));
  EXPECT_EQ(reap(run_.path()), (Names{old, old_empty_owner, of_a_wrong_clock}));
  EXPECT_TRUE(whole(young));
}

TEST_F(ReapTest, trash_is_removed) {
  make(trash_name(save_id('a')));
  EXPECT_EQ(reap(run_.path()), Names{trash_name(save_id('a'))});
}

TEST_F(ReapTest, foreign_names_are_untouched) {
  const Names foreign = {
      "step-00000001", ".staging-short",       ".staging-" + std::string(32, 'A'), staging_name(save_id('a')) + ".bak",
      ".trash",        "trash-" + save_id('a')};
  for (const std::string& name : foreign) {
    make(name);
    own(name, os::boot_id() + "\n");
    age(name);
  }
  EXPECT_EQ(reap(run_.path()), Names{});
  for (const std::string& name : foreign) EXPECT_TRUE(whole(name)) << name;
}

TEST_F(ReapTest, links_and_files_are_untouched) {
  const TemporaryDirectory elsewhere;
  std::ofstream(elsewhere / "precious") << "bytes";
  std::filesystem::create_directory_symlink(elsewhere.path(), run_ / trash_name(save_id('a')));
  std::filesystem::create_directory_symlink(elsewhere.path(), run_ / staging_name(save_id('b')));
  std::ofstream(run_ / staging_name(save_id('c'))) << "a file";
  EXPECT_EQ(reap(run_.path()), Names{});
  EXPECT_TRUE(std::filesystem::exists(elsewhere / "precious"));
  EXPECT_TRUE(std::filesystem::exists(run_ / staging_name(save_id('c'))));
}

TEST_F(ReapTest, links_inside_are_removed_and_not_followed) {
  const TemporaryDirectory elsewhere;
  std::ofstream(elsewhere / "precious") << "bytes";
  make(trash_name(save_id('a')));
  std::filesystem::create_directory_symlink(elsewhere.path(), run_ / (trash_name(save_id('a')) + "/link"));
  EXPECT_EQ(reap(run_.path()), Names{trash_name(save_id('a'))});
  EXPECT_TRUE(std::filesystem::exists(elsewhere / "precious"));
}

TEST_F(ReapTest, other_users_leftovers_are_untouched) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a directory away";
  make(trash_name(save_id('a')));
  ASSERT_EQ(::chown((run_ / trash_name(save_id('a'))).c_str(), 12345, 12345), 0);
  EXPECT_EQ(reap(run_.path()), Names{});
  EXPECT_TRUE(whole(trash_name(save_id('a'))));
}

TEST_F(ReapTest, what_cannot_be_judged_or_removed_stays_without_an_error) {
  for (const char digit : {'a', 'b'}) {
    make(staging_name(save_id(digit)));
    own(staging_name(save_id(digit)), os::boot_id() + "\n");
  }
  {
    const ArmedFaults faults("flock:1:errno=ENOLCK");
    EXPECT_EQ(reap(run_.path()), Names{staging_name(save_id('b'))});
  }
  {
    const ArmedFaults faults("unlink:1+:errno=EACCES");
    EXPECT_EQ(reap(run_.path()), Names{});
  }
  EXPECT_EQ(reap(run_.path()), Names{staging_name(save_id('a'))});
}

TEST_F(ReapTest, an_unreadable_owner_counts_as_none) {
  make(staging_name(save_id('a')));
  own(staging_name(save_id('a')), os::boot_id() + "\n");
  const ArmedFaults faults("pread:1+:errno=EIO");
  EXPECT_EQ(reap(run_.path()), Names{}) << "young, and nothing proves it dead";
}

TEST_F(ReapTest, a_missing_run_directory_is_an_error) {
  EXPECT_EQ(errno_of([&] { reap(run_ / "absent"); }), ENOENT);
}

// A reaper of another process holds the lock for a moment while it looks. No save may end up without it.
TEST_F(ReapTest, saves_that_begin_under_a_busy_reaper_stay_alive) {
  std::atomic<bool> stop{false};
  std::atomic<std::size_t> removed{0};
  std::thread reaper([&] {
    while (!stop) removed += reap(run_.path()).size();
  });
  for (int i = 0; i < 100; ++i) {
    const std::string id = save_id("0123456789abcdef"[i % 16]);
    Staging staging = Staging::create(run_.path(), id, {os::boot_id()});
    EXPECT_FALSE(os::try_lock_exclusive(os::open_directory_at(run_.directory(), staging_name(id)))) << "unlocked";
    EXPECT_NO_THROW(staging.write_file("rank-00000.data", {}));
    staging.discard();
  }
  stop = true;
  reaper.join();
  EXPECT_EQ(removed, 0u);
}

}  // namespace
}  // namespace snapstone::store
