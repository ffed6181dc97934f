"""The package built from the tree into a directory of its own, with CMake alone: no network, no installation.

Libraries that the machine lacks are left out, see cmake/Dependencies.cmake.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

__all__ = ["SITE_CUSTOMIZE", "assemble", "commands", "extension_name", "tool"]

ROOT = Path(__file__).resolve().parents[2]
# An editable installation puts a finder of its own before PYTHONPATH.
SITE_CUSTOMIZE = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]\n"


def tool(name: str) -> str | None:
    """`name` beside the interpreter, where pip puts it, or in PATH."""
    places = [Path(sys.executable).parent, Path(sys.prefix) / "bin", os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join(map(str, places)))


def extension_name() -> str:
    return "_core" + str(sysconfig.get_config_var("EXT_SUFFIX"))


def commands(build: Path, *, without: Sequence[str] = ()) -> list[list[str]]:
    """What makes the extension in `build`, for this Python. `without`: libraries to do without even if they are there.

    Raises:
        RuntimeError: there is no CMake.
    """
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        raise RuntimeError("cmake is not installed")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure = [cmake, *generator, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DSNAPSTONE_WITHOUT={';'.join(without)}"]
    cores = str(len(os.sched_getaffinity(0)))
    return [configure, [cmake, "--build", str(build), "--target", "_core", "--parallel", cores]]


def assemble(build: Path) -> Path:
    """The package with the extension that was built, in a directory for PYTHONPATH, found before an installed one."""
    package = build / "python" / "snapstone"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "snapstone", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(build / extension_name(), package)
    (package.parent / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
    return package.parent
