"""Documents that nobody's harness would write: right in form, so that they are read, and wrong in all else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report.measured import stall_document

SCRIPT = "</title></svg><script>alert('x')</script><img src=x onerror=alert(1)>\" onload=\"alert(2) &amp; `|*_[a](b)"
NOT_A_NUMBER, INFINITE = float("nan"), float("inf")


def hostile_stall() -> dict[str, Any]:
    """20 engines and 64 ranks; names that are HTML; numbers that are none; lists that are empty or not lists."""
    many = [(f"engine-{index}", f"{SCRIPT} {index}" * 3, 0.1 * (index + 1), 0.3, 1.0) for index in range(18)]
    document: dict[str, Any] = json.loads(json.dumps(stall_document(64, many)))
    document["problems"] = [SCRIPT, 7, None]
    document["command"] = ["snapstone", SCRIPT, "a b'c"]
    document["environment"]["hardware"]["cpu"] = SCRIPT
    document["workload"] = {"model": SCRIPT, "nbytes": NOT_A_NUMBER, "parallelism": ["x"], "step_seconds": 3}
    engines = document["engines"]
    engines[0]["cadences"][0]["stall_seconds"] = [NOT_A_NUMBER, INFINITE, "1", None, True, 10**400, 0.25]
    engines[0]["counters"]["disk_write_rate"] = [NOT_A_NUMBER]
    engines[1]["cadences"] = []
    engines[2]["cadences"] = [{"name": "relaxed", "stall_seconds": [-0.5, 0.1], "interval_steps": NOT_A_NUMBER}]
    engines[3]["timeline"] = [
        {"rank": NOT_A_NUMBER},
        {"rank": 1, "begin": 2, "end": 1},
        7,
        {"rank": -3, "begin": 0, "end": 0},
    ]
    engines[4]["steps"] = [{"seconds": NOT_A_NUMBER, "saving": "yes"}, {"seconds": 0}, {}]
    engines[5] = {}
    engines[6]["status"] = SCRIPT
    engines[7]["options"] = [{"name": SCRIPT, "value": [], "why": None}]
    engines[8]["name"] = "=HYPERLINK(1)"
    engines[9]["title"] = "\x1b[31m\u202e" + "長" * 300
    engines[10]["timeline"] = [{**span, "stage": SCRIPT, "lane": SCRIPT} for span in engines[10]["timeline"]]
    engines[11]["reason"], engines[11]["status"] = SCRIPT * 100, "failed"
    document["engines"] += [7, None, "x"]
    return document


EMPTY: dict[str, dict[str, Any]] = {
    "disk": {"probes": []},
    "link": {"links": []},
    "stall": {"workload": {}, "protocol": {}, "engines": []},
    "load": {"checkpoint": None, "loads": "none"},
    "model": {"inputs": [], "rows": [{}]},
}

WRONG: dict[str, Any] = {
    "disk": {"probes": [{"bytes_per_second": [0, 0]}, {"operation": SCRIPT, "bytes_per_second": [1e300, 1e-300]}, 3]},
    "link": {
        "links": [
            {"transport": "memory", "operation": SCRIPT, "bytes_per_second": [-1, 0, NOT_A_NUMBER]},
            {"transport": SCRIPT, "operation": "copy", "bytes_per_second": [1e300, 1e-300], "reason": SCRIPT},
            {"transport": "cuda", "operation": "d2h", "bytes_per_second": "fast"},
            3,
        ]
    },
    "load": {
        "checkpoint": {SCRIPT: SCRIPT, "nbytes": "12"},
        "loads": [
            {"engine": SCRIPT, "status": "measured", "seconds": [0.0, NOT_A_NUMBER], "nbytes": 5},
            {"engine": SCRIPT, "status": "failed", "reason": SCRIPT},
            {"status": "absent"},
        ],
    },
    "model": {
        "inputs": {SCRIPT: SCRIPT},
        "rows": [
            {"engine": SCRIPT, "gpus": 0, "goodput": 1.0},
            {"engine": SCRIPT, "gpus": 8, "goodput": -1e9},
            {"engine": "b", "gpus": 8, "goodput": 5.0},
        ],
    },
}


def around(kind: str, parts: dict[str, Any]) -> dict[str, Any]:
    head = {"format": "snapstone-bench", "version": 1, "kind": kind, "date": SCRIPT, "command": SCRIPT, "seconds": -1}
    return {**head, "complete": 3, "problems": SCRIPT, "environment": {"hardware": [SCRIPT]}, **parts}


def write_hostile(directory: Path) -> Path:
    """Every file that a reader takes, and some that it must leave out: damaged, of another version, not documents."""
    directory.mkdir(parents=True, exist_ok=True)

    def put(name: str, document: Any) -> None:
        (directory / name).write_text(document if isinstance(document, str) else json.dumps(document))

    put("stall-hostile.json", hostile_stall())
    for kind, parts in EMPTY.items():
        put(f"{kind}-empty.json", around(kind, parts))
    for kind, parts in WRONG.items():
        put(f"{kind}-wrong.json", around(kind, parts))
    put("stall-future.json", {**around("stall", EMPTY["stall"]), "version": 2})
    put("stall-torn.json", '{"format": "snapstone-bench", "ver')
    put("stall-deep.json", "[" * 100_000)
    put("disk-<script>alert(1)<\u2044script>.json", "null")
    put("load-array.json", [])
    put("notes.json", {"format": "other"})
    return directory
