"""Sampling: solvers of the reverse diffusion, composite steps, trajectories."""

from bopito_inverse.sampling.boltzmann import generate, importance_sample, log_likelihood
from bopito_inverse.sampling.rollout import (
    Interpolate,
    Normal,
    Propagate,
    Renoise,
    Rollout,
    renoising_step,
)
from bopito_inverse.sampling.sample import sample
from bopito_inverse.sampling.solvers import Ancestral, DPMSolver, Heun

__all__ = [
    "Ancestral",
    "DPMSolver",
    "Heun",
    "Interpolate",
    "Normal",
    "Propagate",
    "Renoise",
    "Rollout",
    "generate",
    "importance_sample",
    "log_likelihood",
    "renoising_step",
    "sample",
]
