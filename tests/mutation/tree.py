"""A copy of the repository whose checks can be taken away one at a time."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from mutation.sites import Site, find, instrumented, sites_of

__all__ = ["ROOT", "build_native", "digest_of", "make_tree"]

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "benchmarks"))
building = importlib.import_module("on_device.building")
COPIED = ("csrc", "python", "tests", "cmake", "docs", "tools", "CMakeLists.txt", "pyproject.toml", "README.md")
NATIVE_FOLDERS = ("base", "os", "codec", "format", "mem", "io", "store", "pipeline")
# Who falls out of a function for the lack of a `throw` dies at once, and takes nothing along.
FLAGS = "-w -g0 -fsanitize=return -fsanitize-undefined-trap-on-error"


def make_tree(tree: Path) -> list[Site]:
    """Copies and instruments; with the extension of this repository, which `build_native` replaces."""
    for name in COPIED:
        source, target = ROOT / name, tree / name
        if source.is_dir():
            _copy_changed(source, target)
        elif source.exists():
            _write_changed(target, source.read_text())
    sites = find(ROOT)
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    for path, here in by_path.items():
        _write_changed(tree / path, instrumented((ROOT / path).read_text(), here))
    _write_changed(tree / "csrc/base/mutant.h", (HERE / "mutant.h").read_text())
    _write_changed(tree / "python/snapstone/_mutant.py", (HERE / "mutant.py").read_text())
    extension = tree / "python/snapstone" / building.extension_name()
    if not extension.exists():  # it is installed elsewhere
        where = [sys.executable, "-c", "import snapstone._core as core; print(core.__file__)"]
        installed = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
        shutil.copy2(installed, extension)
    _write_changed(tree / "python/sitecustomize.py", building.SITE_CUSTOMIZE)
    return sites


def build_native(tree: Path, jobs: int = 2) -> None:
    """The extension, and the native tests in build/native/tests/native."""
    build = tree / "build"
    environment = {**os.environ, "CCACHE_BASEDIR": str(tree), "CCACHE_NOHASHDIR": "1"}
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    options = [f"-DCMAKE_CXX_FLAGS={FLAGS}", "-DSNAPSTONE_NATIVE_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release", *launcher]
    configure = ["cmake", "-S", str(tree), "-B", str(build), *options]
    configure += [] if (build / "build.ninja").exists() else ["-G", "Ninja"]
    subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
    programs = [f"native_{path.relative_to(tree / 'tests/native').with_suffix('')}" for path in _native_sources(tree)]
    targets = ["_core", *(name.replace("/", "_").removesuffix("_test") for name in programs)]
    subprocess.run(["cmake", "--build", str(build), "-j", str(jobs), "-t", *targets], check=True, env=environment)
    (extension,) = build.glob("_core*.so")
    target = tree / "python/snapstone" / building.extension_name()
    shutil.copy2(extension, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)  # never under a process that has it mapped


def _native_sources(tree: Path) -> list[Path]:
    """Of what tests the sites; other programs are not built."""
    found = sorted((tree / "tests/native").rglob("*_test.cc"))
    return [path for path in found if path.parent.name in NATIVE_FOLDERS]


def digest_of(path: str) -> str:
    """Results of sites are kept while their file stays what it is."""
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:16]


def _copy_changed(source: Path, target: Path) -> None:
    """What is as it was keeps its time, so that a second build does little. Instrumented files come later."""
    for directory, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name not in ("__pycache__", "results", "_build")]
        into = target / Path(directory).relative_to(source)
        into.mkdir(parents=True, exist_ok=True)
        for name in files:
            here = Path(directory, name)
            if here.suffix in (".py", ".cc", ".h") and _is_instrumented(here):
                continue
            if here.suffix == ".so" and (into / name).exists():
                continue  # perhaps that of `build_native`
            if not (into / name).exists() or (into / name).read_bytes() != here.read_bytes():
                shutil.copy(here, into / name)  # with the time of now: it may have changed while it was built


def _is_instrumented(path: Path) -> bool:
    return bool(sites_of(str(path.relative_to(ROOT)), path))


def _write_changed(target: Path, text: str) -> None:
    if not target.exists() or target.read_text() != text:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
