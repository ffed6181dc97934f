"""What the harness promises: no time for an engine that loads other bytes, all rounds for whoever a target needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def scenario(**changes: Any) -> Any:
    scenarios = importlib.import_module("scenarios")
    values: dict[str, Any] = {
        "state": "small",
        "place": "disk",
        "size": 30,
        "rounds": 2,
        "engines": (),
        "host_memory_budget": 16 << 20,
        "seconds_max": 60.0,
        "drop_caches": False,
    }
    return scenarios.Scenario(**{**values, **changes})


def measured(engine: Any, directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The entry of `engine`, run beside torch.save."""
    engines, measure = importlib.import_module("engines"), importlib.import_module("measure")
    monkeypatch.setitem(engines.ENGINES, "tested", engine)
    setting = engines.Setting(16 << 20, None, "not built")
    scrub = {str(directory): "DIRECTORY"}
    measurement = measure.Measurement(scenario(engines=("torch", "tested")), setting, directory, scrub)
    measurement.run()
    entries = measurement.result()["engines"]
    assert entries["torch"]["verified"]
    assert len(entries["torch"]["samples"]["save_seconds"]) == 2
    assert list(directory.iterdir()) == []
    return dict(entries["tested"])


def test_an_engine_that_loads_one_wrong_bit_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_save = importlib.import_module("engines.torch_save")

    class OneBit(torch_save.TorchSave):  # type: ignore[misc, name-defined]
        def fill(self, target: Any, directory: Path) -> None:
            super().fill(target, directory)
            next(iter(target.values())).view(dtype=importlib.import_module("torch").uint8)[3] ^= 1

    entry = measured(OneBit, tmp_path, monkeypatch)
    assert "1 of 30 tensors came back different" in entry["skipped"]
    assert entry["samples"]["save_seconds"] == []


def test_an_asynchronous_engine_that_snapshots_after_the_call_gets_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_save = importlib.import_module("engines.torch_save")

    class Late(torch_save.TorchSave):  # type: ignore[misc, name-defined]
        asynchronous = True

        def begin(self, state: Any, directory: Path) -> Callable[[], None]:
            return lambda: super(Late, self).begin(state, directory)()

    entry = measured(Late, tmp_path, monkeypatch)
    assert "30 of 30 tensors came back different" in entry["skipped"]


def test_an_engine_that_fails_is_left_out_with_a_reason_that_names_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_save = importlib.import_module("engines.torch_save")

    class Failing(torch_save.TorchSave):  # type: ignore[misc, name-defined]
        def begin(self, state: Any, directory: Path) -> Callable[[], None]:
            raise OSError(28, "No space left on device", str(directory))

    entry = measured(Failing, tmp_path, monkeypatch)
    assert entry["skipped"].startswith("OSError: [Errno 28]")
    assert str(tmp_path) not in entry["skipped"]


def test_rounds_are_cut_for_slow_engines_that_no_target_needs_and_for_nobody_else() -> None:
    rounds_of = importlib.import_module("scenarios").rounds_of
    seconds = {"snapstone": 3.0, "dcp": 9.0, "torch": 5.0, "safetensors": 4.0, "torch-checkpointing": 6.0}
    everybody = rounds_of(seconds, scenario(rounds=5, seconds_max=6 * 27.0))
    assert set(everybody.values()) == {5}
    slowest = rounds_of(seconds, scenario(rounds=5, seconds_max=6 * 27.0 - 12))
    assert slowest == {**everybody, "torch-checkpointing": 3}
    both = rounds_of(seconds, scenario(rounds=5, seconds_max=1.0))
    assert both == {**everybody, "torch-checkpointing": 3, "safetensors": 3}
