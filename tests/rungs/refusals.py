"""Makes the kernel refuse this process things for good: system calls (seccomp), locked memory, capabilities.

For processes that a test starts and throws away. Nothing here needs more than an unprivileged user, except `become`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Mapping

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
SECCOMP_MODE_FILTER = 2
RET_ERRNO, RET_KILL_PROCESS, RET_ALLOW = 0x0005_0000, 0x8000_0000, 0x7FFF_0000
LOAD_NUMBER, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
KILL = -1  # in place of an errno

IO_URING = ("io_uring_setup", "io_uring_enter", "io_uring_register")
_NUMBERS = {
    "x86_64": {"linkat": 265, "renameat2": 316, "flock": 73, "fallocate": 285, "copy_file_range": 326},
    "aarch64": {"linkat": 37, "renameat2": 276, "flock": 32, "fallocate": 47, "copy_file_range": 285},
}
NUMBERS = {
    **dict(zip(IO_URING, range(425, 428), strict=True)),  # the same everywhere
    **_NUMBERS.get(platform.machine(), {}),
}
NOBODY = 65534


def refuse_calls(answers: Mapping[str, int]) -> None:
    """From now on each of these system calls ends with its errno, or kills the process (`KILL`)."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = struct.pack("=HBBI", LOAD_NUMBER, 0, 0, 0)
    for name, answer in answers.items():
        action = RET_KILL_PROCESS if answer == KILL else RET_ERRNO | answer
        code += struct.pack("=HBBI", JUMP_IF_EQUAL, 0, 1, NUMBERS[name]) + struct.pack("=HBBI", RETURN, 0, 0, action)
    code += struct.pack("=HBBI", RETURN, 0, 0, RET_ALLOW)
    instructions = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions)))
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")


def limit_locked_memory(nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (nbytes, nbytes))


def become(uid: int) -> None:
    """Another user, without a single capability; needs root."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    with open("/proc/self/status", "rb") as status:
        (effective,) = [line.split()[1] for line in status if line.startswith(b"CapEff:")]
    assert int(effective, 16) == 0
