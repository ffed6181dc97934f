"""One run with two checkpoints, made once; tests that damage one work on a copy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import snapstone as ss
from snapstone.cli import cli

EVIL_NAME = "evil\x1b[31m\x07\n\u202e[red]x[/red]"

Run = Callable[..., Result]


def state_at(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(300, 1000, generator=generator), "bias": torch.zeros(3, dtype=torch.bfloat16)},
        EVIL_NAME: torch.ones(2),
        "step": step,
        "betas": (0.9, 0.95),
    }


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    for step in (9, 10):
        metadata = {"metrics": {"loss": 1 / step}, "note\x1b]0;": "\x1b[2J"}
        ss.save(state_at(step), checkpoint_id=path / f"step-{step}", metadata=metadata)
    return path


@pytest.fixture
def run_path(saved_run: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


def delta_state_at(step: int) -> dict[str, Any]:
    """Three tensors of two chunks of 1 MiB; at each step one chunk changes: of "b", then of "c"."""
    state: dict[str, Any] = {
        name: torch.arange(1 << 19, dtype=torch.float32) + number for number, name in enumerate("abc")
    }
    for earlier in range(2, step + 1):
        state["abc"[earlier - 1]][0] = -1.0
    return state


@pytest.fixture
def delta_run(tmp_path: Path) -> Path:
    """step-1 in full; step-2 and step-3 compared with the one before."""
    path = tmp_path / "deltas"
    for step in (1, 2, 3):
        base = path / f"step-{step - 1}" if step > 1 else None
        ss.save(delta_state_at(step), checkpoint_id=path / f"step-{step}", step=step, base=base)
    return path


@pytest.fixture
def snapstone() -> Run:
    """Runs one command in this process. An exception that is not the command's own exit fails the test."""

    def invoke(*arguments: str | os.PathLike[str], env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(cli, [os.fspath(argument) for argument in arguments], env=env, catch_exceptions=False)

    return invoke


@pytest.fixture
def snapstone_json(snapstone: Run) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Exit code and document of a command with --json."""

    def invoke(*arguments: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
        result = snapstone(*arguments, "--json")
        document = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert document["schema"] == f"snapstone.{arguments[0]}/1"
        return result.exit_code, document

    return invoke


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x01
    path.write_bytes(data)
