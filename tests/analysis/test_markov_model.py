from dataclasses import replace

import numpy as np
import pytest
from fake_run import POPULATIONS, SECTION, jump_chain, torsions_of

from longstride.analysis import pyemma_bridge
from longstride.analysis.features import Torsions
from longstride.analysis.markov_analysis import (
    analyse_markov,
    circular_mean,
    macrostate_rows,
    markov_json,
    require_physical_time,
)
from longstride.analysis.markov_model import (
    _passage_matrix,
    bayesian_msm,
    bayesian_timescales,
    chapman_kolmogorov,
    gap_ratios,
    macrostate_populations,
    macrostates,
    mean_first_passage_times,
    transition_counts,
)
from longstride.analysis.reference_model import model_reference, reference_markov_json
from longstride.analysis.samples import SampleSet, load_molecule, load_reference
from longstride.analysis.tica_msm import MarkovModel, fit_msm
from longstride.errors import DataError

# two basins of two states each; the exchange inside is fast, that between the basins slow; in detailed balance with WEIGHTS
WEIGHTS = np.array([0.4, 0.25, 0.2, 0.15])
RATES = np.array([[0, 0.4, 0.004, 0], [0.4, 0, 0.004, 0], [0.004, 0.004, 0, 0.4], [0, 0, 0.4, 0]])
MATRIX = RATES * WEIGHTS[None, :]
MATRIX = MATRIX + np.diag(1 - MATRIX.sum(axis=1))
BASINS = np.array([0, 0, 1, 1])


def chains(matrix, *, seed, times, number, starts=None):
    """Markov chains of a known matrix, one [time] array each, from equilibrium unless told."""
    generator = np.random.default_rng(seed)
    values, vectors = np.linalg.eig(matrix.T)
    stationary = np.real(vectors[:, np.argmax(values.real)])
    state = np.empty((times, number), dtype=np.int64)
    drawn = generator.choice(len(matrix), size=number, p=stationary / stationary.sum())
    state[0] = drawn if starts is None else starts
    draw, cumulative = generator.random(state.shape), matrix.cumsum(axis=1)
    for t in range(1, times):
        state[t] = (draw[t][:, None] > cumulative[state[t - 1]]).sum(axis=1)
    return list(np.minimum(state, len(matrix) - 1).T.copy())


def exact_timescales(matrix):
    values = np.sort(np.real(np.linalg.eigvals(matrix)))[::-1]
    return -1 / np.log(values[1:])


def exact_passage(matrix, weights, origin, target, *, lag):
    """First passage seen every `lag` steps, by solving the linear equations."""
    coarse = np.linalg.matrix_power(matrix, lag)
    outside = np.setdiff1d(np.arange(len(matrix)), target)
    times = np.zeros(len(matrix))
    times[outside] = np.linalg.solve(np.eye(len(outside)) - coarse[np.ix_(outside, outside)], np.full(len(outside), float(lag)))
    return weights[origin] @ times[origin] / weights[origin].sum()


def analysed(paths, *, lag, states):
    counts = transition_counts(paths, states=states, lag=lag)
    found = macrostates(fit_msm(counts), counts, lag=lag)
    return found, bayesian_msm(paths, states=states, lag=lag, seed=3)


@pytest.fixture(scope="module")
def paths():
    return chains(MATRIX, seed=0, times=20_000, number=16)


def test_the_macrostates_of_a_known_chain_are_its_basins(paths):
    found, _ = analysed(paths, lag=5, states=4)
    assert found.n_states == 2
    assert found.of_state.tolist() == BASINS.tolist()
    assert found.note == ""
    np.testing.assert_allclose(found.memberships.sum(axis=1), 1)
    crossings = sum((np.diff((BASINS[path] == 1).astype(int)) == 1).sum() for path in paths)
    assert found.entries[1] == pytest.approx(crossings, rel=0.1)


@pytest.mark.parametrize("lag", [1, 10])
def test_populations_timescales_and_passage_times_of_a_known_chain(paths, lag):
    found, posterior = analysed(paths, lag=lag, states=4)
    populations = macrostate_populations(posterior, found)
    assert (np.abs(populations.values - [0.65, 0.35]) < 4 * populations.errors).all()
    slow = bayesian_timescales(posterior, count=1)
    assert abs(slow.values[0] - exact_timescales(MATRIX)[0]) < 4 * slow.errors[0]
    assert slow.errors[0] / slow.values[0] < 0.15
    passage = mean_first_passage_times(posterior, found)
    for a, b in ((0, 1), (1, 0)):
        truth = exact_passage(MATRIX, WEIGHTS, np.nonzero(BASINS == a)[0], np.nonzero(BASINS == b)[0], lag=lag)
        assert abs(passage.values[a, b] - truth) < 4 * passage.errors[a, b]
        assert passage.errors[a, b] / truth < 0.2
    swapped = exact_passage(MATRIX, WEIGHTS, [2, 3], [0, 1], lag=lag)
    assert abs(passage.values[0, 1] - swapped) > 4 * passage.errors[0, 1], "negative control: the way back"
    assert np.isnan(np.diag(passage.values)).all()


def test_the_exact_model_has_exact_passage_times():
    model = MarkovModel(states=np.arange(4), matrix=MATRIX, stationary=WEIGHTS)
    counts = 1e6 * WEIGHTS[:, None] * MATRIX
    found = macrostates(model, counts, lag=1)
    values = _passage_matrix(model, found.of_state, lag=1, n_sets=2)
    assert values[0, 1] == pytest.approx(exact_passage(MATRIX, WEIGHTS, [0, 1], [2, 3], lag=1), rel=1e-9)
    assert values[1, 0] == pytest.approx(exact_passage(MATRIX, WEIGHTS, [2, 3], [0, 1], lag=1), rel=1e-9)


def coverage(*, independent, lag=10, repeats=60):
    """How often the 95 % posterior interval of the slowest timescale holds the truth."""
    truth, inside = exact_timescales(MATRIX)[0], 0
    all_paths = chains(MATRIX, seed=7, times=2000, number=4 * repeats)
    for k in range(repeats):
        part = all_paths[4 * k : 4 * k + 4]
        if not independent:  # negative control: overlapping windows counted as if they were independent
            part = part * lag
        spread = bayesian_timescales(bayesian_msm(part, states=4, lag=lag, seed=k, samples=80), count=1)
        inside += spread.low[0] <= truth <= spread.high[0]
    return inside / repeats


def test_posterior_intervals_cover_the_truth_and_overlapping_counts_do_not():
    assert 0.87 <= coverage(independent=True) <= 1.0  # 60 repeats: 0.95 within three standard errors
    assert coverage(independent=False) < 0.8


def staying(paths, *, lag, states):
    found, first = analysed(paths, lag=lag, states=states)
    others = [bayesian_msm(paths, states=states, lag=k * lag, seed=3 + k) for k in range(2, 6)]
    return chapman_kolmogorov([first, *others], found)


def test_a_markov_chain_passes_chapman_kolmogorov(paths):
    test = staying(paths, lag=5, states=4)
    assert test.passes
    assert test.lags == (5, 10, 15, 20, 25)
    exact = np.linalg.matrix_power(MATRIX, 5 * 3)
    chi = analysed(paths, lag=5, states=4)[0].memberships
    stay = np.diag(chi.T @ (WEIGHTS[:, None] * exact) @ chi) / (WEIGHTS @ chi)
    assert (np.abs(test.predicted.values[2] - stay) < 5 * test.predicted.errors[2]).all()
    assert (test.estimated.errors < 0.05).all(), "no identity among the draws"


def test_a_lumping_that_forgets_a_slow_state_fails_chapman_kolmogorov():
    """Three states, 0 <-> 1 slow and 1 <-> 2 slower still: 0 and 2 look alike, so where the chain goes depends on its past."""
    matrix = np.array([[0.9, 0.1, 0.0], [0.08, 0.91, 0.01], [0.0, 0.01, 0.99]])
    hidden = chains(matrix, seed=1, times=6000, number=8)
    lumped = [np.array([0, 1, 0])[path] for path in hidden]
    assert not staying(lumped, lag=2, states=2).passes
    assert staying(hidden, lag=2, states=3).passes, "the chain itself is Markovian"


def test_deeptime_and_pyemma_agree_on_a_known_matrix(paths):
    found, _ = analysed(paths, lag=5, states=4)
    result = analyse_markov(paths, found, lag=5, lags=[5, 20], spacing_ps=0.2, seed=1)
    assert result.disagreement < 1e-3
    assert result.states_in_common == 1.0
    np.testing.assert_allclose(result.chapman_kolmogorov.predicted.values, result.pyemma.predicted, atol=1e-4)
    np.testing.assert_allclose(result.chapman_kolmogorov.estimated.values, result.pyemma.estimated, atol=1e-4)
    ours = result.timescales[5]
    width, other = ours.high[0] - ours.low[0], result.pyemma.high[0] - result.pyemma.low[0]
    assert 0.6 < width / other < 1.6, "posterior widths from two ways of counting independent transitions"


def test_json_has_a_row_per_macrostate_and_units_of_ps(paths):
    found, _ = analysed(paths, lag=5, states=4)
    result = analyse_markov(paths, found, lag=5, lags=[20], spacing_ps=0.2, seed=1)
    frames = np.concatenate(paths)
    phi = np.where(BASINS[frames] == 0, np.radians(179), np.radians(60)) * np.where(frames % 2, -1, 1)
    rows = macrostate_rows(result, BASINS[frames], (phi, phi), np.full(len(frames), 1 / len(frames)))
    assert abs(rows[0]["phi_deg"]) > 150, "a mean on the circle: 179 and -179 are neighbours"
    assert rows[0]["population"] + rows[1]["population"] == pytest.approx(1)
    content = markov_json(result, rows)
    assert content["mfpt_ps"][0][1]["value"] == pytest.approx(0.2 * result.passage.values[0, 1])
    assert content["mfpt_ps"][0][0]["value"] is None
    assert [row["lag_ps"] for row in content["timescales_bayesian"]] == pytest.approx([1, 2, 3, 4, 5])
    assert len(content["chapman_kolmogorov"]) == 2 * 5
    assert markov_json(None, []) == {}


def test_same_seed_same_posterior(paths):
    first, second, other = (bayesian_msm(paths, states=4, lag=5, seed=seed, samples=5) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.draws[-1].matrix, second.draws[-1].matrix)
    assert not np.array_equal(first.draws[-1].matrix, other.draws[-1].matrix)


def test_the_gap_counts_resolved_processes_only():
    assert next(iter(gap_ratios(np.array([100.0, 50.0, 2.0, 1.0, np.nan]), lag=5))) == 3
    assert gap_ratios(np.array([4.0, 2.0, np.nan, np.nan, np.nan]), lag=5) == {}
    assert next(iter(gap_ratios(np.array([100.0, np.nan, np.nan, np.nan, np.nan]), lag=5))) == 2


def test_fast_exchange_has_one_macrostate():
    fast = np.array([[0.5, 0.5], [0.5, 0.5]])
    paths = chains(fast, seed=2, times=2000, number=4)
    found, posterior = analysed(paths, lag=5, states=2)
    assert found.n_states == 1
    assert "no process is slower" in found.note
    assert "one macrostate" in chapman_kolmogorov([posterior], found).note
    result = analyse_markov(paths, found, lag=5, lags=[5], spacing_ps=0.2, seed=1)
    ((only,),) = markov_json(result, [])["mfpt_ps"]
    assert only == {"value": None, "low": None, "high": None, "note": "the same macrostate", "pyemma": None}


def test_a_rare_macrostate_is_labelled():
    """Two basins, each crossed once: there is a number, and it says what it is worth."""
    generator = np.random.default_rng(6)
    halves = [generator.integers(0, 2, size=400) + shift for shift in (0, 2)]
    paths = [np.concatenate(halves), np.concatenate(halves[::-1])]
    found, posterior = analysed(paths, lag=2, states=4)
    assert found.n_states == 2
    assert "fewer than 10 times" in found.note
    spread = macrostate_populations(posterior, found)
    assert (spread.high - spread.low).min() > 0.3


def test_a_disconnected_state_is_in_no_macrostate():
    paths = [*chains(MATRIX, seed=4, times=3000, number=4), np.full(3000, 4)]
    found, posterior = analysed(paths, lag=5, states=5)
    assert found.of_state.tolist() == [*BASINS.tolist(), -1]
    assert posterior.model.states.tolist() == [0, 1, 2, 3]
    result = analyse_markov(paths, found, lag=5, lags=[5], spacing_ps=0.2, seed=1)
    assert result.disagreement < 1e-3


def test_too_short_or_disconnected_data_have_no_posterior():
    assert bayesian_msm([np.array([0, 1, 0])], states=2, lag=5, seed=0) is None
    assert bayesian_msm([np.zeros(50, dtype=int), np.ones(50, dtype=int)], states=2, lag=1, seed=0) is None
    short = chains(MATRIX, seed=5, times=28, number=40)
    found, first = analysed(short, lag=5, states=4)
    assert "too short" in chapman_kolmogorov([first], found).note or found.n_states == 1


def test_monte_carlo_has_no_kinetics():
    with pytest.raises(DataError, match="not physical time"):
        require_physical_time({"physical_time": False})
    require_physical_time({"physical_time": True})


def test_pyemma_says_when_it_connects_other_states(paths):
    found = pyemma_bridge.markov_analysis(paths, states=np.arange(3), lag=5, n_sets=2, steps=2, count=2, samples=5)
    assert "PyEMMA connects 4 states" in found.note
    assert np.isnan(found.populations).all()


def test_circular_mean():
    angles = np.radians([170.0, -170.0])
    assert abs(circular_mean(angles, np.ones(2))) == pytest.approx(180)
    assert circular_mean(angles, np.zeros(2)) is None


def torsion_process(*, times, chains, seed=8):
    """A reference of a known jump process between three basins of (phi, psi), started in the basins in turn."""
    generator = np.random.default_rng(seed)
    angles = torsions_of(generator, jump_chain(generator, times=times, starts=np.arange(chains) % 3))
    manifest = {"frame_spacing_ps": 0.2, "physical_time": True}
    return SampleSet(
        manifest=manifest, angles=angles, energy=np.zeros(angles.shape[:2]), temperature={}, temperature_note="none"
    )


ALANINE = Torsions(names=("phi ALA2", "psi ALA2"), indices=np.zeros((2, 4), dtype=int), pair=(0, 1))


def test_basins_of_torsions_are_macrostates():
    samples = torsion_process(times=300, chains=240)
    found = model_reference(samples, ALANINE, SECTION.model_copy(update={"msm_states": 10}), seed=0)
    assert found.macrostates.n_states in (2, 3)
    assigned = found.macrostates(samples.angles)
    assert assigned.shape == samples.energy.shape
    assert (assigned < 0).mean() < 0.02
    right = (samples.angles[..., 0] >= 0) & (assigned >= 0)
    rare = np.bincount(assigned[right]).argmax()
    assert (assigned[right] == rare).mean() > 0.97, "phi > 0 is a macrostate of its own"
    assert (assigned[~right] == rare).mean() < 0.02
    content = reference_markov_json(found)
    assert 0 < content["macrostates"][rare]["phi_deg"] < 120
    assert content["macrostates"][0]["phi_deg"] < 0
    spread = found.markov.populations
    assert abs(spread.values[rare] - POPULATIONS[2]) < 4 * spread.errors[rare]
    assert abs((assigned == rare).mean() - POPULATIONS[2]) > 3 * spread.errors[rare], "negative control: the starts"
    assert found.markov.disagreement < 1e-3
    assert reference_markov_json(replace(found, markov=None)) == {}


def test_a_basin_never_left_is_labelled(run_folder):
    """The short reference of the made-up run never connects phi > 0: its frames are in no macrostate."""
    molecule = load_molecule(run_folder / "prepare/fake")
    found = model_reference(load_reference(run_folder / "reference/fake", molecule), molecule.torsions, SECTION, seed=0)
    lost = found.macrostates(found.samples.angles) < 0
    assert lost.mean() > 0.2
    assert "outside the connected states" in found.weights.note
    assert (found.samples.angles[..., 0][lost] > 0).mean() > 0.95


def test_a_monte_carlo_reference_is_refused():
    samples = torsion_process(times=300, chains=4)
    with pytest.raises(DataError, match="not physical time"):
        model_reference(replace(samples, manifest=samples.manifest | {"physical_time": False}), ALANINE, SECTION, seed=0)
