"""
snapstone's native engine; use it through snapstone._native.
"""

from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing

__all__: list[str] = [
    "Board",
    "CHUNK_BYTES_DEFAULT",
    "CHUNK_BYTES_MAX",
    "ChunkRecords",
    "CudaMark",
    "INDEX_HEADER_BYTES_MAX",
    "Layout",
    "LoadJob",
    "MANIFEST_BYTES_MAX",
    "PACK_THRESHOLD_BYTES",
    "Predecessor",
    "QUEUE_DEPTH",
    "SaveJob",
    "Staging",
    "available_memory_bytes",
    "boot_id",
    "bytes_before",
    "check_chunk_table",
    "choose_rung",
    "cuda_absence",
    "cuda_devices_in_use",
    "cuda_facts",
    "cuda_ignore_captures",
    "cuda_load_kernels",
    "cuda_rates",
    "cuda_stream",
    "decode_chunk",
    "digest_hex",
    "digest_memory",
    "encode_chunk",
    "fault_arm",
    "fault_disarm",
    "fault_seen",
    "fault_seen_names",
    "fault_skipped",
    "file_system_facts",
    "find_flipped_bit",
    "is_file_name",
    "journal_mark",
    "journal_start",
    "journal_stop",
    "make_directory",
    "memlock_limit_bytes",
    "read_file",
    "reap",
    "replace_file",
    "reserve",
    "ring_facts",
    "scatter_pieces",
    "snapshot",
    "sync_directory",
    "sync_file",
    "try_hard_link",
    "try_reflink",
    "try_rung",
    "uring_compiled_in",
    "zstd_compiled_in",
]

class Predecessor:
    """
    The checkpoint that a staging directory is to replace; see csrc/store/predecessor.h.
    """
    @staticmethod
    def open(parent: str, name: str) -> Predecessor: ...
    def close(self) -> None: ...

class Staging:
    """
    One save's staging directory; see csrc/store/staging.h.
    """
    @staticmethod
    def create(parent: str, save_id: str, boot_ids: collections.abc.Sequence[str]) -> Staging: ...
    @staticmethod
    def join(parent: str, save_id: str) -> Staging: ...
    def close(self) -> None: ...
    def commit(
        self, manifest: bytes, manifest_digest: bytes, final_name: str, overwrite: bool, read_back: bool = False
    ) -> None: ...
    def copy_ranges(
        self,
        name: str,
        sources: collections.abc.Sequence[tuple[str, str]],
        ranges: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
        progress: typing.Any = None,
    ) -> int:
        """
        A new file of the bytes of `ranges`, rows of (source, offset, nbytes); returns its size. `progress` gets the bytes copied so far.
        """
    def discard(self) -> None: ...
    def keep_shared(
        self, files: collections.abc.Sequence[tuple[str, typing.SupportsInt | typing.SupportsIndex]]
    ) -> None: ...
    def link_shared(
        self,
        checkpoint: str,
        manifest_digest: bytes,
        files: collections.abc.Sequence[tuple[bool, str, str, typing.SupportsInt | typing.SupportsIndex]],
    ) -> None: ...
    def succeed(self, predecessor: Predecessor) -> None: ...
    def sync(self, shared: collections.abc.Sequence[str] = []) -> None: ...
    def withdraw(self) -> None: ...
    def write_file(self, name: str, data: bytes, step: str = "unnamed") -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def save_id(self) -> str: ...

class CudaMark:
    """
    A place in the streams that produce what is saved; see csrc/pipeline/producer_mark.h.
    """
    def __init__(
        self,
        streams: collections.abc.Mapping[
            typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex
        ],
    ) -> None:
        """
        {ordinal: handle of the stream}
        """
    def hold_back(
        self, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex
    ) -> None:
        """
        What the stream is given from now on runs after the mark.
        """

class Layout:
    """
    Where each tensor's bytes go; see csrc/format/layout.h.
    """
    def __init__(
        self,
        nbytes: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
        chunk_bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def places(self) -> tuple:
        """
        (first_chunk, chunk_count, at): one uint64 array each, in tensor order
        """
    @property
    def chunk_bytes(self) -> int: ...
    @property
    def chunk_count(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def payload_bytes(self) -> int: ...

class SaveJob:
    """
    One data file being written; see csrc/pipeline/save_job.h.
    """

    NO_RECORD: typing.ClassVar[int] = 4294967295
    def __init__(
        self,
        layout: Layout,
        pointers: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
        strided: collections.abc.Mapping[
            typing.SupportsInt | typing.SupportsIndex,
            tuple[
                typing.SupportsInt | typing.SupportsIndex,
                typing.SupportsInt | typing.SupportsIndex,
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
            ],
        ],
        staging: Staging,
        name: str,
        rung: str,
        zstd_level: typing.SupportsInt | typing.SupportsIndex,
        item_bytes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        base: tuple[
            bytes,
            typing.Annotated[numpy.typing.ArrayLike, numpy.uint32],
            typing.Annotated[numpy.typing.ArrayLike, numpy.uint32],
        ]
        | None,
        slots: typing.SupportsInt | typing.SupportsIndex,
        eager: bool,
        trace: bool,
        differences: tuple[
            collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
            typing.SupportsInt | typing.SupportsIndex,
            collections.abc.Sequence[tuple[str, str]],
        ]
        | None = None,
        devices: typing.Annotated[numpy.typing.ArrayLike, numpy.int32] | None = None,
        device_options: tuple[
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsFloat | typing.SupportsIndex,
            bool,
            typing.SupportsFloat | typing.SupportsIndex,
            bool,
        ] = (33554432, 0.0, True, 0.0, False),
    ) -> None: ...
    def cancel(self) -> None: ...
    def chunk_table(self) -> bytes:
        """
        The records of the layout's chunks, then the reference records that these need.
        """
    def device_stats(self) -> dict: ...
    def encode_us(self) -> numpy.typing.NDArray[numpy.uint32]:
        """
        uint32 array: by chunk of the layout the microseconds of encoding it, 0 if it was not; empty without a codec
        """
    def fence(
        self, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex
    ) -> None:
        """
        Once snapshot_enqueued: what the stream is given from now on may change sources on that device.
        """
    def rethrow(self) -> None:
        """
        Raises the first failure, if any.
        """
    def stage_stats(self) -> dict: ...
    def start(self, mark: CudaMark | None = None) -> None:
        """
        With sources on devices their copies are enqueued behind the mark first. Waits for nothing. One call, so that no signal leaves copies enqueued for a job that nobody ends.
        """
    def trace_events(self) -> list: ...
    def wait(self, seconds: typing.SupportsFloat | typing.SupportsIndex) -> bool:
        """
        True when the job has ended within `seconds`.
        """
    def wait_snapshot(self, seconds: typing.SupportsFloat | typing.SupportsIndex) -> bool:
        """
        True when everything that reads sources has been enqueued within `seconds`, or the job has ended.
        """
    def wait_staged(self, seconds: typing.SupportsFloat | typing.SupportsIndex) -> bool: ...
    @property
    def bytes_done(self) -> int: ...
    @property
    def bytes_staged(self) -> int: ...
    @property
    def device_drained(self) -> bool:
        """
        Whether an ended job is known to read no memory of devices any more.
        """
    @property
    def direct(self) -> bool: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    @property
    def snapshot_enqueued(self) -> bool: ...
    @property
    def staged(self) -> bool: ...
    @property
    def started(self) -> bool: ...
    @property
    def unreadable_references(self) -> int:
        """
        Chunks that were not stored as differences because the base's could not be read.
        """

class ChunkRecords:
    """
    A chunk table that check_chunk_table() accepted, for any number of jobs; the last `references` records are reference chunks.
    """
    def __init__(self, table: bytes, references: typing.SupportsInt | typing.SupportsIndex = 0) -> None: ...

class LoadJob:
    """
    Chunks being read into memory; see csrc/pipeline/load_job.h.
    """
    def __init__(
        self,
        tables: collections.abc.Sequence[tuple[ChunkRecords, typing.SupportsInt | typing.SupportsIndex, str]],
        files: collections.abc.Sequence[tuple[str, str, typing.SupportsInt | typing.SupportsIndex]],
        contiguous: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
        boxes: collections.abc.Sequence[
            tuple[
                tuple[
                    typing.SupportsInt | typing.SupportsIndex,
                    typing.SupportsInt | typing.SupportsIndex,
                    typing.SupportsInt | typing.SupportsIndex,
                    typing.SupportsInt | typing.SupportsIndex,
                    typing.SupportsInt | typing.SupportsIndex,
                ],
                typing.SupportsInt | typing.SupportsIndex,
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
                typing.SupportsInt | typing.SupportsIndex,
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
                tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex],
            ]
        ],
        rung: str,
        verify: bool,
        scrub: bool,
        slots_max: typing.SupportsInt | typing.SupportsIndex,
        trace: bool,
        devices: tuple[
            typing.Annotated[numpy.typing.ArrayLike, numpy.int32], typing.Annotated[numpy.typing.ArrayLike, numpy.int32]
        ]
        | None = None,
        device_digests: bool = True,
        read_back_files: typing.SupportsInt | typing.SupportsIndex | None = None,
    ) -> None:
        """
        With `scrub` every chunk is read, and with `read_back_files` those of so many first files of each table, past the page cache.
        """
    def cancel(self) -> None: ...
    def fence(
        self, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex
    ) -> None:
        """
        Once finished, well or not: what the stream is given from now on comes after all writes to targets on that device.
        """
    def mark(
        self, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex
    ) -> None:
        """
        Before start(): targets on that device are written after what the stream has been given so far.
        """
    def problems(self) -> list:
        """
        [(path of the index, path of the file, chunk, reason, expected, actual), ...] of wrong chunks
        """
    def rethrow(self) -> None:
        """
        Raises the first failure, if any.
        """
    def stage_stats(self) -> dict: ...
    def start(self) -> None: ...
    def trace_events(self) -> list: ...
    def wait(self, seconds: typing.SupportsFloat | typing.SupportsIndex) -> bool:
        """
        True when the job has ended within `seconds`.
        """
    @property
    def bytes_done(self) -> int: ...
    @property
    def bytes_needed(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def chunk_count(self) -> int: ...
    @property
    def devices(self) -> list[int]:
        """
        Ordinals of the devices that have targets, sorted.
        """
    @property
    def finished(self) -> bool: ...
    @property
    def settled(self) -> bool:
        """
        Once finished: whether no device writes to a target any more. Targets live until then.
        """
    @property
    def started(self) -> bool: ...

class Board:
    """
    Counters of processes that share memory; see csrc/mem/board.h.
    """

    STRIDE: typing.ClassVar[int] = 64
    def __init__(
        self, address: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def fail(self, counter: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def post(
        self, counter: typing.SupportsInt | typing.SupportsIndex, value: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def wait_for(
        self, value: typing.SupportsInt | typing.SupportsIndex, seconds: typing.SupportsFloat | typing.SupportsIndex
    ) -> str:
        """
        "reached" when every counter is at least `value`, "failed", or "timed out".
        """

def available_memory_bytes() -> int: ...
def boot_id() -> str: ...
def bytes_before(
    item_bytes: typing.SupportsInt | typing.SupportsIndex,
    shard_sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    box_offsets: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    box_sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    positions: typing.Annotated[numpy.typing.ArrayLike, numpy.int64],
) -> numpy.typing.NDArray[numpy.int64]:
    """
    For each position in a shard's row-major string the bytes of a box that lie before it.
    """

def check_chunk_table(
    table: bytes,
    file_nbytes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    chunk_bytes_max: typing.SupportsInt | typing.SupportsIndex,
    path: str,
    references: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def choose_rung(directory: str) -> tuple:
    """
    (name, reasons why better rungs were passed over)
    """

def cuda_absence() -> str:
    """
    Why CUDA cannot be used, empty when it can. Initialises CUDA.
    """

def cuda_devices_in_use() -> list[int]:
    """
    Ordinals of the devices on which this process has a context, so that tensors may be there.
    """

def cuda_facts() -> dict:
    """
    What csrc/cuda found: available, reason (why not), driver_version (13000 for 13.0), devices, and whether the driver has its optional calls. Initialises CUDA.
    """

def cuda_ignore_captures() -> bool:
    """
    For good: what this thread allocates, asks or waits for does not end CUDA graph captures of others.
    """

def cuda_load_kernels(ordinal: typing.SupportsInt | typing.SupportsIndex) -> str:
    """
    Loads what is launched on a device, if nobody has; empty, or why there are no kernels.
    """

def cuda_rates(
    device: typing.SupportsInt | typing.SupportsIndex,
    address: typing.SupportsInt | typing.SupportsIndex,
    sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    ring_bytes: typing.SupportsInt | typing.SupportsIndex = 1073741824,
    copy_bytes: typing.SupportsInt | typing.SupportsIndex = 33554432,
    repeat: typing.SupportsInt | typing.SupportsIndex = 5,
) -> dict:
    """
    Seconds of copies between a ring of its own and device memory at `address`, within the device, and of digests, for each of `sizes`: see csrc/pipeline/device_rates.h. The memory is idle, and keeps its bytes.
    """

def cuda_stream(ordinal: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Handle of a stream that this process has for what torch copies for saves, and nobody else has; for good.
    """

def decode_chunk(
    stored: bytes,
    codec: typing.SupportsInt | typing.SupportsIndex,
    raw_bytes: typing.SupportsInt | typing.SupportsIndex,
) -> bytes:
    """
    The raw bytes of a chunk, or of an xor codec the difference; raises CorruptCheckpointError.
    """

def digest_hex(data: bytes) -> str:
    """
    XXH3-128 of `data` as 32 hex digits, as xxh128sum prints it.
    """

def digest_memory(
    address: typing.SupportsInt | typing.SupportsIndex, nbytes: typing.SupportsInt | typing.SupportsIndex
) -> str:
    """
    The same of memory that the caller keeps alive.
    """

def encode_chunk(
    raw: bytes,
    codec: typing.SupportsInt | typing.SupportsIndex,
    level: typing.SupportsInt | typing.SupportsIndex,
    reference: bytes | None = None,
) -> typing.Any:
    """
    The stored bytes, or None when they would not be fewer than raw.
    """

def fault_arm(rules: str) -> None:
    """
    See csrc/base/fault_hook.h for the syntax.
    """

def fault_disarm() -> None: ...
def fault_seen(call: str) -> int: ...
def fault_seen_names() -> list[str]:
    """
    Calls and steps seen since fault_arm, sorted.
    """

def fault_skipped(kind: str, name: str) -> bool:
    """
    Whether the step `kind`/`name` is to be left out.
    """

def file_system_facts(directory: str) -> dict: ...
def find_flipped_bit(data: bytes, digest: bytes, seconds: typing.SupportsFloat | typing.SupportsIndex) -> tuple:
    """
    (8 * byte + bit, or None; whether all were tried): see csrc/codec/flipped_bit.h.
    """

def is_file_name(name: str) -> bool: ...
def journal_mark(text: str) -> None: ...
def journal_start(path: str) -> None:
    """
    See csrc/os/journal.h.
    """

def journal_stop() -> None: ...
def make_directory(parent: str, name: str) -> None:
    """
    As os.mkdir.
    """

def memlock_limit_bytes() -> int: ...
def read_file(
    directory: str, name: str, limit_nbytes: typing.SupportsInt | typing.SupportsIndex, uncached: bool = False
) -> bytes:
    """
    A whole small file; with `uncached` as the device has it.
    """

def reap(parent: str) -> list[str]:
    """
    Removes what dead saves left; returns the names removed.
    """

def replace_file(
    staging: Staging,
    source: str,
    checkpoint_fd: typing.SupportsInt | typing.SupportsIndex,
    path: str,
    name: str,
    aside: str,
    damaged: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex] | None = None,
) -> None:
    """
    `damaged`: (st_dev, st_ino). See csrc/store/replacement.h.
    """

def reserve(
    slot_bytes: typing.SupportsInt | typing.SupportsIndex,
    slots: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex = -1,
) -> None:
    """
    Makes staging memory; with the ordinal of a device, near it and ready for its copies.
    """

def ring_facts() -> dict: ...
def scatter_pieces(
    pieces: collections.abc.Sequence[
        tuple[
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
            typing.SupportsInt | typing.SupportsIndex,
            collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
            typing.SupportsInt | typing.SupportsIndex,
            collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        ]
    ],
) -> None:
    """
    Copies parts of tensors' row-major strings into their memory: (source address, first byte, last byte, item_bytes, sizes, data_ptr, stride_bytes) each.
    """

def snapshot(state: dict, guards: list, tensor_types: tuple) -> tuple:
    """
    (copy of the nested dicts and lists, [(copied container, key, value), ...] of what is neither guarded nor immutable)
    """

def sync_directory(path: str, step: str = "unnamed") -> None: ...
def sync_file(descriptor: typing.SupportsInt | typing.SupportsIndex, path: str, step: str) -> None:
    """
    `path` is for errors.
    """

def try_hard_link(directory: str) -> None:
    """
    Raises OSError where a file cannot have two names.
    """

def try_reflink(directory: str) -> None:
    """
    Raises OSError where two files cannot share blocks.
    """

def try_rung(directory: str, rung: str) -> str:
    """
    Empty when the rung works there, else why not.
    """

def uring_compiled_in() -> bool: ...
def zstd_compiled_in() -> bool: ...

CHUNK_BYTES_DEFAULT: int = 1048576
CHUNK_BYTES_MAX: int = 67108864
INDEX_HEADER_BYTES_MAX: int = 1073741824
MANIFEST_BYTES_MAX: int = 268435456
PACK_THRESHOLD_BYTES: int = 65536
QUEUE_DEPTH: int = 64
