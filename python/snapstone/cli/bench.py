"""`snapstone bench`: the group; each subcommand is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final

import click

__all__ = ["bench"]

_SUBCOMMANDS: Final[Mapping[str, tuple[str, str]]] = {  # name: module of this package, command in it
    "disk": ("bench_disk", "disk"),
    "link": ("bench_link", "link"),
    "load": ("bench_load", "load"),
    "model": ("bench_model", "model"),
    "stall": ("bench_stall", "stall"),
}


class _Lazy(click.Group):
    """A group that lists its commands by name and imports one when it runs or shows its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _SUBCOMMANDS:
            return None
        module, name = _SUBCOMMANDS[cmd_name]
        command = getattr(importlib.import_module(f".{module}", __package__), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Lazy, short_help="Measure what checkpoints cost here, with any engine.")
def bench() -> None:
    """Measures what checkpoints cost a training run on this machine or cluster. docs/bench.md has the method.

    \b
    Examples:
      snapstone bench stall --model tiny --engine snapstone,dcp --out R/
      snapstone bench model --from R/ --gpus 1024,16384

    Every measurement leaves one JSON document in the directory given by --out.
    """
