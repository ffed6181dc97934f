"""Takes away one check after the other, and says which test notices: `make mutate`, `python -m mutation --help`.

build/mutation/ holds a copy of the repository with all checks behind a switch, which tests reach which, and the
outcomes; a run that was stopped goes on where it was. Syncs, the steps of streams, votes and claims have lists and
tests of their own, which are run with the rest and not repeated here.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import random
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mutation import document, sandbox
from mutation.kill import Outcome, judge_all
from mutation.lists import judge_lists
from mutation.record import Reached, record, record_native
from mutation.sites import Site
from mutation.tree import ROOT, build_native, building, digest_of, make_tree

# The commit path and the read path first.
FIRST = (
    *("writer", "outcome", "target", "collective", "manifest", "reader", "index", "index_file", "plan", "base"),
    *("share", "joint", "opening", "load", "verify", "read_back", "compaction", "checkpoint", "save"),
)
PRELOADED = (
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "hypothesis",
    "snapstone.save",
    "snapstone.load",
)
FIRST_NATIVE = ("csrc/store/", "csrc/format/", "csrc/pipeline/", "csrc/codec/", "csrc/os/")


def main(arguments: Sequence[str]) -> int:
    given = _arguments(arguments)
    if reason := sandbox.why_not():
        print(f"code without its checks may remove anything, and there is no sandbox for it here: {reason}")
        return 2
    work = given.work.resolve()
    tree = work / "tree"
    sites = make_tree(tree)
    if given.native:
        build_native(tree, given.jobs)
    # Imported before the forks, which then take no time.
    sys.path[:0] = [str(tree / "python"), str(tree / "tests"), str(tree)]
    exec(building.SITE_CUSTOMIZE)
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:3], os.environ.get("PYTHONPATH", "")])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _import_all(tree)
    if given.native:
        record_native(tree, work)
    reached = record(tree, work, sites, given.tests, params=given.params, file_seconds=given.file_seconds)
    digests = {path: digest_of(path) for path in {site.path for site in sites}}
    known = _known(work, digests)
    todo = _chosen(sites, given, known, reached)
    print(f"{len(sites)} sites, {len(known)} judged, {len(todo)} to judge", flush=True)
    if given.lists:
        judge_lists(tree, work)
    judge_all(todo, digests, reached, tree, work, given.jobs, given.seconds)
    known = _known(work, digests)
    asked = [site for site in sites if _matches(site, given.sites)]
    if given.sample is not None:
        asked = todo
    if given.json is not None:
        document.write(sites, known, reached, work, given.json)
    return document.report(asked, known, reached, work)


def _import_all(tree: Path) -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    found = Path(sys.modules["snapstone"].__file__ or "")
    assert found.is_relative_to(tree), "the copy is not what is imported"


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mutation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sites", nargs="*", help="patterns of names, as 'writer.py:*' (default: all)")
    parser.add_argument("--sample", type=int, help="judge so many, drawn by --seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="judge those again that survived")
    parser.add_argument("--native", action="store_true", help="build extension and native tests, for checks in csrc")
    parser.add_argument("--lists", action="store_true", help="and what other tests leave out: syncs, steps, votes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no mutant after this time")
    parser.add_argument("--params", type=int, default=20, help="of each test function at most so many cases")
    parser.add_argument("--file-seconds", type=float, default=600, help="for recording one test file")
    parser.add_argument("--tests", action="append", default=[], help="test files to record (default: all that fit)")
    parser.add_argument("--work", type=Path, default=ROOT / "build/mutation")
    parser.add_argument("--json", type=Path, help="write a dated document into this directory")
    return parser.parse_args(arguments)


def _known(work: Path, digests: dict[str, str]) -> dict[str, Outcome]:
    """The last outcome of each site whose file is what it was."""
    path = work / "outcomes.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    known = {}
    for outcome in (Outcome(**json.loads(line)) for line in lines):
        known[outcome.name] = outcome
    return {name: one for name, one in known.items() if one.tried and one.digest in digests.values()}


def _chosen(sites: list[Site], given: argparse.Namespace, known: dict[str, Outcome], reached: Reached) -> list[Site]:
    reachable = [site for site in sites if site.name in reached.by_site]
    chosen = [site for site in reachable if site.name not in known or (given.again and not known[site.name].killed_by)]
    chosen = [site for site in chosen if _matches(site, given.sites)]
    if not given.native:
        chosen = [site for site in chosen if site.path.endswith(".py")]
    if given.sample is not None:
        chosen = random.Random(given.seed).sample(chosen, min(given.sample, len(chosen)))
    return sorted(chosen, key=_importance)


def _matches(site: Site, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(site.name, pattern) for pattern in patterns)


def _importance(site: Site) -> tuple[bool, int, str, int]:
    module = site.path.removeprefix("python/snapstone/").removesuffix(".py")
    first = FIRST.index(module) if module in FIRST else len(FIRST)
    for place, folder in enumerate(FIRST_NATIVE):
        if site.path.startswith(folder):
            first = place
    return not re.search(r"\b(raise|throw|return|refuse)\b", site.text), first, site.path, site.line


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
