"""What the reference says: TICA, states, MSM weights, free energies and timescales, with errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis import pyemma_bridge
from longstride.analysis.estimate import Estimate, finite, undefined
from longstride.analysis.features import Torsions, circular_features
from longstride.analysis.free_energy import (
    FreeEnergy,
    bin_index,
    delta_f_chains,
    delta_f_weights,
    from_chains,
    from_weights,
    grid_index,
)
from longstride.analysis.markov_analysis import (
    MarkovAnalysis,
    analyse_markov,
    macrostate_rows,
    markov_json,
    require_physical_time,
)
from longstride.analysis.markov_model import Macrostates, macrostates, transition_counts
from longstride.analysis.reweighting import Reweighting, reweight
from longstride.analysis.tica_msm import Clusters, ImpliedTimescales, TICAModel, cluster, fit_tica, implied_timescales
from longstride.seeds import job_seed

if TYPE_CHECKING:
    from longstride.analysis.samples import SampleSet
    from longstride.config import CompareConfig

TIMESCALES = 3
TIMESCALE_REPLICATES = 50


@dataclass(frozen=True, kw_only=True)
class Kinetics:
    """Implied timescales of one set of trajectories, by both estimators.

    Attributes:
        spacing_ps: time between frames.
        deeptime: one entry per lag.
        pyemma: [lag, timescale] in frames, NaN where undefined.
    """

    spacing_ps: float
    deeptime: tuple[ImpliedTimescales, ...]
    pyemma: np.ndarray

    def slowest(self, lag: int) -> Estimate:
        """Return the slowest timescale in ps at the lag in frames, or why there is none."""
        for entry in self.deeptime:
            if entry.lag == lag:
                if entry.note or not np.isfinite(entry.values[0]):
                    return undefined(entry.note or "no positive eigenvalue")
                ends = (finite(entry.low[0] * self.spacing_ps), finite(entry.high[0] * self.spacing_ps))
                return Estimate(value=float(entry.values[0] * self.spacing_ps), low=ends[0], high=ends[1])
        return undefined("not computed at this lag")

    @property
    def disagreement(self) -> float | None:
        """Largest relative difference between the two estimators over timescales longer than the lag, or None.

        Faster ones mean nothing, and the estimators treat negative eigenvalues differently.
        """
        ours = np.array([entry.values for entry in self.deeptime])
        lags = np.array([entry.lag for entry in self.deeptime])[:, None]
        with np.errstate(invalid="ignore"):
            both = np.isfinite(self.pyemma) & (ours > lags)
        if not both.any():
            return None
        return float((np.abs(ours - self.pyemma)[both] / ours[both]).max())


def kinetics(paths: list[np.ndarray], *, states: int, lags: list[int], spacing_ps: float, seed: int) -> Kinetics:
    """Return implied timescales of discrete trajectories at several lags (frames) with deeptime and with PyEMMA."""
    ours = tuple(
        implied_timescales(paths, states=states, lag=lag, count=TIMESCALES, replicates=TIMESCALE_REPLICATES, seed=seed)
        for lag in lags
    )
    theirs = np.full((len(lags), TIMESCALES), np.nan)
    for row, entry in enumerate(ours):
        if not entry.note:
            theirs[row] = pyemma_bridge.msm_timescales(paths, lag=entry.lag, count=TIMESCALES)
    return Kinetics(spacing_ps=spacing_ps, deeptime=ours, pyemma=theirs)


@dataclass(frozen=True, kw_only=True)
class MacrostateAssignment:
    """Assigns frames to the macrostates of the reference.

    Attributes:
        clusters: k-means states.
        macrostates: which of them belong together.
    """

    clusters: Clusters
    macrostates: Macrostates

    @property
    def n_states(self) -> int:
        """Number of macrostates."""
        return self.macrostates.n_states

    def __call__(self, angles: np.ndarray) -> np.ndarray:
        """Return the macrostate of angles [..., torsion] rad, [...] int; -1 in states outside the connected set."""
        features = circular_features(angles)
        states = self.clusters.assign(features.reshape(-1, features.shape[-1]))
        return self.macrostates.of_state[states].reshape(angles.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class ReferenceModel:
    """The analysed reference. Fields are None where the molecule has no torsions or the data do not suffice.

    Attributes:
        samples: the trajectories, chains = trajectories.
        tica: TICA of the torsion features.
        clusters: k-means states.
        weights: MSM weights of the frames.
        map_msm: reweighted free energy over (phi, psi), flat.
        map_raw: plain histogram of the same.
        profile_msm: reweighted free energy over phi.
        profile_raw: plain histogram of the same.
        delta_f_msm: torsion name to reweighted Delta F.
        delta_f_raw: torsion name to the plain one.
        kinetics: implied timescales.
        tica_pyemma: [component] TICA timescales of PyEMMA in frames.
        macrostates: assigns angles [..., torsion] rad to the metastable sets of the MSM; None without an MSM.
        markov: Bayesian errors, Chapman-Kolmogorov test and passage times; None without an MSM.
        pair: positions of the (phi, psi) that is shown, or None.
    """

    samples: SampleSet
    tica: TICAModel | None
    clusters: Clusters | None
    weights: Reweighting | None
    map_msm: FreeEnergy | None
    map_raw: FreeEnergy | None
    profile_msm: FreeEnergy | None
    profile_raw: FreeEnergy | None
    delta_f_msm: dict[str, Estimate]
    delta_f_raw: dict[str, Estimate]
    kinetics: Kinetics | None
    tica_pyemma: np.ndarray | None
    macrostates: MacrostateAssignment | None = None
    markov: MarkovAnalysis | None = None
    pair: tuple[int, int] | None = None

    @property
    def frame_weights(self) -> np.ndarray | None:
        """MSM weights as [time, chain] with sum 1, or None."""
        if self.weights is None or self.weights.weights is None:
            return None
        times, chains = self.samples.energy.shape
        return self.weights.weights.reshape(chains, times).T


def lag_frames(lag_ps: float, spacing_ps: float) -> int:
    """Return a lag time as a whole number of frames, at least one."""
    return max(1, round(lag_ps / spacing_ps))


def end_to_end(values: np.ndarray) -> np.ndarray:
    """Return [time, chain, ...] as [chain * time, ...], trajectories one after the other."""
    return np.swapaxes(values, 0, 1).reshape(-1, *values.shape[2:])


def chain_histograms(
    angles: np.ndarray, torsions: Torsions, section: CompareConfig, *, seed: int
) -> tuple[FreeEnergy | None, FreeEnergy | None]:
    """Return the plain (phi, psi) map and phi profile of angles [time, chain, torsion]; None without torsions."""
    if torsions.pair is None:
        return None, None
    phi, psi = (angles[..., k] for k in torsions.pair)
    common = {"replicates": section.bootstrap, "seed": seed}
    grid = from_chains(grid_index(phi, psi, section.bins), bins=section.bins**2, **common)
    return grid, from_chains(bin_index(phi, section.bins), bins=section.bins, **common)


def model_reference(samples: SampleSet, torsions: Torsions, section: CompareConfig, *, seed: int) -> ReferenceModel:
    """Analyse the reference trajectories: everything other methods are compared with.

    Args:
        samples: the reference.
        torsions: the molecule's torsions.
        section: bins, lags, states, bootstrap.
        seed: of clustering and bootstraps.
    """
    map_raw, profile_raw = chain_histograms(samples.angles, torsions, section, seed=job_seed(seed, "raw"))
    basin = {torsions.names[k]: samples.angles[..., k] >= 0 for k in torsions.phis}
    delta_f_raw = {name: delta_f_chains(inside) for name, inside in basin.items()}
    if not torsions.names:
        return ReferenceModel(
            samples=samples, tica=None, clusters=None, weights=None, map_msm=None, map_raw=map_raw, profile_msm=None,
            profile_raw=profile_raw, delta_f_msm={}, delta_f_raw={}, kinetics=None, tica_pyemma=None,
        )  # fmt: skip
    spacing = float(samples.manifest["frame_spacing_ps"])
    series = list(np.swapaxes(circular_features(samples.angles), 0, 1))
    tica_lag = lag_frames(section.tica_lag_ps, spacing)
    tica = fit_tica(series, lag=tica_lag)
    clusters = cluster(series, states=section.msm_states, tica=tica, seed=job_seed(seed, "kmeans"))
    paths = [clusters.assign(part) for part in series]
    lag = lag_frames(section.msm_lag_ps, spacing)
    weights = reweight(paths, states=clusters.n_states, lag=lag, replicates=section.bootstrap, seed=job_seed(seed, "segments"))
    map_msm = profile_msm = None
    if torsions.pair is not None:
        phi, psi = (end_to_end(samples.angles[..., k]) for k in torsions.pair)
        map_msm = from_weights(grid_index(phi, psi, section.bins), weights, bins=section.bins**2)
        profile_msm = from_weights(bin_index(phi, section.bins), weights, bins=section.bins)
    lags = sorted({lag, *(lag_frames(one, spacing) for one in section.msm_lags_ps)})
    require_physical_time(samples.manifest)
    assignment = assignment_of(clusters, weights, paths)
    markov = None
    if assignment is not None:
        sets, identity = assignment.macrostates, job_seed(seed, "posterior")
        markov = analyse_markov(paths, sets, lag=lag, lags=lags, spacing_ps=spacing, seed=identity)
    return ReferenceModel(
        samples=samples,
        tica=tica,
        clusters=clusters,
        weights=weights,
        map_msm=map_msm,
        map_raw=map_raw,
        profile_msm=profile_msm,
        profile_raw=profile_raw,
        delta_f_msm={name: delta_f_weights(end_to_end(inside), weights) for name, inside in basin.items()},
        delta_f_raw=delta_f_raw,
        kinetics=kinetics(paths, states=clusters.n_states, lags=lags, spacing_ps=spacing, seed=job_seed(seed, "timescales")),
        tica_pyemma=None if tica is None else _pyemma_tica(series, tica),
        macrostates=assignment,
        markov=markov,
        pair=torsions.pair,
    )


def _pyemma_tica(series: list[np.ndarray], tica: TICAModel) -> np.ndarray:
    usable = [part for part in series if len(part) > 2 * tica.lag]
    return pyemma_bridge.tica_timescales(usable, lag=tica.lag, count=TIMESCALES, koopman=tica.reweighting == "koopman")


def assignment_of(clusters: Clusters, weights: Reweighting, paths: list[np.ndarray]) -> MacrostateAssignment | None:
    """Return the macrostates of the MSM behind the weights of the reference, or None where there is no MSM."""
    if weights.model is None:
        return None
    counts = transition_counts(paths, states=clusters.n_states, lag=weights.lag)
    return MacrostateAssignment(clusters=clusters, macrostates=macrostates(weights.model, counts, lag=weights.lag))


def reference_markov_json(reference: ReferenceModel) -> dict[str, Any]:
    """Return the Markov analysis of the reference as JSON values; empty where there is none."""
    markov, assignment = reference.markov, reference.macrostates
    if markov is None or assignment is None or reference.weights is None or reference.weights.weights is None:
        return {}
    assigned = assignment.macrostates.of_state[reference.weights.paths]
    angles = None
    if reference.pair is not None:
        phi, psi = (end_to_end(reference.samples.angles[..., k]) for k in reference.pair)
        angles = (phi, psi)
    return markov_json(markov, macrostate_rows(markov, assigned, angles, reference.weights.weights))
