"""Where a check stands that can be taken away: every `raise`, every `throw`, and of some modules every call whose
result nobody uses. A site is one statement; without it what follows runs as if the check had found nothing.

The copy that is tested has all sites at once, each behind its own question (`instrumented`), so nothing is built twice.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "EXCLUDED",
    "Site",
    "find",
    "instrumented",
    "native_sites",
    "python_sites",
    "sites_of",
]

PYTHON = "python/snapstone/"
PYTHON_GUARD = "if __stays__({!r}): "
PYTHON_IMPORT = "from snapstone._mutant import stays as __stays__\n"
NATIVE_GUARD = "SNAPSTONE_STAYS({}) "
NATIVE_IMPORT = '#include "base/mutant.h"\n'

INTEGRATIONS = "python/snapstone/integrations/"
OF_PACKAGES = (
    *("deepspeed.py", "deepspeed_base/", "hf.py", "hf_accelerator.py", "hf_trainer.py", "lightning.py"),
    *("lightning_base/", "megatron/", "megatron_bridge.py", "pytorch_lightning.py", "torch_checkpointing.py"),
    "torchtitan.py",
)

# Nothing of the engine here decides what is saved, committed, loaded or removed; of the modules OF_PACKAGES the tests
# run where the trainers are.
EXCLUDED = {
    "python/snapstone/bench/": "measures",
    "python/snapstone/report/": "draws what was measured",
    "python/snapstone/cli/": "arguments and output of commands; the checks are in what they call",
    "python/snapstone/watch/": "shows saves of other processes",
    "python/snapstone/status_page.py": "shows saves of other processes",
    **{
        INTEGRATIONS + name: "of a package that is not in every environment; its tests: tests/trainers"
        for name in OF_PACKAGES
    },
    "csrc/bind/": "conversions from Python, whose failures are TypeErrors of pybind11",
    "csrc/cuda/": "the driver; tests/cuda/test_steps.py leaves out each step",
    "csrc/base/fault_hook.cc": "the fault seam itself",
    "csrc/os/journal.cc": "what tests record",
}

# Modules of which every call whose result nobody uses is a site, too; without what only reports.
CALLS = re.compile(r"python/snapstone/(writer|outcome|opening|joint|target|read_back|load|compaction|verify)\.py")
REPORTING = re.compile(r"(self\.)?_?(trace|status|progress|bar|warnings|logger)\b|super\(\)|time\.sleep")
NATIVE_CALLS = re.compile(r"csrc/store/.*\.cc")
NATIVE_CALL = re.compile(r"(?:os::(?!sync)\w+|lock_if_there_are_locks|remove_quietly|(?:this->)?read_back|publish)\(")


@dataclass(frozen=True, slots=True)
class Site:
    name: str  # file:function#number, or file#number; stays what it is while others come and go elsewhere
    path: str
    line: int
    offset: int  # of the statement in the text, in characters
    text: str  # its first line


def find(root: Path) -> list[Site]:
    paths = [path for folder in ("python/snapstone", "csrc") for path in sorted((root / folder).rglob("*"))]
    return [site for path in paths for site in sites_of(str(path.relative_to(root)), path)]


def sites_of(name: str, path: Path) -> list[Site]:
    """Of one file, `name` from the repository on."""
    if name.startswith(tuple(EXCLUDED)):
        return []
    if name.startswith(PYTHON) and name.endswith(".py"):
        return python_sites(name, path.read_text())
    return native_sites(name, path.read_text()) if name.startswith("csrc/") and name.endswith((".cc", ".h")) else []


def python_sites(path: str, text: str) -> list[Site]:
    """`raise` statements, and calls in modules of CALLS; each on a line of its own, as the formatter has it."""
    begins = [0]
    for line in text.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    lines = text.splitlines()
    found: list[Site] = []
    count: Counter[str] = Counter()
    with_calls = CALLS.fullmatch(path) is not None

    def visit(node: ast.AST, scope: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            scope = f"{scope}.{node.name}".strip(".")
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if isinstance(node, ast.Raise) or (with_calls and is_call and not REPORTING.match(ast.unparse(node))):
            first = lines[node.lineno - 1]
            column = len(first.encode()[: node.col_offset].decode())
            assert not first[:column].strip(), f"{path}:{node.lineno}: not on a line of its own"
            name = f"{path.removeprefix(PYTHON)}:{scope or 'module'}"
            count[name] += 1
            offset = begins[node.lineno - 1] + column
            found.append(Site(f"{name}#{count[name]}", path, node.lineno, offset, first.strip()))
        for child in ast.iter_child_nodes(node):
            visit(child, scope)

    visit(ast.parse(text), "")
    return found


def native_sites(path: str, text: str) -> list[Site]:
    """`throw` statements, calls of functions that always throw, returns of a literal (which say what is wrong), and
    calls in files of NATIVE_CALLS.
    """
    code = _blanked(text)
    throwing = sorted(set(re.findall(r"\[\[noreturn\]\]\s+\w+\s+(\w+)\(", code)))
    starts = [rf"\b{name}\(" for name in throwing] + [r"\bthrow\b", r"\breturn\b(?= {3,};)"]
    if NATIVE_CALLS.fullmatch(path):
        starts.append(NATIVE_CALL.pattern)
    bodies = [_body(code, match.end()) for match in re.finditer(r"\[\[noreturn\]\][^;{]*\{", code)]
    found: list[Site] = []
    for match in re.finditer("|".join(starts), code):
        before = code[: match.start()].rstrip()
        if not before.endswith((";", "{", "}", ")", "else")) or any(match.start() in body for body in bodies):
            continue
        if before.endswith(")") and not re.search(r"(\bif|\bfor|\bwhile)\b[^;{}]*$", before):
            continue
        line = text.count("\n", 0, match.start()) + 1
        name = f"{path}#{len(found) + 1}"
        found.append(Site(name, path, line, match.start(), text.splitlines()[line - 1].strip()))
    return found


def _blanked(text: str) -> str:
    """Without comments, strings and preprocessor lines; everything else stays where it is."""
    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'|^[ \t]*#(?:\\\n|[^\n])*"
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL | re.MULTILINE)


def _body(code: str, begin: int) -> range:
    depth = 1
    for at in range(begin, len(code)):
        depth += {"{": 1, "}": -1}.get(code[at], 0)
        if depth == 0:
            return range(begin, at)
    return range(begin, len(code))


def instrumented(text: str, sites: list[Site]) -> str:
    """The text with a question before each site: does it stay?"""
    native = bool(sites) and not sites[0].path.endswith(".py")
    for site in sorted(sites, key=lambda site: -site.offset):
        guard = NATIVE_GUARD.format(f'"{site.name}"') if native else PYTHON_GUARD.format(site.name)
        text = text[: site.offset] + guard + text[site.offset :]
    if not sites:
        return text
    if native:
        return NATIVE_IMPORT + text
    lines = text.splitlines(keepends=True)
    body = ast.parse(text).body
    first = next(
        node
        for node in body
        if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    )
    decorators = getattr(first, "decorator_list", [])
    at = min([first.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    return "".join([*lines[:at], PYTHON_IMPORT, *lines[at:]])
