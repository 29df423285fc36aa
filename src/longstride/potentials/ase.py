"""Any ASE calculator as a `Potential`, by import path."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.errors import LongstrideError
from longstride.potentials.external import ExternalPotential, check_neutral
from longstride.units import ANGSTROM_NM, EV_KJ_PER_MOL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longstride.state import System


class ASEPotential(ExternalPotential):
    """A calculator of the Atomic Simulation Environment (doi:10.1088/1361-648X/aa680e), one configuration after the other.

    ASE has no common way to tell a calculator the charge. It is written to `atoms.info["charge"]` (and the multiplicity 1
    to `atoms.info["spin"]`) and shared out as initial charges, which is what current calculators read; or the option
    "charge" hands it to the factory. An ion whose energy does not depend on any of them is refused.

    Args:
        system: the molecule.
        calculator: "package.module:Factory"; importing it runs the code of that package.
        options: arguments of the factory.
        charge: total charge in elementary charges.
        threads: not used; calculators have ways of their own.
        name: label of the target distribution.

    Raises:
        LongstrideError: the import path is wrong, the factory refuses its options, or the calculator has no forces.
    """

    def __init__(
        self,
        system: System,
        *,
        calculator: str,
        options: Mapping[str, Any] | None = None,
        charge: int = 0,
        threads: int = 1,
        name: str = "ase",
    ) -> None:
        import ase

        super().__init__(system, name=name)
        self._calculator = _made(calculator, dict(options or {}))
        self._atoms = ase.Atoms(numbers=np.asarray(system.atomic_numbers), positions=np.zeros((system.n_atoms, 3)))
        self._atoms.calc = self._calculator
        self._charge = charge
        self._set_charge(charge)
        told = (options or {}).get("charge")
        if told is not None and told != charge:
            raise LongstrideError(f"distill.teacher_options: charge {told} is not that of {system.name!r}, {charge}")
        self._charge_heard = charge == 0 or told is not None

    @property
    def cutoff_nm(self) -> float | None:
        """None: calculators have no common way to say their range."""
        return None

    def _call(self, positions: np.ndarray, boxes: np.ndarray | None, *, forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        import ase.calculators.calculator as errors

        energies, slopes = np.full(len(positions), np.nan), np.full(positions.shape, np.nan)
        for index, configuration in enumerate(positions):
            self._atoms.set_pbc(boxes is not None)
            self._atoms.set_cell(None if boxes is None else boxes[index])
            self._atoms.set_positions(configuration)
            try:
                energy = self._atoms.get_potential_energy()
                self._check_charge(energy)
                slope = self._atoms.get_forces() if forces else np.nan
            except (errors.PropertyNotImplementedError, NotImplementedError) as error:
                raise LongstrideError(f"teacher {self.name} cannot be used: its calculator has no {error}") from error
            except errors.CalculatorSetupError as error:  # an element, a charge, a box: wrong for every configuration
                raise LongstrideError(f"teacher {self.name} refuses {self.system.name!r}: {_line(error)}") from error
            except errors.CalculationFailed:  # this one did not converge
                continue
            energies[index], slopes[index] = energy, slope
        return energies * EV_KJ_PER_MOL, slopes * (EV_KJ_PER_MOL / ANGSTROM_NM) if forces else None

    def _set_charge(self, charge: int) -> None:
        self._atoms.info |= {"charge": charge, "spin": 1}
        self._atoms.set_initial_charges(np.full(self.system.n_atoms, charge / self.system.n_atoms))
        self._calculator.reset()

    def _check_charge(self, energy: float) -> None:
        """The first energy of an ion is compared with that of the neutral molecule."""
        if self._charge_heard:
            return
        self._set_charge(0)
        if self._atoms.get_potential_energy() == energy:
            check_neutral(self.system, self._charge, teacher=self.name)
        self._set_charge(self._charge)
        self._charge_heard = True

    def close(self) -> None:
        """End the program behind the calculator, where it has one."""
        with contextlib.suppress(AttributeError):
            self._calculator.close()


def _made(path: str, options: dict[str, Any]) -> Any:  # noqa: ANN401 - ASE has no common type of calculators
    module, _, factory = path.partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
    except ImportError as error:
        raise LongstrideError(f"distill.teacher_calculator: cannot import {module} ({_line(error)}); install it") from error
    except AttributeError as error:
        raise LongstrideError(f"distill.teacher_calculator: there is no {factory} in {module}") from error
    try:
        return make(**options)
    except Exception as error:  # whatever a foreign factory raises is about its options
        raise LongstrideError(f"distill.teacher_calculator: {path} cannot be made ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
