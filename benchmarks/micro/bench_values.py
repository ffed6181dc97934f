"""Python values as typed JSON and back: 500 dicts like an optimizer's parameter groups."""

from __future__ import annotations

import json
from typing import Any

import torch

from snapstone import values

GROUPS = 500


def _value() -> dict[str, Any]:
    group = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "foreach": None,
        "fused": False,
        "name": "decay",
        "dtype": torch.bfloat16,
        "params": [1, 2, 3],
    }
    return {f"group.{number}": dict(group, first=number) for number in range(GROUPS)}


def bench_encode_values(benchmark: Any) -> None:
    assert json.dumps(benchmark(values.encode, _value()))


def bench_decode_values(benchmark: Any) -> None:
    value = _value()
    assert benchmark(values.decode, values.encode(value)) == value
