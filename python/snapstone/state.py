"""A nested state as named leaves, and back.

A leaf is named by its path joined with dots, as torch.distributed.checkpoint does, so that names agree with its
checkpoints. Mappings always split. A list splits when it holds a tensor, an array, a mapping, a Stateful or a list that
splits. Unlike DCP, a tuple splits too when a tensor or Stateful is anywhere inside it; other tuples are one value. An
empty container is a value. An object with callable `state_dict` and `load_state_dict` stands for its state_dict, at any
depth.

A path holds a str for each str key, an int for each list or tuple index, and a `Key` for each other mapping key: the
state {"state": {0: {"step": t}}} has the leaf "state.0.step" with the path ("state", Key(0), "step").

Ownership: tensors are the caller's own, never copied. numpy arrays become tensors that share their memory where torch
           can (`Flattened.arrays` remembers them); read-only, reversed and byte-swapped ones become tensors of a copy,
           which `finish` writes back.
Threads:   none of this is synchronised; the state must not change while it is walked.
Failure:   ValueError names both paths of two leaves with one name. `decode_path` and `unflatten` take hostile input and
           raise CorruptCheckpointError.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from .errors import CorruptCheckpointError, IncompatibleCheckpointError
from .values import MAX_DEPTH, Json, decode, dtype_named, encode, show

__all__ = ["Flattened", "Key", "Leaf", "LeafPath", "StatefulItem", "assign", "decode_path", "encode_path", "finish"]
__all__ += ["finish_stateful", "flatten", "materialize_optimizer", "unflatten"]


@dataclass(frozen=True, slots=True)
class Key:
    """A mapping key that is not a str. In JSON: {"$key": typed JSON}, for None, bool, int, float, bytes, tuples."""

    value: Hashable

    def __str__(self) -> str:
        return str(self.value)


PathItem: TypeAlias = str | int | Key
LeafPath: TypeAlias = tuple[PathItem, ...]
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One named value: a tensor, or a Python value for typed JSON."""

    name: str
    path: LeafPath
    value: Any


@dataclass(slots=True, eq=False)
class StatefulItem:
    """A Stateful found at `path`, and the state_dict it gave when the state was flattened."""

    path: LeafPath
    target: Any
    state_dict: Any


@dataclass(slots=True)
class Flattened:
    """The leaves of one state, in the order of the walk."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, LeafPath] = field(default_factory=dict)  # of both
    stateful: list[StatefulItem] = field(default_factory=list)  # inner ones before those that contain them
    arrays: dict[str, Array] = field(default_factory=dict)  # the numpy arrays among the tensors
    owners: dict[str, StatefulItem] = field(default_factory=dict)  # of objects and arrays inside a Stateful, innermost

    def leaves(self) -> Iterator[Leaf]:
        for name, path in self.paths.items():
            yield Leaf(name, path, self.tensors[name] if name in self.tensors else self.objects[name])


# ---- flatten ---------------------------------------------------------------------------------------------------------

# What a type is. OTHER may still be Stateful by attributes of the instance.
_VALUE, _TENSOR, _ARRAY, _MAPPING, _LIST, _TUPLE, _STATEFUL, _OTHER = range(1, 9)

_KINDS: dict[type, int] = {
    **dict.fromkeys((type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device), _VALUE),
    torch.Tensor: _TENSOR,
    torch.nn.Parameter: _TENSOR,
    np.ndarray: _ARRAY,
    np.memmap: _ARRAY,
    dict: _MAPPING,
    list: _LIST,
    tuple: _TUPLE,
}


def _is_stateful(thing: object) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def _kind_of_type(kind: type) -> int:
    if issubclass(kind, torch.Tensor):
        return _TENSOR
    if _is_stateful(kind):
        return _STATEFUL
    for base, answer in ((Mapping, _MAPPING), (list, _LIST), (tuple, _TUPLE)):
        if issubclass(kind, base):
            return answer
    return _OTHER


class _Walk:
    def __init__(self) -> None:
        self.out = Flattened()
        self.owner: StatefulItem | None = None
        self.kinds = dict(_KINDS)  # one dict lookup per leaf instead of a chain of isinstance on ABCs

    def kind_of(self, value: object) -> int:
        kind = self.kinds.get(type(value))
        if kind is None:
            kind = self.kinds[type(value)] = _kind_of_type(type(value))
        if kind == _OTHER and not isinstance(value, type) and _is_stateful(value):
            return _STATEFUL
        return kind

    def mapping(self, value: Mapping[Any, Any], prefix: str, path: LeafPath) -> None:
        kinds, paths, tensors = self.kinds, self.out.paths, self.out.tensors
        for key, item in value.items():
            part: PathItem = key if type(key) is str else _path_item(key)
            name = prefix + (key if type(key) is str else str(part))
            item_path = (*path, part)
            if kinds.get(type(item)) == _TENSOR:  # the common case, without a call
                if name in paths or not name.isascii():
                    self.check(name, item_path)
                paths[name] = item_path
                tensors[name] = item
            else:
                self.visit(item, name, item_path)

    def visit(self, value: Any, name: str, path: LeafPath) -> None:
        kind = self.kind_of(value)
        if len(path) >= MAX_DEPTH and kind in (_MAPPING, _LIST, _TUPLE):
            raise ValueError(f"{_show_path(path)[:200]}: nested more than {MAX_DEPTH} levels deep, or contains itself")
        if kind == _TENSOR:
            self.record(self.out.tensors, value, name, path)
        elif kind == _ARRAY and (tensor := _tensor_of(value)) is not None:
            self.record(self.out.tensors, tensor, name, path)
            self.record_owner(name)
            self.out.arrays[name] = value
        elif kind == _STATEFUL:
            self.stateful(value, name, path)
        elif kind == _MAPPING and value:
            self.mapping(value, name + ".", path)
        elif (kind == _LIST and self.list_splits(value)) or (kind == _TUPLE and self.holds_tensor(value)):
            for index, item in enumerate(value):
                self.visit(item, f"{name}.{index}", (*path, index))
        else:  # also arrays of text and times: small ones have typed JSON, and its encoder refuses the rest by name
            self.record(self.out.objects, {} if kind == _MAPPING else value, name, path)
            self.record_owner(name)

    def record(self, leaves: dict[str, Any], value: Any, name: str, path: LeafPath) -> None:
        self.check(name, path)
        self.out.paths[name] = path
        leaves[name] = value

    def record_owner(self, name: str) -> None:
        if self.owner is not None:
            self.out.owners[name] = self.owner

    def check(self, name: str, path: LeafPath) -> None:
        if name in self.out.paths:
            first, second = _show_path(self.out.paths[name]), _show_path(path)
            raise ValueError(f"two entries of the state are both named {name!r}: {first} and {second}; rename one")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{_show_path(path)}: the name {name!r} is not valid Unicode") from None

    def stateful(self, target: Any, name: str, path: LeafPath) -> None:
        item = StatefulItem(path, target, target.state_dict())
        outer, self.owner = self.owner, item
        self.visit(item.state_dict, name, path)
        self.owner = outer
        self.out.stateful.append(item)

    def all_plain(self, items: Iterable[Any]) -> bool:
        return all(self.kinds.get(kind) == _VALUE for kind in set(map(type, items)))

    def list_splits(self, items: Sequence[Any], depth: int = 0) -> bool:
        if self.all_plain(items):
            return False
        for item in items:
            kind = self.kind_of(item)
            if kind in (_TENSOR, _ARRAY, _MAPPING, _STATEFUL):
                return True
            if depth < MAX_DEPTH and kind == _LIST and self.list_splits(item, depth + 1):
                return True
            if kind == _TUPLE and self.holds_tensor(item, depth + 1):
                return True
        return False

    def holds_tensor(self, value: Any, depth: int = 0) -> bool:
        items = value.values() if isinstance(value, Mapping) else value
        if self.all_plain(items):
            return False
        for item in items:
            kind = self.kind_of(item)
            if kind in (_TENSOR, _STATEFUL):
                return True
            if depth < MAX_DEPTH and kind in (_MAPPING, _LIST, _TUPLE) and self.holds_tensor(item, depth + 1):
                return True
        return False


def flatten(state: Mapping[str, Any]) -> Flattened:
    """Returns the leaves of `state`; calls `state_dict()` on every Stateful in it."""
    if not isinstance(state, Mapping):
        raise TypeError(f"the state must be a mapping, not a {type(state).__name__}; pass {{'name': it}}")
    walk = _Walk()
    try:
        walk.mapping(state, "", ())
    except RecursionError:
        raise ValueError(f"the state is nested more than {MAX_DEPTH} levels deep, or contains itself") from None
    return walk.out


def _path_item(key: Any) -> str | Key:
    return str(key) if isinstance(key, str) and str(key) == key else Key(key)


def _show_path(path: LeafPath) -> str:
    return "state" + "".join(f"[{item.value if isinstance(item, Key) else item!r}]" for item in path)


def _tensor_of(array: Array) -> torch.Tensor | None:
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > 16 or array.dtype.char in "gG":
        return None
    steps_fit = all(stride >= 0 and stride % array.dtype.itemsize == 0 for stride in array.strides)
    if steps_fit and array.dtype.isnative and array.flags.writeable:
        return torch.from_numpy(array)
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C", subok=False))


# ---- paths in JSON ---------------------------------------------------------------------------------------------------

_KEY_TYPES = (type(None), bool, int, float, bytes, str, tuple)


def _is_key(value: object) -> bool:
    if type(value) is tuple:
        return all(_is_key(item) for item in value)
    return type(value) in _KEY_TYPES and (type(value) is not int or value.bit_length() <= 4096)  # str() has limits


def encode_path(path: LeafPath) -> list[Json]:
    """Returns `path` as JSON; TypeError names a key that has none."""
    encoded: list[Json] = []
    for item in path:
        if not isinstance(item, Key):
            encoded.append(item)
        elif _is_key(item.value):
            encoded.append({"$key": encode(item.value)})
        else:
            kind = type(item.value).__name__
            raise TypeError(f"{_show_path(path)}: a {kind} as a mapping key cannot be stored; use a str or an int")
    return encoded


def decode_path(encoded: object) -> LeafPath:
    """The inverse of `encode_path`, for hostile input: CorruptCheckpointError for anything it cannot have written."""
    if type(encoded) is not list or not 0 < len(encoded) <= MAX_DEPTH:
        raise CorruptCheckpointError(f"invalid path {show(encoded)}")
    path: list[PathItem] = []
    for item in encoded:
        if type(item) is str or (type(item) is int and item >= 0):
            path.append(item)
            continue
        key = decode(item["$key"], name="key") if type(item) is dict and item.keys() == {"$key"} else ""
        if type(key) is str or not _is_key(key):
            raise CorruptCheckpointError(f"invalid item {show(item)} in a path")
        path.append(Key(key))
    return tuple(path)


# ---- back into a state -----------------------------------------------------------------------------------------------


def assign(state: MutableMapping[str, Any], path: LeafPath, value: Any) -> None:
    """Puts `value` at `path` of the caller's state.

    Dicts and lists change in place; tuples and read-only mappings are replaced in what holds them. Only the last item
    of the path may be new, and only in a mapping; KeyError or IndexError otherwise.
    """
    _placed(state, path, value, grow=False)  # which is `state` itself, changed


def finish(
    state: MutableMapping[str, Any],
    flattened: Flattened,
    loaded_objects: Mapping[str, Any],
    saved_paths: Mapping[str, LeafPath] | None = None,
) -> None:
    """Completes a load whose tensors were filled in place: values, arrays, then every Stateful."""
    for name, value in _to_place(flattened, loaded_objects, owned=False):
        assign(state, flattened.paths[name], value)
    finish_stateful(flattened, loaded_objects, saved_paths)


def finish_stateful(
    flattened: Flattened, loaded_objects: Mapping[str, Any], saved_paths: Mapping[str, LeafPath] | None = None
) -> None:
    """Gives every Stateful its state_dict with the loaded objects put in; the innermost first, siblings in their order.

    With `saved_paths`, values that the target's state_dict does not have yet (a data loader that has not started) are
    added to that of the innermost Stateful around them; without, they are ignored.
    """
    for name, value in _to_place(flattened, loaded_objects, owned=True):
        item = flattened.owners[name]
        item.state_dict = _placed(item.state_dict, flattened.paths[name][len(item.path) :], value, grow=False)
    for name, path in (saved_paths or {}).items():
        if name not in loaded_objects or name in flattened.paths:
            continue
        around = [item for item in flattened.stateful if path[: len(item.path)] == item.path]
        if around:
            item = max(around, key=lambda found: len(found.path))
            item.state_dict = _grown(item.state_dict, path[len(item.path) :], loaded_objects[name], name)
    for item in flattened.stateful:
        item.target.load_state_dict(item.state_dict)


def _to_place(flattened: Flattened, loaded: Mapping[str, Any], *, owned: bool) -> Iterator[tuple[str, Any]]:
    """The loaded values, and arrays in place of read-only ones; other arrays are filled here if they are not yet."""
    for name in flattened.paths:
        if (name in flattened.owners) != owned:
            continue
        if name in flattened.objects and name in loaded:
            yield name, loaded[name]
        elif name in flattened.arrays:
            array, tensor = flattened.arrays[name], flattened.tensors[name].numpy()
            if not array.flags.writeable:
                yield name, tensor.astype(array.dtype)
            elif not np.may_share_memory(array, tensor):
                np.copyto(array, tensor)


def _placed(container: Any, path: LeafPath, value: Any, grow: bool) -> Any:
    """What holds `value` at `path`: `container` itself, changed in place, or a copy where it cannot be changed."""
    if not path:
        return value
    item, rest = path[0], path[1:]
    if grow and not isinstance(container, (Mapping, list, tuple)):
        container = [] if isinstance(item, int) else {}
    if isinstance(container, Mapping) and not isinstance(item, int):
        key = item.value if isinstance(item, Key) else item
        if rest and not grow and key not in container:
            raise KeyError(f"the state has no {key!r} on the way to {_show_path(path)}")
        child = _placed(container.get(key), rest, value, grow)
        if not isinstance(container, MutableMapping):
            return {**container, key: child}
        container[key] = child
        return container
    if isinstance(container, (list, tuple)) and isinstance(item, int):
        if not 0 <= item < len(container) + grow:
            raise IndexError(f"no item {item} in a {type(container).__name__} of {len(container)} of the state")
        items = container if isinstance(container, list) else list(container)
        items[item : item + 1] = [_placed(items[item] if item < len(items) else None, rest, value, grow)]
        if items is container:
            return items
        make: Callable[[list[Any]], Any] = getattr(type(container), "_make", type(container))  # _make: of a namedtuple
        return make(items)
    raise KeyError(f"a {type(container).__name__} of the state cannot take {_show_path(path)[5:]}")


def _grown(container: Any, path: LeafPath, value: Any, name: str) -> Any:
    try:
        return _placed(container, path, value, grow=True)
    except LookupError as error:
        raise IncompatibleCheckpointError(f"{name} has no place in the state given: {error}") from None


# ---- without a target ------------------------------------------------------------------------------------------------


class _Node(dict[Any, Any]):
    """A container under construction; lists are kept sparse, so that a hostile index costs nothing."""

    __slots__ = ("is_list",)

    def __init__(self, is_list: bool) -> None:
        super().__init__()
        self.is_list = is_list


def unflatten(paths: Mapping[str, LeafPath], values: Mapping[str, Any]) -> dict[Any, Any]:
    """Rebuilds nested dicts and lists (tuples come back as lists) from leaves, in the order of `paths`.

    `values` may lack some leaves: those are left out of dicts, and are None in lists. CorruptCheckpointError for paths
    that no state has: values inside values, lists that are also dicts, gaps or indices beyond the number of leaves.
    """
    if not values.keys() <= paths.keys():
        raise CorruptCheckpointError("a value without a path", tensor=min(values.keys() - paths.keys()))
    root = _Node(is_list=False)
    for name in paths:
        if name in values:
            _insert(root, paths[name], values[name], name)
    # Every slot of an honest list belongs to an item of some leaf's path, which bounds all lists together.
    slots_left = sum(len(path) for path in paths.values())
    complete = len(values) == len(paths)

    def built(node: Any) -> Any:
        nonlocal slots_left
        if type(node) is not _Node:
            return node
        if not node.is_list:
            return {key: built(child) for key, child in node.items()}
        count = max(node) + 1
        slots_left -= count
        if slots_left < 0 or (complete and count != len(node)):
            raise CorruptCheckpointError(f"a list with item {count - 1} but only {len(node)} items")
        return [built(node.get(index)) for index in range(count)]

    return cast(dict[Any, Any], built(root))  # no deeper than `_insert` lets it be: MAX_DEPTH


def _insert(root: _Node, path: LeafPath, value: Any, name: str) -> None:
    if not 0 < len(path) <= MAX_DEPTH:
        raise CorruptCheckpointError(f"a path of {len(path)} items", tensor=name)
    node = root
    for depth, item in enumerate(path):
        if type(node) is not _Node or node.is_list != isinstance(item, int) or (isinstance(item, int) and item < 0):
            raise CorruptCheckpointError("leaves of one place that contradict each other", tensor=name)
        key = item.value if isinstance(item, Key) else item
        if depth + 1 < len(path):
            if key not in node:
                node[key] = _Node(is_list=isinstance(path[depth + 1], int))
            node = node[key]
        elif key in node:
            raise CorruptCheckpointError("two leaves at one place", tensor=name)
        else:
            node[key] = value


# ---- optimizers ------------------------------------------------------------------------------------------------------


def materialize_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, tuple[str, Sequence[int]]],
    prefix: str,
    *,
    saved_paths: Mapping[str, LeafPath] | None = None,
) -> None:
    """Creates the state that `saved` has under `prefix` and the optimizer has not built yet, so that it can be loaded.

    `saved` maps names ("optim.state.0.exp_avg") to dtype name and global shape; the number is the index of
    `optimizer.state_dict()`. State of the parameter's global shape gets its device, layout and DTensor placement; other
    state is a plain tensor, a scalar one on the CPU unless the group is capturable or fused, as torch.optim keeps it.
    All is zero, which is what optimizers start from, so that a load that fails halfway leaves no garbage. Names that
    fit no parameter are left alone: comparing names is the load's task. `saved_paths` is needed where state nests.
    """
    slots: list[tuple[torch.Tensor, bool]] = []  # by the index of state_dict(), which counts duplicates too
    for group in optimizer.param_groups:
        on_device = bool(group.get("capturable") or group.get("fused"))
        slots += [(param, on_device) for param in group["params"]]
    head = f"{prefix}.state." if prefix else "state."
    existing = flatten(optimizer.state_dict()).paths
    for name in saved_paths or saved:
        index, _, key = name.removeprefix(head).partition(".")
        fits = name.startswith(head) and key and index.isdecimal() and len(index) < 10 and int(index) < len(slots)
        if not fits or f"state.{index}.{key}" in existing:
            continue
        param, on_device = slots[int(index)]
        tail = _tail((saved_paths or {}).get(name, ()), head + index) or (key,)
        zeros: torch.Tensor | None = None
        if name in saved:
            dtype, shape = dtype_named(saved[name][0]), tuple(saved[name][1])
            if shape == tuple(param.shape):
                zeros = torch.zeros_like(param.detach(), dtype=dtype)
            else:
                zeros = torch.zeros(shape, dtype=dtype, device=param.device if shape or on_device else "cpu")
        elif not any(isinstance(item, int) for item in tail):
            continue  # a plain value needs no place made, except that in a list it holds its slot
        _grown(optimizer.state[param], tail, zeros, name)


def _tail(path: LeafPath, head: str) -> LeafPath:
    heads = (".".join(map(str, path[:count])) for count in range(1, len(path)))
    return next((path[count:] for count, text in enumerate(heads, 1) if text == head), ())
