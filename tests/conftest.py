"""Markers for what a machine may lack.

A test marked ``needs_x`` is skipped where x is missing; ``FAIL_WITHOUT_X=1`` in the environment makes that a failure,
so that a machine meant to have x cannot pass by skipping. What proofs need beside that is in `lacking`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import settings

import lacking

# The same examples in every run: a change is not judged by luck.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

SYS_IO_URING_SETUP = 425  # the same number on every architecture
IO_URING_PARAMS_BYTES = 120


@functools.cache
def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@functools.cache
def has_io_uring() -> bool:
    """Whether the kernel lets this process set up a ring; containers often forbid it (EPERM, ENOSYS)."""
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(IO_URING_PARAMS_BYTES)
    fd = libc.syscall(SYS_IO_URING_SETUP, ctypes.c_uint(1), params)
    if fd < 0:
        return False
    os.close(fd)
    return True


@functools.cache
def has_o_direct() -> bool:
    """Whether the file system of temporary files takes O_DIRECT; tmpfs before Linux 6.6 answers EINVAL."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            fd = os.open(os.path.join(directory, "probe"), os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
        except OSError:
            return False
        os.close(fd)
    return True


def has_browser() -> bool:
    from report.chromium import chromium_path

    return chromium_path() is not None


NEEDS: dict[str, tuple[str, Callable[[], bool]]] = {
    "needs_browser": (
        "a browser: playwright (make setup) and Chromium (apt-get install chromium)",
        has_browser,
    ),
    "needs_cuda": ("a CUDA device", has_cuda),
    "needs_io_uring": ("a kernel that allows io_uring", has_io_uring),
    "needs_o_direct": ("a temporary directory that takes O_DIRECT", has_o_direct),
}


def pytest_configure(config: pytest.Config) -> None:
    try:
        lacking.demanded()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    for marker, (thing, _) in NEEDS.items():
        config.addinivalue_line("markers", f"{marker}: the test needs {thing}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, (thing, is_there) in NEEDS.items():
        if item.get_closest_marker(marker) is None or is_there():
            continue
        variable = "FAIL_WITHOUT_" + marker.removeprefix("needs_").upper()
        if os.environ.get(variable):
            pytest.fail(f"{variable} is set and there is no {thing.removeprefix('a ')}", pytrace=False)
        pytest.skip(f"needs {thing}")
