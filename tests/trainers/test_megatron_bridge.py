"""The manager for Megatron-Bridge, by its protocol.

Megatron-Bridge wants Python 3.12 and packages that need CUDA, so it cannot be imported here as a whole. What is run is
the source of its protocol, its default manager, its factory and its functions for asynchronous saves, cut out of the
released module; around them stand the names that they use, and a `save_checkpoint` that calls `dist_checkpointing` as
Bridge's does.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from distributed.ranks import run_ranks, values
from trainers.packages import MEGATRON_VERSIONS, ROOT, unpacked

BRIDGE = "megatron-bridge-0.6.2"
CUT = {
    "CheckpointManager",
    "DefaultCheckpointManager",
    "create_checkpoint_manager",
    "schedule_async_save",
    "maybe_finalize_async_save",
    "is_empty_async_queue",
}

pytestmark = pytest.mark.timeout(600)


def _bridge() -> types.ModuleType:
    """`megatron.bridge.training.checkpointing`, as far as it is here."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import fully_parallel
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    source = (unpacked(BRIDGE) / "megatron/bridge/training/checkpointing.py").read_text()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", None) in CUT]
    assert {node.name for node in tree.body} == CUT  # type: ignore[attr-defined]
    future = ast.parse("from __future__ import annotations\nfrom typing import *\n").body
    tree.body = [*future, *tree.body]
    for name in ("megatron.bridge", "megatron.bridge.training"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = []
    module = types.ModuleType("megatron.bridge.training.checkpointing")
    sys.modules[module.__name__] = module

    def save_checkpoint(*, state: Any, model: Any, checkpointing_context: dict[str, Any], **_: Any) -> None:
        if "save_strategy" not in checkpointing_context:
            strategy = module.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=2)
            checkpointing_context["save_strategy"] = fully_parallel.FullyParallelSaveStrategyWrapper(strategy)
        config = state.config
        request = dist_checkpointing.save(
            model(), config.path, checkpointing_context["save_strategy"], async_sharded_save=config.async_save
        )
        if config.async_save:
            module.schedule_async_save(state, request)

    def load_checkpoint(*, state: Any, model: Any, checkpointing_context: dict[str, Any], **_: Any) -> tuple[int, int]:
        strategy = checkpointing_context["load_strategy"] = module.TorchDistLoadShardedStrategy()
        state.loaded = dist_checkpointing.load(model(), state.config.path, strategy)
        return state.loaded["iteration"], 0

    vars(module).update(
        TorchDistSaveShardedStrategy=strategies.TorchDistSaveShardedStrategy,
        TorchDistLoadShardedStrategy=strategies.TorchDistLoadShardedStrategy,
        _get_filesystem_reader=strategies._get_filesystem_reader,
        _validate_target_prefix=lambda **_: None,
        init_checkpointing_context=lambda config: {},
        print_rank_0=print,
        save_checkpoint=save_checkpoint,
        load_checkpoint=load_checkpoint,
    )
    exec(compile(tree, "checkpointing.py", "exec"), vars(module))
    return module


def _manage(rank: int, root: str) -> None:
    from trainers.megatron_cpu import use_megatron

    use_megatron(MEGATRON_VERSIONS[-1])
    sys.path.append(str(unpacked(BRIDGE)))
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    bridge = _bridge()
    before = {name: vars(bridge)[name] for name in ("TorchDistSaveShardedStrategy", "_get_filesystem_reader")}
    target = "snapstone.integrations.megatron_bridge.CheckpointManager"
    config = types.SimpleNamespace(custom_manager_class=target, async_save=True, path=root)
    manager = bridge.create_checkpoint_manager(config)
    assert type(manager).__module__ == "snapstone.integrations.megatron_bridge"
    from snapstone.integrations import megatron

    weight = torch.arange(8.0) + rank
    state = State(config)

    def model() -> dict[str, Any]:
        return {"w": ShardedTensor.from_rank_offsets("w", weight, (0, rank, 2)), "iteration": 5}

    save = types.SimpleNamespace(state=state, model=model, optimizer=None, opt_param_scheduler=None)
    save.num_floating_point_operations_so_far, save.non_persistent_ckpt, save.train_data_iterator = 0, False, None
    save.pg_collection = save.module_name = None
    manager.save(save, None)
    assert type(state._async_calls_queue) is megatron.AsyncCallsQueue
    weight.zero_()  # the snapshot is taken
    manager.finalize_async_saves(state, blocking=False)
    manager.finalize_async_saves(state, blocking=True, terminate=True)
    manager.finalize_async_saves(state, blocking=True, terminate=True)  # Bridge does so at exit
    assert megatron.holds_checkpoint(root)
    assert Path(root, "metadata.json").is_file()
    dist.barrier()
    load = types.SimpleNamespace(state=state, model=model, optimizer=None, opt_param_scheduler=None, strict=True)
    load.skip_load_to_model_and_opt, load.pg_collection, load.module_name = False, None, None
    assert manager.load(load) == (5, 0)
    assert state.loaded["w"].tolist() == [value + rank for value in range(8)]
    megatron.uninstall()
    assert {name: vars(bridge)[name] for name in before} == before


class State:
    """GlobalState, as far as managers look at it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._async_calls_queue: Any = None
        self.loaded: dict[str, Any] = {}

    @property
    def async_calls_queue(self) -> Any:
        return self._async_calls_queue


def test_bridge_saves_and_loads_through_the_manager_that_its_factory_makes(tmp_path: Path) -> None:
    values(run_ranks(2, _manage, str(tmp_path), timeout=240))


def test_another_bridge_is_refused_by_name(tmp_path: Path) -> None:
    facts = tmp_path / "megatron_bridge-0.5.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-bridge\nVersion: 0.5.0\n")
    paths = [str(tmp_path), *(os.environ.get("PYTHONPATH") or str(ROOT / "python")).split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-c", "import snapstone.integrations.megatron_bridge"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 1
    assert "snapstone supports megatron-bridge >= 0.6, < 0.7" in done.stderr
