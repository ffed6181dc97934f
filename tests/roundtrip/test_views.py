"""Any strides in, any strides out. Stored is the tensor in row-major order, not the storage that it looks into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

import snapstone as ss
from roundtrip.bits import assert_same, bits_of, files_of, random_bits

PAGE = 4096


def base(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return random_bits(dtype, *shape, seed=sum(shape))


VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: base(300, 200).t(),
    "permuted": lambda: base(20, 30, 40).permute(2, 0, 1),
    "channels last": lambda: base(4, 3, 32, 31).to(memory_format=torch.channels_last),
    "every other row": lambda: base(100, 50)[::2],
    "every third column": lambda: base(100, 50)[:, ::3],
    "a column": lambda: base(1000, 7)[:, 3],
    "a block": lambda: base(64, 64)[10:30, 20:50],
    "bytes in steps": lambda: base(100_000, dtype=torch.uint8)[1::3],
    "shorts in steps": lambda: base(999, 5, dtype=torch.bfloat16)[::2, ::2],
    "sixteen bytes in steps": lambda: base(99, 5, dtype=torch.complex128)[::2, 1::2],
    "a step that is no multiple of the tile": lambda: base(131, 137).t()[3::5, 1:],
    "overlapping windows": lambda: base(100).as_strided((50, 10), (1, 3)),
    "diagonal": lambda: base(64, 64).diagonal(),
    "middle of a storage": lambda: base(5000)[1234:4321],
    "odd address": lambda: base(1000, dtype=torch.uint8)[3:803].view(torch.int8),
    "five dimensions": lambda: base(3, 4, 5, 6, 7).permute(4, 1, 3, 0, 2)[1:, :, ::2],
    "size one with odd strides": lambda: base(10).as_strided((1, 5, 1), (777, 2, 333)),
    "several chunks, transposed": lambda: base(1025, 769).t(),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_is_stored_as_what_it_shows(tmp_path: Path, kind: str) -> None:
    view = VIEWS[kind]()
    saved = ss.save({"w": view}, checkpoint_id=tmp_path / "view")
    assert saved.nbytes == view.nbytes
    assert_same(ss.Checkpoint.open(tmp_path / "view").get_tensor("w"), view)
    # The same bytes as a contiguous copy of it: nothing on disk tells strides.
    ss.save({"w": view.contiguous().clone()}, checkpoint_id=tmp_path / "copy")
    data = [files_of(tmp_path / name)["rank-00000.data"] for name in ("view", "copy")]
    assert data[0] == data[1]


@pytest.mark.parametrize("kind", sorted(VIEWS.keys() - {"overlapping windows"}))
def test_a_view_is_filled_and_what_lies_around_it_is_not(tmp_path: Path, kind: str) -> None:
    view = VIEWS[kind]()
    wanted = view.contiguous().clone()
    ss.save({"w": wanted}, checkpoint_id=tmp_path / "c")
    storage = torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage())
    storage.fill_(0x5A)
    ss.load({"w": view}, checkpoint_id=tmp_path / "c")
    assert_same(view, wanted)
    inside = torch.zeros(storage.numel() // view.dtype.itemsize, dtype=torch.bool)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    assert (storage[~inside.repeat_interleave(view.dtype.itemsize)] == 0x5A).all()


def test_only_the_view_into_a_large_storage_is_stored(tmp_path: Path) -> None:
    storage = base(4 << 20)
    view = storage[1000:1100]
    saved = ss.save({"w": view}, checkpoint_id=tmp_path / "c")
    assert (saved.nbytes, saved.own_nbytes) == (400, PAGE)
    assert_same(ss.Checkpoint.open(tmp_path / "c").get_tensor("w"), view)


def test_an_expanded_tensor_is_stored_in_full_and_cannot_be_a_target(tmp_path: Path) -> None:
    row = base(64)
    state = {"rows": row.expand(1000, 64), "number": torch.tensor(7).expand(33)}
    saved = ss.save(state, checkpoint_id=tmp_path / "c")
    assert saved.nbytes == 1000 * 64 * 4 + 33 * 8
    for name, tensor in ss.Checkpoint.open(tmp_path / "c").load_tensors().items():
        assert_same(tensor, state[name])
    before = bits_of(row)
    with pytest.raises(ValueError, match=r"^rows: .*\.contiguous\(\)"):
        ss.load(dict(state), checkpoint_id=tmp_path / "c")
    assert bits_of(row) == before


def test_lazy_conjugation_and_negation_are_resolved_and_never_taken_for_ties(tmp_path: Path) -> None:
    number = base(100, dtype=torch.complex64).nan_to_num()
    state = {
        "plain": number,
        "conj": number.conj(),
        "imag": number.imag,
        "neg": number.conj().imag,
        "conj_t": number.reshape(10, 10).t().conj(),
        "adjoint": number.reshape(10, 10).mH,
    }
    assert state["conj"].is_conj()
    assert state["neg"].is_neg()
    ss.save(state, checkpoint_id=tmp_path / "c")
    opened = ss.Checkpoint.open(tmp_path / "c")
    for name, tensor in state.items():
        assert_same(opened.get_tensor(name), tensor.clone().resolve_conj().resolve_neg(), name)


def test_lazy_conjugation_and_negation_as_targets(tmp_path: Path) -> None:
    wanted = {"conj": base(10, dtype=torch.complex64).nan_to_num(), "neg": base(10).nan_to_num()}
    ss.save(wanted, checkpoint_id=tmp_path / "c")
    under = {name: torch.zeros(10, dtype=torch.complex64) for name in wanted}
    target = {"conj": under["conj"].conj(), "neg": under["neg"].conj().imag}
    ss.load(target, checkpoint_id=tmp_path / "c")
    assert torch.equal(target["conj"], wanted["conj"])
    assert torch.equal(under["conj"], wanted["conj"].conj())
    assert torch.equal(target["neg"], wanted["neg"])


def test_tensors_that_overlap_in_memory_are_stored_each_in_full(tmp_path: Path) -> None:
    whole = base(1000)
    state = {"whole": whole, "head": whole[:600], "tail": whole[400:], "as_int": whole.view(torch.int32)}
    ss.save(state, checkpoint_id=tmp_path / "c")
    for name, tensor in ss.Checkpoint.open(tmp_path / "c").load_tensors().items():
        assert_same(tensor, state[name], name)


def random_view(random: Random) -> torch.Tensor:
    """A random permutation and random slices of a small dense tensor, of 1 to 16 bytes an element."""
    dtype = random.choice([torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128])
    shape = [random.randint(1, 9) for _ in range(random.randint(1, 5))]
    tensor = random_bits(dtype, *shape, seed=random.randrange(10)).permute(random.sample(range(len(shape)), len(shape)))
    index = []
    for size in tensor.shape:
        start = random.randrange(size)
        index.append(slice(start, random.randint(start, size), random.randint(1, 4)))
    return tensor[tuple(index)]


@pytest.mark.parametrize("seed", range(4))
def test_random_views_go_out_and_in(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    state = {str(number): random_view(random) for number in range(200)}
    wanted = {name: view.clone(memory_format=torch.contiguous_format) for name, view in state.items()}
    ss.save(state, checkpoint_id=tmp_path / "c")
    for view in state.values():
        view.copy_(torch.zeros((), dtype=view.dtype))
    ss.load(state, checkpoint_id=tmp_path / "c")
    for name, view in state.items():
        assert bits_of(view) == bits_of(wanted[name]), (name, view.shape, view.stride(), view.dtype)
