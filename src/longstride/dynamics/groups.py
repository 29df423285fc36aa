"""Replicas in groups of a fixed size: one pinned process per group where there are several cores.

A group has noise and checkpoints of its own, so that the number of processes changes no result.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from longstride.compute import pinned_workers
from longstride.data.checkpoint import open_state
from longstride.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

Result_co = TypeVar("Result_co", covariant=True)


class Work(Protocol[Result_co]):
    """Runs or continues one group; it can be pickled, and its checkpoints count steps."""

    def __call__(
        self, first: int, starts: np.ndarray, *, folder: Path, key: str, progress: Callable[[float], None] | None = None
    ) -> Result_co:
        """Run the group whose first replica is number `first`, from starts [replica, ...], with its state in `folder`."""
        ...


def run_groups(
    work: Work[Result_co], starts: np.ndarray, *, size: int, steps: int, state: Path, key: str, threads: int, label: str
) -> list[Result_co]:
    """Run all groups, one after the other or in parallel processes, and return what each gave, in order.

    Args:
        work: runs one group.
        starts: [replica, atom, 3] nm.
        size: replicas in a group; the last may have fewer.
        steps: steps of one group.
        state: folder for checkpoints; `group_folder` names the subfolder of each group.
        key: fingerprint of everything that defines the trajectories.
        threads: processes to use, one core each.
        label: shown in the progress line.
    """
    groups = [(first, starts[first : first + size]) for first in range(0, len(starts), size)]
    with open_state(state, key) as store:
        parts = [group_folder(store.path, index) for index in range(len(groups))]
        progress = Progress(label, steps * len(groups), "steps", start=_steps_done(parts))
        if threads == 1 or len(groups) == 1:
            return [
                work(first, group, folder=part, key=key, progress=_shifted(progress, index * steps))
                for index, ((first, group), part) in enumerate(zip(groups, parts, strict=True))
            ]
        with pinned_workers(min(threads, len(groups))) as pool:
            futures = [
                pool.submit(work, first, group, folder=part, key=key)
                for (first, group), part in zip(groups, parts, strict=True)
            ]
            _watch(futures, parts, progress, steps * len(groups))
            return [future.result() for future in futures]


def group_folder(state: Path, index: int) -> Path:
    """Return the state folder of one group."""
    return state / f"group_{index:03d}"


def side_by_side(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the frames [frame, replica, ...] of several groups as those of one."""
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def _shifted(progress: Progress, before: int) -> Callable[[float], None]:
    """Report one group among groups that run one after the other."""
    return lambda done: progress.update(before + done)


def _steps_done(parts: list[Path]) -> int:
    """Steps that the newest checkpoints of all groups count."""
    newest = [
        max((int(file.stem.split("_")[1]) for file in part.glob("checkpoint_*.safetensors")), default=0) for part in parts
    ]
    return sum(newest)


def _watch(futures: list[Future[Result_co]], parts: list[Path], progress: Progress, total: int) -> None:
    while not all(future.done() for future in futures):
        for future in futures:
            if future.done():
                future.result()  # a stopped group ends the job at once
        time.sleep(0.2)
        progress.update(_steps_done(parts))
    progress.update(total)
