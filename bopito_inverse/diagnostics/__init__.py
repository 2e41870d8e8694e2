"""Diagnostics: what a composite step does to the equilibrium, and whether posteriors are right."""

from bopito_inverse.diagnostics.calibration import Calibration, calibrate
from bopito_inverse.diagnostics.checks import chapman_kolmogorov, stationarity
from bopito_inverse.diagnostics.sensitivity import Sensitivity, sensitivity
from bopito_inverse.diagnostics.verdicts import ChapmanKolmogorov, Stationarity

__all__ = [
    "Calibration",
    "ChapmanKolmogorov",
    "Sensitivity",
    "Stationarity",
    "calibrate",
    "chapman_kolmogorov",
    "sensitivity",
    "stationarity",
]
