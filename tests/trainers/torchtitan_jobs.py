"""Jobs of the real torchtitan on this machine's CPU: their assets, their processes, what they leave."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch

from distributed.ranks import at_store, serve_store
from snapstone import Checkpoint

SHIM = Path(__file__).with_name("torchtitan_shim.py")
USE = "snapstone.integrations.torchtitan.use"
SYLLABLES = ("ka", "to", "mi", "ra", "sel", "dun", "or", "vi", "pe", "lan")


def make_assets(folder: Path) -> Path:
    """A tokenizer and a small corpus where torchtitan's debug model looks for them: below the current directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    draw = random.Random(7)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(600)]
    texts = [" ".join(draw.choices(words, k=draw.randint(60, 300))) + "." for _ in range(400)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=special))
    place = folder / "tests" / "assets" / "tokenizer"
    place.mkdir(parents=True)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    corpus = folder / "tests" / "assets" / "c4_test"
    corpus.mkdir()
    (corpus / "data.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


class Job:
    """`ranks` processes of one torchtitan job, in `folder`, with their logs beside it. Killed on leaving.

    engine: options of the override; None for torchtitan's own checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        ranks: int = 2,
        engine: Mapping[str, Any] | None = MappingProxyType({}),
        env: Mapping[str, str] | None = None,
        env_of_rank: Mapping[int, Mapping[str, str]] | None = None,
    ) -> None:
        self.folder = folder
        self._store = serve_store()
        flags = ["--module", "trainers.torchtitan_shim", "--config", "debug_model", *arguments]
        if engine is not None:
            flags += ["--override.imports", f"{USE}={json.dumps(dict(engine))}" if engine else USE]
        shared = {
            **os.environ,
            **at_store(self._store.port),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "PYTHONPATH": os.pathsep.join([str(SHIM.parents[1]), *filter(None, sys.path)]),
            **(env or {}),
        }
        self._logs = [folder / f"log-{time.monotonic_ns()}-{rank}" for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self._logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **(env_of_rank or {}).get(rank, {})}
            with log.open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, str(SHIM), *flags],
                    cwd=folder,
                    env={**shared, **own},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def stacks(self) -> str:
        """Where the ranks are, at the end of their logs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        return "\n".join(log.read_text()[-6000:] for log in self._logs)

    def wait(self, timeout: float = 200) -> list[int]:
        """Exit statuses. When a rank has failed, the others get SIGKILL, as from a launcher."""
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            if any(process.poll() not in (None, 0) for process in self.processes):
                self.kill()
            elif time.monotonic() > end:
                stacks = self.stacks()
                self.kill()
                raise AssertionError(f"the job hangs\n{stacks}")
            time.sleep(0.05)
        return [process.returncode for process in self.processes]

    def log(self, rank: int | None = None) -> str:
        logs = self._logs if rank is None else [self._logs[rank]]
        return "\n".join(log.read_text() for log in logs)


def train(folder: Path, *arguments: str, **options: Any) -> str:
    """Runs a job to its end; the log of rank 0."""
    with Job(folder, *arguments, **options) as job:
        statuses = job.wait()
        assert statuses == [0] * len(statuses), job.log()
        return job.log(0)


def flags(steps: int, folder: str, mode: str = "disabled", **more: Any) -> list[str]:
    """The job's own flags: so many steps, checkpoints in outputs/`folder`."""
    given = {"folder": folder, "async_mode": mode, "keep_latest_k": 0, **more}
    found = [f"--training.steps={steps}"]
    for name, value in given.items():
        found.append(f"--checkpoint.{'no-' if value is False else ''}{name}")
        if not isinstance(value, bool):
            found[-1] += f"={value}"
    return found


def steps_in(folder: Path) -> list[int]:
    names = [re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(match.group(1)) for match in names if match)


def contents(path: Path, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every tensor and value of a checkpoint, of all ranks."""
    checkpoint = Checkpoint.open(path)
    found: dict[str, Any] = {**checkpoint.load_tensors()}
    for rank in range(checkpoint.world_size):
        found.update({f"{name} of rank {rank}": value for name, value in checkpoint.objects(rank).items()})
    return {name: value for name, value in found.items() if not name.startswith(without or "\0")}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names whose tensors or values are not the same, bit for bit."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.dim() else a == b
        return type(a) is type(b) and a == b

    return sorted(n for n in one.keys() | other.keys() if n not in one or n not in other or not same(one[n], other[n]))
