"""Arguments that name a directory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

__all__ = ["directory_argument"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def directory_argument(name: str, **options: Any) -> Callable[[_Function], _Function]:
    """A path, taken as it is: whether it exists, and is a checkpoint, is the command's finding, not wrong usage."""
    return click.argument(name, shell_complete=_directories, **options)


def _directories(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]
