"""One system call fails, anywhere: every call of every kind that a save or a load makes, one at a time.

Invariants, for the Nth call of each kind, once and for ever, with every errno that it can give (`seam.GIVES`), and with
EIO for every way of doing I/O:
  1. The save raises an error with that errno, or it succeeds and the checkpoint is right. The load raises a typed error
     or fills in the right bytes. Nothing else: no wrong bytes, no hang, no other error.
  2. The checkpoint that was there before is still there, bit for bit. The next save works and leaves nothing behind: no
     descriptor, slot, thread, lock or directory.
  3. A failed fsync or close is always an error, and no fsync is tried again.
  4. EINTR, EAGAIN of a transfer and short counts change nothing at all.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import snapstone as ss
from distributed import ranks
from durability import small
from durability.recovered import assert_left_by_an_overwrite
from durability.seam import CALLS_MAX, calls_of, faults, outcome_of, sweep
from durability.small import RUNGS
from snapstone import _native

SEED = 31337
# What a save cannot do without; a sweep that never meets these sweeps nothing.
OF_A_SAVE = {"open", "mkdir", "fsync", "pwrite", "flock", "close", "unlink", "renameat2", "stat", "opendir"}
OF_A_LOAD = {"open", "fstat", "fcntl", "pread"}


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}")
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")


Save = Callable[..., Any]
SAVES: dict[str, Save] = {
    "save": lambda state, path, **options: ss.save(state, checkpoint_id=path, **options),
    "async": lambda state, path, **options: ss.async_save(state, checkpoint_id=path, **options).result(30),
    "zstd": lambda state, path, **options: ss.save(state, checkpoint_id=path, codec="zstd", **options),
}


def cases() -> list[tuple[str, str]]:
    return [*itertools.product(RUNGS, ["save"]), ("uring", "async"), ("uring", "zstd"), ("threads-direct", "zstd")]


ONLY = {"uring": (), "buffered": ()}  # every errno; the other ways of doing I/O share what they do with it


def only(rung: str, kind: str = "save") -> tuple[str, ...]:
    return ONLY.get(rung, ("EIO", "EINTR")) if kind == "save" else ("EIO",)


@pytest.mark.parametrize(("rung", "kind"), cases())
def test_one_failing_call_of_a_save(use_rung: Callable[[str], Path], rung: str, kind: str) -> None:
    run, save, names = use_rung(rung) / "run", SAVES[kind], itertools.count()
    save(small.state(1), run / "previous")
    counts = calls_of(lambda: save(small.state(2), run / "warm"))
    assert counts.keys() >= OF_A_SAVE, counts
    assert ("uring_write" in counts) == rung.startswith("uring")
    failed, resources = 0, small.Resources(run)
    for fault in sweep(counts, only(rung, kind)):
        path = run / f"c{next(names)}"
        error = outcome_of(lambda path=path: save(small.state(2), path), fault.number)
        reached = fault.stop()
        failed += error is not None
        assert error is None or not fault.is_got_over, (fault, error)
        # Committed, but not proven: the last sync of all, which is that of the parent directory.
        assert error is None or not path.exists() or (fault.call, fault.nth) == ("fsync", counts["fsync"]), fault
        if path.exists():
            small.assert_holds(path, 2)
            shutil.rmtree(path)
        assert error is not None or not reached or not fault.must_fail, fault
        assert small.load(run / "previous") == small.bits(small.state(1))
        save(small.state(3), run / "next", overwrite=True)
        small.assert_holds(run / "next", 3)
        if fault.lasting:  # what could not be removed then, and does not say whose it is, goes when it is old
            small.reap_all(run)
        assert small.leftovers(run) == [], fault
        resources.assert_none_leaked(fault)
    small.assert_holds(run / "previous", 1)
    assert failed >= 30


@pytest.mark.parametrize("rung", ["uring", "buffered"])
def test_one_failing_call_of_an_overwrite(use_rung: Callable[[str], Path], rung: str) -> None:
    run = use_rung(rung) / "run"
    path = run / "c"
    ss.save(small.state(1), checkpoint_id=path)
    counts = calls_of(lambda: ss.save(small.state(1), checkpoint_id=path, overwrite=True))
    assert counts.keys() >= {*OF_A_SAVE, "rename", "rmdir"}
    failed, resources = 0, small.Resources(run)
    for fault in sweep(counts, () if rung == "buffered" else ("EIO",)):
        error = outcome_of(lambda: ss.save(small.state(2), checkpoint_id=path, overwrite=True), fault.number)
        reached = fault.stop()
        failed += error is not None
        assert error is None or not fault.is_got_over, (fault, error)
        assert error is not None or not reached or not fault.must_fail, fault
        is_unproven = (fault.call, fault.nth) == ("fsync", counts["fsync"])  # of the parent: committed all the same
        assert ss.verify(path), fault
        assert small.load(path) == BOTH[error is None or is_unproven], fault
        if not fault.lasting and (fault.is_got_over or (error is not None and not is_unproven)):
            assert small.leftovers(run) == [], fault
        ss.save(small.state(1), checkpoint_id=path, overwrite=True)
        assert small.load(path) == BOTH[0], fault
        assert_left_by_an_overwrite(run, 1, fault, is_unproven)
        small.reap_all(run)
        resources.assert_none_leaked(fault)
    small.assert_holds(path, 1)
    assert failed >= (150 if rung == "buffered" else 30)


BOTH = [small.bits(small.state(1)), small.bits(small.state(2))]


@pytest.mark.parametrize("rung", RUNGS)
def test_one_failing_call_of_a_load(use_rung: Callable[[str], Path], rung: str) -> None:
    run = use_rung(rung)
    for codec in (None, "zstd"):
        path = run / f"c-{codec}"
        ss.save(small.state(1), checkpoint_id=path, codec=codec)
        counts = calls_of(lambda path=path: small.load(path))
        assert counts.keys() >= OF_A_LOAD, counts
        assert ("uring_read" in counts) == rung.startswith("uring")
        failed, resources = 0, small.Resources(run)
        for fault in sweep(counts, only(rung)):
            found: list[small.Bits] = []
            error = outcome_of(lambda path=path, found=found: found.append(small.load(path)), fault.number)
            fault.stop()
            failed += error is not None
            assert error is None or not fault.is_got_over, (fault, error)
            assert error is not None or found == [small.bits(small.state(1))], fault
            assert small.load(path) == small.bits(small.state(1)), fault
            resources.assert_none_leaked(fault)
        assert failed >= 5
        small.assert_holds(path, 1)


@pytest.mark.parametrize("rung", ["uring", "buffered"])
def test_one_failing_call_of_removing_what_is_left(use_rung: Callable[[str], Path], rung: str) -> None:
    """Of what saves that died and overwrites left; whatever fails, checkpoints stay, and the next time it all goes."""
    run = use_rung(rung) / "run"
    ss.save(small.state(1), checkpoint_id=run / "previous")
    before = small.tree(run / "previous")

    def leave() -> None:
        for name in (f".staging-{'a' * 32}", f".trash-{'b' * 32}"):
            (run / name / "base").mkdir(mode=0o700, parents=True)
            (run / name / "base" / "rank-00000.data").write_bytes(b"x")
            (run / name / "OWNER").write_text(_native.boot_id() + "\n")

    leave()
    counts = calls_of(lambda: _native.reap(str(run)))
    assert counts.keys() >= {"open", "opendir", "readdir", "flock", "fsync", "unlink", "rmdir"}
    resources = small.Resources(run)
    for fault in sweep(counts):
        leave()
        error = outcome_of(lambda: _native.reap(str(run)), fault.number)
        fault.stop()
        assert error is None or not fault.is_got_over, (fault, error)
        assert not fault.is_got_over or fault.call == "flock" or small.leftovers(run) == [], fault
        assert small.tree(run / "previous") == before, fault
        resources.assert_none_leaked(fault)
        small.reap_all(run)
        assert sorted(os.listdir(run)) == ["previous"], fault
    small.assert_holds(run / "previous", 1)


def test_verify_does_not_call_a_checkpoint_sound_that_it_could_not_read(directory: Path) -> None:
    path = directory / "c"
    ss.save(small.state(1), checkpoint_id=path)
    counts = calls_of(lambda: ss.verify(path))
    resources = small.Resources(directory)
    for fault in sweep(counts):
        reports: list[ss.VerifyReport] = []
        error = outcome_of(lambda reports=reports: reports.append(ss.verify(path)), fault.number)
        reached = fault.stop()
        found = error is not None or not reports[0]
        assert not found or not fault.is_got_over, (fault, error, reports)
        is_lost = reached and fault.call in ("pread", "uring_read") and not fault.may_be_got_over
        assert found or not is_lost, fault
        resources.assert_none_leaked(fault)
        assert ss.verify(path)


@pytest.mark.parametrize("rung", RUNGS)
def test_a_failed_fsync_is_an_error_and_never_tried_again(use_rung: Callable[[str], Path], rung: str) -> None:
    run = use_rung(rung) / "run"
    ss.save(small.state(1), checkpoint_id=run / "previous")
    total = calls_of(lambda: ss.save(small.state(1), checkpoint_id=run / "warm"))["fsync"]
    assert total >= 7  # data, index, directory, two manifest files, directory, parent
    for nth in range(1, total + 1):
        _native.fault_arm(f"fsync:{nth}:errno=EIO")
        with pytest.raises(OSError, match="fsync") as caught:
            ss.save(small.state(2), checkpoint_id=run / f"c{nth}")
        more = _native.fault_seen("fsync") - nth
        _native.fault_disarm()
        assert (caught.value.errno, caught.value.filename.startswith(str(run))) == (errno.EIO, True)
        assert more <= 1, "after the failure nothing is synced but the parent, once the staging directory is removed"
        assert small.leftovers(run) == []
        assert (run / f"c{nth}").exists() == (nth == total)
    small.assert_holds(run / "previous", 1)


def test_a_transfer_thread_tries_again_when_it_is_asked_to(use_rung: Callable[[str], Path]) -> None:
    """EAGAIN from pwrite and pread of data, which only I/O threads make; small files have no reason to see it."""
    run = use_rung("threads-direct")
    ss.save(small.state(1), checkpoint_id=run / "previous")
    fine = 0
    for number, fault in enumerate(faults("pwrite", "errno=EAGAIN")):
        path = run / f"c{number}"
        error = outcome_of(lambda path=path: ss.save(small.state(2), checkpoint_id=path), errno.EAGAIN)
        fine += error is None
        fault.stop()
        if error is None:
            small.assert_holds(path, 2)
    assert fine >= 3  # the chunks
    small.assert_holds(run / "previous", 1)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("nbytes", [1, 511, 4096, 5000])
def test_short_counts_change_nothing(use_rung: Callable[[str], Path], rung: str, nbytes: int) -> None:
    run = use_rung(rung)
    for number, call in enumerate(("pwrite", "pread", "uring_write", "uring_read")):
        if nbytes < 4096 and rung != "buffered" and call in ("pwrite", "pread"):
            action = f"{call}:2:short={nbytes}"  # every time would leave O_DIRECT with an unaligned rest each time
        else:
            action = f"{call}:1+:short={max(nbytes, 64)}"
        path = run / f"c{number}"
        _native.fault_arm(action)
        ss.save(small.state(1), checkpoint_id=path, codec="zstd" if number % 2 else None)
        assert small.load(path) == small.bits(small.state(1)), action
        assert ss.verify(path)
        _native.fault_disarm()
        small.assert_holds(path, 1)


def test_what_a_file_system_cannot_do_is_done_without(use_rung: Callable[[str], Path]) -> None:
    """fallocate: NFS before 4.2; flags of renameat2: some FUSE file systems."""
    directory = use_rung("threads-direct")
    for number, fault in enumerate(
        ("fallocate:1:errno=EOPNOTSUPP", "renameat2:1:errno=EINVAL", "renameat2:1:errno=ENOSYS")
    ):
        _native.fault_arm(fault)
        ss.save(small.state(1), checkpoint_id=directory / f"c{number}")
        assert _native.fault_seen(fault.partition(":")[0]) > 0
        _native.fault_disarm()
        small.assert_holds(directory / f"c{number}", 1)


# The first save of a process, which also probes the directory and allocates the ring --------------------------------


def first_saves(rank: int, directory: str, action: str, start: int) -> list[str]:
    """Forks a process for every third N; in each the Nth call of any kind in its first save fails. How each ended."""
    ss.save, ss.load, ss.verify, ss.Checkpoint  # noqa: B018 - imported once, and not in each fork
    outcomes: list[str] = []
    for nth in range(start, CALLS_MAX, 3):
        outcomes.append(in_a_fork(lambda nth=nth: first_save(directory, f"*:{nth}:{action}", nth)))
        if outcomes[-1] == "not reached":
            break
    return outcomes


def first_save(directory: str, fault: str, nth: int) -> str:
    path = Path(directory) / f"c{nth}"
    _native.fault_arm(fault)
    try:
        ss.save(small.state(nth), checkpoint_id=path)
        outcome = "saved"
    except OSError as error:
        outcome = errno.errorcode[error.errno]
    reached = _native.fault_seen("*") >= nth
    _native.fault_disarm()
    ss.save(small.state(nth), checkpoint_id=path, overwrite=True)
    small.assert_holds(path, nth)
    return outcome if reached else "not reached"


def in_a_fork(function: Callable[[], str]) -> str:
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        try:
            os.write(write_end, function().encode())
        except BaseException as error:
            os.write(write_end, repr(error).encode()[:4000])
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    os.wait()
    return text


@pytest.mark.parametrize(("name", "start"), [("EIO", 1), ("ENOMEM", 2)])
def test_one_failing_call_of_the_first_save_of_a_process(tmp_path: Path, name: str, start: int) -> None:
    """A rung whose probe fails is passed over; a ring that gets no memory is an error, and the next save works."""
    run = small.in_memory(tmp_path)
    try:
        results = ranks.run_ranks(1, first_saves, str(run), f"errno={name}", start, store="none", timeout=110)
    finally:
        shutil.rmtree(run)
    (outcomes,) = ranks.values(results)
    assert set(outcomes) <= {"saved", "not reached", name}, outcomes
    assert outcomes[-1] == "not reached"
    assert outcomes.count(name) >= 8
    assert outcomes.count("saved") >= 1, "failures that a save can do without: probes, huge pages"
