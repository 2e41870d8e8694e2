"""What a verb reads: where it is, that it is there, and that it belongs to this run.

Each input is what `[data]` names, or else the product of an earlier verb. It is refused where it
was made with another system or has frames of another shape than the system's.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bopito_inverse.config import Config
from bopito_inverse.datasets import TIMED, Frames, LaggedPairs, Trajectories, read_npz, write_npz
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.models import BoPITOScore, checkpoint
from bopito_inverse.models.painn import PaiNN
from bopito_inverse.observables import Correlation, Experiment
from bopito_inverse.sampling import Interpolate, Propagate, Rollout, renoising_step
from bopito_inverse.sampling.rollout import Move
from bopito_inverse.sampling.solvers import DPMSolver
from bopito_inverse.simulate import BiasedSamples
from bopito_inverse.stages.dihedrals import Dihedrals, backbone, names_of
from bopito_inverse.systems import Molecule, Potential1D

PRODUCTS = {
    "trajectories": ("simulate", "biased.npz"),
    "umbrella": ("simulate", "umbrella.npz"),
    "frames": ("reweight", "frames.npz"),
    "checkpoint": ("train", "bopito.safetensors"),
}


def path_of(config: Config, name: str) -> Path:
    """Where an input is, or will be."""
    verb, file = PRODUCTS[name]
    if name == "trajectories" and config.system.is_molecule:
        file = "biased"  # a folder of files that other programs read, too
    if name == "umbrella" and config.simulate is not None and config.simulate.tempering is not None:
        file = "tempering.npz"
    return getattr(config.data, name) or config.output / verb / file


def is_there(path: Path) -> bool:
    """Whether there is such a file, or a folder of simulations that are finished."""
    return path.is_file() or (path.is_dir() and not (path / "partial").exists())


def find(config: Config, name: str) -> Path:
    """Where an input is.

    Raises:
        FileNotFoundError: it is not there; the message says what to do.
    """
    path = path_of(config, name)
    if path.is_file() or (config.system.is_molecule and name == "trajectories" and is_there(path)):
        return path
    if getattr(config.data, name) is not None:
        raise FileNotFoundError(f"{config.path}: data.{name}: there is no file {path}")
    if lacking := lacks(config, name):
        raise FileNotFoundError(f"{config.path}: {lacking}, or [data] {name} a file, must be given")
    verb = PRODUCTS[name][0]
    raise FileNotFoundError(
        f"{path} does not exist yet; `bopito-inverse {verb} {config.path}` makes it, or [data] "
        f"{name} names a file to be used instead"
    )


def lacks(config: Config, name: str) -> str | None:
    """What the run file must hold before a verb makes this input, if it does not."""
    section = config.simulate
    if name == "trajectories" and getattr(section, "n_trajectories", None) is None:
        return "[simulate] n_trajectories and n_frames"
    windows = [getattr(section, kind, None) for kind in ("umbrella", "tempering")]
    if name == "umbrella" and not any(windows):
        return "[simulate.umbrella] or [simulate.tempering]"
    if name == "checkpoint" and config.train is None:
        return "[train]"
    return None


def read_trajectories(config: Config) -> Trajectories:
    """Trajectories of the system."""
    path, system = find(config, "trajectories"), config.system.build()
    trajectories = _read_trajectories(path, system)
    _refuse_other(config, path, trajectories.system, trajectories.frames, system)
    if not np.isclose(trajectories.frame_time, system.frame_time, rtol=1e-6, atol=0):
        raise ValueError(
            f"{path}: frame_time must be that of {system.name} ({system.frame_time:g}), got "
            f"{trajectories.frame_time:g}"
        )
    return trajectories


def read_pairs(config: Config) -> Trajectories:
    """Trajectories of the system that hold pairs of frames up to `train.lag_max`."""
    trajectories = read_trajectories(config)
    with located(f"{config.path}: train with {path_of(config, 'trajectories')}"):
        LaggedPairs(trajectories, config.section("train").lag_max)
    return trajectories


def _read_trajectories(path: Path, system: Potential1D | Molecule) -> Trajectories:
    """Trajectories, in any format that mdtraj reads where they are of a molecule."""
    if isinstance(system, Potential1D):
        return Trajectories.read(path)
    return Trajectories.read(path, system.topology, None if is_timed(path) else system.frame_time)


def is_timed(path: Path) -> bool:
    """Whether trajectories hold times; where they do not, those of the system are taken."""
    return _suffix(path) in (*TIMED, ".npz")


def _suffix(path: Path) -> str:
    """That of a file, or of the trajectories in a folder."""
    return (next(path.glob("trajectory_*"), path) if path.is_dir() else path).suffix


def read_starts(config: Config) -> Frames:
    """Frames from which simulations of a molecule start: those of `simulate.starts`."""
    path, molecule = find_named(config, "simulate.starts"), config.system.build()
    if path is None:
        return Frames(molecule.positions[None])
    if path.suffix == ".npz" and "trajectories" not in read_npz(path, ()):
        frames = Frames.read(path)
    else:
        frames = Frames(_read_trajectories(path, molecule).frames)
    _refuse_other(config, path, None, frames.x, molecule)
    return frames


def read_umbrella(config: Config) -> BiasedSamples:
    """Umbrella windows of the system, or its ladder of temperatures."""
    path = find(config, "umbrella")
    biased = BiasedSamples.read(path)
    system = config.system.build()
    _refuse_other(config, path, biased.system, biased.frames_flat, system)
    if not np.isclose(biased.kT, system.kT):
        raise ValueError(f"{path}: kT must be that of {system.name} ({system.kT}), got {biased.kT}")
    return biased


def read_frames(config: Config) -> Frames:
    """Weighted equilibrium frames of the system."""
    path = find(config, "frames")
    frames = Frames.read(path)
    made_with = str(read_npz(path, ()).get("system", "")) or None
    _refuse_other(config, path, made_with, frames.x, config.system.build())
    return frames


def write_frames(path: Path, frames: Frames, system: str) -> None:
    """Write what `Frames.read` reads, with the name of the system."""
    x, weights = frames.x.cpu().numpy(), frames.weights.cpu().numpy()
    write_npz(path, frames=x, weights=weights, system=np.str_(system))


def read_model(config: Config) -> Interpolator:
    """The trained model of the system, on the CPU."""
    path = find(config, "checkpoint")
    system = config.system.build()
    header = checkpoint.read_header(path)
    score = checkpoint.load(path, system=system.name)
    if not isinstance(score, BoPITOScore):
        raise ValueError(f"{path} must hold a BoPITOScore, got {header['kind']}")
    trained_on = (header["training"] or {}).get("system", config.system.arguments)
    if trained_on != config.system.arguments:
        raise ValueError(
            f"{path} was trained on {system.name} with {trained_on or 'its default arguments'}, "
            f"not with {config.system.arguments or 'its default arguments'}"
        )
    _refuse_other_shape(path, score.event_shape, system)
    if isinstance(system, Molecule):
        _refuse_other_graph(path, score, system)
    return Interpolator(score)


def _refuse_other_graph(path: Path, score: BoPITOScore, molecule: Molecule) -> None:
    """Refuse a model of another molecule with as many atoms."""
    network = score.s_eq.network
    if not isinstance(network, PaiNN):
        raise ValueError(f"{path} must hold the scores of a molecule, got {type(network).__name__}")
    same = (
        network.types.tolist() == molecule.atom_types.tolist()
        and network.bonds == molecule.bonds.tolist()
    )
    if not same:
        raise ValueError(f"{path} was trained on a molecule with other atoms or bonds")


def read_step(config: Config, model: Interpolator) -> Rollout:
    """The composite step, with moves that the model can make."""
    section = config.section("step")
    solver = DPMSolver(section.evaluations)
    if section.relax is None:
        return renoising_step(model.lag_max, section.step_lag, solver, slower=section.slower)
    for lag in section.relax:
        if lag > model.lag_max:
            raise ValueError(
                f"{config.path}: step.relax must hold lags of at most lag_max of the model "
                f"({model.lag_max}), got {lag:g}"
            )
    moves: list[Move] = [Interpolate(), *map(Propagate, section.relax)]
    return Rollout(moves, section.step_lag, solver)


def uncorrected_step(config: Config, model: Interpolator) -> Rollout:
    """The trained model alone, by as few equal moves as make one step: what data without an
    experiment would give.
    """
    section = config.section("step")
    n = math.ceil(section.step_lag / model.lag_max)
    moves = [Propagate(section.step_lag / n)] * n
    return Rollout(moves, section.step_lag, DPMSolver(section.evaluations))


def find_named(config: Config, key: str) -> Path | None:
    """The file or folder that a key such as `data.reference` names, if it names one.

    Raises:
        FileNotFoundError: it is not there.
    """
    path: Any = config
    for part in key.split("."):
        path = getattr(path, part, None)
    if not isinstance(path, Path):
        return None
    if not is_there(path):
        raise FileNotFoundError(f"{config.path}: {key}: there is no file {path}")
    return path


def read_reference(config: Config) -> Dihedrals | None:
    """Backbone dihedrals of unbiased dynamics of the molecule, if they are given.

    Raises:
        ValueError: no angles of this molecule, or a step that is no whole number of their frames.
    """
    path, molecule = find_named(config, "data.reference"), config.system.build()
    if path is None:
        return None
    names = names_of(backbone(molecule.topology))
    if not names:
        raise ValueError(f"{config.path}: data.reference: {molecule.name!r} has no phi and psi")
    if path.suffix == ".npz" and "trajectories" not in read_npz(path, ()):
        reference = Dihedrals.read(path, names)
    else:
        trajectories = _read_trajectories(path, molecule)
        _refuse_other(config, path, trajectories.system, trajectories.frames, molecule)
        reference = Dihedrals.of(trajectories, molecule.topology)
    if config.step is not None:
        frames = config.step.step_lag * molecule.frame_time / reference.frame_time
        if round(frames) < 1 or abs(frames - round(frames)) > 1e-4:
            raise ValueError(
                f"{path}: frame_time must divide a step of {config.step.step_lag} frames of "
                f"{molecule.frame_time:g} ps, got {reference.frame_time:g} ps"
            )
    return reference


def read_observables(config: Config) -> dict[str, Correlation]:
    """The correlation functions, by the names that the experiment has for them."""
    with located(config.path):
        return config.observable.build(getattr(config.system.build(), "topology", None))


def find_summary(config: Config) -> Path:
    """Where the result of the fit is.

    Raises:
        FileNotFoundError: there is none yet.
    """
    path = config.output / "fit" / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist yet; `bopito-inverse fit {config.path}` makes it, or [sample] "
            "n_int is used instead"
        )
    return path


def read_n_int(config: Config) -> tuple[float, str]:
    """The n_int of `[sample]`, or else the posterior mean, and the status of the fit."""
    if config.sample.n_int is not None:
        return config.sample.n_int, "ok"
    path = find_summary(config)
    try:
        summary = json.loads(path.read_text())
        mean = summary["n_int"]["mean"]
        return math.inf if mean is None else float(mean), str(summary["status"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a summary that `fit` wrote; run `fit` again") from None


def experiment_files(config: Config) -> dict[str, Path]:
    """The files of the measurement.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    section = config.section("experiment")
    files = {"experiment": section.file, "covariance": section.covariance}
    given = {name: path for name, path in files.items() if path is not None}
    for name, path in given.items():
        if not path.is_file():
            key = "file" if name == "experiment" else name
            raise FileNotFoundError(f"{config.path}: experiment.{key}: there is no file {path}")
    return given


def read_experiment(config: Config) -> tuple[Experiment, np.ndarray]:
    """The measurement of the observables, lags in frames, and which points are fitted (L,).

    Raises:
        ValueError: the table is bad, does not hold an observable, has lags that are not multiples
            of the step, or lacks a lag that is to be fitted.
    """
    files = experiment_files(config)
    frame_time = config.system.build().frame_time
    measured = Experiment.read(files["experiment"], files.get("covariance"), frame_time)
    with located(files["experiment"]):
        for label in config.observable.labels:
            measured.select(label)  # refuses one that is not there
        measured = measured[np.isin(measured.observable, config.observable.labels)]
        measured.steps(config.section("step").step_lag)
    wanted = config.section("experiment").fit_lags
    if wanted is None:
        return measured, np.ones(len(measured), dtype=bool)
    missing = sorted(set(wanted) - set(measured.lags.tolist()))
    if missing:
        raise ValueError(
            f"{config.path}: experiment.fit_lags must be lags of {files['experiment']}, got "
            f"{', '.join(f'{lag:g}' for lag in missing)}"
        )
    return measured, np.isin(measured.lags, wanted)


@contextmanager
def located(where: object) -> Iterator[None]:
    """Put a place before the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _refuse_other(
    config: Config,
    path: Path,
    made_with: str | None,
    frames: Tensor,
    system: Potential1D | Molecule,
) -> None:
    """Refuse frames of another system, in another unit or with another order of atoms."""
    if made_with not in (None, system.name):
        raise ValueError(
            f"{path} is of the system {made_with!r}, but that of {config.path} is {system.name!r}"
        )
    _refuse_other_shape(path, tuple(frames.shape[1:]), system)
    if isinstance(system, Molecule):
        system.as_frames(f"{path}: frames", frames)


def _refuse_other_shape(
    path: Path, event_shape: tuple[int, ...], system: Potential1D | Molecule
) -> None:
    if event_shape != system.event_shape:
        raise ValueError(
            f"{path} must hold frames of shape {system.event_shape}, as {system.name} has, got "
            f"{event_shape}"
        )
