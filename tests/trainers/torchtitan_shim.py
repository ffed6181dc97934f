"""torchtitan's own `main` on CPU with gloo: what a machine without accelerators lacks is put in its place first.

Run as a script with the arguments of torchtitan, from a folder that `torchtitan_jobs.make_assets` has filled.
With SNAPSTONE_TEST_ACTION set, that function of `torchtitan_actions` gets the trainer before it trains.
"""

from __future__ import annotations

import faulthandler
import os
import random
import runpy
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def _device_module() -> types.ModuleType:
    """torch.cpu, with what torchtitan asks of an accelerator."""
    module = types.ModuleType("cpu_as_device")

    def nothing(*_: Any, **__: Any) -> None: ...

    named: dict[str, Any] = {
        "device_count": lambda: int(os.environ.get("WORLD_SIZE", "1")),
        "set_device": nothing,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "CPU",
        "get_device_properties": lambda *_: types.SimpleNamespace(total_memory=8 * GIB),
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        "memory_stats": lambda *_: {},
        "synchronize": nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    for name, value in named.items():
        setattr(module, name, value)
    module.__getattr__ = lambda name: getattr(torch.cpu, name)  # type: ignore[method-assign]
    return module


def _attention(self: Any, q_BLNH: torch.Tensor, k_BLNH: torch.Tensor, v_BLNH: torch.Tensor, **_: Any) -> torch.Tensor:
    """FlexAttention has no backward pass on CPU. Causal over the whole sequence, whatever documents are in it.

    torchtitan looks its arguments up by name when it shards them.
    """
    heads = [one.transpose(1, 2) for one in (q_BLNH, k_BLNH, v_BLNH)]
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2).contiguous()


def stand_in() -> None:
    import torchtitan.tools.utils as utils

    utils.device_type, utils.device_module = "cpu", _device_module()
    utils.get_local_device = lambda: torch.device("cpu")
    if not hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout = lambda *_: None  # type: ignore[attr-defined]

    from torch.distributed.fsdp import FSDPModule

    stock = FSDPModule.set_gradient_divide_factor

    def divide(self: Any, factor: float) -> None:  # gloo has no PREMUL_SUM
        stock(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = divide  # type: ignore[method-assign]

    from torchtitan.models.common.attention import FlexAttention
    from torchtitan.models.common.decoder import Decoder

    FlexAttention.forward = _attention
    # Block masks, which _attention does without, would be compiled: a minute.
    Decoder.get_attention_masks = lambda self, **_: None


def debug_model() -> Any:
    """torchtitan's llama3 debug model, in the sizes of a test. A config function for `--config`."""
    from torchtitan.models.llama3 import model_registry
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    config = llama3_debugmodel()
    config.model_spec = model_registry("debugmodel", attn_backend="flex")
    layers = int(os.environ.get("SNAPSTONE_TEST_LAYERS", "2"))
    config.model_spec.model.layers = config.model_spec.model.layers[:layers]
    config.training.disable_cuda_graphs = True
    config.training.mixed_precision_param = "float32"
    config.training.seq_len = 128
    config.training.local_batch_size = 2
    config.parallelism.spmd_backend = "partial_dtensor"
    config.optimizer.implementation = "foreach"
    config.activation_checkpoint = None
    config.validator.enable = False
    config.checkpoint.enable = True
    config.checkpoint.interval = 2
    config.debug.seed = 1
    return config


def main() -> None:
    faulthandler.register(signal.SIGUSR1)  # a test that waits in vain asks where this is
    torch.set_num_threads(1)
    random.seed(1)  # torchtitan seeds torch alone
    numpy.random.seed(1)
    stand_in()
    import torchtitan.train as train

    act(os.environ.get("SNAPSTONE_TEST_ACTION", ""))
    train.main()


def act(name: str) -> None:
    """That function, of torchtitan_actions or of the file in "FILE:NAME", gets each trainer before it trains."""
    import torchtitan.trainer

    # Rank 0 sleeps at the end, for others that would lose the store with it; here the test serves the store.
    torchtitan.trainer.time = types.SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: None)
    if not name:
        return
    path, _, function = name.rpartition(":")
    action = runpy.run_path(path or str(Path(__file__).with_name("torchtitan_actions.py")))[function]
    stock_train = torchtitan.trainer.Trainer.train

    def train(self: Any) -> None:
        action(self)
        stock_train(self)

    torchtitan.trainer.Trainer.train = train


if __name__ == "__main__":
    # As the module of its full name, so that torchtitan finds the same one for --module.
    sys.path.insert(0, str(ROOT / "tests"))
    from trainers import torchtitan_shim

    torchtitan_shim.main()
