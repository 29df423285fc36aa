"""`bench mcmc`: the serial sampler it measures against computes the same densities, and its figures are consistent."""

import json

import pytest
import torch

from longstride.cli import main
from longstride.flows.cartesian import PRESETS, CartesianFlow
from longstride.stages import bench_mcmc
from longstride.stages.bench_mcmc import operations, plain_log_prob, plain_sample, random_flow


def test_the_serial_sampler_is_the_same_flow():
    torch.manual_seed(0)
    flow = CartesianFlow(PRESETS["small"]).double().eval().requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(1)
    x, d, v = 0.2 * torch.randn(3, 6, 3, generator=generator, dtype=torch.float64)
    elements = torch.tensor([0, 1, 2, 3, 4, 1])
    truth = flow.log_prob((x + d)[None], v[None], flow.condition(x[None], elements))[0]
    torch.testing.assert_close(plain_log_prob(flow, x + d, v, x, elements), truth)
    y, v_y, log_q = plain_sample(flow, x, elements, generator)
    torch.testing.assert_close(log_q, plain_log_prob(flow, y, v_y, x, elements))
    # the control: attention at other positions
    assert (plain_log_prob(flow, x + d, v, 2 * x, elements) - truth).abs() > 1e-3


def test_the_serial_step_evaluates_the_energy_of_the_proposal_alone(alanine, monkeypatch):
    evaluated = []

    class Counted(bench_mcmc.OpenMMPotential):
        def energy(self, x):
            evaluated.append(x.positions)
            return super().energy(x)

    monkeypatch.setattr(bench_mcmc, "OpenMMPotential", Counted)
    part = bench_mcmc._serial(random_flow(PRESETS["small"]), alanine)
    assert part.facts["largest_log_q_difference"] < 1e-2
    step, count = part.calls[bench_mcmc.STEP]
    evaluated.clear()
    step()
    step()
    assert count == 1
    assert [len(positions) for positions in evaluated] == [1, 1]
    assert not torch.equal(*evaluated)


def test_operations_of_the_released_model_are_those_counted_by_hand():
    found = operations(PRESETS["2aa"], 22)
    assert found["nominal"] == pytest.approx(9.35e9, rel=5e-3)
    # folding saves H W^2 of 2 H W^2 + 2 W F per layer and atom, the gathering of the heads costs H N W
    assert 0.84 < found["performed"] / found["nominal"] < 0.90


def test_random_flows_propose_close_by():
    flow = random_flow(PRESETS["small"])
    x = torch.randn(4, 5, 3)
    condition = flow.condition(x, torch.zeros(5, dtype=torch.int64))
    y, _, log_q = flow.sample(condition, torch.Generator().manual_seed(0))
    assert (y - x).abs().max() < 0.05
    assert log_q.isfinite().all()


@pytest.mark.slow
def test_the_command_prints_consistent_figures(capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "mcmc", "--preset", "small", "--batch", "4", "--threads", "1", "--quick", "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out)
    assert result["serial"]["largest_log_q_difference"] < 0.05
    ratio = result["cartesian"]["flow_proposals_per_s"] / result["serial"]["flow_proposals_per_s"]
    assert result["ratios"]["cartesian_flow_over_serial_flow"] == pytest.approx(ratio)
    for part in ("cartesian", "serial", "internal"):
        assert result[part]["step_proposals_per_s"] > 0
    assert result["cartesian"]["step_proposals_per_s"] < 1.5 * result["cartesian"]["flow_proposals_per_s"]
