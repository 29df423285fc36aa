"""AMBER force fields with generalised Born, for thousands of configurations at once.

The parameters come from an OpenMM System (`amber_parameters`), the formulas are in `amber_terms`. Agreement with
OpenMM in float64: 1e-6 relative in energies and 1e-5 in forces (tests/potentials/test_amber.py).

Precision: in float32 thermal configurations of 22-77 atoms are wrong by 1e-4 to 3e-4 kJ/mol rms (about 1e-4 kT at
310 K) and 1e-3 kJ/mol at most, below what Metropolis-Hastings can notice; float64 takes about twice the time.
"""

from __future__ import annotations

import copy
import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longstride.errors import LongstrideError
from longstride.potentials.amber_parameters import AmberParameters, read_parameters
from longstride.potentials.amber_terms import AmberEnergy
from longstride.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    import openmm

    from longstride.state import System

    Arrays = dict[str, Tensor]

# lanes x atoms^2 in one block: temporaries stay in the cache and memory does not grow with the batch. Measured on one
# core: 22 atoms are fastest at 128-512 lanes, 77 atoms at 32-256, compiled or not.
BLOCK_ELEMENTS = 500_000
BLOCK_ELEMENTS_GPU = 200_000_000
SMALLEST_BLOCK, LARGEST_BLOCK, LARGEST_BLOCK_GPU = 16, 512, 65536
_COMPILED: dict[tuple[Any, ...], Callable[..., Any]] = {}  # code by structure, precision and device, for all molecules
VECTOR = 16  # blocks of compiled code are padded to whole vectors, so that a lane's result never depends on its neighbours


def compiler_available() -> bool:
    """Return whether what `compile=True` needs on a CPU can be found: a C++ compiler and Python's headers."""
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return False
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)


class AmberPotential:
    """Batched AMBER-type potential (`longstride.potentials.base.Potential`).

    Energies are differentiable once by autograd. Configurations are evaluated in blocks of at most `block` lanes, so
    memory stays bounded. A configuration with overlapping atoms has energy NaN or inf; nothing is raised.

    Attributes:
        system: the molecule.
        name: label of the target distribution.
        dtype: precision of the evaluation and of what is returned; positions of another type are converted.
        device: where it is evaluated; positions are moved there and the answers back.
        block: most configurations evaluated at once.
    """

    def __init__(
        self,
        parameters: AmberParameters,
        system: System,
        *,
        name: str,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        compile: bool = False,
    ) -> None:
        if parameters.n_atoms != system.n_atoms:
            raise LongstrideError(
                f"the OpenMM System has {parameters.n_atoms} particles but {system.name!r} has {system.n_atoms} atoms"
            )
        self.system, self.name, self.dtype, self.device = system, name, dtype, torch.device(device)
        self.block = _block_size(system.n_atoms, self.device)
        self.compiled = compile
        terms = AmberEnergy(parameters).to(device=self.device, dtype=dtype)
        self._energy: Callable[[Tensor], Tensor] = terms
        self._energy_gradient: Callable[[Tensor], tuple[Tensor, Tensor]] = _eager_gradient(terms)
        if compile:
            if self.device.type == "cpu" and not compiler_available():
                raise LongstrideError(
                    "compile=True needs a C++ compiler and Python's headers: install g++ and python3-dev, or use compile=False"
                )
            self._energy, self._energy_gradient = _compiled(terms, _traceable), _compiled(terms, _traceable_gradient)

    @classmethod
    def from_openmm(
        cls,
        openmm_system: openmm.System,
        system: System,
        *,
        name: str,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        compile: bool = False,
    ) -> AmberPotential:
        """Read all parameters from the forces of an OpenMM System.

        Args:
            openmm_system: bonds, angles, torsions, CMAP, NonbondedForce (no cutoff, or non-periodic with reaction
                field) and the generalised Born of OpenMM's implicit/*.xml; CMMotionRemover is ignored.
            system: the molecule these parameters belong to.
            name: label of the target distribution.
            dtype: torch.float64, or torch.float32 for speed.
            device: "cpu", "cuda", ...
            compile: use torch.compile. The first call of each kind takes 10-40 s, later ones are 5-15 times faster. All
                molecules with the same kinds of terms share the compiled code, which torch also keeps on disk.

        Raises:
            LongstrideError: a force or expression that is not supported, by name; no C++ compiler for compile=True.
        """
        return cls(read_parameters(openmm_system), system, name=name, dtype=dtype, device=device, compile=compile)

    def energy(self, x: State) -> Tensor:
        """Return U(x), [batch] kJ/mol; gradients flow to x.positions where it requires them."""
        positions = self._checked(x)
        if torch.is_grad_enabled() and positions.requires_grad:
            return _Differentiable.apply(positions, self)
        return self._evaluate(positions, gradient=False)[0]

    def energy_forces(self, x: State) -> tuple[Tensor, Tensor]:
        """Return U(x), [batch] kJ/mol, and F = -dU/dx, [batch, atom, 3] kJ/mol/nm, both without gradient."""
        energy, gradient = self._evaluate(self._checked(x).detach(), gradient=True)
        return energy, -gradient

    def _checked(self, x: State) -> Tensor:
        if x.box is not None:
            raise LongstrideError(f"{self.name} handles isolated molecules; give it states without a box")
        if x.positions.dim() != 3 or x.positions.shape[1:] != (self.system.n_atoms, 3):
            raise LongstrideError(
                f"positions have shape {tuple(x.positions.shape)}, expected [batch, {self.system.n_atoms}, 3] for"
                f" {self.system.name!r}"
            )
        return x.positions

    def _evaluate(self, positions: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
        """Evaluate in blocks. Without gradient the second value is empty."""
        count = len(positions)
        # outside inference mode: one compiled version serves callers with and without it
        with torch.inference_mode(mode=False), torch.no_grad():
            energies = torch.empty(count, dtype=self.dtype, device=self.device)
            gradients = torch.empty(positions.shape if gradient else (0,), dtype=self.dtype, device=self.device)
            for start in range(0, count, self.block):
                part = positions[start : start + self.block]
                block = self._transposed(part)
                if gradient:
                    value, slope = self._energy_gradient(block)
                    gradients[start : start + len(part)] = slope[..., : len(part)].permute(2, 1, 0)
                else:
                    value = self._energy(block)
                energies[start : start + len(part)] = value[: len(part)]
        return energies.to(positions.device), gradients.to(positions.device)

    def _transposed(self, part: Tensor) -> Tensor:
        """Return [3, atom, lane] in the potential's type; spare lanes repeat the first configuration."""
        if part.dtype.itemsize > self.dtype.itemsize:
            # differences survive the conversion best near the origin; the energy does not depend on the shift
            part = part - part[:, :1]
        lanes = -(-len(part) // VECTOR) * VECTOR if self.compiled else len(part)
        block = torch.empty(3, part.shape[1], lanes, dtype=self.dtype, device=self.device)
        block[..., : len(part)] = part.permute(2, 1, 0)
        if lanes > len(part):
            block[..., len(part) :] = block[..., :1]
        return block


def _block_size(n_atoms: int, device: torch.device) -> int:
    elements, largest = (BLOCK_ELEMENTS, LARGEST_BLOCK) if device.type == "cpu" else (BLOCK_ELEMENTS_GPU, LARGEST_BLOCK_GPU)
    lanes = max(elements // n_atoms**2, SMALLEST_BLOCK)
    return min(largest, 1 << (lanes.bit_length() - 1))


def _eager_gradient(terms: AmberEnergy) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return x -> (E [batch], dE/dx [3, atom, batch]); lanes are independent, so one backward pass serves all."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            energy = terms(x.requires_grad_())
            (gradient,) = torch.autograd.grad(energy.sum(), x)
        return energy.detach(), gradient

    return evaluate


def _traceable(terms: AmberEnergy) -> Callable[[Arrays, Tensor], Tensor]:
    """Return (arrays, x) -> E [batch] for the arrays of any molecule with the structure of `terms`."""

    def evaluate(arrays: Arrays, x: Tensor) -> Tensor:
        return torch.func.functional_call(terms, arrays, (x,))

    return evaluate


def _traceable_gradient(terms: AmberEnergy) -> Callable[[Arrays, Tensor], tuple[Tensor, Tensor]]:
    """Return (arrays, x) -> (E, dE/dx) in the functional form that the compiler can trace as one graph.

    Compiled so, forward and backward are fused: ten times faster than compiling the energy and calling autograd.
    """

    def evaluate(arrays: Arrays, x: Tensor) -> tuple[Tensor, Tensor]:
        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            energy = torch.func.functional_call(terms, arrays, (x,))
            return energy.sum(), energy

        gradient, (_, energy) = torch.func.grad_and_value(total, has_aux=True)(x)
        return energy, gradient

    return evaluate


def _compiled(terms: AmberEnergy, traceable: Callable[[AmberEnergy], Callable[..., Any]]) -> Callable[[Tensor], Any]:
    """Return x -> the function's value for these terms; a toolchain that fails is a LongstrideError."""
    arrays = dict(terms.named_buffers())
    kind = next(iter(arrays.values()))
    key = (traceable.__name__, terms.structure(), kind.device, tuple(value.dtype for value in arrays.values()))
    if key not in _COMPILED:
        # sizes of arrays and batches stay symbols, so that the code serves other molecules; other structures must not count
        # against this one's limit of versions
        options: dict[str, Any] = {"fullgraph": True, "dynamic": True, "isolate_recompiles": True}
        # without arrays of its own: sizes of a module's arrays would be taken for constants
        _COMPILED[key] = torch.compile(traceable(copy.deepcopy(terms).to("meta")), **options)
    function = _COMPILED[key]

    def call(x: Tensor) -> Any:  # noqa: ANN401 - as the function's
        try:
            # two sizes that happen to be equal here are not for the next molecule
            with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                return function(arrays, x)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise LongstrideError(f"torch.compile failed ({reason}); mend the C++ toolchain or use compile=False") from error

    return call


class _Differentiable(torch.autograd.Function):
    """The energy with its analytic gradient, so that autograd keeps one force array instead of every intermediate."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, potential: AmberPotential) -> Tensor:  # noqa: ANN401 - autograd's own type
        energy, gradient = potential._evaluate(positions.detach(), gradient=True)
        ctx.save_for_backward(gradient)
        ctx.like = (positions.dtype, positions.device)
        return energy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_energy: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - autograd's own type
        (gradient,) = ctx.saved_tensors
        dtype, device = ctx.like
        return (grad_energy[:, None, None] * gradient).to(dtype=dtype, device=device), None
