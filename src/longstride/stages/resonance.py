"""Stage `resonance`: short multi-time-step runs at longer and longer outer steps until one blows up.

All runs start from the same states, which the teacher alone has equilibrated, and use the same inner step, masses and friction.
Temperatures per element show where a resonance heats before it destroys; T/2 and T/3 of the stiffest modes, and what a
linear model predicts from the student's error along them, are drawn beside (`longstride.analysis.resonance`).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from longstride.analysis import tables
from longstride.analysis.resonance import LIGHT_CM_PER_PS, MeasuredScan, draw_resonance, linear_scan, period_fs
from longstride.analysis.vibrations import NormalModes, minimise, normal_modes
from longstride.data.atomic import write_json
from longstride.data.checkpoint import fingerprint, open_state
from longstride.data.frames import start_positions
from longstride.data.manifest import read_manifest, write_manifest
from longstride.dynamics.integrators import respa_baoab, start, thermal_velocities, whole_steps
from longstride.dynamics.masses import repartitioned_masses
from longstride.dynamics.runner import Monitor, RunPlan, advance_trajectory, collect_frames
from longstride.errors import LongstrideError, NumericsError
from longstride.fingerprints import code_version
from longstride.potentials.amber import compiler_available
from longstride.potentials.student import load_student
from longstride.potentials.teachers import open_teacher
from longstride.progress import Progress
from longstride.provenance import provenance
from longstride.seeds import job_seed
from longstride.state import State
from longstride.systems import load_prepared
from longstride.units import BOLTZMANN_KJ_PER_MOL_K, FS_PS, thermal_energy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from longstride.data.checkpoint import StateFolder
    from longstride.dynamics.integrators import MDState
    from longstride.potentials.base import Potential
    from longstride.potentials.teachers import TeacherSpec
    from longstride.systems import Prepared

Whose = Literal["auto", "teacher", "student"]
TEACHER_MODES_ATOMS = 100  # beyond, the 6 N teacher calls of a Hessian cost more than the scan
SETTLE_FRICTION_PER_PS = 10.0
SAVE_EVERY = 4
CHECKPOINT_EVERY = 20
MAX_FORCE = 4.0  # kJ/mol/nm left at the minimum, far below what shifts a stiff mode
ALONG_NM = 1e-3  # displacement of the fastest atom along a mode, for curvatures
SHOWN_MODES = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is scanned.

    Attributes:
        outer_fs: outer steps, taken in ascending order until one blows up.
        inner_fs: inner step of all of them.
        hydrogen_mass_Da: mass of hydrogens; None keeps 1.008.
        friction_per_ps: Langevin friction.
        replicas: advanced together.
        steps: outer steps of each run.
        settle_ps: equilibration with the teacher alone at the inner step, once for all runs.
        modes: whose Hessian gives the stiffest modes; auto: the teacher's up to 100 atoms.

    Raises:
        LongstrideError: a number out of range, or an outer step that is no whole multiple of the inner one.
    """

    outer_fs: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    inner_fs: float = 1.0
    hydrogen_mass_Da: float | None = None
    friction_per_ps: float = 1.0
    replicas: int = 4
    steps: int = 400
    settle_ps: float = 0.2
    modes: Whose = "auto"

    def __post_init__(self) -> None:
        if not (self.inner_fs > 0 and self.friction_per_ps >= 0 and self.settle_ps > 0):
            raise LongstrideError("a resonance scan needs an inner step and settling above zero, and no negative friction")
        if self.replicas < 2 or self.steps < 2 * SAVE_EVERY:
            raise LongstrideError(f"a resonance scan needs 2 replicas and {2 * SAVE_EVERY} steps or more, for its errors")
        if not self.outer_fs or len(set(self.outer_fs)) < len(self.outer_fs):
            raise LongstrideError("give one outer step or more, each once (--outer-fs)")
        for outer in self.outer_fs:
            whole_steps(outer, self.inner_fs)


def run(
    settings: Settings,
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
    """Write resonance.csv, resonance.json, resonance.svg and the manifest to `out`; finished outer steps are kept in `state`.

    Raises:
        DataError: the student is of another teacher, or files are missing.
        LongstrideError: teacher or student cannot treat the molecule.
        NumericsError: the teacher alone is not stable at the inner step.
    """
    torch.set_num_threads(1)
    molecule, source = load_prepared(prepared), read_manifest(reference, kind="reference", verify=False)
    trained = read_manifest(distill, kind="distill")
    target = teacher.label_for(molecule)
    network = load_student(distill / "student.safetensors", teacher=target)
    periodic = molecule.box is not None
    # modes need few calls of other shapes, each of which would be compiled anew
    student, plain = (network.bind(molecule.system, periodic=periodic, compile=c) for c in (compiler_available(), False))
    shared = {key: value for key, value in asdict(settings).items() if key not in ("outer_fs", "modes")}
    key = fingerprint(
        shared, molecule.system_hash, source["files"], trained["files"], target, teacher.options, seed,
        code_version("resonance"),
    )  # fmt: skip
    with open_teacher(teacher, molecule, charge=molecule.charge, threads=threads) as potential:
        scan = _Scan(
            settings=settings, molecule=molecule, teacher=potential, student=student, plain=plain,
            masses=repartitioned_masses(molecule.system, settings.hydrogen_mass_Da),
            temperature_K=source["temperature_K"], seed=seed, state=state, key=key,
        )  # fmt: skip
        starts = start_positions(reference, count=settings.replicas, seed=job_seed(seed, "starts"))
        rows = scan.rows(starts)
        modes = scan.modes(starts[0])
    content = {"system": molecule.system.name, "target": target, "temperature_K": source["temperature_K"]}
    content |= {"settings": asdict(settings), "rows": rows, "modes": modes, "statement": statement(rows, modes)}
    _write(out, {**content, "provenance": provenance()})
    print(f"resonance: {content['statement']}, see {out}")


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """The runs of a scan, one after another, and the modes beside them; `plain` is the student, not compiled."""

    settings: Settings
    molecule: Prepared
    teacher: Potential
    student: Potential
    plain: Potential
    masses: np.ndarray
    temperature_K: float
    seed: int
    state: Path
    key: str

    def rows(self, starts: np.ndarray) -> list[dict[str, Any]]:
        """Return one row per outer step, up to the first that blows up; finished ones are read back."""
        found: list[dict[str, Any]] = []
        settled: MDState | None = None
        for outer in sorted(self.settings.outer_fs):
            path = self.state / f"outer_{outer:g}.json"
            row = _finished(path, self.key)
            if row is None:
                settled = self._settled(starts) if settled is None else settled
                row = self._one(outer, settled)
                write_json(path, {"key": self.key, "row": row})
            found.append(row)
            if row["blow_up_ps"] is not None:
                print(f"resonance: {outer:g} fs blew up after {row['blow_up_ps']:.3f} ps: {row['reason']}", flush=True)
                break
        return found

    def _settled(self, starts: np.ndarray) -> MDState:
        """Return thermal states of the teacher; n_inner = 1 is single-step dynamics on it, whatever the student."""
        dt = self.settings.inner_fs * FS_PS
        steps = max(1, round(self.settings.settle_ps / dt))
        plan = RunPlan(dt=dt, n_discard=steps, n_steps=0, save_every=1, checkpoint_every=CHECKPOINT_EVERY)
        masses = torch.from_numpy(self.masses)

        def begin() -> MDState:
            positions = torch.from_numpy(starts)
            generator = torch.Generator().manual_seed(job_seed(self.seed, "velocities"))
            velocities = thermal_velocities(positions.shape, masses, thermal_energy(self.temperature_K), generator)
            box = (
                None
                if self.molecule.box is None
                else torch.from_numpy(self.molecule.box).expand(len(starts), 3, 3).contiguous()
            )
            return start(positions, velocities, masses=masses, potential=self.teacher, fast=self.student, box=box)

        with open_state(self.state / "settled", self.key) as store:
            return self._advance(begin, plan, store=store, friction=SETTLE_FRICTION_PER_PS, label="settling")

    def _advance(
        self,
        begin: Callable[[], MDState],
        plan: RunPlan,
        *,
        store: StateFolder,
        friction: float,
        label: str,
    ) -> MDState:
        kT, slow, fast = thermal_energy(self.temperature_K), self.teacher, self.student
        return advance_trajectory(
            begin,
            lambda md, generator: respa_baoab(
                md, fast=fast, slow=slow, n_inner=plan.n_inner, dt=plan.dt, kT=kT, friction=friction, generator=generator
            ),
            plan=plan,
            generator=torch.Generator().manual_seed(job_seed(self.seed, "noise", label)),
            monitor=Monitor(
                system=self.molecule.system, temperature_K=self.temperature_K, advice="a shorter outer step is stable"
            ),
            store=store,
            progress=Progress(f"resonance, {label}", plan.total, "steps").update,
        )[0]

    def _one(self, outer: float, settled: MDState) -> dict[str, Any]:
        """Run one outer step of the scan and return its row."""
        settings = self.settings
        steps = settings.steps // SAVE_EVERY * SAVE_EVERY
        plan = RunPlan(
            dt=outer * FS_PS, n_discard=0, n_steps=steps, save_every=SAVE_EVERY, checkpoint_every=CHECKPOINT_EVERY,
            n_inner=whole_steps(outer, settings.inner_fs),
        )  # fmt: skip
        reason, done = "", steps
        with open_state(self.state / f"outer_{outer:g}", self.key) as store:
            try:
                self._advance(lambda: settled, plan, store=store, friction=settings.friction_per_ps, label=f"{outer:g} fs")
            except NumericsError as error:
                reason = _why(error)
                latest = store.latest()
                done = 0 if latest is None else latest.step
            kept = replace(plan, n_steps=done // SAVE_EVERY * SAVE_EVERY)
            velocities = collect_frames(store, kept).get("velocities")
            store.clear()
        blown = (done + 1) * plan.dt if reason else None
        row = {
            "outer_fs": outer, "n_inner": plan.n_inner, "inner_fs": settings.inner_fs, "replicas": settings.replicas,
            "steps": done, "simulated_ps": done * plan.dt, "blow_up_ps": blown, "reason": reason,
        }  # fmt: skip
        return {**row, "temperatures_K": {} if velocities is None else self._temperatures(velocities)}

    def _temperatures(self, velocities: np.ndarray) -> dict[str, tuple[float, float]]:
        """Return (mean, standard error over replicas) of the last two thirds of a run per element, K."""
        from ase.data import chemical_symbols

        kept = velocities[len(velocities) // 3 :].astype(np.float64)
        per_atom = self.masses * (kept**2).sum(axis=3).mean(axis=0) / (3 * BOLTZMANN_KJ_PER_MOL_K)
        numbers = self.molecule.system.atomic_numbers
        found = {}
        for number in np.unique(numbers):
            values = per_atom[:, numbers == number].mean(axis=1)
            found[chemical_symbols[number]] = (float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))
        return found

    def modes(self, positions: np.ndarray) -> dict[str, Any]:
        """Return period, curvature and the student's error of the stiffest mode of each bond type; see `_curvatures`.

        A structure that does not relax gives none, with the reason, since the scan itself does not depend on it.
        """
        whose = self.settings.modes
        if whose == "auto":
            whose = "teacher" if self.molecule.system.n_atoms <= TEACHER_MODES_ATOMS else "student"
        potential = self.teacher if whose == "teacher" else self.plain
        box = self.molecule.box
        try:
            minimum = minimise(potential, positions, box=box, max_force=MAX_FORCE, max_steps=5000)
            found = normal_modes(potential, minimum, masses=self.masses, box=box)
        except NumericsError as error:
            print(f"resonance: no normal modes of the {whose}: {error}", flush=True)
            return {"of": whose, "stiffest": {}, "note": str(error)}
        return {"of": whose, "stiffest": self._curvatures(found), "note": ""}

    def _curvatures(self, modes: NormalModes) -> dict[str, dict[str, float]]:
        """Return wavenumber, period and slow share of the stiffest mode of each bond type, stiffest first.

        Equation: along a mode u = M^-1/2 e, w^2 = u . H u of the teacher by a central difference of its forces; the slow share
        d = 1 - (u . H_student u) / (u . H_teacher u) is the part of the stiffness that the student misses.
        """
        found = {}
        for label, wavenumber in sorted(modes.stiffest.items(), key=lambda item: -item[1]):
            index = int(np.flatnonzero(modes.wavenumbers == wavenumber)[0])
            along = modes.vectors[index] / np.sqrt(self.masses)[:, None]
            square, fast = (self._curvature(potential, modes.positions, along) for potential in (self.teacher, self.plain))
            if not square > 0:
                continue
            true = math.sqrt(square) / (2 * math.pi * LIGHT_CM_PER_PS)
            found[label] = {"wavenumber_per_cm": true, "period_fs": period_fs(true), "slow_share": 1 - fast / square}
        return found

    def _curvature(self, potential: Potential, positions: np.ndarray, along: np.ndarray) -> float:
        step = ALONG_NM / float(np.linalg.norm(along, axis=1).max())
        x = torch.from_numpy(np.stack([positions + step * along, positions - step * along]))
        box = None if self.molecule.box is None else torch.from_numpy(self.molecule.box).expand(2, 3, 3).contiguous()
        ahead, behind = potential.energy_forces(State(positions=x, box=box))[1].detach().double().cpu().numpy()
        return float(-((ahead - behind) * along).sum() / (2 * step))


def _why(error: NumericsError) -> str:
    """Return the middle of the monitor's line: what was wrong and where."""
    return str(error).partition(": ")[2].partition(";")[0] or str(error)


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return stored["row"] if stored.get("key") == key else None


def statement(rows: Sequence[dict[str, Any]], modes: dict[str, Any]) -> str:
    """Return one line: the longest outer step that held, the first that did not, and the nearest resonances."""
    held = [row["outer_fs"] for row in rows if row["blow_up_ps"] is None]
    lost = [row for row in rows if row["blow_up_ps"] is not None]
    first = f"stable up to {max(held):g} fs" if held else "no outer step was stable"
    then = (
        f", blew up at {lost[0]['outer_fs']:g} fs after {lost[0]['blow_up_ps']:.3f} ps" if lost else ", no blow-up in the scan"
    )
    stiffest = next(iter(modes["stiffest"].items()), None)
    if stiffest is None:
        return first + then
    period = stiffest[1]["period_fs"]
    return f"{first}{then}; {stiffest[0]} has T/3 = {period / 3:.2f} and T/2 = {period / 2:.2f} fs ({modes['of']})"


def _write(out: Path, content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = content["rows"]
    elements = sorted({symbol for row in rows for symbol in row["temperatures_K"]})
    columns = [name for name in rows[0] if name != "temperatures_K"]
    columns += [f"temperature_{symbol}{tail}_K" for symbol in elements for tail in ("", "_se")]
    flat = [
        {
            **row,
            **{f"temperature_{symbol}_K": pair[0] for symbol, pair in row["temperatures_K"].items()},
            **{f"temperature_{symbol}_se_K": pair[1] for symbol, pair in row["temperatures_K"].items()},
        }
        for row in rows
    ]
    tables.write_csv(out / "resonance.csv", columns, flat)
    write_json(out / "resonance.json", content)
    _draw(out / "resonance.svg", content, elements)
    files = ["resonance.csv", "resonance.json", "resonance.svg"]
    write_manifest(out, kind="resonance", files=files, content={"system": content["system"]})


def _draw(path: Path, content: dict[str, Any], elements: Sequence[str]) -> None:
    rows, settings = content["rows"], content["settings"]
    outer = np.array([row["outer_fs"] for row in rows])
    last = float(outer.max()) + 1
    near = {label: one for label, one in content["modes"]["stiffest"].items() if one["period_fs"] / 3 < last}
    shown = dict(list(near.items())[:SHOWN_MODES])
    grid = np.arange(max(1.0, settings["inner_fs"]), last, 0.01)
    linear = [
        linear_scan(
            grid, wavenumber_per_cm=one["wavenumber_per_cm"], slow_share=round(one["slow_share"], 3), label=label,
            inner_step_fs=settings["inner_fs"], friction_per_ps=settings["friction_per_ps"],
        )
        for label, one in shown.items()
    ]  # fmt: skip

    def series(symbol: str, part: int) -> np.ndarray:
        lost = (math.nan, math.nan)
        pairs = [row["temperatures_K"].get(symbol, lost) if row["blow_up_ps"] is None else lost for row in rows]
        return np.array([pair[part] for pair in pairs])

    measured = [
        MeasuredScan(
            label=symbol, quantity="temperature (K)", dt_outer_fs=outer, values=series(symbol, 0), errors=series(symbol, 1)
        )
        for symbol in elements
    ]
    draw_resonance(path, linear=linear, periods_fs={label: one["period_fs"] for label, one in shown.items()}, measured=measured)
