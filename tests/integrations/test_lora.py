"""LoRA adapters on a frozen base, by peft on a small transformer: a delta save writes what trains, and nothing else.

Invariants: after the first save each one writes at most the adapter, its optimizer state and 1 MiB; every checkpoint,
also without those before it, gives back the whole model and optimizer bit for bit.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import snapstone as ss
from roundtrip.bits import nested_equal

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

MIB = 1 << 20
SEED = 8


def tuned_model() -> nn.Module:
    """A transformer of 6 M parameters, frozen, with adapters on its attention."""
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    base = transformers.LlamaForCausalLM(config)
    adapters = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: nn.Module = peft.get_peft_model(base, adapters)
    return model


class Tuning:
    """A run that trains the adapters."""

    def __init__(self) -> None:
        self.model = tuned_model()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        self.step = 0

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            tokens = torch.randint(0, 8000, (2, 16), generator=torch.Generator().manual_seed(self.step))
            self.optimizer.zero_grad()
            self.model(input_ids=tokens, labels=tokens).loss.backward()
            self.optimizer.step()
            self.step += 1

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    @property
    def trained_nbytes(self) -> int:
        """The adapters and their two moments."""
        return 3 * sum(parameter.nbytes for parameter in self.trained)


def written_bytes(path: Path) -> int:
    """Of files that no other checkpoint has."""
    stats = [entry.lstat() for entry in path.rglob("*") if entry.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def copied(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [copied(value) for value in state]
    return state.clone() if isinstance(state, torch.Tensor) else state


def test_a_delta_save_writes_the_adapter_and_its_optimizer_state(tmp_path: Path) -> None:
    tuning = Tuning()
    frozen_nbytes = sum(one.nbytes for one in tuning.model.parameters() if not one.requires_grad)
    assert tuning.trained_nbytes < 2 * MIB < 20 * MIB < frozen_nbytes
    tuning.train()
    ss.save(tuning.state(), checkpoint_id=tmp_path / "0")
    assert written_bytes(tmp_path / "0") > frozen_nbytes
    for number in range(1, 4):
        tuning.train(2)
        path = tmp_path / str(number)
        if number % 2:
            saved = ss.save(tuning.state(), checkpoint_id=path, base=tmp_path / str(number - 1))
        else:
            saved = ss.async_save(tuning.state(), checkpoint_id=path, base="auto", fence=tuning.optimizer).result()
        kept = copied(tuning.state())
        assert written_bytes(path) <= tuning.trained_nbytes + MIB
        assert saved.stats["own_bytes"] <= tuning.trained_nbytes + MIB
        assert saved.nbytes > frozen_nbytes
    for number in range(3):
        shutil.rmtree(tmp_path / str(number))
    assert sorted(os.listdir(tmp_path)) == ["3"]
    assert ss.verify(tmp_path / "3")
    assert nested_equal(ss.Checkpoint.open(tmp_path / "3").state_dict(), kept)


def test_a_run_resumes_from_a_delta_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    tuning = Tuning()
    tuning.train()
    ss.save(tuning.state(), checkpoint_id=tmp_path / "1")
    tuning.train()
    ss.save(tuning.state(), checkpoint_id=tmp_path / "2", base=tmp_path / "1")
    tuning.train(2)
    resumed = Tuning()
    resumed.train()  # so that the optimizer has moments to fill
    state = {"model": resumed.model, "optimizer": resumed.optimizer, "step": 0}
    ss.load(state, checkpoint_id=tmp_path / "2")
    resumed.step = state["step"]
    assert resumed.step == 2
    resumed.train(2)
    assert nested_equal(resumed.state(), tuning.state())
