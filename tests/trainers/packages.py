"""Where the trainers are that do not fit into one environment."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MEGATRON_VERSIONS", "unpacked"]

ROOT = Path(__file__).resolve().parents[2]
MEGATRON_VERSIONS = ("0.16.1", "0.18.2", "0.19.2")


def unpacked(name: str) -> Path:
    """The folder of an unpacked wheel, for PYTHONPATH. `make test-integrations` makes it; without it tests fail."""
    folder = ROOT / "build" / "integrations" / name
    assert folder.is_dir(), f"{folder} is missing: run make test-integrations"
    return folder
