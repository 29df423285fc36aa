"""Clocks and memory of the benchmarks."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Name = TypeVar("Name")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Things per second of one call, one value per round.

    Attributes:
        wall: per second of wall time.
        cpu: per second of processor time of all threads; what other work leaves of a core does not enter it.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]


def rates_in_turn(
    calls: Mapping[Name, tuple[Callable[[], object], float]], *, rounds: int, window_s: float
) -> dict[Name, Rates]:
    """Time several calls in turn, round after round, so that a disturbance by other work on the machine hits all of them.

    Args:
        calls: name to what is called and how many things one call does; each called at least once before (a warm-up).
        rounds: how often each is timed.
        window_s: about how long each is repeated in a round, seconds; at least one call.

    Returns:
        Rates of each call.
    """
    repeats = {}
    for name, (call, _) in calls.items():
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(window_s / (time.perf_counter() - start)))
    seconds: dict[Name, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, _) in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    done = {name: repeats[name] * count for name, (_, count) in calls.items()}
    return {
        name: Rates(wall=tuple(done[name] / wall for wall, _ in found), cpu=tuple(done[name] / cpu for _, cpu in found))
        for name, found in seconds.items()
    }


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
