#include "os/directory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <string>

#include "armed_faults.h"
#include "os/file.h"
#include "os/ownership.h"
#include "temporary_directory.h"

namespace snapstone::os {
namespace {

using testing::ArmedFaults;
using testing::errno_of;
using testing::TemporaryDirectory;

class DirectoryTest : public ::testing::Test {
 protected:
  void write(const std::string& name, const std::string& text) { std::ofstream(directory_ / name) << text; }
  std::string read(const std::string& name) {
    std::ifstream stream(directory_ / name);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  bool exists(const std::string& name) { return stat_at(root(), name).has_value(); }
  const Directory& root() { return directory_.directory(); }

  TemporaryDirectory directory_;
};

TEST_F(DirectoryTest, make_and_open_are_private_and_exclusive) {
  make_directory_at(root(), "stage");
  struct stat facts{};
  ASSERT_EQ(::stat((directory_ / "stage").c_str(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0777, 0700u);
  EXPECT_EQ(errno_of([&] { make_directory_at(root(), "stage"); }), EEXIST);
  EXPECT_EQ(open_directory_at(root(), "stage").path, directory_ / "stage");
  EXPECT_EQ(errno_of([&] { open_directory_at(root(), "absent"); }), ENOENT);
}

TEST_F(DirectoryTest, only_the_users_own_path_may_be_a_link) {
  make_directory_at(root(), "real");
  ASSERT_EQ(::symlink("real", (directory_ / "link").c_str()), 0);
  EXPECT_EQ(errno_of([&] { open_directory(directory_ / "link"); }), 0);
  EXPECT_EQ(errno_of([&] { open_directory_at(root(), "link"); }), ENOTDIR);
}

TEST_F(DirectoryTest, names_are_one_component) {
  for (const char* name : {"", ".", "..", "a/b", "/a"}) {
    EXPECT_EQ(errno_of([&] { open_directory_at(root(), name); }), EINVAL) << name;
    EXPECT_EQ(errno_of([&] { make_directory_at(root(), name); }), EINVAL) << name;
    EXPECT_EQ(errno_of([&] { rename_at(root(), "x", name); }), EINVAL) << name;
    EXPECT_EQ(errno_of([&] { rename_noreplace(root(), name, "x"); }), EINVAL) << name;
    EXPECT_EQ(errno_of([&] { rename_exchange(root(), name, "x"); }), EINVAL) << name;
    EXPECT_EQ(errno_of([&] { unlink_at(root(), name); }), EINVAL) << name;
    EXPECT_EQ(errno_of([&] { link_at(root(), name, root(), "x"); }), EINVAL) << name;
    EXPECT_EQ(errno_of([&] { remove_tree_at(root(), name); }), EINVAL) << name;
    EXPECT_EQ(errno_of([&] { stat_at(root(), name); }), EINVAL) << name;
  }
}

TEST_F(DirectoryTest, rename_replaces_and_noreplace_does_not) {
  write("a", "a");
  write("b", "b");
  EXPECT_EQ(errno_of([&] { rename_noreplace(root(), "a", "b"); }), EEXIST);
  EXPECT_EQ(read("b"), "b");
  rename_noreplace(root(), "a", "c");
  EXPECT_FALSE(exists("a"));
  rename_at(root(), "c", "b");
  EXPECT_EQ(read("b"), "a");
}

TEST_F(DirectoryTest, noreplace_holds_where_the_file_system_has_no_flags) {
  make_directory_at(root(), "stage");
  write("stage/x", "new");
  make_directory_at(root(), "empty");
  make_directory_at(root(), "full");
  write("full/x", "old");
  const ArmedFaults faults("renameat2:1+:errno=EINVAL");
  EXPECT_EQ(errno_of([&] { rename_noreplace(root(), "stage", "full"); }), EEXIST);
  EXPECT_EQ(errno_of([&] { rename_noreplace(root(), "stage", "empty"); }), EEXIST);
  EXPECT_EQ(read("full/x"), "old");
  EXPECT_TRUE(exists("stage"));
  rename_noreplace(root(), "stage", "step");
  EXPECT_EQ(read("step/x"), "new");
}

TEST_F(DirectoryTest, a_winner_that_appears_during_the_fallback_is_eexist) {
  make_directory_at(root(), "stage");
  make_directory_at(root(), "full");
  write("full/x", "old");
  // The look before the rename misses `full`, as it would if `full` came a moment later.
  const ArmedFaults faults("renameat2:1:errno=ENOSYS;stat:1:errno=ENOENT");
  EXPECT_EQ(errno_of([&] { rename_noreplace(root(), "stage", "full"); }), EEXIST);
  EXPECT_EQ(read("full/x"), "old");
}

TEST_F(DirectoryTest, a_rename_that_fails_in_the_fallback_says_why) {
  make_directory_at(root(), "stage");
  const ArmedFaults faults("renameat2:1:errno=ENOSYS;rename:1:errno=ENOSPC");
  EXPECT_EQ(errno_of([&] { rename_noreplace(root(), "stage", "step"); }), ENOSPC);
  EXPECT_TRUE(exists("stage"));
  EXPECT_FALSE(exists("step"));
}

TEST_F(DirectoryTest, exchange_swaps_both_names) {
  make_directory_at(root(), "a");
  make_directory_at(root(), "b");
  write("a/x", "from a");
  {
    const ArmedFaults faults("renameat2:1:errno=ENOSYS");
    EXPECT_EQ(errno_of([&] { rename_exchange(root(), "a", "b"); }), EINVAL);
  }
  const int error_number = errno_of([&] { rename_exchange(root(), "a", "b"); });
  if (error_number == EINVAL) {
    GTEST_SKIP() << "no RENAME_EXCHANGE here";
  }
  ASSERT_EQ(error_number, 0);
  EXPECT_EQ(read("b/x"), "from a");
  EXPECT_FALSE(std::filesystem::exists(directory_ / "a/x"));
}

TEST_F(DirectoryTest, link_shares_the_inode_and_never_replaces) {
  make_directory_at(root(), "base");
  const Directory base = open_directory_at(root(), "base");
  write("data", "bytes");
  link_at(root(), "data", base, "old.data");
  EXPECT_EQ(stat_at(base, "old.data")->inode, stat_at(root(), "data")->inode);
  EXPECT_EQ(errno_of([&] { link_at(root(), "data", base, "old.data"); }), EEXIST);
  unlink_at(root(), "data");
  EXPECT_EQ(read("base/old.data"), "bytes");
  EXPECT_EQ(errno_of([&] { unlink_at(root(), "data"); }), ENOENT);
}

TEST_F(DirectoryTest, listing_is_sorted_and_describes_links_themselves) {
  write("b", "12345");
  make_directory_at(root(), "c");
  ASSERT_EQ(::symlink("c", (directory_ / "a").c_str()), 0);
  const std::vector<Entry> entries = list_directory(root());
  ASSERT_EQ(entries.size(), 3u);
  EXPECT_EQ(entries[0].name, "a");
  EXPECT_FALSE(entries[0].is_directory);
  EXPECT_FALSE(entries[0].is_regular);
  EXPECT_EQ(entries[1].name, "b");
  EXPECT_TRUE(entries[1].is_regular);
  EXPECT_EQ(entries[1].nbytes, 5u);
  EXPECT_EQ(entries[1].owner_uid, ::geteuid());
  EXPECT_EQ(entries[2].name, "c");
  EXPECT_TRUE(entries[2].is_directory);
  struct stat facts{};
  ASSERT_EQ(::stat((directory_ / "b").c_str(), &facts), 0);
  EXPECT_EQ(entries[1].inode, facts.st_ino);
  EXPECT_EQ(entries[1].device, facts.st_dev);
  EXPECT_EQ(entries[1].modified_ns, facts.st_mtim.tv_sec * 1'000'000'000 + facts.st_mtim.tv_nsec);
}

TEST_F(DirectoryTest, listing_twice_starts_at_the_beginning) {
  write("a", "");
  EXPECT_EQ(list_directory(root()).size(), 1u);
  EXPECT_EQ(list_directory(root()).size(), 1u);
}

TEST_F(DirectoryTest, a_failing_listing_is_an_error_and_not_a_short_list) {
  write("a", "");
  write("b", "");
  for (const char* rule : {"readdir:2:errno=EIO", "opendir:1:errno=EIO", "stat:2:errno=EIO", "open:1:errno=EIO"}) {
    const ArmedFaults faults(rule);
    EXPECT_EQ(errno_of([&] { list_directory(root()); }), EIO) << rule;
  }
  const ArmedFaults faults("readdir:2:errno=EINTR;stat:1:errno=ENOENT");
  EXPECT_EQ(list_directory(root()).size(), 1u) << "an interruption is retried, a vanished entry left out";
}

TEST_F(DirectoryTest, remove_tree_never_leaves_the_tree) {
  TemporaryDirectory outside;
  std::ofstream(outside / "precious") << "keep";
  make_directory_at(root(), "tree");
  std::filesystem::create_directories(directory_ / "tree/base/deep");
  write("tree/base/deep/x", "x");
  write("tree/y", "y");
  ASSERT_EQ(::symlink(outside.path().c_str(), (directory_ / "tree/link").c_str()), 0);
  ASSERT_EQ(::symlink((outside / "precious").c_str(), (directory_ / "tree/base/link").c_str()), 0);
  ASSERT_EQ(::symlink(outside.path().c_str(), (directory_ / "root-link").c_str()), 0);
  remove_tree_at(root(), "tree");
  EXPECT_FALSE(exists("tree"));
  EXPECT_EQ(errno_of([&] { remove_tree_at(root(), "root-link"); }), ENOTDIR);
  EXPECT_TRUE(std::filesystem::exists(outside / "precious"));
}

TEST_F(DirectoryTest, remove_tree_is_done_when_nothing_is_there_and_can_be_resumed) {
  remove_tree_at(root(), "absent");
  make_directory_at(root(), "tree");
  write("tree/a", "");
  write("tree/b", "");
  {
    const ArmedFaults faults("unlink:2:errno=EIO");
    EXPECT_EQ(errno_of([&] { remove_tree_at(root(), "tree"); }), EIO);
  }
  EXPECT_TRUE(exists("tree"));
  {
    const ArmedFaults faults(
        "unlink:1:errno=ENOENT");  // somebody else removed it first, in appearance: rmdir then says so
    EXPECT_EQ(errno_of([&] { remove_tree_at(root(), "tree"); }), ENOTEMPTY);
  }
  remove_tree_at(root(), "tree");
  EXPECT_FALSE(exists("tree"));
}

TEST_F(DirectoryTest, a_tree_deeper_than_any_checkpoint_is_refused) {
  std::string path = "deep";
  for (int i = 0; i < 70; ++i) {
    path += "/d";
  }
  std::filesystem::create_directories(directory_ / path);
  EXPECT_EQ(errno_of([&] { remove_tree_at(root(), "deep"); }), ENAMETOOLONG);
}

TEST_F(DirectoryTest, sync_reports_errors) {
  EXPECT_EQ(errno_of([&] { sync_directory(root()); }), 0);
  const ArmedFaults faults("fsync:1:errno=EIO");
  EXPECT_EQ(errno_of([&] { sync_directory(root()); }), EIO);
}

TEST_F(DirectoryTest, what_cannot_be_described_is_an_error) {
  struct stat facts{};
  ASSERT_EQ(::stat(directory_.path().c_str(), &facts), 0);
  EXPECT_EQ(stat_directory(root()).inode, facts.st_ino);
  const ArmedFaults faults("fstat:1:errno=EIO");
  EXPECT_EQ(errno_of([&] { stat_directory(root()); }), EIO);
}

// Whose it is and who may use it, of another directory.
TEST_F(DirectoryTest, owner_and_permissions_are_given_or_it_is_said_why_not) {
  make_directory_at(root(), "model");
  ASSERT_EQ(::chmod((directory_ / "model").c_str(), 0751), 0);
  Entry model = stat_directory(open_directory(directory_ / "model"));
  const auto give = [&] { give_owner_and_mode(root().fd.get(), root().path, model); };
  give();
  EXPECT_EQ(stat_directory(root()).mode & 07777, 0751u);
  {
    const ArmedFaults faults("fstat:1:errno=EIO");
    EXPECT_EQ(errno_of(give), EIO);
  }
  ++model.owner_uid;
  {
    const ArmedFaults faults("fchown:1:errno=EIO");
    EXPECT_EQ(errno_of(give), EIO) << "failed, not refused";
  }
  const ArmedFaults faults("fchown:1:errno=EPERM");
  EXPECT_EQ(errno_of(give), EPERM);
}

TEST_F(DirectoryTest, locks_exclude_other_open_descriptions) {
  const Directory other = open_directory(directory_.path());
  ASSERT_TRUE(try_lock_shared(root()));
  EXPECT_TRUE(try_lock_shared(other));
  EXPECT_FALSE(try_lock_exclusive(root()));
  {
    const Directory third = open_directory(directory_.path());
    EXPECT_FALSE(try_lock_exclusive(third));
  }
  const ArmedFaults faults("flock:1:errno=EINTR;flock:3:errno=ENOLCK");
  EXPECT_TRUE(try_lock_shared(root()));
  EXPECT_EQ(errno_of([&] { try_lock_shared(root()); }), ENOLCK);
}

TEST_F(DirectoryTest, a_lock_dies_with_its_process) {
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const Directory own = open_directory(directory_.path());
    const char result = try_lock_exclusive(own) ? 'y' : 'n';
    if (::write(ready[1], &result, 1) != 1) {
      ::_exit(1);
    }
    for (;;) {
      ::pause();
    }
  }
  char locked = 0;
  ASSERT_EQ(::read(ready[0], &locked, 1), 1);
  ASSERT_EQ(locked, 'y');
  EXPECT_FALSE(try_lock_shared(root()));
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  EXPECT_TRUE(try_lock_exclusive(root()));
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST(BootId, is_hex_and_stable) {
  const std::string id = boot_id();
  EXPECT_EQ(id, boot_id());
  EXPECT_EQ(id.find_first_not_of("0123456789abcdef"), std::string::npos);
  if (std::filesystem::exists("/proc/sys/kernel/random/boot_id")) {
    EXPECT_EQ(id.size(), 32u);
  }
}

}  // namespace
}  // namespace snapstone::os
