#include "os/unique_fd.h"

#include <unistd.h>

#include <cerrno>

#include "base/error.h"
#include "base/fault_hook.h"
#include "os/private_fds.h"

namespace snapstone::os {
namespace {

int close_descriptor(int fd) noexcept {
  forget_private(fd);
  return ::close(fd);
}

}  // namespace

void UniqueFd::keep_from_children() const noexcept { os::keep_from_children(fd_); }

int UniqueFd::release() noexcept {
  forget_private(fd_);
  return std::exchange(fd_, -1);
}

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) {
      close_descriptor(fd_);
    }
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

UniqueFd::~UniqueFd() {
  if (fd_ >= 0) {
    close_descriptor(fd_);
  }
}

void UniqueFd::close(const std::string& path) {
  const fault::Outcome outcome = fault::point("close", path.c_str());
  const int fd = std::exchange(fd_, -1);
  if (fd < 0) {
    return;
  }
  int error_number = close_descriptor(fd) == 0 ? 0 : errno;
  if (outcome.error_number != 0) {
    error_number = outcome.error_number;
  }
  // Linux frees the descriptor before it can be interrupted: a second close could hit somebody else's file. EINTR says
  // nothing about lost writes; fsync has reported those.
  if (error_number != 0 && error_number != EINTR) {
    throw OsError(error_number, "close", path);
  }
}

}  // namespace snapstone::os
