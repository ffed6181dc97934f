"""Nested states, modules and tied weights come back as they were; a state that does not fit is refused whole."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import snapstone as ss
from roundtrip.bits import assert_same, bits_of, nested_equal, random_bits

Pair = namedtuple("Pair", "left right")


class Counter:
    """A Stateful that is neither a module nor an optimizer."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.history = torch.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "history": self.history, "nested": {"twice": [2 * self.count]}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.count = state_dict["count"]
        self.history = state_dict["history"]
        self.twice = state_dict["nested"]["twice"]


def save(state: Any, path: Path, **options: Any) -> ss.Checkpoint:
    return ss.save(state, checkpoint_id=path / "c", **options)


def load(state: Any, path: Path, **options: Any) -> ss.Checkpoint:
    return ss.load(state, checkpoint_id=path / "c", **options)


def nested(fill: float) -> dict[str, Any]:
    return {
        "dict": {"a": {"b": {"c": torch.full((3,), fill)}}, "empty": {}},
        "list": [torch.full((2,), fill), [torch.full((1,), fill), int(fill)], [], "text"],
        "tuple": (torch.full((2, 2), fill), {"inside": torch.full((), fill)}, fill),
        "pair": Pair(torch.full((4,), fill), 1),
        "plain_tuple": (1, fill, "x"),
        "ordered": OrderedDict(z=torch.full((1,), fill), a=fill),
        0: torch.full((3,), fill),
        1: {2: torch.full((1,), fill), -3: fill, None: "none"},
        "dots.in.name": torch.full((2,), fill),
        "ünïcode": torch.full((2,), fill),
        "array": np.full((3, 2), fill, np.float32),
        "scalar": np.float64(fill),
        "empty_tensor": torch.empty(0, 3),
        "values": [1, 2.5, None, True],
    }


def test_a_nested_state_comes_back_in_place(tmp_path: Path) -> None:
    save(nested(3.0), tmp_path)
    target = nested(0.0)
    leaf, pair, array = target["dict"]["a"]["b"]["c"], target["pair"], target["array"]
    load(target, tmp_path)
    wanted = nested(3.0)
    assert np.array_equal(target.pop("array"), wanted.pop("array"))
    assert nested_equal(target, wanted)
    assert leaf.tolist() == [3.0] * 3
    assert target["dict"]["a"]["b"]["c"] is leaf
    assert array.tolist() == [[3.0, 3.0]] * 3
    assert type(target["pair"]) is Pair
    assert target["pair"].left is pair.left


def test_state_dict_rebuilds_what_was_saved(tmp_path: Path) -> None:
    save(nested(3.0), tmp_path)
    rebuilt = ss.Checkpoint.open(tmp_path / "c").state_dict()
    wanted = nested(3.0)
    assert rebuilt.keys() == wanted.keys()
    assert rebuilt["array"].numpy().tolist() == wanted["array"].tolist()
    for name in ("dict", "list", 0, 1, "dots.in.name", "ünïcode", "values", "plain_tuple", "empty_tensor"):
        assert nested_equal(rebuilt[name], wanted[name]), name
    assert nested_equal(rebuilt["tuple"], list(wanted["tuple"]))


@pytest.mark.parametrize("state", [{}, {"a": {}}, {"a": [], "b": ()}, {"a": torch.empty(0)}, {"step": 3}], ids=str)
def test_states_without_bytes(tmp_path: Path, state: dict[str, Any]) -> None:
    saved = save(state, tmp_path)
    assert saved.nbytes == 0
    load(state, tmp_path)
    assert nested_equal(ss.Checkpoint.open(tmp_path / "c").state_dict(), state)
    assert ss.verify(tmp_path / "c")


def test_many_small_tensors_and_a_few_large_ones(tmp_path: Path) -> None:
    state: dict[str, Any] = {f"small.{i}": random_bits(torch.uint8, i % 300, seed=i) for i in range(2000)}
    state |= {f"large.{i}": random_bits(torch.uint8, (1 << 20) * i + i - 1, seed=i) for i in range(1, 4)}
    state |= {f"edge.{size}": random_bits(torch.uint8, size) for size in (65535, 65536, 65537, 4095, 4096, 4097)}
    save(state, tmp_path)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    checkpoint = load(target, tmp_path)
    for name, tensor in state.items():
        assert_same(target[name], tensor, name)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in state.values())
    assert ss.verify(tmp_path / "c")


def test_a_stateful_gets_its_load_state_dict_called(tmp_path: Path) -> None:
    counter = Counter(7)
    counter.history = torch.arange(3.0)
    save({"loop": counter, "deep": [{"inner": counter}]}, tmp_path)
    fresh = [Counter(), Counter()]
    for one in fresh:
        one.history = torch.zeros(3)
    load({"loop": fresh[0], "deep": [{"inner": fresh[1]}]}, tmp_path)
    for one in fresh:
        assert (one.count, one.twice, one.history.tolist()) == (7, [14], [0.0, 1.0, 2.0])


class Loader:
    """A Stateful that knows nothing before it starts, such as a data loader."""

    def __init__(self, started: dict[str, Any] | None = None) -> None:
        self.started = started

    def state_dict(self) -> dict[str, Any]:
        return dict(self.started or {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.started = dict(state_dict)


def test_a_stateful_that_has_not_started_gets_the_values_saved(tmp_path: Path) -> None:
    started = {"epoch": 3, "cursor": {"file": "a", "row": 17}, "seen": [1, 2]}
    save({"data": {"loader": Loader(started)}}, tmp_path)
    fresh = Loader()
    checkpoint = load({"data": {"loader": fresh}}, tmp_path)
    assert fresh.started == started
    assert list(checkpoint.unexpected_keys) == []


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2, dtype=torch.float64))


def test_a_module_with_buffers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = network()
    module[:2](torch.randn(16, 5))
    save({"model": module}, tmp_path)
    torch.manual_seed(2)
    target = network()
    parameters = list(target.parameters())
    load({"model": target}, tmp_path)
    assert all(one is other for one, other in zip(target.parameters(), parameters, strict=True))
    for name, tensor in module.state_dict().items():
        assert_same(target.state_dict()[name], tensor, name)
    assert target[1].num_batches_tracked == 1
    assert all(parameter.requires_grad for parameter in target.parameters())


# ---- tied weights


class Tied(nn.Module):
    """The classic: input and output embedding are one parameter."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 64)
        self.head = nn.Linear(64, 512, bias=False)
        if tie:
            self.head.weight = self.embed.weight


TIED_BYTES = 512 * 64 * 4


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = Tied(tie=True)
    saved = save({"model": model}, tmp_path)
    assert saved.own_nbytes == TIED_BYTES
    assert saved.nbytes == 2 * TIED_BYTES  # of all tensors by name
    target = Tied(tie=True)
    checkpoint = load({"model": target}, tmp_path)
    assert target.head.weight is target.embed.weight
    assert_same(target.head.weight, model.head.weight)
    assert checkpoint.stats["bytes_read"] == TIED_BYTES
    loaded = ss.Checkpoint.open(tmp_path / "c").load_tensors()
    assert loaded["model.head.weight"].data_ptr() == loaded["model.embed.weight"].data_ptr()


def test_tied_weights_load_into_an_untied_model(tmp_path: Path) -> None:
    model, target = Tied(tie=True), Tied(tie=False)
    save({"model": model}, tmp_path)
    load({"model": target}, tmp_path)
    assert_same(target.embed.weight, model.embed.weight)
    assert_same(target.head.weight, model.embed.weight)
    assert target.head.weight.data_ptr() != target.embed.weight.data_ptr()


def test_untied_weights_with_the_same_values_load_into_a_tied_model(tmp_path: Path) -> None:
    model, target = Tied(tie=False), Tied(tie=True)
    model.head.weight.data.copy_(model.embed.weight.data)
    saved = save({"model": model}, tmp_path)
    assert saved.own_nbytes == 2 * TIED_BYTES
    load({"model": target}, tmp_path)
    assert_same(target.embed.weight, model.embed.weight)


def test_untied_weights_with_other_values_leave_the_last_in_a_tied_model_as_torch_does(tmp_path: Path) -> None:
    first, last = random_bits(torch.uint8, 9 << 20, seed=1), random_bits(torch.uint8, 9 << 20, seed=2)
    save({"a": first, "b": last}, tmp_path)
    for _ in range(3):
        target = torch.zeros(9 << 20, dtype=torch.uint8)
        load({"a": target, "b": target}, tmp_path)
        assert bits_of(target) == bits_of(last)


def test_modules_that_share_a_parameter(tmp_path: Path) -> None:
    shared = nn.Linear(128, 128)
    state = {"one": nn.Sequential(shared, nn.Linear(128, 3)), "two": nn.ModuleList([nn.Linear(4, 4), shared])}
    saved = save(state, tmp_path)
    assert saved.nbytes - saved.own_nbytes > 128 * 128 * 4 - 8192
    fresh = nn.Linear(128, 128)
    target = {"one": nn.Sequential(fresh, nn.Linear(128, 3)), "two": nn.ModuleList([nn.Linear(4, 4), fresh])}
    load(target, tmp_path)
    for name, module in state.items():
        assert nested_equal(dict(target[name].state_dict()), dict(module.state_dict())), name
    assert target["two"][1].weight is target["one"][0].weight


def test_tied_tensors_changed_between_saves_are_stored_as_they_are_then(tmp_path: Path) -> None:
    one, other = torch.ones(1000), torch.zeros(1000)
    # Same names, shapes and dtypes each time; only what shares memory differs.
    for number, (a, b) in enumerate([(one, one), (one, other), (other, other), (other, one)]):
        ss.save({"a": a, "b": b}, checkpoint_id=tmp_path / str(number))
        loaded = ss.Checkpoint.open(tmp_path / str(number)).load_tensors()
        assert bits_of(loaded["a"]) == bits_of(a)
        assert bits_of(loaded["b"]) == bits_of(b)


# ---- what does not fit


def test_every_key_that_does_not_fit_is_named_in_one_error(tmp_path: Path) -> None:
    saved = {
        "same": torch.ones(2),
        "gone.a": torch.ones(2),
        "gone.b": 5,
        "shape": torch.ones(2, 3),
        "rank": torch.ones(2),
    }
    save(saved, tmp_path)
    target = {
        "same": torch.zeros(2),
        "new.a": torch.zeros(1),
        "new.b": 6,
        "shape": torch.zeros(3, 2),
        "rank": torch.zeros(2, 1),
    }
    with pytest.raises(ss.IncompatibleCheckpointError) as caught:
        load(target, tmp_path)
    message = str(caught.value)
    for line in (
        "missing from the checkpoint: new.a",
        "missing from the checkpoint: new.b",
        "unexpected in the checkpoint: gone.a",
        "unexpected in the checkpoint: gone.b",
        "shape: saved with shape [2, 3], wanted [3, 2]",
        "rank: saved with shape [2], wanted [2, 1]",
    ):
        assert line in message
    assert "same" not in message.replace("same_", "")
    assert message.startswith("6 keys do not fit")
    assert target["same"].tolist() == [0.0, 0.0]
    assert target["new.b"] == 6


def test_not_strict_returns_the_keys_and_loads_the_rest(tmp_path: Path) -> None:
    save({"same": torch.ones(2), "gone": torch.ones(2), "gone_value": 5, "value": 1}, tmp_path)
    target = {"same": torch.zeros(2), "new": torch.full((1,), 9.0), "new_value": 6, "value": 0}
    checkpoint = load(target, tmp_path, strict=False)
    assert sorted(checkpoint.missing_keys) == ["new", "new_value"]
    assert sorted(checkpoint.unexpected_keys) == ["gone", "gone_value"]
    assert nested_equal(target, {"same": torch.ones(2), "new": torch.full((1,), 9.0), "new_value": 6, "value": 1})


def test_a_wrong_shape_is_an_error_even_when_not_strict(tmp_path: Path) -> None:
    save({"w": torch.ones(2, 3)}, tmp_path)
    with pytest.raises(ss.IncompatibleCheckpointError, match=r"w: saved with shape \[2, 3\], wanted \[6\]"):
        load({"w": torch.ones(6)}, tmp_path, strict=False)


def test_a_tensor_where_a_value_was_saved_is_both_missing_and_unexpected(tmp_path: Path) -> None:
    save({"x": 1, "y": torch.ones(1)}, tmp_path)
    with pytest.raises(ss.IncompatibleCheckpointError, match="4 keys do not fit"):
        load({"x": torch.zeros(1), "y": 2}, tmp_path)


def test_dtypes_are_converted_only_when_asked(tmp_path: Path) -> None:
    wanted = torch.tensor([0.0, 1.5, -2.0, 65504.0, float("inf"), float("nan")])
    save({"half": wanted.to(torch.float16), "int": torch.tensor([1, -2, 3]), "same": wanted}, tmp_path)

    def target() -> dict[str, torch.Tensor]:
        rows = torch.zeros(6, 2, dtype=torch.float64)
        return {"half": rows[:, 1], "int": torch.zeros(3), "same": torch.zeros(6)}

    with pytest.raises(
        ss.IncompatibleCheckpointError, match=r"saved as float16, wanted as float64; pass cast=True.*half"
    ):
        load(target(), tmp_path)
    filled = target()
    load(filled, tmp_path, cast=True)
    assert filled["half"].nan_to_num().equal(wanted.double().nan_to_num(posinf=torch.finfo(torch.float64).max))
    assert filled["int"].tolist() == [1.0, -2.0, 3.0]
    assert bits_of(filled["same"]) == bits_of(wanted)


def test_a_cast_parameter_stays_a_leaf_that_needs_gradients(tmp_path: Path) -> None:
    save({"w": torch.arange(4, dtype=torch.float64)}, tmp_path)
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    load({"w": parameter}, tmp_path, cast=True)
    assert parameter.is_leaf
    assert parameter.requires_grad
    assert parameter.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two entries of the state are both named 'a\.b'"):
        save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="mapping"):
        save([torch.ones(1)], tmp_path)


class Endless:
    def state_dict(self) -> Any:
        return self

    def load_state_dict(self, state_dict: Any) -> None:
        raise AssertionError("it is never loaded")


def test_a_stateful_that_is_its_own_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the state is nested more than 200 levels deep, or contains itself"):
        save({"a": Endless()}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_state_cannot_take_a_value(tmp_path: Path) -> None:
    save({"w": torch.ones(2), "epoch": 3}, tmp_path)
    with pytest.raises(TypeError, match="a dict that can take loaded values, not a mappingproxy"):
        load(MappingProxyType({"w": torch.zeros(2), "epoch": 0}), tmp_path)
