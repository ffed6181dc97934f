"""Nested state <-> named leaves.

Invariants: names are DCP's; tensors are shared, never copied; what flatten took apart, finish and unflatten put back.
"""

from __future__ import annotations

import json
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from snapstone.errors import CorruptCheckpointError, IncompatibleCheckpointError
from snapstone.state import (
    Flattened,
    Key,
    LeafPath,
    assign,
    decode_path,
    encode_path,
    finish,
    finish_stateful,
    flatten,
    materialize_optimizer,
    unflatten,
)
from snapstone.values import MAX_DEPTH, decode, encode

Pair = namedtuple("Pair", "left right")


class Counter:
    """A Stateful that logs the order of its calls and may hold another one."""

    def __init__(self, log: list[str], name: str, inner: Any = None) -> None:
        self.log, self.name, self.inner, self.count = log, name, inner, 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count} | ({"inner": self.inner} if self.inner else {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.log.append(self.name)
        self.count = state_dict["count"]


def trained(make: Callable[[Any], torch.optim.Optimizer], steps: int = 2) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = make(model.parameters())
    for _ in range(steps):
        model(torch.rand(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def fill(target: Flattened, saved: Flattened) -> dict[str, Any]:
    """What a load does: tensors in place, objects through typed JSON."""
    assert target.tensors.keys() == saved.tensors.keys()
    with torch.no_grad():
        for name, tensor in target.tensors.items():
            tensor.copy_(saved.tensors[name])
    return {name: decode(json.loads(json.dumps(encode(value)))) for name, value in saved.objects.items()}


def test_names_agree_with_dcp() -> None:
    model, optimizer = trained(torch.optim.Adam)
    one = torch.ones(1)
    state = {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "rng": {"python": random.getstate(), "numpy": np.random.get_state()},
        "lists": [1, [2, 3], "x"],
        "deep": [[1, [one]], [[2], [3]], {"a": [[{}], [4]]}],
        "mapped": OrderedDict({5: {"x": 1}, "y": MappingProxyType({"z": one})}),
        "plain": (1, {"a": 2}),
        "none": None,
    }
    state["deep"][2]["a"][0][0]["filled"] = 1  # DCP drops empty mappings, which we keep
    expected, paths = flatten_state_dict(state)
    flat = flatten(state)
    assert list(flat.paths) == list(expected)
    assert [tuple(map(str, path)) for path in flat.paths.values()] == [tuple(map(str, p)) for p in paths.values()]
    for leaf in flat.leaves():
        assert leaf.value is expected[leaf.name] or leaf.value == expected[leaf.name]
        assert (leaf.name in flat.tensors) == isinstance(leaf.value, torch.Tensor)


def test_tensors_are_shared_and_subclasses_are_tensors() -> None:
    class Tagged(torch.Tensor):
        pass

    parameter, tagged = torch.nn.Parameter(torch.ones(2)), torch.ones(2).as_subclass(Tagged)
    flat = flatten({"a": [parameter], "b": {"c": tagged}})
    assert flat.tensors["a.0"] is parameter
    assert flat.tensors["b.c"] is tagged
    assert not flat.objects


def test_tuples_split_only_around_tensors_and_statefuls() -> None:
    one, log = torch.ones(1), []  # type: tuple[torch.Tensor, list[str]]
    state = {"t": (1, {"k": [one]}), "s": (2, [Counter(log, "c")]), "v": (1, {"k": [2]})}
    flat = flatten(state | {"r": (np.ones(2), 1), "l": [(one, 1)]})
    assert list(flat.paths) == ["t.0", "t.1.k.0", "s.0", "s.1.0.count", "v", "r", "l.0.0", "l.0.1"]
    assert flat.objects["v"] == (1, {"k": [2]})


def test_empty_containers_survive_a_round_trip() -> None:
    state = {"a": {}, "b": [], "c": {"d": {}, "e": [{}, []]}, "f": OrderedDict(), "g": (), "h": MappingProxyType({})}
    flat = flatten(state)
    loaded = {name: decode(encode(value)) for name, value in flat.objects.items()}
    assert unflatten(flat.paths, loaded) == state
    assert flatten({}).paths == {}


@pytest.mark.parametrize(
    ("state", "first", "second"),
    [
        ({"a.b": 1, "a": {"b": 2}}, "state['a.b']", "state['a']['b']"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "state['a.b']", "state['a']['b']"),
        ({"a": {1: 1, "1": 2}}, "state['a'][1]", "state['a']['1']"),
        ({"a": [torch.ones(1)], "a.0": np.ones(1)}, "state['a'][0]", "state['a.0']"),
    ],
)
def test_two_leaves_with_one_name_are_refused_naming_both_paths(state: Any, first: str, second: str) -> None:
    with pytest.raises(ValueError, match="rename one") as caught:
        flatten(state)
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_states_that_cannot_be_named_are_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises(ValueError, match="contains itself"):
        flatten(loop)
    with pytest.raises(ValueError, match="valid Unicode"):
        flatten({"\ud800": torch.ones(1)})
    with pytest.raises(TypeError, match="must be a mapping"):
        flatten(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_every_path_of_the_deepest_state_encodes_and_decodes() -> None:
    state: Any = torch.ones(1)
    for _ in range(MAX_DEPTH):
        state = {"k": state}
    (path,) = flatten(state).paths.values()
    assert decode_path(encode_path(path)) == path
    with pytest.raises(ValueError, match="levels deep"):
        flatten({"k": state})


def test_statefuls_are_replaced_at_any_depth_and_loaded_innermost_first() -> None:
    log: list[str] = []
    inner = Counter(log, "inner")
    outer = Counter(log, "outer", inner)
    last = SimpleNamespace(state_dict=lambda: {"x": 1}, load_state_dict=lambda state: log.append(f"last{state['x']}"))
    flat = flatten({"deep": [{"outer": outer}], "last": last, "type": {"cls": torch.nn.Linear}})
    assert list(flat.objects) == ["deep.0.outer.count", "deep.0.outer.inner.count", "last.x", "type.cls"]
    assert [item.path for item in flat.stateful] == [("deep", 0, "outer", "inner"), ("deep", 0, "outer"), ("last",)]
    finish_stateful(flat, {"deep.0.outer.count": 3, "deep.0.outer.inner.count": 4, "last.x": 5})
    assert log == ["inner", "outer", "last5"]
    assert (outer.count, inner.count) == (3, 4)


def test_modules_schedulers_and_generators_resume_exactly() -> None:
    def build(steps: int) -> dict[str, Any]:
        model, optimizer = trained(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), steps)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        return {"model": model, "optim": optimizer, "sched": scheduler, "rng": random.Random(steps).getstate()}

    saved, target = build(3), build(1)
    flat = flatten(target)
    finish(target, flat, fill(flat, flatten(saved)))
    assert target["rng"] == saved["rng"]
    assert target["sched"].last_epoch == 3
    assert target["optim"].param_groups[0]["lr"] == saved["optim"].param_groups[0]["lr"]
    for left, right in zip(target["model"].parameters(), saved["model"].parameters(), strict=True):
        assert torch.equal(left, right)
        momenta = (target["optim"].state[left], saved["optim"].state[right])
        assert torch.equal(*(state["momentum_buffer"] for state in momenta))


def test_values_the_target_does_not_have_yet_are_added_to_its_state_dict() -> None:
    seen: list[Any] = []
    fresh = SimpleNamespace(state_dict=lambda: {"it": None, "log": []}, load_state_dict=seen.append)
    flat = flatten({"data": fresh})
    saved = flatten({"data": {"it": {"pos": {3: 7}, "rows": [{"a": 1}, {"a": 2}]}, "log": []}, "other": 5})
    finish_stateful(flat, saved.objects)
    assert seen.pop() == {"it": None, "log": []}
    finish_stateful(flatten({"data": fresh}), saved.objects, saved.paths)
    assert seen.pop() == {"it": {"pos": {3: 7}, "rows": [{"a": 1}, {"a": 2}]}, "log": []}
    around = SimpleNamespace(state_dict=lambda: {"in": fresh}, load_state_dict=seen.append)
    finish_stateful(flatten({"data": around}), {"new": 1}, {"new": ("data", "in", "x")})
    assert seen == [{"it": None, "log": [], "x": 1}, {"in": fresh}]  # the innermost one takes it
    for hostile in (("data", "log", 10**9), ("data", 0), ("data", "log", "x")):
        with pytest.raises(IncompatibleCheckpointError, match="no place"):
            finish_stateful(flatten({"data": fresh}), {"evil": 1}, {"evil": hostile})


def test_assign_changes_dicts_and_lists_in_place_and_replaces_tuples() -> None:
    inner_list, inner_dict = [1, 2], {"x": 1}
    state: dict[str, Any] = {"l": inner_list, "d": inner_dict, "t": (1, [inner_dict, Pair(1, (2, 3))])}
    state |= {"m": MappingProxyType({"k": 1}), "i": {0: {"s": 1}}}
    whole = state["t"]
    assign(state, ("l", 1), 9)
    assign(state, ("d", "new"), 8)
    assign(state, ("t", 1, 1, 1, 0), 7)
    assign(state, ("m", "k"), 6)
    assign(state, ("i", Key(0), "s"), 5)
    assert state["l"] is inner_list
    assert state["d"] is inner_dict
    assert (inner_list, inner_dict) == ([1, 9], {"x": 1, "new": 8})
    assert state["t"] == (1, [inner_dict, Pair(1, (7, 3))])
    assert type(state["t"][1][1]) is Pair
    assert state["t"][1] is whole[1]
    assert state["m"] == {"k": 6}
    assert state["i"] == {0: {"s": 5}}


@pytest.mark.parametrize(
    "path", [("x", "y"), ("l", 2), ("l", "a"), ("n", "a"), ("l", 0, 0), ("mod", "weight"), (0,), ("l", -1)]
)
def test_assign_refuses_places_that_do_not_exist(path: LeafPath) -> None:
    state = {"l": [1, 2], "n": 5, "mod": torch.nn.Linear(1, 1)}
    with pytest.raises(LookupError, match="no 'x' on the way to" if path == ("x", "y") else "state"):
        assign(state, path, 1)
    assert state["l"] == [1, 2]


def test_numpy_arrays_are_tensors_of_the_same_memory_and_come_back_in_place() -> None:
    def build(value: float) -> dict[str, Any]:
        plain = np.full((2, 3), value, np.float32)
        frozen = np.full(3, value)
        frozen.flags.writeable = False
        return {
            "plain": plain,
            "view": np.full((4, 4), value)[::2, 1:3],
            "reversed": (np.arange(4.0) * value)[::-1],
            "swapped": np.full(3, value, ">f8"),
            "frozen": frozen,
            "field": np.full(3, 0, "f4,u1")["f0"],
            "in_stateful": Holder(value),
            "text": np.array(["a" if value else "b"]),
            "tuple": (torch.ones(1), np.full(2, value)),
        }

    class Holder:
        def __init__(self, value: float) -> None:
            self.state = {"a": np.full(2, value), "b": MappingProxyType({"c": np.full(2, value)[::-1]})}
            self.state["b"]["c"].flags.writeable = False

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.state = state_dict

    saved, target = build(3.0), build(0.0)
    before, frozen = dict(target), target["frozen"].copy()
    flat, saved_flat = flatten(target), flatten(saved)
    assert np.shares_memory(flat.tensors["plain"].numpy(), target["plain"])
    assert np.shares_memory(flat.tensors["view"].numpy(), target["view"])
    assert {"text"} == set(flat.objects)
    assert flat.arrays.keys() == flat.tensors.keys() - {"tuple.0"}
    finish(target, flat, fill(flat, saved_flat))
    for name in ("plain", "view", "reversed", "swapped", "frozen", "field", "text"):
        assert np.array_equal(target[name], saved[name])
        assert target[name].dtype == saved[name].dtype
        assert (target[name] is before[name]) == (name not in ("frozen", "text"))
    assert np.array_equal(before["frozen"], frozen)  # read-only memory stays as it was
    assert np.array_equal(target["tuple"][1], saved["tuple"][1])
    assert np.array_equal(target["in_stateful"].state["a"], [3, 3])
    assert np.array_equal(target["in_stateful"].state["b"]["c"], [3, 3])


def test_arrays_without_typed_json_are_refused_by_name() -> None:
    for array in (np.array([{}]), np.ma.masked_array([1], [True]), np.zeros(1, "i4,i4")):
        flat = flatten({"a": {"b": array}})
        with pytest.raises(TypeError, match=r"^a\.b: "):
            encode(flat.objects["a.b"], name="a.b")


def test_unflatten_rebuilds_what_flatten_took_apart() -> None:
    one = torch.ones(1)
    state = {
        "model": {"layer.weight": one, "deep": [[one, {"a": None}], [one]]},
        "optim": {"state": {0: {"step": one}, 10: {"step": one}}, "groups": [{"params": [0, 10], (1, "k"): 2.5}]},
        "empty": [{}, {"b": []}],
        "t": (1, 2),
    }
    flat = flatten(state)
    values = dict(reversed([*flat.tensors.items(), *flat.objects.items()]))
    paths = {name: decode_path(json.loads(json.dumps(encode_path(path)))) for name, path in flat.paths.items()}
    back = unflatten(paths, values)
    assert back == state
    assert list(back) == list(state)
    del values["model.deep.0.0"], values["t"]
    partial = unflatten(paths, values)
    assert partial["model"]["deep"] == [[None, {"a": None}], [one]]
    assert "t" not in partial


@pytest.mark.parametrize(
    "paths",
    [
        [("a",), ("a", "b")],
        [("a", "b"), ("a",)],
        [("a", "b"), ("a", 0)],
        [("a", 0), ("a", "b")],
        [("a", 0), ("a", 0)],
        [("a", 1)],
        [("a", 0), ("a", 2)],
        [("a", 10**12)],
        [("a", -1)],
        [(0,)],
        [()],
        [("a",) * (MAX_DEPTH + 1)],
        [("a", Key(1)), ("a", Key(True))],
    ],
)
def test_unflatten_refuses_paths_that_no_state_has(paths: list[LeafPath]) -> None:
    named = {f"n{index}": path for index, path in enumerate(paths)}
    with pytest.raises(CorruptCheckpointError):
        unflatten(named, dict.fromkeys(named, 1))


def test_unflatten_cannot_be_made_to_build_many_large_lists() -> None:
    count = 2000
    paths: dict[str, LeafPath] = {f"n{index}": (f"k{index}", count) for index in range(count)}
    paths["unused"] = ("x",)
    with pytest.raises(CorruptCheckpointError, match="list"):
        unflatten(paths, {name: 1 for name in paths if name != "unused"})
    with pytest.raises(CorruptCheckpointError, match="contradict"):  # also where a leaf is left out
        unflatten({"a": ("x", -1), "unused": ("z",)}, {"a": 1})
    with pytest.raises(CorruptCheckpointError, match="without a path"):
        unflatten({}, {"a": 1})


@pytest.mark.parametrize(
    "path", [("a", 0, "b.c", ""), (Key(0), Key(True), Key(None), Key(2.5), Key(b"x"), Key((1, ("a", None))), "0")]
)
def test_paths_keep_the_type_of_every_key_through_json(path: LeafPath) -> None:
    back = decode_path(json.loads(json.dumps(encode_path(path))))
    assert back == path
    assert [repr(item) for item in back] == [repr(item) for item in path]


@pytest.mark.parametrize(
    "encoded",
    [
        *(None, {}, "a", [], [None], [True], [1.5], [-1], [[]], [{}], [{"$key": 1, "x": 2}], [{"key": 1}]),
        *([{"$key": [10**5000]}], [{"$key": {"$int": "0x" + "f" * 9999}}]),
        *([{"$key": "a"}], [{"$key": [1]}], [{"$key": {"$tuple": [[1]]}}], [{"$key": {"$evil": 1}}], ["a"] * 1000),
    ],
)
def test_hostile_paths_are_corrupt(encoded: Any) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode_path(encoded)


def test_endless_nesting_of_a_path_is_corrupt_and_never_a_recursion_error() -> None:
    nested: Any = 1
    for _ in range(100_000):
        nested = [nested]
    for encoded in (nested, [{"$key": nested}], [{"$key": {"$tuple": nested}}]):
        with pytest.raises(CorruptCheckpointError):
            decode_path(encoded)


def test_keys_without_typed_json_are_refused_by_name() -> None:
    (path,) = flatten({"a": {torch.float32: torch.ones(1)}}).paths.values()
    with pytest.raises(TypeError, match="dtype as a mapping key"):
        encode_path(path)


def saved_shapes(flat: Flattened) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(tensor.dtype)[6:], tuple(tensor.shape)) for name, tensor in flat.tensors.items()}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.01), foreach=False),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "SGD plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters),
    "groups": lambda parameters: torch.optim.Adam([{"params": [p], "lr": 0.1} for p in parameters]),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_optimizer_that_never_stepped_resumes_exactly(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model, optimizer = trained(make, steps=3)
    saved = flatten({"nested": {"optim": optimizer}})
    fresh_model, fresh = trained(make, steps=0)
    fresh_model.load_state_dict(model.state_dict())
    materialize_optimizer(fresh, saved_shapes(saved), "nested.optim")
    state = {"nested": {"optim": fresh}}
    target = flatten(state)
    finish(state, target, fill(target, saved))
    assert str(fresh.state_dict()) == str(optimizer.state_dict())
    for trainee, opt in ((model, optimizer), (fresh_model, fresh)):
        trainee(torch.ones(5, 4)).square().sum().backward()
        opt.step()
    for left, right in zip(model.parameters(), fresh_model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_materialized_state_has_the_saved_dtype_and_existing_state_stays() -> None:
    _, optimizer = trained(torch.optim.Adam, steps=1)
    parameter = optimizer.param_groups[0]["params"][0]
    before = optimizer.state[parameter]["exp_avg"]
    saved = {
        "state.0.exp_avg": ("float32", (3, 4)),
        "state.0.master": ("bfloat16", (3, 4)),
        "state.0.scale": ("float64", ()),
        "state.99.exp_avg": ("float32", (3, 4)),
        "state.x.exp_avg": ("float32", (3, 4)),
        "state.0": ("float32", ()),
        "other.0.exp_avg": ("float32", ()),
        f"state.{'9' * 5000}.a": ("float32", ()),
    }
    materialize_optimizer(optimizer, saved, "")
    entry = optimizer.state[parameter]
    assert entry["exp_avg"] is before
    assert (entry["master"].dtype, entry["scale"].dtype) == (torch.bfloat16, torch.float64)
    assert not entry["master"].any()
    assert len(optimizer.state) == 4
    with pytest.raises(IncompatibleCheckpointError, match="float3"):
        materialize_optimizer(optimizer, {"state.0.new": ("float3", ())}, "")


def test_nested_optimizer_state_needs_the_saved_paths() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    old = torch.optim.LBFGS([parameter], max_iter=3)

    def closure() -> torch.Tensor:
        old.zero_grad()
        loss = (parameter - 2).pow(4).sum()
        loss.backward()
        return loss

    old.step(closure)
    old.state[parameter]["gaps"] = [None, torch.ones(1), None]
    saved = flatten({"optim": old})
    assert "optim.state.0.old_dirs.0" in saved.tensors
    fresh = torch.optim.LBFGS([torch.nn.Parameter(torch.ones(3))], max_iter=3)
    materialize_optimizer(fresh, saved_shapes(saved), "optim", saved_paths=saved.paths)
    target = flatten({"optim": fresh})
    finish_stateful(target, fill(target, saved), saved.paths)
    resumed, expected = fresh.state_dict()["state"][0], old.state_dict()["state"][0]
    assert resumed.keys() == expected.keys()
    assert all(str(resumed[key]) == str(expected[key]) for key in expected)


@pytest.fixture
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_materialized_state_of_a_dtensor_keeps_its_placement() -> None:
    mesh = init_device_mesh("cpu", (1,))

    def build(value: float, steps: int) -> torch.optim.Optimizer:
        parameter = torch.nn.Parameter(distribute_tensor(torch.full((4, 2), value), mesh, [Shard(0)]))
        optimizer = torch.optim.AdamW([parameter])
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return optimizer

    old, fresh = build(1.0, 2), build(1.0, 0)
    saved = flatten({"optim": old})
    materialize_optimizer(fresh, saved_shapes(saved), "optim")
    target = flatten({"optim": fresh})
    moment = target.tensors["optim.state.0.exp_avg"]
    assert isinstance(moment, DTensor)
    assert moment.placements == (Shard(0),)
    assert type(target.tensors["optim.state.0.step"]) is torch.Tensor
    finish_stateful(target, fill(target, saved))
    state = fresh.state_dict()["state"][0]
    assert state["step"] == 2
    assert torch.equal(state["exp_avg"].full_tensor(), old.state_dict()["state"][0]["exp_avg"].full_tensor())
