"""The version of Megatron-core, checked before anything of it is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..versions import require

__all__ = ["MEGATRON_CORE"]


def _in_checkout() -> str | None:
    """Of a Megatron-LM checkout on PYTHONPATH, which pip knows nothing of; read, not imported."""
    found = find_spec("megatron")
    for folder in found.submodule_search_locations or () if found else ():
        file = Path(folder, "core", "package_info.py")
        if file.is_file():
            names: dict[str, object] = {}
            exec(compile(file.read_text(), str(file), "exec"), names)
            return str(names["__version__"])
    return None


def _checked() -> str:
    try:
        version("megatron-core")
    except PackageNotFoundError:
        checkout = _in_checkout()
        if checkout is not None:
            return require("megatron-core", "0.16", "0.20", installed=checkout)
    return require("megatron-core", "0.16", "0.20")


MEGATRON_CORE: str = _checked()
