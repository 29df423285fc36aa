"""Stage `dynamics`: multi-time-step against single-step samples of one teacher -> what changed, and what the student gains.

All seeds of `mts` are compared with all seeds of `sts` at equal masses and friction: structure, energies, temperatures,
spectra, relaxation, diffusion, each with its standard error. The gain is the ratio of simulated time per second of sampling.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis import dynamics_figures, tables
from longstride.analysis import observables as static
from longstride.analysis.block_statistics import Observable, blocks_of, pool
from longstride.analysis.dynamics_run import DynamicsRun
from longstride.analysis.mts_comparison import (
    FEW_SEEDS,
    MIN_SEEDS,
    ComparisonRow,
    ComparisonSettings,
    DynamicsComparison,
    check_comparable,
    compare_dynamics,
    compare_observables,
)
from longstride.analysis.vibrations import configurational_terms
from longstride.data.atomic import read_arrays, write_json
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics.masses import hydrogen_friction
from longstride.errors import DataError
from longstride.fingerprints import code_version
from longstride.potentials.teachers import open_teacher
from longstride.progress import Progress, format_duration
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.systems import load_prepared

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from longstride.config import DynamicsConfig
    from longstride.data.checkpoint import StateFolder
    from longstride.potentials.base import Potential
    from longstride.potentials.teachers import TeacherSpec
    from longstride.systems import Prepared

MAX_WAVENUMBER_PER_CM = 4500.0
UNEVEN = 1.5  # ratio of speeds of two seeds of one method, from which on the gain is remarked upon
TABLES = ("dynamics.csv", "curves.csv")
NOT_ASKED = ComparisonRow(
    observable="configurational temperature",
    part="",
    unit="",
    kind="",
    note="the teacher gives it on dynamics.configurational_frames",
)
ROW_COLUMNS = (
    "candidate_label", "baseline_label", "observable", "part", "unit", "kind", "candidate", "baseline", "difference",
    "combined_se", "z", "verdict", "matters_from", "matters", "candidate_seeds", "baseline_seeds", "candidate_units",
    "baseline_units", "note",
)  # fmt: skip
CURVE_COLUMNS = (
    "observable", "part", "unit", "x", "x_unit", "candidate", "candidate_se", "baseline", "baseline_se",
)  # fmt: skip


def run(
    section: DynamicsConfig,
    *,
    prepared: Path,
    mts: list[Path],
    sts: list[Path],
    out: Path,
    state: Path,
    seed: int,
    threads: int,
    teacher: TeacherSpec,
) -> None:
    """Write dynamics.csv, curves.csv, dynamics.json, figures and the manifest to `out`.

    Args:
        section: how finely.
        prepared: folder of the prepare stage.
        mts: sample folders of method mts, one per seed.
        sts: those of method sts.
        out: where to write.
        state: for what the teacher computes; an interrupted stage continues there.
        seed: of permutations and probes.
        threads: that the teacher may use.
        teacher: opened only where `section.configurational_frames` asks for it.

    Raises:
        DataError: samples are missing, altered, of another method, system or teacher, or without masses, friction or time step.
        LongstrideError: the runs have other masses, friction, temperature, target or box.
    """
    begin = time.monotonic()
    molecule = load_prepared(prepared)
    sides = [[_Samples(folder, method, molecule) for folder in folders] for method, folders in (("mts", mts), ("sts", sts))]
    runs = [[one.run for one in side] for side in sides]
    check_comparable(runs[0], runs[1])  # before anything that takes time
    if section.configurational_frames:
        _check_teacher(teacher.label_for(molecule), runs[0][0].target)
    settings = _settings(section, seed=job_seed(seed, "permutations"))
    found = compare_dynamics(runs[0], runs[1], settings=settings)
    if section.configurational_frames:
        found = _with_configurational(found, runs, section, molecule, teacher, state=state, seed=seed, threads=threads)
    else:
        found = replace(found, rows=_replaced(found.rows, NOT_ASKED))
    cost = _write(out, found, sides, section, molecule)
    print(f"dynamics: {found.statement}; gain {cost['gain']:.3g}; {format_duration(time.monotonic() - begin)}, see {out}")


def _write(
    out: Path,
    found: DynamicsComparison,
    sides: Sequence[Sequence[_Samples]],
    section: DynamicsConfig,
    molecule: Prepared,
) -> dict[str, Any]:
    """Write figures, tables, dynamics.json and the manifest, and return the cost."""
    out.mkdir(parents=True, exist_ok=True)
    first, cost = sides[0][0].run, cost_of(sides[0], sides[1])
    drawn = dynamics_figures.draw(found, out=out)
    tables.write_csv(out / "dynamics.csv", ROW_COLUMNS, found.records())
    tables.write_csv(out / "curves.csv", CURVE_COLUMNS, dynamics_figures.curve_rows(found))
    content = {
        "system": molecule.system.name,
        "target": first.target,
        "temperature_K": first.temperature_K,
        "candidate": found.candidate,
        "baseline": found.baseline,
        "statement": found.statement,
        "rows": [{key: _json(value) for key, value in row.items()} for row in found.records()],
        "cost": cost,
        "conditions": _conditions(first),
        "settings": section.model_dump(mode="json"),
        "methods": [one.summary(molecule) for side in sides for one in side],
        "figures": drawn,
        "tables": list(TABLES),
        "provenance": provenance(),
    }
    write_json(out / "dynamics.json", content)
    files = ["dynamics.json", *TABLES, *(figure["file"] for figure in drawn)]
    write_manifest(out, kind="dynamics", files=files, content={"system": molecule.system.name})
    return cost


class _Samples:
    """One sample folder as the analysis sees it, and what it cost."""

    def __init__(self, folder: Path, method: str, molecule: Prepared) -> None:
        manifest = read_manifest(folder, kind="samples")
        if manifest["method"] != method:
            raise DataError(f"{folder} holds samples of method {manifest['method']}, expected {method}; give the right folder")
        if manifest["system_hash"] != molecule.system_hash:
            raise DataError(f"{folder} was made with another prepared system; delete it and run the sample stage again")
        missing = [key for key in ("masses_Da", "friction_per_ps", "timestep_fs") if key not in manifest]
        if missing:
            raise DataError(f"the manifest of {folder} has no {missing[0]}; delete the folder and run the sample stage again")
        arrays = read_arrays(folder / "samples.safetensors")[0]
        box = manifest.get("box_nm")
        self.manifest, self.method, self.folder = manifest, method, folder
        self.kinetic = arrays["kinetic_energy"]
        self.run = DynamicsRun(
            label=f"{method} {manifest['timestep_fs']:g} fs",
            target=manifest["target"],
            seed=int(manifest["seed"]),
            system=molecule.system,
            masses=np.array(manifest["masses_Da"], dtype=np.float64),
            temperature_K=float(manifest["temperature_K"]),
            friction_per_ps=hydrogen_friction(
                molecule.system, float(manifest["friction_per_ps"]), manifest.get("hydrogen_friction_per_ps")
            ),
            save_interval_ps=float(manifest["save_every"]),
            positions=arrays["positions"],
            velocities=arrays["velocities"],
            potential_energy=arrays["potential_energy"],
            box=None if box is None else np.array(box, dtype=np.float64),
            charges=partial_charges(molecule),
        )

    @property
    def simulated_ps(self) -> float:
        """Length of all replicas together."""
        return self.run.n_frames * self.run.n_replicas * self.run.save_interval_ps

    @property
    def sampling_s(self) -> float:
        """Wall seconds of what was kept."""
        return float(self.manifest["timing"]["sampling_s"])

    def summary(self, molecule: Prepared) -> dict[str, Any]:
        """Return this seed's row of summary.csv, for systems without a comparison by torsions."""
        run, timing = self.run, self.manifest["timing"]
        energy = np.asarray(run.potential_energy, dtype=np.float64)
        temperature = static.temperatures(run, blocks_of(run.n_frames, run.n_replicas))[0]
        moments = static.energy_moments(run, blocks_of(run.n_frames, run.n_replicas), origin=float(energy[0, 0]))[0]
        mean, error = float(moments.values[0]), float(moments.errors[0]) if moments.n_units > 1 else None
        name = self.folder.name.removeprefix("seed")
        return {
            "system": molecule.system.name, "method": self.method, "target": run.target,
            "invariance": self.manifest["invariance"], "seed": int(name) if name.isdigit() else run.seed, "status": "complete",
            "n_samples": run.n_frames * run.n_replicas, "n_chains": run.n_replicas, "mean_energy_kJ_per_mol": mean,
            "mean_energy_ci_low_kJ_per_mol": None if error is None else mean - 1.96 * error,
            "mean_energy_ci_high_kJ_per_mol": None if error is None else mean + 1.96 * error,
            "temperature_K": float(temperature.values[0]), "simulated_ps": self.simulated_ps,
            "energy_calls": self.manifest["counts"].get("energy_calls"),
            "force_calls": self.manifest["counts"].get("force_calls"),
            "simulated_ps_per_s": self.simulated_ps / max(self.sampling_s, 1e-9), "sampling_wall_s": self.sampling_s,
            "burn_in_wall_s": timing.get("burn_in_s"),
        }  # fmt: skip


def partial_charges(molecule: Prepared) -> np.ndarray | None:
    """Return the force field's partial charges, [atom] elementary charges, or None where it has no nonbonded force."""
    import openmm
    from openmm import unit

    for force in molecule.openmm_system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            found = [force.getParticleParameters(index)[0] for index in range(force.getNumParticles())]
            return np.array([charge.value_in_unit(unit.elementary_charge) for charge in found])
    return None


def _settings(section: DynamicsConfig, *, seed: int) -> ComparisonSettings:
    return ComparisonSettings(
        r_max_nm=section.r_max_nm,
        pair_bins=section.pair_bins,
        torsion_bins=section.torsion_bins,
        vacf_lag_ps=section.vacf_lag_ps,
        wavenumbers=(0.0, MAX_WAVENUMBER_PER_CM, section.spectrum_step_per_cm),
        relaxation_lag_ps=section.relaxation_lag_ps,
        diffusion_fit_ps=section.diffusion_fit_ps,
        viscosity_mPa_s=section.viscosity_mPa_s,
        permutations=section.permutations,
        seed=seed,
    )


def _conditions(run: DynamicsRun) -> dict[str, Any]:
    """Return what both methods have in common."""
    light = run.system.atomic_numbers == 1
    friction = np.broadcast_to(run.friction_per_ps, light.shape)
    return {
        "friction_per_ps": float(friction[~light][0] if (~light).any() else friction[0]),
        "hydrogen_friction_per_ps": float(friction[light][0]) if light.any() else None,
        "hydrogen_mass_Da": float(run.masses[light][0]) if light.any() else None,
        "box_nm": None if run.box is None else run.box.tolist(),
        "atoms": run.system.n_atoms,
    }


def cost_of(mts: Sequence[_Samples], sts: Sequence[_Samples]) -> dict[str, Any]:
    """Return simulated ps per second of sampling of each method, and their ratio.

    Equation: gain = (ps_mts / s_mts) / (ps_sts / s_sts), sums over seeds; its standard error is that of the seeds' rates,
    None with one seed. Equilibration, labels and training are not included.
    """
    found: dict[str, Any] = {}
    relative = 0.0
    for side in (mts, sts):
        rates = np.array([one.simulated_ps / max(one.sampling_s, 1e-9) for one in side])
        rate = sum(one.simulated_ps for one in side) / max(sum(one.sampling_s for one in side), 1e-9)
        found[side[0].method] = {
            "simulated_ps": sum(one.simulated_ps for one in side),
            "sampling_s": sum(one.sampling_s for one in side),
            "ps_per_s": rate,
            "ps_per_s_of_seeds": rates.tolist(),
            "timestep_fs": side[0].manifest["timestep_fs"],
            "threads": sorted({int(one.manifest["timing"]["threads"]) for one in side}),
            "teacher_calls": sum(int(one.manifest["counts"]["force_calls"]) for one in side),
            "student_calls": sum(int(one.manifest["counts"]["student_calls"]) for one in side),
        }
        relative += (rates.std(ddof=1) / rates.mean()) ** 2 / len(rates) if len(rates) > 1 else math.nan
    found["gain"] = found["mts"]["ps_per_s"] / found["sts"]["ps_per_s"]
    found["gain_se"] = None if math.isnan(relative) else found["gain"] * math.sqrt(relative)
    found["note"] = _fairness(found)
    return found


def _fairness(cost: dict[str, Any]) -> str:
    """Return what speaks against the gain: other numbers of cores, or seeds of one method at very different speeds."""
    notes = []
    if cost["mts"]["threads"] != cost["sts"]["threads"]:
        notes.append("the methods ran on other numbers of cores; repeat them with as many each")
    for method in ("mts", "sts"):
        rates = cost[method]["ps_per_s_of_seeds"]
        ratio = max(rates) / min(rates)
        if ratio > UNEVEN:
            notes.append(
                f"seeds of {method} differ in speed by a factor of {ratio:.3g} (short runs, compilation, other work on the"
                " machine), so that the gain means little"
            )
    return "; ".join(notes)


def _json(value: Any) -> Any:  # noqa: ANN401 - what a table holds
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_teacher(configured: str, sampled: str) -> None:
    """Refuse another teacher than that of the samples.

    Raises:
        DataError: it is another one.
    """
    if configured != sampled:
        raise DataError(
            f"the samples are of {sampled!r} and the configuration's teacher is {configured!r}; give the teacher that sampled"
            " (section distill), or configurational_frames: 0"
        )


def _with_configurational(
    found: DynamicsComparison,
    runs: Sequence[Sequence[DynamicsRun]],
    section: DynamicsConfig,
    molecule: Prepared,
    teacher: TeacherSpec,
    *,
    state: Path,
    seed: int,
    threads: int,
) -> DynamicsComparison:
    """Replace the row of the configurational temperature, for which the teacher is asked on some frames of every seed."""
    key = fingerprint(
        section.configurational_frames, section.configurational_probes, molecule.system_hash, runs[0][0].target, seed,
        [run.seed for side in runs for run in side], [run.n_frames for side in runs for run in side],
        code_version("dynamics"),
    )  # fmt: skip
    thin = [[_some_frames(run, section.configurational_frames) for run in side] for side in runs]
    total = sum(run.n_frames for side in thin for run in side)
    with (
        open_state(state, key) as store,
        open_teacher(teacher, molecule, charge=molecule.charge, threads=threads) as potential,
    ):
        terms = _Terms(potential, store, section.configurational_probes, total=total, seed=seed)
        pooled = [pool([_configurational(terms.of(run)) for run in side]) for side in thin]
        store.clear()
    row = compare_observables(*pooled, permutations=section.permutations, seed=seed)
    few = min(len(side) for side in runs) < MIN_SEEDS
    row = replace(
        row,
        verdict=FEW_SEEDS if few else row.verdict,
        candidate_seeds=len(runs[0]),
        baseline_seeds=len(runs[1]),
        note="; ".join(text for text in (row.note, f"{section.configurational_probes} probes of the Hessian a frame") if text),
    )
    return replace(found, rows=_replaced(found.rows, row))


def _replaced(rows: Sequence[ComparisonRow], row: ComparisonRow) -> tuple[ComparisonRow, ...]:
    return tuple(row if one.observable == row.observable else one for one in rows)


def _some_frames(run: DynamicsRun, count: int) -> DynamicsRun:
    """Return the run with `count` frames of all its replicas together, evenly spread, at least one of each."""
    wanted = min(run.n_frames, max(1, round(count / run.n_replicas)))
    index = np.unique(np.linspace(0, run.n_frames - 1, wanted).round().astype(int))
    return replace(run, positions=run.positions[index], velocities=None, potential_energy=None, charges=None)


def _configurational(run: DynamicsRun) -> Observable:
    blocks = blocks_of(run.n_frames, run.n_replicas)
    return static.configurational_temperature(run, blocks)


class _Terms:
    """Gradients and Laplacians of the teacher, frame by frame; each is kept as soon as it is known."""

    def __init__(self, teacher: Potential, store: StateFolder, probes: int, *, total: int, seed: int) -> None:
        self._teacher, self._store, self._probes, self._seed = teacher, store, probes, seed
        self._total, self._next = total, 0
        latest = store.latest()
        self._done = 0 if latest is None else latest.step
        self._progress = Progress(f"configurational temperature on {teacher.name}", total, "frames", start=self._done)

    def of(self, run: DynamicsRun) -> DynamicsRun:
        """Return the run with `squared_gradient` and `laplacian`."""
        rows = [self._frame(run, index) for index in range(run.n_frames)]
        return replace(
            run, squared_gradient=np.stack([row[0] for row in rows]), laplacian=np.stack([row[1] for row in rows])
        )  # fmt: skip

    def _frame(self, run: DynamicsRun, index: int) -> tuple[np.ndarray, np.ndarray]:
        number = self._next
        self._next += 1
        if number >= self._done:
            square, laplacian = configurational_terms(
                self._teacher, run.positions[index], box=run.box, probes=self._probes, seed=job_seed(self._seed, number)
            )
            self._store.save_block(number, {"square": square, "laplacian": laplacian})
            self._store.save(number + 1, {"frame": np.array([number])})
        block = self._store.read_block(number)
        self._progress.update(self._next)
        return block["square"], block["laplacian"]
