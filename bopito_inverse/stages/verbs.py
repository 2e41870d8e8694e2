"""The verbs of a run, each a function of its configuration that fills one folder.

    simulate -> biased.npz, umbrella.npz     trajectories with wrong kinetics, windows for mu
    reweight -> frames.npz                   frames with MBAR weights that average to mu
    train    -> bopito.safetensors           both scores
    fit      -> posterior.nc, summary.json   N_int by the measured correlation function
    sample   -> trajectories.npz             corrected trajectories

They meet through files alone, so that any of them can be replaced by files of another origin.
"""

import json
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
from bopito_inverse.datasets import Frames, LaggedPairs, Trajectories
from bopito_inverse.inference import FitResult
from bopito_inverse.inference import fit as fit_n_int
from bopito_inverse.inference.posterior import write_netcdf
from bopito_inverse.sampling import sample as sample_trajectories
from bopito_inverse.simulate import Reweighting, langevin, mbar, umbrella
from bopito_inverse.stages import comparison, inputs
from bopito_inverse.stages.folder import Job, Say, silent, write_text

PURPOSES = ("starts", "biased", "umbrella", "equilibrium", "dynamic", "sample", "comparison")


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

    _job(config, "simulate", ("simulate",)).run(make, say)


def reweight(config: Config, say: Say = silent, progress: bool = False) -> None:
    """Write `reweight/frames.npz` (weighted frames) and `reweighting.json`.

    Raises:
        ValueError: neighbouring windows overlap too little, or too few frames carry the weight.
    """
    files = {"umbrella": inputs.find(config, "umbrella")}
    biased = inputs.read_umbrella(config)

    def make(folder: Path) -> None:
        result = mbar(biased, config.reweight.min_overlap)
        report = _plain(result)
        write_text(folder / "reweighting.json", json.dumps(report, indent=2) + "\n")
        if result.status != "ok":
            raise ValueError(f"the weights of {files['umbrella']} are unreliable: {result.status}")
        frames = Frames(biased.frames_flat, result.weights)
        inputs.write_frames(folder / "frames.npz", frames, config.system.name)
        say(
            f"  frames.npz: {len(frames)} frames, worth {result.ess:.0f} independent ones; "
            f"smallest overlap of neighbouring windows {result.smallest_overlap:.2f}"
        )

    _job(config, "reweight", ("reweight",), files).run(make, say)


def train(config: Config, say: Say = silent, progress: bool = False) -> None:
    """Write `train/equilibrium.safetensors` and `train/bopito.safetensors`.

    Raises:
        ValueError: bad data, or a lag_max that no trajectory reaches.
    """
    section = config.section("train")
    files = {name: inputs.find(config, name) for name in ("trajectories", "frames")}
    trajectories, frames = inputs.read_trajectories(config), inputs.read_frames(config)
    with inputs.located(f"{config.path}: train.lag_max, {files['trajectories']}"):
        LaggedPairs(trajectories, section.lag_max)

    def make(folder: Path) -> None:
        common: dict[str, Any] = {"device": config.device, "progress": progress}
        s_eq = models.train_equilibrium(
            frames,
            config=section.equilibrium,
            seed=_seed(config, "equilibrium"),
            folder=folder / "equilibrium",
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

    _job(config, "train", ("train",), files).run(make, say)


def fit(config: Config, say: Say = silent, progress: bool = False) -> None:
    """Write `fit/posterior.nc`, `fit/summary.json` and figures."""
    files = {name: inputs.find(config, name) for name in ("checkpoint", "frames")}
    files |= inputs.experiment_files(config)
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
                prior=config.fit.frozen_prior(),
                seed=config.seed,
                n_replicas=config.fit.n_replicas,
                device=config.device,
            )
            comparison.draw_fit(config, folder, result, model, frames, measured, fitted)
        _write_result(result, folder)
        say(f"{result}")

    settings = {"fit_lags": config.section("experiment").model_dump(mode="json")["fit_lags"]}
    job = _job(config, "fit", ("step", "observable", "fit"), files, experiment=settings)
    job.run(make, say)


def sample(config: Config, say: Say = silent, progress: bool = False) -> None:
    """Write `sample/trajectories.npz`, `sample/comparison.json` and figures."""
    section = config.sample
    files = {name: inputs.find(config, name) for name in ("checkpoint", "frames")}
    if section.n_int is None:
        files["fit"] = inputs.find_summary(config)
    model = inputs.read_model(config)
    step, frames = inputs.read_step(config, model), inputs.read_frames(config)
    n_int = inputs.read_n_int(config)
    seed = _seed(config, "sample")
    x_0 = frames.sample(section.n_trajectories, as_generator(seed, torch.device("cpu"), 1 << 31))

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
        write_text(
            folder / "comparison.json", json.dumps(report | {"n_int": n_int}, indent=2) + "\n"
        )
        tv = report["total_variation"]
        say(
            f"  total variation from the exact density: {tv['corrected']:.4f} "
            f"(noise floor {tv['noise_floor']:.4f})"
        )

    _job(config, "sample", ("step", "sample"), files).run(make, say)


def _write_result(result: FitResult, folder: Path) -> None:
    partial = folder / ".posterior.nc"
    partial.unlink(missing_ok=True)
    write_netcdf(result.idata, partial)
    os.replace(partial, folder / "posterior.nc")
    write_text(folder / "summary.json", json.dumps(result.summary(), indent=2) + "\n")


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


def _job(
    config: Config,
    verb: str,
    sections: tuple[str, ...],
    files: dict[str, Path] | None = None,
    **more: Any,
) -> Job:
    system = {"name": config.system.name, **config.system.arguments}
    settings = {
        "seed": config.seed,
        "system": system,
        **{name: config.section(name).model_dump(mode="json") for name in sections},
        **more,
    }
    device = str(as_device(config.device))
    return Job(verb, config.output / verb, settings, files or {}, device)


def _seed(config: Config, purpose: str) -> int:
    """A seed for one purpose, so that no two of them share random numbers."""
    key = [config.seed, 1 + PURPOSES.index(purpose)]
    return int(np.random.SeedSequence(key).generate_state(1)[0])
