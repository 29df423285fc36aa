"""Methods `mts` and `sts`: Langevin dynamics on an expensive teacher, with and without a distilled student inside.

Both run the same integrator at the same masses and friction, so that their ratio of wall seconds is the gain of the
student. They start from reference frames and are equilibrated on the teacher with a higher friction, which carries off
the energy by which frames of another potential are strained.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols

from longstride.data.atomic import write_arrays
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import start_positions
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics.masses import hydrogen_friction, repartitioned_masses
from longstride.dynamics.replicas import ReplicaJob, ReplicaResult, group_size, run_replicas
from longstride.dynamics.runner import RunPlan
from longstride.fingerprints import code_version
from longstride.potentials.student import load_student
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.systems import box_values, load_prepared
from longstride.units import BOLTZMANN_KJ_PER_MOL_K, FS_PS

if TYPE_CHECKING:
    from pathlib import Path

    from longstride.config import MTSSampling, STSSampling
    from longstride.potentials.teachers import TeacherSpec


def run_mts(
    section: MTSSampling,
    *,
    prepared: Path,
    distill: Path,
    reference: Path,
    out: Path,
    state: Path,
    seed: int,
    threads: int,
    teacher: TeacherSpec,
) -> None:
    """Write samples of multi-time-step dynamics: the student every inner step, the teacher every outer step.

    Raises:
        DataError: the student is of another teacher, or files are missing.
        LongstrideError: the student does not know an element of the molecule.
        NumericsError: the monitor stopped the dynamics; the last good state is kept.
    """
    trained = read_manifest(distill, kind="distill")
    job = _Job(section, "mts", prepared=prepared, reference=reference, seed=seed, teacher=teacher)
    job.student, job.identity = distill / "student.safetensors", trained["files"]
    load_student(job.student, teacher=job.target).species_of(job.molecule.system)  # a refusal comes before any process starts
    job.max_slow_force = section.max_slow_force_kJ_per_mol_nm
    job.advice = (
        "use a shorter outer_timestep_fs (hydrogens of 1.008 Da allow about 3 fs) or heavier hydrogens (hydrogen_mass_Da), or"
        " distil with more frames"
    )
    job.run(out, state, dt=section.outer_timestep_fs * FS_PS, n_inner=section.inner_steps, threads=threads)


def run_sts(
    section: STSSampling,
    *,
    prepared: Path,
    reference: Path,
    out: Path,
    state: Path,
    seed: int,
    threads: int,
    teacher: TeacherSpec,
) -> None:
    """Write samples of single-step dynamics with the teacher alone, the baseline of `mts`.

    Raises:
        DataError: files are missing.
        NumericsError: the monitor stopped the dynamics; the last good state is kept.
    """
    job = _Job(section, "sts", prepared=prepared, reference=reference, seed=seed, teacher=teacher)
    job.run(out, state, dt=section.timestep_fs * FS_PS, n_inner=0, threads=threads)


class _Job:
    """What the two methods share: inputs, run, output."""

    def __init__(
        self,
        section: MTSSampling | STSSampling,
        method: str,
        *,
        prepared: Path,
        reference: Path,
        seed: int,
        teacher: TeacherSpec,
    ) -> None:
        self.section, self.method, self.seed, self.teacher = section, method, seed, teacher
        self.molecule = load_prepared(prepared)
        self.target = teacher.label_for(self.molecule)
        self.reference = reference
        self.source = read_manifest(reference, kind="reference", verify=False)
        self.temperature_K: float = self.source["temperature_K"]
        self.masses = repartitioned_masses(self.molecule.system, section.hydrogen_mass_Da)
        self.charge = self.molecule.charge
        self.student: Path | None = None
        self.identity: dict[str, Any] = {}
        self.max_slow_force = math.inf
        self.advice = "use a shorter timestep_fs, or check the total charge"

    def run(self, out: Path, state: Path, *, dt: float, n_inner: int, threads: int) -> None:
        """Run or continue the dynamics and write samples and manifest; `n_inner` 0 means no student."""
        section = self.section
        plan = RunPlan.of(section, dt=dt, n_inner=max(1, n_inner))
        job = ReplicaJob(
            molecule=self.molecule,
            teacher=self.teacher,
            charge=self.charge,
            student=self.student,
            n_inner=n_inner,
            masses=self.masses,
            temperature_K=self.temperature_K,
            friction_per_ps=hydrogen_friction(self.molecule.system, section.friction_per_ps, section.hydrogen_friction_per_ps),
            plan=plan,
            max_slow_force=self.max_slow_force,
            advice=self.advice,
            seed=self.seed,
        )
        key = fingerprint(
            section.model_dump(),
            self.molecule.system_hash,
            self.source["files"],
            self.temperature_K,
            self.identity,
            (self.target, self.teacher.options, self.charge, self.seed),
            code_version("sample_mts"),
        )
        starts = start_positions(self.reference, count=section.replicas, seed=job_seed(self.seed, "starts"))
        result = run_replicas(job, starts, state=state, key=key, threads=threads, label=f"sample {self.method}")
        self._write(out, result, plan=plan, n_inner=n_inner, threads=threads)
        with open_state(state, key) as store:
            store.clear()

    def _write(self, out: Path, result: ReplicaResult, *, plan: RunPlan, n_inner: int, threads: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        write_arrays(out / "samples.safetensors", result.frames)
        calls = plan.n_steps * self.section.replicas
        by_element = element_temperatures(result.frames["velocities"], self.masses, self.molecule.system.atomic_numbers)
        # groups run side by side, one per core: the machine is busy for the sum divided by the cores
        busy = min(threads, -(-self.section.replicas // group_size(self.molecule.system.n_atoms)))
        sampling_s, burn_in_s = result.production_s / busy, result.discarded_s / busy
        content = {
            "system": self.molecule.system.name,
            "method": self.method,
            "target": self.target,
            "invariance": "unadjusted",
            "physical_time": True,
            "save_every": plan.save_every * plan.dt,
            "seed": self.seed,
            "system_hash": self.molecule.system_hash,
            "temperature_K": self.temperature_K,
            "masses_Da": self.masses.tolist(),
            "friction_per_ps": self.section.friction_per_ps,
            "hydrogen_friction_per_ps": self.section.hydrogen_friction_per_ps,
            "timestep_fs": plan.dt / FS_PS,
            "box_nm": box_values(self.molecule.box),
            "kinetic_temperature_K": by_element,
            "counts": {
                "force_calls": calls,
                "energy_calls": 0,
                "student_calls": calls * n_inner,
                "steps": calls,
                "burn_in_force_calls": plan.n_discard * self.section.replicas,
            },
            "acceptance": None,
            "timing": {"sampling_s": sampling_s, "burn_in_s": burn_in_s, "threads": busy},
            "provenance": provenance(),
        }
        write_manifest(out, kind="samples", files=["samples.safetensors"], content=content)
        length = plan.n_steps * plan.dt
        rate = self.section.replicas * length / max(sampling_s, 1e-9)
        kinetic = " ".join(f"{symbol} {value:.0f}" for symbol, value in by_element.items())
        print(
            f"{self.method}: {self.section.replicas} replicas of {length:g} ps on {self.target} in"
            f" {sampling_s:.1f} s, {rate:.3g} ps/s; kinetic temperatures {kinetic} K"
        )


def element_temperatures(velocities: np.ndarray, masses: np.ndarray, atomic_numbers: np.ndarray) -> dict[str, float]:
    """Return the mean kinetic temperature of each element in K, <m v^2> / 3R, centre-of-mass motion included.

    Args:
        velocities: [frame, replica, atom, 3] nm/ps, of the half step.
        masses: [atom] Da, as used in the dynamics.
        atomic_numbers: [atom].
    """
    square = (velocities.astype(np.float64) ** 2).sum(axis=3).mean(axis=(0, 1))
    temperatures = masses * square / (3 * BOLTZMANN_KJ_PER_MOL_K)
    return {
        chemical_symbols[number]: float(temperatures[atomic_numbers == number].mean()) for number in np.unique(atomic_numbers)
    }
