"""Data slower than a simulation whose stationary density is wrong correct both, by renoising alone.

Exact scores of a tilted double well (the experiment), and a simulation with another barrier and
temperature. The simulation with a slower clock has the timescale of the experiment, too, but keeps
its own stationary density.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import ndtr

import bopito_inverse as bi
from bopito_inverse.sampling import DPMSolver, Propagate, Renoise, Rollout
from bopito_inverse.systems import DoubleWell, Potential1D, TransferOperator

LAG_MAX, LAMBDA_HAT, GRID, EVALUATIONS = 10, 0.94, 80, 10
NOISE = np.linspace(-6, 6, 81)
WELL = DoubleWell(2.0, 0.5)
SIMULATED = Potential1D(
    DoubleWell(3.0, 0.5).energy, WELL.bounds, kT=2.0, time_step=1e-3, steps_per_frame=50
)
EXACT = TransferOperator(WELL, grid_size=GRID)
SIMULATION = TransferOperator(SIMULATED, grid_size=GRID)
MU, TIMESCALE = EXACT.stationary * EXACT.spacing, EXACT.timescales[0]
LAGS = np.arange(4, 25, 4)


@pytest.fixture(scope="module")
def model() -> bi.Interpolator:
    s_eq = EXACT.equilibrium_score()
    s_dyn = SIMULATION.dynamic_score(s_eq, LAMBDA_HAT)
    return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, LAG_MAX))


@pytest.fixture(scope="module")
def step() -> Rollout:
    return Rollout([Renoise()], 1, DPMSolver(EVALUATIONS))


def psi(x: torch.Tensor) -> torch.Tensor:
    """The slow process: the second eigenfunction of the experiment."""
    values = np.interp(x[..., 0].numpy(), EXACT.grid, EXACT.eigenfunctions[:, 1])
    return torch.from_numpy(values)


def matrix(step: Rollout, model: bi.Interpolator, n_int: float) -> np.ndarray:
    """Transition matrix of a step that draws noise once, between cells of the grid."""
    noise, n = torch.from_numpy(NOISE).float()[:, None], len(NOISE)
    starts = torch.from_numpy(EXACT.grid).float().repeat_interleave(n)[:, None]
    with torch.no_grad():
        frames = step.frames(model, starts, torch.tensor(n_int), 1, lambda y: noise.repeat(GRID, 1))
        x = np.maximum.accumulate(next(frames).reshape(GRID, n).double().numpy(), axis=1)
    half = EXACT.spacing / 2
    ends = np.stack([np.interp(np.append(EXACT.grid - half, np.inf), row, NOISE) for row in x])
    ends[:, 0], ends[:, -1] = -np.inf, np.inf
    return np.diff(ndtr(ends), axis=1)


def fitted(made: Callable[[float], np.ndarray], low: float, high: float) -> tuple[float, float]:
    """Timescale, and total variation of the stationary density, of the step that fits the data."""
    a, lag = EXACT.eigenfunctions[:, 1], 20

    def misfit(parameter: float) -> float:
        later = np.linalg.matrix_power(made(parameter), lag) @ a
        return float(MU @ (a * later) - np.exp(-lag / TIMESCALE))

    step = made(brentq(misfit, low, high, xtol=1e-4))
    second = np.sort(np.linalg.eigvals(step).real)[-2]
    stationary = MU @ np.linalg.matrix_power(step, 2**12)
    return -1 / np.log(second), np.abs(stationary / stationary.sum() - MU).sum() / 2


def test_timescale_and_stationary_density_are_both_corrected(
    model: bi.Interpolator, step: Rollout
) -> None:
    assert SIMULATION.timescales[0] < 0.5 * TIMESCALE  # the experiment is slower
    found, distance = fitted(lambda n: matrix(step, model, n), LAG_MAX + 0.5, LAG_MAX + 6)
    assert found == pytest.approx(TIMESCALE, rel=0.03)
    assert distance < 0.03

    def slowed(clock: float) -> np.ndarray:
        return matrix(Rollout([Propagate(clock)], 1, DPMSolver(20)), model, LAG_MAX)

    found, distance = fitted(slowed, 0.2, 1.0)
    assert found == pytest.approx(TIMESCALE, rel=0.03)
    assert distance > 0.1  # that of the simulation


def test_the_fit_finds_the_timescale(model: bi.Interpolator, step: Rollout) -> None:
    result = bi.inference.fit(
        model,
        step,
        bi.observables.Correlation(psi, normalization="variance"),
        bi.observables.Experiment(LAGS, np.exp(-LAGS / TIMESCALE), np.full(len(LAGS), 0.01)),
        EXACT.sample(20_000, torch.Generator().manual_seed(0)),
        seed=0,
        n_replicas=512,
        device="cpu",
    )
    low, high = result.timescale.hdi_94
    assert low < TIMESCALE < high
    assert high < 1.4 * TIMESCALE
    assert low > 1.3 * SIMULATION.timescales[0]
