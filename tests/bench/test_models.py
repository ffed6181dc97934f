"""Names of models mean the published sizes, and a workload has exactly the tensors that were counted."""

from __future__ import annotations

import pytest
import torch

from snapstone.bench.models import MODELS, Shape, build, shape_of, state_nbytes, training_state


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-8b", 8_030_261_248), ("llama-70b", 70_553_706_496), ("llama-405b", 405_853_388_800)],
)
def test_a_named_model_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert shape_of(name).parameter_count == parameters


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_the_module_has_the_parameters_that_are_counted(shape: Shape) -> None:
    module = build(shape)
    found = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    assert found == list(shape.parameters())
    assert all(parameter.is_meta for parameter in module.parameters())


def test_bytes_of_a_state_are_those_of_its_tensors() -> None:
    shape = shape_of("tiny")
    count, tensors = shape.parameter_count, len(list(shape.parameters()))
    assert state_nbytes(shape, "fp32") == 12 * count + 4 * tensors
    assert state_nbytes(shape, "bf16") == 14 * count + 4 * tensors
    assert {tensor.dtype for tensor in training_state(shape, "fp32")} == {"float32"}


def test_the_transformer_learns() -> None:
    torch.manual_seed(0)
    module = build(shape_of("tiny")).to_empty(device="cpu")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() == 2 else torch.nn.init.ones_(parameter)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    tokens = torch.randint(512, (2, 17))
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_an_unknown_model_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"--model gpt-9: unknown; there are tiny, small, .*llama-405b"):
        shape_of("gpt-9")
