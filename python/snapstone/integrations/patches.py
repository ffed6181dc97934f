"""Names of other packages, replaced for a while and put back."""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["Patches"]


class Patches:
    """Replaced attributes of modules and classes. `undo` puts back every one that is still what was put there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replaced: list[tuple[Any, str, Any, Any, bool]] = []

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def set(self, owner: Any, name: str, value: Any) -> Any:
        """Replaces `owner.name`, which exists; returns what was there.

        Raises:
            AttributeError: there is no such name, so this is not the version that the patch was made for.
        """
        with self._lock:
            own = name in vars(owner)
            stock = vars(owner)[name] if own else getattr(owner, name)
            setattr(owner, name, value)
            self._replaced.append((owner, name, stock, value, own))
        return stock

    def undo(self) -> None:
        """Again is nothing. A name that somebody else has replaced meanwhile is left to them."""
        with self._lock:
            while self._replaced:
                owner, name, stock, value, own = self._replaced.pop()
                if vars(owner).get(name) is not value:
                    continue
                if own:
                    setattr(owner, name, stock)
                else:
                    delattr(owner, name)  # what an instance or a subclass inherits
