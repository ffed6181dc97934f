"""zstd: the same tensors back, fewer bytes where they compress, the same files every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import snapstone as ss
from roundtrip.bits import DTYPES, assert_same, files_of, other_bits, random_bits
from snapstone import config

MIB = 1 << 20

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")


@pytest.mark.parametrize("codec", ["zstd", "zstd:1", "zstd:-5", "zstd:19"])
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, codec: str) -> None:
    state = {}
    for dtype in DTYPES:
        for shape in [(), (0,), (3, 5), (40_000,)]:
            state[f"{dtype} {shape} random"] = random_bits(dtype, *shape, seed=1)
            state[f"{dtype} {shape} zero"] = (
                torch.zeros(shape, dtype=torch.uint8).to(torch.bool).view(torch.bool)
                if (dtype is torch.bool)
                else torch.zeros(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)
                .view(dtype)
                .reshape(shape)
            )
    state["strided"] = random_bits(torch.float32, 300, 200).t()
    ss.save(state, checkpoint_id=tmp_path / "c", codec=codec)
    target = {name: other_bits(tensor) for name, tensor in state.items()}
    ss.load(target, checkpoint_id=tmp_path / "c")
    for name, tensor in state.items():
        assert_same(target[name], tensor, name)
    assert ss.verify(tmp_path / "c")


def weights(dtype: torch.dtype) -> torch.Tensor:
    """Bytes as trained weights have them: the exponents repeat, the mantissas do not."""
    return torch.randn(2 * MIB, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)


@pytest.mark.parametrize(
    ("tensor", "ratio"),
    [
        (torch.zeros(8 * MIB, dtype=torch.uint8), 0.01),
        (torch.arange(MIB, dtype=torch.int64) // 100, 0.3),
        (weights(torch.bfloat16), 0.8),
        (weights(torch.float32), 0.95),
        (weights(torch.float16), 0.95),
    ],
    ids=["zeros", "integers", "bfloat16", "float32", "float16"],
)
def test_what_compresses_is_smaller(tmp_path: Path, tensor: torch.Tensor, ratio: float) -> None:
    saved = ss.save({"t": tensor}, checkpoint_id=tmp_path / "c", codec="zstd")
    assert saved.nbytes == tensor.nbytes
    assert saved.own_nbytes < ratio * tensor.nbytes
    assert (tmp_path / "c" / "rank-00000.data").stat().st_size == saved.own_nbytes
    assert_same(ss.Checkpoint.open(tmp_path / "c").get_tensor("t"), tensor)


def test_what_does_not_compress_costs_nothing(tmp_path: Path) -> None:
    tensor = random_bits(torch.uint8, 5 * MIB, seed=1)
    plain = ss.save({"t": tensor}, checkpoint_id=tmp_path / "plain")
    packed = ss.save({"t": tensor}, checkpoint_id=tmp_path / "zstd", codec="zstd")
    assert packed.own_nbytes == plain.own_nbytes == 5 * MIB


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_equal_states_give_equal_data_files(tmp_path: Path, codec: str | None) -> None:
    state = {f"t{i}": weights(torch.float32)[: 100_000 * i + 1] for i in range(8)} | {"small": torch.ones(3), "n": 1}
    for number in range(3):
        ss.save(state, checkpoint_id=tmp_path / str(number), codec=codec)
    first, *others = (files_of(tmp_path / str(number)) for number in range(3))
    for other in others:
        assert other["rank-00000.data"] == first["rank-00000.data"]
        ids = [ss.Checkpoint.open(tmp_path / name).save_id.encode() for name in "012"]
        assert {files_of(tmp_path / str(n))["rank-00000.index"].replace(ids[n], b"") for n in range(3)} == {
            first["rank-00000.index"].replace(ids[0], b"")
        }


def test_compressed_and_plain_checkpoints_say_the_same_of_their_tensors(tmp_path: Path) -> None:
    state = {"t": weights(torch.bfloat16), "u": torch.zeros(3 * MIB, dtype=torch.uint8)}
    ss.save(state, checkpoint_id=tmp_path / "plain")
    ss.save(state, checkpoint_id=tmp_path / "zstd", codec="zstd")
    plain, packed = ss.Checkpoint.open(tmp_path / "plain"), ss.Checkpoint.open(tmp_path / "zstd")
    assert not plain.diff(packed)
    assert plain.nbytes == packed.nbytes


def test_a_spoilt_compressed_byte_is_found_and_named(tmp_path: Path) -> None:
    ss.save({"a": torch.ones(10), "t": weights(torch.float32)}, checkpoint_id=tmp_path / "c", codec="zstd")
    data = tmp_path / "c" / "rank-00000.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0x10
    data.write_bytes(content)
    with pytest.raises(ss.CorruptCheckpointError) as caught:
        ss.load({"a": torch.zeros(10), "t": torch.zeros(2 * MIB)}, checkpoint_id=tmp_path / "c")
    assert (caught.value.tensor, caught.value.rank) == ("t", 0)
    assert caught.value.path == str(data)
    assert not ss.verify(tmp_path / "c")


@pytest.mark.parametrize("codec", ["gzip", "zstd:", "zstd:0", "zstd:23", "zstd:-8", "zstd:fast", "", "ZSTD"])
def test_a_codec_that_is_none_is_refused(tmp_path: Path, codec: str) -> None:
    if codec == "zstd:":
        ss.save({}, checkpoint_id=tmp_path / "c", codec=codec)  # the default level
        return
    with pytest.raises(ValueError, match="codec="):
        ss.save({}, checkpoint_id=tmp_path / "c", codec=codec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", ["zstd", "xor-zstd:1"])
def test_a_build_without_zstd_refuses_its_codecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    monkeypatch.setattr(config, "zstd_compiled_in", lambda: False)  # test_bundled_build.py has a real one
    with pytest.raises(ValueError, match=f"codec='{codec}': this build of snapstone has no zstd; use None"):
        ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c", codec=codec)
    assert list(tmp_path.iterdir()) == []
