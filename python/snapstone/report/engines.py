"""One engine of a stall document, as charts and tables show it."""

from __future__ import annotations

from dataclasses import dataclass

from .documents import Measurement
from .fields import Fields
from .quantity import Spread

__all__ = ["Cadence", "Engine", "engines_of"]

STATUSES = ("measured", "partial", "failed", "absent")


@dataclass(frozen=True)
class Cadence:
    """`stall` is seconds per save over the pairs; `ledger` the median of each part."""

    name: str
    interval_steps: float | None
    stall: Spread | None
    pairs: tuple[float, ...]
    ledger: dict[str, Spread]
    durable: Spread | None
    skipped: int

    @property
    def label(self) -> str:
        if self.interval_steps is None:
            return self.name
        return "every step" if self.interval_steps == 1 else f"every {self.interval_steps:.0f} steps"

    @property
    def warning(self) -> str:
        return f"{self.skipped} save{'s' if self.skipped > 1 else ''} skipped" if self.skipped > 0 else ""


@dataclass(frozen=True)
class Engine:
    """`status` is one of measured, partial, failed, absent; of a failed one no time is to be shown."""

    name: str
    title: str
    version: str
    status: str
    reason: str
    cadences: tuple[Cadence, ...]
    fields: Fields

    @property
    def shown(self) -> bool:
        return self.status in ("measured", "partial")

    @property
    def stall(self) -> Spread | None:
        """Of the relaxed cadence, or the first that was measured."""
        return next((one.stall for one in self.cadences if one.stall), None)

    @property
    def failures(self) -> list[str]:
        return self.fields.fields("truth").texts("failures")


def engines_of(measurement: Measurement) -> list[Engine]:
    """Sorted by stall, those without one last."""
    engines = [_engine(fields) for fields in measurement.fields.items("engines")]
    return sorted(engines, key=lambda one: _order(one))


def _order(engine: Engine) -> tuple[int, float, str]:
    if engine.shown and engine.stall:
        return (0, engine.stall.median, engine.name)
    return (1 + STATUSES.index(engine.status), 0.0, engine.name)


def _engine(fields: Fields) -> Engine:
    name = " ".join(fields.text("name").split()) or "(no name)"
    status = fields.text("status")
    reason = fields.text("reason")
    if status not in STATUSES:
        reason = reason or (f"unknown status {status!r}" if status else "the document gives no status")
        status = "failed"
    wrong = fields.fields("truth").texts("failures")
    if wrong and status != "failed":  # whatever the document calls it: wrong bytes get no time
        status, reason = "failed", wrong[0]
    cadences = sorted(map(_cadence, fields.items("cadences")), key=lambda one: one.name != "relaxed")
    if status in ("measured", "partial") and not any(one.stall for one in cadences):
        status, reason = "failed", reason or "no stall was measured"
    return Engine(
        name,
        " ".join(fields.text("title").split()) or name,
        fields.text("version"),
        status,
        reason or {"failed": "no reason given", "absent": "not installed"}.get(status, ""),
        tuple(cadences),
        fields,
    )


def _cadence(fields: Fields) -> Cadence:
    parts = fields.fields("ledger")
    ledger = {name: spread for name in parts.names() if (spread := Spread.of(parts.numbers(name)))}
    pairs = fields.numbers("stall_seconds")
    return Cadence(
        fields.text("name") or "cadence",
        fields.number("interval_steps"),
        Spread.of(pairs),
        tuple(pairs),
        ledger,
        Spread.of(fields.numbers("durable_seconds")),
        int(fields.number("skipped") or 0),
    )
