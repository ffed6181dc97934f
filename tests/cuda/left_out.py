"""One step of the engine left out (csrc/base/fault_hook.h), for a process that looks at what goes wrong for the lack of
it; and calls of the driver that fail meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from snapstone import _native

__all__ = ["KINDS", "calls_fail", "passed_steps", "step_left_out"]

KINDS = ("wait", "record", "poll", "keep")

_rule = ""
_passed: set[str] = set()


@contextmanager
def step_left_out(step: str) -> Iterator[None]:
    """KIND/NAME; empty: none is, and `passed_steps` are counted."""
    global _rule
    _rule = f"{step}:1+:skip" if step else ""
    _passed.clear()
    _native.fault_arm(_rule)
    try:
        yield
    finally:
        _rule = ""
        _native.fault_disarm()


@contextmanager
def calls_fail(rules: str) -> Iterator[None]:
    """While it is entered, besides what is left out."""
    armed = _rule or _native.fault_seen_names()
    _note()
    _native.fault_arm(";".join(rule for rule in (_rule, rules) if rule))
    try:
        yield
    finally:
        _note()
        if armed:
            _native.fault_arm(_rule)
        else:
            _native.fault_disarm()


def passed_steps() -> set[str]:
    """Since the beginning of `step_left_out`."""
    _note()
    return set(_passed)


def _note() -> None:
    _passed.update(name for name in _native.fault_seen_names() if name.split("/")[0] in KINDS)
