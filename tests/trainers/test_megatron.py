"""The engine in real releases of Megatron-core: a GPTModel with its distributed optimizer, on gloo and CPU.

Each job is one launch of ranks that checks several promises, because importing Megatron takes seconds per process.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distributed.ranks import Ranks, announce, run_ranks, values
from trainers.megatron_cpu import Training, use_megatron
from trainers.packages import MEGATRON_VERSIONS, ROOT, unpacked

NEWEST = MEGATRON_VERSIONS[-1]
SECONDS = 240.0

pytestmark = pytest.mark.timeout(600)


def _directory(root: str, iteration: int, rank: int) -> str:
    import torch.distributed as dist

    path = f"{root}/iter_{iteration:07d}"
    if rank == 0:
        os.makedirs(path, exist_ok=True)
    dist.barrier()
    return path


def _differing(training: Training, wanted: dict[str, str]) -> list[str]:
    found = training.digests()
    return sorted({*found} ^ {*wanted}) + [name for name in wanted if found.get(name) != wanted[name]]


# ---- the same layout, every generation -------------------------------------------------------------------------------


def _round_trip(rank: int, version: str, root: str) -> None:
    """TP2: sync, async, fully parallel wrappers, metadata, strict modes, stock, uninstall; then other layouts."""
    use_megatron(version)
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor, serialization
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.strategies import torch as stock
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
    )

    from snapstone import Checkpoint, CorruptCheckpointError, verify
    from snapstone.integrations import megatron

    own_reader = stock._get_filesystem_reader
    training = Training(tp=2)
    training.step()
    first = _directory(root, 1, rank)
    wanted = training.digests()
    saver = megatron.SaveStrategy(save_options={"codec": "zstd"})
    dist_checkpointing.save(training.state(), first, saver)
    assert megatron.holds_checkpoint(first)
    assert not verify(megatron.engine_path(first)).problems
    saved = Checkpoint.open(megatron.engine_path(first))
    assert saved.step == 1
    assert json.loads(Path(first, "metadata.json").read_text())["sharded_backend"] == "torch_dist"

    # Asynchronously: the state changes as soon as async_save has returned, and the request waits for nobody until then.
    second = _directory(root, 2, rank)
    training.step()
    wanted_second = training.digests()
    wrapped = FullyParallelSaveStrategyWrapper(megatron.SaveStrategy())
    queue = megatron.AsyncCallsQueue()
    request = dist_checkpointing.save(training.state(), second, wrapped, async_sharded_save=True)
    assert request.async_fn is None
    queue.schedule_async_request(request)
    training.step()
    assert queue.get_num_unfinalized_calls() == 1
    assert queue.maybe_finalize_async_calls(blocking=True) == [0]
    assert queue.maybe_finalize_async_calls(blocking=True) == []
    queue.close()
    queue.close()
    assert Path(second, "metadata.json").is_file()

    other = Training(tp=2, seed=7)
    loader = megatron.LoadStrategy()
    other.restore(dist_checkpointing.load(other.state(is_loading=True), second, loader))
    assert _differing(other, wanted_second) == []
    parallel = FullyParallelLoadStrategyWrapper(loader, exchange_algo="gather_object")
    other.restore(dist_checkpointing.load(other.state(is_loading=True), first, parallel))
    assert _differing(other, wanted) == []
    assert stock._get_filesystem_reader is own_reader

    # Metadata and strict modes.
    sharded = serialization.load_sharded_metadata(first, loader)
    tensors = serialization.load_tensors_metadata(first, loader)
    assert {"rng_state/shard_0.0_1.2", "rng_state/shard_0.1_1.2", *tensors} < set(sharded)
    assert tensors["embedding.word_embeddings.weight"].global_shape == (64, 32)
    template = other.state(is_loading=True)
    template["extra"] = ShardedTensor.from_rank_offsets("extra", training.model.module.decoder.final_layernorm.bias)
    template["extra"].replica_id = rank
    del template["rng_state"]
    loaded, missing, unexpected = dist_checkpointing.load(template, first, loader, strict="return_all")
    assert "extra" in unexpected
    assert "extra" not in loaded
    assert {name.split("/")[0] for name in missing if "rng" in name} == {"rng_state"}
    template = other.state(is_loading=True)
    template["extra"] = ShardedTensor.from_rank_offsets("extra", training.model.module.decoder.final_layernorm.bias)
    template["extra"].replica_id = rank
    with pytest.raises(CheckpointingException):
        dist_checkpointing.load(template, first, loader, strict="raise_all")

    # A stock checkpoint from before the switch.
    before = _directory(root, 3, rank)
    wanted = training.digests()
    multiprocessing.current_process()._config["daemon"] = False  # stock has a process for the results of its writers
    plain = stock.TorchDistSaveShardedStrategy("torch_dist", 1)
    dist_checkpointing.save(training.state(), before, plain)
    assert not megatron.holds_checkpoint(before)
    other.restore(dist_checkpointing.load(other.state(is_loading=True), before, loader))
    assert _differing(other, wanted) == []

    # Installed, loads that name no strategy know both; uninstalled, every name is back.
    names = [(module, dict(vars(module))) for module in (stock, serialization)]
    with megatron.installed():
        for path in (second, before):
            other.restore(dist_checkpointing.load(other.state(is_loading=True), path))
        assert _differing(other, wanted) == []
        nameless, named = _directory(root, 21, rank), _directory(root, 22, rank)
        dist_checkpointing.save(training.state(), nameless)
        assert megatron.holds_checkpoint(nameless)
        dist_checkpointing.save(training.state(), named, stock.TorchDistSaveShardedStrategy("torch_dist", 1))
        assert not megatron.holds_checkpoint(named)
        if hasattr(serialization, "get_default_save_sharded_strategy") and version.startswith("0.16"):
            assert type(serialization.get_default_save_sharded_strategy()) is megatron.SaveStrategy
    assert [(module, dict(vars(module))) for module in (stock, serialization)] == names

    # The same iteration saved by both, one after the other.
    training.step()
    wanted = training.digests()
    dist_checkpointing.save(training.state(), before, saver)
    other.restore(dist_checkpointing.load(other.state(is_loading=True), before, loader))
    assert _differing(other, wanted) == []
    with pytest.raises(BaseException, match=r"\.metadata|metadata"):
        dist_checkpointing.load(other.state(is_loading=True), before, stock.TorchDistLoadShardedStrategy())
    dist.barrier()
    dist_checkpointing.save(training.state(), before, stock.TorchDistSaveShardedStrategy("torch_dist", 1))
    with pytest.raises(CorruptCheckpointError, match="stock Megatron-core has saved beside"):
        loader.load({}, before)
    dist.barrier()

    # Part of it, removed.
    dist.barrier()
    if rank == 0:
        loader.remove_sharded_tensors(first, "optimizer.state.exp_avg_sq")
    dist.barrier()
    left = serialization.load_tensors_metadata(first, loader)
    assert {name for name in tensors if name not in left} == {
        name for name in tensors if name.startswith("optimizer.state.exp_avg_sq")
    }
    kept = Checkpoint.open(megatron.engine_path(first))
    assert kept.step == 1
    assert kept.objects() == saved.objects()

    # What is beside the tensors belongs to them.
    dist.barrier()
    if rank == 0:
        with open(Path(second, "common.pt"), "ab") as file:
            file.write(b"x")
    dist.barrier()
    with pytest.raises(CorruptCheckpointError, match=r"common\.pt"):
        loader.load({}, second)

    _relay(rank, root, 4, [(2, 1), (1, 1), (2, 1)])
    _flat_ranges(rank, root, 7)


@pytest.mark.parametrize("version", MEGATRON_VERSIONS)
def test_a_gpt_goes_through_the_strategies_bit_for_bit_in_every_generation(tmp_path: Path, version: str) -> None:
    values(run_ranks(2, _round_trip, version, str(tmp_path), timeout=SECONDS))


# ---- changed layouts -------------------------------------------------------------------------------------------------


def _relay(rank: int, root: str, iteration: int, layouts: list[tuple[int, ...]], **model: Any) -> None:
    """Saves at the first layout; at each other one, loads what was saved last and saves what came."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    from snapstone.integrations.megatron import LoadStrategy, SaveStrategy

    written: list[dict[str, bytes]] = []
    path = ""
    for position, layout in enumerate(layouts):
        training = Training(*layout, seed=position, **model)
        if path:
            state = training.state(is_loading=True)
            del state["rng_state"]  # as Megatron leaves it out when the layout has changed
            training.restore({**dist_checkpointing.load(state, path, LoadStrategy()), "rng_state": None})
        else:
            training.fill()
        path = _directory(root, iteration + position, rank)
        group = training.parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist_checkpointing.save(training.state(), path, FullyParallelSaveStrategyWrapper(SaveStrategy(), group))
        written.append(_whole(path))
    assert len(written[0]) > 50
    for position, found in enumerate(written[1:], 1):
        assert sorted(found) == sorted(written[0]), layouts[position]
        assert [name for name in found if found[name] != written[0][name]] == [], layouts[position]


def _whole(path: str) -> dict[str, bytes]:
    """Every tensor of a checkpoint, as a whole."""
    import torch

    from snapstone import Checkpoint
    from snapstone.integrations.megatron import engine_path

    saved = Checkpoint.open(engine_path(path))
    tensors = saved.load_tensors([name for name in saved.keys() if not name.startswith("objects.")])  # noqa: SIM118
    return {name: one.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, one in tensors.items()}


def _four_ranks(rank: int, version: str, root: str) -> None:
    use_megatron(version)
    _relay(rank, root, 1, [(2, 1), (1, 2), (4, 1), (2, 1)])
    _relay(rank, root, 11, [(1, 1, 4), (1, 2, 2)], experts=4)


def test_tensor_pipeline_and_expert_parallel_sizes_can_change_at_each_load(tmp_path: Path) -> None:
    values(run_ranks(4, _four_ranks, NEWEST, str(tmp_path), timeout=SECONDS))


def _flat_ranges(rank: int, root: str, iteration: int) -> None:
    """dp_reshardable: optimizer states as ranges of one flat buffer, cut where data parallel ranks begin."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from snapstone.integrations.megatron import LoadStrategy, SaveStrategy

    training = Training()
    training.step()
    path = _directory(root, iteration, rank)
    state = training.state("dp_reshardable")
    tensors = [one for one in nested_values(state["optimizer"]) if isinstance(one, ShardedTensor)]
    assert sum(len(one.global_shape) == 1 and one.local_shape != one.global_shape for one in tensors) > 10
    dist_checkpointing.save(state, path, SaveStrategy())
    other = Training(seed=3)
    other.restore(dist_checkpointing.load(other.state("dp_reshardable", is_loading=True), path, LoadStrategy()))
    assert _differing(other, training.digests()) == []


# ---- a save that is killed -------------------------------------------------------------------------------------------


def _train(rank: int, version: str, root: str, last: int, fault_at: int) -> tuple[int, dict[str, str]]:
    """As Megatron-LM trains: resume from the tracker file, save asynchronously every second step, finalize at steps."""
    logging.basicConfig(level=logging.INFO)
    use_megatron(version)
    from megatron.core import dist_checkpointing

    from snapstone.integrations.megatron import AsyncCallsQueue, LoadStrategy, SaveStrategy

    tracker = Path(root, "latest_checkpointed_iteration.txt")
    training, queue, strategy = Training(), AsyncCallsQueue(), SaveStrategy()
    if tracker.exists():
        path = _directory(root, int(tracker.read_text()), rank)
        training.restore(dist_checkpointing.load(training.state(is_loading=True), path, LoadStrategy()))
    begin = training.iteration
    while training.iteration < last:
        training.step()
        queue.maybe_finalize_async_calls()
        if training.iteration % 2 == 0:
            queue.maybe_finalize_async_calls(blocking=True)
            iteration = training.iteration
            if iteration == fault_at and rank == 1:
                _hold_sync()
            path = _directory(root, iteration, rank)
            request = dist_checkpointing.save(training.state(), path, strategy, async_sharded_save=True)
            if rank == 0:
                request.add_finalize_fn(lambda iteration=iteration: tracker.write_text(str(iteration)))
            queue.schedule_async_request(request)
            announce(f"saving {iteration}")
    queue.maybe_finalize_async_calls(blocking=True)
    return begin, training.digests()


def _hold_sync() -> None:
    """This rank's save stays in flight until somebody kills it: its bytes are written, and not yet durable."""
    from snapstone._native import fault_arm

    fault_arm("fsync:1+:delay=20000;fdatasync:1+:delay=20000")


def test_a_run_killed_during_an_asynchronous_save_resumes_bit_identical(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    wanted = values(run_ranks(2, _train, NEWEST, str(straight), 6, 0, timeout=SECONDS))
    with Ranks(2, _train, NEWEST, str(broken), 6, 4) as ranks:
        for rank in (0, 1):
            ranks.wait_for(rank, "saving 4", timeout=SECONDS)
        assert not Path(broken, "iter_0000004", "snapstone").exists()
        for rank in (0, 1):
            ranks.signal(rank, signal.SIGKILL)
        assert {result.outcome for result in ranks.results(SECONDS)} == {"died"}
    assert Path(broken, "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not Path(broken, "iter_0000004", "metadata.json").exists()
    resumed = run_ranks(2, _train, NEWEST, str(broken), 6, 0, timeout=SECONDS)
    assert values(resumed) == [(2, digests) for _, digests in wanted]
    for word in ("staged", "durable"):
        assert sum(f"INFO:snapstone:{word} " in line for line in resumed[0].output.splitlines()) == 2
        assert not any(f"INFO:snapstone:{word} " in line for line in resumed[1].output.splitlines())


# ---- failures --------------------------------------------------------------------------------------------------------


def _failing(rank: int, version: str, root: str) -> str:
    use_megatron(version)
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject

    from snapstone.integrations import megatron

    training, queue = Training(), megatron.AsyncCallsQueue()
    training.step()
    path = _directory(root, 1, rank)
    if rank == 1:
        from snapstone._native import fault_arm

        fault_arm("fsync:1+:errno=EIO;fdatasync:1+:errno=EIO")
    request = dist_checkpointing.save(training.state(), path, megatron.SaveStrategy(), async_sharded_save=True)
    queue.schedule_async_request(request)
    try:
        queue.maybe_finalize_async_calls(blocking=True)
    except Exception as error:
        told = f"{type(error).__name__}"
    else:
        told = "nothing"
    if rank == 1:
        from snapstone._native import fault_disarm

        fault_disarm()
    assert not Path(path, "metadata.json").exists()
    assert queue.get_num_unfinalized_calls() == 0

    class Foreign:
        """No class that torch.load knows."""

    globals()["Foreign"] = Foreign
    Foreign.__qualname__ = "Foreign"
    state = {"object": ShardedObject("object", Foreign(), (1,), (0,), replica_id=rank)}
    path = _directory(root, 2, rank)
    dist_checkpointing.save(state, path, megatron.SaveStrategy())
    state["object"].data = None
    with pytest.raises(BaseException, match="allow_pickle"):
        dist_checkpointing.load(dict(state), path, megatron.LoadStrategy())
    loaded = dist_checkpointing.load(dict(state), path, megatron.LoadStrategy(allow_pickle=True))
    assert type(loaded["object"]).__name__ == "Foreign"
    return told


def test_a_failed_save_is_told_on_every_rank_and_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    told = values(run_ranks(2, _failing, NEWEST, str(tmp_path), timeout=SECONDS))
    assert told == ["RankFailedError", "OSError"]


def test_a_wrong_option_is_refused_where_it_is_given() -> None:
    code = (
        "from trainers.megatron_cpu import use_megatron; use_megatron('0.19.2')\n"
        "import snapstone.integrations.megatron as m\n"
        "for make in (m.SaveStrategy, m.install):\n"
        "    for options, error in (({'codec': 'rar'}, ValueError), ({'base': 'auto'}, TypeError)):\n"
        "        try: make(save_options=options)\n"
        "        except error: continue\n"
        "        raise AssertionError(options)\n"
        "from megatron.training import checkpointing as c, async_utils as a, initialize as i\n"
        "before = [dict(vars(x)) for x in (c, a, i)]\n"
        "m.install(); m.install(save_options={'codec': 'zstd'})\n"
        "s = c.TorchDistSaveShardedStrategy(cpu_shm_mode=False)\n"
        "assert type(s) is m.SaveStrategy and s.save_options == {'codec': 'zstd'}\n"
        "assert type(c.TorchDistLoadShardedStrategy(cache_metadata=True)) is m.LoadStrategy\n"
        "assert type(a._get_async_calls_queue()) is m.AsyncCallsQueue and a.is_empty_async_queue()\n"
        "assert i.init_persistent_async_worker(0, 'fork') is None\n"
        "m.uninstall(); m.uninstall()\n"
        "assert [dict(vars(x)) for x in (c, a, i)] == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr[-3000:]


def _environment(*first: Path) -> dict[str, str]:
    paths = [*map(str, first), str(ROOT / "tests"), *(os.environ.get("PYTHONPATH") or "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0"])
def test_a_version_that_is_not_known_is_refused_by_name(tmp_path: Path, version: str) -> None:
    facts = tmp_path / f"megatron_core-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n")
    done = subprocess.run(
        [sys.executable, "-c", "import snapstone.integrations.megatron"],
        capture_output=True,
        text=True,
        env=_environment(tmp_path),
    )
    assert done.returncode == 1
    assert f"megatron-core {version} is installed; snapstone supports megatron-core >= 0.16, < 0.20" in done.stderr


def test_the_example_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Without any shim: the strategies and the queue work on CPU and gloo as they are."""
    environment = _environment(unpacked(f"megatron-core-{NEWEST}")) | {"OMP_NUM_THREADS": "1"}
    found = []
    for ranks, steps in ((2, 4), (1, 6)):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*launcher, "examples/megatron/core.py", "--dir", str(tmp_path / "run"), "--steps", str(steps)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found += sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert found == [
        "rank 0: step 4, weight 10, bias -10",
        "rank 1: step 4, weight 10, bias -10",
        "rank 0: step 6, weight 21, bias -21",
    ]
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "6"
