#include "os/journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <vector>

#include "base/error.h"
#include "os/unique_fd.h"

namespace snapstone::os::journal {

constinit std::atomic<bool> on{false};

namespace {

constexpr mode_t kFileMode = 0600;

// Locked by the thread for its process, and the file for all of them.
std::recursive_mutex mutex;
UniqueFd file;
pid_t owner = 0;
int depth = 0;

std::uint64_t inode_of(int fd) {
  struct stat facts{};
  return fd >= 0 && ::fstat(fd, &facts) == 0 ? facts.st_ino : 0;
}

// What O_PATH opens need not be readable.
std::uint64_t inode_at(int directory_fd, std::string_view name) {
  struct stat facts{};
  const std::string text(name);
  return ::fstatat(directory_fd, text.c_str(), &facts, AT_SYMLINK_NOFOLLOW) == 0 ? facts.st_ino : 0;
}

// One write, so that a process that dies leaves whole records.
void put(const RecordHead& head, const Change::Facts& facts) {
  std::vector<std::uint8_t> record(sizeof head + facts.name.size() + facts.other.size() + facts.bytes.size());
  std::uint8_t* at = record.data();
  const auto add = [&at](const void* source, std::size_t nbytes) {
    if (nbytes != 0) std::memcpy(at, source, nbytes);
    at += nbytes;
  };
  add(&head, sizeof head);
  add(facts.name.data(), facts.name.size());
  add(facts.other.data(), facts.other.size());
  add(facts.bytes.data(), facts.bytes.size());
  if (::write(file.get(), record.data(), record.size()) != static_cast<ssize_t>(record.size())) {
    // A journal with a hole would prove nothing.
    on.store(false);
    const int cut = ::ftruncate(file.get(), 0);
    static_cast<void>(cut);
  }
}

}  // namespace

void start(const std::string& path) {
  const std::lock_guard lock(mutex);
  file = UniqueFd(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, kFileMode));
  if (!file) {
    throw OsError(errno, "open", path);
  }
  owner = ::getpid();
  on.store(true);
}

void stop() {
  const std::lock_guard lock(mutex);
  on.store(false);
  file = UniqueFd();
}

void mark(const std::string& text) {
  const Change change(Op::kMark);
  change.done({.name = text});
}

void Change::hold() {
  mutex.lock();
  if (!file || owner != ::getpid()) {
    mutex.unlock();
    held_ = false;
    return;
  }
  if (depth++ == 0) {
    while (::flock(file.get(), LOCK_EX) != 0 && errno == EINTR) {
    }
  }
}

void Change::release() noexcept {
  const int kept = errno;
  if (--depth == 0 && file) {
    ::flock(file.get(), LOCK_UN);
  }
  mutex.unlock();
  errno = kept;
}

void Change::append(const Facts& facts) const {
  const int kept = errno;
  RecordHead head{};
  head.op = static_cast<std::uint32_t>(op_);
  head.process = static_cast<std::uint32_t>(::getpid());
  head.subject = inode_of(facts.subject_fd);
  head.object = op_ == Op::kMkdir || op_ == Op::kLink
                    ? inode_at(facts.subject_fd, op_ == Op::kLink ? facts.other : facts.name)
                    : inode_of(facts.object_fd);
  head.offset = facts.offset;
  head.nbytes = facts.bytes.size();
  head.error_number = static_cast<std::uint32_t>(facts.error_number);
  head.name_nbytes = static_cast<std::uint16_t>(facts.name.size());
  head.other_nbytes = static_cast<std::uint16_t>(facts.other.size());
  put(head, facts);
  errno = kept;
}

}  // namespace snapstone::os::journal
