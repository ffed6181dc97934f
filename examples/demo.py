"""Kill a training run in the middle of a save, resume it, and compare every bit with a run that was never killed.

Two processes train a small GPT, sharded with FSDP, and save every few steps while training goes on:

1. reference   a run that nobody disturbs
2. kill        the same run again; both processes get SIGKILL while a save is in progress
3. resume      two new processes continue from the newest valid checkpoint; every loss and weight must equal the
               reference's
4. reshard     one process loads what two processes saved, and writes some text
5. table       the same larger state saved and loaded by snapstone and by torch.distributed.checkpoint

With `--engine snapstone.dcp` every save and load is a call of torch.distributed.checkpoint on snapstone's storage.

Needs 2 cores and about 1 GB of disk. Exits with 1 when any check fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from backends import ENGINES, Engine, directory_bytes, newest_valid
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scale import SCALES, Scale
from workers import WorkerFailed, Workers

WORLD_SIZE = 2
KILL_ATTEMPTS = 5
KILL_AT_SHARE = 0.1  # of a checkpoint's bytes, in the files of the save that is killed
PHASE_TIMEOUT_S = 300.0
POLL_S = 0.0005
MARKER = ".snapstone-demo"  # a directory without it is not ours to wipe

Losses = dict[int, list[str]]  # step -> each rank's loss as float.hex()


class CheckFailed(RuntimeError):
    """The demo cannot go on; checks that only failed are in the report."""


@dataclass
class Report:
    """What was measured and found; report.json holds all of it."""

    engine: str
    scale: str
    checks: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    table: dict[str, list[dict[str, float]]] = field(default_factory=dict)


class Demo:
    def __init__(self, directory: Path, engine: Engine, scale_name: str, console: Console) -> None:
        self.directory = directory
        self.engine = engine
        self.scale: Scale = SCALES[scale_name]
        self.console = console
        self.report = Report(engine.name, scale_name)
        self.common = {"engine": engine.name, "scale": scale_name}
        self.logs = directory / "logs"
        self.logs.mkdir()

    def run(self) -> None:
        self.heading("1. reference: two processes train and save, undisturbed")
        reference = self.train_reference()
        self.heading("2. kill: the same run, both processes killed during a save")
        newest = self.kill_during_save(reference)
        self.heading(f"3. resume: two new processes continue from {newest.name}")
        self.resume(newest, reference)
        self.heading("4. reshard: one process loads the two-process checkpoint")
        self.sample()
        self.heading("5. table: one larger sharded state, each engine in turns")
        self.compare()

    # Phases -----------------------------------------------------------------------------------------------------------

    def train_reference(self) -> Losses:
        run = self.new_run("reference")
        started = time.monotonic()
        with Workers("train.py", {"run": run, **self.common}, log=self.logs / "reference") as workers:
            workers.wait(PHASE_TIMEOUT_S)
        losses = read_losses(self.logs / "reference")
        self.check("the reference run logged every step", sorted(losses) == list(range(1, self.scale.steps + 1)))
        saved = [path.name for path in sorted(run.glob("step-*")) if self.engine.problem(path) is None]
        self.check("every save of it is valid", len(saved) == self.scale.steps // self.scale.save_every)
        stalls = [save["call_s"] + save.get("hook_s", 0.0) for save in self.facts_of("reference")["saves"]]
        self.say(
            f"{self.scale.steps} steps and {len(saved)} saves of {megabytes(run / saved[-1])} in "
            f"{time.monotonic() - started:.1f} s; loss {mean_loss(losses, 1):.3f} -> "
            f"{mean_loss(losses, self.scale.steps):.3f} nats/byte; a save blocked training for "
            f"{1e3 * median(stalls):.1f} ms (median)"
        )
        return losses

    def kill_during_save(self, reference: Losses) -> Path:
        """Leaves a run with a half-written save; returns the checkpoint to resume from."""
        for attempt in range(1, KILL_ATTEMPTS + 1):
            run = self.new_run("killed")
            with Workers("train.py", {"run": run, **self.common}, log=self.logs / "killed") as workers:
                self.await_save(workers, run)
                signals = workers.kill()
            leftovers = self.engine.unfinished(run)
            if leftovers and signals == [9] * WORLD_SIZE:
                break
            self.say(f"attempt {attempt}: the save was over before the kill arrived; again")
        else:
            raise CheckFailed(f"{KILL_ATTEMPTS} kills all missed the save")
        newest = newest_valid(self.engine, run)
        if newest is None:
            raise CheckFailed("no valid checkpoint survived the kill")

        losses = read_losses(self.logs / "killed")
        step, killed_step = step_of(newest), max(losses)
        self.report.facts |= {"kill_attempts": attempt, "killed_at_step": killed_step, "resumed_from_step": step}
        self.report.facts["leftovers"] = [path.name for path in leftovers]
        self.show_disk(run, leftovers)
        self.say(f"both got SIGKILL after step {killed_step}; newest valid checkpoint: {newest.name}")
        # One step of slack: a rank may die before it logs the loss of the step that its peer already saves.
        self.check("the kill hit a save in progress", step + self.scale.save_every <= killed_step + 1)
        self.check("the half-written save is refused", all(self.engine.problem(path) for path in leftovers))
        self.check("earlier checkpoints are untouched", all(
            self.engine.problem(path) is None for path in run.glob("step-*") if step_of(path) <= step
        ))  # fmt: skip
        self.check("up to the kill its losses equal the reference's", is_part_of(losses, reference))
        return newest

    def resume(self, newest: Path, reference: Losses) -> None:
        run = newest.parent
        options = {"run": run, "resume": newest, **self.common}
        with Workers("train.py", options, log=self.logs / "resumed") as workers:
            workers.wait(PHASE_TIMEOUT_S)
        losses = read_losses(self.logs / "resumed")
        if not self.engine.unfinished(run):
            self.say("the saves of the resumed run removed what the kill had left")
        wanted = list(range(step_of(newest) + 1, self.scale.steps + 1))
        self.check("it continued at the next step", sorted(losses) == wanted)
        same = sum(losses[step] == reference[step] for step in losses)
        self.check("its losses equal the reference's, bit for bit", is_part_of(losses, reference))
        facts = [self.facts_of(name) for name in ("reference", "resumed")]
        shards = [
            [self.facts_of(name, rank)["shards"] for rank in range(WORLD_SIZE)] for name in ("reference", "resumed")
        ]
        self.check("weights and Adam state of each rank equal the reference's", shards[0] == shards[1])
        self.check("so do the whole weights", facts[0]["weights"] == facts[1]["weights"])
        last = [losses[self.scale.steps][0], reference[self.scale.steps][0]]
        self.say(
            f"steps {wanted[0]} to {wanted[-1]}: {same} of {len(wanted)} losses on {WORLD_SIZE} ranks equal; the last "
            f"on rank 0: {last[0]}, reference {last[1]}"
        )
        self.say(f"weights sha256 {facts[1]['weights'][:16]}, reference {facts[0]['weights'][:16]}")
        self.report.facts |= {"compared_steps": same, "weights": facts[1]["weights"]}

    def sample(self) -> None:
        final = self.directory / "killed" / f"step-{self.scale.steps:08d}"
        options = {"checkpoint": final, **self.common}
        with Workers("sample.py", options, log=self.logs / "sample", world_size=1) as workers:
            workers.wait(PHASE_TIMEOUT_S)
        facts = self.facts_of("sample")
        self.check("one process got the same weights", facts["weights"] == self.facts_of("reference")["weights"])
        self.say(f"{facts['parameters']:,} parameters of {final.name} in {1e3 * facts['load_s']:.0f} ms; it writes:")
        for line in printable(facts["text"]).splitlines():
            self.say(f"  | {line.rstrip()}")
        self.report.facts["sample"] = facts["text"]

    def compare(self) -> None:
        names = list(dict.fromkeys([self.engine.name, "dcp"]))
        options = {"run": self.new_run("compared"), "engines": ",".join(names), "scale": self.report.scale}
        with Workers("compare.py", options, log=self.logs / "compared") as workers:
            workers.wait(PHASE_TIMEOUT_S)
        self.report.table = self.facts_of("compared")
        self.check("the table has every round of every engine", all(
            len(self.report.table[name]) == self.scale.compared_rounds for name in names
        ))  # fmt: skip
        self.console.print(render(self.report.table))

    # Steps of phases --------------------------------------------------------------------------------------------------

    def await_save(self, workers: Workers, run: Path) -> None:
        """Returns in the middle of a save: part of it is in its files, and a late enough checkpoint is committed."""
        end = time.monotonic() + PHASE_TIMEOUT_S
        while workers.check():
            unfinished = self.engine.unfinished(run)
            if unfinished:
                committed = [path for path in run.glob("step-*") if path not in unfinished]
                if committed and step_of(max(committed)) >= self.scale.kill_after:
                    enough = KILL_AT_SHARE * directory_bytes(max(committed))
                    if any(directory_bytes(path) >= enough for path in unfinished):
                        return
            if time.monotonic() > end:
                break
            time.sleep(POLL_S)
        raise CheckFailed("the run to be killed ended without a save that could be caught")

    def show_disk(self, run: Path, leftovers: list[Path]) -> None:
        for path in sorted(path for path in run.iterdir() if path.is_dir()):
            problem = self.engine.problem(path)
            verdict = (
                "[green]valid[/]" if problem is None else f"[yellow]left by the kill, refused: {escape(problem)}[/]"
            )
            self.console.print(f"    {path.name:<52} {megabytes(path):>8}  {verdict}", highlight=False)

    def new_run(self, name: str) -> Path:
        run = self.directory / name
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        return run

    def facts_of(self, log: str, rank: int = 0) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.logs / f"{log}.rank-{rank}.json").read_text())
        return facts

    # Output -----------------------------------------------------------------------------------------------------------

    def heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/]", highlight=False)

    def say(self, text: str) -> None:
        self.console.print(f"  {escape(text)}", highlight=False, soft_wrap=True)

    def check(self, promise: str, kept: bool) -> None:
        self.report.checks[promise] = kept
        self.console.print(f"  {'[green]ok[/]  ' if kept else '[red]FAIL[/]'} {promise}", highlight=False)


def read_losses(log: Path) -> Losses:
    """Steps that every rank logged; a kill may leave the last line of a rank unwritten."""
    ranks: list[dict[int, str]] = []
    for rank in range(WORLD_SIZE):
        lines = Path(f"{log}.rank-{rank}.losses").read_text().split("\n")[:-1]
        ranks.append({int(step): loss for step, loss in (line.split() for line in lines)})
    return {step: [rank[step] for rank in ranks] for step in ranks[0] if all(step in rank for rank in ranks)}


def is_part_of(losses: Losses, reference: Losses) -> bool:
    """Whether there are losses and each is, as exact text, the reference's of that step."""
    return bool(losses) and all(reference.get(step) == values for step, values in losses.items())


def mean_loss(losses: Losses, step: int) -> float:
    return sum(map(float.fromhex, losses[step])) / WORLD_SIZE


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def megabytes(path: Path) -> str:
    return f"{directory_bytes(path) / 1e6:.1f} MB"


def printable(text: str) -> str:
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{MIDDLE DOT}" for character in text
    )


def render(measured: dict[str, list[dict[str, float]]]) -> Table:
    rounds = [one for rounds in measured.values() for one in rounds]
    plain = median(one["plain_step_s"] for one in rounds)
    size = median(one["stored_bytes"] for one in rounds)
    count = len(next(iter(measured.values())))
    table = Table(
        caption=f"{size / 1e6:.0f} MB of weights and Adam state on {WORLD_SIZE} ranks; median (min to max) of {count}, "
        f"slowest rank; a step without a save takes {plain:.2f} s. dcp: torch.distributed.checkpoint, its defaults, "
        "plus the fsync of its metadata and directories.",
        caption_justify="left",
    )
    table.add_column("engine")
    columns = {
        "stall_s": "training\nblocked, ms",
        "step_s": "step during\nthe save, s",
        "async_durable_s": "async_save\nto durable, s",
        "save_durable_s": "save to\ndurable, s",
        "load_s": "load,\ncold, s",
    }
    for title in columns.values():
        table.add_column(title, justify="right")
    for engine, times in measured.items():
        cells = []
        for name in columns:
            factor, digits = (1e3, 1) if name == "stall_s" else (1.0, 2)
            values = [factor * one[name] for one in times]
            cells.append(f"{median(values):.{digits}f}\n({min(values):.{digits}f} to {max(values):.{digits}f})")
        table.add_row(engine, *cells)
    return table


def prepare_directory(directory: Path) -> None:
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).exists():
        raise SystemExit(f"{directory} is not empty and was not made by this demo; name another with --directory")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARKER).touch()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("demo-run"), help="wiped at start (default: ./demo-run)")
    parser.add_argument("--engine", choices=ENGINES, default="snapstone", help="what saves and resumes the run")
    parser.add_argument("--scale", choices=SCALES, default="full")
    options = parser.parse_args()
    started = time.monotonic()
    directory = options.directory.resolve()
    prepare_directory(directory)
    console = Console(width=None if sys.stdout.isatty() else 120)
    demo = Demo(directory, ENGINES[options.engine](), options.scale, console)
    failure = ""
    try:
        demo.run()
    except (CheckFailed, WorkerFailed) as error:
        failure = str(error)
    (directory / "report.json").write_text(json.dumps(asdict(demo.report) | {"failure": failure}, indent=1))

    broken = [promise for promise, kept in demo.report.checks.items() if not kept]
    seconds = time.monotonic() - started
    if failure or broken:
        console.print(
            f"\n[red bold]failed after {seconds:.0f} s[/]", escape(failure or "; ".join(broken)), highlight=False
        )
        return 1
    console.print(f"\n[green bold]all {len(demo.report.checks)} checks passed[/] in {seconds:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
