"""Promise 6 on a real network: each rank in a network namespace of its own, and a link cut in mid-step.

Invariants: every rank ends by `LATE_S` after its deadline with a typed error that names a rank, or in success; never a
success beside a visible nothing, nor a failure beside a visible checkpoint; when the link is back, the next save of a
new job works and removes what was left.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_states import attempt, hidden

from durability.counted import count
from lacking import skip_without

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 4.0
LATE_S = 10.0  # past it, on a machine that is busy with other work; test_dying_ranks.py asks for less
START_S = 60.0
RANKS = 3
PREFIX = f"sn{os.getpid() % 100000}"
CUTS = {
    "link down": (["link", "set", "eth0", "down"], ["link", "set", "eth0", "up"]),
    "blackhole": (["route", "add", "blackhole", "10.99.7.0/25"], ["route", "del", "blackhole", "10.99.7.0/25"]),
}
PLACES = [
    ("save", "commit", "link down", 0),
    ("scatter", "transfer", "blackhole", 1),
    ("save", "plan", "link down", 1),
    ("save", "written", "blackhole", 2),
    ("broadcast", "transfer", "link down", 0),
]
ALL = os.environ.get("SNAPSTONE_TEST_CUTS") == "all"


def _ip(*arguments: str, check: bool = True) -> bool:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr}")
    return done.returncode == 0


def _remove() -> None:
    for rank in range(RANKS):
        _ip("link", "del", f"{PREFIX}v{rank}", check=False)  # else it goes some time after its namespace
        _ip("netns", "del", f"{PREFIX}r{rank}", check=False)
    _ip("link", "del", f"{PREFIX}b", check=False)


@pytest.fixture
def network() -> Iterator[None]:
    """A namespace for each rank, with an address on one bridge that belongs to no one else."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        skip_without("network_namespaces", "they need root and `ip` of iproute2")
    try:
        _ip("link", "add", f"{PREFIX}b", "type", "bridge")
        _ip("link", "set", f"{PREFIX}b", "up")
        for rank in range(RANKS):
            name, outer = f"{PREFIX}r{rank}", f"{PREFIX}v{rank}"
            _ip("netns", "add", name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outer, "master", f"{PREFIX}b", "up")
            _ip("-n", name, "addr", "add", f"10.99.7.{rank + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
    except OSError as refused:
        _remove()
        skip_without("network_namespaces", str(refused))
    yield
    _remove()


class Job:
    """One process per rank, each in its namespace; they talk to the test through files in `directory`."""

    def __init__(self, directory: Path, operation: str, where: str) -> None:
        self.directory = directory
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests"), str(Path(__file__).parent)]),
            "GLOO_SOCKET_IFNAME": "eth0",
            "SNAPSTONE_STATUS_DIR": "",
            "OMP_NUM_THREADS": "1",
        }
        self.processes = []
        for rank in range(RANKS):
            command = [sys.executable, __file__, str(rank), str(directory), operation, where]
            with open(directory / f"output-{rank}", "w") as output:
                inside = ["ip", "netns", "exec", f"{PREFIX}r{rank}", *command]
                self.processes.append(subprocess.Popen(inside, env=env, stdout=output, stderr=subprocess.STDOUT))

    def wait_for(self, mark: str) -> None:
        end = time.monotonic() + START_S
        while not (self.directory / mark).exists():
            if time.monotonic() > end or any(process.poll() for process in self.processes):
                raise AssertionError(f"{mark} never came: {self.output()}")
            time.sleep(0.01)

    def ended(self) -> list[dict[str, Any]]:
        for rank in range(RANKS):
            self.wait_for(f"ended-{rank}")
        return [eval((self.directory / f"ended-{rank}").read_text()) for rank in range(RANKS)]

    def output(self) -> str:
        return "".join((self.directory / f"output-{rank}").read_text()[-1500:] for rank in range(RANKS))

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("operation", "where", "cut", "victim"), PLACES if ALL else PLACES[:2])
def test_a_cut_link_ends_in_one_outcome_and_the_next_save_works(
    network: None, tmp_path: Path, operation: str, where: str, cut: str, victim: int
) -> None:
    down, up = CUTS[cut]
    run = tmp_path / "run"
    job = Job(_fresh(tmp_path / "job"), operation, f"{where}:{victim}")
    try:
        job.wait_for("there")
        _ip("-n", f"{PREFIX}r{victim}", *down)
        count("cut links")
        (job.directory / "go").touch()
        ended = job.ended()
    finally:
        job.end()
    _ip("-n", f"{PREFIX}r{victim}", *up, check=False)
    for rank, one in enumerate(ended):
        assert one["seconds"] < TIMEOUT_S + LATE_S, (rank, one)
        assert one["error"] is None or one["failed_ranks"] or one["error"] == "CheckpointError", (rank, one)
    errors = {one["error"] for one in ended}
    if operation == "save":
        assert (errors == {None}) == (run / "step-2").exists(), ended
        assert None not in errors or errors == {None}, ended
    else:
        assert None not in errors, ended
    for rank, one in enumerate(ended):
        assert rank == victim or one["error"] is None or victim in one["failed_ranks"], (rank, one)
    again = Job(_fresh(tmp_path / "again"), "save", "nowhere:0")
    try:
        assert [one["error"] for one in again.ended()] == [None] * RANKS, again.output()
    finally:
        again.end()
    assert hidden(run) == []


def _fresh(directory: Path) -> Path:
    directory.mkdir()
    return directory


# ---- inside a namespace


def _rank(rank: int, directory: Path, operation: str, where: str) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    import snapstone as ss
    from snapstone import collective, fabric, outcome

    store = dist.TCPStore("10.99.7.1", 29500, RANKS, rank == 0, timedelta(seconds=60), wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    name, _, victim = where.partition(":")
    run = directory.parent / "run"
    state = {"w": torch.arange(1 << 20, dtype=torch.float32), f"own.{rank}": torch.ones(1000)}
    seen = False

    def reached(here: str) -> None:
        """The victim waits here until its link is cut; the others go on."""
        nonlocal seen
        if here == name and rank == int(victim) and not seen and armed:
            seen = True
            (directory / "there").touch()
            while not (directory / "go").exists():
                time.sleep(0.005)

    def watched(place: Any, method: str, at: Any) -> None:
        original = getattr(place, method)

        def instead(self: Any, *arguments: Any, **named: Any) -> Any:
            reached(at(arguments))
            return original(self, *arguments, **named)

        setattr(place, method, instead)

    watched(collective.Channel, "vote", lambda arguments: arguments[0])
    watched(outcome.Outcome, "commit", lambda _: "commit")
    watched(fabric.Fabric, "transfer", lambda _: "transfer")
    armed = False
    os.environ["SNAPSTONE_NODE"] = f"node-{rank}"
    if operation != "save":
        ss.save(state, checkpoint_id=run / "step-1", timeout=60)
    dist.barrier()
    armed = True
    if operation == "save":
        step = "step-2" if name != "nowhere" else "step-3"
        ended = attempt(lambda: ss.save(state, checkpoint_id=run / step, timeout=TIMEOUT_S))
    else:
        blank = {key: torch.zeros_like(value) for key, value in state.items()}
        options: Any = {"strategy": operation, "timeout": TIMEOUT_S}
        ended = attempt(lambda: ss.load(blank, checkpoint_id=run / "step-1", **options))
    new = directory / f"new-{rank}"
    new.write_text(repr(ended))
    new.rename(directory / f"ended-{rank}")
    time.sleep(60.0)  # the store of rank 0 stays; the test ends the process


if __name__ == "__main__":
    _rank(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
