#include "os/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/error.h"
#include "os/call.h"
#include "os/journal.h"

namespace snapstone::os {
namespace {

constexpr mode_t kFileMode = 0600;
// Linux transfers at most this much in one call, whatever the count (rw(2)).
constexpr std::uint64_t kTransferBytesMax = 0x7ffff000;

File open_file(int directory_fd, const std::string& directory_path, const std::string& name, int flags) {
  File file;
  file.path = component_path("open", directory_path, name);
  file.fd = UniqueFd(call("open", file.path, [&] {
    return ::openat(directory_fd, name.c_str(), flags | O_NOFOLLOW | O_CLOEXEC, kFileMode);
  }));
  if (!file.fd) {
    throw OsError(errno, "open", file.path);
  }
  return file;
}

struct stat stat_file(const File& file) {
  struct stat facts{};
  if (call("fstat", file.path, [&] { return ::fstat(file.fd.get(), &facts); }) != 0) {
    throw OsError(errno, "fstat", file.path);
  }
  return facts;
}

ssize_t write_some(int fd, const std::uint8_t* data, std::uint64_t nbytes, std::uint64_t offset) {
  const journal::Change change(journal::Op::kWrite);
  const ssize_t written = ::pwrite(fd, data, nbytes, static_cast<off_t>(offset));
  if (written > 0) {
    change.done({.subject_fd = fd, .offset = offset, .bytes = {data, static_cast<std::size_t>(written)}});
  }
  return written;
}

enum class Transfer { kRead, kWrite };

// Moves up to `nbytes` and returns how many, 0 at end of file; throws OsError.
std::uint64_t transfer_some(Transfer kind, int fd, const std::string& path, std::uint8_t* data, std::uint64_t nbytes,
                            std::uint64_t offset) {
  const char* verb = kind == Transfer::kRead ? "pread" : "pwrite";
  for (;;) {
    const fault::Outcome outcome = fault::point(verb, path.c_str());
    ssize_t moved = -1;
    if (outcome.error_number != 0) [[unlikely]] {
      errno = outcome.error_number;
    } else {
      const std::uint64_t count = std::min({nbytes, outcome.limit_nbytes, kTransferBytesMax});
      moved = kind == Transfer::kRead ? ::pread(fd, data, count, static_cast<off_t>(offset))
                                      : write_some(fd, data, count, offset);
    }
    if (moved >= 0) {
      return static_cast<std::uint64_t>(moved);
    }
    if (errno != EINTR) {
      throw OsError(errno, verb, path, offset, nbytes);
    }
  }
}

}  // namespace

std::string component_path(const char* verb, const std::string& directory, const std::string& name) {
  std::string path = directory + "/" + name;
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos ||
      name.find('\0') != std::string::npos) {
    throw OsError(EINVAL, std::string(verb) + ": not one path component", std::move(path));
  }
  return path;
}

bool set_direct(int fd, const std::string& path) {
  const int flags = call("fcntl", path, [&] { return ::fcntl(fd, F_GETFL); });
  if (flags >= 0 && call("fcntl", path, [&] { return ::fcntl(fd, F_SETFL, flags | O_DIRECT); }) == 0) {
    return true;
  }
  if (errno == EINVAL) {
    return false;
  }
  throw OsError(errno, "fcntl", path);
}

void drop_direct(int fd) noexcept {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags >= 0) {
    ::fcntl(fd, F_SETFL, flags & ~O_DIRECT);
  }
}

void drop_cached(const File& file) noexcept { ::posix_fadvise(file.fd.get(), 0, 0, POSIX_FADV_DONTNEED); }

File create_file(int directory_fd, const std::string& directory_path, const std::string& name, bool direct) {
  File file;
  {
    const journal::Change change(journal::Op::kCreate);
    file = open_file(directory_fd, directory_path, name, O_RDWR | O_CREAT | O_EXCL);
    change.done({.subject_fd = directory_fd, .object_fd = file.fd.get(), .name = name});
  }
  file.fd.keep_from_children();
  // Not O_DIRECT in the open itself: the kernel refuses it only after it has created the file, and then O_EXCL bars the
  // second try.
  file.direct = direct && set_direct(file.fd.get(), file.path);
  return file;
}

File open_for_read(int directory_fd, const std::string& directory_path, const std::string& name, bool direct) {
  File file = open_file(directory_fd, directory_path, name, O_RDONLY | O_NONBLOCK);
  if (!S_ISREG(stat_file(file).st_mode)) {
    throw OsError(EINVAL, "open: not a regular file", file.path);
  }
  // io_uring never waits for a file with O_NONBLOCK: reads that miss the page cache would end in EAGAIN.
  if (call("fcntl", file.path, [&] { return ::fcntl(file.fd.get(), F_SETFL, 0); }) != 0) {
    throw OsError(errno, "fcntl", file.path);
  }
  file.direct = direct && set_direct(file.fd.get(), file.path);
  return file;
}

std::uint64_t file_nbytes(const File& file) { return static_cast<std::uint64_t>(stat_file(file).st_size); }

bool preallocate(const File& file, std::uint64_t nbytes) {
  if (nbytes == 0) {
    return true;  // fallocate(2) calls an empty range EINVAL
  }
  const journal::Change change(journal::Op::kAllocate);
  if (call("fallocate", file.path, [&] { return ::fallocate(file.fd.get(), 0, 0, static_cast<off_t>(nbytes)); }) == 0) {
    change.done({.subject_fd = file.fd.get(), .offset = nbytes});
    return true;
  }
  if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL) {
    return false;
  }
  throw OsError(errno, "fallocate", file.path, 0, nbytes);
}

void truncate(const File& file, std::uint64_t nbytes) {
  const journal::Change change(journal::Op::kTruncate);
  if (call("ftruncate", file.path, [&] { return ::ftruncate(file.fd.get(), static_cast<off_t>(nbytes)); }) != 0) {
    throw OsError(errno, "ftruncate", file.path, nbytes);
  }
  change.done({.subject_fd = file.fd.get(), .offset = nbytes});
}

void sync(const File& file, const char* step) { sync(file.fd.get(), file.path, step); }

void sync(int fd, const std::string& path, const char* step) {
  if (fault::skipped("sync", step)) return;
  const journal::Change change(journal::Op::kSync);
  const int error_number = call("fsync", path, [&] { return ::fsync(fd); }) == 0 ? 0 : errno;
  change.done({.subject_fd = fd, .error_number = error_number});
  if (error_number != 0) {
    throw OsError(error_number, "fsync", path);
  }
}

void pwrite_full(int fd, const std::string& path, const void* source, std::uint64_t nbytes, std::uint64_t offset) {
  auto* data = static_cast<std::uint8_t*>(const_cast<void*>(source));  // only read: Transfer::kWrite
  while (nbytes != 0) {
    const std::uint64_t moved = transfer_some(Transfer::kWrite, fd, path, data, nbytes, offset);
    if (moved == 0) {
      throw OsError(ENOSPC, "pwrite", path, offset,
                    nbytes);  // no progress and no errno: some network file systems when full
    }
    data += moved;
    nbytes -= moved;
    offset += moved;
  }
}

void pread_full(int fd, const std::string& path, void* target, std::uint64_t nbytes, std::uint64_t offset) {
  auto* data = static_cast<std::uint8_t*>(target);
  const std::uint64_t end = offset + nbytes;
  while (nbytes != 0) {
    const std::uint64_t moved = transfer_some(Transfer::kRead, fd, path, data, nbytes, offset);
    if (moved == 0) {
      throw CorruptError("file is shorter than recorded", path, CorruptError::kNoChunk,
                         "at least " + std::to_string(end) + " bytes", std::to_string(offset) + " bytes");
    }
    data += moved;
    nbytes -= moved;
    offset += moved;
  }
}

void write_file(int directory_fd, const std::string& directory_path, const std::string& name,
                std::span<const std::uint8_t> bytes) {
  File file = create_file(directory_fd, directory_path, name, false);
  pwrite_full(file.fd.get(), file.path, bytes.data(), bytes.size(), 0);
  file.fd.close(file.path);
}

void write_durably(File file, std::span<const std::uint8_t> bytes, const char* step) {
  pwrite_full(file.fd.get(), file.path, bytes.data(), bytes.size(), 0);
  sync(file, step);
  file.fd.close(file.path);
}

std::vector<std::uint8_t> read_file(int directory_fd, const std::string& directory_path, const std::string& name,
                                    std::uint64_t limit_nbytes, bool uncached) {
  const File file = open_for_read(directory_fd, directory_path, name, false);
  if (uncached) {
    drop_cached(file);
  }
  const std::uint64_t nbytes = file_nbytes(file);
  if (nbytes > limit_nbytes) {
    throw CorruptError("file is larger than allowed", file.path, CorruptError::kNoChunk,
                       "at most " + std::to_string(limit_nbytes) + " bytes", std::to_string(nbytes) + " bytes");
  }
  std::vector<std::uint8_t> bytes(nbytes);
  pread_full(file.fd.get(), file.path, bytes.data(), nbytes, 0);
  return bytes;
}

}  // namespace snapstone::os
