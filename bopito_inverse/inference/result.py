r"""What a fit returns: draws of everything that follows from N_int, and their summaries."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bopito_inverse.inference.explore import CHAINS, DRAWS, Explored
from bopito_inverse.inference.likelihood import gaussian
from bopito_inverse.inference.posterior import Estimate, inference_data
from bopito_inverse.inference.problem import Problem
from bopito_inverse.inference.status import Status
from bopito_inverse.observables.relaxation import timescale

PRIOR_DRAWS = 1000

Estimates = Estimate | tuple[Estimate, ...]


@dataclass(frozen=True)
class FitResult:
    """The posterior of N_int and of what follows from it.

    Attributes:
        n_int: interpolation parameter, in frames; one estimate, or one for each experiment or lag
            where these have their own.
        weight: w = lambda_hat^(n_int - lag_max).
        timescale: implied timescale of the composite step, in frames.
        map: n_int at the highest posterior density of the quantity that the prior describes.
        status: `ok`, or a code with a `message` that says what to do.
        ess_bulk: effective sample size of the draws.
        p_value: chance of a larger squared residual than that at `map` (chi-squared).
        variance_shares: part of the posterior variance of u that would go away without the
            Monte Carlo noise of the prediction, the error of the emulator, and the discrepancy;
            the rest is due to the experiment and the prior.
        replicas_for_tenth: replicas that would bring the Monte Carlo share to 10 %.
        cost: predictions of `n_replicas` rollouts that the fit was worth.
        idata: ArviZ InferenceData.
        lag_max, lambda_hat, step_lag, n_replicas, seed: what the fit was made with.
    """

    n_int: Estimates
    weight: Estimates
    timescale: Estimates
    map: float | tuple[float, ...]
    status: Status
    ess_bulk: float
    p_value: float
    variance_shares: dict[str, float]
    replicas_for_tenth: int
    cost: float
    idata: Any
    lag_max: int
    lambda_hat: float
    step_lag: int
    n_replicas: int
    seed: int
    _problem: Problem
    _explored: Explored

    @property
    def monte_carlo_share(self) -> float:
        """Part of the posterior variance of u that more replicas would remove."""
        return self.variance_shares["monte_carlo"]

    def summary(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        estimates = {
            name: plain(getattr(self, name), Estimate.to_dict)
            for name in ("n_int", "weight", "timescale")
        }
        scalars = {
            name: getattr(self, name)
            for name in (
                "ess_bulk",
                "p_value",
                "monte_carlo_share",
                "variance_shares",
                "replicas_for_tenth",
                "cost",
                "lag_max",
                "lambda_hat",
                "step_lag",
                "n_replicas",
                "seed",
            )
        }
        scalars["map"] = plain(self.map, lambda value: value if math.isfinite(value) else None)
        return estimates | scalars | {"status": str(self.status), "message": self.status.message}

    def __str__(self) -> str:
        rows = [
            (name if i == 0 else "", str(one))
            for name, key in (("N_int", "n_int"), ("weight", "weight"), ("timescale", "timescale"))
            for i, one in enumerate(as_tuple(getattr(self, key)))
        ]
        shares = [f"{part.replace('_', ' ')} {x:.0%}" for part, x in self.variance_shares.items()]
        rows += [
            ("variance", f"{', '.join(shares)}; the rest is the experiment's"),
            ("status", f"{self.status}: {self.status.message}"),
        ]
        return "\n".join(f"{name:10s} {text}" for name, text in rows)

    def predict(
        self,
        lags: np.ndarray | Sequence[float],
        observable: str | None = None,
        experiment: int = 0,
    ) -> np.ndarray:
        """Posterior draws of the true correlation at other lags, (chains, draws, L).

        They hold all uncertainty but the noise of a measurement.

        Args:
            lags: rollout: multiples of `step_lag` up to the longest lag of the experiments, in
                frames; direct: lags that were measured.
            observable: name of the observable, which need not have been measured; by default the
                first one.
            experiment: whose n_int, by index, where each has its own.
        """
        return self._problem.predict(self._explored, lags, observable, experiment)


class Draws:
    """Posterior draws of everything, and draws of the prior.

    Args:
        problem: the posterior.
        explored: the same, explored.
        pilot: the problem of the pilot, which knows the whole family.
        seed: integer.

    Attributes:
        best: index of the explored point with the highest posterior density.
        learned: part of the prior spread of n_int (as levels) that the data took away.
        named: draws of `n_int`, `weight` and `timescale`, (CHAINS, DRAWS, n_groups).
        prediction: draws of the true prediction of each fitted point, (CHAINS DRAWS, L).
    """

    def __init__(self, problem: Problem, explored: Explored, pilot: Problem, seed: int) -> None:
        self.problem, self.pilot = problem, pilot
        self.rng = np.random.default_rng([seed, 2])
        design, likelihood = problem.design, problem.likelihood
        levels = explored.draws.reshape(CHAINS * DRAWS, -1)
        self.levels, self.parameters = levels, problem.parameters(levels)
        u = self.parameters.u
        density = explored.log_density + problem.levels.log_density(
            problem.parameters(explored.levels).u
        ).sum(1)
        self.best = int(np.nanargmax(density))
        n_own = 1 if design.clock else design.n_groups
        width = (pilot.high - pilot.low)[:n_own] / math.sqrt(12)
        self.learned = float(1 - (levels[:, :n_own].std(0) / width).min())
        points, groups = likelihood.points, np.arange(u.shape[1])
        extra = np.concatenate([u, u[:, points.group]], axis=1)
        columns = np.concatenate(
            [np.full(len(groups), problem.emulator.eigenvalue), points.columns]
        )
        drawn = likelihood.draw(self.parameters, extra, columns, self.rng)
        eigenvalue, self.prediction = drawn[:, : len(groups)], drawn[:, len(groups) :]
        shape = (CHAINS, DRAWS, -1)
        lags = torch.from_numpy(design.group_lags.astype(np.float64))
        self.named = {
            "n_int": design.coordinate.n_int(u).reshape(shape),
            "weight": design.coordinate.weight(u).reshape(shape),
            "timescale": timescale(torch.from_numpy(eigenvalue), lags).numpy().reshape(shape),
        }

    def inference_data(self, scalars: dict[str, Any]) -> Any:
        """All groups of an InferenceData."""
        problem, design = self.problem, self.problem.design
        likelihood, parameters = problem.likelihood, self.parameters
        points = likelihood.points
        a, b = parameters.scale, parameters.offset
        replicated = a * self.prediction + b + likelihood.noise(parameters, self.rng)
        own = {
            name: values.reshape(CHAINS, DRAWS)
            for name, values in design.extra_values(self.levels).items()
        }
        groups = {
            name: values[..., 0] if values.shape[-1] == 1 else values
            for name, values in self.named.items()
        }
        prior, prior_predictive = self._prior()
        shape = (CHAINS, DRAWS, -1)
        return inference_data(
            posterior=groups | own | {"prediction": self.prediction.reshape(shape)},
            posterior_predictive=replicated.reshape(shape),
            log_likelihood=likelihood.pointwise(parameters).reshape(shape),
            prior=prior,
            prior_predictive=prior_predictive,
            observed=points.values,
            constant={"sigma": np.sqrt(np.diagonal(points.covariance)), **scalars},
            lags=points.lags,
            observables=[design.names[j] for j in points.observable],
            groups=design.group_lags if design.mode == "direct" else np.arange(design.n_groups),
        )

    def _prior(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Draws (1, PRIOR_DRAWS) of the prior, and of what it predicts, (1, PRIOR_DRAWS, L)."""
        pilot, design = self.pilot, self.pilot.design
        width = pilot.high - pilot.low
        levels = pilot.low + width * self.rng.random((PRIOR_DRAWS, len(width)))
        parameters = pilot.parameters(levels)
        moments = pilot.likelihood.moments(parameters)
        replicated = (
            moments.mean
            + gaussian(moments.model, self.rng)
            + pilot.likelihood.noise(parameters, self.rng)
        )
        u = parameters.u if design.n_groups > 1 else parameters.u[:, 0]
        drawn = {
            "n_int": design.coordinate.n_int(u),
            "weight": design.coordinate.weight(u),
            **design.extra_values(levels),
        }
        return {name: values[None] for name, values in drawn.items()}, replicated[None]


def as_tuple(value: Any) -> tuple:
    """A tuple, of one value where there is one."""
    return value if isinstance(value, tuple) else (value,)


def one_or_all(values: list) -> Any:
    """The only value, or a tuple of them."""
    return values[0] if len(values) == 1 else tuple(values)


def plain(value: Any, convert: Callable[[Any], Any]) -> Any:
    """A value or each of a tuple, converted for JSON."""
    converted = [convert(one) for one in as_tuple(value)]
    return converted if isinstance(value, tuple) else converted[0]
