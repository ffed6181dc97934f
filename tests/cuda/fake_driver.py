"""The fake CUDA driver in Python tests: built when it is needed, chosen by the environment, told what to do, asked what
it saw. tests/cuda/fake/options.h lists what FAKECUDA_* can ask of it, control.h what its functions mean.

The engine looks for a driver once in a process: `choose` comes before that, and `FakeDriver` belongs to the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["FakeDriver", "build", "choose", "environment"]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).resolve().parent / "fake"
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", f"-I{SOURCES}", "-pthread"]


def build() -> Path:
    """The library, compiled unless these very sources have been; in `build/` of the repository, or where files go
    that nobody keeps. Raises RuntimeError with what the compiler said."""
    compiler = os.environ.get("CXX", "c++")
    sources = sorted(SOURCES.glob("*.cc"))
    digest = hashlib.sha256(repr((compiler, FLAGS)).encode())
    ours = (path for layer in ("base", "cuda") for path in sorted((ROOT / "csrc" / layer).glob("*.h")))
    headers = (*sorted(SOURCES.glob("*.h")), *ours)
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    directory = _output_directory() / f"fakecuda-{digest.hexdigest()[:16]}"
    library = directory / "libfakecuda.so"
    if not library.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            objects = [Path(scratch, source.stem + ".o") for source in sources]
            _run(
                [compiler, *FLAGS, "-c", str(source), "-o", str(made)]
                for source, made in zip(sources, objects, strict=True)
            )
            made = Path(scratch, "libfakecuda.so")
            _run([[compiler, "-shared", "-pthread", "-o", str(made), *map(str, objects), "-ldl"]])
            made.rename(library)  # whole, or not at all: another process may be here, too
    return library


def _output_directory() -> Path:
    directory = ROOT / "build"
    try:
        directory.mkdir(exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return directory if os.access(directory, os.W_OK) else Path(tempfile.gettempdir())


def _run(commands: Iterable[list[str]]) -> None:
    """All of them, as many at a time as there are cores."""
    running: list[subprocess.Popen[str]] = []
    limit = len(os.sched_getaffinity(0))

    def finish(process: subprocess.Popen[str]) -> None:
        output, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"the fake CUDA driver does not build:\n{output}")

    for command in commands:
        if len(running) >= limit:
            finish(running.pop(0))
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in running:
        finish(process)


def environment(**options: object) -> dict[str, str]:
    """What makes a process use the fake: `environment(mode="lazy", seed=7, gbps=0.1, fail="cuInit:1:34")`."""
    return {"SNAPSTONE_LIBCUDA": str(build()), **{f"FAKECUDA_{name.upper()}": str(v) for name, v in options.items()}}


def choose(**options: object) -> None:
    """Makes this process use the fake, unless SNAPSTONE_LIBCUDA names a library already."""
    if "SNAPSTONE_LIBCUDA" not in os.environ:
        os.environ.update(environment(**options))


class FakeDriver:
    """The fake of this process. Raises RuntimeError when the engine has another driver, or none; unless `engine` is
    False, which is for processes where it is to have none.

    Streams are handles (None: the legacy default stream), addresses and sizes are ints in bytes.
    """

    def __init__(self, *, engine: bool = True) -> None:
        from snapstone import _native

        facts = _native.cuda_facts() if engine else None
        if facts and not (facts["available"] and facts["devices"][0]["name"].startswith("Fake CUDA device")):
            raise RuntimeError(f"not on the fake CUDA driver: {facts}")
        self.library = ctypes.CDLL(os.environ["SNAPSTONE_LIBCUDA"])
        self._declare()
        if not engine and self.library.cuInit(0) != 0:
            raise RuntimeError("the fake CUDA driver cannot be initialised")

    def _declare(self) -> None:
        size, handle, number = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
        text = ctypes.c_char_p
        for name, result, arguments in (
            ("read", number, [size, handle, size]),
            ("write", number, [size, handle, size]),
            ("alloc", size, [number, size, handle]),
            ("free", None, [size]),
            ("stream", handle, [number]),
            ("enqueue_write", number, [number, handle, size, handle, size]),
            ("enqueue_fill", number, [number, handle, size, number, size]),
            ("enqueue_copy", number, [number, handle, *[size] * 6]),
            ("enqueue_delay", number, [number, handle, size]),
            ("enqueue_hold", number, [number, handle]),
            ("let_go", None, []),
            ("host_access", number, [handle, size, number]),
            ("capture", number, [number, handle, number]),
            ("drain", None, []),
            ("fail", number, [text]),
            ("mode", number, [text]),
            ("seed", None, [size]),
            ("violations", text, []),
            ("counters", text, []),
            ("reset", None, []),
            ("pending", size, []),
        ):
            function = getattr(self.library, f"fakecuda_{name}")
            function.restype = result
            function.argtypes = arguments

    def stream(self, device: int = 0) -> int:
        """A stream like torch's."""
        return int(self.library.fakecuda_stream(device))

    def alloc(self, nbytes: int, *, stream: int | None = None, device: int = 0) -> int:
        """The address of memory like that of torch's caching allocator. Raises MemoryError."""
        address = int(self.library.fakecuda_alloc(device, nbytes, stream))
        if address == 0:
            raise MemoryError(f"{nbytes} bytes on fake device {device}")
        return address

    def free(self, address: int) -> None:
        """The next owner of these bytes writes 0xDE to them, in the stream that they were allocated for."""
        self.library.fakecuda_free(address)

    def read(self, address: int, nbytes: int) -> bytes:
        """Bytes of the device, now: right only after `drain` or an event."""
        buffer = ctypes.create_string_buffer(nbytes)
        self._done(self.library.fakecuda_read(address, buffer, nbytes))
        return buffer.raw

    def write(self, address: int, data: bytes) -> None:
        """Bytes to the device, now."""
        self._done(self.library.fakecuda_write(address, data, len(data)))

    def enqueue_write(self, address: int, data: bytes, *, stream: int | None = None, device: int = 0) -> None:
        """Bytes that land when the stream comes to them."""
        self._done(self.library.fakecuda_enqueue_write(device, stream, address, data, len(data)))

    def enqueue_fill(self, address: int, byte: int, nbytes: int, *, stream: int | None = None, device: int = 0) -> None:
        self._done(self.library.fakecuda_enqueue_fill(device, stream, address, byte, nbytes))

    def enqueue_copy(
        self, target: int, source: int, nbytes: int, *, stream: int | None = None, device: int = 0
    ) -> None:
        self._done(self.library.fakecuda_enqueue_copy(device, stream, target, source, nbytes, 1, nbytes, nbytes))

    def enqueue_delay(self, seconds: float, *, stream: int | None = None, device: int = 0) -> None:
        """Work of the training that takes this long and touches nothing."""
        self._done(self.library.fakecuda_enqueue_delay(device, stream, round(seconds * 1e6)))

    def enqueue_hold(self, *, stream: int | None = None, device: int = 0) -> None:
        """Work that does not end before `let_go` or a drain."""
        self._done(self.library.fakecuda_enqueue_hold(device, stream))

    def let_go(self) -> None:
        self.library.fakecuda_let_go()

    def host_access(self, address: int, nbytes: int, *, write: bool) -> bool:
        """Whether the host may touch these bytes of its own now; where it may not, that is a violation."""
        return int(self.library.fakecuda_host_access(address, nbytes, int(write))) == 0

    def capture(self, on: bool, *, stream: int | None = None, device: int = 0) -> None:
        """The stream begins or ends the capture of a graph."""
        self._done(self.library.fakecuda_capture(device, stream, int(on)))

    def drain(self) -> None:
        """Returns when all work of all streams has ended, which the host has seen then."""
        self.library.fakecuda_drain()

    def fail(self, rules: str) -> None:
        """Rules as in FAKECUDA_FAIL, from now on, instead of those before."""
        self._done(self.library.fakecuda_fail(rules.encode()))

    def mode(self, mode: str) -> None:
        self._done(self.library.fakecuda_mode(mode.encode()))

    def seed(self, seed: int) -> None:
        self.library.fakecuda_seed(seed)

    def violations(self) -> list[str]:
        """What was wrong since the last `reset`, in the order in which it was found."""
        return str(self.library.fakecuda_violations().decode()).splitlines()

    def counters(self) -> dict[str, int]:
        """Calls by name, and: copies, batches, unregistered_copies, bytes_to_host, bytes_to_device, bytes_on_device,
        registered_bytes, device_syncs, launches_<kernel>, work_done, pending, queue_max, seed."""
        return dict(json.loads(self.library.fakecuda_counters()))

    def pending(self) -> int:
        return int(self.library.fakecuda_pending())

    def reset(self) -> None:
        """Drains; no counters, violations and fail rules are left."""
        self.library.fakecuda_reset()

    @staticmethod
    def _done(result: int) -> None:
        if result != 0:
            raise RuntimeError("the fake CUDA driver refuses; its violations say why")
