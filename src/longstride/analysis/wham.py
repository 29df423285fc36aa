"""Free energies from umbrella windows: the weighted histogram method with fine bins, solved as a convex problem."""

from __future__ import annotations

import numpy as np
from scipy.sparse.csgraph import connected_components

from longstride.errors import DataError

TOLERANCE = 1e-10
ITERATIONS = 200


def unbiased(
    counts: np.ndarray, bias: np.ndarray, start: np.ndarray | None = None, *, tolerance: float = TOLERANCE
) -> tuple[np.ndarray, np.ndarray]:
    """Return the unbiased probabilities [bin], sum 1, and the free energies [window] of the windows in kT.

    Equations, N_k samples of window k, H_b samples in bin b, u_kb the bias of window k in bin b in kT:
    p_b = H_b / sum_k N_k exp(f_k - u_kb), exp(-f_k) = sum_b p_b exp(-u_kb). The f_k minimise the convex function
    sum_b H_b ln sum_k N_k exp(f_k - u_kb) - sum_k N_k f_k (doi:10.1002/jcc.21989), here by Newton's method. With bins
    far narrower than the windows this is MBAR (doi:10.1063/1.2978177). Source of WHAM: doi:10.1002/jcc.540130812.

    Args:
        counts: [window, bin] samples; need not be whole numbers.
        bias: [window, bin] restraint energy at the bin's centre over kT.
        start: [window] first guess of f, from connected windows.
        tolerance: largest error of a window's expected samples, relative to the samples of all windows.

    Raises:
        DataError: some window has no sample, or the windows do not overlap.
    """
    samples, histogram = counts.sum(1), counts.sum(0)
    if not (samples > 0).all():
        raise DataError(f"{int((samples <= 0).sum())} umbrella windows hold no sample; lengthen the free-energy stage")
    f = np.zeros(len(samples)) if start is None else start.astype(float)
    if start is None:
        f = _self_consistent(f, samples, histogram, bias, rounds=20)
    value, gradient, hessian = _objective(f, samples, histogram, bias)
    for _ in range(ITERATIONS):
        if np.abs(gradient).max() <= tolerance * samples.sum():
            if start is None and not _connected(overlap_matrix(counts, bias, f)):
                break
            return _probability(f, samples, histogram, bias), f - f[0]
        try:
            step = np.linalg.solve(hessian[1:, 1:], -gradient[1:])
        except np.linalg.LinAlgError:
            break
        if not np.isfinite(step).all():
            break
        scale = min(1.0, 5.0 / max(np.abs(step).max(), 1e-300))  # far from the minimum the quadratic model is poor
        for _ in range(40):
            trial = f + scale * np.concatenate([[0.0], step])
            found = _objective(trial, samples, histogram, bias)
            if found[0] <= value + 1e-12 * abs(value):
                break
            scale /= 2
        f, (value, gradient, hessian) = trial, found
    raise DataError("the umbrella windows do not overlap; use more windows or a softer restraint in the free-energy stage")


def _connected(overlap: np.ndarray) -> bool:
    return connected_components(overlap > 1e-9, directed=False)[0] == 1


def _probability(f: np.ndarray, samples: np.ndarray, histogram: np.ndarray, bias: np.ndarray) -> np.ndarray:
    exponent = f[:, None] - bias + np.log(samples)[:, None]
    top = exponent.max(0)
    log_p = np.log(np.maximum(histogram, 1e-300)) - top - np.log(np.exp(exponent - top).sum(0))
    probability = np.where(histogram > 0, np.exp(log_p - log_p[histogram > 0].max()), 0.0)
    return probability / probability.sum()


def _self_consistent(f: np.ndarray, samples: np.ndarray, histogram: np.ndarray, bias: np.ndarray, *, rounds: int) -> np.ndarray:
    boltzmann = np.exp(-bias)
    for _ in range(rounds):
        weight = (samples[:, None] * np.exp(f)[:, None] * boltzmann).sum(0)
        probability = np.divide(histogram, weight, out=np.zeros_like(histogram), where=weight > 0)
        f = -np.log(np.maximum((probability * boltzmann).sum(1), 1e-300))
        f = f - f[0]
    return f


def _objective(
    f: np.ndarray, samples: np.ndarray, histogram: np.ndarray, bias: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    exponent = f[:, None] - bias + np.log(samples)[:, None]
    top = exponent.max(0)
    weight = np.exp(exponent - top)
    total = weight.sum(0)
    share = weight / total
    expected = share @ histogram
    value = float((histogram * (top + np.log(total))).sum() - (samples * f).sum())
    return value, expected - samples, np.diag(expected) - (share * histogram) @ share.T


def overlap_matrix(counts: np.ndarray, bias: np.ndarray, f: np.ndarray) -> np.ndarray:
    """Return how the windows overlap, [window, window] with rows that sum to 1.

    Equation: O_kl = sum_b p_b N_l w_kb w_lb with w_kb = exp(f_k - u_kb) / sum_j N_j exp(f_j - u_jb), the probability that a
    sample of window k could as well have come from l. Neighbours below 0.03 are too far apart
    (doi:10.1007/s10822-015-9840-9).

    Args:
        counts: [window, bin] samples.
        bias: [window, bin] restraint energy over kT.
        f: [window] free energies from `unbiased`.
    """
    samples, histogram = counts.sum(1), counts.sum(0)
    exponent = f[:, None] - bias
    weight = np.exp(exponent - exponent.max(0))
    weight = weight / (samples[:, None] * weight).sum(0)
    return (weight * histogram) @ weight.T * samples[None, :]
