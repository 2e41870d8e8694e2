r"""The fit of one N_int to a measured correlation function, through the composite step.

The measurement y at lags k Delta is Gaussian about the k-fold composite step,

    y | u ~ N(g(u), Sigma_exp + Sigma_mc(u)),

where Sigma_mc is the Monte Carlo covariance of the prediction itself. A pilot emulator over the
whole family finds where the posterior is; the final one covers that interval with all replicas;
the posterior is then exact quadrature over the coordinate u (see `emulator`).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from bopito_inverse.arguments import Device, as_count
from bopito_inverse.datasets import Array, Frames
from bopito_inverse.inference.diagnostics import Status, judge, p_value
from bopito_inverse.inference.emulator import Coordinate, Emulator
from bopito_inverse.inference.posterior import (
    Estimate,
    ess_bulk,
    estimate,
    inference_data,
)
from bopito_inverse.inference.prediction import Prediction
from bopito_inverse.inference.timescale import timescale
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.observables import Correlation, Experiment
from bopito_inverse.sampling.rollout import Rollout

CHAINS, DRAWS = 4, 1000
GRID = 1001
PILOT_NODES, PILOT_SHARE = 9, 8
PILOT_DROP = 12.0  # log density below the peak at which the final interval ends
CUT_DENSITY = 1e-4  # density over its peak above which an interval is too narrow
PRIOR_LEVELS = np.linspace(1e-6, 1 - 1e-6, 501)  # quantiles of a prior that the grid holds
EDGE_WIDTH, EDGE_MASS, EDGE_LIKELIHOOD = 0.02, 0.01, 0.1  # in u: a posterior that leans on an end


@dataclass(frozen=True)
class FitResult:
    """The posterior of N_int and of what follows from it.

    Attributes:
        n_int: interpolation parameter, in frames.
        weight: w = lambda_hat^(n_int - lag_max).
        timescale: implied timescale of the composite step, in frames.
        map: n_int at the maximum of the density of u, or of n_int where it has a prior.
        status: `ok`, or a code with a `message` that says what to do.
        ess_bulk: effective sample size of the draws.
        p_value: chance of a larger squared residual than that at `map` (chi-squared).
        monte_carlo_share: part of the posterior variance of u that more replicas would remove.
        idata: ArviZ InferenceData.
        lag_max, lambda_hat, step_lag, n_replicas, seed: what the fit was made with.
    """

    n_int: Estimate
    weight: Estimate
    timescale: Estimate
    map: float
    status: Status
    ess_bulk: float
    p_value: float
    monte_carlo_share: float
    idata: Any
    lag_max: int
    lambda_hat: float
    step_lag: int
    n_replicas: int
    seed: int
    _emulator: Emulator
    _prediction: Prediction

    def summary(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        estimates = {
            name: getattr(self, name).to_dict() for name in ("n_int", "weight", "timescale")
        }
        scalars = {
            name: getattr(self, name)
            for name in (
                "ess_bulk",
                "p_value",
                "monte_carlo_share",
                "lag_max",
                "lambda_hat",
                "step_lag",
                "n_replicas",
                "seed",
            )
        }
        scalars["map"] = self.map if math.isfinite(self.map) else None
        return estimates | scalars | {"status": str(self.status), "message": self.status.message}

    def __str__(self) -> str:
        return (
            f"N_int      {self.n_int}\nweight     {self.weight}\n"
            f"timescale  {self.timescale}\nstatus     {self.status}: {self.status.message}"
        )

    def predict(self, lags: np.ndarray) -> np.ndarray:
        """Posterior draws of the correlation at other lags, (chains, draws, L).

        Args:
            lags: multiples of `step_lag` up to the longest lag that was fitted, in frames.
        """
        steps = self._prediction.steps_of(lags)
        if steps.max() > self._emulator.n_steps:
            longest = self._emulator.n_steps * self.step_lag
            raise ValueError(f"lags must be at most {longest:g} (the longest fitted), got {lags}")
        u = self._emulator.coordinate.from_n_int(self.idata.posterior["n_int"].values)
        mean, covariance = self._emulator(u.ravel())
        noise = _gaussian(_block(covariance, steps - 1), np.random.default_rng([self.seed, 1]))
        return (mean[:, steps - 1] + noise).reshape(*u.shape, -1)


def fit(
    model: Interpolator,
    step: Rollout,
    obs: Correlation,
    exp: Experiment,
    starts: Array | Frames,
    prior: Any = None,
    mode: str = "rollout",
    seed: int = 0,
    n_replicas: int = 4096,
    device: Device | str = "auto",
) -> FitResult:
    """Fit N_int to a measured correlation function.

    Args:
        model: the interpolator.
        step: the composite step; it stands for `step.step_lag` frames.
        obs: the correlation function, normalised as in the experiment.
        exp: the measurement, of one observable; lags must be multiples of `step.step_lag`.
        starts: frames of the stationary density mu, (n, *event), or weighted `Frames`.
        prior: a frozen `scipy.stats` distribution of n_int. By default u is uniform (see
            `emulator`): dynamics faster and slower than the data are equally likely, and among
            the faster ones w is uniform.
        mode: `rollout`, the k-fold composite step.
        seed: integer.
        n_replicas: rollouts at each node of the emulator.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        The posterior, with a status that says whether to trust it.

    Raises:
        ValueError: lags that are not multiples of the step, several observables, a prior with no
            density in the family, starts of the wrong shape.
    """
    if mode != "rollout":
        raise ValueError(f"mode must be 'rollout', got {mode!r}")
    if len(exp.observables) != 1:
        raise ValueError(f"exp must hold one observable, got {exp.observables}; use exp.select")
    exp.steps(step.step_lag)
    coordinate = Coordinate(model.lag_max, model.lambda_hat)
    if prior is not None:
        _check(prior, coordinate)
    whole = (coordinate.low, coordinate.high)

    def predict(replicas: int) -> Prediction:
        return Prediction(model, step, obs, exp.lags, starts, seed, replicas, device)

    pilot_replicas = max(256, as_count("n_replicas", n_replicas, 4) // PILOT_SHARE)
    pilot = Emulator(predict(min(pilot_replicas, n_replicas)), coordinate, whole, PILOT_NODES)
    prediction = predict(n_replicas)
    wider = _interval(_Posterior(pilot, exp, prediction.steps, prior, mc_scale=4.0))
    interval = None
    while wider != interval:
        interval = wider
        emulator = Emulator(prediction, coordinate, interval)
        posterior = _Posterior(emulator, exp, prediction.steps, prior)
        wider = posterior.wider()
    return _result(posterior, prediction, model, step, n_replicas, seed)


class _Posterior:
    """The posterior density on a grid of an emulator's interval.

    The density is that of `axis`, u for the default prior and -n_int for a prior on n_int, which
    is as well behaved as that prior; either increases with u.
    """

    def __init__(
        self,
        emulator: Emulator,
        exp: Experiment,
        steps: np.ndarray,
        prior: Any,
        mc_scale: float = 1.0,
    ) -> None:
        self.emulator, self.exp, self.columns = emulator, exp, steps - 1
        self.u = _grid(emulator, prior)
        self.axis = self.u if prior is None else -emulator.coordinate.n_int(self.u)
        mean, covariance = emulator(self.u)
        self.prediction = mean[:, self.columns]
        self.residual = exp.values - self.prediction
        self.covariance = exp.covariance + mc_scale * _block(covariance, self.columns)
        self.log_prior = _log_prior(prior, emulator.coordinate, self.u)
        self.log_likelihood = _log_normal(self.residual, self.covariance)
        self.log_density = self.log_prior + self.log_likelihood
        if not np.isfinite(self.log_density).any():
            raise ValueError("prior must have density where the model can be, n_int above 1 frame")
        self.density = self._normalised(self.log_density)

    def _normalised(self, log_density: np.ndarray) -> np.ndarray:
        density = np.exp(log_density - np.nanmax(log_density))
        return density / np.trapezoid(density, self.axis)

    def wider(self) -> tuple[float, float]:
        """The interval, extended by its length where the posterior does not end before it."""
        low, high = self.emulator.interval
        family, limit = self.emulator.coordinate, CUT_DENSITY * self.density.max()
        left, right = self.density[0] > limit, self.density[-1] > limit
        return (
            max(family.low, 2 * low - high) if left else low,
            min(family.high, 2 * high - low) if right else high,
        )

    def leans(self, edge: float) -> bool:
        """Whether neither the data nor the prior exclude an end of the family."""
        if edge not in self.emulator.interval:
            return False
        near = np.abs(self.u - edge) <= EDGE_WIDTH
        likelihood = np.exp(self.log_likelihood[near].max() - self.log_likelihood.max())
        mass = np.trapezoid(np.where(near, self.density, 0.0), self.axis)
        return bool(likelihood > EDGE_LIKELIHOOD and mass > EDGE_MASS)

    def variance(self, density: np.ndarray) -> float:
        """Variance of u under a density on the grid."""
        mean = np.trapezoid(density * self.u, self.axis)
        return float(np.trapezoid(density * (self.u - mean) ** 2, self.axis))

    def monte_carlo_share(self) -> float:
        """1 - (variance with no Monte Carlo noise) / variance."""
        exact = np.broadcast_to(self.exp.covariance, self.covariance.shape)
        sharp = self._normalised(self.log_prior + _log_normal(self.residual, exact))
        return max(0.0, 1 - self.variance(sharp) / self.variance(self.density))

    def draws(self, rng: np.random.Generator) -> np.ndarray:
        """Draws of u, (CHAINS, DRAWS), one from each of equally likely strata."""
        n = CHAINS * DRAWS
        cdf = np.concatenate([[0], np.cumsum(np.diff(self.axis) * _midpoints(self.density))])
        drawn = np.interp((np.arange(n) + rng.random(n)) / n, cdf / cdf[-1], self.axis)
        u = drawn if self.axis is self.u else self.emulator.coordinate.from_n_int(-drawn)
        return rng.permutation(u).reshape(CHAINS, DRAWS)


def _interval(pilot: _Posterior) -> tuple[float, float]:
    """Where the posterior can be, by the pilot, with a margin of a tenth."""
    inside = pilot.u[pilot.log_density > np.nanmax(pilot.log_density) - PILOT_DROP]
    low, high = pilot.emulator.interval
    margin = max(0.1 * (inside[-1] - inside[0]), 0.01 * (high - low))
    return max(low, inside[0] - margin), min(high, inside[-1] + margin)


def _result(
    posterior: _Posterior,
    prediction: Prediction,
    model: Interpolator,
    step: Rollout,
    n_replicas: int,
    seed: int,
) -> FitResult:
    emulator, exp = posterior.emulator, posterior.exp
    coordinate = emulator.coordinate
    rng = np.random.default_rng([seed, 0])
    u = posterior.draws(rng)
    eigenvalue, predicted = _given_data(posterior, u.ravel(), rng)
    shape = (CHAINS, DRAWS)
    draws = {
        "n_int": coordinate.n_int(u),
        "weight": coordinate.weight(u),
        "timescale": timescale(torch.from_numpy(eigenvalue), step.step_lag).numpy().reshape(shape),
        "prediction": predicted.reshape(*shape, -1),
    }
    noise = rng.multivariate_normal(np.zeros(len(exp)), exp.covariance, size=u.size)
    scalars: dict[str, Any] = {
        "lag_max": model.lag_max,
        "lambda_hat": model.lambda_hat,
        "step_lag": step.step_lag,
        "n_replicas": n_replicas,
        "seed": seed,
    }
    best = int(np.nanargmax(posterior.log_density))
    p = p_value(posterior.residual[best], posterior.covariance[best])
    share = posterior.monte_carlo_share()
    return FitResult(
        n_int=estimate(draws["n_int"]),
        weight=estimate(draws["weight"]),
        timescale=estimate(draws["timescale"]),
        map=float(coordinate.n_int(posterior.u[best])),
        status=judge(posterior.leans(coordinate.low), posterior.leans(coordinate.high), p, share),
        ess_bulk=ess_bulk(u),
        p_value=p,
        monte_carlo_share=share,
        idata=inference_data(
            draws,
            draws["prediction"] + noise.reshape(*shape, -1),
            _pointwise(posterior, u),
            exp.values,
            {"sigma": exp.sigma, **scalars},
            exp.lags,
        ),
        _emulator=emulator,
        _prediction=prediction,
        **scalars,
    )


def _pointwise(posterior: _Posterior, u: np.ndarray) -> np.ndarray:
    """Log likelihood of each point by itself at each draw, (CHAINS, DRAWS, L)."""
    variance = np.diagonal(posterior.covariance, axis1=1, axis2=2)

    def at(columns: np.ndarray) -> np.ndarray:
        return np.stack([np.interp(u, posterior.u, column) for column in columns.T], axis=-1)

    sd = np.sqrt(at(variance))
    return norm.logpdf(posterior.exp.values, at(posterior.prediction), sd)


def _given_data(
    posterior: _Posterior, u: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of the second eigenvalue (n,) and of the true prediction (n, L) given u and the data.

    The Monte Carlo errors of both are jointly Gaussian with that of the prediction that was
    compared with the data, so that the residual says something about them.
    """
    mean, covariance = posterior.emulator(u)
    columns = np.append(posterior.columns, mean.shape[1] - 1)
    mean, covariance = mean[:, columns], _block(covariance, columns)
    total = posterior.exp.covariance + covariance[:, :-1, :-1]
    gain = np.linalg.solve(total, covariance[:, :-1, :]).transpose(0, 2, 1)  # (n, L + 1, L)
    residual = posterior.exp.values - mean[:, :-1]
    conditional = mean + np.einsum("nij,nj->ni", gain, residual)
    remaining = covariance - gain @ covariance[:, :-1, :]
    drawn = conditional + _gaussian(remaining, rng)
    return drawn[:, -1], drawn[:, :-1]


def _grid(emulator: Emulator, prior: Any) -> np.ndarray:
    """Where the posterior is computed: even in u, and at the quantiles of a prior on n_int."""
    low, high = emulator.interval
    u = np.linspace(low, high, GRID)
    if prior is None:
        return u
    n = prior.ppf(PRIOR_LEVELS)
    beyond = np.array([n[0] - 1e-3 * np.ptp(n), n[-1] + 1e-3 * np.ptp(n)])  # ends of a box
    own = emulator.coordinate.from_n_int(np.maximum(np.concatenate([n, beyond]), 1e-9))
    u = np.unique(np.concatenate([u, own[(own > low) & (own < high)]]))
    return u[u > 0]


def _check(prior: Any, coordinate: Coordinate) -> None:
    """Refuse what is no distribution, or has no mass in the family, before anything is computed."""
    if not hasattr(prior, "logpdf"):
        raise ValueError(f"prior must be a frozen scipy.stats distribution, got {prior!r}")
    shortest = float(coordinate.n_int(np.array(coordinate.high)))
    if not prior.sf(shortest) > 0:
        raise ValueError(f"prior must have mass at n_int above {shortest:g} frames, got none")


def _log_prior(prior: Any, coordinate: Coordinate, u: np.ndarray) -> np.ndarray:
    return np.zeros_like(u) if prior is None else prior.logpdf(coordinate.n_int(u))


def _log_normal(residual: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """log N(residual; 0, covariance) for each row, (G,)."""
    root = np.linalg.cholesky(covariance)
    z = np.linalg.solve(root, residual[..., None])[..., 0]
    log_det = np.log(np.diagonal(root, axis1=1, axis2=2)).sum(1)
    return -0.5 * (z**2).sum(1) - log_det - 0.5 * residual.shape[1] * math.log(2 * math.pi)


def _gaussian(covariance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw of N(0, covariance) for each (n, L, L); numerically singular ones allowed."""
    values, vectors = np.linalg.eigh(covariance)
    z = rng.standard_normal(values.shape) * np.sqrt(np.clip(values, 0, None))
    return np.einsum("nij,nj->ni", vectors, z)


def _block(covariance: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Rows and columns of every matrix of (n, M, M)."""
    return covariance[:, columns[:, None], columns]


def _midpoints(values: np.ndarray) -> np.ndarray:
    return (values[1:] + values[:-1]) / 2
