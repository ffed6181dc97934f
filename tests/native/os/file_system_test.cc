#include "os/file_system.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "armed_faults.h"
#include "base/limits.h"
#include "os/file.h"
#include "temporary_directory.h"

namespace snapstone::os {
namespace {

using testing::ArmedFaults;
using testing::errno_of;
using testing::TemporaryDirectory;

TEST(FileSystemFacts, describe_the_file_system_under_the_directory) {
  const TemporaryDirectory directory;
  const FileSystemFacts facts = file_system_facts(directory.directory());
  struct stat identity{};
  ASSERT_EQ(::stat(directory.path().c_str(), &identity), 0);
  EXPECT_EQ(facts.device, identity.st_dev);
  EXPECT_FALSE(facts.name.empty());
  EXPECT_GT(facts.total_bytes, 0u);
  EXPECT_LE(facts.free_bytes, facts.total_bytes);
}

TEST(FileSystemFacts, tmpfs_is_memory_backed) {
  if (::access("/dev/shm", W_OK) != 0) {
    GTEST_SKIP() << "no /dev/shm";
  }
  const TemporaryDirectory directory("/dev/shm");
  const FileSystemFacts facts = file_system_facts(directory.directory());
  EXPECT_EQ(facts.name, "tmpfs");
  EXPECT_TRUE(facts.memory_backed);
  EXPECT_FALSE(facts.network);
}

TEST(FileSystemFacts, an_unknown_file_system_is_named_by_its_magic_number) {
  const FileSystemFacts facts = file_system_facts(open_directory("/proc"));
  EXPECT_EQ(facts.name, "0x9fa0");
}

TEST(FileSystemFacts, pass_errors_on) {
  const TemporaryDirectory directory;
  for (const char* rule : {"statfs:1:errno=EIO", "fstat:1:errno=EIO"}) {
    const ArmedFaults faults(rule);
    EXPECT_EQ(errno_of([&] { file_system_facts(directory.directory()); }), EIO) << rule;
  }
}

TEST(DirectIoAlignment, is_a_power_of_two_and_falls_back_to_the_block_size) {
  const TemporaryDirectory directory;
  const File file = create_file(directory.fd(), directory.path(), "data", false);
  const std::uint64_t alignment = direct_io_alignment(file.fd.get());
  EXPECT_TRUE(std::has_single_bit(alignment)) << alignment;
  {
    const ArmedFaults faults("fstat:1:errno=ENOSYS");
    EXPECT_GE(direct_io_alignment(file.fd.get()), kPageBytes);
  }
  const ArmedFaults faults("fstat:1+:errno=EIO");
  EXPECT_EQ(errno_of([&] { direct_io_alignment(file.fd.get()); }), EIO);
}

void expect_probe_works_and_leaves_nothing(const TemporaryDirectory& directory, bool direct) {
  ProbeFile probe = open_probe_file(directory.directory(), direct);
  EXPECT_EQ(probe.direct, (::fcntl(probe.fd.get(), F_GETFL) & O_DIRECT) != 0);
  drop_direct(probe.fd.get());
  pwrite_full(probe.fd.get(), probe.path, "hello", 5, 0);
  char text[5];
  pread_full(probe.fd.get(), probe.path, text, 5, 0);
  EXPECT_EQ(std::string(text, 5), "hello");
  EXPECT_TRUE(list_directory(directory.directory()).empty());
}

TEST(ProbeFile, can_be_written_and_leaves_nothing_behind) {
  const TemporaryDirectory directory;
  expect_probe_works_and_leaves_nothing(directory, false);
  expect_probe_works_and_leaves_nothing(directory, true);
}

TEST(ProbeFile, works_where_unnamed_files_are_refused) {
  const TemporaryDirectory directory;
  for (const char* rule : {"open:1:errno=EOPNOTSUPP", "open:1:errno=EISDIR", "open:1:errno=EINVAL"}) {
    const ArmedFaults faults(rule);
    expect_probe_works_and_leaves_nothing(directory, true);
  }
  const ArmedFaults faults("open:1:errno=EROFS");
  EXPECT_EQ(errno_of([&] { open_probe_file(directory.directory(), true); }), EROFS);
}

TEST(SharedBytes, hard_links_are_really_tried) {
  const TemporaryDirectory directory;
  const ArmedFaults faults("");
  try_hard_link(directory.directory());
  EXPECT_EQ(fault::seen("link"), 1u);
  EXPECT_TRUE(list_directory(directory.directory()).empty());
}

// As where the driver of a file system copies: the second name is of another file.
TEST(SharedBytes, a_hard_link_that_is_a_copy_is_none) {
  const TemporaryDirectory directory;
  const ArmedFaults faults("stat:1:delay=200");
  std::thread copier([&] {
    while (fault::seen("stat") == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const auto linked = std::filesystem::directory_iterator(directory.path())->path();
    std::filesystem::remove(linked);
    std::ofstream(linked) << "";
  });
  try {
    try_hard_link(directory.directory());
    ADD_FAILURE() << "took it for a link";
  } catch (const OsError& error) {
    EXPECT_EQ(error.error_number(), EOPNOTSUPP);
    EXPECT_EQ(error.verb(), "link: made another file");
  }
  copier.join();
  EXPECT_TRUE(list_directory(directory.directory()).empty());
}

TEST(SharedBytes, any_failing_call_is_an_error_and_leaves_nothing) {
  const TemporaryDirectory directory;
  for (const char* const rule : {"open:1:errno=EROFS", "open:2:errno=EMFILE", "pwrite:1:errno=ENOSPC",
                                 "ioctl:1:errno=EOPNOTSUPP", "link:1:errno=EPERM", "stat:1:errno=EIO"}) {
    const ArmedFaults faults(rule);
    const bool links = errno_of([&] { try_hard_link(directory.directory()); }) == 0;
    const bool reflinks = errno_of([&] { try_reflink(directory.directory()); }) == 0;
    EXPECT_FALSE(links && reflinks) << rule;
    EXPECT_TRUE(list_directory(directory.directory()).empty()) << rule;
  }
}

TEST(SharedBytes, blocks_are_shared_where_the_file_system_says_so) {
  const TemporaryDirectory directory;
  const int error_number = errno_of([&] { try_reflink(directory.directory()); });
  const FileSystemFacts facts = file_system_facts(directory.directory());
  if (facts.name == "tmpfs" || facts.name == "ext4") {
    EXPECT_EQ(error_number, EOPNOTSUPP) << facts.name;
  }
  if (facts.name == "btrfs") {
    EXPECT_EQ(error_number, 0);
  }
  EXPECT_TRUE(list_directory(directory.directory()).empty());
}

}  // namespace
}  // namespace snapstone::os
