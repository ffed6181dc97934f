"""The engines of a comparison, by name. One module per package, imported only when an engine of it is wanted.

`NAMES` is the order in which they run and are shown. A name that is not installed is reported as absent.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final

from .engine import Engine, Pending, Setting

__all__ = ["NAMES", "Engine", "Pending", "Setting", "chosen", "engine_class", "register"]

_HOMES: Final[dict[str, tuple[str, str]]] = {  # name: module, class
    "snapstone": (".snapstone", "Snapstone"),
    "snapstone-dcp": (".snapstone", "SnapstoneDcp"),
    "snapstone-delta": (".snapstone", "SnapstoneDelta"),
    "dcp": (".dcp", "Dcp"),
    "dcp-async": (".dcp", "DcpAsync"),
    "dcp-process": (".dcp", "DcpProcess"),
    "dcp-pinned": (".dcp", "DcpPinned"),
    "torch-save": (".plain", "TorchSave"),
    "safetensors": (".plain", "Safetensors"),
    "torch-checkpointing": (".torch_checkpointing", "TorchCheckpointing"),
    "torchsnapshot": (".torchsnapshot", "TorchSnapshot"),
    "megatron": (".megatron", "Megatron"),
    "megatron-async": (".megatron", "MegatronAsync"),
    "deepspeed": (".deepspeed", "DeepSpeed"),
    "deepspeed-fast": (".deepspeed", "DeepSpeedFast"),
    "deepspeed-decoupled": (".deepspeed", "DeepSpeedDecoupled"),
    "datastates": (".datastates", "DataStates"),
    "moonclip": (".moonclip", "Moonclip"),
    "moonclip-raw": (".moonclip", "MoonclipRaw"),
    "orbax": (".orbax", "Orbax"),
    "bytecheckpoint": (".bytecheckpoint", "ByteCheckpoint"),
    "nvidia-resiliency": (".nvidia_resiliency", "NvidiaResiliency"),
}
NAMES: Final[Mapping[str, tuple[str, str]]] = _HOMES


def register(name: str, home: str) -> None:
    """Adds an engine of somebody else: `home` is "package.module:Class", a subclass of `Engine`.

    Raises:
        ValueError: the name is taken, or `home` is not of that form.
    """
    module, _, class_name = home.partition(":")
    if not module or not class_name:
        raise ValueError(f"engine {name}: {home!r} is not of the form package.module:Class")
    if name in _HOMES and _HOMES[name] != (module, class_name):
        raise ValueError(f"engine {name}: the name is taken")
    _HOMES[name] = (module, class_name)


def engine_class(name: str) -> type[Engine]:
    """Imports the adapter, not the package that it adapts."""
    module, class_name = _HOMES[name]
    found: Any = getattr(importlib.import_module(module, __package__), class_name)
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise ValueError(f"engine {name}: {class_name} of {module} is no adapter")
    return found


def chosen(wanted: str) -> list[str]:
    """The names in "a,b,c" or "all", each once. "name=package.module:Class" brings an adapter of its own.

    Raises:
        ValueError: a name that is unknown; the message has those that are known.
    """
    names: list[str] = []
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        name, _, home = part.partition("=")
        if home:
            register(name, home)
        elif name != "all" and name not in _HOMES:
            raise ValueError(f"--engine {name}: unknown; there are {', '.join(_HOMES)}, or all")
        names.extend(_HOMES if name == "all" else [name])
    if not names:
        raise ValueError("--engine: names no engine")
    return list(dict.fromkeys(names))
