"""Correction brings transition densities nearer to the exact ones, whatever kind of bias there is.

At several lags and from two starts, with exact scores; where there is no bias, it does no harm.
"""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

import bopito_inverse as bi
from bopito_inverse.sampling import Propagate, Rollout, renoising_step, sample
from bopito_inverse.systems import Potential1D, Prinz, TransferOperator

LAG_MAX, DELTA, LAMBDA_HAT, GRID = 50, 100, 0.99, 100
LAGS = DELTA * np.arange(1, 4)
STARTS, STEPS, N = (0.75, -0.25), (1, 2), 600
KINDS = {  # the learnt dynamics: height of the barrier in units of the right one, cut, relaxation
    "slow process missing": (1.0, 0.0, None),
    "force field too slow": (1.6, None, None),
    "force field too fast": (0.5, None, DELTA),
    "no bias": (1.0, None, DELTA),
}


def position(x: torch.Tensor) -> torch.Tensor:
    return x


def biased(middle: float, cut: float | None) -> TransferOperator:
    """Prinz's system with another barrier at x = 0."""

    def energy(x: np.ndarray) -> np.ndarray:
        return Prinz().energy(x) + (middle - 1) * 3.2 * np.exp(-80 * x**2)

    system = Potential1D(energy, Prinz().bounds, time_step=1e-5, steps_per_frame=500)
    return TransferOperator(system, cut, GRID)


def distances(kind: str) -> dict[str, np.ndarray]:
    """Wasserstein distances from the exact transition densities, (starts, steps)."""
    middle, cut, relaxation = KINDS[kind]
    exact = TransferOperator(Prinz(), grid_size=GRID)
    s_eq = exact.equilibrium_score()
    s_dyn = biased(middle, cut).dynamic_score(s_eq, LAMBDA_HAT)
    model = bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, LAG_MAX))
    step = renoising_step(LAG_MAX, DELTA, relaxation=relaxation)
    obs = bi.observables.Correlation(position, normalization="variance")
    values = exact.correlation(position, lags=LAGS, normalization="variance")
    exp = bi.observables.Experiment(LAGS, values, np.full(len(LAGS), 0.02))
    mu = exact.sample(20_000, torch.Generator().manual_seed(0))
    n_int = bi.inference.fit(model, step, obs, exp, mu, seed=0, n_replicas=128).n_int.mean

    def distance(of: Rollout) -> np.ndarray:
        x_0 = torch.tensor(STARTS).repeat_interleave(N)[:, None]
        made = sample(model, of, starts=x_0, n_steps=STEPS[-1], n_int=n_int, seed=0)
        assert made is not None
        x = made.frames.view(len(STARTS), N, -1).numpy()
        cell = [int(np.abs(exact.grid - start).argmin()) for start in STARTS]
        rows = {k: exact.transition_density(k * DELTA) for k in STEPS}
        return np.array(
            [
                [wasserstein_distance(x[i, :, k], exact.grid, None, rows[k][c]) for k in STEPS]
                for i, c in enumerate(cell)
            ]
        )

    uncorrected = Rollout([Propagate(LAG_MAX), Propagate(LAG_MAX)], DELTA)
    return {"uncorrected": distance(uncorrected), "corrected": distance(step)}


@pytest.mark.parametrize("kind", list(KINDS)[:3])
def test_corrected_transition_densities_are_nearer_to_the_exact_ones(kind: str) -> None:
    found = distances(kind)
    assert (found["corrected"] < 0.7 * found["uncorrected"]).all(), found


def test_a_model_with_no_bias_is_not_spoilt() -> None:
    found = distances("no bias")
    assert (found["corrected"] < 0.04).all(), found
