"""`python -m crash explore [--states N] [--seed S] [--json DIRECTORY] [--go-on]`: crash states by the million.
`python -m crash replay RECORDING CUT:STATE [--keep DIRECTORY]`: one state again, from the text that a failure printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from pathlib import Path

import machine

from crash.explore import Explorer, Found, Recording
from crash.judge import materialise
from crash.recorder import record
from crash.scenarios import SCENARIOS

RECOVER_EVERY = 40
DRAWS = 100  # at each cut of one recording


def explore(states: int, seed: int, directory: Path | None, command: list[str], go_on: Path | None = None) -> int:
    """Rounds over all scenarios, each recorded anew and with other seeds, until so many states have been judged.

    `go_on`: the document of an earlier run, whose rounds count.
    """
    total, rounds, begin = Found(), 0, time.monotonic()
    of_scenario = {scenario.name: Found() for scenario in SCENARIOS}
    if go_on is not None:
        before = json.loads(go_on.read_text())
        total, seed, rounds = Found(**before["total"]), before["seed"], before["rounds"] + 1
        of_scenario |= {name: Found(**found) for name, found in before["scenarios"].items()}
        begin -= before["seconds"]
    while total.states + total.recovery_states < states and not total.violations:
        for scenario in SCENARIOS:
            with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as scratch:
                recording = record(scenario, Path(scratch))
                explorer = Explorer(
                    recording, Path(scratch), draws=DRAWS, seed=seed + rounds * 1_000_000, recover_every=RECOVER_EVERY
                )
                found = explorer.run()
            of_scenario[scenario.name].add(found)
            total.add(found)
            if found.violations:
                kept = Path(f"crash-{scenario.name}-{seed}.recording")
                kept.write_bytes(pickle.dumps(recording))
                print("\n".join(found.violations), f"replay: python -m crash replay {kept} CUT:STATE", sep="\n")
            if directory is not None:  # each time, so that a run that is stopped has said how far it got
                _write(directory, command, seed, rounds, total, of_scenario, time.monotonic() - begin)
        rounds += 1
        judged = total.states + total.recovery_states
        print(f"seed {seed}, round {rounds}: {judged} states, {total.violations}", flush=True)
    return 1 if total.violations else 0


def _write(
    directory: Path,
    command: list[str],
    seed: int,
    rounds: int,
    total: Found,
    of_scenario: dict[str, Found],
    seconds: float,
) -> None:
    document = {
        "theme": "crash",
        "date": f"{datetime.date.today()}",
        "command": " ".join(command),
        "machine": machine.facts(),
        "seed": seed,
        "rounds": rounds,
        "seconds": round(seconds, 1),
        "states": total.states + total.recovery_states,
        "total": vars(total),
        "scenarios": {key: vars(found) for key, found in of_scenario.items()},
    }
    path = directory / f"crash_{machine.cpu_slug()}_{datetime.date.today():%Y%m%d}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")


def replay(path: Path, place: str, keep: Path | None) -> int:
    recording: Recording = pickle.loads(path.read_bytes())
    cut, text = place.removeprefix(f"{recording.name}:").split("/")[0].split(":", 1)
    with tempfile.TemporaryDirectory() as scratch:
        tree, trouble = Explorer(recording, Path(scratch), draws=0, seed=0).replay(int(cut), text.split(": ")[0])
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
        materialise(tree, recording.world.contents, keep)
    before = recording.ops[max(0, int(cut) - 1)]
    print(f"{recording.name}, after operation {cut} ({before._replace(data=b'')}): {trouble or 'nothing is wrong'}")
    return 1 if trouble else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m crash")
    verbs = parser.add_subparsers(dest="verb", required=True)
    exploring = verbs.add_parser("explore")
    exploring.add_argument("--states", type=int, default=1_000_000)
    exploring.add_argument("--seed", type=int, default=1)
    exploring.add_argument("--json", type=Path)
    exploring.add_argument("--go-on", type=Path, help="a document that `--json` wrote: its rounds are not repeated")
    replaying = verbs.add_parser("replay")
    replaying.add_argument("recording", type=Path)
    replaying.add_argument("state")
    replaying.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "replay":
        return replay(arguments.recording, arguments.state, arguments.keep)
    command = ["make crash", f"# --states {arguments.states} --seed {arguments.seed}"]
    if arguments.go_on is not None:
        command.append("--go-on")
    return explore(arguments.states, arguments.seed, arguments.json, command, arguments.go_on)


if __name__ == "__main__":
    sys.exit(main())
