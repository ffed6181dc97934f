"""The machinery that takes checks away (`make mutate`): it finds every check, a missing one is noticed, and a few are
always tried.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mutation import sandbox
from mutation.accepted import ACCEPTED, NOTICED_BY
from mutation.sites import EXCLUDED, find, instrumented, native_sites, python_sites
from mutation.tree import ROOT

PYTHON = '''"""Doc."""
from __future__ import annotations

def check(value):
    """é"""
    if value < 0:
        raise ValueError(
            "negative"
        )
    try:
        return 1 / value
    except ZeroDivisionError:
        raise KeyError from None
'''

NATIVE = """#include <string>
// throw in a comment;
[[noreturn]] void refuse(int code) { throw code; }
const char* reason(int code) {
  if (code == 1) return "one; or throw";
  return nullptr;
}
int check(int code) {
  if (code < 0) refuse(code);
  if (code > 9) {
    throw std::string("large");
  } else if (code == 5) throw 5;
  return code;
}
"""


def test_every_raise_is_found_and_can_be_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = python_sites("python/snapstone/toy.py", PYTHON)
    assert [site.name for site in sites] == ["toy.py:check#1", "toy.py:check#2"]
    away: set[str] = set()
    text = instrumented(PYTHON, sites).replace("from snapstone._mutant import stays as __stays__\n", "")
    scope: dict[str, object] = {"__stays__": lambda name: name not in away}
    exec(compile(text, "toy", "exec"), scope)
    check = scope["check"]
    assert callable(check)
    with pytest.raises(ValueError, match="negative"):
        check(-1)
    away.add("toy.py:check#1")
    assert check(-1) == -1
    with pytest.raises(KeyError):
        check(0)
    away.add("toy.py:check#2")
    assert check(0) is None


def test_every_throw_is_found() -> None:
    lines = [site.text for site in native_sites("csrc/store/toy.cc", NATIVE)]
    assert lines == [
        'if (code == 1) return "one; or throw";',
        "if (code < 0) refuse(code);",
        'throw std::string("large");',
        "} else if (code == 5) throw 5;",
    ]


def test_the_sources_are_searched() -> None:
    sites = find(ROOT)
    assert len({site.name for site in sites}) == len(sites) > 500
    by_path: dict[str, list[int]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site.line)
    for path in (ROOT / "python/snapstone").rglob("*.py"):
        name = str(path.relative_to(ROOT))
        if name.startswith(tuple(EXCLUDED)):
            continue
        tree = ast.parse(path.read_text())
        raises = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Raise)}
        assert raises <= set(by_path.get(name, [])), name
        ast.parse(instrumented(path.read_text(), [site for site in sites if site.path == name]))
    assert {"csrc/store/staging.cc", "csrc/store/shared_files.cc", "csrc/format/chunk_table.cc"} <= by_path.keys()
    assert [path for path in EXCLUDED if not (ROOT / path).exists()] == []


def test_every_accepted_one_is_still_there_and_so_is_the_test_that_notices_the_others() -> None:
    here = {(site.name.partition("#")[0], site.text) for site in find(ROOT)}
    wrong = [
        (name, text)
        for name, text, _ in (*ACCEPTED, *NOTICED_BY)
        if not any(name == site and found.startswith(text) for site, found in here)
    ]
    assert wrong == []
    for _, _, test in NOTICED_BY:
        path, _, function = test.partition("::")
        assert f"def {function.partition('[')[0]}(" in (ROOT / path).read_text(), test


SAMPLE = ("manifest.py:_parse#*", "manifest.py:_version#*", "manifest.py:writer_of*", "manifest.py:_hex#1")


def test_what_runs_without_its_checks_can_harm_nothing(tmp_path: Path) -> None:
    if reason := sandbox.why_not():
        pytest.skip(reason)
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("kept")
    shared = Path("/dev/shm", tmp_path.name)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sandbox.enter(inside)
            shutil.rmtree(tmp_path, ignore_errors=True)
            (inside / "made").write_text(tempfile.mkdtemp())
            shared.write_text("in a memory of its own")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert outside.read_text() == "kept"
    assert (inside / "made").read_text().startswith(str(inside))
    assert not shared.exists()


@pytest.mark.timeout(240)
def test_a_check_that_is_taken_away_is_noticed_and_one_without_tests_survives(tmp_path: Path) -> None:
    """The sample of every run: checks of the manifest, against its unit tests and then against those of the plan."""
    if reason := sandbox.why_not():
        pytest.skip(reason)
    killed, code, said = _outcomes(tmp_path / "work", "tests/unit/test_manifest.py", *SAMPLE)
    assert len(killed) > 4
    assert {name: one["killed_by"] for name, one in killed.items() if not one["killed_by"]} == {}
    assert code == 0, said
    outcomes, code, said = _outcomes(tmp_path / "other", "tests/unit/test_plan.py", "manifest.py:_hex#1")
    assert (outcomes, code) == ({}, 1), said
    assert "no recorded test reaches: manifest.py:_hex#1" in said


def _outcomes(work: Path, tests: str, *sites: str) -> tuple[dict[str, dict[str, str]], int, str]:
    command = [sys.executable, "-m", "mutation", *sites, "--tests", tests, "--work", str(work), "--jobs", "2"]
    paths = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    file = work / "outcomes.jsonl"
    assert done.returncode in (0, 1), done.stderr
    lines = file.read_text().splitlines() if file.exists() else []
    return {one["name"]: one for one in map(json.loads, lines)}, done.returncode, done.stdout
