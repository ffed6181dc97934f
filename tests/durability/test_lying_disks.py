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
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from distributed import ranks
from durability import devices, small
from snapstone import _native

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("small_chunks")]

RUNGS = ["buffered", "threads-direct", "uring"]
SAVES = 12


def use(monkeypatch: pytest.MonkeyPatch, where: Path, rung: str) -> None:
    if why := _native.try_rung(str(where), rung):
        pytest.skip(f"{rung}: {why}")
    monkeypatch.setenv("SNAPSTONE_IO", rung)


def save_until_refused(run: Path) -> tuple[list[int], list[OSError]]:
    """The steps that were acknowledged, and the errors of the others."""
    acknowledged, refused = [], []
    for step in range(2, SAVES + 2):
        try:
            ss.save(small.state(step), checkpoint_id=run / f"step-{step}")
            acknowledged.append(step)
        except OSError as error:
            refused.append(error)
    return acknowledged, refused


def assert_kept(mount: devices.Mount, acknowledged: list[int]) -> None:
    """What was acknowledged, from the device; whatever else is visible is whole, too. The next save works."""
    mount.again()
    run = mount.point / "run"
    visible = sorted(int(name.removeprefix("step-")) for name in os.listdir(run) if name.startswith("step-"))
    assert set(acknowledged) <= set(visible)
    for step in visible:
        small.assert_holds(run / f"step-{step}", step)
    ss.save(small.state(99), checkpoint_id=run / "step-99")
    mount.again()
    small.assert_holds(run / "step-99", 99)
    assert small.leftovers(run) == []


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
        acknowledged, refused = save_until_refused(run)
        assert refused, "the device failed, and nobody heard of it"
        assert {error.errno for error in refused} <= {errno.EIO, errno.EROFS}
        assert percent < 100 or not acknowledged
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
            acknowledged, refused = save_until_refused(run)
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
        pytest.skip("there is no strace")
    results = ranks.run_ranks(1, save_while_writes_get_lost, str(tmp_path / "run"), str(tmp_path / "log"), store="none")
    if results[0].outcome == "raised" and "does not run here" in str(results[0].error):
        pytest.skip("strace cannot attach here")
    ((trusting, verified),) = ranks.values(results)
    assert "INJECTED" in (tmp_path / "log").read_text()
    assert trusting == "saved"
    assert not ss.verify(tmp_path / "run" / "trusting"), "a lost write, and nobody noticed"
    assert "it is not what was written" in verified
    assert "weight" in verified
    assert sorted(os.listdir(tmp_path / "run")) == ["first", "trusting"]


def save_while_one_rank_loses_writes(rank: int, run: str, log: str) -> Any:
    os.environ |= {"SNAPSTONE_IO": "buffered", "SNAPSTONE_LANES": "1"}
    state = {f"weight{rank}": two_chunks(rank)["weight"]}
    ss.save(state, checkpoint_id=Path(run, "first"), verify_after_save=True)
    try:
        if rank == 1:
            with devices.traced(lane(), "pwrite64:retval=65536:when=1", log=Path(log)):
                ss.save(state, checkpoint_id=Path(run, "next"), verify_after_save=True)
        else:
            ss.save(state, checkpoint_id=Path(run, "next"), verify_after_save=True)
    except ss.CheckpointError as error:
        return type(error).__name__, str(error), getattr(error, "failed_ranks", None)
    return None


def test_a_lost_write_of_one_rank_fails_the_save_on_all(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    results = ranks.run_ranks(2, save_while_one_rank_loses_writes, str(tmp_path / "run"), str(tmp_path / "log"))
    if any("does not run here" in str(one.error) for one in results):
        pytest.skip("strace cannot attach here")
    other, own = ranks.values(results)
    assert own is not None
    assert own[0] == "CorruptCheckpointError"
    assert (other[0], other[2]) == ("RankFailedError", (1,))
    assert "CorruptCheckpointError" in other[1]
    assert os.listdir(tmp_path / "run") == ["first"]


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
