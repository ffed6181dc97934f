"""Sizes, words and headers that the house rules fix; see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from layering.tree import ROOT, files

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
SOURCE_SUFFIXES = (".h", ".cc", ".cu", ".cuh", ".py", ".pyi")
TEXT_SUFFIXES = (*SOURCE_SUFFIXES, ".md", ".toml", ".txt", ".sh", ".cmake")

# Spelled so that no pattern finds itself: this file is searched like any other.
FORBIDDEN = {
    "unfinished work": re.compile(r"\b(T[O]DO|F[I]XME|X[X]X|H[A]CK)\b"),
    "a path of one machine": re.compile(r"(^|[^A-Za-z0-9_./])/(work|farm|root|home)/[A-Za-z0-9._]"),
    "the host of a package registry": re.compile(r"(pypi|pythonhosted|download\.pytorch|deb\.debian)\.org"),
    "a registry setting": re.compile(r"(index-url|registry *=|find-links) *=? *(https?|file):"),
}

SOURCES = [
    path.relative_to(ROOT).as_posix()
    for path in files("csrc", "python", "tests", "benchmarks", "tools", suffixes=SOURCE_SUFFIXES)
]
TEXTS = [
    *SOURCES,
    *(
        path.relative_to(ROOT).as_posix()
        for path in [*files("docs", "cmake", "examples", ".ci", suffixes=TEXT_SUFFIXES), *sorted(ROOT.glob("*"))]
        if path.is_file() and "_build" not in path.parts and path.suffix in TEXT_SUFFIXES
    ),
    *("Makefile", ".ci/run"),
]


def forbidden_words(text: str) -> list[str]:
    return [
        f"line {number}: {meaning}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), start=1)
        for meaning, pattern in FORBIDDEN.items()
        if pattern.search(line)
    ]


def without_comments_and_strings(source: str) -> str:
    """C++ with comments, literals and directives blanked; line breaks stay, so that line numbers hold."""
    token = re.compile(
        r"^[ \t]*#(?:\\.|[^\\\n])*"
        r'|R"([^(\s]*)\(.*?\)\1"|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9a-zA-Z])\'(?:\\.|[^\'\\\n])+\'',
        re.DOTALL | re.MULTILINE,
    )
    return token.sub(lambda match: "\n" * match.group().count("\n"), source)


def native_functions(source: str) -> Iterator[tuple[int, int]]:
    """First line and line count of every braced body that follows a ')': functions, lambdas, control statements."""
    line, head, open_bodies = 1, "", []
    for character in without_comments_and_strings(source):
        if character == "\n":
            line += 1
        if character == "{":
            open_bodies.append((line, ")" in head))
        elif character == "}" and open_bodies:
            first, is_function = open_bodies.pop()
            if is_function:
                yield first, line - first + 1
        head = "" if character in "{};" else head + character


def python_functions(source: str) -> Iterator[tuple[int, int]]:
    """First line and line count of every function, its docstring not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                count -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            yield node.lineno, count


def long_functions(name: str, source: str) -> list[str]:
    functions = python_functions(source) if name.endswith((".py", ".pyi")) else native_functions(source)
    return [f"{name}:{first}: {count} lines" for first, count in functions if count > FUNCTION_LINES_MAX]


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.endswith("_core.pyi")])
def test_no_file_is_too_long(name: str) -> None:
    count = len(Path(ROOT, name).read_text().splitlines())
    assert count <= FILE_LINES_MAX, f"{name} has {count} lines: which noun wants out?"


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith(("csrc/", "python/"))])
def test_functions_fit_a_screen(name: str) -> None:
    assert long_functions(name, Path(ROOT, name).read_text()) == []


@pytest.mark.parametrize("name", TEXTS)
def test_no_forbidden_words(name: str) -> None:
    assert forbidden_words(Path(ROOT, name).read_text()) == []


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("csrc/") and name.endswith(".h")])
def test_header_opens_with_a_comment(name: str) -> None:
    assert Path(ROOT, name).read_text().startswith("// "), f"{name}: say first what it guarantees"


def test_there_are_sources_to_check() -> None:
    assert any(name.startswith("csrc/") for name in SOURCES)
    assert any(name.startswith("python/") for name in SOURCES)


@pytest.mark.parametrize(
    "pieces",
    [
        ("// TO", "DO: later"),
        ("x = 1  # FIX", "ME"),
        ("cd /wo", "rk/main"),
        ("see https://pypi", ".org/simple"),
        ("--find-links=fi", "le:/wheels"),
    ],
)
def test_a_forbidden_word_is_found(pieces: tuple[str, str]) -> None:
    assert len(forbidden_words("fine\n" + "".join(pieces) + "\n")) == 1


def test_a_long_native_function_is_found() -> None:
    filler = "  call('{', \"}\");  // }\n" * FUNCTION_LINES_MAX
    source = f"namespace a {{\nclass B {{\n int ok() {{ return 1; }}\n}};\nint f(int x) noexcept {{\n{filler}}}\n}}\n"
    assert long_functions("x.cc", source) == [f"x.cc:5: {FUNCTION_LINES_MAX + 2} lines"]
    assert long_functions("x.cc", source.replace(filler, filler[:100])) == []
    directives = "#if defined(X) \\\n  && !defined(Y)\n#endif\n"
    assert long_functions("x.cc", f"{directives}namespace a {{\n{filler}}}\n") == []


def test_a_long_python_function_is_found() -> None:
    body = "    pass\n" * FUNCTION_LINES_MAX
    assert long_functions("x.py", f"def f():\n{body}") == [f"x.py:1: {FUNCTION_LINES_MAX + 1} lines"]
    assert long_functions("x.py", f'def f():\n    """{"line" * 9}"""\n{body[9:]}') == []
