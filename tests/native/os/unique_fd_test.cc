#include "os/unique_fd.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <utility>

#include "armed_faults.h"
#include "temporary_directory.h"

namespace snapstone::os {
namespace {

using testing::ArmedFaults;
using testing::errno_of;

int open_null() { return ::open("/dev/null", O_RDONLY | O_CLOEXEC); }
bool is_open(int fd) { return ::fcntl(fd, F_GETFD) >= 0; }

TEST(UniqueFd, closes_when_it_goes_out_of_scope) {
  const int fd = open_null();
  {
    const UniqueFd owner(fd);
  }
  EXPECT_FALSE(is_open(fd));
}

TEST(UniqueFd, moving_leaves_one_owner_and_closes_what_was_held) {
  const int first = open_null();
  const int second = open_null();
  UniqueFd a(first);
  UniqueFd b(second);
  b = std::move(a);
  EXPECT_FALSE(is_open(second));
  EXPECT_EQ(b.get(), first);
  const UniqueFd c(std::move(b));
  EXPECT_TRUE(is_open(first));
  EXPECT_FALSE(static_cast<bool>(b));  // NOLINT(bugprone-use-after-move): the promise under test
}

TEST(UniqueFd, release_gives_up_without_closing) {
  UniqueFd owner(open_null());
  const int fd = owner.release();
  EXPECT_FALSE(static_cast<bool>(owner));
  ASSERT_TRUE(is_open(fd));
  ::close(fd);
}

TEST(UniqueFd, close_reports_errors_and_the_descriptor_is_gone_either_way) {
  const ArmedFaults faults("close:1:errno=EDQUOT");
  const int fd = open_null();
  UniqueFd owner(fd);
  EXPECT_EQ(errno_of([&] { owner.close("/run/data"); }), EDQUOT);
  EXPECT_FALSE(is_open(fd));
  EXPECT_FALSE(static_cast<bool>(owner));
}

TEST(UniqueFd, close_reports_what_the_kernel_reports) {
  const int fd = open_null();
  UniqueFd owner(fd);
  ::close(fd);
  EXPECT_EQ(errno_of([&] { owner.close("/run/data"); }), EBADF);
}

TEST(UniqueFd, an_interrupted_close_is_neither_repeated_nor_an_error) {
  const ArmedFaults faults("close:1+:errno=EINTR");
  const int fd = open_null();
  UniqueFd owner(fd);
  EXPECT_EQ(errno_of([&] { owner.close("/run/data"); }), 0);
  EXPECT_EQ(fault::seen("close"), 1u);
  EXPECT_FALSE(is_open(fd));
}

// What the child's copy of `fd` is open on, as "device:inode".
std::pair<dev_t, ino_t> seen_by_a_child(int fd) {
  int ends[2];
  EXPECT_EQ(::pipe(ends), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    struct stat facts{};
    std::pair<dev_t, ino_t> seen{0, 0};
    if (::fstat(fd, &facts) == 0) seen = {facts.st_dev, facts.st_ino};
    ::_exit(::write(ends[1], &seen, sizeof seen) == sizeof seen ? 0 : 1);
  }
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  std::pair<dev_t, ino_t> seen{0, 0};
  EXPECT_EQ(::read(ends[0], &seen, sizeof seen), static_cast<ssize_t>(sizeof seen));
  ::close(ends[0]);
  ::close(ends[1]);
  return seen;
}

std::pair<dev_t, ino_t> file_behind(int fd) {
  struct stat facts{};
  EXPECT_EQ(::fstat(fd, &facts), 0);
  return {facts.st_dev, facts.st_ino};
}

TEST(UniqueFd, what_is_kept_from_children_is_nothing_there_and_unharmed_here) {
  const testing::TemporaryDirectory directory;
  const std::string path = directory / "file";
  UniqueFd owner(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  const UniqueFd null(open_null());
  const auto file = file_behind(owner.get());
  EXPECT_EQ(seen_by_a_child(owner.get()), file);
  owner.keep_from_children();
  EXPECT_EQ(seen_by_a_child(owner.get()), file_behind(null.get()));
  EXPECT_EQ(file_behind(owner.get()), file);
  UniqueFd moved(std::move(owner));
  EXPECT_EQ(seen_by_a_child(moved.get()), file_behind(null.get()));
}

TEST(UniqueFd, a_number_that_is_used_again_is_no_longer_kept_from_children) {
  const testing::TemporaryDirectory directory;
  const std::string path = directory / "file";
  const auto open_file = [&] { return ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600); };
  UniqueFd first(open_file());
  const int number = first.get();
  first.keep_from_children();
  first.close(path);
  UniqueFd second(open_file());
  ASSERT_EQ(second.get(), number);
  EXPECT_EQ(seen_by_a_child(number), file_behind(number));
  second.keep_from_children();
  ::close(second.release());
  const UniqueFd third(open_file());
  ASSERT_EQ(third.get(), number);
  EXPECT_EQ(seen_by_a_child(number), file_behind(number));
}

}  // namespace
}  // namespace snapstone::os
