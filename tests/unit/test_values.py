"""Typed JSON. Invariants: decode(json(encode(v))) is v in type and bits; hostile JSON ends in a typed error."""

from __future__ import annotations

import contextlib
import copy
import enum
import errno
import json
import math
import pathlib
import pickle
import random
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
import torch

from snapstone import errors
from snapstone.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    RankFailedError,
)
from snapstone.values import MAX_DEPTH, MAX_EMBEDDED_BYTES, STORED_DTYPES, decode, dtype_name, dtype_named, encode


def through_json(value: Any, **options: Any) -> Any:
    text = json.dumps(encode(value, **options), ensure_ascii=False, allow_nan=False)
    return decode(json.loads(text.encode("utf-8")), **options)


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for left, right in zip(actual, expected, strict=True):
            assert_same(left, right)
    elif isinstance(expected, dict):
        assert_same(list(actual.items()), list(expected.items()))
    elif isinstance(expected, float):
        assert struct.pack("d", actual) == struct.pack("d", expected)
    elif isinstance(expected, complex):
        assert struct.pack("2d", actual.real, actual.imag) == struct.pack("2d", expected.real, expected.imag)
    elif isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        left, right = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (actual, expected))
        assert torch.equal(left, right)
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert (actual.dtype, actual.shape, actual.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    else:
        assert actual == expected


def test_plain_json_types_map_to_themselves() -> None:
    value = {"a": [None, True, False, 0, -1, 2**53 + 1, 2**200, 1.5, -0.0, 1e-320, 0.1, "text", "ü😀", "", {}, []]}
    assert encode(value) == value
    assert_same(through_json(value), value)


@pytest.mark.parametrize(
    "value",
    [
        *(sign * (2**bits + 1) for bits in (53, 63, 64, 4095, 4096, 20000) for sign in (1, -1)),
        *(math.inf, -math.inf, math.nan, -math.nan, -0.0, 5e-324, 1.7976931348623157e308),
        struct.unpack("<d", bytes.fromhex("0100000000badc7f"))[0],
        *("\ud800", "a\udfffb", "\ud83d\ude00", "nul\0", "\u2028"),
        *((), (1,), (1, (2, [3.5])), b"", b"\0\xff", bytearray(b"xy"), 1 + 2j, complex(math.nan, -0.0)),
        *({1: "a", "b": 2}, {"$tuple": [1]}, {"$": 1, "x": 2}, {(1, "a"): {2.5: None}, None: 1, b"k": 2, 10**5000: 3}),
        *({"\ud800": 1}, {"a": {"$b": {3: ()}}}),
        *(set(), {1, "a", (2, 3)}, frozenset({1.5, None}), {frozenset({1}), frozenset()}),
        *(torch.Size([2, 3]), torch.Size([]), torch.device("cuda:1"), torch.device("cpu"), torch.bfloat16, torch.int8),
        *(slice(1, None, 2), ..., range(3, 30, 4), pathlib.Path("/a/b c"), pathlib.Path("x\udcff")),
        *(datetime(2026, 1, 2, 3, 4, 5, 678), datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=-3)))),
        *(date(2026, 1, 2), timedelta(-3, 7, 11), timedelta.max),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_tagged_value_round_trips_exactly(value: Any) -> None:
    assert_same(through_json(value), value)


def test_numpy_scalars_round_trip_bit_for_bit() -> None:
    noisy_nan = np.frombuffer(bytes.fromhex("0100a07f"), np.float32)[0]
    scalars = [noisy_nan, np.float64(-0.0), np.float16(1.5), np.int64(-(2**63)), np.uint64(2**64 - 1), np.bool_(True)]
    scalars += [np.complex64(1 - 2j), np.datetime64("2026-01-02", "ns"), np.timedelta64(5, "s"), np.longdouble("0.1")]
    for scalar in scalars:
        assert_same(through_json(scalar), scalar)
    assert encode(np.float32(1)) == {"$numpy": {"dtype": "float32", "data": "AACAPw=="}}
    assert_same(through_json((np.str_("a"), np.bytes_(b"b"))), ("a", b"b"))


def test_numpy_arrays_inside_values_round_trip_and_are_writable() -> None:
    arrays = [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(8)[::-2],
        np.array(3.5),
        np.zeros((0, 4), np.float16),
        np.array(["ab", "c"]),
        np.array(["2026-01-01"], "M8[D]"),
        np.array([True, False]),
    ]
    for array in arrays:
        (back,) = through_json((array,))
        assert_same(back, array)
        assert back.flags.writeable


def test_random_generator_states_resume_the_same_stream() -> None:
    python, legacy, modern = random.Random(7), np.random.RandomState(7), np.random.default_rng(7)
    states = through_json((python.getstate(), legacy.get_state(), modern.bit_generator.state))
    expected = (python.random(), legacy.rand(), modern.random())
    python.setstate(states[0])
    legacy.set_state(states[1])
    modern.bit_generator.state = states[2]
    assert (python.random(), legacy.rand(), modern.random()) == expected


def test_small_tensors_inside_tuples_and_sets_round_trip_in_every_dtype() -> None:
    for dtype in STORED_DTYPES.values():
        flat = torch.tensor([0, 1, 1, 0] * 8, dtype=torch.uint8)
        tensor = flat.view(dtype)
        assert_same(through_json((tensor,))[0], tensor)
    strided = torch.arange(12.0).reshape(3, 4).t()[1:]
    conj = torch.tensor([1 + 2j]).conj()
    for tensor in (strided, conj.resolve_conj(), torch.tensor(2.5), torch.zeros(0, 3), torch.tensor(True)):
        assert_same(through_json((tensor,))[0], tensor)
    assert_same(through_json((conj,))[0], conj.resolve_conj())
    assert type(through_json((torch.nn.Parameter(strided),))[0]) is torch.Tensor
    (member,) = through_json({torch.ones(2)})
    assert torch.equal(member, torch.ones(2))


def test_ordered_and_default_dicts_degrade_to_dict_and_keep_their_order() -> None:
    assert_same(through_json(OrderedDict([("b", 1), ("a", 2)])), {"b": 1, "a": 2})
    assert_same(through_json(defaultdict(list, {3: [1]})), {3: [1]})


def test_equal_sets_have_equal_json_whatever_their_insertion_order() -> None:
    names = [f"name{index}" for index in range(50)]
    assert json.dumps(encode(set(names))) == json.dumps(encode({*names[25:], *names[:25]}))
    assert encode({"b", "a"}) == {"$set": ["a", "b"]}


class Color(enum.IntEnum):
    RED = 1


class Custom:
    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


class Subclass(torch.Tensor):
    pass


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value", [Color.RED, Custom(1), Point(1, 2), Counter("aa"), len, int, object(), np.array([None]), np.zeros(1, "V4")]
)
def test_what_has_no_typed_json_is_refused_naming_place_type_and_remedy(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^optim\.param_groups\.0\.foo: .*(convert it|\.value)") as caught:
        encode({"param_groups": [{"foo": value}]}, name="optim")
    if not isinstance(value, np.ndarray):
        assert type(value).__qualname__ in str(caught.value)
        assert "allow_pickle=True" in str(caught.value)


def test_oversized_and_foreign_arrays_are_refused_by_name() -> None:
    for array in (torch.zeros(MAX_EMBEDDED_BYTES + 1, dtype=torch.uint8), np.zeros(MAX_EMBEDDED_BYTES + 1, np.uint8)):
        encode((array[:-1],))
        with pytest.raises(ValueError, match=r"^data\.1: .*limit"):
            encode((0, array), name="data")
    for tensor in (torch.zeros(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(ValueError, match=r"^data\.0: cannot store"):
            encode((tensor,), name="data")
    with pytest.raises(ValueError, match="qint8"):
        encode(torch.qint8)
    with pytest.raises(TypeError, match=r"^data\.0: cannot store a Subclass inside a tuple or set; put it into a dict"):
        encode((torch.ones(2).as_subclass(Subclass),), name="data")


def test_pickle_needs_consent_on_both_sides() -> None:
    encoded = json.loads(json.dumps(encode({"a": [Custom(3)]}, allow_pickle=True)))
    assert decode(encoded, allow_pickle=True) == {"a": [Custom(3)]}
    with pytest.raises(IncompatibleCheckpointError, match=r"^x\.a\.0: .*allow_pickle=True"):
        decode(encoded, name="x")
    with pytest.raises(TypeError, match=r"^a: cannot pickle"):
        encode({"a": lambda: 0}, allow_pickle=True)
    with pytest.raises(CorruptCheckpointError, match="invalid pickle"):
        decode({"$pickle": "AAAA"}, allow_pickle=True)


def test_a_pickle_whose_class_is_gone_is_incompatible_not_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode({"a": Custom(3)}, allow_pickle=True)
    monkeypatch.delattr(sys.modules[__name__], "Custom")
    with pytest.raises(IncompatibleCheckpointError, match=r"^x\.a: the class of a pickled object is missing: .*Custom"):
        decode(encoded, name="x", allow_pickle=True)


def test_pickle_bytes_are_never_executed_without_consent(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return pathlib.Path.touch, (target,)

    encoded = encode(Bomb(), allow_pickle=True)
    with pytest.raises(IncompatibleCheckpointError):
        decode(encoded)
    assert not target.exists()
    decode(encoded, allow_pickle=True)
    assert target.exists()


def test_values_that_contain_themselves_or_nest_too_deeply_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="contains itself"):
        encode(loop)
    deep: Any = []
    for level in range(MAX_DEPTH - 10):
        deep = [lambda value: [value], lambda value: {"k": value}, lambda value: (value,)][level % 3](deep)
    assert repr(through_json(deep)) == repr(deep)
    for _ in range(11):
        deep = {1: deep}
    with pytest.raises(ValueError, match=r"levels deep|too deeply"):
        encode(deep)


def test_a_caller_near_the_end_of_the_stack_is_told_of_the_nesting() -> None:
    deep: Any = ()
    for _ in range(MAX_DEPTH - 10):
        deep = (deep,)
    encoded = encode(deep)

    def after(frames: int, call: Callable[[], Any]) -> Any:
        return after(frames - 1, call) if frames else call()

    with pytest.raises(ValueError, match=r"^here: nested too deeply"):
        after(600, lambda: encode(deep, name="here"))
    with pytest.raises(CorruptCheckpointError, match=r"^here: nested too deeply"):
        after(600, lambda: decode(encoded, name="here"))


def nested(levels: int, wrap: str) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if wrap == "list" else {wrap: [[1, value]] if wrap == "$dict" else [value]}
    return value


@pytest.mark.parametrize("wrap", ["list", "a", "$tuple", "$set", "$dict", "$slice"])
def test_deeply_nested_json_is_corrupt_and_never_a_recursion_error(wrap: str) -> None:
    for levels in (MAX_DEPTH + 2, 100_000):
        with pytest.raises(CorruptCheckpointError):
            decode(nested(levels, wrap))


NDARRAY = {"dtype": "float32", "shape": [1], "data": "AACAPw=="}
SCALAR = {"dtype": "float32", "data": "AACAPw=="}


@pytest.mark.parametrize(
    "hostile",
    [
        *({"$evil": 1}, {"$tuple": 1}, {"$tuple": {"a": 1}}, {"$tuple": [], "x": 1}, {"$tuple": [], "$set": []}),
        *({"a": 1, "$b": 2}, {1: 2}, (1,), b"x", {"$__class__": []}, {"$": 1}, {"a": object()}),
        *({"$bytes": 5}, {"$bytes": "a"}, {"$bytes": "AA=A"}, {"$bytes": "é"}, {"$bytes": "A!A=="}, {"$str": "//8="}),
        *({"$int": "12"}, {"$int": "0xg"}, {"$int": "0x"}, {"$int": 5}, {"$int": "0x1_0"}),
        *({"$float": "1.5"}, {"$float": "3ff0000000000000"}, {"$float": "infinity"}, {"$float": 1.0}),
        *({"$complex": [1.0]}, {"$complex": ["a", 1.0]}, {"$complex": [True, 1.0]}),
        *({"$set": [[1]]}, {"$set": [1, 1]}, {"$frozenset": [{"$set": []}]}, {"$set": 3}),
        *({"$dict": [1]}, {"$dict": [[1]]}, {"$dict": [[[], 1]]}, {"$dict": [[1, 2], [1, 3]]}, {"$dict": {}}),
        *({"$size": [1.5]}, {"$size": [True]}, {"$size": ["1"]}, {"$range": [0, 1, 0]}),
        *({"$slice": [1, 2]}, {"$dtype": "nope"}, {"$dtype": "__class__"}, {"$dtype": "Tensor"}, {"$dtype": [1]}),
        *({"$device": "evil:0"}, {"$device": "cuda:x"}, {"$device": 3}, {"$device": "cpu\n"}, {"$path": 5}),
        *({"$path": {"$bytes": "AA=="}}, {"$datetime": "now"}, {"$datetime": 5}, {"$date": "2026-13-01"}),
        *({"$timedelta": [10**12, 0, 0]}, {"$timedelta": [1.0, 0, 0]}, {"$timedelta": [1, 0]}),
        *({"$numpy": SCALAR | {"dtype": dtype}} for dtype in ("object", "O", "V4", "f4,f4", "float33", "float64", 5)),
        *({"$numpy": SCALAR | {"data": data}} for data in ("", "AAAA", "AACAPwAAgD8=", None)),
        *({"$numpy": SCALAR | {"extra": 1}}, {"$numpy": []}, {"$numpy": {"dtype": "bool", "data": "Ag=="}}),
        *({"$numpy": {"dtype": "<U1", "data": "AACAPw=="}}, {"$numpy": {"dtype": "<M8[0s]", "data": "AAAAAAAAAAA="}}),
        *({"$ndarray": NDARRAY | {"shape": s}} for s in ([-1], [2], 1, [1.0], [2**62, 4], [1] * 65, [True], None)),
        *({"$ndarray": NDARRAY | {"shape": s, "data": ""}} for s in ([0, 2**63], [0, 2**62, 2**62], [-1, 0], [1])),
        *({"$tensor": NDARRAY | {"shape": s}} for s in ([-1], [2], 1, [1.0], [2**62, 4], [True], None)),
        *({"$tensor": NDARRAY | {"shape": s, "data": ""}} for s in ([0, 2**63], [0, -1], [1])),
        *({"$tensor": NDARRAY | {"dtype": "qint8"}}, {"$tensor": {"dtype": "bool", "shape": [1], "data": "Ag=="}}),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_hostile_json_is_reported_as_corrupt_with_its_place(hostile: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"^root\.k\.1"):
        decode({"k": [0, hostile]}, name="root")


@pytest.mark.parametrize(
    ("hostile", "problem"),
    [
        ((1, 2), "tuple is not a type of JSON"),
        ({"$float": "3ff0000000000000"}, "invalid float: 1.0 is finite"),
        ({"$numpy": {"dtype": "bool", "data": "Ag=="}}, "a bool that is neither 0 nor 1"),
        ({"$numpy": {"dtype": "<U1", "data": "QQAAAA=="}}, "numpy scalar of dtype <U1"),
        ({"$set": [1, 2, 1]}, "the same element twice"),
        ({"$tensor": {"dtype": "float32", "shape": [-1], "data": ""}}, "absurd shape [-1]"),
        ({"$tensor": {"dtype": "float32", "shape": [1] * 65, "data": ""}}, "absurd shape [1, 1, 1, 1, 1, 1, 1, 1"),
    ],
)
def test_hostile_json_is_reported_with_what_is_wrong(hostile: Any, problem: str) -> None:
    with pytest.raises(CorruptCheckpointError) as caught:
        decode({"k": hostile}, name="root")
    assert str(caught.value).startswith(f"root.k: {problem}")


def test_random_mutations_of_valid_json_never_escape_the_typed_errors() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    value = (b"abc", {1: 1.5}, {2}, torch.ones(2), np.ones(2), np.float32(2), torch.int8, 1j, datetime(2026, 1, 1))
    original = json.dumps(encode(value))
    parsed = 0
    for _ in range(3000):
        text = list(original)
        for _ in range(rng.randint(1, 3)):
            text[rng.randrange(len(text))] = rng.choice('0129[]{}",:$abAe-.=')
        try:
            encoded = json.loads("".join(text))
        except ValueError:
            continue
        parsed += 1
        with contextlib.suppress(CheckpointError):
            decode(encoded)
    assert parsed > 100


def test_dtype_names_are_torchs_own_and_unknown_ones_are_incompatible() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert all(dtype_named(dtype_name(dtype)) is dtype for dtype in STORED_DTYPES.values())
    with pytest.raises(IncompatibleCheckpointError, match="float3"):
        dtype_named("float3")


WHERE = {"path": "/run/step-1", "tensor": "w", "chunk": 3, "rank": 0, "expected": "ab", "actual": b"\1"}


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in errors.__all__])
def test_errors_name_their_place_and_survive_pickle_and_copy(kind: type[CheckpointError]) -> None:
    extra = {"failed_ranks": [2, 5]} if kind is RankFailedError else {}
    error = kind("bad digest", **WHERE, **extra)
    error.add_note("seen on node 7")
    for same in (error, pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(same) is kind
        assert isinstance(same, RuntimeError)
        assert {name: getattr(same, name) for name in WHERE} == WHERE
        assert same.args == ("bad digest",)
        assert same.__notes__ == ["seen on node 7"]
        assert str(same) == str(error)
        for shown in ("bad digest", "path='/run/step-1'", "tensor='w'", "chunk=3", "rank=0", "expected='ab'"):
            assert shown in str(same)
        if isinstance(same, RankFailedError):
            assert same.failed_ranks == (2, 5)
            assert "failed_ranks=(2, 5)" in str(same)
    assert str(kind("plain")) == "plain"
    assert kind("plain").rank is None


def test_checkpoint_not_found_is_a_file_not_found_error_with_errno_and_filename() -> None:
    error = CheckpointNotFoundError("nothing there", path=pathlib.Path("/run"))
    for same in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(same, FileNotFoundError)
        assert (same.errno, same.filename, same.path) == (errno.ENOENT, "/run", "/run")
        assert "nothing there" in str(same)
        assert "/run" in str(same)
