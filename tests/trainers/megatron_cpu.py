"""Megatron-core on CPU with gloo: a real GPTModel, its DDP and its distributed optimizer, trained for a few steps.

Megatron-core asks for CUDA in dozens of places. `use_cpu` answers those that training a small model meets with the
CPU's tensors and generator; nothing of `dist_checkpointing` is replaced.
"""

from __future__ import annotations

import sys
import typing
import warnings
from types import SimpleNamespace
from typing import Any

from trainers.packages import unpacked


def use_megatron(version: str) -> None:
    """Puts that Megatron-core on sys.path, of a process that has imported none."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(unpacked(f"megatron-core-{version}")))
    if not hasattr(typing, "override"):
        typing.override = lambda function: function  # type: ignore[attr-defined]  # megatron.training wants Python 3.12
    use_cpu()


def use_cpu() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = "cpu"
            found = function(*args, **kwargs)
            if function is torch.Tensor.type and isinstance(found, str):
                return found.replace("torch.", "torch.cuda.")
            return found

    OnCpu().__enter__()
    cuda: Any = torch.cuda
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args: None  # a function each: torch._dynamo refuses one under two names
    cuda.set_device = lambda *args: None
    cuda.current_stream = lambda *args: stream
    cuda.FloatTensor, cuda.IntTensor = torch.FloatTensor, torch.IntTensor
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def use_generator() -> None:
    """Megatron's trackers of CUDA's generator, on the CPU's."""
    import torch
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def use_adam() -> None:
    """Adam that counts steps per group, as Apex's and Transformer Engine's do: with torch's own, which counts per
    parameter, Megatron's reshardable optimizer states cannot be loaded.
    """
    import torch
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    class Adam(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, **_: Any) -> None:
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                first, second = group["betas"]
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    state = self.state[parameter]
                    if not state:
                        state.update({name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")})
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    state["exp_avg"].lerp_(parameter.grad, 1 - first)
                    state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                    scale = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt_().add_(group["eps"])
                    parameter.addcdiv_(state["exp_avg"] / (1 - first ** group["step"]), scale, value=-group["lr"])

    optimizer.Adam = distrib_optimizer.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


class Training:
    """A GPT of two layers with tensor and pipeline parallelism, its optimizer state sharded over the rest."""

    def __init__(self, tp: int = 1, pp: int = 1, ep: int = 1, *, seed: int = 1, experts: int | None = None) -> None:
        import torch
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.transformer_config import TransformerConfig

        use_adam()
        use_generator()
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        more = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": 1} if experts else {}
        parallel_state.initialize_model_parallel(tp, pp, **more)
        self.parallel_state = parallel_state
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            pipeline_dtype=torch.bfloat16,
            use_cpu_initialization=True,
            bf16=True,
            params_dtype=torch.bfloat16,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            **(
                {
                    "num_moe_experts": experts,
                    **more,
                    "moe_token_dispatcher_type": "allgather",
                    "add_bias_linear": False,
                }
                if experts
                else {}
            ),
        )
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        spec = get_gpt_layer_local_spec(num_experts=experts)
        model = GPTModel(config, spec, 64, 16, pre_process=first, post_process=last).bfloat16()
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(config, ddp_config, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                use_distributed_optimizer=True,
                bf16=True,
                params_dtype=torch.bfloat16,
                clip_grad=1.0,
            ),
            [self.model],
        )
        self.iteration = 0

    def step(self) -> float:
        """On data that depends on the iteration and on the data parallel rank."""
        import torch

        self.iteration += 1
        generator = torch.Generator().manual_seed(1000 * self.iteration + self.parallel_state.get_data_parallel_rank())
        tokens = torch.randint(0, 64, (2, 16), generator=generator)
        positions = torch.arange(16).expand(2, -1)
        mask = torch.triu(torch.ones(1, 1, 16, 16, dtype=torch.bool), 1)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self.model(tokens, positions, mask, labels=tokens).float().mean()
        loss.backward()
        self.model.finish_grad_sync()
        assert self.optimizer.step()[0]
        return float(loss)

    def fill(self) -> None:
        """Optimizer states as after many steps, for layouts whose steps take a pipeline schedule."""
        import torch

        generator = torch.Generator().manual_seed(self.parallel_state.get_data_parallel_rank())
        for one in self.optimizer.chained_optimizers:
            for group in one.optimizer.param_groups:
                group["step"] = 5
                for parameter in group["params"]:
                    one.optimizer.state[parameter] = {
                        name: torch.rand(parameter.shape, generator=generator) for name in ("exp_avg", "exp_avg_sq")
                    }

    def state(self, kind: str = "fully_reshardable", *, is_loading: bool = False) -> dict[str, Any]:
        """As Megatron-LM's generate_state_dict makes it: model, optimizer, generators, and what is common."""
        from argparse import Namespace

        from megatron.core.dist_checkpointing.mapping import ShardedObject

        metadata = {"distrib_optim_sharding_type": kind}
        model = self.model.module.sharded_state_dict()
        rank = self.parallel_state
        place = (rank.get_pipeline_model_parallel_rank(), rank.get_tensor_model_parallel_rank())
        sizes = (rank.get_pipeline_model_parallel_world_size(), rank.get_tensor_model_parallel_world_size())
        rng = ShardedObject("rng_state", [_generators()], sizes, place, replica_id=rank.get_data_parallel_rank())
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {
            "model": model,
            "optimizer": optimizer,
            "rng_state": rng,
            "iteration": self.iteration,
            "args": Namespace(hidden_size=32, lr=1e-2),
        }

    def restore(self, loaded: dict[str, Any]) -> None:
        self.model.module.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        self.iteration = loaded["iteration"]
        if loaded["rng_state"] is not None:
            _set_generators(loaded["rng_state"][0])

    def digests(self) -> dict[str, str]:
        """Of everything that training goes on from, bit for bit, on this rank."""
        import hashlib

        import torch

        def digest(value: torch.Tensor) -> str:
            return hashlib.sha256(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()

        found = {name: digest(parameter) for name, parameter in self.model.named_parameters()}
        for one in self.optimizer.chained_optimizers:
            for group in one.optimizer.param_groups:
                for position, parameter in enumerate(group["params"]):
                    for name, value in (*one.optimizer.state[parameter].items(), ("main", parameter)):
                        found[f"{position}.{name}"] = digest(value)
        return found | {"generator": digest(torch.get_rng_state())}


def _generators() -> dict[str, Any]:
    import random

    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_generators(saved: dict[str, Any]) -> None:
    import random

    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    random.setstate(saved["random_rng_state"])
    np.random.set_state(saved["np_rng_state"])
    torch.set_rng_state(saved["torch_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(saved["rng_tracker_states"])
