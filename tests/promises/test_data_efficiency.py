"""Promise: with very few trajectories BoPITO beats an equally small ITO at the longest lag.

Its equilibrium score is exact here: at lags where the memory of x_0 is lost that is all it needs.
"""

import math

import pytest
import torch

from bopito_inverse.datasets import Trajectories
from bopito_inverse.models import (
    BoPITOScore,
    ITOScore,
    NetworkConfig,
    TrainingConfig,
    train_bopito,
    train_ito,
)
from bopito_inverse.sampling import DPMSolver
from bopito_inverse.systems import OrnsteinUhlenbeck, TransferOperator

SYSTEM = OrnsteinUhlenbeck()
LAG_MAX = 80  # four times the relaxation time of 20 frames
TINY = TrainingConfig(
    steps=150,
    batch_size=256,
    learning_rate=4e-3,
    warmup=10,
    ema_decay=0.95,
    network=NetworkConfig(width=24, depth=2, n_frequencies=4),
)


def few_trajectories(seed: int, n: int = 5, n_frames: int = 120) -> Trajectories:
    """The exact process, x' = d x + sqrt(1 - d^2) z, from equilibrium."""
    z = torch.randn(n_frames, n, 1, generator=torch.Generator().manual_seed(seed))
    frames = [z[0]]
    for kick in z[1:]:
        frames.append(SYSTEM.decay * frames[-1] + math.sqrt(1 - SYSTEM.decay**2) * kick)
    return Trajectories(torch.stack(frames, dim=1), SYSTEM.frame_time)


def wasserstein(score: BoPITOScore | ITOScore, n: int = 48) -> float:
    """Distance at LAG_MAX from N(x_0 d^N, 1 - d^2N), mean over x_0; both numbers at quantiles."""
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    z = torch.special.ndtri(levels).float()
    x_0 = score.scaling.standardise(z.repeat_interleave(n)[:, None])
    bound = score.bind(x_0, torch.tensor(float(LAG_MAX)))
    with torch.no_grad():
        y = DPMSolver(10)(bound, score.noise, z.repeat(n)[:, None], torch.randn_like)
    found = score.scaling.restore(y).view(n, n).sort(dim=1).values
    decay = SYSTEM.decay**LAG_MAX
    return float((found - decay * z[:, None] - math.sqrt(1 - decay**2) * z).abs().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_few_trajectories_are_enough_at_the_longest_lag(seed: int) -> None:
    data = few_trajectories(seed)
    s_eq = TransferOperator(SYSTEM, grid_size=100).equilibrium_score()
    bopito = train_bopito(data, s_eq, LAG_MAX, SYSTEM.decay, TINY, seed, device="cpu")
    ito = train_ito(data, LAG_MAX, TINY, seed, device="cpu")
    assert wasserstein(bopito) < 0.08
    assert wasserstein(bopito) < 0.3 * wasserstein(ito)
