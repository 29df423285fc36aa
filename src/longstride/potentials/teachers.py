"""Teachers: the expensive potentials that dynamics target and students imitate, chosen by name.

`TeacherSpec` is what the configuration says, `open_teacher` makes the potential, checked against the molecule before any
work. Packages of a teacher are imported only when it is opened.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from longstride.errors import LongstrideError
from longstride.potentials.weights import weights_digest
from longstride.systems import Prepared

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longstride.config import DistillConfig
    from longstride.potentials.base import Potential
    from longstride.state import System

# options that each kind takes; None: any, they go to the calculator
OPTIONS: dict[str, frozenset[str] | None] = {
    "gfn2-xtb": frozenset(),
    "gfn1-xtb": frozenset(),
    "fennol": frozenset({"dtype"}),
    "torchani": frozenset({"dtype", "device", "member"}),
    "mace": frozenset({"dtype", "device", "unsafe_pickle"}),
    "aimnet2": frozenset({"device"}),
    "openmm": frozenset({"platform"}),
    "ase": None,
}
ISOLATED = ("gfn2-xtb", "gfn1-xtb")
WITH_WEIGHTS = ("fennol", "torchani", "mace", "aimnet2")
WITH_MODEL = ("torchani", "mace", "aimnet2")
DEFAULT_MODELS = {"torchani": "ani2x", "aimnet2": "aimnet2"}
DTYPES = ("float32", "float64")


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Which teacher, in plain values.

    Attributes:
        kind: one of `OPTIONS`.
        weights: paths of weight files; several make an ensemble where the kind has them.
        model: name of a model that the kind's own package fetches, such as "ani2x" or "off23-small".
        calculator: import path of an ASE calculator, "package.module:Factory".
        options: further settings of the kind.

    Raises:
        LongstrideError: an unknown kind, or a setting that the kind does not have.
    """

    kind: str
    weights: tuple[str, ...] = ()
    model: str | None = None
    calculator: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = self.kind
        if kind not in OPTIONS:
            raise LongstrideError(f"unknown teacher {kind!r}; known: {', '.join(OPTIONS)}")
        if self.weights and kind not in WITH_WEIGHTS:
            raise LongstrideError(f"teacher {kind} has no weight files; remove distill.teacher_weights")
        if self.model is not None and kind not in WITH_MODEL:
            raise LongstrideError(f"teacher {kind} has no named models; remove distill.teacher_model")
        if (self.calculator is not None) != (kind == "ase"):
            need = "needs" if kind == "ase" else "has no"
            raise LongstrideError(f"teacher {kind} {need} distill.teacher_calculator (package.module:Factory)")
        known = OPTIONS[kind]
        if known is not None and (unknown := sorted(set(self.options) - known)):
            raise LongstrideError(
                f"teacher {kind} has no option {unknown[0]!r} (distill.teacher_options); it has"
                f" {', '.join(sorted(known)) or 'none'}"
            )
        if known is not None and self.options.get("dtype", "float32") not in DTYPES:
            raise LongstrideError(f"distill.teacher_options: dtype is {' or '.join(DTYPES)}, not {self.options['dtype']!r}")

    @classmethod
    def of(cls, section: DistillConfig) -> TeacherSpec:
        """Return what section `distill` of the configuration says.

        Raises:
            LongstrideError: the keys contradict each other.
        """
        return cls(
            kind=section.teacher,
            weights=section.teacher_weights,
            model=section.teacher_model,
            calculator=section.teacher_calculator,
            options=dict(section.teacher_options),
        )

    @property
    def label(self) -> str:
        """Name of the target distribution; a student is bound to it.

        Weight files enter by their content, so that a student is never used with other weights of the same name. The
        label of kind "openmm" is that of no force field in particular; see `label_for`.

        Raises:
            DataError: a weight file cannot be read.
        """
        if self.kind == "fennol" and self.weights:
            from longstride.potentials.fennol import fennol_label

            return fennol_label(self.weights)
        parts = [self.kind]
        if self.kind == "ase":
            parts.append(str(self.calculator).replace(":", "."))
            if self.options:
                parts.append(sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()[:8])
        model = self.model or (None if self.weights and self.kind != "torchani" else DEFAULT_MODELS.get(self.kind))
        if model not in (None, self.kind):
            parts.append(str(model))
        if "member" in self.options:
            parts.append(f"m{self.options['member']}")
        if self.weights:
            count = f"x{len(self.weights)}-" if len(self.weights) > 1 else ""
            parts.append(f"{count}{weights_digest(self.weights)}")
        return "-".join(parts)

    def label_for(self, molecule: Prepared | System) -> str:
        """Return `label`, and for kind "openmm" the label of the molecule's own force field."""
        return molecule.target if self.kind == "openmm" and isinstance(molecule, Prepared) else self.label


@contextlib.contextmanager
def open_teacher(
    spec: TeacherSpec, molecule: Prepared | System, *, charge: int | None = None, threads: int = 1
) -> Iterator[Potential]:
    """Yield the teacher, bound to a molecule; its processes and compiled functions end with the block.

    Args:
        spec: which teacher.
        molecule: a prepared molecule; a bare System suffices except for kind "openmm".
        charge: total charge in elementary charges; None: that of the prepared molecule, or zero.
        threads: threads or worker processes that the teacher may use.

    Raises:
        DataError: a weight file is missing or damaged.
        LongstrideError: a package is missing, or the teacher cannot treat an element, the charge or a periodic box.
    """
    if charge is None:
        charge = molecule.charge if isinstance(molecule, Prepared) else 0
    with contextlib.ExitStack() as stack:
        potential = _make(spec, molecule, charge=charge, threads=threads)
        stack.callback(getattr(potential, "close", lambda: None))
        yield potential


def _make(spec: TeacherSpec, molecule: Prepared | System, *, charge: int, threads: int) -> Potential:
    prepared = molecule if isinstance(molecule, Prepared) else None
    system = molecule.system if isinstance(molecule, Prepared) else molecule
    box = None if prepared is None else prepared.box
    if spec.kind in ISOLATED and box is not None:
        raise LongstrideError(
            f"teacher {spec.kind} treats isolated molecules, and {system.name!r} is in a periodic box; choose another teacher"
        )
    common: dict[str, Any] = {"charge": charge, "threads": threads}
    if spec.kind in ISOLATED:
        from longstride.potentials.xtb import XTBPotential

        return XTBPotential(system, method=spec.kind, **common)
    common["name"] = spec.label_for(molecule)
    potential: Potential
    if spec.kind == "openmm":
        potential = _openmm(spec, prepared, threads=threads)
    elif spec.kind == "fennol":
        from longstride.potentials.fennol import FennolPotential

        potential = FennolPotential(system, weights=spec.weights, **common, **spec.options)
    elif spec.kind == "ase":
        from longstride.potentials.ase import ASEPotential

        potential = ASEPotential(system, calculator=str(spec.calculator), options=spec.options, **common)
    else:
        potential = _torch_teacher(spec, system, common)
    _check_range(potential, box)
    return potential


def _torch_teacher(spec: TeacherSpec, system: System, common: dict[str, Any]) -> Potential:
    settings = {"weights": spec.weights, "model": spec.model, **common, **spec.options}
    if spec.kind == "torchani":
        from longstride.potentials.torchani import TorchANIPotential

        return TorchANIPotential(system, **settings)
    if spec.kind == "mace":
        from longstride.potentials.mace import MACEPotential

        return MACEPotential(system, **settings)
    from longstride.potentials.aimnet import AIMNet2Potential

    return AIMNet2Potential(system, **settings)


def _openmm(spec: TeacherSpec, prepared: Prepared | None, *, threads: int) -> Potential:
    from longstride.potentials.openmm import OpenMMPotential

    if prepared is None:
        raise LongstrideError("teacher openmm is the force field of a prepared molecule, and only its atoms were given")
    platform = spec.options.get("platform", "CPU")
    return OpenMMPotential(
        prepared.openmm_system, prepared.system, name=spec.label_for(prepared), platform=platform, threads=threads
    )


def _check_range(potential: Potential, box: Any) -> None:  # noqa: ANN401 - an array, or None
    """A box that is too small is refused before any work, not at the first step."""
    cutoff_nm = getattr(potential, "cutoff_nm", None)
    if box is not None and cutoff_nm is not None:
        import numpy as np

        from longstride.potentials.periodic import check_box

        check_box(np.asarray(box, dtype=np.float64)[None], cutoff_nm, potential.system.name)
