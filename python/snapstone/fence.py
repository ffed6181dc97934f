"""Fences: until when a snapshot must be taken.

`"now"`: before `async_save` returns. `optimizer` (one or several): before its next step. Parameters and optimizer
state change only in a step, so they may be copied behind the next forward and backward pass; everything else in the
state (batch-norm statistics, RNG states, counters) is copied at the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from operator import attrgetter
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from . import _native, state, tensors

__all__ = ["Fence", "OptimizerFence"]

Fence = Literal["now"] | torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


_Item = tuple[Any, Any, torch.Tensor]  # container, key or position, value
_SETTLED_TYPES = set(tensors.TENSOR_TYPES)

# What each optimizer's next step waits for.
_held: WeakKeyDictionary[torch.optim.Optimizer, list[Future[None]]] = WeakKeyDictionary()


def _hold(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    wait_for_futures(_held.get(optimizer, ()))


class OptimizerFence:
    """Waits for staging in a pre-step hook of each optimizer."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    @classmethod
    def of(cls, fence: Fence) -> OptimizerFence | None:
        """The fence that a caller asked for; None for "now". TypeError for anything else."""
        if isinstance(fence, str):
            optimizers: tuple[Any, ...] = ()
            if fence == "now":
                return None
        else:
            optimizers = tuple(fence) if isinstance(fence, Iterable) else (fence,)
        if not optimizers or not all(isinstance(one, torch.optim.Optimizer) for one in optimizers):
            raise TypeError(f'fence={fence!r}: use "now", an optimizer or a sequence of optimizers')
        return cls(optimizers)

    def attach(self, staged: Future[None]) -> None:
        """From now on no optimizer of the fence steps before `staged` is done. Errors of staging surface elsewhere."""
        for optimizer in self._optimizers:
            pending = [one for one in _held.get(optimizer, ()) if not one.done()]
            if optimizer not in _held:
                # One hook for all saves, and for good: a hook must not go while the optimizer walks its hooks.
                optimizer.register_step_pre_hook(_hold)
            _held[optimizer] = [*pending, staged]

    def snapshot(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any] | state.Flattened:
        """What `state_dict` is now: containers and everything that these optimizers do not own are copied.

        A plain nested dict of owned tensors and immutable values comes back as a dict, in time for a step that never
        waits; a state with anything else in it comes back flattened.
        """
        if type(state_dict) is dict:
            guards: list[Any] = [group["params"] for one in self._optimizers for group in one.param_groups]
            guards += [one.state for one in self._optimizers]
            copied, rest = _native.snapshot(state_dict, guards, tensors.TENSOR_TYPES)
            if {type(value) for _, _, value in rest} <= _SETTLED_TYPES:
                for container, key, value in self._not_parameters(rest):
                    container[key] = value.detach().clone()
                return copied  # type: ignore[no-any-return]
        flattened = state.flatten(state_dict)
        guarded = {tensors.storage_key(tensor) for tensor in self._owned()}
        for name, tensor in flattened.tensors.items():
            if tensors.storage_key(tensor) not in guarded:
                flattened.tensors[name] = tensor.detach().clone()
        return flattened

    def _not_parameters(self, rest: list[_Item]) -> list[_Item]:
        """Without the detached parameters that every state_dict() consists of: they are the parameters' memory."""
        if not rest:
            return rest
        owned = dict(_places([*self._parameters()]))
        places = _places([value for _, _, value in rest])
        return [item for item, (at, nbytes) in zip(rest, places, strict=True) if owned.get(at) != nbytes]

    def _parameters(self) -> Iterator[torch.Tensor]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def _owned(self) -> Iterator[torch.Tensor]:
        yield from self._parameters()
        for optimizer in self._optimizers:
            for slots in optimizer.state.values():
                yield from _tensors_in(slots)


def _places(these: list[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """(address, size in bytes) of each, of a DTensor's local tensor."""
    if not {type(one) for one in these} <= {torch.Tensor, torch.nn.Parameter}:
        these = [getattr(one, "_local_tensor", one) for one in these]
    return zip(map(torch.Tensor.data_ptr, these), map(attrgetter("nbytes"), these), strict=True)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
