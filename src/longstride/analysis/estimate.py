"""A number with its uncertainty, or the reason why there is none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with a 95 % interval.

    Attributes:
        value: the estimate, or None where it is undefined.
        low: lower end of the 95 % interval, or None where unbounded or unknown.
        high: upper end of the 95 % interval, or None where unbounded or unknown.
        note: why the value is undefined, or what limits it; empty otherwise.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def defined(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    @property
    def standard_error(self) -> float | None:
        """The interval's width over 2 * 1.96; None without a closed interval."""
        if self.low is None or self.high is None:
            return None
        return (self.high - self.low) / (2 * Z95)

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate times a positive constant known without error."""
        parts = (None if part is None else part * factor for part in (self.value, self.low, self.high))
        value, low, high = parts
        return Estimate(value=value, low=low, high=high, note=self.note)

    def to_json(self) -> dict[str, Any]:
        """Return the value, interval and note as plain JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high, "note": self.note}


def undefined(reason: str) -> Estimate:
    """Return an Estimate without a value that says why."""
    return Estimate(value=None, note=reason)


def finite(value: float) -> float | None:
    """Return the value as a float, or None for NaN and infinity (which JSON cannot hold)."""
    return float(value) if math.isfinite(value) else None


def ratio(a: Estimate, b: Estimate) -> Estimate:
    """Return a / b for two independent positive estimates with a log-normal 95 % interval.

    Equation: ln(a/b) ± sqrt(w_a^2 + w_b^2), where w = ln(high/low)/2 is each estimate's own half width.
    """
    if a.value is None or b.value is None or a.value <= 0 or b.value <= 0:
        return undefined(a.note or b.note or "one side is undefined")
    value = a.value / b.value
    ends = (a.low, a.high, b.low, b.high)
    if any(end is None or end <= 0 for end in ends):
        return Estimate(value=value, note="no interval: one side has none")
    a_low, a_high, b_low, b_high = (float(end) for end in ends if end is not None)
    width = math.hypot(math.log(a_high / a_low) / 2, math.log(b_high / b_low) / 2)
    return Estimate(value=value, low=value * math.exp(-width), high=value * math.exp(width), note=a.note or b.note)
