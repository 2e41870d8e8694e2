"""An equilibrium score may come from poor frames: forces mend its wells, weights all of it."""

import numpy as np
import torch

import bopito_inverse as bi
from bopito_inverse.datasets import Frames
from bopito_inverse.models import EquilibriumScore, NetworkConfig, TrainingConfig

SYSTEM = bi.systems.DoubleWell(a=3.0, b=0.5)
EXACT = bi.systems.TransferOperator(SYSTEM, grid_size=300)


def trained(frames: Frames, forces: bool) -> EquilibriumScore:
    config = TrainingConfig(
        steps=300, batch_size=256, learning_rate=5e-3, warmup=20, network=NetworkConfig(width=32)
    )
    g = SYSTEM.force(frames.x) / SYSTEM.kT if forces else None
    return bi.models.train_equilibrium(frames, config=config, forces=g, device="cpu")


def distance(frames: Frames) -> float:
    """Kolmogorov-Smirnov distance from mu."""
    x, order = frames.x[:, 0].sort()
    cumulative = np.cumsum(EXACT.stationary) * EXACT.spacing
    truth = np.interp(x.numpy(), EXACT.grid + EXACT.spacing / 2, cumulative)
    return float(np.abs(frames.weights[order].cumsum(0).numpy() - truth).max())


def divergence(s_eq: EquilibriumScore) -> float:
    """KL(mu || q), by quadrature."""
    log_q = bi.sampling.log_likelihood(s_eq, EXACT.grid[:, None], device="cpu").numpy()
    return float(EXACT.stationary @ (np.log(EXACT.stationary) - log_q)) * EXACT.spacing


def test_weights_restore_mu_from_a_generator_with_wrong_populations() -> None:
    x = EXACT.sample(2000, torch.Generator().manual_seed(0))
    s_eq = trained(Frames(x, torch.where(x[:, 0] > 0, 5.0, 1.0)), forces=False)
    made = bi.sampling.importance_sample(
        s_eq, lambda x: SYSTEM.energy(x.numpy()) / SYSTEM.kT, 4000, device="cpu"
    )
    assert distance(Frames(made.x)) > 0.15
    assert distance(made) < 1.63 / made.ess**0.5  # the 99 % quantile of as many draws of mu


def test_forces_mend_a_generator_of_few_frames() -> None:
    few = [Frames(EXACT.sample(60, torch.Generator().manual_seed(seed))) for seed in range(2)]
    with_forces, without = (
        np.mean([divergence(trained(frames, forces)) for frames in few]) for forces in (True, False)
    )
    assert with_forces < without / 2
