#include "base/error.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <string>

namespace snapstone {
namespace {

TEST(OsError, says_verb_object_numbers_and_reason) {
  const OsError error(ENOSPC, "pwrite", "/run/rank-00000.data", 4096, 512);
  EXPECT_EQ(std::string(error.what()), "pwrite /run/rank-00000.data (offset 4096, 512 bytes): No space left on device");
  EXPECT_EQ(error.error_number(), ENOSPC);
  EXPECT_EQ(error.verb(), "pwrite");
  EXPECT_EQ(error.path(), "/run/rank-00000.data");
  EXPECT_EQ(error.offset(), 4096u);
  EXPECT_EQ(error.nbytes(), 512u);
}

TEST(OsError, leaves_out_numbers_that_a_call_does_not_have) {
  EXPECT_EQ(std::string(OsError(EIO, "fsync", "/run/a").what()), "fsync /run/a: Input/output error");
  EXPECT_EQ(std::string(OsError(EPERM, "io_uring_setup", "").what()), "io_uring_setup: Operation not permitted");
}

TEST(CorruptError, names_file_chunk_expected_and_actual) {
  const CorruptError error("digest differs", "rank-00000.data", 7, "aa", "bb");
  EXPECT_EQ(std::string(error.what()), "rank-00000.data: digest differs (chunk 7, expected aa, actual bb)");
  EXPECT_EQ(error.path(), "rank-00000.data");
  EXPECT_EQ(error.chunk(), 7);
  EXPECT_EQ(error.expected(), "aa");
  EXPECT_EQ(error.actual(), "bb");
}

TEST(CorruptError, keeps_the_bare_reason_for_callers_that_know_more) {
  const CorruptError error("bytes after the frame", "");
  EXPECT_EQ(std::string(error.what()), "bytes after the frame");
  EXPECT_EQ(error.reason(), "bytes after the frame");
  EXPECT_EQ(error.chunk(), CorruptError::kNoChunk);
}

}  // namespace
}  // namespace snapstone
