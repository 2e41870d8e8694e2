r"""Enhanced sampling of molecules with OpenMM.

Umbrella windows hold dihedrals theta_d near centres c by the bias

    b(x) = sum_d stiffness_d (1 - cos(theta_d(x) - c_d)),

in kJ/mol: periodic, and harmonic with its stiffness near the centre. Replica exchange runs a ladder
of temperatures whose neighbours exchange frames, as `enhanced` says; velocities are scaled to the
new temperature, and only potential energies enter (Sugita and Okamoto, Chem. Phys. Lett. 314, 141,
1999). Either gives `BiasedSamples` at the temperature of the molecule, for `mbar`.
"""

import copy
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bopito_inverse.arguments import as_count, as_generator
from bopito_inverse.datasets import Array
from bopito_inverse.simulate.biased import BiasedSamples, dihedral_angles
from bopito_inverse.simulate.enhanced import as_ladder, exchanged, frames_to_simulate
from bopito_inverse.simulate.parts import in_parts, settings_of
from bopito_inverse.systems.molecules import GAS_CONSTANT, Molecule

PULL_STIFFNESS = 500.0  # kJ/mol/rad^2, or that of the window if higher
PULL_STEPS = 10  # integrator steps between moves of the centre that pulls
REACHED = 0.5  # rad from the centre of the window at the end of the pull
CPU = torch.device("cpu")


def umbrella_dihedrals(
    molecule: Molecule,
    dihedrals: str | Sequence[str] | Array,
    centers: Array,
    stiffness: float | Array,
    n_frames: int,
    seed: int = 0,
    n_walkers: int = 10,
    burn_in: int = 40,
    stride: int = 1,
    starts: Array | None = None,
    folder: str | os.PathLike | None = None,
    executor: Executor | int | None = None,
    platform: str = "Reference",
    progress: bool = False,
) -> BiasedSamples:
    """Sample umbrella windows along dihedrals, window after window or spread over processes.

    In the first half of its burn-in each walker is pulled from its start to the centre of its
    window, the short way round, by a stiff bias whose centre moves. Whatever else is slow in a
    window must relax within `burn_in`; walkers with different `starts` show whether it does.

    Args:
        molecule: what moves.
        dihedrals: `"phi"` or `"psi"` (`"phi2"` for the second of the chain), a list of these, or
            indices of four atoms each, `(n_dihedrals, 4)`.
        centers: rad, `(n_windows, n_dihedrals)`, or `(n_windows,)` of one dihedral.
        stiffness: kJ/mol/rad^2, one number, or of the shape of the centres. A dihedral with
            stiffness 0 is free, and a window where all are free is plain MD.
        n_frames: frames kept in each window, a multiple of `n_walkers`.
        seed: a non-negative integer.
        n_walkers: independent walkers in each window, `n_frames / n_walkers` frames each.
        burn_in: frames of each walker left out at the start.
        stride: frames simulated for each one kept.
        starts: where the walkers begin in every window, `(n_walkers, n_atoms, 3)`, nm; by default
            the structure of the molecule. Starts are minimised.
        folder: complete windows are kept there, and a call with the same settings does the rest.
        executor: None for this process, a number of processes, or an executor (see `fan_out`).
        platform: of OpenMM.
        progress: show a progress bar.

    Raises:
        ValueError: arguments of another shape, dihedrals that the molecule does not have, or a
            folder of other settings.
        RuntimeError: names the window whose centre a walker did not reach, or that blew up.
    """
    plan = _Plan.of(molecule, n_frames, seed, n_walkers, burn_in, stride, starts, platform)
    atoms = _dihedral_atoms(molecule, dihedrals)
    c, k = _as_windows(centers, stiffness, len(atoms))
    own = {"dihedrals": atoms, "centers": c, "stiffness": k}
    settings = plan.settings() | {name: value.tolist() for name, value in own.items()}
    shared = own | {"plan": plan}
    windows = in_parts(_window, shared, len(c), "window", settings, folder, executor, progress)
    frames = torch.from_numpy(np.stack([window["frames"] for window in windows]))
    return BiasedSamples.torsional(frames, atoms, c, k, molecule.kT, n_walkers, molecule.name)


def replica_exchange(
    molecule: Molecule,
    temperatures: Sequence[float] | np.ndarray,
    n_frames: int,
    seed: int = 0,
    n_walkers: int = 4,
    burn_in: int = 50,
    stride: int = 1,
    starts: Array | None = None,
    folder: str | os.PathLike | None = None,
    executor: Executor | int | None = None,
    platform: str = "Reference",
    progress: bool = False,
) -> BiasedSamples:
    """Sample a ladder of temperatures by replica exchange, walker after walker or in parallel.

    Walker w of a temperature exchanges with walker w of the next one after every simulated frame,
    so that the walkers of one number form a ladder that is independent of the others. The biases
    know a frame by its energy alone: wells of like energy between which walkers rarely move do not
    show in the `ess` of `mbar`. Compare ladders, or other `starts`.

    Args:
        molecule: what moves. Its temperature need not be in the ladder, but the frames weigh
            little where all of them are hotter.
        temperatures: K, increasing, `(n_windows,)`. Neighbours must overlap (`mbar` says so).
        n_frames: frames kept at each temperature, a multiple of `n_walkers`.
        n_walkers: independent ladders, `n_frames / n_walkers` frames of each temperature.
        folder: complete ladders are kept there, and a call with the same settings does the rest.
        seed, burn_in, stride, starts, executor, platform, progress: as in `umbrella_dihedrals`.

    Raises:
        ValueError: temperatures that are not positive or do not increase, starts of another shape,
            or a folder of other settings.
        RuntimeError: names the ladder that blew up.
    """
    plan = _Plan.of(molecule, n_frames, seed, n_walkers, burn_in, stride, starts, platform)
    ladder = as_ladder("temperatures", temperatures)
    settings = plan.settings() | {"temperatures": ladder.tolist()}
    shared = {"plan": plan, "temperatures": ladder}
    made = in_parts(_ladder, shared, n_walkers, "ladder", settings, folder, executor, progress)
    frames, energies = (
        torch.from_numpy(np.concatenate([part[name] for part in made], axis=1))
        for name in ("frames", "energies")
    )
    above = energies.flatten() - energies.min()
    heat = GAS_CONSTANT * ladder
    return BiasedSamples.thermal(frames, heat, above, molecule.kT, n_walkers, molecule.name)


@dataclass(frozen=True)
class _Plan:
    """What all windows or ladders of a call share."""

    molecule: Molecule
    n_frames: int
    seed: int
    n_walkers: int
    burn_in: int
    stride: int
    n_simulated: int  # frames of each walker, burn-in included
    platform: str
    starts: Tensor

    @classmethod
    def of(
        cls,
        molecule: Molecule,
        n_frames: int,
        seed: int,
        n_walkers: int,
        burn_in: int,
        stride: int,
        starts: Array | None,
        platform: str,
    ) -> "_Plan":
        """All arguments checked."""
        n_simulated = frames_to_simulate(n_frames, n_walkers, burn_in, stride)
        first = molecule.positions.repeat(n_walkers, 1, 1) if starts is None else starts
        x = molecule.as_frames("starts", first)
        if len(x) != n_walkers:
            raise ValueError(
                f"starts must hold one frame for each of {n_walkers} walkers, got {len(x)}"
            )
        counts = (int(n_frames), as_count("seed", seed, 0), int(n_walkers), int(burn_in))
        return cls(molecule, *counts, int(stride), n_simulated, platform, x)

    def settings(self) -> dict[str, Any]:
        """What the frames depend on, as values of JSON."""
        names = ("n_frames", "seed", "n_walkers", "burn_in", "stride", "platform")
        starts = hashlib.sha256(self.starts.numpy().tobytes()).hexdigest()
        own = {name: getattr(self, name) for name in names}
        return settings_of(self.molecule) | own | {"starts": starts}


def _window(shared: Mapping[str, Any], number: int) -> dict[str, np.ndarray]:
    """The frames of all walkers of one window, one walker after the other."""
    plan, dihedrals = shared["plan"], shared["dihedrals"]
    c, k = shared["centers"][number], shared["stiffness"][number]
    generator = as_generator(plan.seed, CPU, "umbrella", number)
    system = _with_biases(plan.molecule.system, dihedrals)
    context = plan.molecule.context(plan.platform, _draw(generator), system=system)
    steps = plan.molecule.steps_per_frame
    n_pull = plan.burn_in * steps // 2
    frames = []
    for start in plan.starts:
        _begin(context, start, plan.molecule.temperature, generator)
        _pull(context, dihedrals, c, k, n_pull)
        _set_biases(context, c, k)
        context.getIntegrator().step(plan.burn_in * steps - n_pull)
        for _ in range(plan.n_frames // plan.n_walkers):
            context.getIntegrator().step(plan.stride * steps)
            frames.append(_positions(context).float().numpy())
    return {"frames": _finite(np.stack(frames))}


def _ladder(shared: Mapping[str, Any], number: int) -> dict[str, np.ndarray]:
    """The frames and potential energies of one ladder, (n_windows, n_frames, ...)."""
    plan, ladder = shared["plan"], shared["temperatures"]
    generator = as_generator(plan.seed, CPU, "replica exchange", number)
    contexts = []
    for temperature in ladder.tolist():
        context = plan.molecule.context(plan.platform, _draw(generator), temperature)
        _begin(context, plan.starts[number], temperature, generator)
        contexts.append(context)
    frames, energies = [], []
    for i in range(plan.n_simulated):
        for context in contexts:
            context.getIntegrator().step(plan.molecule.steps_per_frame)
        u = _exchange(contexts, ladder, i % 2, generator)
        if i >= plan.burn_in and (i + 1 - plan.burn_in) % plan.stride == 0:
            frames.append(np.stack([_positions(context).float().numpy() for context in contexts]))
            energies.append(u.numpy())
    return {"frames": _finite(np.stack(frames, 1)), "energies": np.stack(energies, 1)}


def _exchange(
    contexts: list[Any], temperatures: Tensor, first: int, generator: torch.Generator
) -> Tensor:
    """Exchange frames between neighbouring temperatures; potential energies after it."""
    states = [
        context.getState(getPositions=True, getVelocities=True, getEnergy=True)
        for context in contexts
    ]
    u = torch.tensor([state.getPotentialEnergy()._value for state in states], dtype=torch.float64)
    order = exchanged(u[:, None], GAS_CONSTANT * temperatures, first, generator)[:, 0]
    for k, origin in enumerate(order.tolist()):
        if origin != k:
            scale = math.sqrt(temperatures[k] / temperatures[origin])
            contexts[k].setPositions(states[origin].getPositions(asNumpy=True))
            contexts[k].setVelocities(states[origin].getVelocities(asNumpy=True) * scale)
    return u[order]


def _begin(context: Any, start: Tensor, temperature: float, generator: torch.Generator) -> None:
    """Put a walker at a minimised start, without bias, with velocities at temperature."""
    import openmm

    for name in context.getParameters():
        if name.startswith("stiffness"):
            context.setParameter(name, 0.0)
    context.setPositions(start.double().numpy())
    openmm.LocalEnergyMinimizer.minimize(context, maxIterations=200)
    context.setVelocitiesToTemperature(temperature, 1 + _draw(generator))


def _pull(context: Any, dihedrals: Tensor, c: Tensor, k: Tensor, n_steps: int) -> None:
    """Move biased dihedrals to the centres c within `n_steps`, or say that they did not follow."""
    stiff = torch.where(k > 0, k.clamp(min=PULL_STIFFNESS), 0)
    start = _angles(context, dihedrals)
    way = _wrapped(c - start)
    for done in range(0, n_steps, PULL_STEPS):
        part = min(1.0, 1.25 * done / n_steps)  # the last fifth holds
        _set_biases(context, start + part * way, stiff)
        context.getIntegrator().step(min(PULL_STEPS, n_steps - done))
    off = _wrapped(_angles(context, dihedrals) - c).abs()
    if bool(((off > REACHED) & (k > 0)).any()):
        raise RuntimeError(
            f"a walker did not reach the centre {c.tolist()} rad, it is off by {off.tolist()}; "
            "lengthen burn_in, or give starts near this centre"
        )


def _with_biases(system: Any, dihedrals: Tensor) -> Any:
    """A copy of an OpenMM system with one bias for each dihedral, switched off."""
    import openmm

    biased = copy.deepcopy(system)
    for d, atoms in enumerate(dihedrals.tolist()):
        force = openmm.CustomTorsionForce(f"stiffness{d} * (1 - cos(theta - center{d}))")
        force.addGlobalParameter(f"stiffness{d}", 0.0)
        force.addGlobalParameter(f"center{d}", 0.0)
        force.addTorsion(*atoms, [])
        biased.addForce(force)
    return biased


def _set_biases(context: Any, c: Tensor, k: Tensor) -> None:
    for d, (center, stiffness) in enumerate(zip(c.tolist(), k.tolist(), strict=True)):
        context.setParameter(f"center{d}", center)
        context.setParameter(f"stiffness{d}", stiffness)


def _positions(context: Any) -> Tensor:
    """(n_atoms, 3), nm."""
    return torch.from_numpy(context.getState(getPositions=True).getPositions(asNumpy=True)._value)


def _angles(context: Any, dihedrals: Tensor) -> Tensor:
    return dihedral_angles(_positions(context)[None], dihedrals)[0]


def _wrapped(angle: Tensor) -> Tensor:
    """Into [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def _draw(generator: torch.Generator) -> int:
    """A seed for OpenMM."""
    return int(torch.randint(2**31 - 2, (), generator=generator))


def _finite(frames: np.ndarray) -> np.ndarray:
    if not np.isfinite(frames).all():
        raise RuntimeError("positions became infinite or NaN; take a shorter time_step")
    return frames


def _dihedral_atoms(molecule: Molecule, dihedrals: str | Sequence[str] | Array) -> Tensor:
    """Indices of four atoms each, (n_dihedrals, 4)."""
    named = [dihedrals] if isinstance(dihedrals, str) else dihedrals
    if len(named) > 0 and all(isinstance(name, str) for name in named):
        atoms = torch.tensor([_named(molecule, str(name)) for name in named])
    else:
        atoms = torch.as_tensor(dihedrals)
    dihedral_angles(molecule.positions[None], atoms)  # refuses what are no dihedrals
    return atoms.long()


def _named(molecule: Molecule, name: str) -> list[int]:
    import mdtraj

    parts = re.fullmatch(r"(phi|psi)(\d*)", name)
    if parts is None:
        raise ValueError(f"dihedrals must be 'phi', 'psi' or indices of atoms, got {name!r}")
    kind, number = parts.groups()
    known = {"phi": mdtraj.compute_phi, "psi": mdtraj.compute_psi}
    structure = mdtraj.Trajectory(molecule.positions.numpy(), molecule.topology)
    found = known[kind](structure)[0].tolist()
    if not (1 <= int(number) <= len(found) if number else len(found) == 1):
        raise ValueError(
            f"dihedrals: {name!r} must be the name of one dihedral of the molecule, it has "
            f"{len(found)}, at atoms {found}; say {kind}1 for the first of them, or give indices"
        )
    return found[int(number or 1) - 1]


def _as_windows(
    centers: Array, stiffness: float | Array, n_dihedrals: int
) -> tuple[Tensor, Tensor]:
    """Centres and stiffnesses `(n_windows, n_dihedrals)`, checked."""
    c = torch.as_tensor(centers, dtype=torch.float64)
    k = torch.as_tensor(stiffness, dtype=torch.float64)
    if c.ndim == 1 and n_dihedrals == 1:
        c, k = c[:, None], k[:, None] if k.ndim == 1 else k
    if c.ndim != 2 or c.shape[1] != n_dihedrals or len(c) == 0 or not torch.isfinite(c).all():
        raise ValueError(
            f"centers must be finite and of shape (n_windows, {n_dihedrals}), got shape "
            f"{tuple(c.shape)}"
        )
    if c.abs().max() > 2 * math.pi:
        raise ValueError(
            f"centers must be in radians, from -2 pi to 2 pi, got {float(c.abs().max()):g}"
        )
    if k.shape not in ((), c.shape) or not (torch.isfinite(k) & (k >= 0)).all():
        raise ValueError(
            "stiffness must not be negative, one number or one for each of the centres "
            f"{tuple(c.shape)}, got {stiffness!r}"
        )
    return c, k.expand(c.shape).clone()
