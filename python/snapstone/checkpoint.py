"""Checkpoint: a committed checkpoint, read lazily."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from types import TracebackType
from typing import Any, Self

import torch

from . import difference, lineage, manifest, state, tensors, values
from .index import StoredTensor
from .manifest import Manifest
from .plan import TensorItem
from .reader import Reader
from .tensors import LocalShard

__all__ = ["Checkpoint", "TensorSlice"]


class Checkpoint:
    """A committed checkpoint. Tensors and values are read, and verified, when asked for.

    Attributes:
        path: the directory. step, metadata, metrics (`metadata["metrics"]`), format_version, save_id, world_size:
            from the manifest.
        nbytes: bytes of all tensors. own_nbytes: bytes of the data files that this save wrote. shared_nbytes: bytes of
            the chunks that it took over from earlier saves, as they are stored, padding included; opens the indexes.
        stats: what the save or load that returned this object did.
        missing_keys, unexpected_keys: of a load with strict=False.
    """

    def __init__(
        self,
        source: Reader | str,
        document: Manifest | None = None,
        *,
        device: str | torch.device = "cpu",
        stats: Mapping[str, Any] | None = None,
        missing_keys: Sequence[str] = (),
        unexpected_keys: Sequence[str] = (),
    ) -> None:
        self._opened = source if isinstance(source, Reader) else None
        self.path = source.path if isinstance(source, Reader) else source
        self.manifest = source.manifest if isinstance(source, Reader) else document or manifest.read(source)
        self.device = torch.device(device)
        self.stats: Mapping[str, Any] = stats or {}
        self.missing_keys = missing_keys
        self.unexpected_keys = unexpected_keys

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Self:
        """Opens the checkpoint at `path`; its manifest and indexes are read and checked now, tensors on demand, onto
        `device`.

        Raises:
            CheckpointNotFoundError, IncompleteCheckpointError, CorruptCheckpointError, IncompatibleCheckpointError: as
                from `load`.
        """
        return cls(Reader(path), device=device)

    @classmethod
    def committed(cls, path: str, document: Manifest, stats: Mapping[str, Any]) -> Self:
        """What a save returns: nothing is read back until asked for."""
        return cls(path, document, stats=stats)

    @property
    def step(self) -> int | None:
        return self.manifest.step

    @property
    def save_id(self) -> str:
        return self.manifest.save_id

    @property
    def world_size(self) -> int:
        return self.manifest.world_size

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {key: values.decode(value, name=key) for key, value in self.manifest.metadata.items()}

    @property
    def metrics(self) -> Mapping[str, float]:
        """`metadata["metrics"]`: those entries that are numbers a float can hold."""
        found = self.metadata.get("metrics")
        numbers: dict[str, float] = {}
        for key, value in found.items() if isinstance(found, dict) else ():
            if isinstance(value, Real):
                with suppress(OverflowError):
                    numbers[str(key)] = float(value)
        return numbers

    @property
    def format_version(self) -> tuple[int, int]:
        return self.manifest.format_version

    @property
    def nbytes(self) -> int:
        return self.manifest.nbytes

    @property
    def own_nbytes(self) -> int:
        return sum(entry.nbytes for writer in self.manifest.writers for entry in writer.data)

    @property
    def shared_nbytes(self) -> int:
        if not self.manifest.shared:
            return 0
        return sum(one.used_bytes for one in lineage.ancestors(self.manifest, self.reader.indexes))

    @property
    def reader(self) -> Reader:
        if self._opened is None:
            self._opened = Reader(self.path)
        return self._opened

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened = None

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, step={self.step}, nbytes={self.nbytes}, world_size={self.world_size})"

    def keys(self) -> Sequence[str]:
        """Names of the tensors, in the order saved."""
        return list(self.reader.shards)

    def describe(self, name: str) -> TensorItem:
        """dtype and global shape of a tensor. KeyError if there is none of that name."""
        return self.reader.describe(name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, assembled from all shards and verified, in its saved dtype and global shape."""
        return self.load_tensors([name])[name]

    def get_slice(self, name: str) -> TensorSlice:
        """A lazy view: indexing it reads only the chunks that it needs."""
        return TensorSlice(self, self.describe(name))

    def load_tensors(self, keys: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Several tensors (default: all) in one pass over the files. Names that share bytes share memory."""
        names = list(self.keys()) if keys is None else list(keys)
        loaded: dict[str, torch.Tensor] = {}
        shared: dict[Any, torch.Tensor] = {}
        targets = []
        for name in names:
            item = self.describe(name)
            place = (
                item.dtype,
                item.shape,
                tuple((shard.table, *_bytes_of(shard.stored)) for shard in self.reader.shards[name]),
            )
            if place in shared and item.nbytes:
                loaded[name] = shared[place]
                continue
            whole = item._replace(offsets=(0,) * len(item.shape), sizes=item.shape)
            loaded[name] = shared[place] = self.reader.empty(whole, self.device)
            targets.extend(tensors.describe(name, loaded[name]))
        self.reader.fill(targets)
        if self.device.type == "cpu":
            return loaded
        return {name: tensor.to(self.device) for name, tensor in loaded.items()}

    def objects(self, rank: int = 0, *, allow_pickle: bool = False) -> Mapping[str, Any]:
        """The Python values by name, as `rank` saved them. Pickled values, which can run code, are refused without
        `allow_pickle`.
        """
        encoded = self.reader.objects(rank)
        return {n: values.decode(one, name=n, allow_pickle=allow_pickle) for n, (_, one) in encoded.items()}

    def state_dict(self, rank: int = 0, *, allow_pickle: bool = False) -> dict[Any, Any]:
        """Tensors and values nested as they were saved; tuples that held tensors come back as lists. Pickled values are
        refused without `allow_pickle`.
        """
        everything: dict[str, Any] = {**self.load_tensors(), **self.objects(rank, allow_pickle=allow_pickle)}
        objects = self.reader.objects(rank)
        encoded = {**self.reader.shards.paths, **{name: path for name, (path, _) in objects.items()}}
        paths = {name: (name,) if path is None else state.decode_path(path) for name, path in encoded.items()}
        return state.unflatten(paths, everything)

    def diff(self, other: Checkpoint | str | os.PathLike[str], *, values: bool = False) -> difference.Difference:
        """What is in this checkpoint and not, or not the same, in `other`; with `values` the largest absolute
        differences.
        """
        theirs = other if isinstance(other, Checkpoint) else Checkpoint.open(other)
        return difference.compare(self, theirs, values=values)


def _bytes_of(stored: StoredTensor) -> tuple[Any, ...]:
    """Equal for shards of one writer that were tied: a writer derives from a master once."""
    return (stored.place, stored.derived_from, stored.item.offsets if stored.derived_from else ())


class TensorSlice:
    """A tensor not read yet: `shape`, `dtype`, and indexing with integers, slices (step 1 and more), `...` as torch
    does.
    """

    def __init__(self, checkpoint: Checkpoint, item: TensorItem) -> None:
        self._checkpoint = checkpoint
        self._item = item
        self.shape = torch.Size(item.shape)
        self.dtype = tensors.dtype_named(item.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self._item.dtype

    def __getitem__(self, key: Any) -> torch.Tensor:
        index = self._normal(key)
        offsets: list[int] = []
        sizes: list[int] = []
        rest: list[int | slice] = []
        for part, extent in zip(index, self.shape, strict=True):
            if isinstance(part, int):
                at = part + extent if part < 0 else part
                if not 0 <= at < extent:
                    raise IndexError(f"{self._item.name}: index {part} is out of range for a dimension of {extent}")
                offsets.append(at)
                sizes.append(1)
                rest.append(0)
                continue
            start, stop, step = part.indices(extent)
            if step < 1:
                raise ValueError(f"{self._item.name}: slices need a positive step")
            offsets.append(start)
            sizes.append(max(0, stop - start))
            rest.append(slice(None, None, step))
        nbytes = math.prod(sizes) * self.dtype.itemsize
        item = self._item._replace(offsets=tuple(offsets), sizes=tuple(sizes), nbytes=nbytes)
        box = self._checkpoint.reader.empty(item, self._checkpoint.device)
        self._checkpoint.reader.fill([LocalShard(item, box)])
        return box[tuple(rest)].to(self._checkpoint.device)

    def _normal(self, key: Any) -> list[int | slice]:
        parts = list(key) if isinstance(key, tuple) else [key]
        given = [part for part in parts if part is not Ellipsis]
        if len(given) > len(self.shape) or len(parts) - len(given) > 1:
            raise IndexError(f"{self._item.name}: too many indices for shape {list(self.shape)}")
        if any(isinstance(part, bool) or not isinstance(part, slice | Integral) for part in given):
            raise TypeError(f"{self._item.name}: index with integers, slices and '...'")
        parts = [int(part) if isinstance(part, Integral) else part for part in parts]
        fill = [slice(None)] * (len(self.shape) - len(given))
        at = next((position for position, part in enumerate(parts) if part is Ellipsis), len(parts))
        return [*parts[:at], *fill, *parts[at + 1 :]]
