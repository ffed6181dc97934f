"""Planning a `dcp.save` of many ranks in one process: seconds of each phase, bytes on the wire, peak memory.

    python benchmarks/planning.py [--ranks 256 512 1024] [--tensors 3000]

Prints JSON. Each number of ranks has a process of its own. Rank 0 is real but for its process group, which only says
how many ranks there are: a planner over DTensors, as under FSDP, the coordinator, and the layout of its data file. Of
the other ranks there are the plans that they would send.
"""

from __future__ import annotations

import argparse
import gc
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from snapstone import garbage, tensors
from snapstone.config import SaveOptions
from snapstone.dcp import SavePlanner, StorageWriter
from snapstone.dcp.plan_columns import PlanColumns
from snapstone.dcp.plan_exchange import Proposal
from snapstone.dcp.storage_writer import _Taken
from snapstone.structure import StructureCache, StructureKeys, make_structure

REPEATS = 7  # of which the fastest of each phase counts
REPLICATED_EVERY = 10  # one scalar, as Adam's `step`, to so many tensors
LOCAL_ROWS = 4
COLUMNS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tensors", type=int, default=3000, help="per rank")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.ranks[0], arguments.tensors)))
        return
    results = []
    for ranks in arguments.ranks:
        command = [sys.executable, __file__, "--one", "--ranks", str(ranks), "--tensors", str(arguments.tensors)]
        results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    print(json.dumps(results, indent=2))


def measure(ranks: int, tensor_count: int) -> dict[str, Any]:
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    base_mib = peak_mib()
    state = state_of_rank_0(ranks, tensor_count)
    result: dict[str, Any] = {"ranks": ranks, "tensors": tensor_count}
    with tempfile.TemporaryDirectory() as directory:
        rank_0 = Rank0(state, directory)
        began = time.perf_counter()
        others = [pickle.dumps(proposed(rank, ranks, state, rank_0.paths)) for rank in range(1, ranks)]
        result["other_ranks_made_s"] = round(time.perf_counter() - began, 3)
        gc.collect()
        result["first"] = rank_0.save(others)
        # What a rank sends that knows its plan: the same without the columns.
        known = [pickle.dumps(without_columns(pickle.loads(sent))) for sent in others]
        del others
        repeats = [rank_0.save(known) for _ in range(REPEATS)]
        result["repeated"] = {phase: min(repeat[phase] for repeat in repeats) for phase in repeats[0]}
        result["peak_rss_above_torch_mib"] = round(peak_mib() - base_mib)
    dist.destroy_process_group()
    return result


class Rank0:
    """Saves `state` without writing it; each phase with the seconds that it took."""

    def __init__(self, state: dict[str, Any], directory: str) -> None:
        self.state = state
        self.writer = StorageWriter(f"{directory}/c")
        self.keys = StructureKeys()
        self.structures = StructureCache()
        planner = SavePlanner()
        planner.set_up_planner(state, is_coordinator=True)
        self.paths = planner.mappings

    def save(self, others: list[bytes]) -> dict[str, float | int]:
        planner = SavePlanner()
        phases: dict[str, float | int] = {}

        def timed(phase: str, work: Callable[[], Any]) -> Any:
            began = time.perf_counter()
            result = work()
            phases[phase] = round(time.perf_counter() - began, 4)
            return result

        self.writer.set_up_storage_writer(True, rank=0)
        timed("rank_set_up_s", lambda: planner.set_up_planner(self.state, is_coordinator=True))
        mine = timed("rank_local_plan_s", lambda: self.writer.prepare_local_plan(planner.create_local_plan()))
        phases["local_plan_bytes"] = len(pickle.dumps(mine))
        plans = timed("coordinator_unpickle_s", lambda: [mine, *map(pickle.loads, others)])
        decided, metadata = timed("coordinator_global_plan_s", lambda: planner.create_global_plan(plans))
        decided = timed("coordinator_prepare_s", lambda: self.writer.prepare_global_plan(decided))
        sent = timed("coordinator_pickle_s", lambda: [pickle.dumps(plan) for plan in decided])
        phases["final_plan_bytes"] = max(map(len, sent))
        final = timed("rank_finish_s", lambda: planner.finish_plan(pickle.loads(sent[0])))
        timed("rank_layout_s", lambda: self.lay_out(planner, final))
        metadata.state_dict_metadata.compact = True  # as the writer's `finish` does
        phases["metadata_bytes"] = len(timed("coordinator_metadata_pickle_s", lambda: pickle.dumps(metadata)))
        self.writer.reset()
        for who in ("rank", "coordinator"):
            spent = [seconds for phase, seconds in phases.items() if phase.startswith(who)]
            phases[f"{who}_s"] = round(sum(spent), 4)
        return phases

    def lay_out(self, planner: SavePlanner, final: SavePlan) -> None:
        """What the storage writer does with a plan before bytes move."""
        with garbage.paused(), torch.no_grad():
            taken = _Taken.of(final, planner)
        ties = tensors.tie_positions(taken.shards)
        chunk_bytes = SaveOptions.of().chunk_bytes
        key = self.keys.of(taken.shards, taken.paths, ties, chunk_bytes)
        if key not in self.structures.known(0):
            items = [shard.item for shard in taken.shards]
            payload_bytes = sum(item.nbytes for item in items)
            structure = make_structure(items, taken.paths, ties, list(range(len(items))), payload_bytes, chunk_bytes)
            self.structures.put(0, key, structure)


def state_of_rank_0(ranks: int, tensor_count: int) -> dict[str, Any]:
    """As FSDP has it: each tensor's rows over all ranks, and a scalar here and there that all of them hold."""
    mesh = init_device_mesh("cpu", (ranks,))
    model: dict[str, Any] = {}
    for number in range(tensor_count):
        name = f"layers.{number // 10}.block.weight_{number % 10}"
        if number % REPLICATED_EVERY:
            model[name] = DTensor.from_local(torch.zeros(LOCAL_ROWS, COLUMNS), mesh, [Shard(0)], run_check=False)
        else:
            model[name] = torch.tensor(float(number))
    return {"model": model, "epoch": 1}


def proposed(rank: int, ranks: int, state: dict[str, Any], paths: dict[str, Any]) -> SavePlan:
    """The plan that another rank sends at its first save."""
    items = []
    shape, sizes = torch.Size((ranks * LOCAL_ROWS, COLUMNS)), torch.Size((LOCAL_ROWS, COLUMNS))
    offsets, properties = torch.Size((rank * LOCAL_ROWS, 0)), TensorProperties(torch.float32)
    sharded = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, shape)
    scalar = TensorWriteData(ChunkStorageMetadata(torch.Size(()), torch.Size(())), properties, torch.Size(()))
    for key, value in state["model"].items():
        data, kind = (sharded, WriteItemType.SHARD) if isinstance(value, DTensor) else (scalar, WriteItemType.TENSOR)
        items.append(WriteItem(MetadataIndex(f"model.{key}", data.chunk.offsets), kind, tensor_data=data))
    items.append(WriteItem(MetadataIndex("epoch"), WriteItemType.BYTE_IO))
    columns = PlanColumns.of(items, paths)
    return SavePlan([], planner_data=Proposal(columns.digest, columns, False), usable=False)


def without_columns(plan: SavePlan) -> SavePlan:
    return SavePlan([], planner_data=Proposal(plan.planner_data.digest, None, False), usable=False)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
