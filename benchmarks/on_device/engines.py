"""Engines of `snapstone.bench` as they are with their defaults, for states on devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from snapstone.bench.engines import Pending, register
from snapstone.bench.engines.dcp import Dcp
from snapstone.bench.engines.engine import future_pending
from snapstone.bench.engines.snapstone import Snapstone
from snapstone.bench.results import Option

__all__ = ["DcpDefault", "SnapstoneNow", "register_all"]


class SnapstoneNow(Snapstone):
    title = "snapstone async_save, fence now"
    options: ClassVar[tuple[Option, ...]] = (
        {"name": "fence", "value": "now", "why": "the default: nothing is asked of the training loop"},
        *Snapstone.options[1:],
    )

    @property
    def fence(self) -> Any:
        return "now"


class DcpDefault(Dcp):
    title = "DCP async_save, defaults"
    options: ClassVar[tuple[Option, ...]] = (
        {"name": "all", "value": "defaults", "why": "what a program gets that only calls async_save"},
    )

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        from torch.distributed.checkpoint import FileSystemWriter, async_save

        response: Any = async_save(
            dict(state), storage_writer=FileSystemWriter(directory), process_group=self.setting.group
        )
        if hasattr(response, "upload_completion"):
            return future_pending(response.staging_completion, response.upload_completion)
        return future_pending(None, response)


def register_all() -> None:
    register("snapstone-now", f"{__name__}:SnapstoneNow")
    register("dcp-default", f"{__name__}:DcpDefault")
