"""Seeds: everything random in a run follows from the one of its run file."""

import numpy as np

from bopito_inverse.config import Config

PURPOSES = (
    "starts",
    "biased",
    "umbrella",
    "equilibrium",
    "dynamic",
    "sample",
    "comparison",
    "tempering",
)


def seed_for(config: Config, purpose: str) -> int:
    """A seed for one purpose, so that no two of them share random numbers."""
    key = [config.seed, 1 + PURPOSES.index(purpose)]
    return int(np.random.SeedSequence(key).generate_state(1)[0])
