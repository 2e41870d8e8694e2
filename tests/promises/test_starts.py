"""Promise: trajectories that start from the Boltzmann generator give unbiased correlations, where
as many that start from one structure do not.
"""

import numpy as np
import torch

import bopito_inverse as bi
from bopito_inverse.systems import OrnsteinUhlenbeck, TransferOperator

WELL = OrnsteinUhlenbeck()
LAGS = np.array([1, 5, 10])
N, N_FRAMES = 3000, 15  # the relaxation takes 20 frames
CORRELATION = bi.observables.Correlation(lambda x: x, normalization="variance")


def deviations(starts: torch.Tensor) -> np.ndarray:
    """Error of direct sampling against decay^lag, in standard errors."""
    trajectories = bi.simulate.langevin(WELL, starts, N_FRAMES, seed=1)
    value, error = CORRELATION.from_trajectories(trajectories, LAGS)
    return ((value.numpy() - WELL.decay**LAGS) / error.numpy()).round(1)


def test_generator_is_unbiased_where_one_structure_is_not() -> None:
    s_eq = TransferOperator(WELL, grid_size=200).equilibrium_score()
    generated = deviations(bi.sampling.generate(s_eq, N, seed=0))
    from_one = deviations(torch.full((N, 1), 1.5))
    assert np.abs(generated).max() < 4, generated
    assert np.abs(from_one).min() > 8, from_one
