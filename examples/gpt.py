"""A small GPT over bytes: pre-norm blocks, causal attention, dropout. Nothing here knows about checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # one token per byte


@dataclass(frozen=True)
class GptConfig:
    layers: int
    heads: int
    width: int
    context: int  # bytes seen at once
    dropout: float


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: turns pairs of features by angles that grow with the position (Su et al., arXiv 2104.09864)."""
    length, width = x.shape[-2:]
    frequencies = 1000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(length, device=x.device)[:, None] * frequencies
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


class Attention(nn.Module):
    """Query, key and value of a head stand side by side in `project_in`, and the number of heads is taken from what it
    gives: with tensor parallelism each rank has whole heads, and fewer of them.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        self.dropout = config.dropout
        self.project_in = nn.Linear(config.width, 3 * config.width)
        self.project_out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.project_in(x).view(batch, length, -1, 3 * self.head_width).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        dropout = self.dropout if self.training else 0.0
        query, key = rotate(query), rotate(key)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        out: Tensor = self.project_out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class Block(nn.Module):
    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm_mlp(x)))
        return out


class Gpt(nn.Module):
    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_byte = nn.Embedding(VOCABULARY, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            if name.endswith(("project_out.weight", "mlp.2.weight")):  # what the residual stream sums up
                parameter.data.div_((2 * config.layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, length, 256) for int64 tokens of shape (batch, length)."""
        x = self.dropout(self.embed_byte(tokens))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def sample(self, prompt: bytes, count: int, *, temperature: float, generator: torch.Generator) -> bytes:
        """Continues `prompt` by `count` bytes."""
        self.eval()
        tokens = torch.tensor([list(prompt)], dtype=torch.int64)
        for _ in range(count):
            logits = self(tokens[:, -self.config.context :])[:, -1, :]
            drawn = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn], dim=1)
        return bytes(tokens[0, len(prompt) :].tolist())
