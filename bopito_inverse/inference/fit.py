r"""The fit of N_int to measured correlation functions, through the composite step.

The likelihood is that of `likelihood`, the parameters are those of `design`, the prior is uniform
in the levels of `prior`. A *pilot* emulator with few replicas over the whole family finds where the
posterior is, and how many replicas it takes for the Monte Carlo noise of the prediction not to
matter. The final emulator covers that interval; nodes are added where the posterior is, until the
error of the interpolation does not matter either. `explore` then gives the posterior.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bopito_inverse.arguments import Device, as_count, as_positive
from bopito_inverse.datasets import Array, Frames
from bopito_inverse.inference.design import Clock, Design
from bopito_inverse.inference.discrepancy import (
    INTERPOLATED_SD,
    LOCAL_SD,
    Discrepancy,
    mixture,
    other_step,
)
from bopito_inverse.inference.emulator import Coordinate, Emulator
from bopito_inverse.inference.explore import CHAINS, DRAWS, Explored
from bopito_inverse.inference.likelihood import Likelihood, Nuisance
from bopito_inverse.inference.posterior import ess_bulk, estimate
from bopito_inverse.inference.prediction import Prediction, as_observables
from bopito_inverse.inference.prior import Levels, Prior
from bopito_inverse.inference.problem import Problem
from bopito_inverse.inference.result import Draws, FitResult, one_or_all
from bopito_inverse.inference.status import judge, p_value
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.observables import Correlation, Experiment
from bopito_inverse.sampling.rollout import Renoise, Rollout, renoising_step

N_REPLICAS, TARGET_MC_FRACTION, MAX_REPLICAS = 4096, 0.1, 65536
FEWEST_REPLICAS = 32  # fewer do not say how far off their mean is
PILOT_NODES, PILOT_SHARE, PILOT_REPLICAS = 7, 8, 512
PILOT_TAIL = 1e-5  # posterior weight outside of the final interval
WIDE = 0.5  # share of the family beyond which a final interval saves nothing
EDGE_SHARE, EDGE_WEIGHT = 0.02, 1e-3  # outermost part of an interval, and what it may hold
LEAN_WIDTH, LEAN_MASS, LEAN_LIKELIHOOD = 0.02, 0.01, 0.1  # in u: leaning on an end of the family
EMULATOR_SHARE, MAX_NODES = 0.01, 12  # when to stop adding nodes
RELEVANT = 0.02  # squared size of a discrepancy, in units of the error, that counts


def fit(
    model: Interpolator,
    step: Rollout,
    obs: Correlation | Mapping[str, Correlation],
    exp: Experiment | Sequence[Experiment],
    starts: Array | Frames,
    prior: Any = None,
    mode: str = "rollout",
    seed: int = 0,
    n_replicas: int | None = None,
    device: Device | str = "auto",
    *,
    shared: bool = True,
    mask: np.ndarray | Sequence[bool] | None = None,
    clock: Clock | None = None,
    nuisance: Nuisance | Mapping[str, Nuisance] | None = None,
    dof: float | None = None,
    discrepancy: bool | float | str = "auto",
    target_mc_fraction: float | None = None,
    max_replicas: int = MAX_REPLICAS,
    uniform_share: float = 0.0,
) -> FitResult:
    """Fit N_int to measured correlation functions.

    Args:
        model: the interpolator.
        step: the composite step; it stands for `step.step_lag` frames.
        obs: the correlation function, normalised as in the experiment; or several by name, of
            which the experiment may hold some: the others can be predicted.
        exp: the measurement, or several; lags must be multiples of `step.step_lag` (rollout) or
            exceed `lag_max` (direct).
        starts: frames of the stationary density mu, (n, *event), or weighted `Frames`.
        prior: a frozen `scipy.stats` distribution of n_int, or a `Prior` of the weight or the
            timescale. By default u is uniform (see `emulator`): dynamics faster and slower than
            the data are equally likely, and among the faster ones w is uniform.
        mode: `rollout`, the k-fold composite step; or `direct`, one composite step for each
            measured lag, with its own n_int.
        seed: integer.
        n_replicas: rollouts at each node of the emulator. By default as many as
            `target_mc_fraction` needs, at least 4096; given with a target, the least number.
        device: `auto`, `cpu` or `cuda`.
        shared: whether several experiments have one n_int.
        mask: true for the points that are fitted, (L,) over all experiments; the others are held
            out.
        clock: ties the n_int of the lags of a direct fit.
        nuisance: priors of scale, offset and error bars, for all observables or by name.
        dof: degrees of freedom of Student-t errors of the experiment; Gaussian by default.
        discrepancy: whether the step itself may be wrong (see `discrepancy`); a number is the
            standard deviation of tau; `auto` leaves it out where it would not matter.
        target_mc_fraction: share of the posterior variance that Monte Carlo noise may have, in
            (0, 1), met to about a third of itself, by an estimate from few replicas; 0.1 where
            `n_replicas` is not given.
        max_replicas: limit to what `target_mc_fraction` may ask for.
        uniform_share: share of the replicas that start from all frames alike and are weighted
            instead (see `prediction`). Where a slow process leads to a state that is rare in mu but
            not among the frames (umbrella windows), far fewer replicas do with 0.5.

    Returns:
        The posterior, with a status that says whether to trust it.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    prior = prior if prior is None or isinstance(prior, Prior) else Prior(prior)
    experiments = _as_experiments(exp)
    observables = named_observables(obs, experiments)
    if not any(move.needs_n_int for move in step.moves):
        raise ValueError(f"step must have a move that depends on n_int, got {step}")
    coordinate = Coordinate(model.lag_max, model.lambda_hat, step.slower)
    design = Design(
        experiments, list(observables), step.step_lag, coordinate, mode, shared, clock, nuisance
    )
    _check_prior(prior, design)
    options = _Options(
        prior,
        None if dof is None else as_positive("dof", dof),
        _as_discrepancy(discrepancy),
        *_budget(n_replicas, target_mc_fraction, max_replicas),
        as_count("seed", seed, 0),
    )
    if options.dof is not None and np.count_nonzero(design.points.covariance) > len(design.points):
        raise ValueError("dof is for experiments with independent errors, got a covariance matrix")
    keep = _as_mask(mask, len(design.points))
    longest = [design.n_steps * step.step_lag]

    def predict(of: Rollout, replicas: int) -> Prediction:
        return Prediction(
            model, of, observables, longest, starts, seed, replicas, device, uniform_share
        )

    return _Fit(design, keep, options, step, predict).run()


@dataclass(frozen=True)
class _Options:
    prior: Prior | None
    dof: float | None
    discrepancy: float | None  # sd of tau, None for auto
    n_replicas: int
    target: float | None
    max_replicas: int
    seed: int


class _Fit:
    """The run of one fit: pilot, interval, budget, nodes, posterior."""

    def __init__(
        self, design: Design, keep: np.ndarray, options: _Options, step: Rollout, predict: Any
    ) -> None:
        self.design, self.keep, self.options = design, keep, options
        self.step, self.predict = step, predict
        self.coordinate = design.coordinate
        self.spent = 0  # rollouts

    def run(self) -> FitResult:
        """The posterior."""
        family = (self.coordinate.low, self.coordinate.high)
        prior = self.options.prior
        if prior is not None and prior.on != "timescale":
            Levels(prior, self.coordinate)  # refuses a prior with no mass before the work begins
        pilot = self._emulator(self.step, self._pilot_replicas, family, PILOT_NODES)
        _check_finite(pilot, self.design)
        first = self._problem(pilot)
        explored = first.explore(self.options.seed)
        n_replicas = self._replicas(first.shares(explored)["monte_carlo"])
        interval = self._interval(first, explored)
        if n_replicas == self._pilot_replicas and np.ptp(interval) > WIDE * np.ptp(family):
            emulator = pilot  # as good as another one
        else:
            emulator = self._emulator(self.step, n_replicas, interval)
        while True:
            problem, explored = self._refined(emulator, self._discrepancy(emulator))
            wider = self._wider(problem, explored)
            if wider == emulator.interval:
                break
            emulator = self._emulator(self.step, n_replicas, wider)
        return self._result(problem, explored, first)

    @property
    def _pilot_replicas(self) -> int:
        n = self.options.n_replicas
        return min(n, max(PILOT_REPLICAS, n // PILOT_SHARE))

    def _emulator(
        self, step: Rollout, replicas: int, interval: tuple[float, float], n_nodes: int = 5
    ) -> Emulator:
        made = Emulator(self.predict(step, replicas), self.coordinate, interval, n_nodes)
        self.spent += len(made.nodes) * made.prediction.n_replicas
        return made

    def _problem(self, emulator: Emulator, term: Discrepancy | None = None) -> Problem:
        likelihood = Likelihood(self.design.points[self.keep], emulator, term, self.options.dof)
        return Problem(self.design, self.keep, likelihood, self.options.prior)

    def _discrepancy(self, emulator: Emulator) -> Discrepancy | None:
        """The step against another one."""
        sd = self.options.discrepancy
        if sd == 0 or emulator.interval[0] >= 1:  # the trained model itself is what is fitted
            return None
        prediction = emulator.prediction
        if any(isinstance(move, Renoise) for move in self.step.moves):
            self.spent += prediction.n_replicas
            other = mixture(prediction, self.coordinate.lag_max)
            return Discrepancy(emulator, other, LOCAL_SD if sd is None else sd)
        local = renoising_step(self.coordinate.lag_max, self.step.step_lag, self.step.solver)
        known = self._emulator(local, self._pilot_replicas, (self.coordinate.low, 1.0))
        return Discrepancy(emulator, other_step(known), INTERPOLATED_SD if sd is None else sd)

    def _replicas(self, share: float) -> int:
        """Replicas that the target needs, from the Monte Carlo share of the pilot."""
        target, n = self.options.target, self.options.n_replicas
        if target is None:
            return n
        needed = _needed(share, self._pilot_replicas, target)
        return int(min(max(n, needed), max(n, self.options.max_replicas)))

    def _interval(self, pilot: Problem, explored: Explored) -> tuple[float, float]:
        """Where the posterior is, by the pilot, with a margin of a tenth."""
        inside = pilot.parameters(explored.above(PILOT_TAIL * explored.weights.max()).levels).u
        low, high = pilot.emulator.interval
        margin = max(0.1 * np.ptp(inside), 0.01 * (high - low))
        return max(low, inside.min() - margin), min(high, inside.max() + margin)

    def _wider(self, problem: Problem, explored: Explored) -> tuple[float, float]:
        """The interval, extended by its length where the posterior does not end before it."""
        low, high = problem.emulator.interval
        u = problem.parameters(explored.levels).u
        near = EDGE_SHARE * (high - low)
        left = explored.weights @ (u.min(1) < low + near) > EDGE_WEIGHT
        right = explored.weights @ (u.max(1) > high - near) > EDGE_WEIGHT
        family = self.coordinate
        return (
            max(family.low, 2 * low - high) if left else low,
            min(family.high, 2 * high - low) if right else high,
        )

    def _refined(self, emulator: Emulator, term: Discrepancy | None) -> tuple[Problem, Explored]:
        """The posterior, with nodes added until the error of the emulator does not matter."""
        while True:
            problem = self._problem(emulator, term)
            explored = problem.explore(self.options.seed)
            if self.options.discrepancy is None and not self._matters(problem, explored):
                term = None
                continue
            share = problem.shares(explored)["emulator"]
            if share < EMULATOR_SHARE or len(emulator.nodes) >= MAX_NODES:
                return problem, explored
            emulator.add(self._next_node(problem, explored))
            self.spent += emulator.prediction.n_replicas

    def _matters(self, problem: Problem, explored: Explored) -> bool:
        """Whether the discrepancy is of any size beside the other errors."""
        d_of = problem.likelihood.discrepancy
        if d_of is None:
            return True
        best = problem.parameters(explored.levels[[np.nanargmax(explored.log_density)]])
        without = problem.likelihood.varied(discrepancy=None).moments(best).total[0]
        points = problem.likelihood.points
        d = d_of(best.u[:, points.group], points.columns)[0] * best.scale[0]
        return bool(d @ np.linalg.solve(without, d) > RELEVANT)

    def _next_node(self, problem: Problem, explored: Explored) -> float:
        """Where the posterior is dense and no node is near."""
        emulator = problem.emulator
        low, high = emulator.interval
        u = problem.parameters(explored.levels).u
        density, edges = np.histogram(
            u, 60, (low, high), weights=np.repeat(explored.weights[:, None], u.shape[1], 1)
        )
        centre = (edges[1:] + edges[:-1]) / 2
        score = np.sqrt(density / density.max() + 1e-3) * emulator.remoteness(centre)
        return float(centre[np.argmax(score)])

    def _result(self, problem: Problem, explored: Explored, first: Problem) -> FitResult:
        draws = Draws(problem, explored, first, self.options.seed)
        shares = problem.shares(explored)
        best = problem.parameters(explored.levels[[draws.best]])
        moments = problem.likelihood.moments(best)
        residual = problem.likelihood.points.values - moments.mean[0]
        p = p_value(residual, moments.total[0], explored.levels.shape[1], self.options.dof)
        n_replicas = problem.emulator.prediction.n_replicas
        u = draws.parameters.u.reshape(CHAINS, DRAWS, -1)
        grouped = {name: draws.named[name] for name in ("n_int", "weight", "timescale")}
        estimates = {
            name: one_or_all([estimate(values[..., g]) for g in range(values.shape[-1])])
            for name, values in grouped.items()
        }
        scalars: dict[str, Any] = {
            "lag_max": self.coordinate.lag_max,
            "lambda_hat": self.coordinate.lambda_hat,
            "step_lag": self.design.step_lag,
            "n_replicas": n_replicas,
            "seed": self.options.seed,
        }
        return FitResult(
            **estimates,
            map=one_or_all([float(n) for n in self.coordinate.n_int(best.u[0])]),
            status=judge(
                leans_fast=_leans(problem, explored, self.coordinate.low),
                leans_slow=_leans(problem, explored, self.coordinate.high),
                p_value=p,
                monte_carlo_share=shares["monte_carlo"],
                learned=draws.learned,
            ),
            ess_bulk=min(ess_bulk(u[..., g]) for g in range(u.shape[-1])),
            p_value=p,
            variance_shares=shares,
            replicas_for_tenth=_needed(shares["monte_carlo"], n_replicas, 0.1),
            cost=self.spent / n_replicas,
            idata=draws.inference_data(scalars),
            **scalars,
            _problem=problem,
            _explored=explored,
        )


def _leans(problem: Problem, explored: Explored, edge: float) -> bool:
    """Whether neither the data nor the prior exclude an end of the family."""
    if edge not in problem.emulator.interval:
        return False
    close = np.abs(problem.parameters(explored.levels).u - edge) <= LEAN_WIDTH
    near = close.any(1) if problem.design.clock is None else close.all(1)
    if not near.any():
        return False
    top = np.nanmax(explored.log_density)
    likelihood = math.exp(np.nanmax(explored.log_density[near]) - top)
    return bool(likelihood > LEAN_LIKELIHOOD and explored.weights[near].sum() > LEAN_MASS)


def _needed(share: float, n_replicas: int, target: float) -> int:
    """Replicas at which Monte Carlo noise has a share of the variance, if it goes as 1 / n."""
    share = min(share, 0.99)
    return math.ceil(n_replicas * share * (1 - target) / ((1 - share) * target))


def _budget(
    n_replicas: int | None, target: float | None, max_replicas: int
) -> tuple[int, float | None, int]:
    if target is not None and not 0 < target < 1:
        raise ValueError(f"target_mc_fraction must lie in (0, 1), got {target}")
    most = as_count("max_replicas", max_replicas, FEWEST_REPLICAS)
    if n_replicas is None:
        return N_REPLICAS, TARGET_MC_FRACTION if target is None else target, most
    return as_count("n_replicas", n_replicas, FEWEST_REPLICAS), target, most


def _as_discrepancy(value: bool | float | str) -> float | None:
    """Standard deviation of tau, None for `auto`."""
    if value == "auto" or value is True:
        return None
    if isinstance(value, str) or not 0 <= value < math.inf:
        raise ValueError(f"discrepancy must be 'auto', a boolean or a number >= 0, got {value!r}")
    return float(value)


def _as_mask(mask: np.ndarray | Sequence[bool] | None, n: int) -> np.ndarray:
    if mask is None:
        return np.ones(n, dtype=bool)
    keep = np.asarray(mask)
    if keep.shape != (n,) or keep.dtype != bool or not keep.any():
        raise ValueError(
            f"mask must hold {n} booleans, at least one of them true, got shape {keep.shape} of "
            f"{keep.dtype} with {int(keep.sum())} true"
        )
    return keep


def _as_experiments(exp: Experiment | Sequence[Experiment]) -> list[Experiment]:
    experiments = list(exp) if isinstance(exp, Sequence) else [exp]
    for one in experiments:
        if not isinstance(one, Experiment):
            raise ValueError(f"exp must be an Experiment or several, got {type(one).__name__}")
    if not experiments:
        raise ValueError("exp must hold at least one experiment, got none")
    return experiments


def _check_prior(prior: Prior | None, design: Design) -> None:
    """Refuse a prior that would not be used, or not as it was meant."""
    if prior is None:
        return
    if design.clock is not None:
        raise ValueError("prior must be None with a clock, which has priors of its own")
    if prior.on == "timescale" and (design.group_lags != design.step_lag).any():
        raise ValueError(
            "prior on the timescale needs lags of one step_lag in mode 'direct', got lags "
            f"{design.group_lags.tolist()}; give it on n_int"
        )


def named_observables(
    obs: Correlation | Mapping[str, Correlation], experiments: Sequence[Experiment]
) -> dict[str, Correlation]:
    """Observables by the names that the experiments use."""
    names = list(dict.fromkeys(name for exp in experiments for name in exp.observables))
    if isinstance(obs, Correlation):
        if len(names) > 1:
            raise ValueError(
                f"exp must hold one observable for one obs, got {names}; give obs by name"
            )
        return {names[0]: obs}
    return as_observables(obs)


def _check_finite(pilot: Emulator, design: Design) -> None:
    """Refuse observables that do not vary, whose correlation says nothing."""
    for j, name in enumerate(design.names):
        column = pilot.value[:, j * design.n_steps : (j + 1) * design.n_steps]
        if not np.isfinite(column).all() or np.ptp(column) == 0 == np.ptp(column[0]):
            raise ValueError(
                f"obs {name!r} must vary between frames of mu, got a constant or a value that is "
                "not finite"
            )
