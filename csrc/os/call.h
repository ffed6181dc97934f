// The one way csrc/os/ enters the kernel: fault seam, then the call, then again on EINTR.
//
// Reads of /proc (boot id, memory, limits) stay outside the seam: they answer "unknown" and never fail a caller.
// Seam names (base/fault_hook.h) and what passes them; fallocate, ftruncate, fsync, pwrite, pread, copy_file_range,
// flock, mmap, mbind and madvise are the calls of those names.
//
// clang-format off
//     open        openat with any flags: files, directories, O_TMPFILE
//     fcntl       after open: O_NONBLOCK off, O_DIRECT on
//     opendir     fdopendir of a listing
//     readdir     readdir
//     stat        fstatat of one name
//     fstat       fstat and statx of an open descriptor
//     statfs      fstatfs
//     mkdir       mkdirat
//     unlink      unlinkat of a file
//     rmdir       unlinkat of a directory
//     rename      renameat
//     renameat2   renameat2 with any flag
//     link        linkat
//     fchown      fchown
//     fchmod      fchmod
//     ioctl       FICLONE of a probe
//     close       UniqueFd::close only; destructors ignore errors, so failing them would prove nothing
// clang-format on
#pragma once

#include <cerrno>
#include <string>

#include "base/fault_hook.h"

namespace snapstone::os {

// The result of `function`, or -1 with errno set. An injected EINTR takes the same loop as a real one.
template <class Function>
auto call(const char* seam, const std::string& path, Function&& function) -> decltype(function()) {
  for (;;) {
    const fault::Outcome outcome = fault::point(seam, path.c_str());
    if (outcome.error_number != 0) [[unlikely]] {
      errno = outcome.error_number;
      if (errno != EINTR) {
        return -1;
      }
      continue;
    }
    const auto result = function();
    if (result >= 0 || errno != EINTR) {
      return result;
    }
  }
}

// `directory`/`name` for messages. Throws OsError(EINVAL, verb) unless `name` is one path component other than "." and
// "..".
std::string component_path(const char* verb, const std::string& directory, const std::string& name);

}  // namespace snapstone::os
