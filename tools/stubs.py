"""Keeps python/snapstone/_core.pyi equal to what pybind11-stubgen says of the built extension.

``stubs.py --check`` fails with a diff when the committed stub has drifted; ``stubs.py --write`` replaces it.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).resolve().parent.parent / "python" / "snapstone" / "_core.pyi"


def generate() -> str:
    """The stub of the ``snapstone._core`` that this interpreter imports, formatted like the rest of the package."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [sys.executable, "-m", "pybind11_stubgen", "snapstone._core", "--output-dir", directory, "--exit-code"],
            check=True,
        )
        generated = Path(directory, "snapstone", "_core.pyi")
        subprocess.run(
            [sys.executable, "-m", "ruff", "format", "-q", "--config", "line-length=120", generated], check=True
        )
        return generated.read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--write", action="store_true")
    options = parser.parse_args()

    stub = generate()
    if options.write:
        STUB.write_text(stub)
        return 0
    committed = STUB.read_text() if STUB.exists() else ""
    if committed == stub:
        return 0
    sys.stderr.writelines(
        difflib.unified_diff(
            committed.splitlines(keepends=True), stub.splitlines(keepends=True), "_core.pyi, committed", "_core, built"
        )
    )
    print("python/snapstone/_core.pyi differs from the built extension: run 'make stubs'", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
