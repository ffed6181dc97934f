"""File systems on devices that fail or lie: made of loop devices, nbdkit and strace where these can be used."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lacking import skip_without

TOOL_S = 60.0
IMAGE_BYTES = 48 << 20
JOURNAL_BYTES = 32 << 20
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = ctypes.c_ulong(-1).value

# nbdkit's pwrite, which gets count $3 and offset $4: forgets what it is given while the file $trigger is there.
FORGETS = (
    'if [ -e "$trigger" ]; then cat > /dev/null; '
    'else dd of="$image" seek=$4 conv=notrunc oflag=seek_bytes iflag=fullblock bs=1M status=none; fi'
)
READS = 'dd if="$image" skip=$4 count=$3 iflag=count_bytes,skip_bytes,fullblock bs=1M status=none'


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=TOOL_S, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout.strip()


@functools.cache
def lacks_loop_devices() -> str:
    """Why no image can be mounted here; "" if it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    for tool in ("mkfs.ext4", "losetup", "mount"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    try:
        with tempfile.TemporaryDirectory() as directory, mounted(Path(directory), make_image(Path(directory, "image"))):
            return ""
    except OSError as error:
        return str(error)


@functools.cache
def lacks_network_disks() -> str:
    for tool in ("nbdkit", "nbdfuse"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "there is no /dev/fuse"


def needed(*lacks: Callable[[], str]) -> None:
    """Skips the test where something is missing, and says what."""
    for one in lacks:
        if why := one():
            skip_without("nbdkit" if one is lacks_network_disks else "mounts", why)


def make_image(path: Path, nbytes: int = IMAGE_BYTES, block_bytes: int = 4096, *options: str) -> Path:
    """An ext4 file system in a sparse file. Blocks are pages: of a write that does not begin at one FUSE may fail the
    rest alone, and the loop device takes what is short for success.
    """
    with path.open("wb") as file:
        file.truncate(nbytes)
    run("mkfs.ext4", "-qF", "-b", str(block_bytes), "-E", "lazy_itable_init=0,lazy_journal_init=0", *options, path)
    return path


class Mount:
    """Where the file system is; `again` unmounts and mounts it, after which what it holds is what its device has."""

    def __init__(self, device: str, point: Path, journal: str = "") -> None:
        self.device, self.point = device, point
        self._options = "noauto_da_alloc" + (f",journal_path={journal}" if journal else "")
        self._journal = ["-j", journal] if journal else []
        point.mkdir(exist_ok=True)
        self._mount()

    def _mount(self) -> None:
        run("mount", "-t", "ext4", "-o", self._options, self.device, self.point)

    def again(self) -> bool:
        """Whether the file system had to be repaired: a device that fails may leave a journal that is not replayed."""
        self.unmount()
        try:
            self._mount()
            return False
        except OSError:
            quietly("e2fsck", "-fy", *self._journal, self.device)
            self._mount()
            return True

    def unmount(self) -> None:
        end = time.monotonic() + 10
        while True:
            try:
                run("umount", self.point)
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)


@contextmanager
def loop_device(image: Path) -> Iterator[str]:
    device = run("losetup", "-f", "--show", image)
    try:
        yield device
    finally:
        quietly("losetup", "-d", device)


@contextmanager
def mounted(directory: Path, image: Path, journal: str = "") -> Iterator[Mount]:
    """The file system in an image, or in what stands for one, mounted below `directory`."""
    with ExitStack() as stack:
        mount = Mount(stack.enter_context(loop_device(image)), directory / "mount", journal)
        stack.callback(quietly, "umount", "-l", mount.point)
        yield mount


def quietly(*command: str | Path) -> None:
    with suppress(OSError, subprocess.TimeoutExpired):
        run(*command)


@contextmanager
def small_memory(directory: Path, nbytes: int) -> Iterator[Path]:
    """A tmpfs of that size."""
    point = directory / "memory"
    point.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", point)
    try:
        yield point
    finally:
        quietly("umount", "-l", point)


@contextmanager
def network_disk(directory: Path, *plugin: str | Path, env: dict[str, str] | None = None) -> Iterator[Path]:
    """What an nbdkit plugin serves, as a file."""
    socket, point = directory / "socket", directory / "nbd"
    point.mkdir()
    with ExitStack() as stack:
        command = ["nbdkit", "-U", str(socket), "-f", *map(str, plugin)]
        server = subprocess.Popen(command, env={**os.environ, **(env or {})}, stderr=subprocess.DEVNULL)
        stack.callback(end, server)
        wait_until(socket.exists, server)
        client = subprocess.Popen(["nbdfuse", str(point / "disk"), "--unix", str(socket)], stderr=subprocess.DEVNULL)
        stack.callback(end, client)
        stack.callback(quietly, "umount", "-l", point)
        wait_until((point / "disk").exists, client)
        yield point / "disk"


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until(is_there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while not is_there():
        if process.poll() is not None or time.monotonic() > deadline:
            thing = "strace" if "strace" in str(process.args) else "nbdkit"
            skip_without(thing, f"{process.args!r} does not run here")
        time.sleep(0.01)


@contextmanager
def failing_disk(directory: Path, percent: int, journal: str = "") -> Iterator[tuple[Mount, Path]]:
    """A mount whose device fails so many writes with EIO while the file `trigger` is there; with a `journal`, that
    device, which works, holds the journal.
    """
    options = ("-J", f"device={journal}") if journal else ()
    image, trigger = make_image(directory / "image", IMAGE_BYTES, 4096, *options), directory / "trigger"
    plugin = ["--filter=error", "file", image, "error=EIO", f"error-pwrite-rate={percent}%", f"error-file={trigger}"]
    with network_disk(directory, *plugin) as disk, mounted(directory, disk, journal) as mount:
        yield mount, trigger
        trigger.unlink(missing_ok=True)


@contextmanager
def failing_data_disk(directory: Path, percent: int) -> Iterator[tuple[Mount, Path]]:
    """A mount of which the data of files fails to be written so often, and the journal never: one failed write to a
    journal ends all writing, so that nothing is acknowledged any more.
    """
    journal = directory / "journal"
    with journal.open("wb") as file:
        file.truncate(JOURNAL_BYTES)
    run("mkfs.ext4", "-qF", "-b", "4096", "-O", "journal_dev", journal)
    with loop_device(journal) as device, failing_disk(directory, percent, device) as made:
        yield made


@contextmanager
def forgetful_disk(directory: Path) -> Iterator[tuple[Mount, Path]]:
    """A mount whose device acknowledges writes and flushes, and forgets them, while the file `trigger` is there."""
    # Blocks smaller than a page: whole pages would stay in the cache below the loop device, and be read from there.
    image, trigger = make_image(directory / "image", block_bytes=1024), directory / "trigger"
    plugin = ["eval", f"get_size=echo {IMAGE_BYTES}", f"pread={READS}", f"pwrite={FORGETS}", "can_write=true"]
    plugin += ["flush=true", "can_flush=true"]
    env = {"image": str(image), "trigger": str(trigger)}
    with network_disk(directory, *plugin, env=env) as disk, mounted(directory, disk) as mount:
        yield mount, trigger
        trigger.unlink(missing_ok=True)


@contextmanager
def traced(thread: int, *injections: str, log: Path) -> Iterator[None]:
    """strace on one thread of this process, from now on."""
    if shutil.which("strace") is None:
        skip_without("strace", "there is no strace")
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(PR_SET_PTRACER_ANY), 0, 0, 0)
    options = [f"--inject={one}" for one in injections]
    names = ",".join(one.partition(":")[0] for one in injections)
    command = ["strace", "-o", str(log), "-e", f"trace={names}", *options, "-p", str(thread)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    status = Path(f"/proc/self/task/{thread}/status")
    try:
        wait_until(lambda: f"TracerPid:\t{tracer.pid}" in status.read_text(), tracer)
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(10)
        assert tracer.stderr is not None
        tracer.stderr.close()
