"""Jensen-Shannon divergences in every form that is published under that name, each under its own unambiguous one.

`jsd_dist_nat` is the square root of the divergence in nats (0 to 0.8326), `jsd_div_bits` the divergence in bits (0 to 1): the
square of the first over ln 2 is the second. Histogram bins, pseudo-counts and ranges differ too, and belong to the definition.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.distance import jensenshannon

LARGEST_NAT = math.sqrt(math.log(2))
MDGEN_BINS = 100
MDGEN_BINS_2D = 50
UNISIM_EDGES = 50
UNISIM_PSEUDO_COUNT = 1e-6
PROSE_STATES = 20
PROSE_EPSILON = 1e-10
CONTACT_NM = 1.0
CA_CLASH_NM = 0.3
CA_BREAK_NM = 0.419


def jsd_dist_nat(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the Jensen-Shannon distance of histograms p, q [..., bin], natural logarithm, in sqrt(nat).

    Equation: sqrt((KL(p|m) + KL(q|m)) / 2), m = (p + q) / 2, both normalised; NaN where one is empty. Used by MDGen
    (doi:10.48550/arXiv.2409.17808), JAMUN and UniSim.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(jensenshannon(p, q, axis=-1))


def jsd_div_bits(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the Jensen-Shannon divergence of histograms p, q [..., bin] in bits.

    Equation: (KL2(p|m) + KL2(q|m)) / 2 with base-2 logarithms. Used by Prose (doi:10.48550/arXiv.2508.18175).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(jensenshannon(p, q, base=2, axis=-1)) ** 2


def prose_jsd(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return `jsd_div_bits` of state counts p, q [..., state] as Prose does: 1e-10 added to every count."""
    total = PROSE_EPSILON * p.shape[-1]
    smooth = [(one + PROSE_EPSILON) / (one.sum(axis=-1, keepdims=True) + total) for one in (p, q)]
    return jsd_div_bits(*smooth)


def unisim_jsd(p: np.ndarray, q: np.ndarray, volume: float) -> np.ndarray:
    """Return `jsd_dist_nat` of counts p, q [..., bin] as UniSim and FBM do: 1e-6 added to every density.

    Args:
        p: counts.
        q: counts.
        volume: of one bin, in the units of the quantity; the pseudo-count acts on counts / (total * volume).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        densities = [one / (one.sum(axis=-1, keepdims=True) * volume) + UNISIM_PSEUDO_COUNT for one in (p, q)]
    return jsd_dist_nat(*densities)


def circular_bins(angles: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of every angle in rad of `bins` equal bins on (-pi, pi), int."""
    return np.clip(np.floor((angles + np.pi) * (bins / (2 * np.pi))).astype(int), 0, bins - 1)


def bins_between(x: np.ndarray, low: float, high: float, bins: int) -> np.ndarray:
    """Return the bin of every x of `bins` equal bins on [low, high], int; -1 outside, the upper end belongs to the last bin."""
    with np.errstate(invalid="ignore"):
        index = np.floor((x - low) * (bins / max(high - low, 1e-300)))
        inside = (x >= low) & (x <= high)
    return np.where(inside, np.minimum(np.where(inside, index, 0), bins - 1), -1).astype(int)


def pair_bins(first: np.ndarray, second: np.ndarray, bins: int) -> np.ndarray:
    """Return the joint bin of two bin indices; -1 where one of them is."""
    return np.where((first < 0) | (second < 0), -1, first * bins + second)


def ca_contacts(alpha: np.ndarray) -> np.ndarray:
    """Return whether two CA atoms are nearer than 1 nm, alpha [frame, residue, 3] nm, [frame, pair] of pairs i < j."""
    return ca_distances(alpha, offset=0) < CONTACT_NM


def ca_distances(alpha: np.ndarray, *, offset: int) -> np.ndarray:
    """Return distances in nm of CA atoms i, j with j > i + offset, alpha [frame, residue, 3] nm, [frame, pair]."""
    first, second = np.triu_indices(alpha.shape[1], k=offset + 1)
    return np.linalg.norm(alpha[:, first] - alpha[:, second], axis=-1)


def contact_rmse(reference: np.ndarray, sampled: np.ndarray) -> float:
    """Return CONTACT of UniSim: root mean square difference of contact rates [pair], pairs i < j of residues.

    Equation: sqrt(2 / (n (n - 1)) sum_{i<j} (r_ij - s_ij)^2), a contact is a CA-CA distance below 1 nm.
    """
    return float(np.sqrt(np.mean((reference - sampled) ** 2)))


def ca_valid(alpha: np.ndarray) -> np.ndarray:
    """Return whether frames alpha [frame, residue, 3] nm are valid in the sense of VAL-CA of UniSim, [frame] bool.

    No two CA nearer than 0.3 nm, no two neighbouring CA further than 0.419 nm.
    """
    distances = ca_distances(alpha, offset=0)
    neighbours = np.linalg.norm(np.diff(alpha, axis=1), axis=-1)
    return (distances >= CA_CLASH_NM).all(axis=1) & (neighbours <= CA_BREAK_NM).all(axis=1)


def radius_of_gyration(alpha: np.ndarray) -> np.ndarray:
    """Return the radius of gyration of CA atoms, all of one mass, alpha [frame, residue, 3] nm, [frame] nm."""
    centred = alpha - alpha.mean(axis=1, keepdims=True)
    return np.sqrt((centred**2).sum(axis=(1, 2)) / alpha.shape[1])
