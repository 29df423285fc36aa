"""Progress with rate and remaining time: one rewritten line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO


def format_duration(seconds: float) -> str:
    """Return seconds as a short human time, such as 42s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Report the progress of a long loop.

    Args:
        label: what is running, such as "reference MD".
        total: the number of units in the whole job.
        unit: what is counted, such as "ps" or "steps".
        start: units already done by an earlier attempt; they do not count towards the rate.
        every_s: seconds between two lines where the stream is not a terminal.
        stream: where to write; standard error by default.
    """

    def __init__(
        self, label: str, total: float, unit: str, *, start: float = 0.0, every_s: float = 5.0, stream: TextIO | None = None
    ) -> None:
        self._label, self._total, self._unit, self._start = label, total, unit, start
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.2 if self._terminal else every_s
        self._begin = self._last = time.monotonic()
        self._finished = False

    def update(self, done: float, note: str = "") -> None:
        """Show that `done` of `total` units are done; `note` is appended, such as "acceptance 0.52"."""
        now = time.monotonic()
        if self._finished or (now - self._last < self._interval and done < self._total):
            return
        self._last, self._finished = now, done >= self._total
        rate = (done - self._start) / max(now - self._begin, 1e-9)
        left = (self._total - done) / rate if rate > 0 else float("nan")
        eta = format_duration(left) if math.isfinite(left) else "?"
        percent = 100 * done / self._total if self._total else 100.0
        amount = f"{done:.6g}/{self._total:.6g} {self._unit}"
        line = f"{self._label}: {percent:3.0f}% {amount}, {rate:.3g} {self._unit}/s, {eta} left"
        line = f"{line}, {note}" if note else line
        if self._terminal:
            self._stream.write("\r\x1b[K" + line + ("\n" if done >= self._total else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
