#include "os/copy.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "base/error.h"
#include "os/call.h"
#include "os/journal.h"

namespace snapstone::os {
namespace {

constexpr std::uint64_t kBufferBytes = 1ull << 20;
// Linux transfers at most this much in one call, whatever the count (copy_file_range(2), rw(2)).
constexpr std::uint64_t kTransferBytesMax = 0x7ffff000;

// What the call says where it cannot copy between these two files: on different file systems (EXDEV), not supported by
// the file system (EINVAL, EOPNOTSUPP), older than the kernel (ENOSYS), not known to a sandbox (EPERM).
bool is_unsupported(int error_number) {
  return error_number == EXDEV || error_number == EINVAL || error_number == ENOSYS || error_number == EOPNOTSUPP ||
         error_number == EPERM;
}

// Copies up to `nbytes` and returns how many; 0 at the end of the source, and where the call cannot copy these files.
std::uint64_t copy_some(const File& source, std::uint64_t source_offset, const File& target,
                        std::uint64_t target_offset, std::uint64_t nbytes) {
  for (;;) {
    const fault::Outcome outcome = fault::point("copy_file_range", target.path.c_str());
    ssize_t copied = -1;
    if (outcome.error_number != 0) [[unlikely]] {
      errno = outcome.error_number;
    } else {
      auto from = static_cast<off_t>(source_offset);
      auto to = static_cast<off_t>(target_offset);
      const journal::Change change(journal::Op::kWrite);
      copied = ::copy_file_range(source.fd.get(), &from, target.fd.get(), &to,
                                 std::min({nbytes, outcome.limit_nbytes, kTransferBytesMax}), 0);
      if (copied > 0 && change.recording()) [[unlikely]] {
        std::vector<std::uint8_t> bytes(static_cast<std::size_t>(copied));
        pread_full(target.fd.get(), target.path, bytes.data(), bytes.size(), target_offset);
        change.done({.subject_fd = target.fd.get(), .offset = target_offset, .bytes = bytes});
      }
    }
    if (copied >= 0) {
      return static_cast<std::uint64_t>(copied);
    }
    if (is_unsupported(errno)) {
      return 0;
    }
    if (errno != EINTR) {
      throw OsError(errno, "copy_file_range from " + source.path + " to", target.path, target_offset, nbytes);
    }
  }
}

void copy_through_memory(const File& source, std::uint64_t source_offset, const File& target,
                         std::uint64_t target_offset, std::uint64_t nbytes) {
  std::vector<std::uint8_t> buffer(std::min(nbytes, kBufferBytes));
  while (nbytes != 0) {
    const std::uint64_t count = std::min<std::uint64_t>(nbytes, buffer.size());
    pread_full(source.fd.get(), source.path, buffer.data(), count, source_offset);
    pwrite_full(target.fd.get(), target.path, buffer.data(), count, target_offset);
    source_offset += count;
    target_offset += count;
    nbytes -= count;
  }
}

}  // namespace

void copy_range(const File& source, std::uint64_t source_offset, const File& target, std::uint64_t target_offset,
                std::uint64_t nbytes) {
  while (nbytes != 0) {
    const std::uint64_t copied = copy_some(source, source_offset, target, target_offset, nbytes);
    if (copied == 0) {
      // Also at the end of the source: some file systems answer 0 for what they cannot copy, and pread tells which it
      // is.
      return copy_through_memory(source, source_offset, target, target_offset, nbytes);
    }
    source_offset += copied;
    target_offset += copied;
    nbytes -= copied;
  }
}

}  // namespace snapstone::os
