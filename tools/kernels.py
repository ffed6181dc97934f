"""Keeps csrc/cuda/kernels_ptx.inc equal to what nvcc makes of csrc/cuda/kernels.cu.

``kernels.py --write`` replaces it, and needs nvcc. ``kernels.py --check`` fails when it has drifted: always by the
digest of the sources in it, with nvcc of the version that it names by its text (others generate other code). With any
nvcc it also fails when ptxas cannot assemble it for a device, or can only with registers spilled to memory.

The driver compiles PTX for the device when it loads it. nvcc stamps it with the newest version of the PTX language that
it knows, and drivers refuse versions newer than themselves; so the stamp is set back to what drivers of CUDA 12.0 know.
That the code keeps to that version is what ptxas checks.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCE = CSRC / "cuda" / "kernels.cu"
GENERATED = CSRC / "cuda" / "kernels_ptx.inc"

BASELINE = "compute_80"
PTX_VERSION = "8.0"  # of CUDA 12.0
DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
DELIMITER = "ptx"

HEADER = """\
// Generated from kernels.cu by tools/kernels.py with nvcc {nvcc}; do not edit.
// Sources: {sources}
R"{delimiter}({ptx}){delimiter}"
"""


class KernelError(Exception):
    """The kernels cannot be compiled, or not as they must be."""


def run(*command: str | Path) -> str:
    """What ``command`` prints to both streams."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise KernelError(f"{Path(command[0]).name}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def find_nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc")


def find_ptxas(nvcc: str) -> str:
    """The one of the same toolkit: nvcc may be a script that leads there."""
    here = re.search(r"^#\$ _HERE_=(.*)$", run(nvcc, "--dryrun", "-ptx", SOURCE), re.MULTILINE)
    return str(Path(here[1], "ptxas") if here else Path(nvcc).with_name("ptxas"))


def sources(path: Path = SOURCE) -> list[Path]:
    """``path`` and what it includes of csrc/, each once."""
    found = [path]
    for name in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
        found += [each for each in sources(CSRC / name) if each not in found]
    return found


def digest_of_sources() -> str:
    """Of all that the compiler sees of them: not comments, not layout."""
    digest = hashlib.sha256()
    for path in sources():
        code = re.sub(r"//.*", "", path.read_text())
        digest.update(f"{path.relative_to(CSRC).as_posix()}:{''.join(code.split())}\n".encode())
    return digest.hexdigest()


def nvcc_version(nvcc: str) -> str:
    found = re.search(r"release \S+ V(\S+)", run(nvcc, "--version"))
    if found is None:
        raise KernelError(f"{nvcc}: does not say its version")
    return found[1]


def compile_ptx(nvcc: str) -> str:
    """PTX of the kernels that depends on nothing but the sources and the version of nvcc."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory, "kernels.ptx")
        run(nvcc, "-ptx", "-std=c++20", "-O3", f"-arch={BASELINE}", f"-I{CSRC}", "-o", target, SOURCE)
        return normalised(target.read_text())


def normalised(ptx: str) -> str:
    """``ptx`` with the version set back, without comments, blank lines, and names made from paths."""
    ptx = re.sub(r"//.*", "", ptx)
    ptx, versions = re.subn(r"^\.version .*$", f".version {PTX_VERSION}", ptx, flags=re.MULTILINE)
    if versions != 1:
        raise KernelError("nvcc: PTX without a version")
    ptx = re.sub(r"_ZN\d+_INTERNAL_[0-9a-f]+_\d+_kernels_cu_[0-9a-f]+_?\d*", "_ZN", ptx)
    return "".join(f"{line.strip()}\n" for line in ptx.splitlines() if line.strip())


def generated(ptx: str, version: str) -> str:
    return HEADER.format(nvcc=version, sources=digest_of_sources(), delimiter=DELIMITER, ptx=ptx)


def ptx_of(text: str) -> str:
    """The PTX inside the text of a generated file."""
    return text.partition(f'R"{DELIMITER}(')[2].rpartition(f'){DELIMITER}"')[0]


def assemble(ptxas: str, ptx: str, device: str) -> str:
    """What ptxas says of ``ptx`` for ``device``; an error unless it assembles without spills and stack."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "kernels.ptx")
        source.write_text(ptx)
        report = run(ptxas, "-v", f"-arch={device}", "-o", Path(directory, "kernels.cubin"), source)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if not frames or any(set(frame) != {"0"} for frame in frames):
        raise KernelError(f"ptxas -arch={device}: registers are spilled\n{report}")
    return report


def check() -> None:
    committed = GENERATED.read_text() if GENERATED.exists() else ""
    remedy = f"{GENERATED.name} is not of these sources: run 'python tools/kernels.py --write'"
    if f"// Sources: {digest_of_sources()}\n" not in committed:
        raise KernelError(remedy)
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc: not found; only the digest of the sources was compared")
        return
    ptxas = find_ptxas(nvcc)
    for device in DEVICES:
        assemble(ptxas, ptx_of(committed), device)
    version = nvcc_version(nvcc)
    if f"with nvcc {version};" not in committed:
        print(f"nvcc: {version} is not the one that made {GENERATED.name}; its code was not compared")
        return
    fresh = generated(compile_ptx(nvcc), version)
    if fresh != committed:
        diff = difflib.unified_diff(committed.splitlines(), fresh.splitlines(), "committed", "fresh", n=1, lineterm="")
        raise KernelError("\n".join([*list(diff)[:40], remedy]))


def write() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        raise KernelError("nvcc: not found; put it into PATH or set NVCC")
    ptxas = find_ptxas(nvcc)
    ptx = compile_ptx(nvcc)
    for device in DEVICES:
        report = assemble(ptxas, ptx, device)
        registers = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", report, re.DOTALL)
        print(f"{device}: registers per thread: " + ", ".join(f"{name} {count}" for name, count in registers))
    GENERATED.write_text(generated(ptx, nvcc_version(nvcc)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--write", action="store_true")
    options = parser.parse_args()
    try:
        (check if options.check else write)()
    except KernelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
