"""Promise: with growing n_int a move forgets where it starts and draws from the equilibrium, even
where the data never cross the barrier; lambda_hat, which sets the pace, can be read off the data.
"""

import math

import pytest
import torch
from scipy.stats import kstest

import bopito_inverse as bi
from bopito_inverse.sampling import Interpolate, Renoise, Rollout
from bopito_inverse.systems import DoubleWell, Prinz, TransferOperator

LAG_MAX, LAMBDA_HAT, N = 50, 0.99, 3000
EXACT = TransferOperator(Prinz(), grid_size=100)
CUT = TransferOperator(Prinz(), barrier=0.0, grid_size=100)
S_EQ = EXACT.equilibrium_score()
BOPITO = bi.models.BoPITOScore(S_EQ, CUT.dynamic_score(S_EQ, LAMBDA_HAT), LAMBDA_HAT, LAG_MAX)


def distance(move: type, x_0: float, n_int: float) -> float:
    """Kolmogorov-Smirnov distance of frames after one move from mu."""
    made = bi.sampling.sample(
        bi.Interpolator(BOPITO),
        Rollout([move()], 1),
        n_int=n_int,
        starts=torch.full((N, 1), x_0),
        n_steps=1,
        seed=0,
    )
    mu = EXACT.sample(40 * N, torch.Generator().manual_seed(0))
    return float(kstest(made.frames[1::2, 0].numpy(), mu[:, 0].numpy()).statistic)


@pytest.mark.parametrize("move", [Interpolate, Renoise])
@pytest.mark.parametrize("x_0", [-1.0, 0.75])
def test_long_lags_forget_the_start(move: type, x_0: float) -> None:
    chance = 1.95 / math.sqrt(N)  # exceeded once in a thousand times
    assert distance(move, x_0, LAG_MAX) > 10 * chance
    assert distance(move, x_0, 100 * LAG_MAX) < chance
    assert distance(move, x_0, math.inf) < chance


def test_lambda_hat_follows_from_short_trajectories_off_equilibrium() -> None:
    system = DoubleWell(a=3.0)
    starts = torch.full((3000, 1), 1.0)
    found = bi.observables.implied_timescale(
        bi.simulate.langevin(system, starts, 50, seed=0), lag=10
    )
    truth = float(TransferOperator(system).timescales[0])  # 61 frames, longer than a trajectory
    assert abs(found.value - truth) < 3 * found.error < 0.4 * truth
    assert math.exp(-1 / found.value) == pytest.approx(math.exp(-1 / truth), abs=0.004)
