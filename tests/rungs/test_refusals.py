"""A kernel, a sandbox or a limit that refuses what the fast ways of doing I/O need costs speed, and nothing else.

Refused for real: by a seccomp filter, by RLIMIT_MEMLOCK of a user without capabilities.

Invariants:
  1. The files are the ones that any other rung writes, byte for byte, and the checkpoints load and verify.
  2. The rung that is used, and why better ones are not, stand in the save's stats.
  3. Nothing louder than a warning is said, and nothing is left beside the checkpoints.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed import ranks
from durability import small
from rungs import refusals
from rungs.running import run_work
from rungs.same_files import comparable

pytestmark = pytest.mark.skipif("linkat" not in refusals.NUMBERS, reason="numbers of system calls are not known here")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (errno.EPERM, "io_uring_setup: EPERM (seccomp"),
        (errno.ENOSYS, "io_uring_setup: ENOSYS"),
        (errno.EOPNOTSUPP, "io_uring_setup: EOPNOTSUPP"),
        (errno.EINVAL, "io_uring_setup: EINVAL"),
        (refusals.KILL, "kills the caller with signal 31"),
    ],
    ids=["EPERM", "ENOSYS", "EOPNOTSUPP", "EINVAL", "killed"],
)
def test_a_sandbox_without_io_uring(tmp_path: Path, reference: Path, answer: int, said: str) -> None:
    done = run_work(None, tmp_path, reference, calls=dict.fromkeys(refusals.IO_URING, answer))
    assert done.rungs < {"threads-direct", "buffered"}
    reasons = [reason for reason in done.passed_over if "uring" in reason.partition(":")[0]]
    assert len(reasons) == 2, done.passed_over
    assert all(said in reason for reason in reasons), reasons
    assert comparable(tmp_path) == comparable(reference)


@pytest.mark.needs_io_uring
@pytest.mark.parametrize("call", ["io_uring_enter", "io_uring_register"])
def test_a_sandbox_that_forgot_one_call_of_io_uring(tmp_path: Path, reference: Path, call: str) -> None:
    done = run_work(None, tmp_path, reference, calls={call: errno.EPERM})
    assert "uring-fixed" not in done.rungs
    assert any(reason.startswith("uring-fixed: ") for reason in done.passed_over), done.passed_over
    assert comparable(tmp_path) == comparable(reference)


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("fallocate", errno.EOPNOTSUPP),
        ("fallocate", errno.ENOSYS),
        ("flock", errno.ENOSYS),
        ("flock", errno.EOPNOTSUPP),
        ("renameat2", errno.ENOSYS),
        ("renameat2", errno.EINVAL),
        ("copy_file_range", errno.EPERM),
    ],
)
def test_a_call_that_a_save_can_do_without(tmp_path: Path, reference: Path, call: str, answer: int) -> None:
    run_work(None, tmp_path, reference, calls={call: answer})
    assert comparable(tmp_path) == comparable(reference)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """pytest's own directories are closed to other users."""
    with tempfile.TemporaryDirectory(prefix="snapstone-nobody-", dir="/var/tmp") as directory:
        os.chmod(directory, 0o755)
        saves = Path(directory, "saves")
        saves.mkdir()
        os.chown(saves, refusals.NOBODY, refusals.NOBODY)
        yield saves


@needs_root
@pytest.mark.needs_io_uring
@pytest.mark.parametrize("memlock_nbytes", [0, 64 * KIB, 8 * MIB], ids=["0", "64 KiB", "8 MiB"])
def test_an_unprivileged_user_who_may_lock_little(open_to_all: Path, reference: Path, memlock_nbytes: int) -> None:
    done = run_work(None, open_to_all, open_to_all, memlock_nbytes=memlock_nbytes, uid=refusals.NOBODY)
    assert "uring-fixed" not in done.rungs
    assert done.passed_over[0].startswith(f"uring-fixed: RLIMIT_MEMLOCK: {memlock_nbytes} bytes"), done.passed_over
    assert comparable(open_to_all) == comparable(reference)


# ---- a file system without hard links, as far as a save can see


def save_chain_without_links(rank: int, directory: str, answer: int) -> list[str]:
    import warnings

    import snapstone as ss

    refusals.refuse_calls({"linkat": answer})
    small.save_previous(Path(directory, "warm"))  # that it is warned of once is not what is tested
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        small.save_previous(Path(directory))
        for kind in ("link", "carry"):
            saved = small.save_delta(Path(directory), kind)
            assert saved.manifest.base is None
            small.assert_holds(Path(directory, "next"), small.DELTAS[kind])
            ss.save(small.layers("44444"), checkpoint_id=Path(directory, "next"), overwrite=True)
            os.rename(Path(directory, "next"), Path(directory, f"after-{kind}"))
    assert all(warning.category is RuntimeWarning for warning in warned)
    return [str(warning.message) for warning in warned]


@pytest.mark.parametrize("answer", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOSYS])
def test_without_hard_links_every_save_is_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")
    arguments = (str(tmp_path), answer)
    (said,) = ranks.values(ranks.run_ranks(1, save_chain_without_links, *arguments, store="none"))
    assert any("link" in one for one in said), said
    assert small.leftovers(tmp_path) == []
    small.assert_holds(tmp_path / "previous", small.PREVIOUS)
