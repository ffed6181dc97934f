"""Random generators of a process as Python values and tensors, for trainers that save none.

What generators give next differs per rank, so what `capture_rng` returns has the rank and the number of ranks in its
key, and ranks save theirs side by side. A run that resumes on as many ranks continues each rank's sequence; one on
another number cannot, and `on_change` says what happens then.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from .errors import IncompatibleCheckpointError

__all__ = ["capture_rng", "restore_rng"]

OnChange = Literal["reseed", "keep", "raise"]


def capture_rng(*, rank: int | None = None, world_size: int | None = None) -> dict[str, Any]:
    """The generators of Python, NumPy and torch (CPU, and the current CUDA device once CUDA is in use).

    Args:
        rank, world_size: whose they are (default: those of torch.distributed, or the only one of one).

    Returns:
        A dict of one entry, named rank-R-of-W, that holds tensors (uint8, int64) and numbers. Any engine saves it, and
        none needs pickle for it.
    """
    return {_key(*_place(rank, world_size)): _generators()}


def restore_rng(
    saved: Mapping[str, Any],
    *,
    on_change: OnChange = "reseed",
    rank: int | None = None,
    world_size: int | None = None,
) -> bool:
    """Continues where the generators were.

    Args:
        saved: what `capture_rng` returned, of this rank or of any number of them.
        on_change: when `saved` is of another number of ranks: "reseed" seeds every generator from what rank 0 saved and
            from this rank's place, the same way each time, and warns on rank 0; "keep" leaves them alone; "raise".
        rank, world_size: as in `capture_rng`.

    Returns:
        Whether the sequences continue exactly.

    Raises:
        IncompatibleCheckpointError: `saved` holds no generators, or only those of another number of ranks, with
            on_change="raise".
    """
    rank, world_size = _place(rank, world_size)
    own = saved.get(_key(rank, world_size))
    if own is not None:
        _restore(own)
        return True
    others = sorted(key for key in saved if key.startswith("rank-"))
    if not others:
        raise IncompatibleCheckpointError(f"no random generators among {sorted(saved)[:5]}")
    change = f"random generators of {len(others)} other ranks ({others[0]}, ...), and none of {_key(rank, world_size)}"
    if on_change == "raise":
        raise IncompatibleCheckpointError(change)
    if on_change == "reseed":
        if rank == 0:
            warnings.warn(f"{change}: seeded anew from these", stacklevel=2)
        _reseed(saved[others[0]], rank, world_size)
    return False


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    distributed = dist.is_available() and dist.is_initialized()
    if rank is None:
        rank = dist.get_rank() if distributed else 0
    if world_size is None:
        world_size = dist.get_world_size() if distributed else 1
    return rank, world_size


def _key(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}"


def _generators() -> dict[str, Any]:
    numpy = np.random.get_state(legacy=False)
    version, words, gauss = random.getstate()
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
    }
    if numpy["bit_generator"] == "MT19937":  # what else somebody has set as the global one is theirs to save
        found["numpy"] = {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        }
    if _cuda_in_use():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _restore(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["torch"].cpu())
    python = saved["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if (numpy := saved.get("numpy")) is not None:
        key = numpy["key"].cpu().numpy().astype(np.uint32)
        np.random.set_state(
            {
                "bit_generator": "MT19937",
                "state": {"key": key, "pos": numpy["pos"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            }
        )
    if "cuda" in saved and _cuda_in_use():
        torch.cuda.set_rng_state(saved["cuda"].cpu())


def _reseed(saved: Mapping[str, Any], rank: int, world_size: int) -> None:
    digest = hashlib.sha256(saved["torch"].cpu().numpy().tobytes())
    digest.update(f"{rank}/{world_size}".encode())
    seed = int.from_bytes(digest.digest()[:8], "little") >> 1
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)  # of CUDA devices as well


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
