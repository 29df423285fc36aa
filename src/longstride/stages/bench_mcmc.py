"""Speed of Metropolis-Hastings with flow proposals, measured in one run on one machine.

Three samplers of the same target are timed, first the proposals alone, then the complete exact step with energies:

    cartesian   the published model as it runs here: batched, both networks of a layer together, attention of x computed once
    serial      the same weights and equations written down plainly: one proposal after another, one network after another,
                attention computed in every layer, one OpenMM energy at a time
    internal    the flow in internal coordinates

Weights are random and in float32: they do not change the cost. What is compared is timed in turn, round after round after a
warm-up, and every rate is that of its best round, so that a disturbance by other work on the machine does not tilt a ratio.
Each sampler gets all threads it was given.
"""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from longstride.config import FlowConfig, validate
from longstride.errors import LongstrideError
from longstride.flows.cartesian import PRESETS, CartesianArchitecture, CartesianFlow, CartesianProposal, Coupling
from longstride.flows.kernel_attention import AtomTransformer, EncoderLayer, PackedLinear
from longstride.mcmc.metropolis import boltzmann, metropolis, start_chains
from longstride.mcmc.timewarp import timewarp
from longstride.potentials.amber import AmberPotential, compiler_available
from longstride.potentials.openmm import OpenMMPotential
from longstride.provenance import provenance
from longstride.stages.bench import prepared, thermal_configurations
from longstride.stages.bench_measure import peak_memory_MiB, rates_in_turn
from longstride.stages.flow import build_flow
from longstride.state import State
from longstride.units import thermal_energy

if TYPE_CHECKING:
    from collections.abc import Callable

    from longstride.mcmc.kernel import Kernel
    from longstride.potentials.base import Potential
    from longstride.systems import Prepared

    Calls = dict[tuple[str, str], tuple[Callable[[], object], float]]

ROUNDS, WINDOW_SECONDS = 4, 0.3
# the released code with the 2aa model, flow part alone, on two cores
PUBLISHED_PROPOSALS_PER_S, PUBLISHED_ATOMS = 14.0, 22
SEQUENCES = ("GG", "ACE-ALA-NME", "AAAA", "WW", "ALKF", "WWWW")  # 17 to 99 atoms
BATCHES = (1, 4, 16, 64)
ROWS = 704  # proposal x atom of one call where the atom count is varied: 32 proposals of 22 atoms
INTERNAL_BATCH = 256
FLOW, STEP = "flow_proposals_per_s", "step_proposals_per_s"
FRAMES = 1024  # harmonic configurations that standardise the internal flow


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        sequence: peptide of the main comparison.
        preset: sizes of the Cartesian flow.
        batch: chains of the Cartesian sampler.
        threads: cores.
        compile: compile the energies; None: where a C++ compiler is found.
        sequences: peptides of the dependence on the number of atoms.
        batches: batch sizes of the dependence on it.
    """

    sequence: str = "ACE-ALA-NME"
    preset: str = "2aa"
    batch: int = 32
    threads: int = 1
    compile: bool | None = None
    sequences: tuple[str, ...] = SEQUENCES
    batches: tuple[int, ...] = BATCHES


def mcmc(settings: Settings) -> dict[str, Any]:
    """Measure all samplers.

    Returns:
        JSON values; rates in 1/s, memory in MiB, `ratios` of rates within this run, `fraction_of_matmul_peak` the arithmetic
        done per second over that of a large square matrix product (`nominal`: counted as two operations per weight, atom and
        pass).
    """
    torch.set_num_threads(settings.threads)
    molecule = _prepared(settings.sequence)
    potential = _potential(molecule, settings)
    internal = _internal(molecule, potential)  # first, so that its memory is not counted together with the larger model's
    flow = random_flow(PRESETS[settings.preset])
    cartesian = _cartesian(flow, molecule, potential, batch=settings.batch)
    parts = _measured({"cartesian": cartesian, "serial": _serial(flow, molecule), "internal": internal})
    parts["cartesian"] = {"preset": settings.preset, **parts["cartesian"]}
    return {
        "system": settings.sequence,
        "atoms": molecule.system.n_atoms,
        "threads": settings.threads,
        "dtype": "float32",
        **parts,
        "ratios": _ratios(**parts, atoms=molecule.system.n_atoms),
        "by_batch": [_at_batch(flow, molecule, batch) for batch in settings.batches],
        "by_atoms": [_at_atoms(flow, sequence, settings) for sequence in settings.sequences],
        "peak_memory_MiB": _process_peak_MiB(),
        "provenance": provenance(),
    }


@dataclass(frozen=True, kw_only=True)
class Part:
    """One sampler, warmed up and ready to be timed.

    Attributes:
        facts: what is known of it without a clock; JSON values.
        calls: name of a rate to what is called and how many things one call does.
    """

    facts: dict[str, Any]
    calls: dict[str, tuple[Callable[[], object], float]]


def _measured(parts: dict[str, Part]) -> dict[str, dict[str, Any]]:
    """Return facts and rates of all parts, timed in turn; fractions of the peak where a part counts its operations."""
    calls: Calls = {(name, kind): call for name, part in parts.items() for kind, call in part.calls.items()}
    peak_call = _matrix_product()
    rates = _rates({**calls, ("machine", "peak"): peak_call})
    peak = rates["machine", "peak"]
    found = {}
    for name, part in parts.items():
        found[name] = {**part.facts, **{kind: rates[name, kind] for kind in part.calls}}
        if "GFLOP_per_proposal" in part.facts:
            used = {kind: 1e9 * work * rates[name, FLOW] / peak for kind, work in part.facts["GFLOP_per_proposal"].items()}
            found[name] |= {"matmul_peak_GFLOP_per_s": peak / 1e9, "fraction_of_matmul_peak": used}
    return found


def _rates(calls: Calls) -> dict[tuple[str, str], float]:
    """Return how many things each call does per second, the best of several rounds over all of them."""
    rates = rates_in_turn(calls, rounds=ROUNDS, window_s=WINDOW_SECONDS)
    return {name: max(found.wall) for name, found in rates.items()}


def _ratios(*, cartesian: dict[str, Any], serial: dict[str, Any], internal: dict[str, Any], atoms: int) -> dict[str, float]:
    ours, plain = cartesian[FLOW], serial[FLOW]
    ratios = {
        "cartesian_flow_over_serial_flow": ours / plain,
        "cartesian_step_over_serial_step": cartesian[STEP] / serial[STEP],
        "internal_step_over_cartesian_step": internal[STEP] / cartesian[STEP],
        "internal_step_over_serial_flow": internal[STEP] / plain,
    }
    if cartesian["preset"] == "2aa" and atoms == PUBLISHED_ATOMS:
        # only comparable on two quiet cores of the kind it was measured on
        ratios |= {
            "cartesian_flow_over_published_14_per_s": ours / PUBLISHED_PROPOSALS_PER_S,
            "internal_step_over_published_14_per_s": internal[STEP] / PUBLISHED_PROPOSALS_PER_S,
        }
    return ratios


def random_flow(architecture: CartesianArchitecture) -> CartesianFlow:
    """Return a flow with random weights whose proposals are small, so that nothing overflows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CartesianFlow(architecture).eval().requires_grad_(requires_grad=False)
    with torch.no_grad():
        flow.log_scale_positions.fill_(math.log(1e-3))
        for coupling in flow.couplings:
            assert isinstance(coupling, Coupling)  # for the type checker: a ModuleList forgets what it holds
            for network in (coupling.scale, coupling.shift):
                for value in network.leave.parameters():
                    value.mul_(1e-3)
    return flow


def operations(architecture: CartesianArchitecture, atoms: int) -> dict[str, float]:
    """Return floating-point operations of one proposal (two passes): as performed here, and two per weight, atom and pass."""
    width, heads = architecture.width, len(architecture.lengthscales_nm)
    ends = (architecture.embedding + 9) * architecture.hidden + 2 * architecture.hidden * width + 3 * architecture.hidden
    feed_forward = 2 * width * architecture.feed_forward
    folded = ends + architecture.layers * (heads * width * width + heads * atoms * width + feed_forward)
    weights = ends + architecture.layers * (2 * heads * width * width + feed_forward)
    networks = 2 * architecture.couplings
    return {"performed": 4.0 * atoms * networks * folded, "nominal": 4.0 * atoms * networks * weights}


def _matrix_product(size: int = 2048) -> tuple[Callable[[], object], float]:
    """Return a float32 product of two square matrices in the faster of torch's ways, and its floating-point operations."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    laid_out = PackedLinear(a, None)
    ways: Calls = {("", "general"): (lambda: a @ a, 1.0), ("", "laid out"): (lambda: laid_out(a), 1.0)}
    rates = _rates(ways)
    return ways[max(rates, key=lambda name: rates[name])][0], 2.0 * size**3


def _prepared(sequence: str) -> Prepared:
    return prepared(sequence, validate({}).physics)


def _potential(molecule: Prepared, settings: Settings) -> AmberPotential:
    compiled = compiler_available() if settings.compile is None else settings.compile
    return AmberPotential.from_openmm(
        molecule.openmm_system, molecule.system, name=molecule.target, dtype=torch.float32, compile=compiled
    )


def _kT() -> float:
    return thermal_energy(validate({}).physics.temperature_K)


def _starts(molecule: Prepared, count: int) -> State:
    return State(positions=torch.from_numpy(molecule.positions).expand(count, -1, -1).contiguous())


def _step(kernel: Kernel, potential: Potential, x: State) -> Callable[[], object]:
    """Return one step of the chains at x, always from there."""
    chains = start_chains(boltzmann(potential, _kT()), x)
    generator = torch.Generator().manual_seed(1)
    return lambda: kernel(chains, generator)


def _cartesian(flow: CartesianFlow, molecule: Prepared, potential: Potential, *, batch: int) -> Part:
    proposal, x = flow.bind(molecule.system), _starts(molecule, batch)
    alone = _flow_part(proposal, x)
    step = _step(metropolis(boltzmann(potential, _kT()), proposal, propose=proposal.propose), potential, x)
    facts = {"parameters": sum(value.numel() for value in flow.parameters()), **alone.facts}
    facts["peak_memory_MiB"] = peak_memory_MiB(*(call for call, _ in alone.calls.values()), step)
    return Part(facts=facts, calls={**alone.calls, STEP: (step, batch)})


def _flow_part(proposal: CartesianProposal, x: State) -> Part:
    """Return the proposals alone: draw, both densities."""
    batch, atoms = x.positions.shape[:2]
    generator = torch.Generator().manual_seed(0)

    def propose() -> object:
        return proposal.propose(x, generator)

    work = {name: value / 1e9 for name, value in operations(proposal.flow.architecture, atoms).items()}
    facts = {"batch": batch, "GFLOP_per_proposal": work, "peak_memory_MiB": peak_memory_MiB(propose)}
    return Part(facts=facts, calls={FLOW: (propose, batch)})


def _at_batch(flow: CartesianFlow, molecule: Prepared, batch: int) -> dict[str, Any]:
    return _measured({"": _flow_part(flow.bind(molecule.system), _starts(molecule, batch))})[""]


def _at_atoms(flow: CartesianFlow, sequence: str, settings: Settings) -> dict[str, Any]:
    """Return rates of one peptide; all share the compiled energies."""
    molecule = _prepared(sequence)
    atoms = molecule.system.n_atoms
    parts = {"cartesian": _flow_part(flow.bind(molecule.system), _starts(molecule, max(1, ROWS // atoms)))}
    try:
        parts["internal"] = _internal(molecule, _potential(molecule, settings))
        reason: dict[str, Any] = {}
    except LongstrideError as error:
        reason = {"internal": {"not_measured": str(error)}}
    return {"system": sequence, "atoms": atoms, **_measured(parts), **reason}


def _internal(molecule: Prepared, potential: AmberPotential) -> Part:
    """Return the exact step with the internal-coordinate flow, freshly initialised."""
    exact = AmberPotential.from_openmm(molecule.openmm_system, molecule.system, name=molecule.target)
    temperature = validate({}).physics.temperature_K
    generator = torch.Generator().manual_seed(0)
    frames = thermal_configurations(exact, molecule.positions, count=FRAMES, temperature_K=temperature, generator=generator)
    flow = build_flow(FlowConfig(), molecule, lags_ps=(100.0,), frames=frames.numpy(), seed=0).eval()
    flow.requires_grad_(requires_grad=False)
    kernel = timewarp(flow.bound(molecule.system), potential, kT=_kT(), independent_probability=0.0)
    step = _step(kernel, potential, State(positions=frames[:INTERNAL_BATCH]))
    parameters = sum(value.numel() for value in flow.parameters())
    facts = {"batch": INTERNAL_BATCH, "parameters": parameters, "peak_memory_MiB": peak_memory_MiB(step)}
    return Part(facts=facts, calls={STEP: (step, INTERNAL_BATCH)})


# The serial sampler: the equations of the module docs, one after another.


def _plain_attention(layer: EncoderLayer, h: Tensor, x: Tensor, lengthscales: Tensor) -> Tensor:
    squared = torch.cdist(x, x).square()
    heads = []
    for values, lengthscale in zip(layer.attention.values.weight.chunk(len(lengthscales)), lengthscales, strict=True):
        kernel = torch.exp(-squared / lengthscale**2)
        heads.append((kernel / (kernel.sum(-1, keepdim=True) + 1e-5)) @ functional.linear(h, values))
    return layer.attention.out(torch.cat(heads, -1))


def _plain_transformer(network: AtomTransformer, features: Tensor, x: Tensor, lengthscales: Tensor) -> Tensor:
    h = network.enter(features)
    for layer in network.layers:
        assert isinstance(layer, EncoderLayer)  # for the type checker: a ModuleList forgets what it holds
        h = layer.norm_attention(h + _plain_attention(layer, h, x, lengthscales))
        h = layer.norm_feed_forward(h + layer.narrow(torch.relu(layer.widen(h))))
    return network.leave(h)


def _plain_coefficients(flow: CartesianFlow, index: int, kept: Tensor, x: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    coupling = flow.couplings[index]
    assert isinstance(coupling, Coupling)
    centred = x - x.mean(0)
    features = torch.cat([flow.embedding(elements), centred, torch.zeros_like(centred), kept], -1)
    scale, shift = (_plain_transformer(net, features, centred, flow.lengthscales) for net in (coupling.scale, coupling.shift))
    return scale, shift


@torch.no_grad()
def plain_sample(flow: CartesianFlow, x: Tensor, elements: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, v and log q(y, v | x) of one proposal from x [atom, 3]."""
    scales = (flow.log_scale_positions, flow.log_scale_auxiliaries)
    latent = [scale.exp() * torch.randn(x.shape, generator=generator) for scale in scales]
    log_q = _plain_base(latent[0], scales[0]) + _plain_base(latent[1], scales[1])
    for index in reversed(range(len(flow.couplings))):
        log_s, t = _plain_coefficients(flow, index, latent[1 - index % 2], x, elements)
        latent[index % 2] = (latent[index % 2] - t) / torch.exp(log_s)
        log_q = log_q + log_s.sum()
    return x + latent[0], latent[1], log_q


@torch.no_grad()
def plain_log_prob(flow: CartesianFlow, y: Tensor, v: Tensor, x: Tensor, elements: Tensor) -> Tensor:
    """Return log q(y, v | x) of one proposal, [atom, 3] each."""
    values, logdet = [y - x, v], torch.zeros(())
    for index in range(len(flow.couplings)):
        log_s, t = _plain_coefficients(flow, index, values[1 - index % 2], x, elements)
        values[index % 2] = values[index % 2] * torch.exp(log_s) + t
        logdet = logdet + log_s.sum()
    return _plain_base(values[0], flow.log_scale_positions) + _plain_base(values[1], flow.log_scale_auxiliaries) + logdet


def _plain_base(value: Tensor, log_scale: Tensor) -> Tensor:
    return torch.distributions.Normal(torch.zeros(()), log_scale.exp()).log_prob(value).sum()


def _serial(flow: CartesianFlow, molecule: Prepared) -> Part:
    """Return the serial sampler, and how its log-densities agree with the batched ones."""
    proposal = flow.bind(molecule.system)
    elements, x = proposal.elements, torch.from_numpy(molecule.positions).float()
    generator = torch.Generator().manual_seed(0)
    openmm = OpenMMPotential(
        molecule.openmm_system, molecule.system, name=molecule.target, platform="CPU", threads=torch.get_num_threads()
    )

    def propose() -> tuple[Tensor, Tensor]:
        y, v_y, forward = plain_sample(flow, x, elements, generator)
        v_x = torch.randn(x.shape, generator=generator)
        backward = plain_log_prob(flow, x, v_x, y, elements)
        return y, backward - forward + (v_x.square().sum() - v_y.square().sum()) / 2

    at_x = openmm.energy(State(positions=x[None].double()))[0]  # a chain keeps the energy of where it is

    def step() -> bool:
        y, log_ratio = propose()
        log_r = log_ratio - (openmm.energy(State(positions=y[None].double()))[0] - at_x) / _kT()
        return bool(torch.rand((), generator=generator).log() < log_r)

    facts = {
        "largest_log_q_difference": _agreement(proposal, x, elements),
        "peak_memory_MiB": peak_memory_MiB(propose, step),
    }
    return Part(facts=facts, calls={FLOW: (propose, 1), STEP: (step, 1)})


def _agreement(proposal: CartesianProposal, x: Tensor, elements: Tensor, count: int = 4) -> float:
    """Return the largest difference of log q between the serial and the batched implementation, nats."""
    here = State(positions=x.expand(count, -1, -1))
    y, log_q = proposal.sample(here, torch.Generator().manual_seed(2))
    assert y.velocities is not None
    plain = [
        float(plain_log_prob(proposal.flow, there, v, x, elements)) for there, v in zip(y.positions, y.velocities, strict=True)
    ]
    return float((log_q - torch.tensor(plain)).abs().max())


def _process_peak_MiB() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (2**20 if sys.platform == "darwin" else 2**10))


def table(result: dict[str, Any]) -> str:
    """Return the result of `mcmc` as text."""
    cartesian, serial, internal = result["cartesian"], result["serial"], result["internal"]
    share = cartesian["fraction_of_matmul_peak"]
    lines = [
        f"{result['system']}: {result['atoms']} atoms, float32, {result['threads']} cores,"
        f" matrix products {cartesian['matmul_peak_GFLOP_per_s']:.0f} GFLOP/s",
        f"  {'proposals/s':<34}{'flow alone':>12}{'exact step':>12}{'MiB':>8}",
    ]
    rows = (
        (f"cartesian {cartesian['preset']}, {cartesian['batch']} chains", cartesian),
        ("cartesian, serial", serial),
        (f"internal, {internal['batch']} chains", internal),
    )
    for name, row in rows:
        alone = f"{row[FLOW]:.1f}" if FLOW in row else "-"
        lines.append(f"  {name:<34}{alone:>12}{row[STEP]:>12.1f}{row['peak_memory_MiB'] or '-':>8}")
    lines.append(
        f"  cartesian uses {share['performed']:.0%} of the matrix-product peak ({share['nominal']:.0%} counted without folding)"
    )
    lines += [f"  {name.replace('_', ' ')}: {value:.2f}" for name, value in result["ratios"].items()]
    lines += [f"  batch {row['batch']:>3}: {row[FLOW]:.1f} proposals/s" for row in result["by_batch"]]
    for row in result["by_atoms"]:
        step = row["internal"].get(STEP)
        shown = "not measured" if step is None else f"{step:.0f}"
        rate = row["cartesian"][FLOW]
        lines.append(f"  {row['atoms']:>3} atoms: cartesian {rate:.1f}, internal step {shown}")
    return "\n".join(lines)
