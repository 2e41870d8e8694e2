"""Correct the kinetics of generative molecular dynamics with measured correlation functions."""

from bopito_inverse import datasets, inference, models, observables, sampling, simulate, systems
from bopito_inverse.interpolator import Interpolator

__version__ = "0.1.0"

__all__ = [
    "Interpolator",
    "datasets",
    "inference",
    "models",
    "observables",
    "sampling",
    "simulate",
    "systems",
]
