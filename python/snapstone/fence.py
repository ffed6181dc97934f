"""Fences: until when a snapshot must be taken. On CUDA devices "when" is a place in a stream, and streams wait.

`"now"`: before `async_save` returns. `optimizer` (one or several): before its next step. Parameters and optimizer
state change only in a step, so they may be copied behind the next forward and backward pass; everything else in the
state (batch-norm statistics, RNG states, counters) is copied at the call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from . import _native, devices, state, tensors
from .errors import CudaError

__all__ = ["Fence", "Held", "OptimizerFence"]

Fence = Literal["now"] | torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


_Item = tuple[Any, Any, torch.Tensor]  # container, key or position, value
_SETTLED_TYPES = set(tensors.TENSOR_TYPES)
_data_ptr, _is_contiguous, _nbytes = torch.Tensor.data_ptr, torch.Tensor.is_contiguous, attrgetter("nbytes")


@dataclass(slots=True, eq=False)
class Held:
    """A snapshot that steps wait for: on the host until it is `enqueued`, in the current streams by `fence`, and not at
    all once it is `staged`.
    """

    enqueued: Future[None]
    staged: Future[None]
    fence: Callable[[], None]


# What each optimizer's next step waits for.
_held: WeakKeyDictionary[torch.optim.Optimizer, list[Held]] = WeakKeyDictionary()


def _forget_in_child() -> None:
    """The threads that stage did not come along into a forked process."""
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _hold(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for held in _held.get(optimizer, ()):
        if not held.staged.done():
            _wait(held.enqueued, "save/enqueued")
            try:
                held.fence()
            except CudaError:  # the streams do not wait, so the host does
                _wait(held.staged, "save/staged")


def _wait(future: Future[None], why: str) -> None:
    if not _native.fault_skipped("wait", why):
        wait_for_futures([future])


class OptimizerFence:
    """Waits for the snapshot in a pre-step hook of each optimizer."""

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
        for optimizer in optimizers:
            if any(group.get("capturable") for group in optimizer.param_groups):
                raise ValueError(
                    f"fence={type(optimizer).__name__}: with capturable=True its step may be replayed from a CUDA "
                    'graph, which calls no hooks, so that nothing would make it wait; use fence="now"'
                )
        return cls(optimizers)

    def attach(self, snapshot: Held) -> None:
        """From now on no optimizer of the fence steps before the snapshot. Its errors surface elsewhere."""
        for optimizer in self._optimizers:
            pending = [one for one in _held.get(optimizer, ()) if not one.staged.done()]
            if optimizer not in _held:
                # One hook for all saves, and for good: a hook must not go while the optimizer walks its hooks.
                optimizer.register_step_pre_hook(_hold)
            _held[optimizer] = [*pending, snapshot]

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
                    container[key] = devices.copy_of(value)
                return copied  # type: ignore[no-any-return]
        flattened = state.flatten(state_dict)
        owned = [*self._owned()]
        same = {id(tensor) for tensor in owned}
        known = _places(owned)
        found = _places([*flattened.tensors.values()])
        places = {place for place in known if place is not None}
        for (name, tensor), place in zip([*flattened.tensors.items()], found, strict=True):
            if id(tensor) not in same and place not in places:
                flattened.tensors[name] = devices.copy_of(tensor)
        return flattened

    def _not_parameters(self, rest: list[_Item]) -> list[_Item]:
        """Without the detached parameters that every state_dict() consists of: they are the parameters' memory."""
        if not rest:
            return rest
        owned = {place for place in _places([*self._parameters()]) if place is not None}
        places = _places([value for _, _, value in rest])
        return [item for item, place in zip(rest, places, strict=True) if place not in owned]

    def _parameters(self) -> Iterator[torch.Tensor]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def _owned(self) -> Iterator[torch.Tensor]:
        yield from self._parameters()
        for optimizer in self._optimizers:
            for slots in optimizer.state.values():
                yield from _tensors_in(slots)


def _places(these: list[torch.Tensor]) -> list[tuple[int, int] | None]:
    """(address, size in bytes) of each, of a DTensor's local tensor; None for what is not in one piece, and so may
    interleave with something else at the same address.
    """
    if not {type(one) for one in these} <= {torch.Tensor, torch.nn.Parameter}:
        these = [getattr(one, "_local_tensor", one) for one in these]
    try:
        found = zip(map(_data_ptr, these), map(_nbytes, these), map(_is_contiguous, these), strict=True)
        return [(at, nbytes) if whole else None for at, nbytes, whole in found]
    except (RuntimeError, TypeError, AttributeError):  # one without plain memory, which planning refuses by name
        return [_places([one])[0] for one in these] if len(these) > 1 else [None]


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
