"""Runs the work of `same_files` in a process of its own, so that what one knows of rungs is not what another found."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

from distributed import ranks
from rungs import refusals, same_files
from rungs.same_files import Work


def run_work(
    rung: str | None,
    write_to: Path,
    read_from: Path,
    *,
    calls: Mapping[str, int] | None = None,
    memlock_nbytes: int | None = None,
    uid: int | None = None,
) -> Work:
    """With a rung forced or the best that works; `calls` are refused (`refusals.refuse_calls`), as this user."""
    forced = {} if rung is None else {"SNAPSTONE_IO": rung}
    arguments = (str(write_to), str(read_from), dict(calls or {}), memlock_nbytes, uid)
    (done,) = ranks.values(ranks.run_ranks(1, _work_in_rank, *arguments, store="none", env=forced, timeout=90))
    assert isinstance(done, Work)
    assert done.loudest <= logging.WARNING, done.said
    return done


def _work_in_rank(
    rank: int, write_to: str, read_from: str, calls: dict[str, int], memlock_nbytes: int | None, uid: int | None
) -> Work:
    if memlock_nbytes is not None:
        refusals.limit_locked_memory(memlock_nbytes)
    if uid is not None:
        return _work_as(uid, write_to, read_from)
    if calls:
        refusals.refuse_calls(calls)
    return same_files.work(write_to, read_from)


def _work_as(uid: int, write_to: str, read_from: str) -> Work:
    """In a child, since this process imports first all that it takes: the interpreter may be closed to others."""
    with tempfile.TemporaryDirectory() as directory:
        same_files.work(directory, directory)
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        try:
            refusals.become(uid)
            os.write(write_end, pickle.dumps(same_files.work(write_to, read_from)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        done = pickle.load(pipe)
    os.wait()
    assert isinstance(done, Work)
    return done
