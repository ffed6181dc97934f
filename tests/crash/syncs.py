"""The syncs of the sources, by the names under which they can be left out (csrc/base/fault_hook.h): sync/NAME."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["FOREIGN", "ROOT", "UNNEEDED", "named_syncs", "unnamed_syncs"]

ROOT = Path(__file__).resolve().parents[2]

UNNEEDED = {"sync/probe"}  # of a file without a name, which shows whether a way of doing I/O works
UNNEEDED |= {"sync/withdrawn_by"}  # a note to ranks that are alive
UNNEEDED |= {"sync/repaired_patch"}  # whose bytes are copied into the repaired file, which is synced
UNNEEDED |= {"sync/repaired_mode"}  # of owner and mode, which the model does not have; a test of their own is about it
UNNEEDED |= {"sync/stubs"}  # which the next load writes again where they are missing; until then other tools miss them

# Modules that import a package which is not in every environment (make test-integrations): their calls have names, and
# no scenario.
FOREIGN = {
    "python/snapstone/integrations/megatron/common.py": "Megatron-core",
    "python/snapstone/integrations/torch_checkpointing.py": "torch_checkpointing",
}

_NATIVE = r"os::(?:sync|sync_directory|write_file_durably)\("
_PYTHON = r"_native\.sync_(?:directory|file)\(|staging\.write_file\(|os\.(?:fsync|fdatasync)\(|(?<!def )\b_sync\("
_CALLS = (
    ("csrc/io", ".cc", _NATIVE),
    ("csrc/pipeline", ".cc", _NATIVE),
    ("csrc/store", ".cc", _NATIVE + r"|^\s+write_file\("),
    ("python/snapstone", ".py", _PYTHON),
)
_MEASURES = "python/snapstone/bench/"  # what a disk and other engines do


def _calls() -> list[tuple[str, str]]:
    """(where, the name of the step or nothing) of each call that syncs."""
    found = []
    for folder, suffix, call in _CALLS:
        for path in sorted((ROOT / folder).rglob(f"*{suffix}")):
            if str(path.relative_to(ROOT)).startswith(_MEASURES):
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if re.search(call, line) and "step)" not in line:  # which passes on the name that it got
                    name = re.search(r'"([a-z_]+)"\)', line)
                    found.append((f"{path.relative_to(ROOT)}:{number}", name[1] if name else ""))
    return found


def named_syncs() -> set[str]:
    """Without those that only FOREIGN modules have."""
    return {f"sync/{name}" for where, name in _calls() if name and where.partition(":")[0] not in FOREIGN}


def unnamed_syncs() -> list[str]:
    """Where a call has no name."""
    return [where for where, name in _calls() if not name]
