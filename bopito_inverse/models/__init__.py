"""Models: networks, scores, their training and their files."""

from bopito_inverse.models.checkpoint import load, save
from bopito_inverse.models.scores import BoPITOScore, DynamicScore, EquilibriumScore, ITOScore
from bopito_inverse.models.train import (
    NetworkConfig,
    TrainingConfig,
    train_bopito,
    train_equilibrium,
    train_ito,
)

__all__ = [
    "BoPITOScore",
    "DynamicScore",
    "EquilibriumScore",
    "ITOScore",
    "NetworkConfig",
    "TrainingConfig",
    "load",
    "save",
    "train_bopito",
    "train_equilibrium",
    "train_ito",
]
