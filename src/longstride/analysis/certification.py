"""Whether a reference may be called one: what it must pass before other methods are judged by it.

Each check can fail, and one that cannot be done counts as failed. Split halves give the noise floor of every metric: what two
references of half the size differ by, although they sample the same distribution.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longstride.analysis.energies import ks_distance
from longstride.analysis.estimate import Estimate
from longstride.analysis.features import Torsions, circular_features
from longstride.analysis.free_energy import FreeEnergy, agreement, delta_f_weights, from_weights, grid_index, rare_crossings
from longstride.analysis.map_comparison import MapComparison, basins_of_grid, compare_maps
from longstride.analysis.reference_model import ReferenceModel, end_to_end, lag_frames
from longstride.analysis.reweighting import Reweighting, reweight
from longstride.seeds import job_seed

if TYPE_CHECKING:
    from longstride.config import CompareConfig

MIN_CHAINS = 4
MAX_RHAT = 1.05
MIN_RELAXATIONS = 50.0  # independent samples of the slowest process: simulated time over twice its timescale
MIN_CROSSINGS = 10.0
MAX_Z = 3.0
HALF_REPLICATES = 40


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition of a certificate.

    Attributes:
        name: what is checked.
        value: the measured number, or None where it is undefined.
        limit: what it is held against.
        passed: whether it holds; False where the value is undefined.
        statement: one line for people.
    """

    name: str
    value: float | None
    limit: float
    passed: bool
    statement: str


@dataclass(frozen=True, kw_only=True)
class Half:
    """The reweighted results of half of the reference.

    Attributes:
        map: free energy over (phi, psi), or None.
        delta_f: torsion name to Delta F.
        energy: [time, chain] kJ/mol.
        weights: of its frames.
    """

    map: FreeEnergy | None
    delta_f: dict[str, Estimate]
    energy: np.ndarray
    weights: Reweighting


def split_halves(n_times: int, n_chains: int, *, seed: int) -> tuple[tuple[slice, np.ndarray], tuple[slice, np.ndarray]]:
    """Return (times, chains) of two halves of a reference: random halves of the chains, or of the time for fewer than four.

    Chains are drawn at random because their starting basins may follow a pattern.
    """
    if n_chains >= MIN_CHAINS:
        order = np.random.default_rng(seed).permutation(n_chains)
        half = n_chains // 2
        return (slice(None), np.sort(order[:half])), (slice(None), np.sort(order[half : 2 * half]))
    everyone, middle = np.arange(n_chains), n_times // 2
    return (slice(0, middle), everyone), (slice(middle, 2 * middle), everyone)


def _half(
    reference: ReferenceModel,
    torsions: Torsions,
    section: CompareConfig,
    part: tuple[slice, np.ndarray],
    *,
    seed: int,
) -> Half:
    times, chains = part
    angles = reference.samples.angles[times][:, chains]
    assert reference.clusters is not None  # the caller has checked
    paths = [reference.clusters.assign(one) for one in np.swapaxes(circular_features(angles), 0, 1)]
    lag = lag_frames(section.msm_lag_ps, float(reference.samples.manifest["frame_spacing_ps"]))
    replicates = min(section.bootstrap, HALF_REPLICATES)
    weights = reweight(paths, states=reference.clusters.n_states, lag=lag, replicates=replicates, seed=seed)
    grid = None
    if torsions.pair is not None:
        phi, psi = (end_to_end(angles[..., k]) for k in torsions.pair)
        grid = from_weights(grid_index(phi, psi, section.bins), weights, bins=section.bins**2)
    return Half(
        map=grid,
        delta_f={torsions.names[k]: delta_f_weights(end_to_end(angles[..., k] >= 0), weights) for k in torsions.phis},
        energy=reference.samples.energy[times][:, chains],
        weights=weights,
    )


def _delta_f_checks(halves: tuple[Half, Half]) -> list[Check]:
    found = []
    for name, first in halves[0].delta_f.items():
        z, statement = agreement(first, halves[1].delta_f[name])
        passed = z is not None and abs(z) <= MAX_Z
        words = statement.replace("the reference", "the other half")
        label = f"split halves: Delta F of {name}"
        found.append(Check(name=label, value=z, limit=MAX_Z, passed=passed, statement=f"one half {words}"))
    return found


def _map_check(found: MapComparison) -> Check:
    smallest = [one for one in (found.p_value, found.p_value_basins) if one is not None]
    return Check(
        name="split halves: map",
        value=min(smallest) if smallest else None,
        limit=0.025,
        passed=found.verdict == "agrees",
        statement=f"one half against the other {found.statement}" if smallest else found.statement,
    )


def _crossing_checks(reference: ReferenceModel, torsions: Torsions) -> list[Check]:
    found = []
    weights = reference.weights
    for k in torsions.phis:
        name, count = torsions.names[k], None
        if weights is not None and weights.weights is not None:
            count = rare_crossings(end_to_end(reference.samples.angles[..., k] >= 0), weights)
        words = "unknown without an MSM" if count is None else f"{count:.0f} independent crossings in the rarer direction"
        passed = count is not None and count >= MIN_CROSSINGS
        found.append(Check(name=f"crossings of {name}", value=count, limit=MIN_CROSSINGS, passed=passed, statement=words))
    return found


def _kinetic_check(slowest: Estimate, simulated_ps: float) -> Check:
    """Return whether the reference holds enough relaxations of its slowest process, by the upper end of its timescale."""
    longest = slowest.high or slowest.value
    name = "kinetic ceiling"
    if not longest:
        reason = slowest.note or "no timescale"
        return Check(name=name, value=None, limit=MIN_RELAXATIONS, passed=False, statement=f"undefined: {reason}")
    count = simulated_ps / (2 * longest)
    statement = f"{simulated_ps:.4g} ps hold {count:.3g} independent samples of a process of at most {longest:.3g} ps"
    return Check(name=name, value=count, limit=MIN_RELAXATIONS, passed=count >= MIN_RELAXATIONS, statement=statement)


def _chain_checks(chains: int, rhat_max: float | None) -> list[Check]:
    mixed = rhat_max is not None and rhat_max <= MAX_RHAT
    words = "undefined: no observable moves" if rhat_max is None else f"largest R-hat over the panel {rhat_max:.3f}"
    return [
        Check(
            name="independent runs", value=float(chains), limit=float(MIN_CHAINS), passed=chains >= MIN_CHAINS,
            statement=f"{chains} trajectories",
        ),
        Check(name="R-hat", value=rhat_max, limit=MAX_RHAT, passed=mixed, statement=words),
    ]  # fmt: skip


def certify(
    reference: ReferenceModel,
    torsions: Torsions,
    section: CompareConfig,
    *,
    rhat_max: float | None,
    slowest: Estimate,
    seed: int,
) -> dict[str, Any]:
    """Return {"word": "certified" | "not certified", "reason", "checks", "noise_floor"} of a reference as JSON values.

    Checks: at least four trajectories; R-hat of the panel at most 1.05; Delta F of every phi and the map agree between halves;
    at least 10 independent crossings of every phi in the rarer direction; at least 50 independent samples of the slowest
    process.

    Args:
        reference: the analysed reference.
        torsions: of the molecule.
        section: settings.
        rhat_max: largest R-hat over the panel of the reference.
        slowest: its slowest implied timescale, ps.
        seed: of the split and of bootstraps.
    """
    times, chains = reference.samples.energy.shape
    simulated = times * chains * float(reference.samples.manifest["frame_spacing_ps"])
    checks = [*_chain_checks(chains, rhat_max), *_crossing_checks(reference, torsions), _kinetic_check(slowest, simulated)]
    floor: dict[str, Any] = {}
    if reference.clusters is None:
        nothing = "undefined: no torsions, so no MSM"
        checks.append(Check(name="split halves", value=None, limit=MAX_Z, passed=False, statement=nothing))
    else:
        parts = split_halves(times, chains, seed=job_seed(seed, "split"))
        first, second = (
            _half(reference, torsions, section, part, seed=job_seed(seed, "half", k)) for k, part in enumerate(parts)
        )
        checks += _delta_f_checks((first, second))
        floor = {"energy_ks": ks_distance(first.energy, second.energy), "delta_f_kT": _differences(first, second)}
        if first.map is not None and second.map is not None:
            limit, basins = section.max_free_energy_kT, basins_of_grid(section.bins)
            found = compare_maps(first.map, second.map, limit=limit, basins=basins)
            checks.append(_map_check(found))
            floor["map"] = asdict(found)
    failed = [one for one in checks if not one.passed]
    return {
        "word": "not certified" if failed else "certified",
        "reason": "; ".join(f"{one.name}: {one.statement}" for one in failed),
        "checks": [asdict(one) for one in checks],
        "noise_floor": floor,
    }


def _differences(first: Half, second: Half) -> dict[str, float | None]:
    found = {}
    for name, one in first.delta_f.items():
        other = second.delta_f[name].value
        found[name] = None if one.value is None or other is None else abs(one.value - other)
    return found
