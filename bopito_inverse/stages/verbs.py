"""The verbs of a run, each a function of its configuration that fills one folder.

    simulate -> biased.npz, umbrella.npz     trajectories with wrong kinetics, windows for mu
                (biased/ of a molecule)
    reweight -> frames.npz                   frames with MBAR weights that average to mu
    train    -> bopito.safetensors           both scores
    fit      -> posterior.nc, summary.json   N_int by the measured correlation function
    sample   -> trajectories.npz             corrected trajectories

They meet through files alone, so that any of them can be replaced by files of another origin.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bopito_inverse import models
from bopito_inverse.arguments import as_device, as_generator
from bopito_inverse.config import Config
from bopito_inverse.datasets import Frames, Trajectories
from bopito_inverse.inference import FitResult
from bopito_inverse.inference import fit as fit_n_int
from bopito_inverse.inference.posterior import write_netcdf
from bopito_inverse.sampling import sample as sample_trajectories
from bopito_inverse.simulate import Reweighting, mbar
from bopito_inverse.stages import comparison, comparison_molecules, inputs, simulation
from bopito_inverse.stages.fit_figures import draw_fit
from bopito_inverse.stages.folder import Job, Say, silent, write_json
from bopito_inverse.stages.seeds import seed_for

SECTIONS = {
    "simulate": ("simulate",),
    "reweight": ("reweight",),
    "train": ("train",),
    "fit": ("step", "observable", "fit"),
    "sample": ("step", "sample"),
}
INPUTS: dict[str, tuple[str, ...]] = {
    "simulate": (),
    "reweight": ("umbrella",),
    "train": ("trajectories", "frames"),
    "fit": ("checkpoint", "frames"),
    "sample": ("checkpoint", "frames"),
}
NAMED = {  # what a molecule may have in addition, by the key that names it
    "simulate": {"starts": "simulate.starts"},
    "reweight": {},
    "train": {},
    "fit": {"reference": "data.reference"},
    "sample": {"reference": "data.reference"},
}


def job(config: Config, verb: str) -> Job:
    """The folder of a verb, with what its results depend on.

    Raises:
        FileNotFoundError: an input is not there.
        ValueError: the run file lacks a section.
    """
    settings: dict[str, Any] = {"seed": config.seed}
    settings["system"] = {"name": config.system.name, **config.system.arguments}
    for name in SECTIONS[verb]:
        settings[name] = config.section(name).model_dump(mode="json")
    files = config.system.files | {name: inputs.find(config, name) for name in INPUTS[verb]}
    if verb == "fit":
        settings["experiment"] = {"fit_lags": config.section("experiment").fit_lags}
        files |= inputs.experiment_files(config)
    if verb == "sample" and config.experiment is not None:  # what the comparison leaves out
        settings["observable"] = config.observable.model_dump(mode="json")
        settings["experiment"] = {"fit_lags": config.experiment.fit_lags}
        files |= inputs.experiment_files(config)
    if verb == "sample" and config.sample.n_int is None:
        files["fit"] = inputs.find_summary(config)
    for name, key in NAMED[verb].items():
        if (path := inputs.find_named(config, key)) is not None:
            files[name] = path
    return Job(verb, config.output / verb, settings, files, str(as_device(config.device)))


def needed(config: Config) -> list[str]:
    """The verbs of a whole run, in order, without those whose products `[data]` provides."""
    data, verbs = config.data, []
    train_needed = data.checkpoint is None
    if (train_needed and data.trajectories is None) or (
        data.frames is None and data.umbrella is None
    ):
        verbs.append("simulate")
    if data.frames is None:
        verbs.append("reweight")
    if train_needed:
        verbs.append("train")
    if config.experiment is not None:
        verbs.append("fit")
    return [*verbs, "sample"]


def simulate(config: Config, say: Say = silent, progress: bool = False) -> None:
    """Write `simulate/biased.npz` (trajectories) and, where windows are given, `umbrella.npz`.

    Trajectories of a molecule are in the folder `biased`, in a format of mdtraj.
    """
    config.section("simulate")

    def make(folder: Path) -> None:
        simulation.write_trajectories(config, folder, say, progress)
        simulation.write_windows(config, folder, say, progress)

    job(config, "simulate").run(make, say)


def reweight(config: Config, say: Say = silent, progress: bool = False) -> None:
    """Write `reweight/frames.npz` (weighted frames) and `reweighting.json`.

    Raises:
        ValueError: neighbouring windows overlap too little, or too few frames carry the weight.
    """
    biased = inputs.read_umbrella(config)

    def make(folder: Path) -> None:
        result = mbar(biased, config.reweight.min_overlap)
        report = _plain(result)
        write_json(folder / "reweighting.json", report)
        if result.status != "ok":
            path = inputs.path_of(config, "umbrella")
            raise ValueError(f"the weights of {path} are unreliable: {result.status}")
        frames = Frames(biased.frames_flat, result.weights)
        inputs.write_frames(folder / "frames.npz", frames, config.system.build().name)
        say(
            f"  frames.npz: {len(frames)} frames, worth {result.ess:.0f} independent ones; "
            f"smallest overlap of neighbouring windows {result.smallest_overlap:.2f}"
        )

    job(config, "reweight").run(make, say)


def train(config: Config, say: Say = silent, progress: bool = False) -> None:
    """Write `train/equilibrium.safetensors` and `train/bopito.safetensors`.

    Raises:
        ValueError: bad data, or a lag_max that no trajectory reaches.
    """
    section = config.section("train")
    trajectories, frames = inputs.read_pairs(config), inputs.read_frames(config)
    system = config.system.build()

    def make(folder: Path) -> None:
        common: dict[str, Any] = {"device": config.device, "progress": progress}
        s_eq = models.train_equilibrium(
            frames,
            config=section.equilibrium,
            seed=seed_for(config, "equilibrium"),
            folder=folder / "equilibrium",
            forces=system.force(frames.x) / system.kT if section.forces else None,
            molecule=system if config.system.is_molecule else None,
            **common,
        )
        _save(config, s_eq, folder / "equilibrium.safetensors")
        bopito = models.train_bopito(
            trajectories,
            s_eq,
            section.lag_max,
            section.lambda_hat,
            config=section.dynamic,
            seed=seed_for(config, "dynamic"),
            folder=folder / "dynamic",
            **common,
        )
        _save(config, bopito, folder / "bopito.safetensors")
        say("  equilibrium.safetensors, bopito.safetensors")

    job(config, "train").run(make, say)


def fit(config: Config, say: Say = silent, progress: bool = False) -> None:
    """Write `fit/posterior.nc`, `fit/summary.json` and figures."""
    model = inputs.read_model(config)
    step, frames = inputs.read_step(config, model), inputs.read_frames(config)
    measured, fitted = inputs.read_experiment(config)
    observables = inputs.read_observables(config)
    truth = _comparison(config).truth(config)

    def make(folder: Path) -> None:
        with _busy("Fitting N_int", progress):
            result = fit_n_int(
                model,
                step,
                observables,
                measured[fitted],
                frames,
                seed=config.seed,
                device=config.device,
                **config.fit.options(),
            )
            draw_fit(config, folder, result, model, frames, measured, fitted, truth)
        _write_result(result, folder)
        say(f"{result}")

    job(config, "fit").run(make, say)


def sample(config: Config, say: Say = silent, progress: bool = False) -> None:
    """Write `sample/trajectories.npz`, `sample/comparison.json` and figures."""
    section, system = config.sample, config.system.build()
    model = inputs.read_model(config)
    step, frames = inputs.read_step(config, model), inputs.read_frames(config)
    n_int, status = inputs.read_n_int(config)
    inputs.read_reference(config)  # a bad one is refused before the work begins
    if status != "ok":
        say(f"  warning: the fit says {status}; see fit/summary.json before you use these frames")
    seed = seed_for(config, "sample")
    x_0 = frames.sample(section.n_trajectories, as_generator(seed, torch.device("cpu"), "starts"))

    def make(folder: Path) -> None:
        out = folder / "trajectories.npz"
        if not out.exists():  # a file appears when it is complete
            sample_trajectories(
                model,
                step,
                starts=x_0,
                n_steps=section.n_steps,
                n_int=n_int,
                seed=seed,
                out=out,
                frame_time=system.frame_time,
                system=system.name,
                device=config.device,
                progress=progress,
            )
        size = f"{section.n_trajectories} x {section.n_steps} steps"
        say(f"  trajectories.npz: {size} of {step.step_lag:g} frames, n_int {n_int:.4g}")
        with _busy("Comparing", progress):
            report = _comparison(config).compare(
                config, folder, model, x_0, Trajectories.read(out), seed_for(config, "comparison")
            )
        write_json(folder / "comparison.json", report | {"n_int": n_int})
        say(f"  {_comparison(config).verdict(report)}")

    job(config, "sample").run(make, say)


def _comparison(config: Config) -> ModuleType:
    """What the results of the system are compared with: `truth`, `compare` and `verdict`."""
    return comparison_molecules if config.system.is_molecule else comparison


def _write_result(result: FitResult, folder: Path) -> None:
    partial = folder / ".posterior.nc"
    partial.unlink(missing_ok=True)
    write_netcdf(result.idata, partial)
    os.replace(partial, folder / "posterior.nc")
    write_json(folder / "summary.json", result.summary())


@contextmanager
def _busy(message: str, show: bool) -> Iterator[None]:
    """A spinner."""
    if not show:
        yield
        return
    from rich.console import Console

    with Console().status(message):
        yield


def _plain(result: Reweighting) -> dict[str, Any]:
    """What MBAR says, but for the weights, as JSON values."""
    return {
        "status": result.status,
        "ess": result.ess,
        "smallest_overlap": result.smallest_overlap,
        "free_energies": result.free_energies.tolist(),
        "free_energy_errors": result.free_energy_errors.tolist(),
        "statistical_inefficiency": result.statistical_inefficiency.tolist(),
        "overlap": result.overlap.tolist(),
    }


def _save(config: Config, score: torch.nn.Module, path: Path) -> None:
    training = {
        "seed": config.seed,
        "system": config.system.arguments,
        "settings": config.section("train").model_dump(mode="json"),
    }
    models.save(score, path, system=config.system.build().name, training=training)
