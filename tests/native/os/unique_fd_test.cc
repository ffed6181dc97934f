#include "os/unique_fd.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "armed_faults.h"

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

}  // namespace
}  // namespace snapstone::os
