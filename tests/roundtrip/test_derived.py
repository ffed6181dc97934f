"""Parameters that are their float32 masters, rounded, are not written, and come back bit for bit.

Invariants:
  1. Whatever the bits of a master and of a parameter: the parameter that is loaded has the bits that were saved.
  2. A parameter is derived exactly when every element is its master's, rounded to nearest, ties to even, and none is
     NaN; everything else is stored as itself.
  3. The reference reader, which rounds by itself, agrees with the package.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

import snapstone as ss
from durability.forge import Forge
from format import reference_reader
from format.test_reference_reader import assert_readers_agree
from roundtrip.bits import assert_same, bits_of, nested_equal, other_bits, random_bits
from snapstone.derive import NBYTES_MIN

SEED = 6106
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def seeded() -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)


def rounded(master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By numpy's integers and halves, not by torch."""
    exact = master.detach().contiguous().numpy()
    if dtype is torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(exact.astype(np.float16))
    bits = exact.view(np.uint32).astype(np.uint64)
    upper = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return torch.from_numpy(upper.view(np.int16)).view(torch.bfloat16)


def no_nan(bits: torch.Tensor) -> torch.Tensor:
    return torch.where(bits.isnan(), torch.zeros(()), bits)


def masters() -> dict[str, torch.Tensor]:
    """Layouts of all kinds, whose bits are any but NaN: subnormals, infinities, values that overflow a half."""
    return {
        "vector": no_nan(random_bits(torch.float32, 3000, seed=1)),
        "matrix": no_nan(random_bits(torch.float32, 300, 170, seed=2)),
        "turned": no_nan(random_bits(torch.float32, 90, 80, seed=3)).T,
        "every second": no_nan(random_bits(torch.float32, 70, 128, seed=4))[:, ::2],
        "kernel": no_nan(random_bits(torch.float32, 8, 16, 5, 5, seed=5)).to(memory_format=torch.channels_last),
        "several pieces": no_nan(random_bits(torch.float32, 601, 1030, seed=6)),
        "one long row": torch.randn(1, 600_000),
    }


def mixed_state(dtype: torch.dtype) -> dict[str, Any]:
    exact = masters()
    model = {name: master.to(dtype) for name, master in exact.items()}
    optimizer = {
        name: {"exp_avg": torch.randn(master.shape), "master": master, "step": 3} for name, master in exact.items()
    }
    return {"model": model, "optimizer": optimizer, "step": 3}


def blank_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: blank_of(item) for key, item in value.items()}
    return other_bits(value) if isinstance(value, torch.Tensor) else None


def saved_nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of all tensors, by name; one writer's."""
    manifest = reference_reader.read_manifest(path)
    return {
        row["name"]: row for row in reference_reader.read_index(path, manifest, manifest["writers"][0])[0]["tensors"]
    }


def derived_names(path: Path) -> dict[str, str]:
    return {name: row["derived_from"] for name, row in rows_of(path).items() if "derived_from" in row}


@pytest.mark.parametrize("dtype", list(HALVES.values()), ids=list(HALVES))
def test_parameters_of_every_layout_come_back_and_are_not_written(tmp_path: Path, dtype: torch.dtype) -> None:
    state = mixed_state(dtype)
    plain = ss.save(state, checkpoint_id=tmp_path / "plain")
    saved = ss.save(state, checkpoint_id=tmp_path / "c", derive=True)
    assert saved.stats["derived_bytes"] == saved_nbytes(state["model"])
    assert plain.own_nbytes - saved.own_nbytes >= 0.95 * saved_nbytes(state["model"])
    assert saved.nbytes == plain.nbytes
    assert derived_names(tmp_path / "c") == {f"model.{name}": f"optimizer.{name}.master" for name in state["model"]}
    assert_readers_agree(tmp_path / "c")
    target = blank_of(state)
    loaded = ss.load(target, checkpoint_id=tmp_path / "c")
    assert nested_equal(target, state)
    assert loaded.stats["bytes_needed"] == plain.nbytes - saved_nbytes(state["model"])  # masters are read once
    assert list(ss.Checkpoint.open(tmp_path / "c").keys()) == list(ss.Checkpoint.open(tmp_path / "plain").keys())
    assert nested_equal(ss.Checkpoint.open(tmp_path / "c").state_dict(), state)


def test_without_the_option_everything_is_written(tmp_path: Path) -> None:
    saved = ss.save(mixed_state(torch.bfloat16), checkpoint_id=tmp_path / "c")
    assert derived_names(tmp_path / "c") == {}
    assert "derived_bytes" not in saved.stats


FLIPS = st.one_of(st.none(), st.tuples(st.integers(0, 1 << 30), st.integers(0, 15)))
SPECIAL = st.sampled_from([0, 1 << 31, 1, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0x33000000, 0x33000001])


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(HALVES)),
    rows=st.integers(1, 40),
    columns=st.integers(2048, 2100),
    seed=st.integers(0, 1 << 16),
    planted=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, (1 << 32) - 1) | SPECIAL), max_size=20),
    flip=FLIPS,
    turned=st.booleans(),
)
@example("bfloat16", 1, 2048, 0, [(5, 0x7FC00000)], None, False)
@example("float16", 3, 2048, 0, [(5, 0x477FF000), (6, 0x477FEFFF)], None, True)  # the ends of what rounds to infinity
@example("bfloat16", 3, 2048, 0, [(9, 0x3F808000), (10, 0x3F818000)], (9, 0), False)  # ties, and one ulp off
def test_any_bits_come_back_and_only_what_rounds_is_derived(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    rows: int,
    columns: int,
    seed: int,
    planted: list[tuple[int, int]],
    flip: tuple[int, int] | None,
    turned: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(rows, columns, generator=generator)
    for at, bits in planted:
        master.view(-1).view(torch.int32)[at % master.numel()] = bits - (bits >> 31 << 32)
    parameter = rounded(master, HALVES[dtype])
    if flip is not None:
        parameter.view(-1).view(torch.int16)[flip[0] % master.numel()] ^= 1 << flip[1] if flip[1] < 15 else -(1 << 15)
    if turned:
        master, parameter = master.T, parameter.T
    state = {"master": master, "parameter": parameter}
    path = tmp_path_factory.mktemp("c") / "c"
    ss.save(state, checkpoint_id=path, derive=True)
    expected = flip is None and not master.isnan().any()
    assert derived_names(path) == ({"parameter": "master"} if expected else {})
    target = blank_of(state)
    ss.load(target, checkpoint_id=path)
    assert nested_equal(target, state)
    contents = reference_reader.read(path)
    assert contents.tensors["parameter"].data == bits_of(parameter)


def pair(dtype: torch.dtype = torch.bfloat16, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    master = torch.randn(*(shape or (60, 70)))
    return master, master.to(dtype)


def test_a_parameter_one_ulp_off_is_stored_as_itself(tmp_path: Path) -> None:
    master, parameter = pair()
    parameter.view(torch.int16)[59, 69] += 1
    saved = ss.save({"m": master, "p": parameter}, checkpoint_id=tmp_path / "c", derive=True)
    assert saved.stats["derived_bytes"] == 0
    assert derived_names(tmp_path / "c") == {}
    assert_same(saved.get_tensor("p"), parameter)


def test_a_master_with_nan_is_no_master(tmp_path: Path) -> None:
    master, _ = pair()
    master[3, 4] = float("nan")
    parameter = master.to(torch.bfloat16)
    saved = ss.save({"m": master, "p": parameter}, checkpoint_id=tmp_path / "c", derive=True)
    assert derived_names(tmp_path / "c") == {}
    assert_same(saved.get_tensor("p"), parameter)


def test_of_equal_masters_the_one_with_the_like_name_is_taken(tmp_path: Path) -> None:
    names = ["a.weight", "b.weight", "c.weight"]
    master, _ = pair()
    state = {f"optimizer.{name}.master": master.clone() for name in reversed(names)}
    state |= {name: master.to(torch.bfloat16) for name in names}
    ss.save(state, checkpoint_id=tmp_path / "c", derive=True)
    assert derived_names(tmp_path / "c") == {name: f"optimizer.{name}.master" for name in names}


def test_a_tensor_of_less_than_a_page_is_stored_as_itself(tmp_path: Path) -> None:
    just, below = pair(torch.float16, NBYTES_MIN // 2), pair(torch.float16, NBYTES_MIN // 2 - 1)
    state = {"m": just[0], "p": just[1], "small m": below[0], "small p": below[1]}
    ss.save(state, checkpoint_id=tmp_path / "c", derive=True)
    assert derived_names(tmp_path / "c") == {"p": "m"}


def test_tied_parameters_are_derived_together_and_stay_tied(tmp_path: Path) -> None:
    master, parameter = pair()
    twin = parameter.clone()  # equal, but not the same memory
    other, its_parameter = pair()
    state = {"m": master, "p": parameter, "tied": parameter, "twin": twin, "turned": parameter.T}
    state |= {"other m": other, "other p": its_parameter}
    ss.save(state, checkpoint_id=tmp_path / "c", derive=True)
    assert derived_names(tmp_path / "c") == {"p": "m", "tied": "m", "other p": "other m"}
    found = ss.Checkpoint.open(tmp_path / "c").state_dict()
    assert nested_equal(found, state)
    assert found["p"].data_ptr() == found["tied"].data_ptr() != found["twin"].data_ptr()
    assert_readers_agree(tmp_path / "c")


def test_a_parameter_alone_is_loaded_from_its_master(tmp_path: Path) -> None:
    state = mixed_state(torch.bfloat16)
    ss.save(state, checkpoint_id=tmp_path / "c", derive=True)
    target = {"model": {"matrix": other_bits(state["model"]["matrix"]), "turned": other_bits(state["model"]["turned"])}}
    loaded = ss.load(target, checkpoint_id=tmp_path / "c", strict=False)
    assert_same(target["model"]["matrix"], state["model"]["matrix"])
    assert_same(target["model"]["turned"], state["model"]["turned"])
    assert loaded.stats["bytes_needed"] == 2 * saved_nbytes(target["model"])  # the masters', and nothing else
    assert_same(ss.Checkpoint.open(tmp_path / "c").get_tensor("model.kernel"), state["model"]["kernel"])


def test_a_slice_of_a_parameter_reads_that_of_its_master(tmp_path: Path) -> None:
    state = mixed_state(torch.float16)
    ss.save(state, checkpoint_id=tmp_path / "c", derive=True)
    part = ss.Checkpoint.open(tmp_path / "c").get_slice("model.several pieces")
    assert (part.dtype, part.shape) == (torch.float16, (601, 1030))
    assert_same(part[5:600:7, 1000:], state["model"]["several pieces"][5:600:7, 1000:])


def test_cast_loads_give_what_the_stored_parameter_would(tmp_path: Path) -> None:
    master, parameter = pair()
    state = {"m": master, "p": parameter}
    ss.save(state, checkpoint_id=tmp_path / "c", derive=True)
    for dtype in (torch.float32, torch.float64, torch.float16):
        target = {"m": torch.empty(60, 70, dtype=dtype), "p": torch.empty(60, 70, dtype=dtype)}
        ss.load(target, checkpoint_id=tmp_path / "c", cast=True)
        assert_same(target["p"], parameter.to(dtype))
        assert_same(target["m"], master.to(dtype))
    with pytest.raises(ss.IncompatibleCheckpointError, match="bfloat16"):
        ss.load({"m": master, "p": torch.empty(60, 70)}, checkpoint_id=tmp_path / "c")


def test_progress_of_a_load_ends_at_its_total(tmp_path: Path) -> None:
    state = mixed_state(torch.bfloat16)
    ss.save(state, checkpoint_id=tmp_path / "c", derive=True)
    seen: list[tuple[int, int]] = []
    ss.load(blank_of(state), checkpoint_id=tmp_path / "c", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == max(done for done, _ in seen)


def test_each_save_of_one_structure_derives_what_rounds_then(tmp_path: Path) -> None:
    master, parameter = pair()
    state = {"m": master, "p": parameter, "other": torch.randn(70, 60)}

    def save(name: str, derive: bool) -> dict[str, str]:
        ss.save(state, checkpoint_id=tmp_path / name, derive=derive)
        assert nested_equal(ss.Checkpoint.open(tmp_path / name).state_dict(), state)
        assert ss.verify(tmp_path / name)
        return derived_names(tmp_path / name)

    assert save("a", True) == {"p": "m"}
    parameter += 1
    assert save("b", True) == {}
    assert save("c", False) == {}
    master += 0.5
    parameter.copy_(master)
    assert save("d", False) == {}
    assert save("e", True) == {"p": "m"}
    assert rows_of(tmp_path / "a")["p"]["xxh128"] != rows_of(tmp_path / "e")["p"]["xxh128"]


@pytest.mark.parametrize("codec", [None, "xor-zstd"])
def test_deltas_of_a_state_whose_parameters_are_derived_now_and_then(tmp_path: Path, codec: str | None) -> None:
    """What the base derived has no bytes there: it is written when it is derived no more, and not before."""
    master, parameter = pair(torch.bfloat16, 300, 400)
    state: dict[str, Any] = {"m": master, "p": parameter, "tied": parameter, "frozen": torch.randn(200, 300)}

    def save(number: int, *, derive: bool) -> tuple[dict[str, str], int]:
        path = tmp_path / str(number)
        base = tmp_path / str(number - 1) if number else None
        saved = ss.save(state, checkpoint_id=path, base=base, codec=codec, derive=derive)
        assert nested_equal(ss.Checkpoint.open(path).state_dict(), state)
        assert_readers_agree(path)
        return derived_names(path), int(saved.own_nbytes)

    derived = {"p": "m", "tied": "m"}
    assert save(0, derive=True)[0] == derived
    assert save(1, derive=True) == (derived, 0)
    master += 0.25
    parameter.copy_(master)
    assert save(2, derive=True)[0] == derived
    parameter[7, 7] += 1
    names, written = save(3, derive=True)
    assert (names, written > 0.5 * parameter.nbytes) == ({}, True)
    assert save(4, derive=False) == ({}, 0)
    parameter.copy_(master)
    assert save(5, derive=True) == (derived, 0)
    assert save(6, derive=False)[0] == {}
    for number in range(6):
        shutil.rmtree(tmp_path / str(number))
    assert nested_equal(ss.Checkpoint.open(tmp_path / "6").state_dict(), state)


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_an_async_save_is_of_the_state_before_the_step(tmp_path: Path, codec: str | None) -> None:
    exact = [torch.nn.Parameter(torch.randn(80, 90)) for _ in range(3)]
    optimizer = torch.optim.Adam(exact, lr=0.1)
    model = {str(i): one.detach().to(torch.bfloat16) for i, one in enumerate(exact)}

    def step() -> None:
        for one in exact:
            one.grad = torch.ones_like(one)
        optimizer.step()
        for i, one in enumerate(exact):
            model[str(i)].copy_(one.detach())

    step()
    state = {"model": model, "masters": {str(i): one for i, one in enumerate(exact)}, "optimizer": optimizer}
    for fence in ("now", optimizer):
        before = {name: tensor.clone() for name, tensor in model.items()}
        path = tmp_path / ("now" if fence == "now" else "optimizer")
        handle = ss.async_save(state, checkpoint_id=path, fence=fence, codec=codec, derive=True)
        step()
        handle.result()
        assert handle.stats["derived_bytes"] == saved_nbytes(model)
        found = ss.Checkpoint.open(path).load_tensors([f"model.{name}" for name in before])
        assert nested_equal(found, {f"model.{name}": tensor for name, tensor in before.items()})
        assert ss.verify(path)


def test_verify_finds_a_master_that_gives_other_bytes(tmp_path: Path) -> None:
    master, parameter = pair()
    ss.save({"m": master, "p": parameter}, checkpoint_id=tmp_path / "c", derive=True)
    forge = Forge(tmp_path / "c")
    master[7, 8] = 1e30
    forge.data = master.numpy().tobytes() + bytes(-master.nbytes % 4096)
    forge.table[0]["digest"] = np.void(xxhash.xxh3_128_digest(master.numpy().tobytes()))
    forge.write(tmp_path / "other master")
    forge = Forge(tmp_path / "c")
    forge.header["tensors"][1]["xxh128"] = "0" * 32
    forge.write(tmp_path / "other digest")
    for name in ("other master", "other digest"):
        report = ss.verify(tmp_path / name)
        assert len(report.problems) == 1
        assert "rank-00000.index" in report.problems[0]
        assert "'p'" in report.problems[0] or "p:" in report.problems[0], report.problems
        assert "derived from 'm'" in report.problems[0]
        assert ss.verify(tmp_path / name, level="quick")  # it reads no values
        with pytest.raises(reference_reader.FormatError, match="p is not what its master gives"):
            reference_reader.read(tmp_path / name)


def test_a_difference_is_one_of_values(tmp_path: Path) -> None:
    master, parameter = pair()
    state = {"m": master, "p": parameter}
    derived = ss.save(state, checkpoint_id=tmp_path / "derived", derive=True)
    stored = ss.save(state, checkpoint_id=tmp_path / "stored")
    again = ss.save(state, checkpoint_id=tmp_path / "again", derive=True)
    assert not derived.diff(stored)
    assert not stored.diff(derived)
    assert not derived.diff(again)
    master[1, 1] *= 1.0001  # the same when rounded
    parameter.copy_(master)
    assert [
        change.name for change in derived.diff(ss.save(state, checkpoint_id=tmp_path / "m", derive=True)).changed
    ] == ["m"]
    master[1, 1] += 3
    parameter.copy_(master)
    other = ss.save(state, checkpoint_id=tmp_path / "both", derive=True)
    changed = derived.diff(other, values=True).changed
    assert [change.name for change in changed] == ["m", "p"]
    assert changed[1].max_abs_difference == pytest.approx(3, abs=0.1)


def test_dcp_reads_derived_parameters(tmp_path: Path) -> None:
    from snapstone.dcp import StorageReader

    state = mixed_state(torch.bfloat16)
    ss.save(state, checkpoint_id=tmp_path / "c", derive=True)
    target = {"model": blank_of(state["model"])}
    dcp.load(target, storage_reader=StorageReader(tmp_path / "c"), no_dist=True)
    assert nested_equal(target["model"], state["model"])


def test_a_bad_row_is_refused_by_both_readers(tmp_path: Path) -> None:
    master, parameter = pair()
    state = {"m": master, "p": parameter, "f64": master.double(), "other": torch.randn(70, 60), "p2": parameter.clone()}
    state["empty"] = torch.empty(0, 3, dtype=torch.bfloat16)
    ss.save(state, checkpoint_id=tmp_path / "c", derive=True)
    assert derived_names(tmp_path / "c") == {"p": "m"}
    digest = rows_of(tmp_path / "c")["p"]["xxh128"]
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "no such master": ("p", {"derived_from": "nobody"}),
        "of itself": ("p", {"derived_from": "p"}),
        "of a derived one": ("p2", {"derived_from": "p", "xxh128": digest, "chunks": [0, 0]}),
        "of another shape": ("p", {"derived_from": "other"}),
        "of another dtype": ("p", {"derived_from": "f64"}),
        "no digest": ("p", {"xxh128": None}),
        "a digest alone": ("p2", {"xxh128": digest}),
        "a digest that is none": ("p", {"xxh128": digest.upper() + "0"}),
        "a master of no name": ("p", {"derived_from": 7}),
        "with chunks": ("p2", {"derived_from": "m", "xxh128": digest}),
        "beginning in a chunk": ("p", {"at": 64}),
        "in the table": ("p", {"chunks": [1, 0]}),
        "an integer": ("p", {"dtype": "int16"}),
        "a master that derives": ("m", {"derived_from": "other", "xxh128": digest, "chunks": [0, 0]}),
        "nothing": ("empty", {"derived_from": "m", "xxh128": digest, "shape": [60, 70, 0]}),
    }
    for case, (name, change) in cases.items():
        forge = Forge(tmp_path / "c")
        row = next(row for row in forge.header["tensors"] if row["name"] == name)
        row.update(change)
        if case == "no digest":
            del row["xxh128"]
        forge.write(tmp_path / "bad")
        with pytest.raises(ss.CorruptCheckpointError):
            ss.Checkpoint.open(tmp_path / "bad")
        assert not ss.verify(tmp_path / "bad"), case
        with pytest.raises((reference_reader.FormatError, TypeError, KeyError)):
            reference_reader.read(tmp_path / "bad")
        print(case, json.dumps(change))
