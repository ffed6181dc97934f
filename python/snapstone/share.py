"""Share: what one rank writes of a checkpoint, its data files and its index."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import _native, garbage, index, manifest
from .base import Before, Comparison, Memory, SharedFile, Stored
from .codec_stats import codec_stats
from .collective import Deadline
from .config import PIPELINE_SLOTS, SaveOptions
from .errors import CheckpointError
from .index import CHUNK_DTYPE, StoredTensor, padded
from .manifest import FileEntry
from .progress import Progress
from .sources import DRAIN_SECONDS, Sources
from .stall import learn_rates, predict_stall
from .structure import Structure
from .tensors import LocalShard
from .trace import Trace

__all__ = ["Share"]

_POLL_SECONDS = 0.1
# Of one rank: each is an open file while the checkpoint is loaded, and processes may have 1024 of them.
_LINKED_FILES_MAX = 32


class Share:
    """Step 2 of the protocol in `csrc/store/staging.cc` for one rank: `start`, `wait_snapshot`, `fence`, `wait_staged`,
    `wait_written`, with a comparison `drop_sparse_files`, `write_index`, `close`.

    Tensors on CUDA devices are taken as the current streams of the thread that makes the share leave them.

    `shards` are all of the rank's; the structure names those that it writes. What the comparison finds is not written;
    its files are linked. With `keep_staged` the whole state gets staging memory if the budget allows; `deferred`: the
    caller does not wait for the snapshot, its streams do later. OSError when the file cannot be made or the disk is
    full, RuntimeError while a stream is captured into a CUDA graph.
    """

    def __init__(
        self,
        structure: Structure,
        shards: list[LocalShard],
        staging: Any,
        rank: int,
        rung: str,
        options: SaveOptions,
        trace: Trace,
        *,
        keep_staged: bool,
        comparison: Comparison | None = None,
        deferred: bool = False,
    ) -> None:
        self._structure = structure
        self._comparison = comparison
        self._carried_bytes = 0
        self._records: Any = None
        self._staging = staging
        self._rank = rank
        self._trace = trace
        with trace.span("plan"), garbage.paused():
            shards = [shards[position] for position in structure.positions]
            self._tensors = Sources(shards, options.device, trace, alias=keep_staged)
            layout = structure.layout
            slots = min(options.host_memory_budget // layout.chunk_bytes, layout.chunk_count)
            if not keep_staged:
                slots = min(slots, PIPELINE_SLOTS)
            trace.stats["rung"] = rung
            trace.stats["predicted_stall_seconds"] = predict_stall(layout.payload_bytes, slots * layout.chunk_bytes)
            self._job = _native.SaveJob(
                layout,
                self._tensors.pointers(),
                self._tensors.strided(),
                staging,
                self.data_name,
                rung,
                options.zstd_level,
                structure.item_bytes if options.zstd_level else [],
                comparison.arguments() if comparison else None,
                slots,
                keep_staged,
                trace.detailed,
                self._differences(structure, options),
                self._tensors.ordinals,
                # With fence="now" the caller waits, and digests would have to come first.
                self._tensors.device_options(kept=keep_staged, two_phase=deferred or not keep_staged),
            )

    def _differences(self, structure: Structure, options: SaveOptions) -> Any:
        """As `SaveJob` takes them; None to store every chunk on its own."""
        if self._comparison is None or not options.differences:
            return None
        return structure.is_floating, options.keyframe_every, self._sources()

    def _sources(self) -> list[tuple[str, str]]:
        """Directory and name of the comparison's files."""
        assert self._comparison is not None
        directory = os.path.join(self._staging.path, manifest.BASE_NAME)
        return [(directory, os.path.basename(shared.entry.name)) for shared in self._comparison.files]

    @property
    def data_name(self) -> str:
        return f"rank-{self._rank:05d}.data"

    @property
    def _carried_name(self) -> str:
        return f"rank-{self._rank:05d}.carried.data"

    @property
    def staged(self) -> bool:
        """Whether the state may change."""
        return bool(self._job.staged)

    @property
    def payload_bytes(self) -> int:
        return int(self._structure.layout.payload_bytes)

    @property
    def bytes_staged(self) -> int:
        return int(self._job.bytes_staged)

    @property
    def bytes_written(self) -> int:
        """Or found in the base."""
        return int(self._job.bytes_done)

    def start(self) -> None:
        self._tensors.start(self._job)

    def cancel(self) -> None:
        self._job.cancel()

    def wait_snapshot(self, deadline: Deadline) -> bool:
        """Returns when streams that `fence` was called for may change the state, and the host what it has in host
        memory; False at the deadline. Errors surface in `wait_written`.
        """
        if _native.fault_skipped("wait", "save/snapshot"):
            return True
        while not self._job.wait_snapshot(_POLL_SECONDS):
            if deadline.expired:
                self._job.cancel()
                return bool(self._job.wait_snapshot(DRAIN_SECONDS))
        return True

    def fence(self) -> None:
        """What this thread's current streams are given from now on may change the state; after `wait_snapshot`."""
        self._tensors.fence()

    def release(self) -> None:
        """Lets go of the tensors, if they may change."""
        self._tensors.release()

    def wait_staged(self, deadline: Deadline) -> bool:
        """Returns when the state may change; False if the kernel holds on to it at the deadline. Other errors surface
        in `wait_written`.
        """
        while not self._job.wait_staged(_POLL_SECONDS):
            if deadline.expired:
                self._job.cancel()
                return bool(self._job.wait_staged(DRAIN_SECONDS))
        return True

    def wait_written(self, deadline: Deadline, progress: Progress) -> None:
        """Returns when the data file is written, synced and closed.

        Raises:
            CheckpointError: the deadline passed. CancelledError: somebody called `cancel`. OSError: a write failed.
        """
        while not self._job.wait(_POLL_SECONDS):
            progress.at(self._job.bytes_done)
            if deadline.expired:
                self._job.cancel()
                raise CheckpointError("the data file was not written in time", path=self._staging.path, rank=self._rank)
        self._job.rethrow()
        progress.at(self._job.bytes_done)
        self._records = np.frombuffer(self._job.chunk_table(), CHUNK_DTYPE).copy()
        encode_us = self._job.encode_us()
        if len(encode_us):
            self._trace.stats["codecs"] = codec_stats(self.contents, self._records[: len(encode_us)], encode_us)
        self._trace.add_job(self._job)
        self._tensors.note()
        learn_rates(self._trace.stats)

    @property
    def digests(self) -> Any:
        """Of each chunk of the layout, after `wait_written`."""
        return self._records["digest"][: self._structure.layout.chunk_count]

    @property
    def contents(self) -> list[StoredTensor]:
        return self._structure.contents

    def before(self, memory: Memory) -> Before | None:
        """What the chunks were in the base, or else in the last save."""
        if self._comparison is not None:
            return self._comparison.before()
        last = memory.last(self._rank, self.contents)
        return last.before() if last else None

    def used_bytes(self) -> dict[str, int]:
        """Of shared files by name: the bytes of them that this rank's records use."""
        if self._comparison is None:
            return {}
        places = np.unique(self._records[["file", "offset", "stored_bytes"]])
        nbytes = np.bincount(
            places["file"], padded(places["stored_bytes"]), minlength=len(self._comparison.files) + 1
        ).astype(int)
        return {
            shared.entry.name: used
            for shared, used in zip(self._comparison.files, nbytes[1:].tolist(), strict=True)
            if used
        }

    def drop_sparse_files(self, used_bytes: Mapping[str, int], check: Callable[[], None]) -> None:
        """Copies this rank's chunks out of shared files of which less than half is used, into a file of its own. If
        there are too many files, out of all but the largest.

        `used_bytes`: by all ranks. `check` is called now and then, and raises to end the copy.
        """
        if self._comparison is None:
            return
        rows = np.flatnonzero(np.isin(self._records["file"], self._files_to_drop(used_bytes)))
        if not len(rows):
            return
        places, place_of_row = np.unique(self._records[["file", "offset", "stored_bytes"]][rows], return_inverse=True)
        sizes = padded(places["stored_bytes"])
        files, source = np.unique(places["file"], return_inverse=True)
        ranges = np.stack([source.astype(np.uint64), places["offset"], sizes], axis=1)
        every = self._sources()
        sources = [every[number - 1] for number in files.tolist()]
        with self._trace.span("carry", int(sizes.sum())):
            self._carried_bytes = self._staging.copy_ranges(
                self._carried_name, sources, np.ascontiguousarray(ranges), lambda _: check()
            )
        self._records["file"][rows] = len(self._comparison.files) + 1
        self._records["offset"][rows] = (np.cumsum(sizes) - sizes)[place_of_row]

    def _files_to_drop(self, used_bytes: Mapping[str, int]) -> list[int]:
        """Their numbers in this rank's records."""
        assert self._comparison is not None
        mine = self.used_bytes()
        dropped: list[int] = []
        kept: list[tuple[int, int]] = []
        for number, shared in enumerate(self._comparison.files, 1):
            name = shared.entry.name
            if 2 * used_bytes.get(name, 0) < shared.entry.nbytes:
                dropped.append(number)
            elif name in mine:
                kept.append((mine[name], number))
        if len(kept) > _LINKED_FILES_MAX:  # half of them at once, so that a chunk is seldom copied again
            dropped += [number for _, number in sorted(kept)[: -_LINKED_FILES_MAX // 2]]
        return dropped

    def write_index(
        self, save_id: str, world_size: int, step: int | None, objects: dict[str, Any]
    ) -> tuple[manifest.Writer, Stored]:
        """Writes and syncs the index file; this rank's entry for the manifest, and what it has stored: in files of its
        own, then in shared ones.
        """
        records = self._records
        shared, own = self._number_files(records)
        table = records.tobytes()
        layout = self._structure.layout
        references = len(records) - layout.chunk_count
        self._count(records)
        data = index.encode(
            save_id=save_id,
            rank=self._rank,
            world_size=world_size,
            files=[*own, *(one.entry.name for one in shared)],
            chunk_bytes=layout.chunk_bytes,
            tensors_json=self._structure.tensors_json,
            objects=objects,
            table=table,
            references=references,
        )
        name = f"rank-{self._rank:05d}.index"
        with self._trace.span("sync", len(data)):
            self._staging.write_file(name, data, "index")
        entries = [
            FileEntry(file, nbytes, _native.digest_hex(records[records["file"] == number].tobytes()))
            for number, (file, nbytes) in enumerate(own.items())
        ]
        writer = manifest.Writer(self._rank, FileEntry(name, len(data), _native.digest_hex(data)), tuple(entries))
        files = (*entries, *(one.entry for one in shared))
        return writer, Stored(writer.index.xxh128, files, table, references, self._structure.contents, step)

    def _count(self, records: Any) -> None:
        if self._comparison is None:
            return
        unchanged = records["file"][: self._structure.layout.chunk_count] != 0
        self._trace.stats |= {
            "chunks": len(unchanged),
            "unchanged_chunks": int(unchanged.sum()),
            "carried_bytes": self._carried_bytes,
        }

    def _number_files(self, records: Any) -> tuple[list[SharedFile], dict[str, int]]:
        """Numbers the records' files as the index does: this rank's own, then those shared files that are used. The
        shared ones, and names and sizes of the own ones.
        """
        own = {self.data_name: self._job.file_bytes}
        if self._comparison is None:
            return [], own
        if self._carried_bytes:
            own[self._carried_name] = self._carried_bytes
        files = self._comparison.files
        used = np.unique(records["file"])
        shared = [number for number in used.tolist() if 0 < number <= len(files)]
        numbers = np.zeros(len(files) + 2, np.uint32)
        numbers[shared] = np.arange(len(own), len(own) + len(shared))
        numbers[len(files) + 1] = 1  # carried
        records["file"] = numbers[records["file"]]
        return [files[number - 1] for number in shared], own

    def close(self) -> None:
        """Ends what still runs and lets go of the tensors."""
        if not self._job.finished:
            self._job.cancel()
        self._tensors.let_go()
        self._staging = None
