"""Optimizers of the workload: AdamW with float32 masters of bfloat16 weights, and one that only changes bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ByteStep", "MasterAdamW", "local"]

_STATES = 128  # as many as bfloat16 has mantissas


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`."""
    inner: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return inner


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) that steps in float32 and rounds the result into the weights."""

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["master"] = parameter.detach().float()
                    state["exp_avg"] = torch.zeros_like(state["master"])
                    state["exp_avg_sq"] = torch.zeros_like(state["master"])
                gradient = parameter.grad.float()
                state["step"] += 1
                count = float(state["step"])
                state["exp_avg"].lerp_(gradient, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                scale = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
                state["master"].mul_(1 - group["lr"] * group["weight_decay"])
                state["master"].addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - first**count))
                parameter.copy_(state["master"])


class ByteStep(torch.optim.Optimizer):
    """Owns the tensors of a state that nobody trains; a step flips low bits of every element, in place.

    Only bits of the mantissa change, so numbers stay finite. What was flipped since the beginning counts the steps, so
    no state comes back within 128 of them: an engine that compares saves never finds one unchanged.
    """

    def __init__(self, parameters: Iterable[Tensor], precision: str) -> None:
        super().__init__(parameters, {})
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = torch.zeros(())
            if precision == "bf16":
                state["master"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        self._count = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self._count += 1
        mask = (self._count ^ (self._count - 1)) % _STATES
        for parameter in self.param_groups[0]["params"]:
            _flip(parameter, mask)
            for name, tensor in self.state[parameter].items():
                if name == "step":
                    tensor += 1
                else:
                    _flip(tensor, mask)

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("the workload reads its tensors, nobody else should")


def _flip(tensor: Tensor, mask: int) -> None:
    piece = local(tensor.detach())
    piece.view(torch.int32 if piece.dtype == torch.float32 else torch.int16).bitwise_xor_(mask)
