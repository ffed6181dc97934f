"""`snapstone bench stall`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .output import emit, printable

__all__ = ["stall"]


@click.command(short_help="How long saves hold up training, engine by engine.")
@click.option("--model", required=True, help="tiny, small, smollm-135m, medium, llama-1b, -3b, -8b, -70b or -405b.")
@click.option("--engine", default="all", show_default=True, help='Names with commas between them, or "all".')
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the result.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Where checkpoints go; default: below --out.")
@click.option("--saves", default=4, show_default=True, help="Saves in a block.")
@click.option("--pairs", default=5, show_default=True, help="A/B pairs; fewer than 5 are marked in the result.")
@click.option("--cadence", "cadences", multiple=True, type=click.Choice(["relaxed", "tight"]), help="Default: both.")
@click.option("--interval-steps", type=int, help="Steps between saves of the relaxed cadence.")
@click.option("--fsdp", default=1, show_default=True, help="Ranks that share the parameters (FSDP2).")
@click.option("--tp", default=1, show_default=True, help="Ranks that share each layer.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is any.")
@click.option("--state-only", is_flag=True, help="The state without computing: changed in place once a step.")
@click.option("--step-seconds", default=0.1, show_default=True, help="What a step waits with --state-only.")
@click.option("--batch", default=2, show_default=True, help="Sequences of a rank in a step.")
@click.option("--length", default=128, show_default=True, help="Tokens of a sequence.")
@click.option("--checks", default=2, show_default=True, help="Saves whose bytes are checked.")
@click.option("--kills", default=1, show_default=True, help="Saves during which a rank is killed.")
@click.option("--seed", default=0, show_default=True)
@click.option("--label", help="Part of the result's name; default: the model.")
def stall(**options: Any) -> None:
    """Measures how long saves hold up training: wall time with saves, drain included, less the same steps without.

    \b
    Examples:
      snapstone bench stall --model tiny --out R/
      snapstone bench stall --model llama-1b --engine snapstone,dcp,dcp-async --saves 8 --out R/
      torchrun --nproc-per-node 2 -m snapstone.bench stall --model small --fsdp 2 --state-only --out R/

    \b
    --engine takes snapstone, snapstone-dcp, snapstone-delta, dcp, dcp-async, dcp-process, dcp-pinned, torch-save,
    safetensors, torch-checkpointing, torchsnapshot, megatron, megatron-async, deepspeed, deepspeed-fast,
    deepspeed-decoupled, datastates, and name=package.module:Class for an adapter of yours.
    What is not installed is reported as absent.

    Writes R/stall-LABEL.json. Exits with 1 when an engine failed, and keeps what was measured whatever ends it.
    """
    import torch

    from ..bench.run import Request, leave, run

    options["device"] = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    options["cadences"] = tuple(dict.fromkeys(options["cadences"])) or ("relaxed", "tight")
    request = Request(**options, command=("snapstone", *sys.argv[1:]))
    leave(run(request, lambda line: emit(printable(line))))
