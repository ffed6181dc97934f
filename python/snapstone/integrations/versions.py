"""Which versions of a trainer an integration knows."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

__all__ = ["UnsupportedVersionError", "require"]


class UnsupportedVersionError(ImportError):
    """The trainer is missing, or of a version that the integration was not made for."""


def require(package: str, least: str, below: str, *, installed: str | None = None) -> str:
    """The installed version of `package`, which is at least `least` and lower than `below`.

    Args:
        package: name of the distribution, as pip has it.
        least, below: numbers with dots; of pre-releases the numbers count.
        installed: the version, where pip knows nothing of the package: a checkout on PYTHONPATH.

    Raises:
        UnsupportedVersionError: names what is installed, and what is supported.
    """
    supported = f"snapstone supports {package} >= {least}, < {below}"
    try:
        installed = installed or version(package)
    except PackageNotFoundError:
        raise UnsupportedVersionError(f"{package} is not installed; {supported}") from None
    if not _numbers(least) <= _numbers(installed) < _numbers(below):
        raise UnsupportedVersionError(f"{package} {installed} is installed; {supported}")
    return installed


def _numbers(text: str) -> tuple[int, ...]:
    release = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(number) for number in release.group().split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
