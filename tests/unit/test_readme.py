"""The README's first screen runs when pasted, and is where the other tools expect it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import snapstone as ss

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
FIRST_SCREEN_LINES = 60


def python_block() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return str(block)


def test_ten_lines_run_and_save_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(python_block(), "README.md", "exec"), names)
    first, second = ss.Checkpoint.open("run/step-1"), ss.Checkpoint.open("run/step-2")
    assert (first.step, second.step) == (1, 2)
    assert names["state"]["step"] == 2
    assert ss.verify("run/step-1")
    assert ss.verify("run/step-2")
    assert torch.equal(names["rows"], names["model"].weight[:8])
    assert names["rows"].shape == (8, 1024)


def test_ten_lines_are_at_most_twelve() -> None:
    assert len([line for line in python_block().splitlines() if line]) <= 12


def test_first_screen_has_the_code_and_the_table() -> None:
    first_screen = "\n".join(README.splitlines()[:FIRST_SCREEN_LINES])
    for text in ("pip install .", "```python", "<!-- stall:begin -->", "docs/guarantees.md"):
        assert text in first_screen, text


def test_two_commands_set_up_and_go() -> None:
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    commands = re.findall(r"^(make \S+)", README, re.MULTILINE)
    assert commands == ["make demo", "make test"]
    for command in commands:
        assert re.search(rf"^{command.split()[1]}: setup\b", makefile, re.MULTILINE)
