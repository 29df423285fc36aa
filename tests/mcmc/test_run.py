import numpy as np
import pytest
import torch

from longstride.data.checkpoint import open_state
from longstride.mcmc.kernel import Kernel, mixture
from longstride.mcmc.metropolis import metropolis, start_chains
from longstride.mcmc.run import Schedule, run
from longstride.state import State

SCHEDULE = Schedule(steps=30, burn_in=7, save_every=3, checkpoint_every=5)


class Walk:
    def sample(self, x, generator):
        noise = torch.randn(x.positions.shape, generator=generator, dtype=torch.float64)
        return State(positions=x.positions + noise), torch.zeros(len(noise), dtype=torch.float64)

    def log_prob(self, y, x):
        return torch.zeros(len(y.positions), dtype=torch.float64)


def gaussian(x):
    return -0.5 * x.positions.square().sum((1, 2))


def walkers():
    return mixture([metropolis(gaussian, Walk(), label="one"), metropolis(gaussian, Walk(), label="two")], [0.5, 0.5])


def start():
    return start_chains(gaussian, State(positions=torch.zeros(4, 2, 3, dtype=torch.float64)))


def complete(path, kernel):
    with open_state(path, "key") as folder:
        return run(kernel, start(), SCHEDULE, generator=torch.Generator().manual_seed(5), folder=folder, label="test")


def dying_after(kernel, steps):
    left = [steps]

    def step(chains, generator):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return kernel(chains, generator)

    return Kernel(step=step, invariance=kernel.invariance, labels=kernel.labels)


@pytest.mark.parametrize("dies_at", [3, 7, 8, 16, 36])
def test_a_killed_run_continues_to_the_same_bits(tmp_path, dies_at):
    whole, tally = complete(tmp_path / "whole", walkers())
    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path / "killed", dying_after(walkers(), dies_at))
    resumed, other = complete(tmp_path / "killed", walkers())
    for name in ("positions", "log_density", "acceptance"):
        assert np.array_equal(getattr(whole, name), getattr(resumed, name))
    assert (tally.proposed, tally.accepted, tally.energy_calls) == (other.proposed, other.accepted, other.energy_calls)


def test_saved_states_repeat_rejections_and_count_what_was_accepted(tmp_path):
    saved, tally = complete(tmp_path, walkers())
    assert saved.positions.shape == (10, 4, 2, 3)
    assert saved.acceptance.mean() == pytest.approx(tally.acceptance())
    assert sum(tally.proposed.values()) == 30 * 4
    assert tally.energy_calls == 37 * 4
    assert set(tally.proposed) == {"one", "two"}
    at_saved = gaussian(State(positions=torch.from_numpy(saved.positions[3]).double()))
    assert np.allclose(saved.log_density[3], at_saved, atol=1e-5)
    still = (saved.acceptance[1:] == 0)[..., None, None]
    assert np.array_equal(np.where(still, saved.positions[1:], 0), np.where(still, saved.positions[:-1], 0))
