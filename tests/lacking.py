"""What a proof needs that a machine may lack: the test is skipped, and says so.

`FAIL_WITHOUT="strace cgroup"` in the environment makes skips for want of these failures, so that a machine meant to
have them cannot pass by skipping; `FAIL_WITHOUT=all` means every one of `THINGS`.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

VARIABLE = "FAIL_WITHOUT"
THINGS = {
    "mounts": "file systems that a test may mount: root, loop devices, mkfs of ext4, xfs and btrfs",
    "fat": "the same of vfat and exfat: mkfs.vfat, mkfs.exfat, and a kernel that has them",
    "nbdkit": "nbdkit with nbdfuse, and /dev/fuse",
    "network_namespaces": "root and `ip` of iproute2",
    "time_namespaces": "root and a kernel with time namespaces",
    "strace": "strace, and leave to attach it",
    "cgroup": "a memory cgroup that a test may make, of version 1 or 2",
    "ckpt_chaos": "the package ckpt-chaos",
    "clang": "clang++ with libFuzzer",
}


def demanded() -> set[str]:
    """The things whose absence is a failure. Raises ValueError for a name that is none of them."""
    names = os.environ.get(VARIABLE, "").replace(",", " ").split()
    if unknown := set(names) - {*THINGS, "all"}:
        raise ValueError(f"{VARIABLE}: {', '.join(sorted(unknown))}: it takes 'all', or any of {', '.join(THINGS)}")
    return set(THINGS) if "all" in names else set(names)


def skip_without(thing: str, why: str) -> NoReturn:
    __tracebackhide__ = True  # the summary names the test, not this line
    assert thing in THINGS, thing
    if thing in demanded():
        pytest.fail(f"{VARIABLE} names {thing}: {why}", pytrace=False)
    pytest.skip(f"lacks {thing}: {why}")
