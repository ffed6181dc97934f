"""The contestants of a run, by name. One module per engine, each the thinnest call that its own documentation gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engines.contestant import Contestant, Setting
from engines.dcp import Dcp, DcpAsync
from engines.probes import DiskLimit, Fio
from engines.safetensors import Safetensors
from engines.snapstone import Snapstone, SnapstoneAsync
from engines.torch_checkpointing import TorchCheckpointing
from engines.torch_save import TorchSave

__all__ = ["ENGINES", "Contestant", "Setting"]

ENGINES: Mapping[str, Callable[[Setting], Contestant]] = {
    "limit": DiskLimit,
    "fio": Fio,
    "snapstone": Snapstone,
    "snapstone-async": SnapstoneAsync,
    "dcp": lambda setting: Dcp(setting, thread_count=1),
    "dcp-2": lambda setting: Dcp(setting, thread_count=2),
    "dcp-async": DcpAsync,
    "torch": TorchSave,
    "safetensors": Safetensors,
    "torch-checkpointing": TorchCheckpointing,
}
