"""Promise 2 on devices that fail, forget or have no room, and say so late or never.

Invariants:
  1. A failed fsync is never followed by a reported success: what a save acknowledged is whole after the device has been
     unmounted and mounted, whatever else failed meanwhile. The next save, to new files, works.
  2. With verify_after_save a device that forgets writes fails the save, on every rank, and nothing becomes visible;
     what is read back comes from the device and not from the page cache.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import snapstone as ss
from distributed import ranks
from durability import devices, small
from lacking import skip_without
from snapstone import _native
from snapstone.dcp import StorageWriter

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("small_chunks")]

RUNGS = ["buffered", "threads-direct", "uring"]
SAVES = 12
SAVES_MAX = 100
DATA_PERCENT = 10  # of the writes: of the saves, which make several each, about half


def use(monkeypatch: pytest.MonkeyPatch, where: Path, rung: str) -> None:
    if why := _native.try_rung(str(where), rung):
        pytest.skip(f"{rung}: {why}")
    monkeypatch.setenv("SNAPSTONE_IO", rung)


def save_often(run: Path, until_one_after_a_refusal: bool = False) -> tuple[list[int], dict[int, OSError]]:
    """The steps that were acknowledged, and the errors of the others; if asked for, more saves than `SAVES` until one
    has been acknowledged after another was not.
    """
    acknowledged: list[int] = []
    refused: dict[int, OSError] = {}
    for step in range(2, SAVES_MAX + 2):
        is_missing = until_one_after_a_refusal and not (acknowledged and refused and acknowledged[-1] > min(refused))
        if step >= SAVES + 2 and not is_missing:
            break
        try:
            ss.save(small.state(step), checkpoint_id=run / f"step-{step}")
            acknowledged.append(step)
        except OSError as error:
            refused[step] = error
    return acknowledged, refused


def assert_kept(mount: devices.Mount, acknowledged: list[int]) -> None:
    """What was acknowledged, from the device; whatever else is visible is whole, too, or, if the file system had to be
    repaired, said to be damaged. The next save works.
    """
    is_repaired = mount.again()
    run = mount.point / "run"
    visible = sorted(int(name.removeprefix("step-")) for name in os.listdir(run) if name.startswith("step-"))
    assert set(acknowledged) <= set(visible), (acknowledged, visible, is_repaired)
    for step in visible:
        if step in acknowledged or not is_repaired or ss.verify(run / f"step-{step}"):
            small.assert_holds(run / f"step-{step}", step)
    ss.save(small.state(99), checkpoint_id=run / "step-99")
    mount.again()
    small.assert_holds(run / "step-99", 99)
    small.reap_all(run)  # a staging directory whose OWNER the device has lost goes when it is old


@pytest.mark.parametrize("percent", [100, 15])
@pytest.mark.parametrize("rung", RUNGS)
def test_what_is_acknowledged_on_a_failing_device_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: str, percent: int
) -> None:
    devices.needed(devices.lacks_loop_devices, devices.lacks_network_disks)
    with devices.failing_disk(tmp_path, percent) as (mount, trigger):
        use(monkeypatch, mount.point, rung)
        run = mount.point / "run"
        ss.save(small.state(1), checkpoint_id=run / "step-1")
        trigger.touch()
        acknowledged, refused = save_often(run)
        assert refused, "the device failed, and nobody heard of it"
        assert {error.errno for error in refused.values()} <= {errno.EIO, errno.EROFS}
        assert percent < 100 or not acknowledged
        trigger.unlink()
        assert_kept(mount, [1, *acknowledged])


@pytest.mark.parametrize("rung", RUNGS)
def test_what_is_acknowledged_amid_failing_writes_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: str
) -> None:
    """Some saves meet a write that fails and some do not, in turn: a save after a refused one is acknowledged, too."""
    devices.needed(devices.lacks_loop_devices, devices.lacks_network_disks)
    with devices.failing_data_disk(tmp_path, DATA_PERCENT) as (mount, trigger):
        use(monkeypatch, mount.point, rung)
        run = mount.point / "run"
        ss.save(small.state(1), checkpoint_id=run / "step-1")
        trigger.touch()
        acknowledged, refused = save_often(run, until_one_after_a_refusal=True)
        assert refused, "writes failed, and nobody heard of it"
        assert {error.errno for error in refused.values()} <= {errno.EIO, errno.EROFS}
        assert acknowledged
        assert acknowledged[-1] > min(refused), "no save got through after one that was refused"
        trigger.unlink()
        assert_kept(mount, [1, *acknowledged])


@pytest.mark.parametrize("rung", RUNGS)
def test_what_is_acknowledged_on_a_device_that_runs_out_of_room_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: str
) -> None:
    """A sparse image on too small a disk: the file system has room, and its device has none."""
    devices.needed(devices.lacks_loop_devices)
    with devices.small_memory(tmp_path, 7 << 20) as memory:
        image = devices.make_image(memory / "image")
        filler = memory / "filler"
        with devices.mounted(tmp_path, image) as mount:
            use(monkeypatch, mount.point, rung)
            run = mount.point / "run"
            ss.save(small.state(1), checkpoint_id=run / "step-1")
            facts = os.statvfs(memory)
            filler.write_bytes(b"x" * max(0, facts.f_bavail * facts.f_bsize - (600 << 10)))
            acknowledged, refused = save_often(run)
            assert refused, "there was no room, and nobody heard of it"
            filler.unlink()
            assert_kept(mount, [1, *acknowledged])


@pytest.mark.parametrize("rung", RUNGS)
def test_a_device_that_forgets_is_found_out_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: str
) -> None:
    devices.needed(devices.lacks_loop_devices, devices.lacks_network_disks)
    with devices.forgetful_disk(tmp_path) as (mount, trigger):
        use(monkeypatch, mount.point, rung)
        run = mount.point / "run"
        first = ss.save(small.state(1), checkpoint_id=run / "first", verify_after_save=True)
        assert first.stats["read_back"]["bytes"] > 65536
        trigger.touch()
        ss.save(small.state(2), checkpoint_id=run / "trusting")
        with pytest.raises(ss.CorruptCheckpointError, match="read back") as caught:
            ss.save(small.state(3), checkpoint_id=run / "next", verify_after_save=True)
        assert caught.value.path is not None
        handle = ss.async_save(small.state(3), checkpoint_id=run / "next", verify_after_save=True)
        with pytest.raises(ss.CorruptCheckpointError, match="read back"):
            handle.result(30)
        assert sorted(os.listdir(run)) == ["first", "trusting"]
        assert small.load(run / "first") == small.bits(small.state(1))
        trigger.unlink()


def test_a_device_that_forgets_the_manifest_is_found_out_before_the_commit(tmp_path: Path) -> None:
    devices.needed(devices.lacks_loop_devices, devices.lacks_network_disks)
    with devices.forgetful_disk(tmp_path) as (mount, trigger):
        run = mount.point / "run"
        ss.save(small.state(1), checkpoint_id=run / "first")
        staging = _native.Staging.create(str(run), "a" * 32, [_native.boot_id()])
        trigger.touch()
        with pytest.raises(ss.CorruptCheckpointError, match="read back"):
            staging.commit(b"{}" * 100, b"0" * 32, "next", False, True)
        trigger.unlink()
        staging.discard()
        staging.close()
        assert os.listdir(run) == ["first"]


# Without such devices -------------------------------------------------------------------------------------------------


def lane() -> int:
    """The thread that writes data files, once a save has been made."""
    for task in os.listdir("/proc/self/task"):
        if Path(f"/proc/self/task/{task}/comm").read_text().strip() == "snapstone-0":
            return int(task)
    raise AssertionError("no lane")


def two_chunks(seed: int) -> dict[str, Any]:
    return {"weight": torch.randn(32_768, generator=torch.Generator().manual_seed(seed))}


def save_while_writes_get_lost(rank: int, run: str, log: str) -> list[str]:
    """Saves while the first write of the data file is acknowledged and not made; how each save ended."""
    os.environ |= {"SNAPSTONE_IO": "buffered", "SNAPSTONE_LANES": "1"}
    ss.save(two_chunks(1), checkpoint_id=Path(run, "first"), verify_after_save=True)
    ended = []
    for name, verify_after_save in (("trusting", False), ("next", True)):
        with devices.traced(lane(), "pwrite64:retval=65536:when=1", log=Path(log)):
            try:
                ss.save(two_chunks(2), checkpoint_id=Path(run, name), verify_after_save=verify_after_save)
                ended.append("saved")
            except ss.CorruptCheckpointError as error:
                ended.append(str(error))
    return ended


def test_a_lost_write_is_found_out_before_the_commit(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        skip_without("strace", "there is no strace")
    results = ranks.run_ranks(1, save_while_writes_get_lost, str(tmp_path / "run"), str(tmp_path / "log"), store="none")
    if results[0].outcome == "raised" and "does not run here" in str(results[0].error):
        skip_without("strace", "it cannot attach here")
    ((trusting, verified),) = ranks.values(results)
    assert "INJECTED" in (tmp_path / "log").read_text()
    assert trusting == "saved"
    assert not ss.verify(tmp_path / "run" / "trusting"), "a lost write, and nobody noticed"
    assert "it is not what was written" in verified
    assert "weight" in verified
    assert sorted(os.listdir(tmp_path / "run")) == ["first", "trusting"]


def save_through(engine: str, state: dict[str, Any], path: Path, verify_after_save: bool = True) -> None:
    if engine == "save":
        ss.save(state, checkpoint_id=path, verify_after_save=verify_after_save)
    else:
        dcp.save(state, storage_writer=StorageWriter(path, verify_after_save=verify_after_save))


def save_while_one_rank_loses_writes(rank: int, run: str, log: str, engine: str) -> list[Any]:
    """How a save that trusts the device and one that does not end on this rank: None, or (type, text, failed ranks)."""
    os.environ |= {"SNAPSTONE_IO": "buffered", "SNAPSTONE_LANES": "1"}
    state = {f"weight{rank}": two_chunks(rank)["weight"]}
    save_through(engine, state, Path(run, "first"))
    ended: list[Any] = []
    for name, verify_after_save in (("trusting", False), ("next", True)):
        loses = devices.traced(lane(), "pwrite64:retval=65536:when=1", log=Path(log)) if rank == 1 else nullcontext()
        try:
            with loses:
                save_through(engine, state, Path(run, name), verify_after_save)
            ended.append(None)
        except ss.CheckpointError as error:
            ended.append((type(error).__name__, str(error), getattr(error, "failed_ranks", None)))
        except CheckpointException as exception:  # of DCP, the same on every rank
            ((failed, (error, _)),) = exception.failures.items()
            ended.append((type(error).__name__, str(error), (failed,)))
    return ended


@pytest.mark.parametrize("engine", ["save", "dcp"])
def test_a_lost_write_of_one_rank_fails_the_save_on_all(tmp_path: Path, engine: str) -> None:
    if shutil.which("strace") is None:
        skip_without("strace", "there is no strace")
    run = tmp_path / "run"
    results = ranks.run_ranks(2, save_while_one_rank_loses_writes, str(run), str(tmp_path / "log"), engine)
    if any("does not run here" in str(one.error) for one in results):
        skip_without("strace", "it cannot attach here")
    (trusted, other), (also_trusted, own) = ranks.values(results)
    assert (trusted, also_trusted) == (None, None)
    assert not ss.verify(run / "trusting"), "a lost write, and nobody noticed"
    assert own[0] == "CorruptCheckpointError"
    assert "read back" in own[1]
    assert other[2] == (1,)
    assert other[0] == ("RankFailedError" if engine == "save" else own[0])
    assert "CorruptCheckpointError" in other[1] or engine == "dcp"
    assert sorted(name for name in os.listdir(run) if not name.startswith(".")) == ["first", "trusting"]
    assert ss.verify(run / "first")


@pytest.mark.parametrize("rung", small.RUNGS)
@pytest.mark.parametrize("codec", [None, "zstd", "xor-zstd"])
def test_what_is_read_back_is_what_this_save_wrote(use_rung: Any, rung: str, codec: str | None) -> None:
    run = use_rung(rung) / "run"
    options = {"codec": codec, "verify_after_save": True}
    whole = ss.save(small.layers(small.ORIGIN), checkpoint_id=run / "origin", **options)
    delta = ss.save(small.layers("11211"), checkpoint_id=run / "delta", base=run / "origin", **options)
    small.assert_holds(run / "origin", small.ORIGIN)
    small.assert_holds(run / "delta", "11211")
    assert delta.stats["unchanged_chunks"] >= 3
    read, written = (
        [one.stats["read_back"]["bytes"] for one in (whole, delta)],
        [
            sum(file.stat().st_size for file in (run / name).glob("rank-*") if file.is_file())
            for name in ("origin", "delta")
        ],
    )
    assert read == written, "its own files, and not those that it shares"
