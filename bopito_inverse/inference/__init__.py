"""Inference: the fit of N_int to measured correlation functions."""

from bopito_inverse.inference.calibration import Calibration, calibrate
from bopito_inverse.inference.design import Clock
from bopito_inverse.inference.fit import fit
from bopito_inverse.inference.likelihood import Nuisance
from bopito_inverse.inference.prediction import Prediction
from bopito_inverse.inference.prior import Prior
from bopito_inverse.inference.result import FitResult
from bopito_inverse.inference.sensitivity import Sensitivity, sensitivity

__all__ = [
    "Calibration",
    "Clock",
    "FitResult",
    "Nuisance",
    "Prediction",
    "Prior",
    "Sensitivity",
    "calibrate",
    "fit",
    "sensitivity",
]
