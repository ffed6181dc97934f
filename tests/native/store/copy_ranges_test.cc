// Invariants: Staging::copy_ranges() makes a file of exactly the ranges' bytes, durable, or none; it never touches its
// sources.
#include <gtest/gtest.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "armed_faults.h"
#include "base/fault_hook.h"
#include "os/file.h"
#include "store/staging.h"
#include "temporary_directory.h"

namespace snapstone::store {
namespace {

using testing::ArmedFaults;
using testing::errno_of;
using testing::TemporaryDirectory;

constexpr std::uint64_t kPage = 4096;
const std::string kSaveId(32, 'a');
const std::string kName = "rank-00000.carried.data";

class CopyRangesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const char letter : {'a', 'b'}) {
      std::string text;
      for (int page = 0; page < 8; ++page) text += std::string(kPage, static_cast<char>(letter + 2 * page));
      texts_.push_back(text);
      const std::string name = std::string("source-") + letter;
      os::write_durably(os::create_file(run_.fd(), run_.path(), name, false),
                        {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
      sources_.push_back(os::open_for_read(run_.fd(), run_.path(), name, false));
    }
  }

  std::string read(const std::string& path) const {
    std::ifstream stream(path);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  std::string expected(const std::vector<SourceRange>& ranges) const {
    std::string text;
    for (const auto& [source, offset, nbytes] : ranges) text += texts_[source].substr(offset, nbytes);
    return text;
  }

  const TemporaryDirectory run_;
  Staging staging_ = Staging::create(run_.path(), kSaveId, {"boot"});
  std::vector<std::string> texts_;
  std::vector<os::File> sources_;
};

TEST_F(CopyRangesTest, the_file_has_the_ranges_in_their_order_and_is_synced) {
  const std::vector<SourceRange> ranges = {
      {1, 2 * kPage, kPage}, {0, 0, 3 * kPage}, {0, 5 * kPage, kPage}, {1, 0, kPage}, {1, 0, kPage}};
  const ArmedFaults faults("");
  EXPECT_EQ(staging_.copy_ranges(kName, sources_, ranges), 7 * kPage);
  EXPECT_EQ(read(staging_.path() + "/" + kName), expected(ranges));
  EXPECT_EQ(fault::seen("fsync"), 1u);
  EXPECT_EQ(fault::seen("close"), 1u);
  EXPECT_EQ(fault::seen("fallocate"), 1u);
  EXPECT_EQ(std::filesystem::status(staging_.path() + "/" + kName).permissions(), std::filesystem::perms{0600});
  for (std::size_t source = 0; source < texts_.size(); ++source) {
    EXPECT_EQ(read(sources_[source].path), texts_[source]) << "a source changed";
  }
}

TEST_F(CopyRangesTest, zeros_at_the_end_are_there_where_no_room_can_be_made) {
  const ArmedFaults faults("fallocate:1:errno=EOPNOTSUPP");
  EXPECT_EQ(staging_.copy_ranges(kName, sources_, std::vector<SourceRange>{{0, 0, kPage}, {2, 0, 2 * kPage}}),
            3 * kPage);
  EXPECT_EQ(read(staging_.path() + "/" + kName), texts_[0].substr(0, kPage) + std::string(2 * kPage, '\0'));
}

TEST_F(CopyRangesTest, neighbouring_ranges_take_one_call) {
  const std::vector<SourceRange> ranges = {
      {0, 0, kPage}, {0, kPage, 2 * kPage}, {0, 3 * kPage, kPage}, {1, 4 * kPage, kPage}, {1, 6 * kPage, kPage}};
  const ArmedFaults faults("");
  staging_.copy_ranges(kName, sources_, ranges);
  EXPECT_EQ(fault::seen("copy_file_range"), 3u);
  EXPECT_EQ(read(staging_.path() + "/" + kName), expected(ranges));
}

TEST_F(CopyRangesTest, no_ranges_make_an_empty_file) {
  EXPECT_EQ(staging_.copy_ranges(kName, sources_, {}), 0u);
  EXPECT_EQ(std::filesystem::file_size(staging_.path() + "/" + kName), 0u);
}

TEST_F(CopyRangesTest, a_file_that_is_there_is_never_touched) {
  const std::vector<SourceRange> ranges = {{0, 0, kPage}};
  staging_.copy_ranges(kName, sources_, ranges);
  EXPECT_EQ(errno_of([&] { staging_.copy_ranges(kName, sources_, {}); }), EEXIST);
  EXPECT_EQ(read(staging_.path() + "/" + kName), expected(ranges));
}

TEST_F(CopyRangesTest, a_source_that_ends_early_is_corrupt) {
  const std::vector<SourceRange> ranges = {{0, 7 * kPage, 2 * kPage}};
  EXPECT_THROW(staging_.copy_ranges(kName, sources_, ranges), CorruptError);
  EXPECT_FALSE(std::filesystem::exists(staging_.path() + "/" + kName));
}

TEST_F(CopyRangesTest, progress_counts_to_the_end_and_can_stop_the_copy) {
  const std::vector<SourceRange> ranges = {{0, 0, kPage}, {0, 2 * kPage, kPage}, {1, 0, 2 * kPage}};
  std::vector<std::uint64_t> seen;
  staging_.copy_ranges(kName, sources_, ranges, [&](std::uint64_t done) { seen.push_back(done); });
  EXPECT_EQ(seen, (std::vector<std::uint64_t>{kPage, 2 * kPage, 4 * kPage}));
  const auto stop = [](std::uint64_t) { throw std::runtime_error("enough"); };
  EXPECT_THROW(staging_.copy_ranges("rank-00001.data", sources_, ranges, stop), std::runtime_error);
  EXPECT_FALSE(std::filesystem::exists(staging_.path() + "/rank-00001.data"));
}

// A failing call at every place in turn: an error, and no file; or no error, and the file.
TEST_F(CopyRangesTest, any_failing_call_leaves_no_file_and_no_success) {
  const std::vector<SourceRange> ranges = {{0, 0, kPage}, {1, 2 * kPage, 3 * kPage}};
  const std::string path = staging_.path() + "/" + kName;
  for (const char* const error : {"ENOSPC", "EIO"}) {
    std::uint64_t failures = 0;
    for (std::uint64_t nth = 1;; ++nth) {
      std::filesystem::remove(path);
      const ArmedFaults faults("*:" + std::to_string(nth) + ":errno=" + error);
      const bool failed = errno_of([&] { staging_.copy_ranges(kName, sources_, ranges); }) != 0;
      if (fault::seen("*") < nth) {
        EXPECT_FALSE(failed);
        EXPECT_EQ(read(path), expected(ranges));
        break;
      }
      EXPECT_TRUE(failed) << "call " << nth;
      EXPECT_FALSE(std::filesystem::exists(path)) << "call " << nth;
      ++failures;
    }
    EXPECT_EQ(failures, 6u) << "open, fallocate, copy_file_range twice, fsync, close";
  }
}

}  // namespace
}  // namespace snapstone::store
