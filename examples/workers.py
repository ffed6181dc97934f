"""Worker processes of one job on this machine: started together, waited for together, killed together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
TAIL_LINES = 15


class WorkerFailed(RuntimeError):
    """A worker exited with an error or too late; carries the end of its log."""


class Workers:
    """`script` in `world_size` processes that know each other by the usual torch.distributed variables.

    Each writes what it prints to LOG.rank-R.out. Leaving the `with` block leaves no process behind.
    """

    def __init__(self, script: str, options: dict[str, Any], *, log: Path, world_size: int = 2) -> None:
        port = free_port()
        self.outputs = [Path(f"{log}.rank-{rank}.out") for rank in range(world_size)]
        self.processes: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, str(HERE / script), "--log", str(log)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        for rank, output in enumerate(self.outputs):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
            }
            with output.open("wb") as stream:
                self.processes.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
                    )
                )

    def check(self) -> bool:
        """Whether any is still running. Raises WorkerFailed as soon as one has failed, however busy its peers are."""
        codes = [process.poll() for process in self.processes]
        for code, output in zip(codes, self.outputs, strict=True):
            if code:
                raise WorkerFailed(f"{output.stem} exited with {code}:\n{tail(output)}")
        return None in codes

    def wait(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while self.check():
            if time.monotonic() > end:
                raise WorkerFailed(f"still running after {timeout_s:.0f} s:\n{tail(self.outputs[0])}")
            time.sleep(0.05)

    def kill(self) -> list[int]:
        """SIGKILL to all, then the signal that ended each; 0 for one that had already exited by itself."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        return [max(0, -process.wait()) for process in self.processes]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(output: Path) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-TAIL_LINES:])
