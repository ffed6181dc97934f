"""`snapstone doctor`."""

from __future__ import annotations

from typing import Any

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .output import bytes_option, emit_facts, emit_json, json_option, size_format

__all__ = ["doctor"]

# What it means for delta saves when a directory has them, and when it has not.
_HARD_LINKS = ("a delta save writes only what changed", "every save is a full one")
_REFLINKS = ("compact shares blocks instead of copying", "compact copies bytes")


@click.command(short_help="Report what this machine can do for checkpoints.")
@directory_argument("directory", metavar="[DIR]", default=".")
@click.option("--no-speed", is_flag=True, help="Do not write and read 256 MiB in DIR.")
@json_option
@bytes_option
@click.pass_context
def doctor(ctx: click.Context, directory: str, no_speed: bool, as_json: bool, exact: bool) -> None:
    """Reports what this machine can do for checkpoints in DIR (default: the current directory).

    Versions, CUDA, io_uring, O_DIRECT, hard links and reflinks with the reason where they do not work, memory limits,
    the file system, the I/O rung that saves into DIR use and why better ones were passed over, and the speed of one
    save and one load.

    \b
    Examples:
      snapstone doctor /mnt/checkpoints
      snapstone doctor --no-speed                  # facts alone
      SNAPSTONE_IO=buffered snapstone doctor       # how much slower would that be?
      snapstone doctor --json | jq .speed

    Exits with 1 when no rung works or what was read back differs.
    """
    from .machine import facts_of, speed_of

    facts = facts_of(directory)
    facts["speed"] = None
    if not no_speed and facts["chosen"]["rung"] is not None:
        facts["speed"] = speed_of(directory, facts["file_system"]["free_bytes"])
    if as_json:
        emit_json("doctor", facts)
    else:
        _show(facts, exact)
    differs = facts["speed"] is not None and facts["speed"].get("identical") is False
    ctx.exit(ExitCode.FINDING if differs or facts["chosen"]["rung"] is None else ExitCode.OK)


def _show(facts: dict[str, Any], exact: bool) -> None:
    size = size_format(exact)
    pages, memlock, io_uring = facts["huge_pages"], facts["memlock_limit_bytes"], facts["io_uring"]
    file_system, chosen = facts["file_system"], facts["chosen"]
    emit_facts(
        [
            *facts["versions"].items(),
            ("cpus", str(facts["cpus"])),
            ("memory available", size(facts["memory_available_bytes"])),
            ("memlock limit", "unlimited" if memlock is None else size(memlock)),
            ("huge pages", f"transparent: {pages['transparent'] or 'unknown'}; {_known(pages['reserved'])} reserved"),
            *_cuda(facts["cuda"], size),
            ("directory", facts["directory"]),
            ("file system", file_system["name"] + _kind(file_system)),
            ("free space", f"{size(file_system['free_bytes'])} of {size(file_system['total_bytes'])}"),
            ("io_uring", _answer(io_uring) if io_uring["compiled_in"] else "no: not built in"),
            ("O_DIRECT", _answer(facts["o_direct"])),
            ("hard links", _answer(facts["hard_links"]) + _meaning(facts["hard_links"], *_HARD_LINKS)),
            ("reflinks", _answer(facts["reflinks"]) + _meaning(facts["reflinks"], *_REFLINKS)),
            ("rung", (chosen["rung"] or "none works") + (" (SNAPSTONE_IO)" if chosen["forced"] else "")),
            *(("  passed over", reason) for reason in chosen["passed_over"]),
            *_speed(facts["speed"], size),
        ]
    )


def _answer(fact: dict[str, Any]) -> str:
    return "yes" if fact["usable"] else f"no: {fact['reason']}"


def _meaning(fact: dict[str, Any], having: str, lacking: str) -> str:
    return f"; {having if fact['usable'] else lacking}"


def _known(count: int | None) -> str:
    return "unknown number" if count is None else str(count)


def _kind(file_system: dict[str, Any]) -> str:
    if file_system["memory_backed"]:
        return " (memory: nothing here survives a reboot)"
    return " (network)" if file_system["network"] else ""


def _cuda(cuda: dict[str, Any], size: Any) -> list[tuple[str, str]]:
    if not cuda["available"]:
        return [("CUDA", f"no: {cuda['reason']}")]
    version = cuda["driver_version"]
    lacking = "" if cuda["torch"] else "; torch has no CUDA here"
    return [
        ("CUDA", f"driver for {version // 1000}.{version % 1000 // 10}; {_optional_calls(cuda)}{lacking}"),
        *((f"  device {device['ordinal']}", _device(device, size)) for device in cuda["devices"]),
    ]


def _optional_calls(cuda: dict[str, Any]) -> str:
    names = {
        "batched_copies": "batched copies",
        "stream_ordered_memory": "stream-ordered memory",
        "kernel_launches": "kernels",
    }
    missing = [name for key, name in names.items() if not cuda[key]]
    return "no " + ", no ".join(missing) if missing else "all calls"


def _device(device: dict[str, Any], size: Any) -> str:
    major, minor = device["compute_capability"]
    node = "" if device["numa_node"] is None else f", NUMA node {device['numa_node']}"
    return f"{device['name']}, sm_{major}{minor}, {size(device['total_bytes'])}{node}"


def _speed(speed: dict[str, Any] | None, size: Any) -> list[tuple[str, str]]:
    if speed is None:
        return []
    if "skipped" in speed:
        return [("speed", f"not measured: {speed['skipped']}")]
    nbytes = size(speed["nbytes"])
    return [
        ("save speed", f"{speed['write_bytes_per_second'] / 1e9:.2f} GB/s ({nbytes}, durable)"),
        ("load speed", f"{speed['read_bytes_per_second'] / 1e9:.2f} GB/s ({nbytes}, verified)"),
        ("read back", "identical" if speed["identical"] else "corrupt"),
    ]
