"""Figures of the fit: measured and fitted correlation functions, and the posterior."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bopito_inverse import plots
from bopito_inverse.config import Config
from bopito_inverse.datasets import Frames
from bopito_inverse.inference import FitResult, Prediction
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.observables import Correlation, Experiment
from bopito_inverse.stages import inputs

BAND = (0.03, 0.97)
N_REPLICAS = 1024  # of the uncorrected model

Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Truth:
    """What the fit is drawn beside, where it is known.

    Attributes:
        name: in legends.
        curve: a correlation up to some lag as (lags, values), or None; lags in frames.
        timescale: the slowest one in frames, or a pair of it and its standard error.
    """

    name: str = "exact"
    curve: Callable[[Correlation, float], Curve | None] = lambda obs, longest: None
    timescale: float | tuple[float, float] | None = None


def draw_fit(
    config: Config,
    folder: Path,
    result: FitResult,
    model: Interpolator,
    frames: Frames,
    measured: Experiment,
    fitted: np.ndarray,
    truth: Truth,
) -> None:
    """Figures of each correlation function and of the posterior."""
    observables = inputs.read_observables(config)
    lags, step = np.unique(measured.lags), inputs.uncorrected_step(config, model)
    prediction = Prediction(
        model,
        step,
        observables,
        lags,
        frames,
        config.seed,
        N_REPLICAS,
        config.device,
        config.fit.uniform_share,
    )
    with torch.no_grad():
        alone = prediction(float(model.lag_max)).cpu().numpy()
    for (name, obs), uncorrected in zip(observables.items(), alone, strict=True):
        mine = measured.observable == name
        own = measured.lags[mine]
        reached = own[own <= measured.lags[fitted].max()]
        if not len(reached):  # the model was followed to no lag of this one
            continue
        draws = result.predict(reached, name).reshape(-1, len(reached))
        figure = plots.correlation_figure(
            own,
            measured=(measured.values[mine], measured.sigma[mine]),
            fitted=(reached, draws.mean(0), *np.quantile(draws, BAND, axis=0)),
            uncorrected=uncorrected[np.isin(lags, own)],
            exact=truth.curve(obs, float(own.max())),
            ylabel=f"C(lag) of {name}",
            fitted_mask=fitted[mine],
            truth=truth.name,
        )
        plots.save(figure, folder / figure_name("correlation", name, len(observables)))
    posterior, prior = result.idata.posterior, config.fit.build_prior()
    figure = plots.posterior_figure(
        {name: posterior[name].values for name in ("n_int", "weight", "timescale")},
        lag_max=model.lag_max,
        exact_timescale=truth.timescale,
        prior=prior.distribution if prior is not None and prior.on == "n_int" else None,
        truth=truth.name,
    )
    plots.save(figure, folder / "posterior")


def figure_name(kind: str, of: str, n: int) -> str:
    """Name of a figure, with what it is of where there are several."""
    return kind if n == 1 else f"{kind}_{re.sub(r'[^0-9A-Za-z]+', '_', of).strip('_')}"
