"""A worker process that evaluates xTB for one molecule: geometries on standard input, energies and gradients back.

Run as `python -m longstride.potentials.xtb_worker` by `XTBPool`. The first line of standard input is a JSON object
(method, atomic_numbers, charge, core); the answer is one JSON line, {"error": null} or a reason. After that each request
is [atom, 3] float64 in bohr, and each answer is 1 + 3 * atoms float64: energy in hartree and gradient in
hartree/bohr, all NaN where the electronic structure did not converge. The worker ends with its standard input.
"""

from __future__ import annotations

import json
import os
import signal
from typing import IO, Any

import numpy as np

from longstride.compute import die_with_parent, pin

METHODS = {"gfn2-xtb": "GFN2-xTB", "gfn1-xtb": "GFN1-xTB"}


def main() -> None:
    """Serve one molecule until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt and closes our input
    die_with_parent()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # whatever the Fortran library prints must not reach the protocol or the terminal
    requests = os.fdopen(os.dup(0), "rb")
    job = json.loads(requests.readline())
    pin(job["core"])
    calculator, problem = _calculator(job)
    answers.write(json.dumps({"error": problem}).encode() + b"\n")
    os.dup2(null, 2)
    if calculator is not None:
        _serve(calculator, len(job["atomic_numbers"]), requests, answers)


def _calculator(job: dict[str, Any]) -> tuple[Any, str | None]:
    try:
        from tblite.interface import Calculator
    except ImportError as error:
        return None, f"tblite cannot be imported ({error}); install tblite"
    numbers = np.array(job["atomic_numbers"], dtype=np.int32)
    # any geometry without overlaps sets the calculator up; requests replace it
    positions = 4.0 * np.arange(len(numbers))[:, None] * np.array([[1.0, 0.0, 0.0]])
    try:
        calculator = Calculator(METHODS[job["method"]], numbers, positions, charge=float(job["charge"]))
        calculator.set("verbosity", 0)
    except Exception as error:  # tblite reports refusals with several exception types
        return None, " ".join(str(error).split())
    return calculator, None


def _serve(calculator: Any, n_atoms: int, requests: IO[bytes], answers: IO[bytes]) -> None:  # noqa: ANN401 - tblite
    size = n_atoms * 3 * 8
    while len(request := requests.read(size)) == size:
        answer = np.full(1 + 3 * n_atoms, np.nan)
        try:
            calculator.update(np.frombuffer(request).reshape(n_atoms, 3))
            # a cold start every time: a restart from the last density saves little here and would make
            # results depend on history, so that a continued run would differ from an uninterrupted one
            result = calculator.singlepoint()
            answer[0] = result.get("energy")
            answer[1:] = np.asarray(result.get("gradient")).ravel()
        except Exception:  # not converged: NaN, for the caller's monitor
            answer[:] = np.nan
        answers.write(answer.tobytes())


if __name__ == "__main__":
    main()
