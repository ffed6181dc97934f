"""A build without libxxhash, libzstd and liburing, as on a machine that has none of them: same files, no codecs.

The extension is built once into ``build/bundled`` of the checkout (a minute on 2 cores; later runs build what changed).
Each test runs a process that imports that extension instead of the installed one.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import snapstone as ss

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
building = importlib.import_module("on_device.building")
LIBRARIES = ("xxhash", "zstd", "uring")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def bundled() -> Path:
    """A directory with the package and the extension that was built without libraries, for PYTHONPATH: made as
    ``benchmarks/gpu.py`` makes its own."""
    if building.tool("cmake") is None:
        pytest.skip("cmake is not installed")
    build = ROOT / "build" / "bundled"
    for command in building.commands(build, without=("xxhash", "zstd", "liburing")):
        done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return building.assemble(build)


def run(bundled: Path, code: str, *arguments: object) -> str:
    """What ``code`` prints in a process with the bundled build."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(bundled), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [0, 1, 5, 100, 240, 241, 70_000, 3_000_001]
    return {f"t{size}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes}


USE_STATE = "import sys, torch, snapstone as ss\nfrom roundtrip.test_bundled_build import state\n"


def test_links_none_of_the_libraries_and_says_so(bundled: Path) -> None:
    extension = bundled / "snapstone" / building.extension_name()
    needed = subprocess.run(["ldd", extension], capture_output=True, text=True, check=True).stdout
    assert [name for name in LIBRARIES if f"lib{name}" in needed] == []
    shown = run(bundled, "import snapstone._core as c; print(c.__file__, c.zstd_compiled_in(), c.uring_compiled_in())")
    assert shown.split() == [str(extension), "False", "False"]


def test_saves_the_same_files_as_any_build(bundled: Path, tmp_path: Path) -> None:
    run(bundled, USE_STATE + "ss.save(state(), checkpoint_id=sys.argv[1])", tmp_path / "bundled")
    ss.save(state(), checkpoint_id=tmp_path / "usual")
    assert ss.verify(tmp_path / "bundled")
    for mine in sorted((tmp_path / "bundled").rglob("*.data")):
        other = tmp_path / "usual" / mine.relative_to(tmp_path / "bundled")
        assert mine.read_bytes() == other.read_bytes()
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    ss.load(loaded, checkpoint_id=tmp_path / "bundled")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().items())


def test_loads_what_any_build_saved_and_finds_a_wrong_byte(bundled: Path, tmp_path: Path) -> None:
    ss.save(state(), checkpoint_id=tmp_path / "usual")
    code = USE_STATE + (
        "target = {name: torch.zeros_like(tensor) for name, tensor in state().items()}\n"
        "try:\n"
        "    ss.load(target, checkpoint_id=sys.argv[1])\n"
        "    print(all(torch.equal(target[name], tensor) for name, tensor in state().items()))\n"
        "except ss.CorruptCheckpointError as error:\n"
        "    print(type(error).__name__)\n"
    )
    assert run(bundled, code, tmp_path / "usual") == "True"
    (data,) = (tmp_path / "usual").rglob("*.data")
    with data.open("r+b") as file:
        at = data.stat().st_size // 2  # inside the largest tensor
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    assert run(bundled, code, tmp_path / "usual") == "CorruptCheckpointError"


def test_refuses_codecs_with_an_error_of_its_own(bundled: Path, tmp_path: Path) -> None:
    ss.save({"zeros": torch.zeros(1 << 20)}, checkpoint_id=tmp_path / "compressed", codec="zstd")
    code = (
        "import sys, torch, snapstone as ss\n"
        "for codec in ('zstd', 'xor-zstd:3'):\n"
        "    try:\n"
        "        ss.save({'zeros': torch.zeros(1 << 20)}, checkpoint_id=sys.argv[1] + '-again', codec=codec)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
        "try:\n"
        "    ss.load({'zeros': torch.ones(1 << 20)}, checkpoint_id=sys.argv[1])\n"
        "except ss.IncompatibleCheckpointError as error:\n"
        "    print(error)\n"
    )
    first, second, third = run(bundled, code, tmp_path / "compressed").splitlines()
    assert first.startswith("codec='zstd': this build of snapstone has no zstd")
    assert second.startswith("codec='xor-zstd:3': this build of snapstone has no zstd")
    assert third.startswith("zstd: this build has none")
    assert not (tmp_path / "compressed-again").exists()
