"""A clock that jumps ten years, forward and back, and ranks whose monotonic clocks have nothing in common.

The wall clock is `jumping_clock.c`, loaded before the C library, which can be told another time while the process runs;
the monotonic clocks are the kernel's own, shifted by a time namespace.

Invariants:
  1. Saves, loads, their order, their timeouts and what is cleaned up are those of a clock that does not jump.
  2. Retention removes the oldest by number, whatever the files' times say.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import snapstone as ss
from distributed import ranks
from durability import doomed, small
from lacking import skip_without
from snapstone.integrations import numbered
from snapstone.integrations.step_folder import StepFolder

YEAR_S = 31_557_600
TEN_YEARS_S = 10 * YEAR_S
CLONE_NEWTIME = 0x80

JUMP = textwrap.dedent(
    """
    import struct, sys, time, warnings
    from pathlib import Path
    import snapstone as ss
    from durability import small
    from snapstone import _native

    run, clock, years = Path(sys.argv[1]), open(sys.argv[2], "r+b", buffering=0), int(sys.argv[3])
    warnings.simplefilter("error")

    def jump(by):
        clock.seek(0)
        clock.write(struct.pack("q", by * years))
        assert abs(time.time() - real - (time.monotonic() - begin) - by * years) < 5

    real, begin = time.time(), time.monotonic()
    for number, (before, during) in enumerate(((0, 1), (1, -1), (-1, 0))):
        jump(before)
        _native.fault_arm("fsync:1+:delay=20")
        handle = ss.async_save(small.state(number), checkpoint_id=run / f"step-{number}", step=number, timeout=100)
        assert not handle.done()
        jump(during)
        handle.result(100)
        _native.fault_disarm()
        small.assert_holds(run / f"step-{number}", number)
        ss.save(small.state(number), checkpoint_id=run / f"step-{number}", step=number, overwrite=True)
        ss.save(small.layers("11111"), checkpoint_id=run / f"delta-{number}", base="auto")
        small.assert_holds(run / f"delta-{number}", "11111")
    _native.fault_arm("fsync:1+:delay=400")
    for by in (1, -1):
        jump(0)
        handle = ss.async_save(small.state(9), checkpoint_id=run / "late", timeout=0.3)
        jump(by)
        try:
            handle.result(100)
        except ss.CheckpointError as error:
            assert "0.3 s" in str(error), error
        else:
            raise AssertionError("no timeout")
    """
)


def jumping_clock(directory: Path) -> tuple[Path, dict[str, str]]:
    """The file that tells the clock its time, and the environment in which it is the clock."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library, shift = directory / "jumping_clock.so", directory / "shift"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=60)
    shift.write_bytes(bytes(8))
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    clock = {"LD_PRELOAD": str(library), "JUMPING_CLOCK": str(shift), "PYTHONPATH": path}
    return shift, os.environ | clock | {"SNAPSTONE_CHUNK_BYTES": "65536"}


def test_a_wall_clock_that_jumps_ten_years_in_the_middle_of_saves(directory: Path, tmp_path: Path) -> None:
    shift, environment = jumping_clock(tmp_path)
    # What another process, whose clock stands still, is writing meanwhile.
    with ranks.Ranks(1, doomed.save_and_stop, str(directory), store="none") as living:
        living.wait_for(0, "about to commit")
        (staging,) = small.leftovers(directory)
        command = [sys.executable, "-c", JUMP, str(directory), str(shift), str(TEN_YEARS_S)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        assert staging in small.leftovers(directory), "what a living process writes was taken for old"
    assert StepFolder(str(directory)).newest() == 2


def test_retention_goes_by_number_when_the_clock_has_jumped_back(tmp_path: Path) -> None:
    for number in range(6):
        path = tmp_path / f"checkpoint_{number}"
        path.mkdir()
        (path / "random_states_0.pkl").write_bytes(b"x")
        written = time.time() + number - (TEN_YEARS_S if number >= 3 else 0)
        os.utime(path / "random_states_0.pkl", (written, written))
    newest = str(tmp_path / "checkpoint_5")
    numbered.rotate(str(tmp_path), "checkpoint_", "random_states_0.pkl", 2, (newest,))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_4", "checkpoint_5"]


# ---- monotonic clocks


def shift_monotonic(seconds: int) -> None:
    """For this process, which has one thread and root's rights."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWTIME) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/timens_offsets").write_text(f"monotonic {seconds} 0\nboottime {seconds} 0\n")
    namespace = os.open("/proc/self/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)
    if libc.setns(namespace, CLONE_NEWTIME) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)


def save_with_clocks_apart(rank: int, directory: str, store: str) -> str:
    try:
        if rank == 1:
            shift_monotonic(864_000)
    except OSError as error:
        Path(directory, "cannot").touch()
        return f"cannot: {error}"
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    if Path(directory, "cannot").exists():
        return "cannot"
    path = Path(directory, "c")
    ss.save(small.state(1), checkpoint_id=path, timeout=20)
    handle = ss.async_save(small.state(2), checkpoint_id=path, overwrite=True, timeout=20)
    handle.result(30)
    target = small.blank()
    ss.load(target, checkpoint_id=path, timeout=20)
    assert small.bits(target) == small.bits(small.state(2))
    begin = time.monotonic()
    if rank == 1:
        with pytest.raises((ss.RankFailedError, TypeError)):
            ss.save({"bad": object()}, checkpoint_id=path.with_name("d"), timeout=20)
    else:
        with pytest.raises(ss.RankFailedError):
            ss.save(small.state(2), checkpoint_id=path.with_name("d"), timeout=20)
    assert time.monotonic() - begin < 15
    return f"{time.monotonic():.0f}"


def test_ranks_whose_monotonic_clocks_are_ten_days_apart(directory: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        skip_without("time_namespaces", "shifting a clock needs root")
    arguments = (str(directory), str(tmp_path / "store"))
    clocks = ranks.values(
        ranks.run_ranks(2, save_with_clocks_apart, *arguments, store="none", env={"GLOO_SOCKET_IFNAME": "lo"})
    )
    if any(clock.startswith("cannot") for clock in clocks):
        skip_without("time_namespaces", str(clocks))
    assert int(clocks[1]) - int(clocks[0]) > 800_000
    small.assert_holds(directory / "c", 2)
