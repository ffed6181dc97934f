// UniqueFd: owns a file descriptor. The destructor closes and ignores errors; close() reports them, and code that wrote
// data calls it.
#pragma once

#include <string>
#include <utility>

namespace snapstone::os {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) noexcept : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd();

  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }

  // Gives the descriptor up without closing it.
  int release() noexcept;
  // In a child that is forked from now on it is one of /dev/null; see private_fds.h.
  void keep_from_children() const noexcept;

  // Network file systems report lost writes here. Throws OsError("close", path); the descriptor is gone either way.
  void close(const std::string& path);

 private:
  int fd_ = -1;
};

}  // namespace snapstone::os
