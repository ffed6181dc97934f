#include "os/ownership.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "base/error.h"
#include "os/call.h"

namespace snapstone::os {
namespace {

constexpr std::uint32_t kFileModeMask = 0777;
constexpr std::uint32_t kDirectoryModeMask = 07777;
constexpr std::uint32_t kGroupBits = 070;
constexpr std::uint32_t kOtherBits = 07;

struct stat facts_of(int fd, const std::string& path) {
  struct stat facts{};
  if (call("fstat", path, [&] { return ::fstat(fd, &facts); }) != 0) {
    throw OsError(errno, "fstat", path);
  }
  return facts;
}

// Refused, as opposed to failed. EINVAL: an identity that this user namespace does not have.
bool is_refusal(int error_number) {
  return error_number == EPERM || error_number == EACCES || error_number == EINVAL || error_number == EOPNOTSUPP ||
         error_number == ENOSYS;
}

}  // namespace

bool give_owner(int fd, const std::string& path, const Entry& model) {
  const struct stat facts = facts_of(fd, path);
  if (facts.st_uid == model.owner_uid && facts.st_gid == model.owner_gid) {
    return true;
  }
  if (call("fchown", path, [&] { return ::fchown(fd, model.owner_uid, model.owner_gid); }) == 0) {
    return true;
  }
  if (!is_refusal(errno)) {
    throw OsError(errno, "fchown", path);
  }
  if (facts.st_uid != model.owner_uid) {
    throw OsError(EPERM,
                  "fchown: user " + std::to_string(model.owner_uid) +
                      " owns the checkpoint, and this process may not give files to them; run it as them, or as root",
                  path);
  }
  return false;
}

void give_owner_and_mode(int fd, const std::string& path, const Entry& model) {
  const bool with_group = give_owner(fd, path, model);
  const struct stat facts = facts_of(fd, path);
  std::uint32_t mode = model.mode & (S_ISDIR(facts.st_mode) ? kDirectoryModeMask : kFileModeMask);
  if (!with_group) {
    mode = (mode & ~kGroupBits) | (mode & kOtherBits) << 3;
  }
  if ((facts.st_mode & kDirectoryModeMask) == mode) {
    return;
  }
  if (call("fchmod", path, [&] { return ::fchmod(fd, mode); }) != 0 && !is_refusal(errno)) {
    throw OsError(errno, "fchmod", path);
  }
}

}  // namespace snapstone::os
