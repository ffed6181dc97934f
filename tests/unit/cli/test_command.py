"""The command as a process: exit codes, streams, signals, pipes, what it imports, completion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

import snapstone as ss
from snapstone import cli
from snapstone.cli.output import human_age, human_bytes, printable

from .conftest import flip_byte

Run = Callable[..., Result]
COMMAND = [sys.executable, "-m", "snapstone"]
DATA_COMMANDS = ["ls", "info", "verify", "diff", "du", "compact", "watch", "doctor", "report", "trace"]


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(ss.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **variables}


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60, env=environment(**variables)
    )


def test_the_entry_point_is_the_main_of_the_package() -> None:
    project = Path(__file__).resolve().parents[3] / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["scripts"] == {"snapstone": "snapstone.cli:main"}
    assert callable(cli.main)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["verify", "--help"], ["completion", "bash"], ["no-such-command"]]
)
def test_help_version_and_completion_do_without_torch(arguments: list[str]) -> None:
    """torch takes seconds to import. numpy and the extension stay out too."""
    source = f"""
import sys
from snapstone.cli import main
sys.argv = ["snapstone", *{arguments!r}]
try:
    main()
except SystemExit:
    heavy = {{"torch", "numpy", "snapstone._core", "rich"}} & set(sys.modules)
    sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr


def test_public_names_are_functions_whoever_imports_their_modules() -> None:
    source = """
import snapstone.save, snapstone.load
import snapstone as ss
from snapstone import verify
assert all(callable(f) for f in (ss.save, ss.load, ss.verify, verify, ss.wait)), ss.save
assert set(ss.__all__) <= set(dir(ss))
assert not hasattr(ss, "no_such_name")
"""
    assert subprocess.run([sys.executable, "-c", source], env=environment()).returncode == 0


def test_processes_end_with_the_documented_codes(run_path: Path) -> None:
    flip_byte(run_path / "step-9" / "rank-00000.data", 5000)
    good, bad = run("verify", run_path / "step-10"), run("verify", run_path / "step-9")
    assert (good.returncode, good.stderr) == (0, "")
    assert (bad.returncode, bad.stderr) == (1, "")
    absent = run("verify", run_path / "absent")
    assert (absent.returncode, absent.stdout) == (3, "")
    assert absent.stderr == f"snapstone: {run_path / 'absent'}: No such file or directory\n"
    assert run("verify").returncode == 2
    assert run("verify", "--no-such-option", run_path).returncode == 2


def test_debug_shows_the_traceback_and_keeps_the_code(tmp_path: Path) -> None:
    result = run("info", tmp_path / "absent", SNAPSTONE_DEBUG="1")
    assert result.returncode == 3
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("snapstone: ")


def test_a_reader_that_leaves_early_is_no_error_message(saved_run: Path) -> None:
    # The pipe has no reader at all when the command writes, which is what `| head` comes to.
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*COMMAND, "info", str(saved_run / "step-9"), "--tensors"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_full_stdout_is_an_io_error(saved_run: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*COMMAND, "ls", str(saved_run)], stdout=full, stderr=subprocess.PIPE, text=True, env=environment()
        )
    assert (result.returncode, result.stderr) == (4, "snapstone: stdout: No space left on device\n")


def test_ctrl_c_ends_a_verify_at_once(saved_run: Path) -> None:
    data = saved_run / "step-9" / "rank-00000.data"
    process = subprocess.Popen(
        [*COMMAND, "verify", str(saved_run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(SNAPSTONE_IO="buffered", SNAPSTONE_FAULT="pread:1+:delay=1200"),
    )
    try:
        deadline = time.monotonic() + 60
        while not has_open(process.pid, data):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "snapstone: interrupted\n")


def test_ctrl_c_while_torch_starts_is_an_interruption(saved_run: Path) -> None:
    """Twelve moments over the first import of torch, from the mapping of its library on."""
    for number in range(12):
        process = subprocess.Popen(
            [*COMMAND, "verify", str(saved_run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        try:
            while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.002)
            time.sleep(number * 0.04)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
        assert (process.returncode, errors) == (130, "snapstone: interrupted\n"), number


IN_A_FINALIZER = """
import os, signal, sys
from snapstone.cli import app

class Interrupting:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

held = [Interrupting()]
sys.addaudithook(lambda event, args: held.clear() if event == "import" and args[0] == "torch" else None)
app.main()
"""


def test_ctrl_c_amid_a_finalizer_is_not_lost(saved_run: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IN_A_FINALIZER, "verify", str(saved_run)],
        capture_output=True,
        text=True,
        env=environment(SNAPSTONE_IO="buffered", SNAPSTONE_FAULT="pread:1+:delay=1200"),
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (130, "snapstone: interrupted\n")


def has_open(pid: int, path: Path) -> bool:
    try:
        return any(os.readlink(entry.path) == str(path) for entry in os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def test_names_beyond_the_encoding_of_the_terminal_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "laufé").mkdir()
    result = run("ls", tmp_path / "laufé", PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    assert r"lauf\xe9" in result.stdout


def test_completion_offers_commands(tmp_path: Path) -> None:
    result = run(_SNAPSTONE_COMPLETE="bash_complete", COMP_WORDS="snapstone ver", COMP_CWORD="1")
    assert result.stdout.split() == ["plain,verify"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_each_shell(snapstone: Run, shell: str) -> None:
    result = snapstone("completion", shell)
    assert result.exit_code == 0
    assert "_SNAPSTONE_COMPLETE" in result.stdout
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=result.stdout, text=True).returncode == 0


def test_every_command_shows_examples_and_json(snapstone: Run) -> None:
    for name, command in cli.cli.commands.items():
        text = snapstone(name, "--help").stdout
        assert f"Examples:\n    snapstone {name} " in text
        assert isinstance(command, click.Command)
        assert ("--json" in text) == (name in DATA_COMMANDS)


def test_colour_needs_a_terminal_and_no_color_unset(saved_run: Path) -> None:
    plain = run_on_terminal("ls", saved_run, NO_COLOR="1", TERM="xterm")
    coloured = run_on_terminal("ls", saved_run, TERM="xterm")
    assert "\x1b" not in plain
    assert "\x1b[32mok\x1b[0m" in coloured


def run_on_terminal(*arguments: str | Path, **variables: str) -> str:
    master, slave = os.openpty()
    variables = {"NO_COLOR": "", **variables}
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=slave, stderr=slave, env=environment(**variables), text=True
    )
    os.close(slave)
    output = b""
    try:
        while data := os.read(master, 4096):
            output += data
    except OSError:
        pass  # EIO: the other end is closed
    os.close(master)
    assert process.wait(timeout=60) == 0
    return output.decode()


def test_a_bug_is_one_line_with_its_own_code(snapstone: Run, saved_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> None:
        raise AssertionError("a\nb")

    monkeypatch.setattr(ss.Checkpoint, "open", broken)
    result = snapstone("info", saved_run / "step-9")
    assert result.exit_code == 70
    expected = r"snapstone: internal error: AssertionError: a\nb (SNAPSTONE_DEBUG=1 shows where)"
    assert result.stderr == expected + "\n"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (5 << 50, "5120.0 TiB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert human_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (59.9, "59 s"), (61, "1 min 1 s"), (7200, "2 h"), (90061, "1 d 1 h")]
)
def test_ages_for_people(seconds: float, text: str) -> None:
    assert human_age(seconds) == text


def test_escaped_text_has_no_control_characters() -> None:
    everything = "".join(map(chr, range(0x3000))) + "\ud800\ufeff\u202e\U000e0041"
    assert all(character.isprintable() for character in printable(everything))
    assert printable("Grüße 世界 [red]") == "Grüße 世界 [red]"
    assert json.loads(json.dumps(printable("\udc80"))) == r"\udc80"
