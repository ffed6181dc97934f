"""What a rank has written and synced, read from the device again before its save is said to be right."""

from __future__ import annotations

from . import manifest
from .collective import Deadline
from .errors import CorruptCheckpointError
from .index_file import open_index
from .manifest import Manifest
from .reader import Reader
from .trace import Trace

__all__ = ["read_back"]


def read_back(
    directory: str,
    writer: manifest.Writer,
    shared: tuple[manifest.FileEntry, ...],
    *,
    save_id: str,
    world_size: int,
    deadline: Deadline,
    trace: Trace,
) -> None:
    """Reads the writer's own files past the page cache, and compares the digest of every chunk and all padding. Files
    that are shared with earlier checkpoints were read back when those were saved, if that was wanted.

    Raises:
        CorruptCheckpointError: a byte is not what was written; names the file, the chunk and the tensor.
        CheckpointError: the deadline passed. OSError: it cannot be read.
    """
    document = Manifest(
        save_id=save_id,
        step=None,
        world_size=world_size,
        nbytes=0,
        writers=(writer,),
        metadata={},
        environment={},
        base=None,
        shared=shared,
    )
    nbytes = writer.index.nbytes + sum(entry.nbytes for entry in writer.data)
    with trace.span("read_back", nbytes):
        try:
            reader = Reader(directory, document, [open_index(directory, document, writer, uncached=True)])
            job = reader.start_scrub(read_back_files=len(writer.data))
            problems = reader.scrub(job, timeout_seconds=deadline.remaining())
        except CorruptCheckpointError as error:
            problems = [error]
    if problems:
        first = problems[0]
        raise CorruptCheckpointError(
            f"read back after it was synced, it is not what was written: {first.args[0]}",
            path=first.path,
            chunk=first.chunk,
            tensor=first.tensor,
            rank=writer.rank,
            expected=first.expected,
            actual=first.actual,
        )
