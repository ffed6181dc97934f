"""`snapstone completion`."""

from __future__ import annotations

import click

from .output import emit

__all__ = ["completion"]


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Prints the completion script of a shell.

    \b
    Examples:
      snapstone completion bash >> ~/.bash_completion
      snapstone completion zsh  > ~/.zfunc/_snapstone      # a directory in $fpath
      snapstone completion fish > ~/.config/fish/completions/snapstone.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    emit(kind(ctx.find_root().command, {}, "snapstone", "_SNAPSTONE_COMPLETE").source().strip())
