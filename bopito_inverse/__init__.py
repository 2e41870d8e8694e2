"""Correct the kinetics of generative molecular dynamics with measured correlation functions."""

from bopito_inverse import models, observables, sampling, systems
from bopito_inverse.interpolator import Interpolator

__version__ = "0.1.0"

__all__ = ["Interpolator", "models", "observables", "sampling", "systems"]
