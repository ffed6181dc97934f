"""One state saved in every way that there is, and what is compared of the files: everything but the random save_id."""

from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import snapstone as ss
from roundtrip.bits import assert_same, files_of, other_bits, random_bits

RUNGS = ["uring-fixed", "uring", "threads-direct", "buffered"]
CODECS = {"plain": None, "zstd": "zstd"}
MIB = 1 << 20


def make_state() -> dict[str, torch.Tensor | int]:
    state: dict[str, torch.Tensor | int] = {f"small{i}": random_bits(torch.uint8, 37 * i, seed=i) for i in range(50)}
    state |= {f"large{i}": random_bits(torch.bfloat16, 700_001 * i, seed=i) for i in range(1, 4)}
    state["zeros"] = torch.zeros(2 * MIB)
    state["strided"] = random_bits(torch.float32, 1000, 501, seed=1).t()
    return state | {"n": 3}


@dataclass(frozen=True)
class Work:
    """How it went: the rungs used, why better ones were passed over, and the loudest that was said."""

    rungs: set[str]
    passed_over: list[str]
    loudest: int
    said: list[str]


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def work(write_to: str, read_from: str) -> Work:
    """Saves, loads and verifies in this process."""
    heard = _Heard()
    logger = logging.getLogger("snapstone")
    logger.addHandler(heard)
    logger.setLevel(logging.DEBUG)
    state = make_state()
    rungs: set[str] = set()
    passed_over: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for name, codec in CODECS.items():
            saved = ss.save(state, checkpoint_id=f"{write_to}/{name}", codec=codec, step=4, metadata={"a": 1})
            target = {key: 0 if key == "n" else other_bits(tensor) for key, tensor in state.items()}  # type: ignore[arg-type]
            loaded = ss.load(target, checkpoint_id=f"{read_from}/{name}")
            for key, tensor in state.items():
                if isinstance(tensor, torch.Tensor):
                    assert_same(target[key], tensor, key)  # type: ignore[arg-type]
            assert ss.verify(f"{read_from}/{name}")
            rungs |= {saved.stats["rung"], loaded.stats["rung"]}
            passed_over = saved.stats["passed_over"]
    said = [record.getMessage() for record in heard.records] + [str(warning.message) for warning in warned]
    loudest = max([record.levelno for record in heard.records] + [logging.WARNING for _ in warned], default=0)
    assert sorted(os.listdir(write_to)) == sorted(CODECS), "a probe or a staging directory was left"
    return Work(rungs, passed_over, loudest, said)


def comparable(path: Path) -> dict[str, Any]:
    """Every file of every checkpoint under `path`, without the save_id and what depends on it."""
    found: dict[str, Any] = {}
    for name in CODECS:
        save_id = ss.Checkpoint.open(path / name).save_id
        files = {file: data.replace(save_id.encode(), b"-" * 32) for file, data in files_of(path / name).items()}
        del files["MANIFEST.xxh128"]
        document = json.loads(files.pop("MANIFEST.json"))
        for writer in document["writers"]:
            del writer["index"]["xxh128"]  # the index holds the save_id
        found |= {f"{name}/{file}": data for file, data in files.items()} | {f"{name}/manifest": document}
    assert len(found) == 6
    return found
