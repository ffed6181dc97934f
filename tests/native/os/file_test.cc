#include "os/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "armed_faults.h"
#include "base/limits.h"
#include "temporary_directory.h"

namespace snapstone::os {
namespace {

using testing::ArmedFaults;
using testing::errno_of;
using testing::TemporaryDirectory;
using Bytes = std::vector<std::uint8_t>;

Bytes pattern(std::size_t nbytes) {
  Bytes bytes(nbytes);
  for (std::size_t i = 0; i < nbytes; ++i) {
    bytes[i] = static_cast<std::uint8_t>(i * 131 + i / 509);
  }
  return bytes;
}

std::size_t open_descriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

class FileTest : public ::testing::Test {
 protected:
  File create(const std::string& name, bool direct = false) {
    return create_file(directory_.fd(), directory_.path(), name, direct);
  }
  File open(const std::string& name, bool direct = false) {
    return open_for_read(directory_.fd(), directory_.path(), name, direct);
  }
  void write(const std::string& name, const Bytes& bytes) {
    write_durably(create_file(directory_.fd(), directory_.path(), name, false), bytes);
  }
  Bytes read(const std::string& name, std::uint64_t limit = 1 << 20) {
    return read_file(directory_.fd(), directory_.path(), name, limit);
  }

  TemporaryDirectory directory_;
};

TEST_F(FileTest, create_makes_a_private_file_and_never_opens_an_existing_one) {
  const File file = create("data");
  struct stat facts{};
  ASSERT_EQ(::stat((directory_ / "data").c_str(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0777, 0600u);
  EXPECT_NE(::fcntl(file.fd.get(), F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_EQ(errno_of([&] { create("data"); }), EEXIST);
}

TEST_F(FileTest, create_and_open_never_follow_a_link) {
  ASSERT_EQ(::symlink("/etc/hostname", (directory_ / "planted").c_str()), 0);
  ASSERT_EQ(::symlink((directory_ / "outside").c_str(), (directory_ / "dangling").c_str()), 0);
  EXPECT_EQ(errno_of([&] { open("planted"); }), ELOOP);
  EXPECT_EQ(errno_of([&] { create("dangling"); }), EEXIST);
  EXPECT_FALSE(std::filesystem::exists(directory_ / "outside"));
}

TEST_F(FileTest, names_are_one_component) {
  std::filesystem::create_directory(directory_ / "sub");
  for (const std::string& name : {std::string(""), std::string("."), std::string(".."), std::string("sub/x"),
                                  std::string("../x"), std::string("/x"), std::string("a\0b", 3)}) {
    EXPECT_EQ(errno_of([&] { create(name); }), EINVAL) << name;
    EXPECT_EQ(errno_of([&] { open(name); }), EINVAL) << name;
  }
}

TEST_F(FileTest, a_fifo_or_directory_is_refused_without_blocking) {
  ASSERT_EQ(::mkfifo((directory_ / "fifo").c_str(), 0600), 0);
  std::filesystem::create_directory(directory_ / "sub");
  EXPECT_EQ(errno_of([&] { open("fifo"); }), EINVAL);
  EXPECT_EQ(errno_of([&] { open("sub"); }), EINVAL);
  EXPECT_EQ(errno_of([&] { read("fifo"); }), EINVAL);
}

TEST_F(FileTest, an_opened_file_waits_for_its_bytes) {
  write("data", pattern(10));
  const File file = open("data");
  EXPECT_EQ(::fcntl(file.fd.get(), F_GETFL) & O_NONBLOCK, 0);
  EXPECT_EQ(errno_of([&] { open("absent"); }), ENOENT);
}

TEST_F(FileTest, direct_files_have_o_direct_and_lose_it_by_drop_direct) {
  File file = create("data", true);
  if (!file.direct) {
    if (std::getenv("FAIL_WITHOUT_O_DIRECT") != nullptr) {
      FAIL() << "no O_DIRECT in " << directory_.path();
    }
    GTEST_SKIP() << "no O_DIRECT in " << directory_.path();
  }
  EXPECT_NE(::fcntl(file.fd.get(), F_GETFL) & O_DIRECT, 0);
  drop_direct(file.fd.get());
  EXPECT_EQ(::fcntl(file.fd.get(), F_GETFL) & O_DIRECT, 0);
  const Bytes bytes = pattern(123);
  pwrite_full(file.fd.get(), file.path, bytes.data(), bytes.size(), 7);  // unaligned: only possible without O_DIRECT
  const File reader = open("data", true);
  EXPECT_TRUE(reader.direct);
  EXPECT_NE(::fcntl(reader.fd.get(), F_GETFL) & O_DIRECT, 0);
}

TEST_F(FileTest, a_file_system_without_o_direct_gets_a_buffered_file) {
  const ArmedFaults faults("fcntl:2:errno=EINVAL");  // F_SETFL with O_DIRECT
  const File file = create("data", true);
  EXPECT_FALSE(file.direct);
  EXPECT_EQ(::fcntl(file.fd.get(), F_GETFL) & O_DIRECT, 0);
  const Bytes bytes = pattern(5);
  pwrite_full(file.fd.get(), file.path, bytes.data(), bytes.size(), 0);
  EXPECT_EQ(read("data"), bytes);
}

TEST_F(FileTest, transfers_continue_after_short_counts_and_interruptions) {
  const Bytes bytes = pattern(10000);
  const File file = create("data");
  {
    const ArmedFaults faults("pwrite:1+:short=999;pwrite:3:errno=EINTR");
    pwrite_full(file.fd.get(), file.path, bytes.data(), bytes.size(), 17);
    EXPECT_EQ(fault::seen("pwrite"), 12u);  // ceil(10000 / 999) transfers and one interruption
  }
  Bytes target(bytes.size());
  const ArmedFaults faults("pread:1+:short=1001;pread:2:errno=EINTR;pread:3:errno=EINTR");
  pread_full(file.fd.get(), file.path, target.data(), target.size(), 17);
  EXPECT_EQ(fault::seen("pread"), 12u);
  EXPECT_EQ(target, bytes);
}

TEST_F(FileTest, a_write_that_makes_no_progress_is_enospc) {
  const File file = create("data");
  const ArmedFaults faults("pwrite:2+:short=0;pwrite:1:short=100");
  const Bytes bytes = pattern(300);
  try {
    pwrite_full(file.fd.get(), file.path, bytes.data(), bytes.size(), 1000);
    FAIL() << "no error";
  } catch (const OsError& error) {
    EXPECT_EQ(error.error_number(), ENOSPC);
    EXPECT_EQ(error.verb(), "pwrite");
    EXPECT_EQ(error.path(), directory_ / "data");
    EXPECT_EQ(error.offset(), 1100u);
    EXPECT_EQ(error.nbytes(), 200u);
  }
}

TEST_F(FileTest, a_full_device_is_reported_by_the_real_call) {
  const UniqueFd full(::open("/dev/full", O_WRONLY | O_CLOEXEC));
  if (!full) {
    GTEST_SKIP() << "no /dev/full";
  }
  EXPECT_EQ(errno_of([&] { pwrite_full(full.get(), "/dev/full", "x", 1, 0); }), ENOSPC);
}

TEST_F(FileTest, reading_past_the_end_names_the_missing_bytes) {
  write("data", pattern(100));
  const File file = open("data");
  Bytes target(64);
  try {
    pread_full(file.fd.get(), file.path, target.data(), target.size(), 50);
    FAIL() << "no error";
  } catch (const CorruptError& error) {
    EXPECT_EQ(error.path(), directory_ / "data");
    EXPECT_EQ(error.expected(), "at least 114 bytes");
    EXPECT_EQ(error.actual(), "100 bytes");
  }
}

TEST_F(FileTest, preallocate_reserves_or_says_that_there_is_none) {
  const File file = create("data");
  EXPECT_TRUE(preallocate(file, 0));
  {
    const ArmedFaults faults("fallocate:1:errno=EOPNOTSUPP;fallocate:2:errno=ENOSYS;fallocate:3:errno=EINVAL");
    EXPECT_FALSE(preallocate(file, 8192));
    EXPECT_FALSE(preallocate(file, 8192));
    EXPECT_FALSE(preallocate(file, 8192));
    EXPECT_EQ(file_nbytes(file), 0u);
  }
  {
    const ArmedFaults faults("fallocate:1:errno=ENOSPC;fallocate:2:errno=EINTR");
    EXPECT_EQ(errno_of([&] { preallocate(file, 8192); }), ENOSPC);
    if (preallocate(file, 8192)) {
      EXPECT_EQ(file_nbytes(file), 8192u);
    }
    EXPECT_EQ(fault::seen("fallocate"), 3u);
  }
  EXPECT_EQ(errno_of([&] { preallocate(file, std::uint64_t{1} << 62); }), EFBIG);
}

TEST_F(FileTest, truncate_sets_the_size) {
  const File file = create("data");
  truncate(file, 5000);
  EXPECT_EQ(file_nbytes(file), 5000u);
  const ArmedFaults faults("ftruncate:1:errno=EIO;fstat:1:errno=EIO");
  EXPECT_EQ(errno_of([&] { truncate(file, 1); }), EIO);
  EXPECT_EQ(errno_of([&] { file_nbytes(file); }), EIO);
  EXPECT_EQ(file_nbytes(file), 5000u);
}

TEST_F(FileTest, a_failed_sync_is_reported_and_not_repeated) {
  const File file = create("data");
  const ArmedFaults faults("fsync:1:errno=EIO");
  EXPECT_EQ(errno_of([&] { sync(file); }), EIO);
  EXPECT_EQ(fault::seen("fsync"), 1u);
}

TEST_F(FileTest, write_durably_syncs_and_checks_close) {
  const Bytes bytes = pattern(5000);
  {
    const ArmedFaults faults("");
    write("data", bytes);
    EXPECT_EQ(fault::seen("fsync"), 1u);
    EXPECT_EQ(fault::seen("close"), 1u);
  }
  EXPECT_EQ(read("data"), bytes);
  EXPECT_EQ(errno_of([&] { write("data", bytes); }), EEXIST);
  const ArmedFaults faults("close:1:errno=EIO");
  EXPECT_EQ(errno_of([&] { write("other", bytes); }), EIO);
}

TEST_F(FileTest, every_failing_call_is_an_error_and_leaks_no_descriptor) {
  const std::size_t before = open_descriptors();
  const Bytes bytes = pattern(3000);
  std::uint64_t failures = 0;
  for (std::uint64_t nth = 1;; ++nth) {
    const std::string name = "data-" + std::to_string(nth);
    const ArmedFaults faults("*:" + std::to_string(nth) + ":errno=EIO");
    const int error_number = errno_of([&] {
      write(name, bytes);
      read(name);
    });
    ASSERT_EQ(open_descriptors(), before) << "call " << nth;
    if (fault::seen("*") < nth) {
      EXPECT_EQ(error_number, 0);
      break;
    }
    EXPECT_EQ(error_number, EIO) << "call " << nth;
    ++failures;
  }
  EXPECT_EQ(failures, 9u);  // open, pwrite, fsync, close; open, fstat, fcntl, fstat, pread
}

TEST_F(FileTest, read_file_bounds_what_it_allocates) {
  const File file = create("sparse");
  truncate(file, std::uint64_t{1} << 40);
  EXPECT_THROW(read("sparse", 1 << 20), CorruptError);
  write("exact", pattern(100));
  EXPECT_EQ(read("exact", 100).size(), 100u);
  EXPECT_THROW(read("exact", 99), CorruptError);
  write("empty", {});
  EXPECT_TRUE(read("empty", 0).empty());
}

}  // namespace
}  // namespace snapstone::os
