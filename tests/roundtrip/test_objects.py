"""Python values and random number generators come back in type and bits; pickle needs both sides to say so."""

from __future__ import annotations

import enum
import json
import math
import pathlib
import random
from collections import OrderedDict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import snapstone as ss
from roundtrip.bits import bits_of, nested_equal

VALUES: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "ints": [0, -1, 2**63, -(2**64), 10**5000],
    "floats": [0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan, 1.7976931348623157e308],
    "text": 'a\u0000b\U0001f600\n\\"$',
    "surrogate": "\ud800",
    "bytes": bytes(range(256)),
    "bytearray": bytearray(b"xyz"),
    "complex": complex(-0.0, math.inf),
    "tuple": (1, (2, ("three",)), []),
    "set": {3, 1, 2},
    "frozenset": frozenset({"a", "b"}),
    "slice": slice(1, None, 2),
    "range": range(0, 10, 3),
    "size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "device": torch.device("cuda", 1),
    "path": pathlib.Path("some/where"),
    "datetime": datetime(2024, 2, 29, 12, 0, 1, 5, tzinfo=UTC),
    "date": date(1999, 12, 31),
    "timedelta": timedelta(days=-1, seconds=3, microseconds=7),
    "numpy": [np.float32(0.1), np.int8(-3), np.bool_(True)],
    "dollar": {"$tuple": [1], "$": 2},
    "keys": {1: "int", 1.5: "float", (1, 2): "tuple", None: "none", True.__class__.__name__: "text"},
    "deep": [[[[[[["bottom"]]]]]]],
}


def test_every_value_comes_back_in_type_and_bits(tmp_path: Path) -> None:
    ss.save({"values": VALUES}, checkpoint_id=tmp_path / "c")
    target = {"values": dict.fromkeys(VALUES, 0)}
    with pytest.raises(ss.IncompatibleCheckpointError):
        ss.load(target, checkpoint_id=tmp_path / "c")  # dicts split: their keys are names
    shape = {"values": {name: dict.fromkeys(value, 0) if type(value) is dict else 0 for name, value in VALUES.items()}}
    ss.load(shape, checkpoint_id=tmp_path / "c")
    for name, value in VALUES.items():
        assert nested_equal(shape["values"][name], value), name
    assert nested_equal(ss.Checkpoint.open(tmp_path / "c").state_dict()["values"], VALUES)


def test_values_saved_are_those_of_the_call(tmp_path: Path) -> None:
    state: dict[str, Any] = {"list": [1, 2], "dict": {"a": [3]}, "t": torch.ones(2)}
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
    state["list"].append(9)
    state["dict"]["a"].clear()
    state["new"] = 1
    handle.result()
    assert nested_equal(
        ss.Checkpoint.open(tmp_path / "c").state_dict(), {"list": [1, 2], "dict": {"a": [3]}, "t": torch.ones(2)}
    )


class Colour(enum.Enum):
    RED = 1


class Config:
    def __init__(self, width: int) -> None:
        self.width = width

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and other.width == self.width

    def __hash__(self) -> int:
        return hash(self.width)


@pytest.mark.parametrize(
    ("value", "remedy"), [(Colour.RED, ".value"), (Config(3), "plain values"), (lambda: 0, "allow_pickle")]
)
def test_a_value_without_typed_json_is_refused_by_name(tmp_path: Path, value: Any, remedy: str) -> None:
    with pytest.raises(TypeError, match=r"^run\.config: cannot store") as caught:
        ss.save({"run": {"config": value}}, checkpoint_id=tmp_path / "c")
    assert remedy in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_pickle_needs_permission_on_both_sides(tmp_path: Path) -> None:
    ss.save({"config": Config(3)}, checkpoint_id=tmp_path / "c", allow_pickle=True)
    target: dict[str, Any] = {"config": None}
    with pytest.raises(ss.IncompatibleCheckpointError, match="allow_pickle=True"):
        ss.load(target, checkpoint_id=tmp_path / "c")
    assert target == {"config": None}
    with pytest.raises(ss.IncompatibleCheckpointError, match="config: holds a pickled"):
        ss.Checkpoint.open(tmp_path / "c").objects()
    ss.load(target, checkpoint_id=tmp_path / "c", allow_pickle=True)
    assert target == {"config": Config(3)}


def test_without_permission_nothing_in_the_files_is_a_pickle(tmp_path: Path) -> None:
    ss.save({"values": VALUES, "t": torch.ones(3)}, checkpoint_id=tmp_path / "c", metadata={"a": (1, 2)})
    for entry in (tmp_path / "c").iterdir():
        assert b"$pickle" not in entry.read_bytes()
    manifest = json.loads((tmp_path / "c" / "MANIFEST.json").read_bytes())
    assert manifest["metadata"] == {"a": {"$tuple": [1, 2]}}


def generators() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "numpy_new": rng.bit_generator.state,
        "torch": torch.get_rng_state(),
        "torch_own": own.get_state(),
    }


rng = np.random.default_rng(5)
own = torch.Generator().manual_seed(6)


def draw() -> tuple[Any, ...]:
    values = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), rng.standard_normal())
    return (*values, rng.integers(1 << 62), bits_of(torch.randn(17)), bits_of(torch.randn(3, generator=own)))


def test_random_number_generators_go_on_bit_for_bit(tmp_path: Path) -> None:
    draw()  # gauss and randn keep a spare value: it is part of the state
    ss.save({"rng": generators()}, checkpoint_id=tmp_path / "c")
    expected = [draw() for _ in range(3)]
    random.seed(99)
    np.random.seed(98)
    torch.manual_seed(97)
    state = {"rng": generators()}
    ss.load(state, checkpoint_id=tmp_path / "c")
    random.setstate(state["rng"]["python"])
    np.random.set_state(state["rng"]["numpy"])
    rng.bit_generator.state = state["rng"]["numpy_new"]
    torch.set_rng_state(state["rng"]["torch"])
    own.set_state(state["rng"]["torch_own"])
    assert [draw() for _ in range(3)] == expected


def test_numpy_arrays_are_tensors_and_come_back_into_their_memory(tmp_path: Path) -> None:
    arrays = {
        "plain": np.arange(12, dtype=np.float64).reshape(3, 4),
        "transposed": np.arange(12, dtype=np.int32).reshape(3, 4).T,
        "reversed": np.arange(5, dtype=np.int16)[::-1],
        "big_endian": np.arange(5, dtype=">f4"),
        "empty": np.zeros((0, 3)),
        "zero_d": np.array(2.5),
        "bools": np.array([True, False]),
    }
    ss.save(dict(arrays), checkpoint_id=tmp_path / "c")
    assert list(ss.Checkpoint.open(tmp_path / "c").keys()) == list(arrays)
    target = {name: np.zeros_like(array) for name, array in arrays.items()}
    target["reversed"] = np.zeros(5, dtype=np.int16)[::-1]
    given = dict(target)
    ss.load(target, checkpoint_id=tmp_path / "c")
    for name, array in arrays.items():
        assert target[name] is given[name], name
        assert target[name].dtype == array.dtype
        assert np.array_equal(target[name], array), name


def test_metadata_and_metrics_are_read_without_tensors(tmp_path: Path) -> None:
    column = torch.arange(8.0).reshape(4, 2)[2:3, 1]  # one element with odd strides
    metadata = {"metrics": {"loss": 0.25, "acc": 1}, "who": ("me", 2), "note": "ü", "tensor": column}
    saved = ss.save({"t": torch.ones(4)}, checkpoint_id=tmp_path / "c", metadata=metadata, step=12)
    (tmp_path / "c" / "rank-00000.data").unlink()
    for checkpoint in (saved, ss.Checkpoint.open(tmp_path / "c")):
        assert nested_equal(dict(checkpoint.metadata), metadata)
        assert checkpoint.metrics == {"loss": 0.25, "acc": 1.0}
        assert checkpoint.step == 12
    assert ss.Checkpoint.open(tmp_path / "c").metadata["tensor"].tolist() == [5.0]


@pytest.mark.parametrize(
    ("step", "state", "expected"), [(None, {"step": 7}, 7), (3, {"step": 7}, 3), (None, {"step": True}, None)]
)
def test_the_step_is_the_one_given_or_the_states_own(
    tmp_path: Path, step: int | None, state: dict[str, Any], expected: int | None
) -> None:
    assert ss.save(state, checkpoint_id=tmp_path / "c", step=step).step == expected
    assert ss.Checkpoint.open(tmp_path / "c").step == expected


def test_metadata_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"metadata\['config'\]"):
        ss.save({}, checkpoint_id=tmp_path / "c", metadata={"config": Config(1)})
    assert list(tmp_path.iterdir()) == []


def test_ordered_dicts_keep_their_order(tmp_path: Path) -> None:
    state = OrderedDict((name, torch.ones(1)) for name in "zaqwsx")
    ss.save(state, checkpoint_id=tmp_path / "c")
    assert list(ss.Checkpoint.open(tmp_path / "c").state_dict()) == list("zaqwsx")
