"""Checks that no test misses, each with the reason why it stays: (file:function or file, begin of the line, reason)."""

from __future__ import annotations

__all__ = ["ACCEPTED"]

ZSTD = "csrc/codec/zstd_frame.cc"

ACCEPTED: tuple[tuple[str, str, str], ...] = (
    (ZSTD, 'refuse("reserved bit in', "libzstd refuses it as well; this says why"),
    (ZSTD, "refuse(ZSTD_getErrorName", "an error is no size, which the next check refuses; this says why"),
    (ZSTD, "void decompress_zstd_frame", "of builds without zstd"),
    (ZSTD, "std::optional<std::uint64_t> compress_zstd_frame", "of builds without zstd"),
    (ZSTD, "throw std::bad_alloc", "no memory for a context of libzstd, which has an allocator of its own"),
    (ZSTD, "throw std::invalid_argument", "constants of the engine, which every libzstd knows"),
    (
        "csrc/codec/digest.cc",
        "throw std::bad_alloc",
        "no memory for a state of libxxhash, which has an allocator of its own",
    ),
    ("csrc/io/rung.cc", 'return "io_uring_setup: built without', "of builds without liburing"),
    ("csrc/io/uring_engine.cc", 'throw OsError(ENOSYS, "io_uring_setup: built without', "of builds without liburing"),
    ("csrc/codec/compress.cc", 'return "unknown"', "a name for people, of what `known_codec` has refused before"),
    ("csrc/store/staging.cc", "remove_quietly(parent_, staging)", "what it leaves goes under its other name next"),
    ("repair.py:_Repair._place", "raise _stale(checkpoint)", "who placed the file looks again whether it stands"),
)
