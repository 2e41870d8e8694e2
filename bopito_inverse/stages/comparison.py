r"""The corrected model of a one-dimensional system beside the exact transfer operator.

The stationary density is compared by its total variation in 100 bins,

    TV = 1/2 sum_b |h_b - p_b|,

h_b the share of sampled frames in bin b and p_b the exact probability; its noise floor is the TV of
as many independent draws of the exact density. The kinetics are compared by the variance-normalised
autocorrelations of all features at multiples of the step: at all lags where the feature was not
fitted, and beyond the longest fitted lag where it was.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bopito_inverse import plots
from bopito_inverse.arguments import as_generator
from bopito_inverse.config import Config
from bopito_inverse.datasets import Trajectories
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.observables import Correlation
from bopito_inverse.observables.features import FEATURES
from bopito_inverse.sampling import sample
from bopito_inverse.stages.fit_figures import Curve, Truth
from bopito_inverse.stages.inputs import read_experiment, uncorrected_step
from bopito_inverse.systems import TransferOperator

N_BINS = 100
TAIL = 1e-5  # probability beyond the first and the last edge of the bins
N_UNCORRECTED = 500  # trajectories of the uncorrected model
N_CORRELATED = 2000  # trajectories that correlations are computed from
LONGEST = 15  # steps


def compare(
    config: Config,
    folder: Path,
    model: Interpolator,
    starts: Tensor,
    corrected: Trajectories,
    seed: int,
) -> dict[str, Any]:
    """Corrected and uncorrected trajectories against the exact operator, with figures."""
    exact = TransferOperator(config.system.build())
    uncorrected = sample_uncorrected(config, model, starts, seed)
    models = {"uncorrected": uncorrected, "corrected": corrected}
    n_frames = len(corrected.frames) - len(corrected)
    floor = exact.sample(n_frames, as_generator(seed, torch.device("cpu"), "floor"))
    edges = bins(exact)
    variation = {name: total_variation(exact, edges, later(x)) for name, x in models.items()}
    lags = compared_lags(config)
    _draw_densities(folder, exact, models, lags)
    return {
        "system": config.system.name,
        "exact_timescale": float(exact.timescales[0]),
        "total_variation": variation
        | {"noise_floor": total_variation(exact, edges, floor), "bins": N_BINS, "frames": n_frames},
        "lags": lags.tolist(),
        "correlations": {
            name: _correlations(name, exact, models, lags, unfitted(config, name, lags))
            for name in FEATURES
        },
    }


def verdict(report: dict[str, Any]) -> str:
    """The main number of a comparison."""
    variation = report["total_variation"]
    return (
        f"total variation from the exact density: {variation['corrected']:.4f} "
        f"(noise floor {variation['noise_floor']:.4f})"
    )


def truth(config: Config) -> Truth:
    """The exact operator, beside the fit."""
    exact = TransferOperator(config.system.build())

    def curve(obs: Correlation, longest: float) -> Curve:
        lags = np.linspace(0, longest, 200)
        return lags, exact.correlation(obs.a, obs.b, lags, obs.normalization)

    return Truth("exact", curve, float(exact.timescales[0]))


def bins(exact: TransferOperator) -> np.ndarray:
    """Edges of equal bins between far quantiles of the exact density; the outer are infinite."""
    cdf = np.cumsum(exact.stationary) * exact.spacing
    low, high = np.interp([TAIL, 1 - TAIL], cdf, exact.grid + exact.spacing / 2)
    edges = np.linspace(low, high, N_BINS + 1)
    return np.concatenate([[-np.inf], edges[1:-1], [np.inf]])


def total_variation(exact: TransferOperator, edges: np.ndarray, x: Tensor) -> float:
    """Total variation between frames and the exact density in bins."""
    cdf = np.cumsum(exact.stationary) * exact.spacing
    inner = np.interp(edges[1:-1], exact.grid + exact.spacing / 2, cdf)
    expected = np.diff(np.concatenate([[0.0], inner, [1.0]]))
    index = np.searchsorted(edges[1:-1], x.numpy().ravel())
    share = np.bincount(index, minlength=len(edges) - 1) / x.numel()
    return float(np.abs(share - expected).sum() / 2)


def unfitted(config: Config, name: str, lags: np.ndarray) -> np.ndarray:
    """Whether the correlation of a feature at each lag was not fitted, (L,)."""
    if config.experiment is None or name not in config.observable.features:
        return np.ones(len(lags), dtype=bool)
    measured, fitted = read_experiment(config)
    return lags > measured.lags[fitted].max()


def later(trajectories: Trajectories) -> Tensor:
    """All frames but the starts."""
    return _dense(trajectories)[:, 1:]


def compared_lags(config: Config) -> np.ndarray:
    """Lags at which correlations are compared, in frames, (L,)."""
    return config.section("step").step_lag * np.arange(1, 1 + min(LONGEST, config.sample.n_steps))


def sample_uncorrected(
    config: Config, model: Interpolator, starts: Tensor, seed: int
) -> Trajectories:
    """Trajectories of the trained model alone, from the first of the starts."""
    made = sample(
        model,
        uncorrected_step(config, model),
        starts=starts[:N_UNCORRECTED],
        n_steps=config.sample.n_steps,
        seed=seed,
        frame_time=config.system.build().frame_time,
        device=config.device,
    )
    assert made is not None  # only where a file is written
    return made


def _dense(trajectories: Trajectories) -> Tensor:
    return trajectories.frames.view(len(trajectories), -1)


def _correlations(
    name: str,
    exact: TransferOperator,
    models: dict[str, Trajectories],
    lags: np.ndarray,
    compared: np.ndarray,
) -> dict[str, Any]:
    """Autocorrelation of one feature: exact, and by each model with its error."""
    obs = Correlation(FEATURES[name], normalization="variance")
    truth = exact.correlation(obs.a, None, lags, "variance")
    report: dict[str, Any] = {"exact": truth.tolist(), "mean_abs_error": {}}
    report["compared_lags"] = lags[compared].tolist()
    for model, trajectories in models.items():
        steps = torch.arange(1, 1 + len(lags))
        some = [trajectories[i] for i in range(min(len(trajectories), N_CORRELATED))]
        value, spread = obs.from_trajectories(some, steps)
        report[model] = value.tolist()
        report[f"{model}_standard_error"] = spread.tolist()
        if compared.any():
            error = np.abs(value.numpy() - truth)[compared]
            report["mean_abs_error"][model] = float(error.mean())
    return report


def _draw_densities(
    folder: Path, exact: TransferOperator, models: dict[str, Trajectories], lags: np.ndarray
) -> None:
    """Transition densities from the deepest well, and stationary densities."""
    low, high = bins(exact)[[1, -2]]
    edges = np.linspace(low - 0.05 * (high - low), high + 0.05 * (high - low), 61)
    start = round(float(exact.grid[np.argmax(exact.stationary)]), 2)
    steps = sorted({1, min(3, len(lags)), len(lags)})
    rows: dict[str, Sequence[Any]] = {
        name: [_density_after(x, start, (high - low) / 60, k, edges) for k in steps]
        for name, x in models.items()
    }
    chosen = lags[np.array(steps) - 1]
    at = int(np.argmax(exact.stationary))
    inside = (exact.grid >= edges[0]) & (exact.grid <= edges[-1])
    rows["exact"] = [exact.transition_density(lag)[at, inside] for lag in chosen]
    grid, stationary = exact.grid[inside], exact.stationary[inside]
    figure = plots.transition_figure(grid, start, chosen, rows, stationary)
    plots.save(figure, folder / "transition")
    histograms = {name: np.histogram(later(x), edges, density=True) for name, x in models.items()}
    plots.save(plots.stationary_figure(grid, stationary, histograms), folder / "stationary")


def _density_after(
    trajectories: Trajectories, start: float, width: float, k: int, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Density of the frames `k` steps after all frames within `width` of `start`."""
    x = _dense(trajectories).numpy()
    here = np.abs(x[:, :-k] - start) < width
    count, _ = np.histogram(x[:, k:][here], edges)
    return count / max(1, count.sum()) / np.diff(edges), edges
