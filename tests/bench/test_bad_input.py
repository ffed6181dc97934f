"""What cannot be measured is refused before anything starts, with one line that has the numbers and the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from snapstone.bench.engines import NAMES, chosen
from snapstone.cli import cli


def stall(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["bench", "stall", "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", "gpt-9"), 2, "--model gpt-9: unknown; there are tiny, small"),
        (("--model", "tiny", "--engine", "dpc"), 2, "--engine dpc: unknown; there are snapstone, snapstone-dcp"),
        (("--model", "tiny", "--engine", ","), 2, "--engine: names no engine"),
        (("--model", "tiny", "--engine", "x=nowhere"), 2, "is not of the form package.module:Class"),
        (("--model", "tiny", "--pairs", 0), 2, "--pairs 0: must be at least 1"),
        (("--model", "tiny", "--interval-steps", 0), 2, "--interval-steps 0: must be at least 1"),
        (("--model", "tiny", "--fsdp", 2), 2, "--fsdp 2 times --tp 1 does not divide the 1 ranks"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, arguments: tuple[object, ...], code: int, message: str) -> None:
    result = stall(*arguments, "--out", tmp_path / "R")
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "R").exists()


def test_too_little_memory_is_refused_with_both_numbers(tmp_path: Path) -> None:
    result = stall("--model", "llama-405b", "--engine", "dcp", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--model llama-405b: 13607.30 GiB of memory are needed on this machine" in result.stderr
    assert "GiB are available; take a smaller model, one engine at a time or more ranks" in result.stderr


def test_several_engines_need_the_memory_that_one_may_keep_as_well(tmp_path: Path) -> None:
    result = stall("--model", "llama-405b", "--engine", "snapstone,dcp", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--model llama-405b: 18143.06 GiB of memory are needed on this machine" in result.stderr
    assert "what an engine before keeps" in result.stderr


def test_too_little_disk_is_refused_with_both_numbers(tmp_path: Path) -> None:
    result = stall("--model", "tiny", "--saves", 10**9, "--out", tmp_path)
    assert result.exit_code == 2
    assert "GiB of disk are needed (1000000002 saves of 0.00 GiB)" in result.stderr
    assert "are free; take fewer --saves or --checks, or another --dir" in result.stderr


def test_saves_that_wait_for_their_check_need_disk_too(tmp_path: Path) -> None:
    result = stall("--model", "tiny", "--saves", 1, "--checks", 10**9, "--out", tmp_path)
    assert result.exit_code == 2
    assert "GiB of disk are needed (1000000002 saves of 0.00 GiB)" in result.stderr


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = stall("--model", "tiny", "--out", tmp_path / "file" / "R")
    assert result.exit_code == 4
    assert str(tmp_path / "file") in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = stall("--model", "tiny", "--out", tmp_path)
    assert result.exit_code == 4
    assert "the directory cannot be written" in result.stderr


def test_all_names_every_engine_once() -> None:
    assert chosen("dcp, all ,dcp") == ["dcp", *(name for name in NAMES if name != "dcp")]


def test_subcommands_are_listed_without_being_imported() -> None:
    assert "stall" in CliRunner().invoke(cli, ["bench", "--help"]).stdout
    assert "Examples:" in CliRunner().invoke(cli, ["bench", "stall", "--help"]).stdout
