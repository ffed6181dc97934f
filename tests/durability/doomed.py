"""Processes that save and are killed. Functions here run in ranks (tests/distributed/ranks.py) and in forks of them.

A rank imports torch and snapstone and starts no save itself, so that each fork of it is as good as a new process and
costs a few milliseconds.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import snapstone as ss
from distributed.ranks import announce
from durability import small
from durability.counted import count
from snapstone import _native


def forked(function: Callable[[int], object]) -> tuple[int, int]:
    """Starts `function(pipe)` in a fork, which exits 0, or 1 on an error. Returns its pid and the pipe's other end."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read_end)
            function(write_end)
            code = 0
        except BaseException as error:
            print(f"forked: {error!r}", flush=True)
        finally:
            os._exit(code)
    os.close(write_end)
    return pid, read_end


def how_it_ended(pid: int) -> int:
    """The exit code, negative for a signal."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count("kills", code == -signal.SIGKILL)
    return code


def killed_at_every_call(rank: int, run: str, kind: str, start: int, stride: int) -> list[tuple[int, int]]:
    """For every `stride`th N a process that is killed at its Nth call, until one survives: (N, exit code)."""
    ended: list[tuple[int, int]] = []
    for nth in range(start, 1000, stride):
        pid, pipe = forked(lambda _, nth=nth: save_and_die(Path(run, f"n{nth}"), kind, f"*:{nth}:kill"))
        os.close(pipe)
        ended.append((nth, how_it_ended(pid)))
        if ended[-1][1] != -signal.SIGKILL:
            break
    return ended


def killed_at(rank: int, run: str, kind: str, rules: list[str]) -> list[int]:
    """For each rule a process in which it is armed; their exit codes."""
    codes = []
    for number, rule in enumerate(rules):
        pid, pipe = forked(lambda _, number=number, rule=rule: save_and_die(Path(run, f"r{number}"), kind, rule))
        os.close(pipe)
        codes.append(how_it_ended(pid))
    return codes


def save_and_die(run: Path, kind: str, rule: str, ready: Callable[[], object] = lambda: None) -> None:
    """State 1 as "previous", unharmed; then `ready`, and state 2 as "next", or of the kind "overwrite" in the place of
    state 1. Of the kinds in `small.DELTAS`, a delta save in a copy of the run "prepared" beside `run`.
    """
    if kind in small.DELTAS:
        shutil.copytree(run.with_name("prepared"), run, copy_function=os.link)
        _native.fault_arm(rule)
        ready()
        small.save_delta(run, kind)
        return
    ss.save(small.state(1), checkpoint_id=run / "previous")
    _native.fault_arm(rule)
    ready()
    if kind == "overwrite":
        ss.save(small.state(2), checkpoint_id=run / "previous", overwrite=True)
    elif kind == "async":
        ss.async_save(small.state(2), checkpoint_id=run / "next").result(60)
    else:
        ss.save(small.state(2), checkpoint_id=run / "next", codec="zstd" if kind == "zstd" else None)


def save_from_the_environment(rank: int, run: str) -> None:
    """SNAPSTONE_FAULT was armed when the extension was loaded."""
    ss.save(small.state(2), checkpoint_id=Path(run, "next"))


def killed_at_random(rank: int, run: str, seed: int, count: int) -> list[int]:
    """`count` processes that save in a loop, one after the other, each killed after a random time. Newest step that
    each of them acknowledged; -1 for none.
    """
    chosen = random.Random(seed)
    newest = []
    for number in range(count):
        directory, kind = Path(run, f"k{number}"), chosen.choice(["sync", "async", "overwrite"])
        pid, pipe = forked(lambda to, directory=directory, kind=kind: save_forever(directory, kind, to))
        acknowledged = b""
        end = None
        while select.select([pipe], [], [], None if end is None else max(0.0, end - time.monotonic()))[0]:
            acknowledged += os.read(pipe, 4096)
            end = end or time.monotonic() + chosen.uniform(0.0, 0.06)  # from the first on: a process takes its time
        os.kill(pid, signal.SIGKILL)
        while more := os.read(pipe, 4096):  # what it wrote before it died was said
            acknowledged += more
        os.close(pipe)
        assert how_it_ended(pid) == -signal.SIGKILL
        steps = [int(line) for line in acknowledged.split(b"\n")[:-1]]
        newest.append(steps[-1] if steps else -1)
    return newest


def save_forever(run: Path, kind: str, acknowledge_to: int) -> None:
    for step in range(100_000):
        if kind == "overwrite":
            ss.save(small.state(step), checkpoint_id=run / "last", step=step, overwrite=True)
        elif kind == "async":
            ss.async_save(small.state(step), checkpoint_id=run / f"step-{step}", step=step).result(60)
        else:
            ss.save(small.state(step), checkpoint_id=run / f"step-{step}", step=step)
        os.write(acknowledge_to, f"{step}\n".encode())


def save_slowly(rank: int, run: str) -> None:
    """Takes a second and a half between its last write and its commit."""
    _native.fault_arm("unlink:1:delay=1500")  # OWNER, which until then says that this boot's processes write here
    handle = ss.async_save(small.state(5), checkpoint_id=Path(run, "slow"))
    while not list(Path(run).glob(".staging-*/MANIFEST.xxh128")):
        time.sleep(0.005)
    announce("about to commit")
    handle.result(30)


def save_and_stop(rank: int, run: str) -> None:
    """Spends a minute just before its commit, so that it can be stopped and killed there."""
    _native.fault_arm("unlink:1:delay=60000")
    ss.async_save(small.state(6), checkpoint_id=Path(run, "stopped"))
    while not list(Path(run).glob(".staging-*/MANIFEST.xxh128")):
        time.sleep(0.005)
    announce("about to commit")
    time.sleep(60)
