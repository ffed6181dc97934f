"""The numbered steps of the commit protocol (docs/guarantees.md, csrc/store/staging.cc), and where each of them is.

`FUNCTIONS` are killed before and after, on every rank; `CALLS` are system calls of the fault seam, killed at every one.
What a save does that stands in neither fails a test: a step that is new gets its kills before it gets users.
"""

from __future__ import annotations

FUNCTIONS: dict[int, tuple[str, ...]] = {
    0: (
        "Writer.take",
        "Writer.open",
        "Writer._describe",
        "Channel.vote(plan)",
        "Writer._check_same_target",
        "Writer._agree_on_structure",
        "assign",
        "Channel.gather(items)",
        "Channel.vote(assign)",
    ),
    1: (
        "Writer._open_staging",
        "Target.check",
        "Target.make_parents",
        "Channel.vote(open)",
        "Target.join_staging",
    ),
    2: (
        "Writer._prepare",
        "Writer.start",
        "Share.start",
        "Writer.finish",
        "Writer._wait_written",
        "Share.wait_written",
        "Writer._agree_on_shared",
        "Channel.vote(shared)",
        "Share.write_index",
    ),
    3: ("Writer._write_rest",),
    4: ("Writer._enter_commit", "Channel.vote(written)"),
    5: ("Writer._commit", "Outcome.commit"),
    8: ("Outcome.announce", "Channel.broadcast(outcome)", "Outcome.hear"),
    9: ("Writer.close", "Channel.close"),
}

# Steps 6, 7 and what else is the native code's alone have system calls only.
CALLS: dict[int, tuple[str, ...]] = {
    1: ("opendir", "readdir", "stat", "statfs", "fstat", "mkdir", "open", "flock"),
    2: (
        *("fallocate", "ftruncate", "pwrite", "uring_write", "io_uring_enter", "fsync", "close"),
        *("link", "pread", "uring_read", "fcntl"),
    ),
    5: ("unlink",),
    7: ("renameat2",),
    9: ("rename", "rmdir"),
}
PRIVATE = ("mmap", "madvise", "io_uring_setup")  # change nothing that outlives the process

# Of the same modules, what is no step: decides nothing, tells nobody, and changes nothing outside the process.
HELPERS = {
    "Writer.__init__",
    "Writer.mark",
    "Writer.beside",
    "Writer.failed",
    "Writer.fence",
    "Writer.staged",
    "Writer.payload_bytes",
    "Writer.wait_snapshot",
    "Writer.wait_staged",
    "Writer._check_wanted",
    "Writer._outcome",
    "Writer._vote",  # Channel.vote, by label
    "Writer._vote_bytes",
    "Outcome.__init__",
    "Outcome.explain_removal",
    "Target.of",
    "Target.__init__",
    "Target.parent",
    "Target.name",
    "Target._is_replaceable",
    "Target._holds_a_checkpoint_alone",
    "_holds_shared_files",
    "_assign_all",
    "_item",
    "_json",
    "encode_objects",
}

# Only where another rank has died, or failed.
AFTER_A_DEATH = ("Outcome.on_disk", "Outcome.committed")


def _boundaries() -> set[str]:
    found = set()
    for names in FUNCTIONS.values():
        found |= {f"{names[0]}:before", f"{names[-1]}:after"}
        found |= {f"{name}:{when}" for name in names if name.startswith("Channel.") for when in ("before", "after")}
    return found


BOUNDARIES = _boundaries()  # of each step, and of each time that ranks hear from each other


def step_functions() -> list[str]:
    return [name for names in FUNCTIONS.values() for name in names]
