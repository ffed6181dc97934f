// Of a copy whose checks can be taken away one at a time (tests/mutation): whether the statement `name` stays. While
// SNAPSTONE_MUTANT_LOG names a file, it gets a line for each statement that was reached: "name<TAB>test".
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace snapstone::mutant {

inline bool stays(const char* name) noexcept {
  const int error_number = errno;
  const char* chosen = std::getenv("SNAPSTONE_MUTANT");
  if (const char* log = std::getenv("SNAPSTONE_MUTANT_LOG")) {
    const char* test = std::getenv("PYTEST_CURRENT_TEST");
    char line[2048];
    const int length = std::snprintf(line, sizeof line, "%s\t%s\n", name, test == nullptr ? "" : test);
    const int fd = ::open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0 && length < static_cast<int>(sizeof line)) (void)!::write(fd, line, static_cast<std::size_t>(length));
    if (fd >= 0) ::close(fd);
  }
  errno = error_number;
  return chosen == nullptr || std::strcmp(chosen, name) != 0;
}

}  // namespace snapstone::mutant

// In front of a statement; no `if`, which an `else` behind the statement would belong to.
#define SNAPSTONE_STAYS(name) for (bool stays_ = ::snapstone::mutant::stays(name); stays_; stays_ = false)
