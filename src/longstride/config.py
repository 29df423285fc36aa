"""The typed configuration: one model, units in the key names, ranges checked, unknown keys refused.

`load_config` reads YAML (only plain values, never code), `Config` holds it, `stage_view` is the part that one
job depends on: a rule re-runs when its view changes and not otherwise.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from longstride.errors import ConfigError
from longstride.fingerprints import files_digest

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Method = Literal["md", "tuned-md", "metadynamics", "tempering", "timewarp", "explore", "mts", "sts"]
METHODS: tuple[Method, ...] = typing.get_args(Method)
IN_A_BOX: tuple[Method, ...] = ("mts", "sts")
DEFAULT_METHODS: tuple[Method, ...] = ("md", "timewarp", "explore", "mts", "sts")
Energies = Literal["batched", "openmm"]
Teacher = Literal["gfn2-xtb", "gfn1-xtb", "fennol", "torchani", "mace", "aimnet2", "openmm", "ase"]
FITTED_STATES = "torsion states to which the density of bonds and angles is fitted before the first step"
ENERGIES = "who evaluates the target: batched (thousands of configurations at once) or openmm (any System, one by one)"


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _check_multiple(value: float, step: float, value_name: str, step_name: str) -> None:
    ratio = value / step
    if abs(ratio - round(ratio)) > 1e-6 * max(ratio, 1) or round(ratio) < 1:
        raise ValueError(f"{value_name} must be a whole multiple of {step_name} (the ratio is {ratio:g})")


class RunConfig(Section):
    """Identity of a run."""

    name: Name = Field("alanine", description="results go to <folder>/<name>/")
    folder: str = Field("results", min_length=1, description="where runs live, relative to the working folder")
    seed: int = Field(2026, ge=0, description="every random stream of the run is derived from it")


class SolvateConfig(Section):
    """Water around a molecule, in a cubic periodic box."""

    molecules: int | None = Field(
        None, ge=1, le=200_000, description="water molecules; ions that neutralise a charged molecule take the place of some"
    )
    padding_nm: float | None = Field(
        None, gt=0, le=5, description="or: box edge less the diameter of the molecule; the number of molecules follows"
    )
    density_g_per_cm3: float = Field(
        0.997, gt=0.5, lt=1.5, description="of the water, to which the box is scaled before it is relaxed"
    )

    @model_validator(mode="after")
    def _one_size(self) -> SolvateConfig:
        if (self.molecules is None) == (self.padding_nm is None):
            raise ValueError("solvate needs exactly one of 'molecules' and 'padding_nm'")
        return self


class SystemConfig(Section):
    """One molecule, from a sequence or from a structure file, alone or in water; or a box of water."""

    name: Name = Field(description="label in paths and tables")
    sequence: str | None = Field(
        None, min_length=1, description="one-letter residues (AA, YLFP: zwitterionic) or dash-separated names (ACE-ALA-NME)"
    )
    file: str | None = Field(None, min_length=1, description="a PDB or mmCIF file with all atoms, instead of a sequence")
    water: int | None = Field(
        None, ge=1, le=200_000, description="molecules of a periodic box of water, instead of a sequence or file"
    )
    ligand: str | None = Field(
        None,
        min_length=1,
        description="an SDF file with the small molecule bound to that of 'file', placed, hydrogens included",
    )
    ligand_charges: Literal["am1-bcc", "gasteiger"] | None = Field(
        None, description="partial charges of the ligand, null: am1-bcc; gasteiger needs no LAPACK and is far coarser"
    )
    solvate: SolvateConfig | None = Field(None, description="water around the molecule; physics.force_field names its model")

    @model_validator(mode="after")
    def _one_source(self) -> SystemConfig:
        if sum(source is not None for source in (self.sequence, self.file, self.water)) != 1:
            raise ValueError(f"system {self.name!r} needs exactly one of 'sequence' and 'file', or 'water' for a box of water")
        if self.water is not None and self.solvate is not None:
            raise ValueError(f"system {self.name!r} is a box of water already; drop 'solvate'")
        if self.ligand is not None and self.file is None:
            raise ValueError(f"system {self.name!r} has a ligand but no 'file' with the molecule that it is bound to")
        if self.ligand_charges is not None and self.ligand is None:
            raise ValueError(f"system {self.name!r} has no 'ligand' for 'ligand_charges'")
        return self

    @property
    def periodic(self) -> bool:
        """Whether the system lies in a periodic box."""
        return self.water is not None or self.solvate is not None


class PhysicsConfig(Section):
    """The AMBER-type target potential and its temperature."""

    temperature_K: float = Field(310.0, gt=0, le=2000, description="temperature of every target distribution")
    force_field: tuple[str, ...] = Field(
        ("amber14-all.xml", "implicit/obc1.xml"), min_length=1, description="OpenMM force field files, by name or path"
    )
    cutoff_nm: float | None = Field(
        2.0,
        gt=0,
        description="non-periodic cutoff with reaction field, null for none; in a periodic box that of the direct sum of PME",
    )


class ReferenceConfig(Section):
    """Reference molecular dynamics (Langevin, no constraints)."""

    engine: Literal["openmm", "batched"] = Field(
        "openmm", description="openmm: one process per trajectory; batched: hundreds of trajectories at once, many times faster"
    )
    trajectories: int = Field(8, ge=2, description="independent trajectories, started in different basins")
    length_ps: float = Field(300.0, gt=0, description="production length of each trajectory")
    equilibration_ps: float = Field(10.0, ge=0, description="discarded start of each trajectory")
    timestep_fs: float = Field(2.0, gt=0, le=8, description="integration step")
    friction_per_ps: float = Field(0.3, gt=0, description="Langevin friction")
    hydrogen_mass_Da: float | None = Field(
        3.024, ge=1, le=4, description="hydrogen mass, taken from the bonded atom (positions stay Boltzmann); null keeps 1.008"
    )
    save_every_ps: float = Field(0.2, gt=0, description="time between saved frames")
    checkpoint_every_ps: float = Field(20.0, gt=0, description="simulated time between checkpoints")
    compile_energy: bool | None = Field(
        None,
        description="engine batched: compile forces, ten times faster after 10-40 s once; null: where a C++ compiler is found",
    )

    @model_validator(mode="after")
    def _whole_frames(self) -> ReferenceConfig:
        _check_multiple(self.save_every_ps * 1000, self.timestep_fs, "save_every_ps", "timestep_fs")
        _check_multiple(self.checkpoint_every_ps, self.save_every_ps, "checkpoint_every_ps", "save_every_ps")
        _check_multiple(self.length_ps, self.save_every_ps, "length_ps", "save_every_ps")
        return self


class ShardConfig(Section):
    """Training shards: lagged pairs, split by trajectory."""

    lags_ps: tuple[float, ...] = Field((100.0,), min_length=1, description="time lags tau of the pairs (x(t), x(t+tau))")
    validation_fraction: float = Field(0.25, gt=0, lt=1, description="fraction of the trajectories held out")
    frames_per_shard: int = Field(2000, ge=1, description="pair starts in one shard file")


class CartesianConfig(Section):
    """The flow in Cartesian coordinates, the published Timewarp model: sizes and training."""

    preset: Literal["small", "ad", "2aa", "4aa"] = Field(
        "small", description="sizes: the published ad (36 M parameters), 2aa (106 M), 4aa (396 M), or small for a CPU"
    )
    batch_size: int = Field(64, ge=1, description="pairs per optimiser step")
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate (AdamW, warm-up, cosine decay)")
    warm_up_steps: int = Field(200, ge=0, description="steps over which the learning rate rises to its peak")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    centre_step_nm: float = Field(
        0.1, ge=0, description="width of the random step that training gives the centre of mass, per axis"
    )
    turn_step_rad: float | None = Field(
        None, gt=0, description="superpose y on x and turn it by this width, per axis; null keeps the tumbling, as published"
    )
    acceptance_weight: float = Field(
        0.0, ge=0, lt=1, description="share of the acceptance loss, as published 0.1; the likelihood's is the rest"
    )
    entropy_weight: float = Field(0.1, ge=0, description="weight of the entropy of the proposals within the acceptance loss")
    acceptance_batch: int = Field(16, ge=1, description="proposals per step of the acceptance loss")
    acceptance_from_step: int = Field(
        0, ge=0, description="step at which the acceptance loss sets in, after the likelihood alone"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where it is trained; auto: a GPU where there is one")


class FlowConfig(Section):
    """The internal-coordinate conditional flow and its training."""

    coordinates: Literal["internal", "cartesian"] = Field(
        "internal", description="internal, or cartesian for the published model (section cartesian and the limits here)"
    )
    max_steps: int = Field(1500, ge=1, description="optimiser steps; the learning rate falls to zero at this step")
    max_seconds: float = Field(
        1800.0,
        gt=0,
        description="safety stop: after this much wall time the learning rate is run down early (a machine-dependent end)",
    )
    batch_size: int = Field(256, ge=1, description="pairs per optimiser step")
    learning_rate: float = Field(3e-3, gt=0, description="peak learning rate (AdamW, warm-up, cosine decay)")
    warm_up_steps: int = Field(100, ge=0, description="steps over which the learning rate rises to its peak")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay")
    hidden: int = Field(64, ge=8, description="width of the torsion and coupling networks")
    couplings: int = Field(6, ge=2, description="affine coupling layers over the stiff coordinates")
    torsion_components: int = Field(12, ge=1, description="wrapped-normal components per free torsion")
    independent_fraction: float = Field(
        0.3, ge=0, lt=1, description="fraction of a batch trained as infinitely lagged (y drawn without seeing x)"
    )
    energy_weight: float = Field(
        0.9, ge=0, le=1, description="share of the energy term in the loss of the stiff coordinates; the data's is the rest"
    )
    balance_weight: float = Field(2.0, ge=0, description="weight of the detailed-balance term of the torsions")
    energy_batch: int = Field(256, ge=1, description="configurations per step of the energy term")
    energy_from_step: int = Field(200, ge=0, description="step at which the energy term sets in")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="exponential moving average of the weights")
    metrics_every_steps: int = Field(250, ge=1, description="optimiser steps between rows of metrics.csv")
    checkpoint_every_steps: int = Field(250, ge=1, description="optimiser steps between checkpoints")
    cartesian: CartesianConfig = CartesianConfig()


class ChainsConfig(Section):
    """Exact chains of peptides, the training data of the transferable flow."""

    chains: int = Field(128, ge=2, description="chains advanced together")
    steps: int = Field(2000, ge=1, description="proposals per chain that count")
    burn_in: int = Field(800, ge=0, description="proposals per chain discarded before")
    save_every: int = Field(20, ge=1, description="proposals between saved states")
    flow_probability: float = Field(0.5, ge=0, le=1, description="share of flow proposals, where there is a flow")
    compile_energy: bool | None = Field(
        None,
        description="compile the target energy, several times faster after 10-40 s once; null: where a C++ compiler is found",
    )
    fitted_states: int = Field(300, ge=10, description=FITTED_STATES)
    checkpoint_every: int = Field(200, ge=1, description="proposals between checkpoints")
    energies: Energies = Field("batched", description=ENERGIES)

    @model_validator(mode="after")
    def _whole_saves(self) -> Self:
        _check_multiple(self.steps, self.save_every, "steps", "save_every")
        return self


class TransferConfig(Section):
    """The transferable flow: one torsion network for every peptide."""

    shipped: bool = Field(
        default=False, description="sample with the flow for peptides that comes with the package; nothing is trained"
    )
    train: tuple[str, ...] = Field((), description="sequences of the training peptides; none: each system trains its own flow")
    validation: tuple[str, ...] = Field((), description="sequences of peptides held out from training, for the metrics")
    rounds: int = Field(
        1, ge=1, description="chains and training in turn: the chains of each round propose with the flow before"
    )
    lags_ps: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="time lags learned besides the independent label, from a reference of every peptide; none: no dynamics"
    )
    independent_fraction: float = Field(
        0.5, gt=0, lt=1, description="fraction of a batch that trains the independent label, where there are lags"
    )
    max_steps: int = Field(6000, ge=0, description="optimiser steps by likelihood; the learning rate falls to zero at the last")
    acceptance_steps: int = Field(
        0, ge=0, description="further steps that raise the acceptance of independent proposals as well; 0: likelihood alone"
    )
    acceptance_rate: float = Field(3e-4, gt=0, description="peak learning rate of those steps")
    acceptance_weight: float = Field(1.0, gt=0, description="of -log(acceptance) beside the likelihood per torsion")
    molecules_per_step: int = Field(4, ge=1, description="peptides in a batch")
    samples_per_molecule: int = Field(64, ge=1, description="samples of each peptide in a batch")
    rare_exponent: float = Field(
        0.5,
        ge=0,
        le=1,
        description="samples with a rare torsion are drawn (its density)^-exponent as often; 0: all alike",
    )
    accumulate: int = Field(1, ge=1, description="batches per optimiser step, gradients averaged; memory is that of one batch")
    processes: int = Field(
        1, ge=1, description="processes (torchrun) that train together, each on batches of its own; gradients are averaged"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where it is trained; auto: a GPU where there is one")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the network's matrix products in training; weights and density are float32 in any case"
    )
    learning_rate: float = Field(2e-3, gt=0, description="peak learning rate (AdamW, warm-up, cosine decay)")
    warm_up_steps: int = Field(100, ge=0, description="steps over which the learning rate rises to its peak")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    width: int = Field(64, ge=8, description="width of tokens and atom vectors")
    heads: int = Field(4, ge=1, description="attention heads")
    layers: int = Field(3, ge=1, description="causal layers over the torsions")
    message_rounds: int = Field(4, ge=1, description="message rounds along the bonds")
    components: int = Field(12, ge=1, description="wrapped-normal components per torsion")
    ema_decay: float = Field(0.998, ge=0, lt=1, description="exponential moving average of the weights")
    acceptance_frames: int = Field(
        256, ge=0, description="frames of each validation peptide from which acceptance is measured for the metrics; 0: none"
    )
    fitted_states: int = Field(100, ge=10, description=f"for that: {FITTED_STATES}")
    metrics_every_steps: int = Field(250, ge=1, description="optimiser steps between rows of metrics.csv")
    checkpoint_every_steps: int = Field(250, ge=1, description="optimiser steps between checkpoints")

    @model_validator(mode="after")
    def _different_lags(self) -> TransferConfig:
        names = [f"{lag:g} ps" for lag in self.lags_ps]  # as the labels of the flow are called
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"lags_ps names {twice[0]} twice")
        return self


class DistillConfig(Section):
    """The distilled student and the teacher that labels its frames."""

    teacher: Teacher = Field(
        "gfn2-xtb", description="expensive potential: gfn2-xtb, gfn1-xtb, fennol, torchani, mace, aimnet2, openmm or ase"
    )
    teacher_weights: tuple[str, ...] = Field(
        (), description="its weight files, by path; several are an ensemble (fennol: .fnx files)"
    )
    teacher_model: str | None = Field(
        None, description="model that its own package fetches, instead of weights (ani1x, ani1ccx or ani2x; mace; aimnet2)"
    )
    teacher_calculator: str | None = Field(
        None, pattern=r"^[\w.]+:\w+$", description="teacher ase: the calculator, package.module:Factory"
    )
    teacher_options: dict[str, str | int | float | bool | None] = Field(
        {}, description="further settings of the teacher, such as {dtype: float64}; for ase what the factory takes"
    )
    shipped: bool = Field(
        default=False, description="use the student of this teacher that comes with the package; nothing is labelled or trained"
    )
    family: bool = Field(default=False, description="first train one student of all systems of the run together")
    fine_tune_steps: int = Field(
        0, ge=0, description="optimiser steps on each system after those of the family; 0 leaves the family's student as it is"
    )
    frames: int = Field(2800, ge=20, description="teacher-labelled frames of every system, the held-out ones included")
    label_stride: int = Field(
        1, ge=1, description="teacher calls per frame of the Langevin chains; a liquid relaxes to its teacher over a picosecond"
    )
    label_heat: tuple[Annotated[float, Field(ge=0.5, le=5)], ...] = Field(
        (1.0, 1.3, 1.7), min_length=1, description="their temperatures, relative to the target; liquids stay below 1.3"
    )
    cutoff_nm: float = Field(0.35, gt=0.1, le=1.0, description="range of the student")
    radial: int = Field(6, ge=2, le=32, description="radial functions per element of neighbours")
    channels: int = Field(16, ge=2, description="rotation invariants per angular degree (0 to 3)")
    hidden: int = Field(64, ge=8, description="width of the student's perceptrons")
    max_steps: int = Field(4000, ge=1, description="optimiser steps")
    rounds: int = Field(
        1, ge=0, description="at most so often: frames to which the student's own dynamics leads are labelled, and trained on"
    )
    round_frames: int = Field(600, ge=20, description="frames that each round adds")
    round_stride: int = Field(
        1, ge=1, description="teacher calls per such frame; the worst of them is kept. Large systems need long rounds"
    )
    round_steps: int = Field(2000, ge=1, description="optimiser steps of each round")
    hole_kJ_per_mol_nm: float = Field(
        1000.0, gt=0, description="a larger error on an atom is a hole; rounds end when a student meets none"
    )
    max_bond_error: float = Field(0.1, gt=0, description="a larger relative error of the force along bonds is refused")
    bond_weight: float = Field(1.0, ge=0, description="weight of the error of forces along bonds in the loss")
    batch_size: int = Field(16, ge=1, description="frames per optimiser step")
    learning_rate: float = Field(1e-2, gt=0, description="peak learning rate (Muon, warm-up, cosine decay)")
    checkpoint_every_steps: int = Field(250, ge=1, description="optimiser steps between checkpoints")

    @model_validator(mode="after")
    def _one_origin(self) -> DistillConfig:
        if self.shipped and self.family:
            raise ValueError("shipped takes the student of the package, family trains one; set only one of them")
        if self.fine_tune_steps and not self.family:
            raise ValueError("fine_tune_steps follow the training of a family; set family: true, or max_steps for one system")
        return self


class MDSampling(Section):
    """Method `md`: OpenMM Langevin dynamics on the AMBER target."""

    chains: int = Field(4, ge=2, description="independent trajectories")
    length_ps: float = Field(100.0, gt=0, description="length of each trajectory")
    timestep_fs: float = Field(2.0, gt=0, le=8, description="integration step")
    friction_per_ps: float = Field(0.3, gt=0, description="Langevin friction")
    hydrogen_mass_Da: float | None = Field(3.024, ge=1, le=4, description="hydrogen mass; null keeps 1.008")
    equilibration_ps: float = Field(5.0, ge=0, description="discarded start of each trajectory")
    save_every_ps: float = Field(0.2, gt=0, description="time between saved frames")
    checkpoint_every_ps: float = Field(20.0, gt=0, description="simulated time between checkpoints")

    @model_validator(mode="after")
    def _whole_frames(self) -> MDSampling:
        _check_multiple(self.save_every_ps * 1000, self.timestep_fs, "save_every_ps", "timestep_fs")
        _check_multiple(self.checkpoint_every_ps, self.save_every_ps, "checkpoint_every_ps", "save_every_ps")
        _check_multiple(self.length_ps, self.save_every_ps, "length_ps", "save_every_ps")
        return self


class TunedMDSampling(Section):
    """Method `tuned-md`: Langevin dynamics of many replicas on the batched force field, the tuned baseline beside `md`."""

    chains: int = Field(128, ge=2, description="independent trajectories, advanced together in groups of 128")
    length_ps: float = Field(200.0, gt=0, description="length of each trajectory; 200 ps take about a minute on one core")
    timestep_fs: float = Field(
        4.0, gt=0, le=8, description="integration step; 4 fs suits capped peptides, ammonium groups (NH3+) need 2.5"
    )
    friction_per_ps: float = Field(0.3, gt=0, description="Langevin friction")
    hydrogen_mass_Da: float | None = Field(3.024, ge=1, le=4, description="hydrogen mass; null keeps 1.008")
    equilibration_ps: float = Field(5.0, ge=0, description="discarded start of each trajectory")
    save_every_ps: float = Field(0.2, gt=0, description="time between saved frames")
    checkpoint_every_ps: float = Field(20.0, gt=0, description="simulated time between checkpoints")
    compile_energy: bool | None = Field(
        None,
        description="compile the forces, ten times faster after 10-40 s once; null: where a C++ compiler is found",
    )

    @model_validator(mode="after")
    def _whole_frames(self) -> TunedMDSampling:
        _check_multiple(self.save_every_ps * 1000, self.timestep_fs, "save_every_ps", "timestep_fs")
        _check_multiple(self.length_ps, self.save_every_ps, "length_ps", "save_every_ps")
        return self


class MetadynamicsSampling(Section):
    """Method `metadynamics`: well-tempered metadynamics of phi and psi in OpenMM, then weighted samples on the frozen bias."""

    walkers: int = Field(4, ge=2, description="walkers that fill one bias together and then sample on it, one core each")
    residue: int = Field(
        0,
        ge=0,
        description="residue whose phi and psi are biased, from 1 over those that have both; 0: as in Ramachandran maps",
    )
    fill_ps: float = Field(100.0, gt=0, description="time in which each walker lays hills; nothing of it is kept")
    length_ps: float = Field(100.0, gt=0, description="time for which each walker then samples, with the bias frozen")
    bias_factor: float = Field(10.0, gt=1, le=1000, description="of well-tempering: the bias ends at (1 - 1/factor) of -F")
    hill_height_kJ_per_mol: float = Field(1.0, gt=0, description="height of the first hills")
    hill_width_rad: float = Field(0.35, gt=0, le=2, description="standard deviation of hills along each torsion")
    hill_every_ps: float = Field(0.2, gt=0, description="time between two hills of a walker")
    share_every_ps: float = Field(2.0, gt=0, description="time between exchanges of hills, and between checkpoints")
    grid: int = Field(72, ge=12, le=720, description="intervals per torsion of the tabulated bias")
    timestep_fs: float = Field(2.0, gt=0, description="integration step")
    friction_per_ps: float = Field(1.0, gt=0, description="Langevin friction")
    hydrogen_mass_Da: float | None = Field(3.024, ge=1, le=4, description="hydrogen mass; null keeps 1.008")
    equilibration_ps: float = Field(5.0, ge=0, description="discarded start of each walker, without bias")
    save_every_ps: float = Field(0.2, gt=0, description="time between saved frames")

    @model_validator(mode="after")
    def _whole_rounds(self) -> MetadynamicsSampling:
        for name in ("hill_every_ps", "save_every_ps"):
            _check_multiple(getattr(self, name) * 1000, self.timestep_fs, name, "timestep_fs")
            _check_multiple(self.share_every_ps, getattr(self, name), "share_every_ps", name)
        for name in ("fill_ps", "length_ps"):
            _check_multiple(getattr(self, name), self.share_every_ps, name, "share_every_ps")
        return self


class TemperingSampling(Section):
    """Method `tempering`: exact parallel tempering on the batched force field, many ladders at once."""

    ladders: int = Field(16, ge=2, description="independent ladders of temperatures, advanced together; each is one chain")
    hottest_K: float = Field(700.0, gt=0, description="temperature of the last rung; the first has that of the target")
    swap_acceptance: float = Field(
        0.3, gt=0, lt=1, description="wanted for swaps of neighbours: the number of rungs follows from the energies' variance"
    )
    cycles: int = Field(400, ge=2, description="cycles per ladder: local moves on all rungs, then swaps")
    burn_in: int = Field(100, ge=0, description="cycles discarded before the first saved one")
    save_every: int = Field(2, ge=1, description="cycles between saved states")
    checkpoint_every: int = Field(100, ge=1, description="cycles between checkpoints")
    local_moves: Literal["ghmc", "hmc"] = Field("hmc", description="dynamics on every rung, both exact")
    local_steps: int = Field(10, ge=1, description="integration steps per cycle")
    local_timestep_fs: float = Field(2.0, gt=0, description="integration step of local moves")
    local_friction_per_ps: float = Field(1.0, gt=0, description="Langevin friction of local moves (ghmc)")
    local_hydrogen_mass_Da: float | None = Field(
        3.024, ge=1, le=4, description="hydrogen mass in local moves (positions stay Boltzmann); null keeps 1.008"
    )
    torsion_moves: int = Field(4, ge=0, description="local torsion moves before the dynamics of every cycle; 0: dynamics alone")
    energies: Energies = Field("batched", description=ENERGIES)
    compile_energy: bool | None = Field(
        None,
        description="compile the target energy, several times faster after 10-40 s once; null: where a C++ compiler is found",
    )

    @model_validator(mode="after")
    def _whole_saves(self) -> TemperingSampling:
        _check_multiple(self.cycles, self.save_every, "cycles", "save_every")
        return self


class FlowSampling(Section):
    """What both methods with flow proposals share."""

    chains: int = Field(256, ge=2, description="chains advanced together")
    proposals: int = Field(1000, ge=1, description="proposals per chain")
    save_every: int = Field(4, ge=1, description="proposals between saved states")
    independent_probability: float = Field(
        0.3, ge=0, le=1, description="probability of a proposal that does not see x; the lags share the rest"
    )
    compile_energy: bool | None = Field(
        None,
        description="compile the target energy, several times faster after 10-40 s once; null: where a C++ compiler is found",
    )
    checkpoint_every: int = Field(200, ge=1, description="proposals between checkpoints")
    burn_in: int = Field(100, ge=0, description="proposals per chain discarded before the first saved one")
    fitted_states: int = Field(300, ge=10, description=f"transferable flows: {FITTED_STATES}")
    energies: Energies = Field("batched", description=ENERGIES)

    @model_validator(mode="after")
    def _whole_saves(self) -> Self:
        _check_multiple(self.proposals, self.save_every, "proposals", "save_every")
        return self


class TimewarpSampling(FlowSampling):
    """Method `timewarp`: exact Metropolis-Hastings with flow proposals on the AMBER target."""

    speculative: int = Field(
        1, ge=1, description="proposals drawn at once per chain: the same chain in distribution, faster where chains are few"
    )
    moves_probability: float = Field(
        0.3, ge=0, lt=1, description="share of local torsion moves; transferable flows only, others have none"
    )
    local_moves: Literal["none", "ghmc", "hmc", "langevin"] = Field(
        "none",
        description="dynamics after every flow proposal (or batch): ghmc and hmc are exact, langevin makes all unadjusted",
    )
    local_steps: int = Field(10, ge=1, description="integration steps of a local move")
    local_timestep_fs: float = Field(1.0, gt=0, le=8, description="integration step of local moves")
    local_friction_per_ps: float = Field(1.0, ge=0, description="Langevin friction of local moves (ghmc, langevin)")
    local_hydrogen_mass_Da: float | None = Field(
        3.024, ge=1, le=4, description="hydrogen mass in local moves (positions stay Boltzmann); null keeps 1.008"
    )

    @model_validator(mode="after")
    def _whole_batches(self) -> TimewarpSampling:
        for name in ("proposals", "save_every", "checkpoint_every", "burn_in"):
            value = getattr(self, name)
            if value:
                _check_multiple(value, self.speculative, name, "speculative")
        return self


class ExploreSampling(FlowSampling):
    """Method `explore`: flow proposals without correction (biased), filtered by energy and chirality."""

    proposals: int = Field(200, ge=1, description="proposals per chain")
    save_every: int = Field(2, ge=1, description="proposals between saved states")
    burn_in: int = Field(0, ge=0, description="proposals per chain discarded before the first saved one")
    max_energy_rise_kJ_per_mol: float = Field(300.0, gt=0, description="a larger rise in one step is refused")
    checkpoint_every: int = Field(50, ge=1, description="proposals between checkpoints")


class MTSSampling(Section):
    """Method `mts`: RESPA BAOAB with the teacher every outer step and the student every inner step."""

    replicas: int = Field(4, ge=1, description="independent trajectories")
    length_ps: float = Field(4.0, gt=0, description="length of each trajectory")
    outer_timestep_fs: float = Field(
        4.0,
        gt=0,
        le=12,
        description="time between two teacher calls; at most about 3 where hydrogens weigh 1.008 Da (hydrogen_mass_Da)",
    )
    inner_steps: int = Field(4, ge=1, le=64, description="student steps per teacher call")
    friction_per_ps: float = Field(1.0, gt=0, description="Langevin friction")
    hydrogen_friction_per_ps: float | None = Field(
        None, gt=0, description="Langevin friction of hydrogens, which damps resonances of their bonds; null: as of all atoms"
    )
    hydrogen_mass_Da: float | None = Field(3.024, ge=1, le=4, description="hydrogen mass; null keeps 1.008")
    equilibration_ps: float = Field(0.5, ge=0, description="discarded start of each trajectory")
    save_every_ps: float = Field(0.02, gt=0, description="time between saved frames")
    max_slow_force_kJ_per_mol_nm: float = Field(
        1e4, gt=0, description="stop when teacher and student differ by more on one atom"
    )
    checkpoint_every_ps: float = Field(0.2, gt=0, description="time between checkpoints")

    @model_validator(mode="after")
    def _whole_frames(self) -> MTSSampling:
        _check_multiple(self.save_every_ps * 1000, self.outer_timestep_fs, "save_every_ps", "outer_timestep_fs")
        return self


class STSSampling(Section):
    """Method `sts`: single-step BAOAB with the teacher, the baseline of `mts`."""

    replicas: int = Field(4, ge=1, description="independent trajectories")
    length_ps: float = Field(1.5, gt=0, description="length of each trajectory")
    timestep_fs: float = Field(1.0, gt=0, le=4, description="integration step")
    friction_per_ps: float = Field(1.0, gt=0, description="Langevin friction")
    hydrogen_friction_per_ps: float | None = Field(
        None, gt=0, description="Langevin friction of hydrogens, which damps resonances of their bonds; null: as of all atoms"
    )
    hydrogen_mass_Da: float | None = Field(3.024, ge=1, le=4, description="hydrogen mass; null keeps 1.008")
    equilibration_ps: float = Field(0.5, ge=0, description="discarded start of each trajectory")
    save_every_ps: float = Field(0.02, gt=0, description="time between saved frames")
    checkpoint_every_ps: float = Field(0.1, gt=0, description="time between checkpoints")

    @model_validator(mode="after")
    def _whole_frames(self) -> STSSampling:
        _check_multiple(self.save_every_ps * 1000, self.timestep_fs, "save_every_ps", "timestep_fs")
        return self


class SampleConfig(Section):
    """Which methods run, how often, and how."""

    methods: tuple[Method, ...] = Field(
        DEFAULT_METHODS, min_length=1, description="methods to run; others are tuned-md, metadynamics and tempering"
    )
    seeds: int = Field(2, ge=1, le=1000, description="independent repeats of every method")
    md: MDSampling = MDSampling()
    tuned_md: TunedMDSampling = TunedMDSampling()
    metadynamics: MetadynamicsSampling = MetadynamicsSampling()
    tempering: TemperingSampling = TemperingSampling()
    timewarp: TimewarpSampling = TimewarpSampling()
    explore: ExploreSampling = ExploreSampling()
    mts: MTSSampling = MTSSampling()
    sts: STSSampling = STSSampling()


class FreeEnergyConfig(Section):
    """Independent reference for the free energy of phi: umbrella sampling of phi and psi with replica exchange, and WHAM."""

    enabled: bool = Field(
        default=True, description="whether a run makes it; a molecule without (phi, psi), or with proline there, gets none"
    )
    windows: tuple[int, int] = Field((36, 24), description="umbrella windows along phi and psi, even numbers")
    stiffness_kJ_per_mol: tuple[float, float] = Field((250.0, 100.0), description="restraints k (1 - cos) of phi and psi")
    length_ps: float = Field(12.0, gt=0, description="length of every window's trajectory")
    equilibration_ps: float = Field(4.0, ge=0, description="discarded start of every window's trajectory")
    timestep_fs: float = Field(4.0, gt=0, le=8, description="integration step")
    friction_per_ps: float = Field(2.0, gt=0, description="Langevin friction")
    hydrogen_mass_Da: float | None = Field(3.024, ge=1, le=4, description="hydrogen mass; null keeps 1.008")
    save_every_ps: float = Field(0.1, gt=0, description="time between samples, and between attempts to exchange neighbours")
    bins: int = Field(72, ge=24, le=360, description="bins per torsion in WHAM, an even number")
    bootstrap: int = Field(40, ge=20, description="bootstrap replicates over blocks of time")
    energies: Energies = Field("batched", description=ENERGIES)
    compile_energy: bool | None = Field(
        None,
        description="compile the target energy, several times faster after 10-40 s once; null: where a C++ compiler is found",
    )
    checkpoint_every_ps: float = Field(2.0, gt=0, description="simulated time between checkpoints")

    @model_validator(mode="after")
    def _fits(self) -> FreeEnergyConfig:
        _check_multiple(self.save_every_ps * 1000, self.timestep_fs, "save_every_ps", "timestep_fs")
        _check_multiple(self.length_ps, self.save_every_ps, "length_ps", "save_every_ps")
        if any(count % 2 or count < 4 for count in self.windows):
            raise ValueError("windows must be two even numbers, 4 or more")
        if any(not 0 < value < math.inf for value in self.stiffness_kJ_per_mol):
            raise ValueError("stiffness_kJ_per_mol must be positive")
        if self.bins % 2:
            raise ValueError("bins must be even, so that 0 degrees is an edge")
        return self


class CompareConfig(Section):
    """Free energies, TICA, MSM and effective sample sizes."""

    bins: int = Field(36, ge=6, le=360, description="bins per torsion axis of the free-energy grid")
    tica_lag_ps: float = Field(5.0, gt=0, description="lag time of TICA")
    msm_lags_ps: tuple[float, ...] = Field(
        (1.0, 2.0, 5.0, 10.0, 20.0), min_length=1, description="lag times of implied timescales"
    )
    msm_lag_ps: float = Field(5.0, gt=0, description="lag time of the MSM that reweights the reference")
    msm_states: int = Field(50, ge=2, description="k-means states of the MSM")
    bootstrap: int = Field(200, ge=20, description="bootstrap replicates")
    max_free_energy_kT: float = Field(5.0, gt=0, description="bins above this reference free energy are not compared")


class DynamicsConfig(Section):
    """Multi-time-step dynamics against single-step dynamics of the same teacher: everything that must not change."""

    enabled: bool = Field(
        default=True,
        description="whether a run with methods mts and sts compares them; needs equal friction and hydrogen mass",
    )
    r_max_nm: float = Field(1.0, gt=0, description="range of pair distributions; cut to half a box")
    pair_bins: int = Field(100, ge=10, description="bins of pair distributions")
    torsion_bins: int = Field(36, ge=6, le=360, description="bins of phi and psi")
    vacf_lag_ps: float = Field(0.2, gt=0, description="longest lag of velocity correlations; the resolution of spectra follows")
    spectrum_step_per_cm: float = Field(
        25.0, gt=0, description="step of spectra, which end where save_every_ps resolves no more"
    )
    relaxation_lag_ps: float = Field(0.3, gt=0, description="longest lag of rotational and torsional correlations")
    diffusion_fit_ps: tuple[float, float] = Field(
        (0.5, 1.0), description="range of the line through the mean squared displacement, in a box"
    )
    viscosity_mPa_s: float | None = Field(
        None, gt=0, description="for the finite-size correction of diffusion (Yeh and Hummer); null leaves it out"
    )
    permutations: int = Field(999, ge=99, description="of the tests of curves")
    configurational_frames: int = Field(
        0, ge=0, description="frames of every seed on which the teacher gives the configurational temperature; 0: none"
    )
    configurational_probes: int = Field(
        4, ge=1, description="random vectors per such frame, two teacher calls each, for the trace of the Hessian"
    )

    @model_validator(mode="after")
    def _a_line(self) -> DynamicsConfig:
        if not 0 <= self.diffusion_fit_ps[0] < self.diffusion_fit_ps[1]:
            raise ValueError("diffusion_fit_ps must be two times, the first one earlier and not negative")
        return self


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    systems: tuple[SystemConfig, ...] = Field(
        (SystemConfig(name="alanine-dipeptide", sequence="ACE-ALA-NME"),), min_length=1, description="the molecules"
    )
    physics: PhysicsConfig = PhysicsConfig()
    reference: ReferenceConfig = ReferenceConfig()
    shard: ShardConfig = ShardConfig()
    flow: FlowConfig = FlowConfig()
    chains: ChainsConfig = ChainsConfig()
    transfer: TransferConfig = TransferConfig()
    distill: DistillConfig = DistillConfig()
    sample: SampleConfig = SampleConfig()
    free_energy: FreeEnergyConfig = FreeEnergyConfig()
    compare: CompareConfig = CompareConfig()
    dynamics: DynamicsConfig = DynamicsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        names = [system.name for system in self.systems]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"systems: the name {twice[0]!r} is used twice")
        if self.transfer.shipped and self.transfer.train:
            raise ValueError("transfer: either shipped, or train a flow of your own; drop one of the two keys")
        return self

    def system(self, name: str) -> SystemConfig:
        """Return the system of that name, or say which names exist."""
        for system in self.systems:
            if system.name == name:
                return system
        if name in self.peptides:
            return SystemConfig(name=name, sequence=name)
        known = ", ".join(system.name for system in self.systems)
        raise ConfigError(f"no system {name!r} in the configuration; known: {known}")

    @property
    def peptides(self) -> tuple[str, ...]:
        """Sequences of the training and validation peptides of the transferable flow; they are systems without a method."""
        return (*self.transfer.train, *self.transfer.validation)

    def methods_of(self, system: str) -> tuple[Method, ...]:
        """Return the methods that sample a system; in a periodic box these are mts and sts, all others need a lone molecule."""
        methods = self.sample.methods
        return tuple(name for name in methods if name in IN_A_BOX) if self.system(system).periodic else methods

    @property
    def run_folder(self) -> Path:
        """The folder that holds everything of this run."""
        return Path(self.run.folder) / self.run.name


def validate(values: dict[str, Any], *, whole_run: bool = True) -> Config:
    """Return the typed configuration of a nested dict.

    Args:
        values: what the YAML file holds.
        whole_run: also check that the stages fit each other; a single stage with its own flags does not need that.

    Raises:
        ConfigError: one line naming the first bad key, what is wrong, and for unknown keys the nearest valid one.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    if whole_run:
        _check_lags(config)
        _check_methods(config)
    return config


def _check_methods(config: Config) -> None:
    mts, sts, dynamics = config.sample.mts, config.sample.sts, config.dynamics
    for system in config.systems:
        if not config.methods_of(system.name):
            raise ConfigError(
                f"configuration: system {system.name!r} lies in a periodic box, where only {' and '.join(IN_A_BOX)} sample;"
                " add one of them to sample.methods"
            )
    if not (dynamics.enabled and {"mts", "sts"} <= set(config.sample.methods)):
        return
    for key in ("friction_per_ps", "hydrogen_friction_per_ps", "hydrogen_mass_Da"):
        ours, theirs = getattr(mts, key), getattr(sts, key)
        if ours != theirs:
            raise ConfigError(
                f"configuration: sample.mts.{key} is {ours} and sample.sts.{key} is {theirs}; dynamics are compared at equal"
                " values, set them alike or dynamics.enabled: false"
            )


def _check_lags(config: Config) -> None:
    reference = config.reference
    used = {"shard.lags_ps": config.shard.lags_ps, "transfer.lags_ps": config.transfer.lags_ps if config.transfer.train else ()}
    for key, lag in ((key, lag) for key, lags in used.items() for lag in lags):
        if lag >= reference.length_ps:
            raise ConfigError(
                f"configuration: {key}: {lag:g} ps is not shorter than reference.length_ps"
                f" ({reference.length_ps:g} ps); shorten the lag or lengthen the trajectories"
            )
        try:
            _check_multiple(lag, reference.save_every_ps, key, "reference.save_every_ps")
        except ValueError as error:
            raise ConfigError(f"configuration: {error}") from None


def load_config(path: Path | str) -> Config:
    """Read and validate a YAML configuration file.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds a bad key or value.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(values).__name__}")
    return validate(values or {})


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown configuration key '{path}'{_nearest(first['loc'])}"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
    return f"configuration: {path + ': ' if path else ''}{message}{shown if path else ''}"


def _nearest(location: tuple[int | str, ...]) -> str:
    valid: list[str] = list(_fields_at(location[:-1]))
    close = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.0)
    return f"; did you mean '{'.'.join(str(part) for part in (*location[:-1], close[0]))}'?" if close else ""


def _fields_at(location: tuple[int | str, ...]) -> dict[str, Any]:
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        model = _model_in(model.model_fields[part].annotation) or model
    return model.model_fields


def _model_in(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 - a type expression
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        if found := _model_in(argument):
            return found
    return None


def section_of(method: str) -> str:
    """Return the name of a method's section within `sample`."""
    return method.replace("-", "_")


def stage_view(config: Config, stage: str, *, system: str | None = None, method: str | None = None) -> dict[str, Any]:
    """Return the part of the configuration that one job reads, as plain values.

    Args:
        config: the resolved configuration.
        stage: prepare, reference, shard, flow, distill, sample, free_energy, compare, dynamics or report.
        system: the job's system, where it has one.
        method: the job's method, for `sample`.

    Raises:
        ConfigError: a weight file of the teacher cannot be read.
    """
    full = config.model_dump(mode="json")
    view: dict[str, Any] = {}
    if stage in ("reference", "flow", "chains", "transfer", "distill", "sample", "free_energy", "compare", "dynamics"):
        view["seed"] = config.run.seed
    if system is not None:
        view["system"] = config.system(system).model_dump(mode="json")
    if stage in ("prepare", "reference", "chains", "sample", "free_energy", "compare", "distill"):
        view["physics"] = full["physics"]
    if stage == "sample" and method is not None:
        view["sample"] = full["sample"][section_of(method)]
        if method in ("mts", "sts"):
            view["teacher"] = _teacher_keys(full)
    elif stage in full:
        view[stage] = full[stage]
    asks_teacher = stage == "dynamics" and config.dynamics.configurational_frames > 0
    if asks_teacher:
        view["teacher"] = _teacher_keys(full)
    if (stage == "distill" or method in ("mts", "sts") or asks_teacher) and config.distill.teacher_weights:
        view["teacher_weights"] = _weights_digest(config.distill.teacher_weights)
    if stage == "report":
        view["config"] = full
    return view


def _teacher_keys(full: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in full["distill"].items() if key.startswith("teacher")}


def _weights_digest(weights: tuple[str, ...]) -> str:
    """Return a fingerprint of what the files hold: other weights under the same name are another job."""
    try:
        return files_digest(weights)
    except OSError as error:
        raise ConfigError(f"distill.teacher_weights: cannot read {error.filename} ({error.strerror}); fetch it") from error
