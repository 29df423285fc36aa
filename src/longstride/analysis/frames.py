"""What is kept of coordinates once they were read: side-chain and peptide torsions, chirality, a subset of whole frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mdtraj
import numpy as np

from longstride.analysis.features import Torsions, torsion_angles

if TYPE_CHECKING:
    from collections.abc import Sequence

STRUCTURES = 10_000  # whole frames kept of one set, as many as the literature compares
LITERATURE_ELEMENTS = ("C", "N", "S")
SECOND_CENTRES = {"ILE": ("CA", "CG1", "CG2"), "THR": ("CA", "OG1", "CG2")}  # neighbours of a chiral CB


@dataclass(frozen=True, kw_only=True)
class FrameLayout:
    """Which atoms the features of a frame are made of.

    Attributes:
        chi: side-chain torsions chi1 to chi5 of every residue (mdtraj).
        omega: CA C N CA of residues that both have a CA (mdtraj), as the literature's TICA uses them.
        peptide: X C N Y of every peptide bond, those of caps too; X and Y are CA or the methyl carbon of a cap.
        literature: [atom] all C, N and S atoms.
        alpha: [residue] CA atoms.
        centre_names: one name per chiral centre, such as "CA ALA2".
        centres: [centre, 4] the centre and three of its neighbours.
        handedness: [centre] +1 or -1, the sign of the triple product in the prepared structure; 0 where it is flat.
    """

    chi: Torsions
    omega: Torsions
    peptide: Torsions
    literature: np.ndarray
    alpha: np.ndarray
    centre_names: tuple[str, ...]
    centres: np.ndarray
    handedness: np.ndarray


def _named(residue: mdtraj.core.topology.Residue) -> str:
    return f"{residue.name}{residue.index + 1}"


def _torsions(topology: mdtraj.Topology, tables: Sequence[tuple[str, np.ndarray]]) -> Torsions:
    names = [
        f"{kind} {_named(topology.atom(int(quartet[2 if kind == 'omega' else 1])).residue)}"
        for kind, table in tables
        for quartet in table
    ]
    indices = [np.asarray(table, dtype=int).reshape(-1, 4) for _, table in tables]
    return Torsions(names=tuple(names), indices=np.concatenate(indices) if indices else np.zeros((0, 4), int), pair=None)


def _peptide_quartets(topology: mdtraj.Topology) -> np.ndarray:
    """Return X C N Y of every bond between an atom C and an atom N of two residues, [bond, 4] int."""
    neighbours: dict[int, list[mdtraj.core.topology.Atom]] = {}
    for a, b in topology.bonds:
        neighbours.setdefault(a.index, []).append(b)
        neighbours.setdefault(b.index, []).append(a)
    found = []
    for a, b in topology.bonds:
        if {a.name, b.name} != {"C", "N"} or a.residue.index == b.residue.index:
            continue
        carbon, nitrogen = (a, b) if a.name == "C" else (b, a)
        before = [one for one in neighbours[carbon.index] if one.element.symbol == "C"]
        # the amide nitrogen of proline has two carbons of its own residue: CA is the one of the backbone
        after = [one for one in neighbours[nitrogen.index] if one.element.symbol == "C" and one.index != carbon.index]
        after.sort(key=lambda one: one.name != "CA")
        if before and after:
            found.append((before[0].index, carbon.index, nitrogen.index, after[0].index))
    return np.array(sorted(found), dtype=int).reshape(-1, 4)


def _chiral_centres(topology: mdtraj.Topology) -> tuple[tuple[str, ...], np.ndarray]:
    names, rows = [], []
    for residue in topology.residues:
        atoms = {atom.name: atom.index for atom in residue.atoms}
        wanted = [("CA", ("N", "C", "CB"))]
        if residue.name in SECOND_CENTRES:
            wanted.append(("CB", SECOND_CENTRES[residue.name]))
        for centre, around in wanted:
            if centre in atoms and all(name in atoms for name in around):
                names.append(f"{centre} {_named(residue)}")
                rows.append([atoms[centre], *(atoms[name] for name in around)])
    return tuple(names), np.array(rows, dtype=int).reshape(-1, 4)


def handedness(positions: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the sign of the triple product of three bonds at every centre, [..., centre] int8.

    Equation: sign((a - x) . ((b - x) x (c - x))) for the centre x and its neighbours a, b, c. A mirror image flips it.

    Args:
        positions: [..., atom, 3].
        centres: [centre, 4] atom indices x, a, b, c.
    """
    x = positions[..., centres[:, 0], :]
    a, b, c = (positions[..., centres[:, k], :] - x for k in (1, 2, 3))
    return np.sign((a * np.cross(b, c)).sum(axis=-1)).astype(np.int8)


def find_layout(topology: mdtraj.Topology, structure: np.ndarray) -> FrameLayout:
    """Return which atoms the features of a molecule are made of.

    Args:
        topology: of the molecule.
        structure: [atom, 3] nm, a structure of the right handedness.
    """
    frame = mdtraj.Trajectory(np.zeros((1, topology.n_atoms, 3), dtype=np.float32), topology)
    kinds = ("chi1", "chi2", "chi3", "chi4", "chi5")
    chi = [(kind, getattr(mdtraj, f"compute_{kind}")(frame)[0]) for kind in kinds]
    names, centres = _chiral_centres(topology)
    atoms = list(topology.atoms)
    return FrameLayout(
        chi=_torsions(topology, chi),
        omega=_torsions(topology, [("omega", mdtraj.compute_omega(frame)[0])]),
        peptide=_torsions(topology, [("omega", _peptide_quartets(topology))]),
        literature=np.array([atom.index for atom in atoms if atom.element.symbol in LITERATURE_ELEMENTS], dtype=int),
        alpha=np.array([atom.index for atom in atoms if atom.name == "CA" and atom.element.symbol == "C"], dtype=int),
        centre_names=names,
        centres=centres,
        handedness=handedness(structure, centres),
    )


@dataclass(frozen=True, kw_only=True)
class Frames:
    """What is kept of the coordinates of a set of samples.

    Attributes:
        chi: [time, chain, torsion] rad, float32.
        omega: [time, chain, torsion] rad, float32.
        peptide: [time, chain, torsion] rad, float32.
        inverted: [time, chain, centre] bool, whether a chiral centre has the other handedness.
        times: [frame] time index of the whole frames that are kept.
        chains: [frame] their chain index.
        structures: [frame, atom, 3] nm, float32, in the order of time.
        literature: [time, chain, atom, 3] nm, float32, C, N and S atoms of all frames; None where they are not kept.
    """

    chi: np.ndarray
    omega: np.ndarray
    peptide: np.ndarray
    inverted: np.ndarray
    times: np.ndarray
    chains: np.ndarray
    structures: np.ndarray
    literature: np.ndarray | None = None


def pick_frames(count: int, wanted: int, generator: np.random.Generator) -> np.ndarray:
    """Return sorted indices of at most `wanted` of `count` frames: one drawn from each of as many equal stretches."""
    if count <= wanted:
        return np.arange(count)
    edges = np.arange(wanted + 1) * count // wanted
    return edges[:-1] + (generator.random(wanted) * np.diff(edges)).astype(int)


def frames_of(
    positions: np.ndarray,
    layout: FrameLayout,
    topology: mdtraj.Topology,
    *,
    first: int,
    picked: np.ndarray,
    literature: bool,
) -> Frames:
    """Return what is kept of positions [time, chain, atom, 3] nm, one part of a longer set.

    Args:
        positions: of the part.
        layout: of the molecule.
        topology: of the molecule.
        first: time index of the part's first save.
        picked: sorted flat indices time * chains + chain into the whole set of frames to keep; others are ignored.
        literature: whether to keep C, N and S of all frames.
    """
    times, chains = positions.shape[:2]
    together = Torsions(
        names=(*layout.chi.names, *layout.omega.names, *layout.peptide.names),
        indices=np.concatenate([layout.chi.indices, layout.omega.indices, layout.peptide.indices]),
        pair=None,
    )
    angles = torsion_angles(positions, topology, together).astype(np.float32)
    ends = np.cumsum([len(layout.chi.names), len(layout.omega.names)])
    chi, omega, peptide = np.split(angles, ends, axis=-1)
    own = picked[np.searchsorted(picked, first * chains) : np.searchsorted(picked, (first + times) * chains)]
    time, chain = np.divmod(own, chains)
    return Frames(
        chi=chi,
        omega=omega,
        peptide=peptide,
        inverted=handedness(positions, layout.centres) == -layout.handedness,
        times=time,
        chains=chain,
        structures=positions[time - first, chain].astype(np.float32),
        literature=positions[:, :, layout.literature].astype(np.float32) if literature else None,
    )


def concatenate(parts: Sequence[Frames], *, axis: int) -> Frames:
    """Return several parts as one: one after the other in time (axis 0) or chains side by side (axis 1)."""
    offsets = (
        np.concatenate([[0], np.cumsum([part.chi.shape[1] for part in parts])[:-1]]) if axis else np.zeros(len(parts), int)
    )
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts], axis=axis)
        for name in ("chi", "omega", "peptide", "inverted")
    }
    whole = all(part.literature is not None for part in parts)
    return Frames(
        **joined,
        times=np.concatenate([part.times for part in parts]),
        chains=np.concatenate([part.chains + offset for part, offset in zip(parts, offsets, strict=True)]),
        structures=np.concatenate([part.structures for part in parts]),
        literature=np.concatenate([part.literature for part in parts if part.literature is not None], axis=axis)
        if whole
        else None,
    )


def cut(frames: Frames, length: int) -> Frames:
    """Return the first `length` saves of every chain."""
    kept = frames.times < length
    return replace(
        frames,
        chi=frames.chi[:length],
        omega=frames.omega[:length],
        peptide=frames.peptide[:length],
        inverted=frames.inverted[:length],
        times=frames.times[kept],
        chains=frames.chains[kept],
        structures=frames.structures[kept],
        literature=None if frames.literature is None else frames.literature[:length],
    )
