"""Cost of the student against the number of atoms: seconds and memory of a call, on all pairs and on neighbour lists.

The atoms are water of 0.997 g/cm3 in a cubic box, molecules on a lattice and turned at random, which has the neighbours of the
liquid. Weights are random, which costs the same. The exponent p of t = a N^p is fitted to the boxes of 600 atoms and more.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longstride.potentials.amber import compiler_available
from longstride.potentials.student import Student, StudentMetadata, StudentNetwork
from longstride.potentials.student_neighbours import NeighbourStudent
from longstride.provenance import provenance
from longstride.stages.bench_measure import peak_memory_MiB, rates_in_turn
from longstride.state import State, System
from longstride.systems import prepare_sequence

MOLECULE_NM3 = 18.0153 / 0.997 / 602.214076  # volume of a water molecule
SHAPE_NM = ((0.0, 0.0, 0.0), (0.0957, 0.0, 0.0), (-0.0240, 0.0927, 0.0))
EDGES = (4, 5, 6, 8, 10, 12)  # molecules along an edge: 192 to 5 184 atoms
STEP_NM = 0.004  # about an inner step, so that tables are rebuilt as often as in dynamics
LARGE = 600


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        edges: molecules along the edges of the boxes.
        channels: of the network.
        radial: of the network.
        hidden: of the network.
        threads: of torch.
        rounds: windows of each measurement.
        window_s: length of one.
    """

    edges: tuple[int, ...] = EDGES
    channels: int = 16
    radial: int = 6
    hidden: int = 64
    threads: int = 1
    rounds: int = 5
    window_s: float = 0.5


def student(settings: Settings) -> dict[str, Any]:
    """Return JSON values: for every size milliseconds of a call and of a table, memory; and the exponent of the cost."""
    torch.set_num_threads(settings.threads)
    metadata = StudentMetadata(
        elements=(1, 6, 7, 8),
        teacher="none",
        channels=settings.channels,
        radial=settings.radial,
        hidden=settings.hidden,
    )
    network = StudentNetwork(metadata, torch.Generator().manual_seed(0))
    rows = [_alanine(network, settings)]
    rows += [_box(network, edge, settings) for edge in settings.edges]
    large = [row for row in rows if row["periodic"] and row["atoms"] >= LARGE]
    result: dict[str, Any] = {
        "channels": settings.channels,
        "radial": settings.radial,
        "hidden": settings.hidden,
        "threads": settings.threads,
        "compiled": compiler_available(),
        "sizes": rows,
        "exponent": None,
        "provenance": provenance(),
    }
    if len(large) > 1:
        slope, _ = np.polyfit([math.log(row["atoms"]) for row in large], [math.log(row["ms"]) for row in large], 1)
        result["exponent"] = float(slope)
    return result


def _alanine(network: StudentNetwork, settings: Settings) -> dict[str, Any]:
    """22 atoms on all pairs, as `sample` runs them."""
    made = prepare_sequence("ACE-ALA-NME", name="alanine", force_field=("amber14-all.xml",), cutoff_nm=None)
    x = torch.from_numpy(made.positions)[None]
    return _measure(Student(network, made.system), x, None, settings)


def _box(network: StudentNetwork, edge: int, settings: Settings) -> dict[str, Any]:
    system, x, box = water_lattice(edge)
    return _measure(NeighbourStudent(network, system, compile=compiler_available()), x, box, settings)


def water_lattice(edge: int) -> tuple[System, torch.Tensor, torch.Tensor]:
    """Return water on a cubic lattice, turned at random: the system, positions [1, atom, 3] nm and the box [1, 3, 3] nm.

    Args:
        edge: molecules along an edge.
    """
    generator = torch.Generator().manual_seed(edge)
    spacing = MOLECULE_NM3 ** (1 / 3)
    count = edge**3
    cells = torch.cartesian_prod(*[torch.arange(edge, dtype=torch.float64)] * 3) * spacing
    turns, _ = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64))
    positions = cells[:, None] + torch.tensor(SHAPE_NM, dtype=torch.float64) @ turns
    numbers = np.tile([8, 1, 1], count)
    first = 3 * np.arange(count)
    system = System(
        name=f"water-{count}",
        atomic_numbers=numbers,
        masses=np.where(numbers == 1, 1.008, 15.999),
        bonds=np.stack([np.repeat(first, 2), np.stack([first + 1, first + 2], axis=1).ravel()], axis=1),
        atom_names=("O", "H1", "H2") * count,
        residue_names=("HOH",) * (3 * count),
        residue_indices=np.arange(3 * count) // 3,
    )
    return system, positions.reshape(1, -1, 3), edge * spacing * torch.eye(3, dtype=torch.float64)[None]


def _measure(
    potential: Student | NeighbourStudent, x: torch.Tensor, box: torch.Tensor | None, settings: Settings
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def call() -> None:
        moved = x + STEP_NM * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        potential.energy_forces(State(positions=moved, box=box))

    began = time.perf_counter()
    call()
    first_s = time.perf_counter() - began
    for _ in range(3):
        call()
    memory = peak_memory_MiB(call)
    rates = rates_in_turn({"call": (call, 1.0)}, rounds=settings.rounds, window_s=settings.window_s)["call"]
    return {
        "atoms": x.shape[1],
        "periodic": box is not None,
        "ms": 1e3 / statistics.median(rates.wall),
        "first_call_s": first_s,
        "process_memory_MiB": memory,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result of `student` as text."""
    lines = [
        f"student: {result['channels']} channels, {result['radial']} radial functions, width {result['hidden']},"
        f" {result['threads']} thread(s), {'compiled' if result['compiled'] else 'not compiled'}",
        f"  {'atoms':>8}{'ms':>10}{'us per atom':>14}{'process memory':>18}",
    ]
    for row in result["sizes"]:
        each = 1e3 * row["ms"] / row["atoms"]
        lines.append(f"  {row['atoms']:>8}{row['ms']:>10.2f}{each:>14.2f}{row['process_memory_MiB'] or 0:>14} MiB")
    if result["exponent"] is not None:
        lines.append(f"  cost ~ atoms^{result['exponent']:.2f} from {LARGE} atoms on")
    return "\n".join(lines)
