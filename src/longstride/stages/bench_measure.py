"""Clocks and memory of the benchmarks."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Name = TypeVar("Name")


def rates_in_turn(
    calls: Mapping[Name, tuple[Callable[[], object], float]], *, rounds: int, window_s: float
) -> dict[Name, list[float]]:
    """Time several calls in turn, round after round, so that a disturbance by other work on the machine hits all of them.

    Args:
        calls: name to what is called and how many things one call does; each called at least once before (a warm-up).
        rounds: how often each is timed.
        window_s: about how long each is repeated in a round, seconds; at least one call.

    Returns:
        Things per second of each call in each round, 1/s.
    """
    repeats = {}
    for name, (call, _) in calls.items():
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(window_s / (time.perf_counter() - start)))
    rates: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, count) in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            rates[name].append(repeats[name] * count / (time.perf_counter() - start))
    return rates


def peak_memory_MiB(*calls: Callable[[], object]) -> int | None:
    """Return the highest resident memory of one call of each, in MiB; None where the system does not say.

    All of the process counts, but only what it holds during these calls.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest use so far (Linux)
    for call in calls:
        call()
    return memory_MiB("VmHWM")


def memory_MiB(kind: Literal["VmHWM", "VmRSS"]) -> int | None:
    """Return the resident memory of this process in MiB, highest (VmHWM) or now (VmRSS); None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) // 2**10 for line in lines if line.startswith(f"{kind}:")), None)
