"""How large the demo is: `full` for people, `quick` for the test suite. Same code, same checks."""

from __future__ import annotations

from dataclasses import dataclass

from gpt import GptConfig


@dataclass(frozen=True)
class Scale:
    model: GptConfig
    corpus_bytes: int
    rows: int  # per rank and step
    steps: int
    warmup_steps: int
    learning_rate: float
    save_every: int  # steps; divides `steps`, so the last state is saved
    kill_after: int  # the kill waits for a committed checkpoint of this step or later
    sample_bytes: int
    compared_model: GptConfig  # its weights and Adam state are what the table saves and loads
    compared_rounds: int


SCALES = {
    "full": Scale(
        model=GptConfig(layers=3, heads=4, width=160, context=64, dropout=0.05),
        corpus_bytes=4_000_000,
        rows=12,
        steps=200,
        warmup_steps=10,
        learning_rate=4e-3,
        save_every=20,
        kill_after=80,
        sample_bytes=200,
        compared_model=GptConfig(layers=7, heads=8, width=512, context=64, dropout=0.1),
        compared_rounds=3,
    ),
    "quick": Scale(
        model=GptConfig(layers=2, heads=4, width=128, context=64, dropout=0.05),
        corpus_bytes=500_000,
        rows=4,
        steps=40,
        warmup_steps=4,
        learning_rate=4e-3,
        save_every=5,
        kill_after=10,
        sample_bytes=60,
        compared_model=GptConfig(layers=2, heads=4, width=256, context=64, dropout=0.1),
        compared_rounds=1,
    ),
}
