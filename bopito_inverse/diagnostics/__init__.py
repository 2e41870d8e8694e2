"""Diagnostics: what a composite step does to the equilibrium, and whether posteriors are right."""

from bopito_inverse.diagnostics.checks import chapman_kolmogorov, stationarity
from bopito_inverse.inference.calibration import calibrate
from bopito_inverse.inference.sensitivity import sensitivity

__all__ = ["calibrate", "chapman_kolmogorov", "sensitivity", "stationarity"]
