"""Which cores this process may use, and how many threads its libraries start.

OpenMM's CPU platform wakes a worker thread several times a step. On a virtual machine a wake-up on another
core can cost more than the force itself (measured for 22 atoms: 800 steps/s unpinned, 3 700 steps/s with the
process pinned to one core), so small-molecule MD runs one pinned process per core.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.queues import Queue


def available_cores() -> list[int]:
    """Return the cores this process may run on (all of them where the system cannot say)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def claim_cores(count: int) -> Iterator[list[int]]:
    """Claim `count` cores that no other longstride process of this user has claimed on this host.

    Yields the claimed cores, possibly fewer than asked for (then run unpinned). A claim is a lock on a small
    file in the temporary folder; the system drops it when the process ends, however it ends.
    """
    folder = Path(tempfile.gettempdir()) / f"longstride-cores-{os.getuid()}-{socket.gethostname()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as stack:
        claimed: list[int] = []
        for core in available_cores():
            if len(claimed) == count:
                break
            handle = stack.enter_context((folder / str(core)).open("w"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            claimed.append(core)
        yield claimed


def pin(core: int | None) -> None:
    """Bind the calling process to one core; None or an unsupported system leaves it free."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def die_with_parent() -> None:
    """Ask Linux to kill the calling worker process when its parent ends, so that no orphan keeps computing."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


def start_worker(cores: Queue[int | None]) -> None:
    """Initialise a worker process: bound to its parent's life and pinned to the next core in the queue."""
    die_with_parent()
    pin(cores.get())


@contextlib.contextmanager
def pinned_workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of `count` fresh processes, each pinned to a core of its own where enough are free."""
    context = multiprocessing.get_context("spawn")
    with claim_cores(count) as claimed:
        queue = context.Queue()
        for index in range(count):
            queue.put(claimed[index] if len(claimed) == count else None)
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=start_worker, initargs=(queue,))
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()  # the interpreter would otherwise wait for running tasks before it exits
            raise
        pool.shutdown()
