"""FeNNol models (.fnx: ANI-1x, ANI-1ccx, FENNIX-Bio1, ...) as a `Potential`: one model or an ensemble, isolated or in a box.

All replicas of a batch are one call of one compiled function. The list of neighbours is made anew in every call, by
vesin on the host: that costs less than keeping a longer list and shortening it on the device, and an answer depends on
the positions alone, not on what was evaluated before. Lists that depend on it (angles, shorter ranges) are made inside
the compiled function in arrays of fixed size; a call that does not fit is repeated with larger ones.

Source of the library: FeNNol, doi:10.1063/5.0217688.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from longstride.errors import DataError, LongstrideError, NumericsError
from longstride.potentials.external import ExternalPotential, check_elements, check_neutral, missing_package
from longstride.potentials.periodic import neighbour_pairs
from longstride.potentials.weights import weight_files, weights_digest
from longstride.units import ANGSTROM_NM, HARTREE_KJ_PER_MOL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from longstride.state import System

FETCH = (
    "FeNNol models (.fnx) are in the repository FeNNol-tools/FeNNol-PMC; put the file anywhere and name its path in"
    " distill.teacher_weights"
)
MARGIN = 1.2  # room in the arrays of fixed size beyond the first configuration
MAX_GROWTH = 8  # repeats of a call whose lists do not fit


class FennolPotential(ExternalPotential):
    """Energy and forces of a FeNNol model, U(x) = mean over members of sum over atoms of E_i(x).

    Members of one architecture are evaluated together (`jax.vmap` over their weights), so that what has no weights, such
    as the symmetry functions of ANI, is computed once. Terms are added up in float64: total energies of many atoms have
    more digits than float32 keeps. Energies and forces are NaN where positions are not finite.

    Args:
        system: the molecule, or all molecules of a box.
        weights: one .fnx file, or several for an ensemble.
        charge: total charge in elementary charges.
        dtype: of the evaluation; float64 for tests of energy conservation.
        threads: threads of the compiled function; the first potential of a process decides.
        name: label of the target distribution; by default made from file name, number and content of the weights.

    Raises:
        DataError: a file is missing, damaged, or pickled.
        LongstrideError: the package is missing, an element is unknown to the model, or the model has no input for a net
            charge.
    """

    def __init__(
        self,
        system: System,
        *,
        weights: Sequence[Path | str],
        charge: int = 0,
        dtype: Literal["float32", "float64"] = "float32",
        threads: int = 1,
        name: str | None = None,
    ) -> None:
        files = weight_files(weights, kind="fennol", suffixes=(".fnx",), fetch=FETCH)
        # XLA sizes its pool of threads when it starts
        os.environ.setdefault("PJRT_NPROC", str(threads))
        super().__init__(system, name=name or fennol_label(files))
        self.charge, self.dtype = charge, dtype
        with _precision(dtype):
            models = [_load(path) for path in files]
            _check_elements(system, models, files)
            self._groups = [_Group(system, members, charge=charge, dtype=dtype) for members in _alike(models)]
            self._weights = [len(group.members) / len(models) for group in self._groups]
            if charge:
                self._check_charge()

    @property
    def cutoff_nm(self) -> float:
        """The longest range of a list of neighbours, nm."""
        return max(group.cutoff for group in self._groups) * ANGSTROM_NM

    def _call(self, positions: np.ndarray, boxes: np.ndarray | None, *, forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        if not self._groups:
            raise NumericsError("this FeNNol potential was closed; make a new one")
        with _precision(self.dtype):
            answers = [group.evaluate(positions, boxes, forces=forces) for group in self._groups]
        energy = sum(weight * answer[0] for weight, answer in zip(self._weights, answers, strict=True))
        if not forces:
            return np.asarray(energy), None
        return np.asarray(energy), np.asarray(sum(w * answer[1] for w, answer in zip(self._weights, answers, strict=True)))

    def _check_charge(self) -> None:
        """A net charge is refused where no energy depends on it."""
        side = math.ceil(self.system.n_atoms ** (1 / 3))
        sites = np.stack(np.unravel_index(np.arange(self.system.n_atoms), (side,) * 3), axis=1)
        trial = 1.3 * sites + np.random.default_rng(0).normal(scale=0.1, size=sites.shape)
        for group in self._groups:
            charged, neutral = (group.evaluate(trial[None], None, forces=False, charge=q)[0] for q in (self.charge, 0))
            if charged[0] == neutral[0]:
                check_neutral(self.system, self.charge, teacher=self.name)

    def close(self) -> None:
        """Release the compiled functions."""
        self._groups = []


def fennol_label(weights: Sequence[Path | str]) -> str:
    """Return the name of the target distribution, such as "fennol-ani1x_model0-x8-1a2b3c4d".

    Raises:
        DataError: a file cannot be read.
    """
    stem, count = Path(weights[0]).stem, f"-x{len(weights)}" if len(weights) > 1 else ""
    return f"fennol-{stem}{count}-{weights_digest(weights)}"


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What one compiled function is made for; the layers' states are FeNNol's own, and hashable."""

    replicas: int
    periodic: bool
    edges: tuple[int, ...]
    layers: Any


class _Group:
    """Members of one architecture, evaluated together."""

    def __init__(self, system: System, members: list[Any], *, charge: int, dtype: str) -> None:
        import jax
        import jax.numpy as jnp
        from fennol.models.preprocessing import GraphGenerator

        self.members, self.charge, self.dtype = members, charge, np.dtype(dtype)
        self._model = members[0]
        self._numbers = np.asarray(system.atomic_numbers, dtype=np.int32)
        self._layers = self._model.preprocessing.layers
        self._generators = [layer for layer in self._layers if isinstance(layer, GraphGenerator)]
        self.cutoff = max((layer.cutoff for layer in self._generators), default=0.0)
        trees = [member.variables for member in members]
        self._variables = jax.tree_util.tree_map(
            lambda *leaves: jnp.asarray(np.stack(leaves), dtype=_as(leaves[0], dtype)), *trees
        )
        self._unit = HARTREE_KJ_PER_MOL / float(self._model.Ha_to_model_energy)
        self._sizes: dict[tuple[int, bool], _Sizes] = {}
        self._compiled: dict[tuple[_Sizes, bool], Callable[..., Any]] = {}

    def evaluate(
        self, positions: np.ndarray, boxes: np.ndarray | None, *, forces: bool, charge: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return energies [batch] kJ/mol and forces [batch, atom, 3] kJ/mol/nm at positions and boxes in Å."""
        if boxes is not None and any(layer.k_space for layer in self._layers if hasattr(layer, "k_space")):
            raise LongstrideError("this FeNNol model sums in reciprocal space, which is not supported in a box")
        lists = [neighbour_pairs(positions, boxes, layer.cutoff) for layer in self._generators]
        where = (len(positions), boxes is not None)
        if where not in self._sizes:
            self._sizes[where] = self._fitted(positions, boxes, lists, None)
        for _ in range(MAX_GROWTH):
            sizes = self._sizes[where]
            if all(len(edges[0]) <= room for edges, room in zip(lists, sizes.edges, strict=True)):
                inputs = self._inputs(positions, boxes, lists, sizes.edges, self.charge if charge is None else charge)
                function = self._function(sizes, forces=forces)
                terms, slope, overflow = function(self._variables, inputs)
                if not bool(overflow):
                    energy = self._unit * sum(np.asarray(term, np.float64).reshape(len(positions), -1).sum(1) for term in terms)
                    force = np.asarray(slope, np.float64) * (-self._unit / ANGSTROM_NM) if forces else np.zeros(())
                    return np.asarray(energy), force.reshape(positions.shape) if forces else force
            self._sizes[where] = self._fitted(positions, boxes, lists, sizes)
        raise NumericsError("the lists of neighbours of a configuration fit no array; are atoms on top of each other?")

    def _fitted(self, positions: np.ndarray, boxes: np.ndarray | None, lists: list[Any], old: _Sizes | None) -> _Sizes:
        """Return sizes into which this configuration fits, with room to spare, and not below the old ones."""
        from flax.core.frozen_dict import FrozenDict

        edges = tuple(_room(len(found[0])) for found in lists)
        if old is not None:
            edges = tuple(max(pair) for pair in zip(edges, old.edges, strict=True))
        inputs = self._inputs(positions, boxes, lists, edges, self.charge)
        states = []
        for index, layer in enumerate(self._layers):
            state = layer.init() if old is None else old.layers[index]
            state = FrozenDict({**state, "nblist_mult_size": MARGIN}) if "nblist_mult_size" in state else state
            # a first size has a margin as well: else the second step would not fit
            state, inputs = layer(state, inputs, add_margin=layer not in self._generators and not _indexes_atoms(layer))
            if "max_neigh" in state:
                # FeNNol lays a list of edges out as [atom, neighbour] and wants at least as many places as edges
                filled = len(inputs[layer.graph_key]["edge_src"]) / positions[..., 0].size
                state = FrozenDict({**state, "max_neigh": max(state["max_neigh"], math.ceil(filled))})
            states.append(state)
        return _Sizes(replicas=len(positions), periodic=boxes is not None, edges=edges, layers=tuple(states))

    def _inputs(
        self, positions: np.ndarray, boxes: np.ndarray | None, lists: list[Any], edges: tuple[int, ...], charge: int
    ) -> dict[str, Any]:
        count, n_atoms = positions.shape[:2]
        inputs: dict[str, Any] = {
            "species": np.tile(self._numbers, count),
            "coordinates": positions.reshape(-1, 3).astype(self.dtype),
            "natoms": np.full(count, n_atoms, dtype=np.int32),
            "batch_index": np.repeat(np.arange(count, dtype=np.int32), n_atoms),
            "total_charge": np.full(count, charge, dtype=np.int32),
        }
        if boxes is not None:
            inputs["cells"] = boxes.astype(self.dtype)
            inputs["reciprocal_cells"] = np.linalg.inv(boxes).astype(self.dtype)
        for layer, found, room in zip(self._generators, lists, edges, strict=True):
            inputs[layer.graph_key] = _padded(
                found, room, n_atoms=count * n_atoms, cutoff=layer.cutoff, dtype=self.dtype, periodic=boxes is not None
            )
        return inputs

    def _function(self, sizes: _Sizes, *, forces: bool) -> Callable[..., Any]:
        """Compile terms [atom] or [replica] of the mean, dU/dx, and whether a list did not fit."""
        if (sizes, forces) in self._compiled:
            return self._compiled[sizes, forces]
        import jax

        model = self._model
        names = [model.energy_terms] if isinstance(model.energy_terms, str) else list(model.energy_terms)

        def mean_terms(coordinates: Any, variables: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:  # noqa: ANN401
            def one(weights: Any) -> list[Any]:  # noqa: ANN401
                out = model.modules.apply(weights, {**inputs, "coordinates": coordinates})
                return [out[name].reshape(-1) for name in names]

            terms = [term.mean(axis=0) for term in jax.vmap(one)(variables)]
            return sum(term.sum() for term in terms), terms

        def function(variables: Any, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:  # noqa: ANN401
            for layer, state in zip(self._layers, sizes.layers, strict=True):
                inputs = layer.process(state, inputs)
            overflow = _overflow(inputs)
            if not forces:
                return mean_terms(inputs["coordinates"], variables, inputs)[1], None, overflow
            slope, terms = jax.grad(mean_terms, has_aux=True)(inputs["coordinates"], variables, inputs)
            return terms, slope, overflow

        self._compiled[sizes, forces] = jax.jit(function)
        return self._compiled[sizes, forces]


def _load(path: Path) -> Any:  # noqa: ANN401
    try:
        from fennol import FENNIX
    except ImportError as error:
        raise missing_package("fennol") from error
    try:
        return FENNIX.load(path)
    except Exception as error:  # flax, msgpack and FeNNol each raise their own
        raise DataError(f"{path} is not a FeNNol model that can be loaded ({' '.join(str(error).split())[:200]})") from error


def _alike(models: list[Any]) -> list[list[Any]]:
    """Group members whose weights can be stacked."""
    import jax

    groups: dict[str, list[Any]] = {}
    for model in models:
        shapes = jax.tree_util.tree_map(np.shape, model.variables)
        groups.setdefault(repr((model._input_args, model.energy_terms, shapes)), []).append(model)
    return list(groups.values())


def known_elements(model: Any) -> set[str] | None:  # noqa: ANN401
    """Return the symbols that every module of a FeNNol model knows, or None where no module names any."""
    known: set[str] | None = None
    for parameters in model._input_args["modules"].values():
        for key in ("species_order", "hidden_neurons", "neurons", "value"):
            given = parameters.get(key)
            names = given.split(",") if isinstance(given, str) and key == "species_order" else given
            if isinstance(names, str) or not hasattr(names, "__iter__"):
                continue
            symbols = {item.strip() for item in names if isinstance(item, str)}
            if symbols:
                known = symbols if known is None else known & symbols
    return known


def _check_elements(system: System, models: list[Any], files: Sequence[Path]) -> None:
    from ase.data import atomic_numbers

    for model, path in zip(models, files, strict=True):
        if not model.energy_terms:
            raise DataError(f"{path} is a FeNNol model without energy terms, so it cannot be a teacher")
        known = known_elements(model)
        if known is not None:
            check_elements(system, [atomic_numbers[symbol] for symbol in known], teacher=path.name)


def _padded(
    found: tuple[np.ndarray, ...],
    room: int,
    *,
    n_atoms: int,
    cutoff: float,
    dtype: np.dtype,
    periodic: bool,
) -> dict[str, Any]:
    i, j, shift, square = found
    empty = room - len(i)
    graph: dict[str, Any] = {
        "edge_src": np.concatenate([i, np.full(empty, n_atoms, dtype=np.int32)]),
        "edge_dst": np.concatenate([j, np.full(empty, n_atoms, dtype=np.int32)]),
        "d12": np.concatenate([square, np.full(empty, cutoff**2)]).astype(dtype),
    }
    if periodic:
        graph["pbc_shifts"] = np.concatenate([shift, np.zeros((empty, 3), dtype=np.int32)])
    return {**graph, "keep_graph": True}


def _room(count: int) -> int:
    """Return a size with a margin, from a coarse grid, so that few sizes are ever compiled."""
    return 32 * math.ceil(1.1 ** math.ceil(math.log(MARGIN * max(count, 1), 1.1)) / 32)


def _indexes_atoms(layer: Any) -> bool:  # noqa: ANN401
    """Whether a layer sorts atoms by species: their numbers never change."""
    return hasattr(layer, "add_atoms_margin")


def _overflow(data: dict[str, Any]) -> Any:  # noqa: ANN401
    """Return whether any list inside did not fit."""
    found: Any = False
    for key, value in data.items():
        if isinstance(value, dict):
            found = found | _overflow(value)
        elif key.endswith("overflow"):
            found = found | value
    return found


def _as(leaf: Any, dtype: str) -> Any:  # noqa: ANN401
    """Return the precision of a weight: floating-point ones follow the evaluation, others stay."""
    return dtype if np.issubdtype(np.asarray(leaf).dtype, np.floating) else np.asarray(leaf).dtype


@functools.cache
def _import_jax() -> Any:  # noqa: ANN401
    try:
        import jax
    except ImportError as error:
        raise missing_package("fennol") from error
    return jax


def _precision(dtype: str) -> Any:  # noqa: ANN401
    """Return a context in which JAX computes in `dtype`."""
    return _import_jax().enable_x64(dtype == "float64")
