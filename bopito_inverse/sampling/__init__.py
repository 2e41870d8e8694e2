"""Sampling: solvers of the reverse diffusion, composite steps, trajectories."""

from bopito_inverse.sampling.rollout import Interpolate, Normal, Propagate, Rollout
from bopito_inverse.sampling.sample import sample
from bopito_inverse.sampling.solvers import Ancestral, DPMSolver, Heun

__all__ = [
    "Ancestral",
    "DPMSolver",
    "Heun",
    "Interpolate",
    "Normal",
    "Propagate",
    "Rollout",
    "sample",
]
