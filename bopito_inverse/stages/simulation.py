"""What `simulate` runs: Langevin dynamics in one dimension, OpenMM for molecules.

Simulations of molecules keep what is complete, and go on from there when they are called again.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bopito_inverse.arguments import as_generator
from bopito_inverse.config import Config
from bopito_inverse.observables import Dihedral, feature
from bopito_inverse.simulate import (
    BiasedSamples,
    langevin,
    molecular_dynamics,
    replica_exchange,
    tempering,
    umbrella,
    umbrella_dihedrals,
)
from bopito_inverse.stages.folder import Say
from bopito_inverse.stages.inputs import read_starts
from bopito_inverse.stages.seeds import seed_for

CPU = torch.device("cpu")


def write_trajectories(config: Config, folder: Path, say: Say, progress: bool) -> None:
    """Write `biased.npz`, or the folder `biased` of a molecule, unless none are asked for."""
    section = config.section("simulate")
    if section.n_trajectories is None:
        return
    if config.system.is_molecule:
        with _told(say):
            made = len(_molecular_dynamics(config, folder / "biased", progress))
        dropped = section.n_trajectories - made
        lost = f", {dropped} more blew up (see biased/report.json)" if dropped else ""
        say(f"  biased: {made} trajectories{lost}")
    elif not (folder / "biased.npz").exists():  # a file appears when it is complete
        _langevin(config, progress).write(folder / "biased.npz")
        say(f"  biased.npz: {section.n_trajectories} trajectories")


def write_windows(config: Config, folder: Path, say: Say, progress: bool) -> None:
    """Write `umbrella.npz` or `tempering.npz`, where one of them is asked for."""
    section = config.section("simulate")
    if section.umbrella is None and section.tempering is None:
        return
    kind = "umbrella" if section.tempering is None else "tempering"
    path, parts = folder / f"{kind}.npz", folder / f"{kind}.parts"
    if config.system.is_molecule:
        with _told(say):
            windows = _molecular_windows(config, kind, parts, progress)
    else:
        windows = _umbrella(config) if kind == "umbrella" else _tempering(config)
    windows.write(path)
    shutil.rmtree(parts, ignore_errors=True)
    say(f"  {path.name}: {windows.n_windows} windows of {windows.n_frames} frames")


def dihedral_atoms(config: Config) -> tuple[int, int, int, int]:
    """Atoms of the dihedral of the umbrella windows.

    Raises:
        ValueError: it is no dihedral of the molecule.
    """
    name = config.section("simulate.umbrella").dihedral
    key = f"{config.path}: simulate.umbrella.dihedral"
    try:
        found = feature(name, config.system.build().topology)
    except ValueError as error:
        raise ValueError(f"{key} {str(error).removeprefix('name ')}") from error
    if not isinstance(found, Dihedral) or found.function is not None:
        raise ValueError(f"{key} must be a dihedral, as phi or dihedral(i, j, k, l), got {name!r}")
    return found.i, found.j, found.k, found.l


def _langevin(config: Config, progress: bool) -> Any:
    section = config.section("simulate")
    low, high = section.starts
    generator = as_generator(seed_for(config, "starts"), CPU)
    x_0 = low + (high - low) * torch.rand(section.n_trajectories, 1, generator=generator)
    return langevin(
        config.system.build(),
        x_0,
        section.n_frames,
        seed=seed_for(config, "biased"),
        barrier=section.barrier,
        device=config.device,
        progress=progress,
    )


def _umbrella(config: Config) -> BiasedSamples:
    windows = config.section("simulate.umbrella")
    return umbrella(
        config.system.build(),
        windows.centers,
        windows.stiffness,
        seed=seed_for(config, "umbrella"),
        device=config.device,
        **windows.sizes,
    )


def _tempering(config: Config) -> BiasedSamples:
    windows = config.section("simulate.tempering")
    return tempering(
        config.system.build(),
        windows.ladder,
        seed=seed_for(config, "tempering"),
        device=config.device,
        **windows.sizes,
    )


def _molecular_dynamics(config: Config, folder: Path, progress: bool) -> Any:
    section = config.section("simulate")
    generator = as_generator(seed_for(config, "starts"), CPU)
    return molecular_dynamics(
        config.system.build(),
        read_starts(config).sample(section.n_trajectories, generator),
        section.n_frames,
        folder,
        seed=seed_for(config, "biased"),
        format=section.format,
        executor=_processes(config, section.n_trajectories),
        progress=progress,
    )


def _molecular_windows(config: Config, kind: str, parts: Path, progress: bool) -> BiasedSamples:
    section = config.section(f"simulate.{kind}")
    common: dict[str, Any] = {
        "seed": seed_for(config, kind),
        "folder": parts,
        "progress": progress,
        **section.sizes,
    }
    molecule = config.system.build()
    if kind == "tempering":
        processes = _processes(config, section.n_walkers)
        return replica_exchange(molecule, section.ladder, executor=processes, **common)
    processes = _processes(config, section.n_windows)
    atoms = np.array([dihedral_atoms(config)])
    return umbrella_dihedrals(
        molecule, atoms, section.centers, section.stiffness, executor=processes, **common
    )


def _processes(config: Config, n_tasks: int) -> int | None:
    """How many processes; None for this one alone."""
    wanted = config.section("simulate").workers or os.cpu_count() or 1
    n = min(wanted, n_tasks)
    return n if n > 1 else None


@contextmanager
def _told(say: Say) -> Iterator[None]:
    """Say warnings of a simulation, and give what went wrong in it as a user error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", category=UserWarning)
        try:
            yield
        except RuntimeError as error:
            raise ValueError(str(error)) from error
    for warning in caught:
        say(f"  warning: {warning.message}")
