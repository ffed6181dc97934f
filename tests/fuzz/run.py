"""One target, for so many seconds: with atheris, which follows coverage, or without it with random bytes, and with
random changes of what was found before.

python tests/fuzz/run.py TARGET SECONDS CORPUS FINDINGS

TARGET is a name in `targets`, or module:function. One process runs the inputs, and another sees to it that each comes
to an end (see `limits`). An input that breaks something is saved in FINDINGS, its path is printed, and the end is 1.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from fuzz import limits  # noqa: E402
from fuzz.limits import BYTES_MAX, Hand, Limited, Target  # noqa: E402

try:
    import atheris
except ImportError:
    atheris = None

FOUND_BEFORE = Path(__file__).resolve().with_name("corpus")
PR_SET_PDEATHSIG = 1
TRACE_SECONDS = 1.0
LOOK_SECONDS = 0.05


def target_of(name: str) -> Target:
    module, _, function = name.partition(":")
    if function:
        found: Target = getattr(importlib.import_module(module), function)
        return found
    from fuzz.targets import TARGETS

    return TARGETS[name]


def made_up(chance: random.Random, known: list[bytes]) -> bytes:
    """Random bytes, or one of four times an input that is known with some of its bytes changed."""
    if not known or chance.randrange(4):
        return chance.randbytes(chance.randrange(4, BYTES_MAX))
    changed = bytearray(chance.choice(known))
    for _ in range(chance.randrange(1, 8)):
        at = chance.randrange(len(changed) + 1)
        changed[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    return bytes(changed[:BYTES_MAX])


def run_randomly(given: argparse.Namespace, hand: Hand) -> None:
    target = target_of(given.target)
    target(bytes(64))  # what is made once, and imported late
    limited = Limited(given.target, target, hand, given.findings, limits.cpu_seconds_max(given.target))
    folders = (FOUND_BEFORE / given.target, given.corpus)
    known = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*")) if path.is_file()]
    for data in known:
        limited(data)
    chance, begin = random.Random(), time.monotonic()
    while time.monotonic() - begin < given.seconds:
        limited(made_up(chance, known))


def run_atheris(given: argparse.Namespace, hand: Hand) -> None:
    import torch  # noqa: F401  imported before the hook, so that torch itself is not followed

    with atheris.instrument_imports(include=["snapstone"]):
        target = target_of(given.target)
    target(bytes(64))
    seconds_max = limits.INSTRUMENTED * limits.cpu_seconds_max(given.target)
    limited = Limited(given.target, target, hand, given.findings, seconds_max)
    # -timeout and -rss_limit_mb are out of the way: `limits` finds both, input by input.
    options = [f"-max_total_time={given.seconds:.0f}", f"-max_len={BYTES_MAX}", "-timeout=600", "-rss_limit_mb=0"]
    folders = [str(folder) for folder in (given.corpus, FOUND_BEFORE / given.target) if folder.is_dir()]
    # The input is saved by `limits`, and need not be once more.
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", "-exact_artifact_path=/dev/null", *folders], limited)
    atheris.Fuzz()


def work(given: argparse.Namespace, hand: Hand, parent: int) -> None:
    """In the process that may be killed; it does not outlive the other one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    (run_randomly if atheris is None else run_atheris)(given, hand)


def is_too_long(child: int, hand: Hand, given: argparse.Namespace) -> str:
    """Why the input in hand has to be ended; "" as long as it may go on."""
    executions, begin, cpu_begin, data = hand.seen()
    if data is None:
        return ""
    cpu, seconds = limits.cpu_seconds(child) - cpu_begin, time.monotonic() - begin
    # This process may have waited for its turn while the other went on to the next inputs.
    if hand.seen()[0] != executions:
        return ""
    if cpu > given.hang_cpu_seconds:
        return f"it has taken {cpu:.1f} s of CPU, and goes on"
    if seconds > given.wall_seconds:
        return f"it has taken {seconds:.1f} s, but {cpu:.1f} s of CPU, and sleeps on"
    return ""


def watch(child: int, given: argparse.Namespace, hand: Hand) -> int:
    """Until the child has ended: 0 if it found nothing."""
    why = ""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if why := why or is_too_long(child, hand, given):
            os.kill(child, signal.SIGUSR1)  # says where it is, even if that is in C++
            time.sleep(TRACE_SECONDS)
            os.kill(child, signal.SIGKILL)
        time.sleep(LOOK_SECONDS)
    code = os.waitstatus_to_exitcode(status)
    executions, _, _, data = hand.seen()
    if code < 0:
        why = why or f"it was ended by {signal.Signals(-code).name}"
        saved = limits.save(given.findings, given.target, data) if data is not None else "no file: none was in hand"
        print(f"{given.target}: {why}\ninput saved in {saved}", flush=True)
    for left in Path("/dev/shm").glob(f"snapstone-fuzz-{child}-*"):  # its place, which it may not have lived to remove
        shutil.rmtree(left, ignore_errors=True)
    print(f"stat::number_of_executed_units: {executions}", file=sys.stderr)
    return int(code != 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("seconds", type=float)
    parser.add_argument("corpus", type=Path, help="what was learnt before; atheris adds to it")
    parser.add_argument("findings", type=Path, help="where inputs go that break something")
    parser.add_argument("--hang-cpu-seconds", type=float, default=limits.HANG_CPU_SECONDS, help="of what works on")
    parser.add_argument("--wall-seconds", type=float, default=limits.WALL_SECONDS_MAX, help="of what sleeps on")
    given = parser.parse_args()
    given.corpus.mkdir(parents=True, exist_ok=True)
    hand, parent = Hand(), os.getpid()
    if child := os.fork():
        return watch(child, given, hand)
    try:
        work(given, hand, parent)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
