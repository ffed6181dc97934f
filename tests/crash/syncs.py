"""The syncs of the sources, by the names under which they can be left out (csrc/base/fault_hook.h): sync/NAME."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["ROOT", "UNNEEDED", "named_syncs", "unnamed_syncs"]

ROOT = Path(__file__).resolve().parents[2]

UNNEEDED = {"sync/probe"}  # of a file without a name, which shows whether a way of doing I/O works
UNNEEDED |= {"sync/withdrawn_by"}  # a note to ranks that are alive
UNNEEDED |= {"sync/repaired_patch"}  # whose bytes are copied into the repaired file, which is synced

_NATIVE = r"os::(?:sync|sync_directory|write_file_durably)\("
_CALLS = (
    ("csrc/io", ".cc", _NATIVE),
    ("csrc/pipeline", ".cc", _NATIVE),
    ("csrc/store", ".cc", _NATIVE + r"|^\s+write_file\("),
    ("python/snapstone", ".py", r"_native\.sync_directory\(|staging\.write_file\("),
)


def _calls() -> list[tuple[str, str]]:
    """(where, the name of the step or nothing) of each call of the engine that syncs. What `integrations` and `dcp`
    sync is not part of a save's protocol.
    """
    found = []
    for folder, suffix, call in _CALLS:
        for path in sorted((ROOT / folder).glob(f"*{suffix}")):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if re.search(call, line) and "step)" not in line:  # which passes on the name that it got
                    name = re.search(r'"([a-z_]+)"\)', line)
                    found.append((f"{path.relative_to(ROOT)}:{number}", name[1] if name else ""))
    return found


def named_syncs() -> set[str]:
    return {f"sync/{name}" for _, name in _calls() if name}


def unnamed_syncs() -> list[str]:
    """Where a call has no name."""
    return [where for where, name in _calls() if not name]
