"""The learning rate of every step, and an early end where training has taken too long; the same for every flow.

    rate(k) = peak (k + 1) / warm_up                                            k < warm_up
    rate(k) = peak (1 + cos(pi (k - warm_up) / (total - warm_up))) / 2          from then on

Where the time limit is reached after c steps, the rate falls from there linearly to zero over a twentieth of `total`, and
training ends. Without that the rate depends on the step alone, and so does the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longstride.config import FlowConfig
    from longstride.training.module_state import ModuleState

_COOLDOWN = 20  # the share of the steps over which training ends early


def learning_rate(step: int, *, peak: float, warm_up: int, total: int) -> float:
    """Return the rate of a step: linear warm-up, then a half cosine to zero at `total`; depends on steps only."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(total - warm_up, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """The rates of one training.

    Attributes:
        peak: the largest rate.
        warm_up: steps over which the rate rises to it.
        total: steps of a training that no time limit ends.
        max_seconds: the time limit.
        begin: the first step; the other attributes count from there.
    """

    peak: float
    warm_up: int
    total: int
    max_seconds: float = math.inf
    begin: int = 0

    def rate(self, state: ModuleState[Any]) -> float:
        """Return the rate of the step that `state` is about to make."""
        if state.cooldown_from is None:
            return self._planned(state.step)
        left = 1.0 - (state.step - state.cooldown_from) / self._cooldown
        return min(self._planned(state.step), self._planned(state.cooldown_from) * left)

    def last_step(self, state: ModuleState[Any]) -> int:
        """Return how many steps training will have made at its end, as far as is known now."""
        planned = self.begin + self.total
        if state.cooldown_from is None:
            return planned
        return min(planned, state.cooldown_from + self._cooldown)

    def count(self, state: ModuleState[Any], wall_s: float) -> None:
        """Note the seconds spent so far; past the time limit the early end begins at the present step."""
        state.wall_s = wall_s
        if state.cooldown_from is None and wall_s > self.max_seconds:
            state.cooldown_from = state.step

    def _planned(self, step: int) -> float:
        return learning_rate(step - self.begin, peak=self.peak, warm_up=self.warm_up, total=self.total)

    @property
    def _cooldown(self) -> int:
        return max(1, self.total // _COOLDOWN)


def early_end_note(state: ModuleState[Any], section: FlowConfig) -> str | None:
    """Return what to say where the time limit ended training, None where it did not."""
    if state.cooldown_from is None:
        return None
    return (
        f"flow: the time limit of {section.max_seconds:g} s ended training at step {state.step} of {section.max_steps};"
        " the result depends on this machine's speed (raise flow.max_seconds or lower flow.max_steps)"
    )
