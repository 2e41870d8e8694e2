r"""Simulation-based calibration: whether the posteriors of a fit mean what they say.

Parameters theta are drawn from the prior, data from what the model predicts for them plus the noise
of the experiment, and each data set is fitted. Averaged over the prior, the posterior of a correct
fit is the prior again, so that the rank of the truth among L independent posterior draws,

    r = #{l : theta_l < theta_true}    in 0, ..., L,

is uniform (Talts et al., arXiv 1804.06788), and an interval with probability p holds the truth in
a share p of all experiments. Posteriors that are too narrow make ranks pile up at both ends, too
wide ones in the middle, shifted ones at one end. That many truths lie where the data say nothing
does no harm.

The truths are predicted by one accurate emulator, with random numbers of its own, and each fit has
its own again: Monte Carlo noise of predictions is part of what is tested. What is *not* tested is
whether the step is the true dynamics (see `discrepancy`).
"""

import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, chisquare, norm

from bopito_inverse.arguments import as_count, as_positive
from bopito_inverse.datasets import Array, Frames
from bopito_inverse.fan_out import fan_out
from bopito_inverse.inference.design import Design
from bopito_inverse.inference.emulator import Coordinate, Emulator
from bopito_inverse.inference.fit import N_REPLICAS, fit, named_observables
from bopito_inverse.inference.likelihood import Likelihood, Parameters
from bopito_inverse.inference.prediction import Prediction
from bopito_inverse.inference.prior import Levels, Prior
from bopito_inverse.inference.problem import Problem
from bopito_inverse.inference.result import FitResult
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.observables import Correlation, Experiment
from bopito_inverse.observables.relaxation import timescale
from bopito_inverse.sampling.rollout import Rollout

LEVELS = (0.5, 0.8, 0.94)
DRAWS = 99  # posterior draws among which the truth is ranked
BINS, PER_BIN = (20, 10, 5, 4, 2), 5  # of the rank histogram, and the fewest expected in each
FLAG = 0.002  # chance below which a deviation is called one
TRUTH_SHARE = 16  # replicas of the truth by those of a fit
FIRST_NODES, MAX_NODES = 7, 40  # of the emulator of the truth
NEGLIGIBLE = 0.02  # mean squared error of this emulator, in units of the error of the data
TAIL = 1e-6  # of the prior, left out on either side


def calibrate(
    model: Interpolator,
    step: Rollout,
    obs: Correlation | Mapping[str, Correlation],
    exp: Experiment | Sequence[Experiment],
    starts: Array | Frames,
    *,
    n_experiments: int = 300,
    prior: Any = None,
    seed: int = 0,
    truth_replicas: int | None = None,
    noise_scale: float = 1.0,
    executor: Executor | int | None = None,
    progress: bool = False,
    **fit_options: Any,
) -> "Calibration":
    """Fit many simulated experiments, whose truths are known.

    Args:
        model, step, obs, starts: as in `fit`. `starts` should hold more frames than a fit has
            replicas: the finite set of frames counts as mu itself.
        exp: the experiment that is simulated: its lags, observables and errors. Its values are not
            used.
        n_experiments: number of simulated experiments, at least 10.
        prior: as in `fit`; the truths are drawn from it.
        seed: integer.
        truth_replicas: rollouts behind the truths; by default 16 times those of a fit. Their error
            is common to all experiments: see `Calibration.truth_error`.
        noise_scale: factor on the simulated noise. With 2, error bars are half of what they should
            be: a control that calibration must fail, or a look at what such error bars would do.
        executor: None for one fit after the other in this process; a number for that many
            processes; or anything with the interface of `concurrent.futures.Executor`, such as
            `dask.distributed.Client.get_executor()`. In other processes, `obs` must be made of
            functions at the top level of a module, and a script must call this below
            `if __name__ == "__main__":`.
        progress: show a progress bar.
        fit_options: other arguments of `fit`. `discrepancy` is left out by default, since the truth
            is the model itself.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: names the simulated experiment whose fit failed.
    """
    options: dict[str, Any] = {"discrepancy": False, **fit_options}
    inspect.signature(fit).bind(model, step, obs, exp, starts, prior=prior, seed=seed, **options)
    prior = prior if prior is None or isinstance(prior, Prior) else Prior(prior)
    experiments = [exp] if isinstance(exp, Experiment) else list(exp)
    replicas = truth_replicas or TRUTH_SHARE * (options.get("n_replicas") or N_REPLICAS)
    truth = _Truth(model, step, obs, experiments, starts, prior, seed, replicas, options)
    simulated = truth.simulate(
        as_count("n_experiments", n_experiments, 10),
        as_positive("noise_scale", noise_scale),
        np.random.default_rng([as_count("seed", seed, 0), 3]),
    )
    shared = {"model": model, "step": step, "obs": obs, "starts": starts, "prior": prior}
    made = fan_out(_fitted, shared | options, simulated, "simulated experiment", executor, progress)
    return _collected(made, replicas, truth.squared_error, seed)


@dataclass(frozen=True)
class Ranked:
    """One quantity in n simulated experiments.

    Attributes:
        truth: true values, (n,).
        mean, sd: of the posteriors, (n,).
        rank: of the truth among `DRAWS` posterior draws, in 0, ..., DRAWS, (n,).
        below: posterior probability below the truth, (n,).
        in_hdi: whether the shortest interval at each of `LEVELS` holds the truth, (n, 3).
    """

    truth: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    rank: np.ndarray
    below: np.ndarray
    in_hdi: np.ndarray

    @property
    def z(self) -> np.ndarray:
        """(mean - truth) / sd, (n,); NaN where a posterior reaches infinity."""
        finite = np.isfinite(self.mean) & np.isfinite(self.truth) & (self.sd > 0)
        z = (self.mean - self.truth)[finite] / self.sd[finite]
        out = np.full(len(self.mean), np.nan)
        out[finite] = z
        return out

    @property
    def histogram(self) -> np.ndarray:
        """Ranks counted in 20 bins, or fewer where experiments are few."""
        bins = next((b for b in BINS if len(self.rank) >= PER_BIN * b), BINS[-1])
        return np.histogram(self.rank, bins, (-0.5, DRAWS + 0.5))[0]

    @property
    def p_value(self) -> float:
        """Chance that uniform ranks deviate more (chi-squared)."""
        return float(chisquare(self.histogram).pvalue)


@dataclass(frozen=True)
class Coverage:
    """How often intervals of one quantity hold the truth.

    Attributes:
        quantity: name of the quantity.
        level: probability that the intervals claim.
        central, hdi: share of central and of shortest intervals that hold the truth.
        error: binomial standard error of these shares, if the claim is true.
    """

    quantity: str
    level: float
    central: float
    hdi: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """What came of fits whose truths are known.

    Attributes:
        quantities: `n_int`, `timescale` and nuisance parameters, by name; `n_int[1]` where there
            is one for each experiment or lag.
        statuses: how often each status came.
        truth_error: error of the truths, Monte Carlo and interpolation, in units of the posterior
            standard deviation. It is common to all experiments and can show as a shift.
        truth_replicas: rollouts behind the truths.
        seed: integer.
    """

    quantities: dict[str, Ranked]
    statuses: dict[str, int]
    truth_error: float
    truth_replicas: int
    seed: int

    @property
    def n_experiments(self) -> int:
        """Number of simulated experiments."""
        return sum(self.statuses.values())

    @property
    def ranks(self) -> dict[str, np.ndarray]:
        """Ranks of the truths, (n,) each, in 0, ..., 99."""
        return {name: ranked.rank for name, ranked in self.quantities.items()}

    @property
    def z_scores(self) -> dict[str, np.ndarray]:
        """(posterior mean - truth) / posterior sd, (n,) each; normal where posteriors are."""
        return {name: ranked.z for name, ranked in self.quantities.items()}

    @property
    def p_values(self) -> dict[str, float]:
        """Chance that uniform ranks deviate more (chi-squared)."""
        return {name: ranked.p_value for name, ranked in self.quantities.items()}

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """How often intervals hold the truth, for each quantity and level."""
        n = self.n_experiments
        return tuple(
            Coverage(
                name,
                level,
                float((np.abs(ranked.below - 0.5) <= level / 2).mean()),
                float(ranked.in_hdi[:, i].mean()),
                math.sqrt(level * (1 - level) / n),
            )
            for name, ranked in self.quantities.items()
            for i, level in enumerate(LEVELS)
        )

    def shift(self, name: str) -> float:
        """Mean rank, in standard errors from the middle: negative where posteriors lie too high.

        The standard error holds that of the truths, which is common to all experiments.
        """
        mean = (self.quantities[name].rank.mean() + 0.5) / (DRAWS + 1) - 0.5
        n = self.n_experiments
        return float(mean * math.sqrt(12 * n / (1 + n * self.truth_error**2)))

    @property
    def problems(self) -> tuple[str, ...]:
        """Sentences about what is wrong; none where nothing is."""
        found = [_coverage_problem(row, self.n_experiments) for row in self.coverage]
        for name, ranked in self.quantities.items():
            if 2 * norm.sf(abs(shift := self.shift(name))) < FLAG:
                side = "high" if shift < 0 else "low"
                found.append(f"posteriors of {name} lie too {side}, by {abs(shift):.1f} errors")
            elif ranked.p_value < FLAG and self._truth_known:
                found.append(f"ranks of {name} are not uniform (p = {ranked.p_value:.1g})")
        return tuple(problem for problem in found if problem)

    @property
    def calibrated(self) -> bool:
        """Whether no sign was found that posteriors are wrong."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """A sentence."""
        sentences = self.problems or (
            f"no sign in {self.n_experiments} experiments that the posteriors are wrong",
        )
        if not self._truth_known:
            sentences += (
                f"the truths themselves are known to {self.truth_error:.2f} posterior sd only: "
                "raise truth_replicas",
            )
        return "; ".join(sentences)

    @property
    def _truth_known(self) -> bool:
        """Whether the error of the truths is too small to be seen in so many experiments."""
        return self.n_experiments * self.truth_error**2 < 0.5

    def summary(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        quantities = {
            name: {
                "coverage": {
                    f"{row.level:g}": {"central": row.central, "hdi": row.hdi, "error": row.error}
                    for row in self.coverage
                    if row.quantity == name
                },
                "p_value": ranked.p_value,
                "shift": self.shift(name),
                "z": _finite(ranked.z),
                "rank": ranked.rank.tolist(),
                "truth": _finite(ranked.truth),
                "mean": _finite(ranked.mean),
                "sd": _finite(ranked.sd),
            }
            for name, ranked in self.quantities.items()
        }
        return {
            "quantities": quantities,
            "n_experiments": self.n_experiments,
            "statuses": self.statuses,
            "truth_error": self.truth_error,
            "truth_replicas": self.truth_replicas,
            "seed": self.seed,
            "calibrated": self.calibrated,
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        head = "".join(f"{level:>15.0%}" for level in LEVELS)
        lines = [f"{'covered by':24s}{head}{'p of ranks':>12s}{'shift':>8s}"]
        for name, ranked in self.quantities.items():
            rows = [row for row in self.coverage if row.quantity == name]
            for kind in ("central", "hdi"):
                cells = "".join(f"{getattr(row, kind):8.1%} +-{row.error:4.1%}" for row in rows)
                end = f"{ranked.p_value:12.2g}{self.shift(name):8.1f}" if kind == "central" else ""
                lines.append(f"{f'{name}, {kind}':24s}{cells}{end}")
        counts = ", ".join(f"{status} {count}" for status, count in self.statuses.items())
        return "\n".join([*lines, f"status   {counts}", f"verdict  {self.verdict}"])


@dataclass(frozen=True)
class _Simulated:
    """One simulated experiment: data, true values by name, and the seed of its fit."""

    experiments: list[Experiment]
    truth: dict[str, float]
    seed: int


class _Truth:
    """The model that the data are drawn from."""

    def __init__(
        self,
        model: Interpolator,
        step: Rollout,
        obs: Correlation | Mapping[str, Correlation],
        experiments: Sequence[Experiment],
        starts: Array | Frames,
        prior: Prior | None,
        seed: int,
        n_replicas: int,
        options: Mapping[str, Any],
    ) -> None:
        self.mc_scale = n_replicas / (options.get("n_replicas") or N_REPLICAS)
        self.squared_error = math.nan
        observables = named_observables(obs, experiments)
        coordinate = Coordinate(model.lag_max, model.lambda_hat, step.slower)
        named = {k: options[k] for k in ("mode", "shared", "clock", "nuisance") if k in options}
        design = Design(experiments, list(observables), step.step_lag, coordinate, **named)
        own_seed = int(np.random.SeedSequence([seed, 4]).generate_state(1)[0])
        longest, device = [design.n_steps * step.step_lag], options.get("device", "auto")
        prediction = Prediction(
            model, step, observables, longest, starts, own_seed, n_replicas, device
        )
        interval = _support(None if design.clock else prior, coordinate)
        emulator = Emulator(prediction, coordinate, interval, FIRST_NODES)
        self.likelihood = Likelihood(design.points, emulator, dof=options.get("dof"))
        everything = np.ones(len(design.points), dtype=bool)
        self.problem = Problem(design, everything, self.likelihood, prior)
        self.experiments = experiments

    def simulate(self, n: int, noise_scale: float, rng: np.random.Generator) -> list[_Simulated]:
        """Truths from the prior, and their data."""
        problem = self.problem
        width = problem.high - problem.low
        levels = problem.low + width * rng.random((n, len(width)))
        parameters = problem.parameters(levels)
        values = self._exact(parameters) + noise_scale * self.likelihood.noise(parameters, rng)
        named = self._values(levels, parameters)
        seeds = rng.integers(2**31, size=n)
        return [
            _Simulated(
                self._with(values[i]),
                {name: float(value[i]) for name, value in named.items()},
                int(seeds[i]),
            )
            for i in range(n)
        ]

    def _exact(self, parameters: Parameters) -> np.ndarray:
        """Data without noise, (n, L), with nodes added until the emulator's own error is small."""
        emulator = self.likelihood.emulator
        while True:
            mean, squared = zip(*map(self._with_error, parameters.split(1)), strict=True)
            self.squared_error = float(np.mean(squared))
            if self.squared_error < NEGLIGIBLE or len(emulator.nodes) >= MAX_NODES:
                return np.array(mean)
            worst = parameters.u[np.argmax(squared)]
            emulator.add(float(worst[np.argmax(emulator.remoteness(worst))]))

    def _with_error(self, parameters: Parameters) -> tuple[np.ndarray, float]:
        """Data (L,) of one truth, and the squared error in units of a fit's own."""
        points = self.likelihood.points
        made = self.likelihood.emulator(parameters.u[:, points.group], points.columns)
        moments = self.likelihood.varied(mc_scale=self.mc_scale, with_error=False).moments(
            parameters
        )
        error = parameters.scale[0] * made.error[0]
        return moments.mean[0], float(error @ np.linalg.solve(moments.total[0], error))

    def _values(self, levels: np.ndarray, parameters: Parameters) -> dict[str, np.ndarray]:
        """True values of everything that is ranked, (n,), named as in `_draws`."""
        design, u = self.problem.design, parameters.u
        columns = np.full(u.shape[1], self.problem.emulator.eigenvalue)
        eigenvalue = torch.from_numpy(self.problem.emulator(u, columns).mean)
        lags = torch.from_numpy(design.group_lags.astype(np.float64))
        groups = {
            "n_int": design.coordinate.n_int(u),
            "timescale": timescale(eigenvalue, lags).numpy(),
        }
        return _flat(groups) | design.extra_values(levels)

    def _with(self, values: np.ndarray) -> list[Experiment]:
        """The experiments with other values, (L,) over all of them."""
        ends = np.cumsum([len(exp) for exp in self.experiments])
        return [
            Experiment(exp.lags, own, exp.sigma, exp.covariance, exp.observable, exp.lag_unit)
            for exp, own in zip(self.experiments, np.split(values, ends[:-1]), strict=True)
        ]


def _support(prior: Prior | None, coordinate: Coordinate) -> tuple[float, float]:
    """The interval of u that holds the prior."""
    family = np.array([coordinate.low, coordinate.high])
    if prior is not None and prior.on != "timescale":
        levels = Levels(prior, coordinate)
        low, high = levels.of(family)
        tail = TAIL * (high - low)
        family = levels.u(np.array([low + tail, high - tail]))
    return float(family[0]), float(family[1])


def _fitted(shared: Mapping[str, Any], simulated: _Simulated) -> dict[str, Any]:
    """One fit, and where its truth lies in the posterior."""
    result = fit(exp=simulated.experiments, seed=simulated.seed, **shared)
    rng = np.random.default_rng([simulated.seed, 5])
    draws = _draws(result)
    return {
        "ranked": {name: _ranked(draws[name], x, rng) for name, x in simulated.truth.items()},
        "status": str(result.status),
        "replicas_share": result.monte_carlo_share * result.n_replicas,
    }


def _draws(result: FitResult) -> dict[str, np.ndarray]:
    """Posterior draws of everything that is ranked, by name."""
    posterior = result.idata.posterior
    groups = {name: posterior[name].values for name in ("n_int", "timescale")}
    derived = (*groups, "weight", "prediction")
    extra = {name: posterior[name].values for name in posterior.data_vars if name not in derived}
    size = groups["n_int"].shape[0] * groups["n_int"].shape[1]
    return _flat({name: x.reshape(size, -1) for name, x in groups.items()}) | {
        name: values.ravel() for name, values in extra.items()
    }


def _flat(groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values (n, n_groups) by name and group, (n,) each."""
    return {
        name if values.shape[1] == 1 else f"{name}[{g}]": values[:, g]
        for name, values in groups.items()
        for g in range(values.shape[1])
    }


def _ranked(draws: np.ndarray, truth: float, rng: np.random.Generator) -> tuple:
    """The numbers of `Ranked` for one experiment, from posterior draws (n,)."""
    thinned = draws[np.linspace(0, len(draws) - 1, DRAWS).astype(int)]
    ties = int((thinned == truth).sum())
    rank = int((thinned < truth).sum()) + int(rng.integers(ties + 1))
    below = (draws < truth).mean() + rng.random() * (draws == truth).mean()
    finite = bool(np.isfinite(draws).all())
    mean, sd = (draws.mean(), draws.std()) if finite else (np.inf, np.inf)
    in_hdi = [
        _in_hdi(np.sort(draws), truth, level) if finite else abs(below - 0.5) <= level / 2
        for level in LEVELS
    ]
    return truth, mean, sd, rank, below, in_hdi


def _in_hdi(ordered: np.ndarray, truth: float, level: float) -> bool:
    """Whether the shortest interval that holds a share of the draws holds the truth."""
    inside = math.floor(level * len(ordered))
    first = np.argmin(ordered[inside:] - ordered[: len(ordered) - inside])
    return bool(ordered[first] <= truth <= ordered[first + inside])


def _collected(
    made: list[dict[str, Any]], truth_replicas: int, squared_error: float, seed: int
) -> Calibration:
    quantities = {
        name: Ranked(*map(np.array, zip(*(one["ranked"][name] for one in made), strict=True)))
        for name in made[0]["ranked"]
    }
    counts = Counter(one["status"] for one in made)
    share = float(np.mean([one["replicas_share"] for one in made]))
    return Calibration(
        quantities,
        dict(counts.most_common()),
        math.sqrt(share / truth_replicas + squared_error),
        truth_replicas,
        seed,
    )


def _coverage_problem(row: Coverage, n: int) -> str | None:
    for kind, share in (("central", row.central), ("shortest", row.hdi)):
        if binomtest(round(share * n), n, row.level).pvalue < FLAG:
            wrong = "narrow" if share < row.level else "wide"
            return (
                f"posteriors of {row.quantity} are too {wrong}: {kind} intervals of "
                f"{row.level:.0%} hold the truth in {share:.0%}"
            )
    return None


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(x) if np.isfinite(x) else None for x in values]
