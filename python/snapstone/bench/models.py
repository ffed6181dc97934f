"""Named models: their sizes, what a training checkpoint of each holds, and a decoder-only transformer that trains.

Sizes are those of the published configurations (Llama 3: arXiv 2407.21783, table 3; 1B and 3B: Llama 3.2; SmolLM2:
arXiv 2502.02737), with a head of its own where the original ties it to the embedding. Counting needs no torch: a size
can be refused before it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = ["MODELS", "Precision", "Shape", "StateTensor", "build", "shape_of", "state_nbytes", "training_state"]

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder-only transformer: rotary positions, grouped key and value heads, gated feed-forward, RMS norms."""

    name: str
    layers: int
    width: int
    heads: int
    key_heads: int
    hidden: int  # of the feed-forward
    vocabulary: int

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter, in the order of the module."""
        key_width = self.width // self.heads * self.key_heads
        yield "embed.weight", (self.vocabulary, self.width)
        for number in range(self.layers):
            block = f"blocks.{number}"
            yield f"{block}.norm_attention.weight", (self.width,)
            yield f"{block}.query.weight", (self.width, self.width)
            yield f"{block}.key.weight", (key_width, self.width)
            yield f"{block}.value.weight", (key_width, self.width)
            yield f"{block}.out.weight", (self.width, self.width)
            yield f"{block}.norm_hidden.weight", (self.width,)
            yield f"{block}.gate.weight", (self.hidden, self.width)
            yield f"{block}.up.weight", (self.hidden, self.width)
            yield f"{block}.down.weight", (self.width, self.hidden)
        yield "norm.weight", (self.width,)
        yield "head.weight", (self.vocabulary, self.width)

    @property
    def parameter_count(self) -> int:
        return sum(prod(shape) for _, shape in self.parameters())


MODELS: Final[Mapping[str, Shape]] = {
    shape.name: shape
    for shape in (
        Shape("tiny", layers=2, width=64, heads=4, key_heads=2, hidden=176, vocabulary=512),
        Shape("small", layers=8, width=512, heads=8, key_heads=4, hidden=1408, vocabulary=8192),
        Shape("smollm-135m", layers=30, width=576, heads=9, key_heads=3, hidden=1536, vocabulary=49152),
        Shape("medium", layers=16, width=1024, heads=16, key_heads=8, hidden=2816, vocabulary=16384),
        Shape("llama-1b", layers=16, width=2048, heads=32, key_heads=8, hidden=8192, vocabulary=128256),
        Shape("llama-3b", layers=28, width=3072, heads=24, key_heads=8, hidden=8192, vocabulary=128256),
        Shape("llama-8b", layers=32, width=4096, heads=32, key_heads=8, hidden=14336, vocabulary=128256),
        Shape("llama-70b", layers=80, width=8192, heads=64, key_heads=8, hidden=28672, vocabulary=128256),
        Shape("llama-405b", layers=126, width=16384, heads=128, key_heads=8, hidden=53248, vocabulary=128256),
        # Of no publication: bfloat16 training has this much state.
        Shape("bf16-1gb", layers=7, width=768, heads=12, key_heads=12, hidden=2048, vocabulary=16384),
        Shape("bf16-8gb", layers=17, width=1536, heads=12, key_heads=12, hidden=4096, vocabulary=32768),
        Shape("bf16-32gb", layers=27, width=2560, heads=20, key_heads=20, hidden=6912, vocabulary=32768),
    )
}


def shape_of(model: str) -> Shape:
    """The model of that name. ValueError, which lists them, when there is none."""
    if model not in MODELS:
        raise ValueError(f"--model {model}: unknown; there are {', '.join(MODELS)}")
    return MODELS[model]


class StateTensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str  # "float32" or "bfloat16"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * (4 if self.dtype == "float32" else 2)


def training_state(shape: Shape, precision: Precision) -> Iterator[StateTensor]:
    """Every tensor of a checkpoint, each once, however it is sharded.

    "fp32": weights and both moments of Adam in float32, 12 bytes per parameter. "bf16": weights in bfloat16, their
    float32 masters and both moments, 14 bytes per parameter. Each parameter has a step count of 4 bytes besides.
    """
    for name, size in shape.parameters():
        yield StateTensor(f"model.{name}", size, "float32" if precision == "fp32" else "bfloat16")
        yield StateTensor(f"optimizer.{name}.step", (), "float32")
        if precision == "bf16":
            yield StateTensor(f"optimizer.{name}.master", size, "float32")
        yield StateTensor(f"optimizer.{name}.exp_avg", size, "float32")
        yield StateTensor(f"optimizer.{name}.exp_avg_sq", size, "float32")


def state_nbytes(shape: Shape, precision: Precision) -> int:
    """Bytes of one checkpoint."""
    return sum(tensor.nbytes for tensor in training_state(shape, precision))


def build(shape: Shape) -> torch.nn.Module:
    """The module on the meta device: no memory yet. It maps int64 tokens (batch, length) to logits."""
    import torch

    from .transformer import Transformer

    with torch.device("meta"):
        return Transformer(shape)
