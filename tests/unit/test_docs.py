"""The documentation says what the sources say: links, test names, knobs and code blocks.

A block of a page runs when a comment stands before it:

    <!-- run -->                   all such blocks of a page run in one process, in order
    <!-- run: torchrun -->         runs before them, as a script, on two ranks, twice: the second run resumes
    <!-- run: after torchrun -->   like the first, and needs what the script left
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import snapstone as ss

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "integrations").glob("*.md"), *ROOT.glob("*.md")])
TUNING = (ROOT / "docs" / "tuning.md").read_text()
COMMENT_KINDS = ("", "torchrun", "after torchrun")


class Block(NamedTuple):
    kind: str
    code: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(
        r"^<!-- run(?:: ([a-z ]+))? -->\n```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return [Block(kind, code) for kind, code in found]


def mentions_of_tests(text: str) -> list[tuple[str, str]]:
    """(path, name of the test or "") of every mention of a file below tests/."""
    return re.findall(r"\b(tests/[\w./-]*\w)(?:::([\w.]+))?", text)


def has_test(path: Path, name: str) -> bool:
    text = path.read_text()
    if path.suffix == ".py":
        return re.search(rf"^(\s*def|class) {re.escape(name)}\(", text, re.MULTILINE) is not None
    suite, _, case = name.partition(".")
    return re.search(rf"^TEST(_F|_P)?\({suite}, {case}\)", text, re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_has_a_head(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    assert [table[:100] for table in tables if not re.match(r"[^\n]*\n\|[ :|-]+\|\n", table)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    wrong = []
    for path, name in mentions_of_tests(page.read_text()):
        if not (ROOT / path).exists():
            wrong.append(path)
        elif name and not has_test(ROOT / path, name):
            wrong.append(f"{path}::{name}")
    assert wrong == []


def test_a_wrong_name_is_found() -> None:
    here = Path(__file__)
    assert has_test(here, "test_a_wrong_name_is_found")
    assert not has_test(here, "test_a_wrong_name")
    native = ROOT / "tests" / "native" / "os" / "file_test.cc"
    assert has_test(native, "FileTest.a_failed_sync_is_reported_and_not_repeated")
    assert not has_test(native, "FileTest.a_failed_sync")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    targets = {link.partition("#")[0] for link in links if "://" not in link} - {""}
    assert [target for target in sorted(targets) if not (page.parent / target).exists()] == []


def knobs_of_the_sources() -> set[str]:
    """SNAPSTONE_* inside string literals: environment variables, as against macros."""
    found: set[str] = set()
    for directory, suffixes in (("csrc", (".cc", ".h")), ("python", (".py",))):
        for path in (ROOT / directory).rglob("*"):
            if path.suffix in suffixes:
                found |= set(re.findall(r'"(SNAPSTONE_[A-Z_]+)"', path.read_text()))
    return found


def table_of_knobs() -> str:
    return TUNING.partition("\n## Knobs\n")[2].partition("\n## ")[0]


def test_every_environment_variable_has_a_row_and_no_other() -> None:
    rows = set(re.findall(r"^\| `(SNAPSTONE_[A-Z_]+)`", table_of_knobs(), re.MULTILINE))
    assert rows == knobs_of_the_sources()
    assert "SNAPSTONE_TIMEOUT" in rows


def test_every_argument_has_a_row_and_no_other() -> None:
    arguments = {
        name for verb in (ss.save, ss.async_save, ss.load, ss.prepare) for name in inspect.signature(verb).parameters
    }
    rows = set(re.findall(r"^\| `([a-z_]+)`", table_of_knobs(), re.MULTILINE))
    beside_variables = set(
        re.findall(r"^\| `SNAPSTONE_[A-Z_]+` \| environment, or `([a-z_]+)=`", table_of_knobs(), re.M)
    )
    assert rows | beside_variables == arguments
    assert rows & beside_variables == set()


def test_every_key_of_stats_is_explained(tmp_path: Path) -> None:
    import torch

    state = {"large": torch.zeros(1 << 16), "view": torch.zeros(300, 300).t(), "step": 1}
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c", codec="zstd")
    handle.result()
    keys = {*handle.stats, *ss.load(state, checkpoint_id=tmp_path / "c").stats}
    assert {"stage", "encode", "stall_seconds", "read"} <= keys
    assert [key for key in sorted(keys) if f"`{key}`" not in TUNING] == []


def run(command: list[str], directory: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(ss.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["quickstart.md", "tuning.md", "cluster-model.md"])
def test_code_blocks_run(name: str, tmp_path: Path) -> None:
    found = blocks(ROOT / "docs" / name)
    assert found
    assert {block.kind for block in found} <= set(COMMENT_KINDS)
    for block in found:
        if block.kind == "torchrun":
            (tmp_path / "train.py").write_text(block.code)
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
            assert "resumed" not in run(torchrun, tmp_path)
            assert run(torchrun, tmp_path).count("resumed at step") == 2
    (tmp_path / "page.py").write_text("\n".join(block.code for block in found if block.kind != "torchrun"))
    run([sys.executable, "page.py"], tmp_path)
