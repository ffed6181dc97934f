"""The import lines of python/snapstone against the import table of docs/architecture.md."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from layering.tree import PACKAGE, architecture_table, files

TABLE = architecture_table("Import table")

# `torch` in the table does not open these: each of them is an edge of its own.
APART = ("torch.distributed",)


def module_of(path: Path) -> str:
    """The row of the table that ``path`` belongs to: the module, or the subpackage directly below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", "")
    return name == "TYPE_CHECKING"


def imports(tree: ast.AST, depth: int = 0) -> Iterator[str]:
    """Every name that is imported when the module or one of its functions runs, package-internal ones as ``.module``.

    ``depth`` is the number of subpackages between the file and the package: ``from ..errors`` of a file one level down
    is ``.errors``. ``from a import b`` counts as ``a.b``, since ``b`` may be a module.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (internal(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if 0 < node.level <= depth:
                continue  # inside the subpackage itself
            prefix = ("." if node.level else "") + (f"{node.module}." if node.module else "")
            yield from (internal(prefix + alias.name) for alias in node.names)
        elif is_type_checking(node):
            assert isinstance(node, ast.If)
            yield from imports(ast.Module(node.orelse, []), depth)
        else:
            yield from imports(node, depth)


def internal(name: str) -> str:
    """``snapstone.errors.X`` as ``.errors.X``; ``snapstone`` itself is its ``__init__``."""
    if name == "snapstone":
        return ".__init__"
    return "." + name.removeprefix("snapstone.") if name.startswith("snapstone.") else name


def violations(module: str, source: str, table: dict[str, frozenset[str]], depth: int = 0) -> list[str]:
    """What is wrong with the imports of one file of ``module``."""
    if module not in table:
        return [f"the import table has no row for {module}"]
    allowed = table[module]
    problems = set()
    for name in imports(ast.parse(source), depth):
        if name.startswith("."):
            if "__init__" in allowed and is_public_name(name):
                continue
            target = name[1:].partition(".")[0]
            if target not in table and target != "_core":
                target = "__init__"  # a name, not a module
            if target not in (module, *allowed):
                problems.add(f"{module} may not import {target}")
        elif not is_allowed(name, allowed):
            problems.add(f"{module} may not import {name}")
    return sorted(problems)


def is_public_name(name: str) -> bool:
    """``from snapstone import save`` gives the function, not the module of that name."""
    return name == ".__init__" or (name.count(".") == 1 and not name.startswith("._"))


def is_allowed(name: str, allowed: frozenset[str]) -> bool:
    if name.partition(".")[0] in sys.stdlib_module_names:
        return True

    def covers(entry: str) -> bool:
        if name != entry and not name.startswith(entry + "."):
            return False
        return all(is_under(entry, apart) or not is_under(name, apart) for apart in APART)

    return any(covers(entry) for entry in allowed)


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


SOURCES = [path.relative_to(PACKAGE).as_posix() for path in files("python/snapstone", suffixes=(".py",))]


@pytest.mark.parametrize("name", SOURCES)
def test_imports_follow_the_table(name: str) -> None:
    path = PACKAGE / name
    assert violations(module_of(path), path.read_text(), TABLE, depth=name.count("/")) == []


def test_table_and_package_name_the_same_modules() -> None:
    assert {module_of(PACKAGE / name) for name in SOURCES} == set(TABLE)


def test_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(TABLE):
        ready = {module for module, allowed in TABLE.items() if module not in done and allowed & set(TABLE) <= done}
        assert ready, f"these modules import each other in a circle: {sorted(set(TABLE) - done)}"
        done |= ready


@pytest.mark.parametrize("only_home", ["_core", "torch.distributed"])
def test_one_module_is_the_only_home(only_home: str) -> None:
    homes = {module for module, allowed in TABLE.items() if only_home in allowed}
    assert (
        homes
        == {
            "_core": {"_native"},
            "torch.distributed": {"bench", "collective", "dcp", "fabric", "integrations", "inherited", "rng"},
        }[only_home]
    )


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("errors", "from .config import X"),
        ("errors", "import torch"),
        ("plan", "from . import tensors"),
        ("plan", "from snapstone.tensors import X"),
        ("config", "def f():\n    from .save import save"),
        ("save", "from . import _core"),
        ("save", "from snapstone._core import open_engine"),
        ("tensors", "import torch.distributed as dist"),
        ("tensors", "from torch import distributed"),
        ("values", "from torch.distributed.tensor import DTensor"),
        ("handle", "import numpy as np"),
        ("verify", "if TYPE_CHECKING:\n    import os\nelse:\n    from .load import load"),
        ("plan", "import snapstone"),
        ("novelty", "import os"),
    ],
)
def test_a_forbidden_import_is_found(module: str, line: str) -> None:
    assert len(violations(module, line, TABLE)) == 1


def test_allowed_imports_pass() -> None:
    source = "import os\nimport torch\nfrom torch.distributed.tensor import DTensor\nfrom .errors import X\n"
    assert violations("tensors", source, TABLE) == []
    assert violations("collective", "import torch.distributed as dist", TABLE) == []
    assert violations("errors", "if TYPE_CHECKING:\n    import torch\n", TABLE) == []
    assert violations("cli", "from .commands import x\nfrom .. import save\nimport click.testing", TABLE, depth=1) == []
