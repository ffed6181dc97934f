"""tools/kernels.py and what it makes: csrc/cuda/kernels_ptx.inc."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "kernels.py"


@pytest.fixture
def kernels(tmp_path: Path) -> ModuleType:
    """The tool, at work on a copy of csrc/."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "tools").mkdir()
    copy = shutil.copy(TOOL, tmp_path / "tools")
    spec = importlib.util.spec_from_file_location("kernels_tool", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_ptx_is_of_the_committed_sources_and_assembles_without_spills() -> None:
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_committed_ptx_is_for_drivers_from_12_0_and_devices_from_8_0_on() -> None:
    text = (ROOT / "csrc" / "cuda" / "kernels_ptx.inc").read_text()
    assert re.findall(r"^(?:R\"ptx\()?\.(?:version|target) (.*)$", text, re.MULTILINE) == ["8.0", "sm_80"]
    assert sorted(re.findall(r"\.visible \.entry (\w+)\(", text)) == [
        "snapstone_compare",
        "snapstone_digest",
        "snapstone_gather",
        "snapstone_scatter",
    ]
    assert str(ROOT) not in text
    assert ".local" not in text  # no memory of a thread's own: nothing is spilled or indexed at run time


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("cuda/kernels.cu", "different != 0", "different == 0"),
        ("cuda/kernel_parameters.h", "kGatherThreads = 256", "kGatherThreads = 128"),
        ("base/xxh3.h", "0x9E3779B1u", "0x9E3779B3u"),
    ],
)
def test_a_changed_source_is_found_without_nvcc(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str
) -> None:
    monkeypatch.setattr(kernels, "find_nvcc", lambda: None)
    kernels.check()
    path = kernels.CSRC / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(kernels.KernelError, match="not of these sources"):
        kernels.check()


def test_a_changed_comment_is_not_a_change(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_nvcc", lambda: None)
    path = kernels.CSRC / "base" / "xxh3.h"
    path.write_text("// A remark.\n" + path.read_text())
    kernels.check()


def test_edited_ptx_is_found_with_nvcc(kernels: ModuleType) -> None:
    if kernels.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    text = kernels.GENERATED.read_text()
    kernels.GENERATED.write_text(text.replace(".maxntid 256, 1, 1\n", ".maxntid 128, 1, 1\n", 1))
    assert kernels.GENERATED.read_text() != text
    if f"with nvcc {kernels.nvcc_version(kernels.find_nvcc())};" not in text:
        pytest.skip("another version of nvcc made the file")
    with pytest.raises(kernels.KernelError, match="not of these sources"):
        kernels.check()


def test_spilled_registers_are_found(kernels: ModuleType) -> None:
    nvcc = kernels.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    # Twice as many blocks on a multiprocessor leave each thread half the registers.
    ptx = kernels.ptx_of(kernels.GENERATED.read_text())
    starved = ptx.replace(".minnctapersm 3\n", ".minnctapersm 6\n", 1)
    assert starved != ptx
    with pytest.raises(kernels.KernelError, match="registers are spilled"):
        kernels.assemble(kernels.find_ptxas(nvcc), starved, "sm_90")
