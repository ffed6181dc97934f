// System calls that the kernel refuses to this process from now on, as it does in a sandbox or at a limit. There is no
// way back: for children of tests.
#pragma once

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <vector>

namespace snapstone::testing {

inline void install_filter(std::span<sock_filter> code) {
  const sock_fprog program{static_cast<unsigned short>(code.size()), code.data()};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    std::perror("prctl");
    std::_Exit(2);
  }
}

// `action`: SECCOMP_RET_ERRNO | an errno, or another of its kind.
inline void refuse_call(std::uint32_t number, std::uint32_t action) {
  std::vector<sock_filter> code = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, action),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  install_filter(code);
}

// Neither threads nor processes.
inline void refuse_threads(int error_number) {
  constexpr std::uint32_t kClone3 = 435;  // on all architectures; older kernel headers do not name it
  for (const std::uint32_t number : {static_cast<std::uint32_t>(SYS_clone), kClone3}) {
    refuse_call(number, SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(error_number));
  }
}

}  // namespace snapstone::testing
