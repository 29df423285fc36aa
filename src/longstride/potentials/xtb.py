"""GFN-xTB through tblite as a `Potential`: one persistent single-threaded worker process per core.

A molecule of 20-100 atoms is too small to share between threads, so replicas are shared between processes. Each
evaluation starts from the same initial guess, so that results do not depend on what was evaluated before, on the
worker, or on the number of workers: a continued run is bitwise the uninterrupted one. (Starting from the previous
density was measured to save 14 % of a call for alanine dipeptide, too little to give that up.)
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Self, cast

import numpy as np
import torch

from longstride.compute import claim_cores
from longstride.errors import LongstrideError, NumericsError
from longstride.potentials.xtb_worker import METHODS
from longstride.units import BOHR_NM, HARTREE_KJ_PER_MOL

if TYPE_CHECKING:
    from longstride.state import State, System

MAX_ATOMIC_NUMBER = 86  # the GFN1 and GFN2 parameters end at radon
FORCE_UNIT = HARTREE_KJ_PER_MOL / BOHR_NM


class XTBPotential:
    """GFN2-xTB (doi:10.1021/acs.jctc.8b01176) or GFN1-xTB (doi:10.1021/acs.jctc.7b00118) of an isolated closed-shell molecule.

    Energies and forces are NaN where the self-consistent cycle does not converge. Worker processes live until `close`,
    or until the end of a `with` block.

    Args:
        system: the molecule.
        method: "gfn2-xtb" or "gfn1-xtb".
        charge: total charge in elementary charges.
        threads: worker processes; the replicas of a batch are shared between them.

    Raises:
        LongstrideError: an element or charge that the method cannot treat, or tblite is missing.
    """

    def __init__(self, system: System, *, method: str = "gfn2-xtb", charge: int = 0, threads: int = 1) -> None:
        _check(system, method, charge)
        self.system = system
        self.name: str = method
        self.charge = charge
        job = {"method": method, "atomic_numbers": [int(number) for number in system.atomic_numbers], "charge": charge}
        self._workers: list[_Worker] = []
        with contextlib.ExitStack() as stack:
            cores = stack.enter_context(claim_cores(threads))
            for index in range(threads):
                # pinning pays only if every worker gets a core of its own
                core = cores[index] if len(cores) == threads else None
                worker = _Worker({**job, "core": core})
                stack.callback(worker.stop)
                self._workers.append(worker)
            for worker in self._workers:
                worker.check_ready()
            self._resources = stack.pop_all()

    def energy(self, x: State) -> torch.Tensor:
        """Return U(x), [batch] kJ/mol float64 (tblite computes the gradient in any case)."""
        return self.energy_forces(x)[0]

    def energy_forces(self, x: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Return U(x), [batch] kJ/mol, and forces [batch, atom, 3] kJ/mol/nm, both float64.

        Raises:
            NumericsError: a worker process died.
        """
        device = x.positions.device
        positions = x.positions.detach().cpu().to(torch.float64).numpy() / BOHR_NM
        answers = np.full((len(positions), 1 + positions[0].size if len(positions) else 1), np.nan)
        todo = [index for index in range(len(positions)) if np.isfinite(positions[index]).all()]
        self._evaluate(positions, todo, answers)
        energies = torch.from_numpy(answers[:, 0] * HARTREE_KJ_PER_MOL)
        forces = torch.from_numpy(answers[:, 1:].reshape(positions.shape) * -FORCE_UNIT)
        return energies.to(device), forces.to(device)

    def _evaluate(self, positions: np.ndarray, todo: list[int], answers: np.ndarray) -> None:
        """Hand geometries out one at a time: whichever worker is free takes the next, results go where they belong."""
        if not self._workers:
            raise NumericsError("this xTB potential was closed; make a new one")
        waiting = list(reversed(todo))
        with selectors.DefaultSelector() as busy:
            for worker in self._workers[: len(waiting)]:
                index = waiting.pop()
                worker.send(positions[index])
                busy.register(worker.output, selectors.EVENT_READ, (worker, index))
            while busy.get_map():
                for key, _ in busy.select():
                    worker, index = key.data
                    answers[index] = worker.receive(answers.shape[1])
                    busy.unregister(worker.output)
                    if waiting:
                        index = waiting.pop()
                        worker.send(positions[index])
                        busy.register(worker.output, selectors.EVENT_READ, (worker, index))

    def close(self) -> None:
        """Stop the workers and release their cores."""
        self._workers = []
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(system: System, method: str, charge: int) -> None:
    if method not in METHODS:
        raise LongstrideError(f"unknown xTB method {method!r}; known: {', '.join(METHODS)}")
    heavy = sorted({int(number) for number in system.atomic_numbers if not 1 <= number <= MAX_ATOMIC_NUMBER})
    if heavy:
        raise LongstrideError(
            f"{method} has no parameters for atomic number {heavy[0]} in {system.name!r} (1-86 are supported)"
        )
    electrons = int(sum(system.atomic_numbers)) - charge
    if electrons <= 0 or electrons % 2:
        raise LongstrideError(
            f"{system.name!r} with charge {charge} has {electrons} electrons, and {method} here needs an even number of"
            " them; check the total charge and missing hydrogens"
        )


class _Worker:
    """One worker process and the two pipes to it."""

    def __init__(self, job: dict[str, object]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "longstride.potentials.xtb_worker"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env=environment)
        self._input = cast("IO[bytes]", self._process.stdin)
        self.output = cast("IO[bytes]", self._process.stdout)
        self._write(json.dumps(job).encode() + b"\n")

    def check_ready(self) -> None:
        """Wait for the worker's first answer and pass its refusal on."""
        line = self.output.readline()
        if not line:
            raise self._died()
        if problem := json.loads(line)["error"]:
            raise LongstrideError(f"xTB refuses this molecule: {problem}")

    def send(self, positions: np.ndarray) -> None:
        """Send one geometry, [atom, 3] bohr."""
        self._write(np.ascontiguousarray(positions, dtype=np.float64).tobytes())

    def receive(self, count: int) -> np.ndarray:
        """Return the `count` numbers of one answer."""
        data = b""
        while len(data) < count * 8:
            part = self.output.read(count * 8 - len(data))
            if not part:
                raise self._died()
            data += part
        return np.frombuffer(data)

    def stop(self) -> None:
        """End the process: it exits at the end of its input, and is killed if it does not."""
        for pipe in (self._input, self.output):
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._input.write(view) :]
        except BrokenPipeError:
            raise self._died() from None

    def _died(self) -> NumericsError:
        return NumericsError(
            f"an xTB worker process ended unexpectedly (exit status {self._process.poll()}): out of memory, or killed;"
            " run the same command again to continue"
        )
