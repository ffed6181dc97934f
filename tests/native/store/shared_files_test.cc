// Invariant: a link is the very file that the checkpoint whose manifest was read has, or there is an error.
#include "store/shared_files.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "armed_faults.h"
#include "base/error.h"
#include "os/directory.h"
#include "store/names.h"
#include "temporary_directory.h"

namespace snapstone::store {
namespace {

using testing::errno_of;
using testing::TemporaryDirectory;

constexpr const char* kName = "rank-00000.data";

class SharedFilesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::create_directory(run_ / "c");
    std::filesystem::create_directory(run_ / "target");
    write("c/" + std::string(kManifestDigestName), "digest");
    write("c/" + std::string(kName), "bytes");
  }
  void write(const std::string& name, const std::string& bytes) const { std::ofstream(run_ / name) << bytes; }
  void link(std::uint64_t nbytes = 5, const std::string& digest = "digest") const {
    const std::vector<std::uint8_t> line(digest.begin(), digest.end());
    const std::vector<SharedFile> files{{.in_base = false, .source = kName, .name = "linked", .nbytes = nbytes}};
    link_shared_files(run_ / "c", line, files, os::open_directory(run_ / "target"));
  }

  const TemporaryDirectory run_;
};

TEST_F(SharedFilesTest, the_link_is_the_file_and_may_have_been_made_before) {
  link();
  link();
  EXPECT_TRUE(std::filesystem::equivalent(run_ / "target/linked", run_ / ("c/" + std::string(kName))));
}

TEST_F(SharedFilesTest, another_checkpoint_is_not_linked_from) {
  EXPECT_EQ(errno_of([&] { link(5, "other"); }), ESTALE);
  EXPECT_EQ(errno_of([&] { link(5, "digest and more"); }), ESTALE);
}

TEST_F(SharedFilesTest, what_is_missing_or_no_file_is_said) {
  std::filesystem::remove(run_ / ("c/" + std::string(kName)));
  EXPECT_EQ(errno_of([&] { link(); }), ENOENT);
  std::filesystem::create_symlink("other", run_ / ("c/" + std::string(kName)));  // five bytes long, as a link
  write("c/other", "bytes");
  EXPECT_EQ(errno_of([&] { link(); }), EINVAL);
  EXPECT_FALSE(std::filesystem::exists(run_ / "target/linked"));
}

TEST_F(SharedFilesTest, another_size_is_corruption) { EXPECT_THROW(link(6), CorruptError); }

TEST_F(SharedFilesTest, a_name_that_another_file_has_is_no_link) {
  write("target/linked", "bytes");
  EXPECT_EQ(errno_of([&] { link(); }), ESTALE);
}

TEST_F(SharedFilesTest, what_should_be_kept_must_be_there) {
  link();
  const os::Directory target = os::open_directory(run_ / "target");
  std::vector<SharedFile> files{{.in_base = true, .source = "", .name = "linked", .nbytes = 5}};
  EXPECT_FALSE(keep_shared_files(target, files));
  write("target/more", "");
  EXPECT_TRUE(keep_shared_files(target, files));
  EXPECT_FALSE(std::filesystem::exists(run_ / "target/more"));
  files[0].name = "gone";
  EXPECT_EQ(errno_of([&] { keep_shared_files(target, files); }), ENOENT);
}

}  // namespace
}  // namespace snapstone::store
