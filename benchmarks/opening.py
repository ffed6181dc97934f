"""Opening a checkpoint of many writers and planning a load from it, as one rank of a group does: seconds and memory.

    python benchmarks/opening.py [--writers 256 512 1024] [--tensors 3000]

Prints JSON. Each number of writers has a process of its own. The rank parses the index of one writer, as in a group of
as many ranks, takes what the others would send, makes DCP's Metadata, plans the load of its part at half as many ranks,
and finds the shards that make it up. No bytes of tensors are read, and nothing is sent.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from snapstone import garbage, index, opening, tensors
from snapstone.catalog import Catalog, Columns
from snapstone.dcp import LoadPlanner
from snapstone.dcp.metadata import metadata_of
from snapstone.index import CHUNK_DTYPE, Index, Place, StoredTensor
from snapstone.manifest import FileEntry, Manifest, Writer
from snapstone.plan import Box, TensorItem
from snapstone.reader import Reader

ROWS, COLUMNS = 4, 64
NBYTES = ROWS * COLUMNS * 4
PER_CHUNK = (1 << 20) // NBYTES
SAVE_ID = "0" * 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tensors", type=int, default=3000, help="per writer")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.writers[0], arguments.tensors)))
        return
    results = []
    for writers in arguments.writers:
        command = [sys.executable, __file__, "--one", "--writers", str(writers), "--tensors", str(arguments.tensors)]
        results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    print(json.dumps(results, indent=2))


def measure(writers: int, tensor_count: int) -> dict[str, Any]:
    dist.init_process_group("fake", rank=0, world_size=writers // 2, store=FakeStore())
    indexes = (index_of(writer, writers, tensor_count) for writer in range(writers))
    first = next(indexes)
    file = index.encode(
        save_id=SAVE_ID,
        rank=0,
        world_size=writers,
        files=first.files,
        chunk_bytes=first.chunk_bytes,
        tensors_json=index.encode_tensors(first.tensors),
        objects={},
        table=first.table,
    )
    told = {Columns.of(first).key}
    sent = [opening.encode_indexes([one], told) for one in indexes]
    mesh = init_device_mesh("cpu", (writers // 2,))
    target = {
        name_of(number): DTensor.from_local(torch.zeros(2 * ROWS, COLUMNS), mesh, [Shard(0)], run_check=False)
        for number in range(tensor_count)
    }
    base_mib = peak_mib()
    phases: dict[str, float] = {}

    def timed(phase: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        with garbage.paused():
            result = work()
        phases[phase] = round(time.perf_counter() - began, 4)
        return result

    sizes = {name: tensors.dtype_bytes(name) for name in tensors.dtype_names()}
    mine = timed("parse_own_index_s", lambda: index.parse(file, path="rank-00000.index", dtype_bytes=sizes))
    encoded = timed("encode_own_index_s", lambda: opening.encode_indexes([mine], ()))
    reader = timed("join_s", lambda: joined([encoded, *sent], writers))
    metadata = timed("metadata_s", lambda: metadata_of(reader, 0, None))
    planner = LoadPlanner()
    planner.set_up_planner(target, metadata)
    plan = timed("plan_s", planner.create_local_plan)
    found = timed("locate_s", lambda: sum(len(reader.locate(*wanted(item))) for item in plan.items))
    assert found == 2 * tensor_count, "half as many ranks: two shards each"
    return {
        "writers": writers,
        "tensors": tensor_count,
        "sent_bytes": len(sent[0]),
        **phases,
        "rank_s": round(sum(phases.values()), 3),
        "peak_rss_above_messages_mib": round(peak_mib() - base_mib),
    }


def joined(sent: list[bytes], writers: int) -> Reader:
    blocks: dict[bytes, str] = {}
    indexes: list[Index] = []
    columns: list[Columns] = []
    for data in sent:
        of_rank = opening.decode_indexes(data, blocks)
        indexes += of_rank[0]
        columns += of_rank[1]
    entries = [FileEntry(f"rank-{writer:05d}.data", 1 << 30, "") for writer in range(writers)]
    document = Manifest(
        save_id=SAVE_ID,
        step=1,
        world_size=writers,
        nbytes=0,
        writers=tuple(Writer(writer, FileEntry("", 0, ""), (entry,)) for writer, entry in enumerate(entries)),
        metadata={},
        environment={},
    )
    return Reader("c", document, indexes, Catalog("c", columns))


def wanted(item: Any) -> tuple[str, Box]:
    return item.storage_index.fqn, Box(tuple(item.storage_offsets), tuple(item.lengths))


def name_of(number: int) -> str:
    return f"model.layers.{number // 10}.block.weight_{number % 10}"


def index_of(writer: int, writers: int, tensor_count: int) -> Index:
    """As FSDP has it: each tensor's rows over all writers."""
    stored = []
    for number in range(tensor_count):
        shape, offsets, sizes = (writers * ROWS, COLUMNS), (writer * ROWS, 0), (ROWS, COLUMNS)
        place = Place(number // PER_CHUNK, 1, number % PER_CHUNK * NBYTES)
        stored.append(StoredTensor(TensorItem(name_of(number), "float32", shape, offsets, sizes, NBYTES), None, place))
    table = np.zeros(-(-tensor_count // PER_CHUNK), CHUNK_DTYPE)
    table["raw_bytes"] = 1 << 20
    return Index(SAVE_ID, writer, writers, (f"rank-{writer:05d}.data",), 1 << 20, tuple(stored), {}, table.tobytes())


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
