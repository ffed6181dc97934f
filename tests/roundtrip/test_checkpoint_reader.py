"""Checkpoint, the lazy reader: any part of any tensor as torch would index it, reading only what that needs."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import snapstone as ss
from roundtrip.bits import DTYPES, assert_same, bits_of, nested_equal, random_bits
from snapstone.tensors import describe

MIB = 1 << 20

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")


def saved(path: Path, state: dict[str, Any], **options: Any) -> ss.Checkpoint:
    ss.save(state, checkpoint_id=path, **options)
    return ss.Checkpoint.open(path)


def test_what_it_says_about_itself(tmp_path: Path) -> None:
    state = {"b": torch.ones(3), "a": {"c": torch.zeros(2, dtype=torch.int8)}, "n": 5}
    written = ss.save(state, checkpoint_id=tmp_path / "c", step=9, metadata={"metrics": {"loss": 1}})
    opened = ss.Checkpoint.open(tmp_path / "c")
    for checkpoint in (written, opened):
        assert checkpoint.path == str(tmp_path / "c")
        assert (checkpoint.step, checkpoint.nbytes, checkpoint.own_nbytes) == (9, 14, 4096)
        assert checkpoint.format_version == (1, 0)
        assert checkpoint.world_size == 1
        assert checkpoint.metrics == {"loss": 1.0}
        assert list(checkpoint.keys()) == ["b", "a.c"]
        assert dict(checkpoint.objects()) == {"n": 5}
        assert "step=9" in repr(checkpoint)
        assert str(tmp_path / "c") in repr(checkpoint)
        assert list(checkpoint.missing_keys) == list(checkpoint.unexpected_keys) == []
    assert written.save_id == opened.save_id
    assert len(opened.save_id) == 32


def test_a_relative_path_and_a_path_object_open_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ss.save({"t": torch.ones(1)}, checkpoint_id="runs/c")
    assert (tmp_path / "runs" / "c").is_dir()
    for path in ("runs/c", "runs/../runs/c/", Path("runs/c"), str(tmp_path / "runs" / "c")):
        assert ss.Checkpoint.open(path).get_tensor("t").tolist() == [1.0]


def test_tensors_are_new_each_time_and_writable(tmp_path: Path) -> None:
    with saved(tmp_path / "c", {"t": torch.ones(3)}) as checkpoint:
        first, second = checkpoint.get_tensor("t"), checkpoint.get_tensor("t")
        first.zero_()
        assert second.tolist() == [1.0] * 3
        assert not first.requires_grad
    assert checkpoint.get_tensor("t").tolist() == [1.0] * 3  # the context only lets go of what was read


def test_several_tensors_in_one_pass(tmp_path: Path) -> None:
    state = {f"t{i}": random_bits(torch.float32, 100 * i, seed=i) for i in range(10)}
    checkpoint = saved(tmp_path / "c", state)
    assert nested_equal(checkpoint.load_tensors(), state)
    some = checkpoint.load_tensors(["t7", "t3"])
    assert list(some) == ["t7", "t3"]
    assert nested_equal(some, {name: state[name] for name in some})
    assert checkpoint.load_tensors([]) == {}


@pytest.mark.parametrize("call", ["get_tensor", "get_slice", "describe"])
def test_a_name_that_is_not_there_is_a_key_error(tmp_path: Path, call: str) -> None:
    checkpoint = saved(tmp_path / "c", {"t": torch.ones(1), "n": 1})
    for name in ("u", "n", ""):
        with pytest.raises(KeyError, match=repr(name)):
            getattr(checkpoint, call)(name)
    with pytest.raises(KeyError):
        checkpoint.load_tensors(["t", "u"])


# ---- slices


def random_index(source: random.Random, shape: tuple[int, ...]) -> Any:
    parts: list[Any] = []
    for size in shape:
        kind = source.random()
        if kind < 0.3 and size:
            parts.append(source.randrange(-size, size))
        elif kind < 0.5:
            parts.append(slice(None))
        else:
            bounds = [source.choice([None, source.randint(-size - 3, size + 3)]) for _ in range(2)]
            parts.append(slice(*bounds, source.choice([None, 1, 2, 3, size + 5])))
    cut = source.randint(0, len(parts))
    if source.random() < 0.5:
        at = source.randint(0, cut)
        kept = source.randint(0, len(parts) - cut) if len(parts) > cut else 0
        return (*parts[:at], Ellipsis, *parts[len(parts) - kept :])
    index = tuple(parts[:cut])
    return index[0] if len(index) == 1 and source.random() < 0.5 else index


@pytest.mark.parametrize("seed", range(6))
def test_a_slice_is_what_torch_gives(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    shapes = [(), (7,), (0, 4), (5, 6), (3, 1, 4), (2, 3, 4, 5), (1 << 17, 5)]
    state = {
        str(shape): random_bits(source.choice([torch.float32, torch.uint8]), *shape, seed=seed) for shape in shapes
    }
    checkpoint = saved(tmp_path / "c", state, codec=source.choice([None, "zstd"]))
    for _ in range(120):
        name, tensor = source.choice(sorted(state.items()))
        index = random_index(source, tuple(tensor.shape))
        part = checkpoint.get_slice(name)[index]
        assert_same(part, tensor[index], (name, index))


def test_a_slice_of_every_dtype(tmp_path: Path) -> None:
    state = {str(dtype): random_bits(dtype, 9, 5, seed=3) for dtype in DTYPES}
    checkpoint = saved(tmp_path / "c", state)
    for name, tensor in state.items():
        part = checkpoint.get_slice(name)
        assert (part.shape, part.dtype, part.nbytes) == (tensor.shape, tensor.dtype, tensor.nbytes)
        assert part.get_shape() == [9, 5]
        assert f"torch.{part.get_dtype()}" == name
        assert bits_of(part[2:7, 1]) == bits_of(tensor[2:7, 1].clone())


def test_a_slice_reads_only_its_chunks(tmp_path: Path) -> None:
    tensor = random_bits(torch.uint8, 64, MIB // 2, seed=1)
    checkpoint = saved(tmp_path / "c", {"other": torch.ones(MIB), "t": tensor})
    data = tmp_path / "c" / "rank-00000.data"
    at = data.read_bytes().index(bits_of(tensor[0])[:4096])
    with data.open("r+b") as file:  # every chunk but the one of rows 20 and 21 is spoilt
        for chunk in range(32):
            if chunk != 10:
                file.seek(at + chunk * MIB + 77)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
    part = checkpoint.get_slice("t")
    assert_same(part[20:22], tensor[20:22])
    assert_same(part[21, ::1000], tensor[21, ::1000])
    for index in (19, slice(20, 23), slice(None)):
        with pytest.raises(ss.CorruptCheckpointError) as caught:
            part[index]
        assert caught.value.tensor == "t"


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (3, IndexError),
        (-4, IndexError),
        ((0, 0, 0), IndexError),
        ((..., ...), IndexError),
        (slice(None, None, -1), ValueError),
        (slice(None, None, 0), ValueError),
        (None, TypeError),
        ([0, 1], TypeError),
        (True, TypeError),
        (1.0, TypeError),
        (torch.tensor([0]), TypeError),
        ("a", TypeError),
    ],
    ids=repr,
)
def test_an_index_that_is_none_is_refused_by_type(tmp_path: Path, index: Any, error: type[Exception]) -> None:
    part = saved(tmp_path / "c", {"t": torch.ones(3, 2)}).get_slice("t")
    with pytest.raises(error, match=r"^t: |^slice step cannot be zero"):
        part[index]


def test_numpy_integers_index_like_integers(tmp_path: Path) -> None:
    tensor = torch.arange(12).reshape(3, 4)
    part = saved(tmp_path / "c", {"t": tensor}).get_slice("t")
    assert_same(part[np.int64(1)], tensor[1])
    assert_same(part[np.int64(1) : np.int32(3), np.uint8(2)], tensor[1:3, 2])


# ---- diff


def test_diff_tells_what_changed(tmp_path: Path) -> None:
    big = random_bits(torch.uint8, 3 * MIB, seed=1)
    before = {
        "same": torch.ones(5),
        "big": big,
        "small": torch.zeros(4),
        "gone": torch.ones(1),
        "shape": torch.ones(2),
        "n": 1,
        "k": [1],
    }
    changed = big.clone()
    changed[MIB + 5] ^= 1
    after = {"same": torch.ones(5), "big": changed, "small": torch.tensor([0.0, 0.5, 0.0, -2.0]), "new": torch.ones(1)}
    after |= {"shape": torch.ones(3), "n": 2, "k": [1]}
    first, second = saved(tmp_path / "a", before), saved(tmp_path / "b", after)
    found = first.diff(second)
    assert found
    assert (found.added, found.removed, found.changed_objects, found.same_tensors) == (("new",), ("gone",), ("n",), 1)
    changes = {change.name: change for change in found.changed}
    assert sorted(changes) == ["big", "shape", "small"]
    assert (changes["big"].nbytes, changes["big"].changed_bytes) == (3 * MIB, MIB)
    nbytes, new = 20 + 3 * MIB + 16 + 4 + 12, 4 + 12  # same, big, small, new, shape
    assert (found.nbytes, found.changed_bytes) == (nbytes, MIB + 16 + new)
    assert found.changed_share == (MIB + 16 + new) / nbytes
    assert (changes["shape"].before, changes["shape"].after) == ("float32[2]", "float32[3]")
    assert all(change.max_abs_difference is None for change in found.changed)
    with_values = {change.name: change for change in first.diff(tmp_path / "b", values=True).changed}
    assert with_values["small"].max_abs_difference == 2.0
    assert with_values["big"].max_abs_difference == 1.0
    assert with_values["shape"].max_abs_difference is None


def test_the_same_state_saved_twice_does_not_differ(tmp_path: Path) -> None:
    state = {str(dtype): random_bits(dtype, 50, seed=1) for dtype in DTYPES} | {
        "n": [1],
        "big": random_bits(torch.uint8, MIB),
    }
    first = saved(tmp_path / "a", state)
    second = saved(tmp_path / "b", dict(reversed(state.items())), codec="zstd")
    assert not first.diff(second)
    assert not first.diff(first)
    assert first.diff(second).same_tensors == len(DTYPES) + 1
    assert first.diff(second).changed_share == 0
    assert saved(tmp_path / "empty", {}).diff(saved(tmp_path / "empty-too", {})).changed_share == 0


def test_other_chunk_sizes_are_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"t": random_bits(torch.uint8, 3 * MIB, seed=1)}  # three chunks either way, cut at other places
    first = saved(tmp_path / "a", state)
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(MIB + MIB // 4))
    assert not first.diff(saved(tmp_path / "b", state))
    assert ss.verify(tmp_path / "b")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_diff_with_values_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.zeros(8 * dtype.itemsize, dtype=torch.uint8)
    one, other = raw.view(dtype), raw.clone()
    other[-1] = 1
    change = (
        saved(tmp_path / "a", {"t": one}).diff(saved(tmp_path / "b", {"t": other.view(dtype)}), values=True).changed[0]
    )
    assert change.name == "t"
    # Without arithmetic for a dtype (float4) there is no difference of values to tell.
    assert change.max_abs_difference is None or change.max_abs_difference > 0


# ---- rebuild


def test_state_dict_goes_straight_into_a_model_and_an_optimizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = saved(tmp_path / "c", {"model": model, "optim": optimizer}).state_dict()
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    other_optimizer = torch.optim.AdamW(other.parameters())
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optim"])
    assert nested_equal(dict(other.state_dict()), dict(model.state_dict()))
    assert nested_equal(other_optimizer.state_dict(), optimizer.state_dict())


def test_errors_about_a_checkpoint_survive_pickle_and_copy(tmp_path: Path) -> None:
    with pytest.raises(ss.CheckpointNotFoundError) as caught:
        ss.Checkpoint.open(tmp_path / "none")
    for error in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert type(error) is ss.CheckpointNotFoundError
        assert error.filename == str(tmp_path / "none")


def test_open_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ss.IncompleteCheckpointError):
        ss.Checkpoint.open(tmp_path / "empty")
    saved(tmp_path / "c", {"t": torch.ones(1)})
    (tmp_path / "c" / "rank-00000.index").unlink()
    with pytest.raises(ss.IncompleteCheckpointError, match="index file is missing"):
        ss.Checkpoint.open(tmp_path / "c")


@pytest.mark.parametrize("verify", [True, False])
def test_a_checkpoint_that_is_removed_while_it_is_read_is_not_called_corrupt(tmp_path: Path, verify: bool) -> None:
    checkpoint = saved(tmp_path / "c", {"t": torch.ones(1000)})
    with (tmp_path / "c" / "rank-00000.data").open("r+b") as data:
        data.write(bytes(100))
    (tmp_path / "c" / "MANIFEST.json").unlink()
    targets = describe("t", torch.zeros(1000))
    with pytest.raises(ss.CheckpointError, match="the checkpoint was removed while it was read") as caught:
        checkpoint.reader.fill(targets, verify=verify)
    assert type(caught.value) is ss.CheckpointError
    assert caught.value.path == str(tmp_path / "c")
