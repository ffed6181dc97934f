// Invariant: copy_range() returns only when the target has every byte, whatever the kernel can and does in between.
#include "os/copy.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <string>
#include <vector>

#include "armed_faults.h"
#include "base/fault_hook.h"
#include "temporary_directory.h"

namespace snapstone::os {
namespace {

using testing::ArmedFaults;
using testing::errno_of;
using testing::TemporaryDirectory;
using Bytes = std::vector<std::uint8_t>;

constexpr std::uint64_t kMiB = 1ull << 20;

class CopyTest : public ::testing::Test {
 protected:
  void SetUp() override {
    bytes_.resize(3 * kMiB + 12345);
    for (std::size_t i = 0; i < bytes_.size(); ++i) bytes_[i] = static_cast<std::uint8_t>(i * 131 + i / 509);
    write_durably(create_file(directory_.fd(), directory_.path(), "source", false), bytes_);
    source_ = open_for_read(directory_.fd(), directory_.path(), "source", false);
    target_ = create_file(directory_.fd(), directory_.path(), "target", false);
  }

  Bytes expected(std::uint64_t from, std::uint64_t nbytes) const {
    return {bytes_.begin() + static_cast<std::ptrdiff_t>(from),
            bytes_.begin() + static_cast<std::ptrdiff_t>(from + nbytes)};
  }
  Bytes target(std::uint64_t offset, std::uint64_t nbytes) const {
    Bytes bytes(nbytes);
    pread_full(target_.fd.get(), target_.path, bytes.data(), nbytes, offset);
    return bytes;
  }

  const TemporaryDirectory directory_;
  Bytes bytes_;
  File source_;
  File target_;
};

TEST_F(CopyTest, copies_a_range_to_where_it_was_asked_for) {
  copy_range(source_, 4096, target_, 8192, 2 * kMiB + 7);
  EXPECT_EQ(target(8192, 2 * kMiB + 7), expected(4096, 2 * kMiB + 7));
  EXPECT_EQ(target(0, 8192), Bytes(8192));
  EXPECT_EQ(file_nbytes(target_), 8192 + 2 * kMiB + 7) << "wrote past the range";
}

TEST_F(CopyTest, an_empty_range_makes_no_call) {
  const ArmedFaults faults("");
  copy_range(source_, 0, target_, 0, 0);
  EXPECT_EQ(fault::seen("*"), 0u);
}

TEST_F(CopyTest, short_copies_and_interruptions_are_continued) {
  const ArmedFaults faults(
      "copy_file_range:1+:short=99999;copy_file_range:2:errno=EINTR;copy_file_range:3:errno=EINTR");
  copy_range(source_, 100, target_, 0, kMiB);
  EXPECT_EQ(fault::seen("copy_file_range"), 11u + 2u);
  EXPECT_EQ(fault::seen("pwrite"), 0u);
  EXPECT_EQ(target(0, kMiB), expected(100, kMiB));
}

TEST_F(CopyTest, where_the_call_cannot_copy_bytes_go_through_memory) {
  for (const char* const error : {"EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM"}) {
    truncate(target_, 0);
    // The first call copies a part, as on a mount that changes its mind: the rest must follow that part.
    const ArmedFaults faults("copy_file_range:1:short=5000;copy_file_range:2+:errno=" + std::string(error));
    copy_range(source_, 3, target_, 0, 2 * kMiB + 1);
    EXPECT_EQ(fault::seen("copy_file_range"), 2u) << error;
    EXPECT_EQ(fault::seen("pwrite"), 2u) << error;
    EXPECT_EQ(target(0, 2 * kMiB + 1), expected(3, 2 * kMiB + 1)) << error;
  }
}

TEST_F(CopyTest, an_answer_of_zero_is_the_end_of_the_file_only_if_pread_says_so) {
  {
    const ArmedFaults faults("copy_file_range:1+:short=0");
    copy_range(source_, 0, target_, 0, kMiB);
  }
  EXPECT_EQ(target(0, kMiB), expected(0, kMiB));
}

TEST_F(CopyTest, a_source_that_ends_early_is_corrupt_and_names_the_source) {
  try {
    copy_range(source_, bytes_.size() - 10, target_, 0, 4096);
    FAIL() << "no error";
  } catch (const CorruptError& error) {
    EXPECT_EQ(error.reason(), "file is shorter than recorded");
    EXPECT_EQ(error.path(), directory_ / "source");
    EXPECT_EQ(error.actual(), std::to_string(bytes_.size()) + " bytes");
  }
}

TEST_F(CopyTest, any_other_failure_is_reported_with_both_files_and_not_tried_again) {
  for (const auto& [name, number] : {std::pair{"ENOSPC", ENOSPC}, {"EIO", EIO}, {"EDQUOT", EDQUOT}}) {
    const ArmedFaults faults("copy_file_range:1:short=4096;copy_file_range:2+:errno=" + std::string(name));
    try {
      copy_range(source_, 0, target_, 512, kMiB);
      FAIL() << "no error";
    } catch (const OsError& error) {
      EXPECT_EQ(error.error_number(), number);
      EXPECT_EQ(error.verb(), "copy_file_range from " + directory_ / "source" + " to");
      EXPECT_EQ(error.path(), directory_ / "target");
      EXPECT_EQ(error.offset(), 512u + 4096u);
      EXPECT_EQ(error.nbytes(), kMiB - 4096);
    }
    EXPECT_EQ(fault::seen("copy_file_range"), 2u);
    EXPECT_EQ(fault::seen("pwrite"), 0u);
  }
}

TEST_F(CopyTest, a_failure_on_the_way_through_memory_is_reported) {
  for (const char* const rules :
       {"copy_file_range:1+:errno=EXDEV;pwrite:2:errno=ENOSPC", "copy_file_range:1+:errno=EXDEV;pread:1:errno=EIO"}) {
    const ArmedFaults faults(rules);
    EXPECT_NE(errno_of([&] { copy_range(source_, 0, target_, 0, 3 * kMiB); }), 0) << rules;
  }
}

}  // namespace
}  // namespace snapstone::os
