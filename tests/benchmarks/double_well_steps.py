"""Composite steps for the double wells as matrices, fitted to the exact correlation.

See `bench_steps` for the closed forms and the manner. No Monte Carlo: moves with no closed form are
made at quantiles of their noise.
"""

from collections.abc import Callable
from functools import cached_property, partial

import numpy as np
import torch
from bench_steps import Case, at, correlation, exact_correlation, mixture, relaxed, renoising
from double_well import EXPERIMENT, HONEST_LAGS, LONGEST, SIMULATION
from scipy.optimize import minimize_scalar
from scipy.special import ndtr
from torch import Tensor

import bopito_inverse as bi
from bopito_inverse.sampling import DPMSolver, Propagate, Renoise, Rollout
from bopito_inverse.sampling.rollout import Move

EVALUATIONS = 20
QUANTILES = np.linspace(-6, 6, 241)  # of the noise of a move


class Exact(Case):
    """Both systems with exact scores; moves with no closed form by quantiles of their noise."""

    def __init__(self, lag_max: int, delta: int) -> None:
        super().__init__(EXPERIMENT, lag_max, delta, learnt=SIMULATION)
        self.psi = self.exact.eigenfunctions[:, 1]

    def moved(self, move: Move, w: float, clock: float) -> np.ndarray:
        n = self.model.n_int(torch.tensor(w)) if w < 1 else torch.tensor(clock * self.lag_max)
        return move_matrix(self, move, n.float())


class Trained(Exact):
    """The same with trained scores."""

    def __init__(self, model: bi.Interpolator, delta: int) -> None:
        super().__init__(model.lag_max, delta)
        self._model = model

    @cached_property
    def model(self) -> bi.Interpolator:
        return self._model

    def relax(self, lag: float) -> np.ndarray:
        return self.moved(Propagate(lag), 1.0, 1.0) if lag > 0 else np.eye(len(self.x))

    def renoise(self, w: float) -> np.ndarray:
        return self.moved(Renoise(), w, 1.0)


def move_matrix(
    case: Exact, move: Move, n_int: Tensor, evaluations: int = EVALUATIONS
) -> np.ndarray:
    """The matrix of a move that draws noise once, between cells of the grid."""
    m, half = len(QUANTILES), case.exact.spacing / 2
    step = Rollout([move], 1, DPMSolver(evaluations))
    z = torch.from_numpy(QUANTILES).float()[:, None]
    starts = torch.from_numpy(case.x).float().repeat_interleave(m)[:, None]
    with torch.no_grad():
        made = [
            next(step.frames(case.model, part, n_int, 1, lambda y: z.repeat(len(y) // m, 1)))
            for part in starts.split(20 * m)
        ]
    frames = np.maximum.accumulate(torch.cat(made).reshape(-1, m).double().numpy(), axis=1)
    edges = np.append(case.x - half, case.x[-1] + half)
    ends = np.stack([np.interp(edges, row, QUANTILES) for row in frames])
    ends[:, 0], ends[:, -1] = -np.inf, np.inf
    return np.diff(ndtr(ends), axis=1)


def alone(case: Case, w: float, clock: float) -> np.ndarray:
    """Renoising alone."""
    return case.renoise(w)


def short(case: Case, w: float, clock: float, share: float) -> np.ndarray:
    """Renoising between two relaxations, together a share of the step."""
    relax = case.relax(clock * share * case.delta / 2)
    return relax @ case.renoise(w) @ relax


def slowed(case: Case, w: float, clock: float) -> np.ndarray:
    """The simulation with another clock."""
    return case.relax(clock * case.lag_max)


Step = Callable[[Case, float, float], np.ndarray]
"""The matrix of a step at w (1 at and below N_max) and at the clock n_int / N_max (1 above)."""

COMPARED: list[tuple[str, str, int, int, Step]] = [  # name, group, N_max, Delta, step
    *((f"R(w), Delta {d}", "alone", 10, d, alone) for d in (10, 20, 30, 50, 100, 230)),
    *(
        (f"T R(w) T, T {share:.0%} of Delta 30", "short", 10, 30, partial(short, share=share))
        for share in (0.02, 0.05, 0.1, 0.2, 0.3)
    ),
    ("renoising_step, N_max 50, Delta 50", "rule", 50, 50, renoising),
    ("renoising_step, N_max 10, Delta 50", "rule", 10, 50, renoising),
    ("interpolate, relax, N_max 50, Delta 50", "paper", 50, 50, relaxed),
    ("interpolate, relax, N_max 10, Delta 50", "paper", 10, 50, relaxed),
    ("interpolate, relax, N_max 10, Delta 100", "paper", 10, 100, relaxed),
    ("interpolate, N_max 10, Delta 50", "paper", 10, 50, Case.interpolate),
    ("mixture, N_max 10, Delta 50", "mixture", 10, 50, mixture),
    ("simulation with another clock, Delta 30", "clock", 30, 30, slowed),
]


def fit_step(case: Exact, step: Step) -> tuple[float, float]:
    """w and the clock that bring the correlation of psi_2 closest to the exact one."""
    n = LONGEST // case.delta
    target = exact_correlation(case, case.psi, n)

    def misfit(node: float) -> float:
        made = correlation(case, step(case, *at(node)), case.psi, n)
        return float(((made - target) ** 2).sum())

    nodes = np.concatenate([np.linspace(-0.9, 0, 7), np.linspace(0.1, 1, 10)])
    best = int(np.argmin([misfit(node) for node in nodes]))
    low, high = nodes[max(best - 1, 0)], nodes[min(best + 1, len(nodes) - 1)]
    options = {"xatol": 1e-4, "maxiter": 25}
    found = minimize_scalar(misfit, bounds=(low, high), method="bounded", options=options)
    return at(found.x)


def weighted_fits(covariance: np.ndarray) -> dict[str, float]:
    """Rate over the true one, of R(w) fitted to the exact correlation with correlated errors.

    No Monte Carlo noise: the bias of the step alone. Errors that are strongly correlated give
    weight to the shortest lags, where a step that is too long for its diffusion is least exact.
    """
    found = {}
    for delta in (10, 30):
        case = Exact(delta, delta)
        slowest = case.exact.timescales[0]

        def misfit(w: float, case: Exact = case, slowest: float = slowest) -> float:
            made = correlation(case, case.renoise(w), case.psi, LONGEST // case.delta)
            error = made[HONEST_LAGS // case.delta - 1] - np.exp(-HONEST_LAGS / slowest)
            return float(error @ np.linalg.solve(covariance, error))

        w = minimize_scalar(misfit, bounds=(0.9, 0.995), method="bounded").x
        found[f"Delta {delta}"] = round(
            float(slowest / judged(case, case.renoise(w))["timescale"]), 3
        )
    return found


def judged(case: Exact, matrix: np.ndarray) -> dict:
    """How far a step is from the exact dynamics of the experiment."""
    second = np.sort(np.linalg.eigvals(matrix).real)[-2]
    stationary = case.mu @ np.linalg.matrix_power(matrix, 2**16)
    exact = case.exact.transition_density(case.delta) * case.exact.spacing
    distance = np.abs(np.cumsum(matrix - exact, axis=1)).sum(1) * case.exact.spacing
    n = LONGEST // case.delta
    error = correlation(case, matrix, case.psi, n) - exact_correlation(case, case.psi, n)
    return {
        "timescale": round(float(-case.delta / np.log(second)), 1),
        "total_variation": round(
            float(np.abs(stationary / stationary.sum() - case.mu).sum() / 2), 4
        ),
        "wasserstein": round(float(case.mu @ distance), 4),
        "correlation_error": round(float(np.abs(error).max()), 5),
    }


def compared(case_of: Callable[[int, int], Exact], names: list[str] | None = None) -> dict:
    """All steps, each fitted to the exact correlation."""
    found = {}
    for name, group, lag_max, delta, step in COMPARED:
        if names is None or name in names:
            case = case_of(lag_max, delta)
            w, clock = fit_step(case, step)
            found[name] = {"group": group, "delta": delta, "w": round(float(w), 4)}
            found[name] |= {"clock": round(float(clock), 3)} | judged(case, step(case, w, clock))
            print(f"  {name:42s}", list(found[name].values())[2:], flush=True)
    return found


def exact_steps() -> dict:
    """The comparison with exact scores, and the simulation as it is."""
    print("exact scores")
    case = Exact(30, 30)
    found = {"simulation, uncorrected, Delta 30": {"group": "clock", "delta": 30}}
    found["simulation, uncorrected, Delta 30"] |= judged(case, case.relax(30))
    checks = {
        "Propagate(10)": float(
            np.abs(np.cumsum(case.relax(10) - case.moved(Propagate(10), 1.0, 1.0), axis=1)).max()
        )
    }
    return {"steps": found | compared(Exact), "matrix_error_of_a_move": checks}
