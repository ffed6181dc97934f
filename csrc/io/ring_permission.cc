#include "io/ring_permission.h"

#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <mutex>
#include <string_view>
#include <utility>

#include "os/memory.h"
#include "os/per_process.h"

namespace snapstone::io {
namespace {

constexpr long kIoUringSetup = 425;                   // on all architectures; older kernel headers do not name it
using IoUringParams = std::array<std::uint64_t, 15>;  // struct io_uring_params, 120 bytes

constexpr std::pair<int, const char*> kErrorNames[] = {
    {EACCES, "EACCES"},   {EAGAIN, "EAGAIN"}, {EBADF, "EBADF"},   {EBUSY, "EBUSY"},           {ECANCELED, "ECANCELED"},
    {EDQUOT, "EDQUOT"},   {EEXIST, "EEXIST"}, {EFAULT, "EFAULT"}, {EFBIG, "EFBIG"},           {EINTR, "EINTR"},
    {EINVAL, "EINVAL"},   {EIO, "EIO"},       {EMFILE, "EMFILE"}, {ENFILE, "ENFILE"},         {ENODEV, "ENODEV"},
    {ENOENT, "ENOENT"},   {ENOMEM, "ENOMEM"}, {ENOSPC, "ENOSPC"}, {ENOSYS, "ENOSYS"},         {ENXIO, "ENXIO"},
    {ENOTDIR, "ENOTDIR"}, {EPERM, "EPERM"},   {EROFS, "EROFS"},   {EOPNOTSUPP, "EOPNOTSUPP"}, {ESTALE, "ESTALE"},
};

// False only where the kernel says that the calling thread has no seccomp filter.
bool may_be_filtered() {
  std::ifstream status("/proc/thread-self/status");
  constexpr std::string_view kField = "Seccomp:";
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(kField)) {
      return line.find_first_not_of(" \t", kField.size()) != line.find('0', kField.size());
    }
  }
  return true;
}

// What a child that makes a ring and exits reports: 0, an errno, or -signal. A plain fork (no CLONE_VM: a core dump of
// the child would take the parent along), by system call: no atfork handlers of other libraries run, and without an
// exit signal neither a SIGCHLD handler nor a wait() of the application sees the child.
int setup_in_child() {
  const long child = ::syscall(SYS_clone, 0L, 0L, 0L, 0L, 0L);
  if (child < 0) {
    return errno;
  }
  if (child == 0) {
    IoUringParams params{};
    const long ring = ::syscall(kIoUringSetup, 1L, params.data());
    ::syscall(SYS_exit_group, ring >= 0 ? 0L : static_cast<long>(errno));
  }
  int status = 0;
  while (::waitpid(static_cast<pid_t>(child), &status, __WALL) < 0) {
    if (errno != EINTR) {
      return errno;
    }
  }
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

std::string ask() {
  if (!may_be_filtered()) {
    return {};
  }
  const int answer = setup_in_child();
  if (answer == 0) {
    return {};
  }
  if (answer > 0) {
    return "io_uring_setup: " + ring_refusal(answer);
  }
  return "io_uring_setup: kills the caller with signal " + std::to_string(-answer) +
         (answer == -SIGSYS ? " (SIGSYS: seccomp filter)" : "");
}

struct Answer {
  std::once_flag once;
  std::string reason;
};

}  // namespace

std::string ring_permission() {
  auto& [once, reason] = os::per_process<Answer>();
  std::call_once(once, [&reason] { reason = ask(); });
  return reason;
}

std::string ring_refusal(int error_number) {
  const std::string name = error_name(error_number);
  switch (error_number) {
    case EPERM:
    case EACCES: {
      int disabled = 0;
      std::ifstream("/proc/sys/kernel/io_uring_disabled") >> disabled;
      return name + (disabled > 0 ? " (kernel.io_uring_disabled=" + std::to_string(disabled) + ")"
                                  : " (seccomp filter or security policy of a container?)");
    }
    case ENOSYS:
      return name + " (a kernel before 5.6, or a sandbox that hides io_uring)";
    case ENOMEM:
      return name + " (RLIMIT_MEMLOCK of " + std::to_string(os::memlock_limit_bytes()) + " bytes?)";
    default:
      return name;
  }
}

std::string error_name(int error_number) {
  for (const auto& [number, name] : kErrorNames) {
    if (number == error_number) {
      return name;
    }
  }
  return "errno " + std::to_string(error_number);
}

}  // namespace snapstone::io
