"""The verbs of a run, each a function of its configuration that fills one folder.

    simulate -> biased.npz, umbrella.npz     trajectories with wrong kinetics, windows for mu
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
from typing import Any

import numpy as np
import torch

from bopito_inverse import models
from bopito_inverse.arguments import as_device, as_generator
from bopito_inverse.config import Config
from bopito_inverse.datasets import Frames, Trajectories
from bopito_inverse.inference import FitResult
from bopito_inverse.inference import fit as fit_n_int
from bopito_inverse.inference.posterior import write_netcdf
from bopito_inverse.sampling import sample as sample_trajectories
from bopito_inverse.simulate import Reweighting, langevin, mbar, umbrella
from bopito_inverse.stages import comparison, inputs
from bopito_inverse.stages.folder import Job, Say, silent, write_json

PURPOSES = ("starts", "biased", "umbrella", "equilibrium", "dynamic", "sample", "comparison")


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
VERBS = tuple(SECTIONS)


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
    files = {name: inputs.find(config, name) for name in INPUTS[verb]}
    if verb == "fit":
        settings["experiment"] = {"fit_lags": config.section("experiment").fit_lags}
        files |= inputs.experiment_files(config)
    if verb == "sample" and config.experiment is not None:  # what the comparison leaves out
        settings["observable"] = config.observable.model_dump(mode="json")
        settings["experiment"] = {"fit_lags": config.experiment.fit_lags}
        files |= inputs.experiment_files(config)
    if verb == "sample" and config.sample.n_int is None:
        files["fit"] = inputs.find_summary(config)
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
    """Write `simulate/biased.npz` (trajectories) and, where windows are given, `umbrella.npz`."""
    config.section("simulate")

    def make(folder: Path) -> None:
        biased = folder / "biased.npz"
        if not biased.exists():  # a file appears when it is complete
            _langevin(config, progress).write(biased)
            say(f"  {biased.name}: {config.section('simulate').n_trajectories} trajectories")
        if config.section("simulate").umbrella is not None:
            windows = _umbrella(config)
            windows.write(folder / "umbrella.npz")
            say(f"  umbrella.npz: {windows.n_windows} windows of {windows.n_frames} frames")

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
        inputs.write_frames(folder / "frames.npz", frames, config.system.name)
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
            seed=_seed(config, "equilibrium"),
            folder=folder / "equilibrium",
            forces=system.force(frames.x) / system.kT if section.forces else None,
            **common,
        )
        _save(config, s_eq, folder / "equilibrium.safetensors")
        bopito = models.train_bopito(
            trajectories,
            s_eq,
            section.lag_max,
            section.lambda_hat,
            config=section.dynamic,
            seed=_seed(config, "dynamic"),
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
    obs = config.observable.build()

    def make(folder: Path) -> None:
        with _busy("Fitting N_int", progress):
            result = fit_n_int(
                model,
                step,
                obs,
                measured[fitted],
                frames,
                seed=config.seed,
                device=config.device,
                **config.fit.options(),
            )
            comparison.draw_fit(config, folder, result, model, frames, measured, fitted)
        _write_result(result, folder)
        say(f"{result}")

    job(config, "fit").run(make, say)


def sample(config: Config, say: Say = silent, progress: bool = False) -> None:
    """Write `sample/trajectories.npz`, `sample/comparison.json` and figures."""
    section = config.sample
    model = inputs.read_model(config)
    step, frames = inputs.read_step(config, model), inputs.read_frames(config)
    n_int, status = inputs.read_n_int(config)
    if status != "ok":
        say(f"  warning: the fit says {status}; see fit/summary.json before you use these frames")
    seed = _seed(config, "sample")
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
                frame_time=config.system.build().frame_time,
                system=config.system.name,
                device=config.device,
                progress=progress,
            )
        size = f"{section.n_trajectories} x {section.n_steps} steps"
        say(f"  trajectories.npz: {size} of {step.step_lag:g} frames, n_int {n_int:.4g}")
        with _busy("Comparing with the exact operator", progress):
            report = comparison.compare(
                config, folder, model, x_0, Trajectories.read(out), _seed(config, "comparison")
            )
        write_json(folder / "comparison.json", report | {"n_int": n_int})
        tv = report["total_variation"]
        say(
            f"  total variation from the exact density: {tv['corrected']:.4f} "
            f"(noise floor {tv['noise_floor']:.4f})"
        )

    job(config, "sample").run(make, say)


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


def _langevin(config: Config, progress: bool) -> Trajectories:
    section = config.section("simulate")
    low, high = section.starts
    generator = as_generator(_seed(config, "starts"), torch.device("cpu"))
    x_0 = low + (high - low) * torch.rand(section.n_trajectories, 1, generator=generator)
    return langevin(
        config.system.build(),
        x_0,
        section.n_frames,
        seed=_seed(config, "biased"),
        barrier=section.barrier,
        device=config.device,
        progress=progress,
    )


def _umbrella(config: Config) -> Any:
    windows = config.section("simulate.umbrella")
    return umbrella(
        config.system.build(),
        np.linspace(windows.low, windows.high, windows.n_windows),
        windows.stiffness,
        windows.n_frames,
        seed=_seed(config, "umbrella"),
        n_walkers=windows.n_walkers,
        burn_in=windows.burn_in,
        stride=windows.stride,
        device=config.device,
    )


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
    models.save(score, path, system=config.system.name, training=training)


def _seed(config: Config, purpose: str) -> int:
    """A seed for one purpose, so that no two of them share random numbers."""
    key = [config.seed, 1 + PURPOSES.index(purpose)]
    return int(np.random.SeedSequence(key).generate_state(1)[0])
