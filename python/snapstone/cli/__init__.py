"""The `snapstone` command.

Data goes to stdout and everything else to stderr; `docs/cli.md` fixes exit codes and the JSON of `--json`. Nothing here
imports torch until a command needs it, so that `--help` and shell completion answer at once. What a checkpoint says
about itself (names, metadata, error texts) is never printed raw: a tensor's name could hold terminal escapes.
"""

from .app import cli, main

__all__ = ["cli", "main"]
