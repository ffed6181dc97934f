// Errors that cross the native boundary: what failed, on which object, with which numbers.
//
// OsError is built where errno is fresh; bind/ turns it into Python's OSError(errno, message, filename).
// CorruptError means bytes on disk are not the bytes that were written; bind/ turns it into CorruptCheckpointError.
// UnsupportedError means sound bytes that this build cannot decode; bind/ turns it into IncompatibleCheckpointError.
// CancelledError ends a job that its owner gave up.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>

namespace snapstone {

class OsError : public std::system_error {
 public:
  OsError(int error_number, std::string verb, std::string path, std::uint64_t offset = 0, std::uint64_t nbytes = 0);

  int error_number() const noexcept { return code().value(); }
  const std::string& verb() const noexcept { return verb_; }
  const std::string& path() const noexcept { return path_; }
  std::uint64_t offset() const noexcept { return offset_; }
  std::uint64_t nbytes() const noexcept { return nbytes_; }

 private:
  std::string verb_;
  std::string path_;
  std::uint64_t offset_;
  std::uint64_t nbytes_;
};

class CorruptError : public std::runtime_error {
 public:
  static constexpr std::int64_t kNoChunk = -1;

  // `expected` and `actual` are printable values (digests in hex, sizes in bytes); both may be empty.
  CorruptError(std::string reason, std::string path, std::int64_t chunk = kNoChunk, std::string expected = {},
               std::string actual = {});

  const std::string& reason() const noexcept { return reason_; }  // what() without path, chunk, expected and actual
  const std::string& path() const noexcept { return path_; }
  std::int64_t chunk() const noexcept { return chunk_; }
  const std::string& expected() const noexcept { return expected_; }
  const std::string& actual() const noexcept { return actual_; }

 private:
  std::string reason_;
  std::string path_;
  std::int64_t chunk_;
  std::string expected_;
  std::string actual_;
};

class UnsupportedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class CancelledError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace snapstone
