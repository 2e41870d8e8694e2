"""Inference: the fit of N_int to measured correlation functions."""

from bopito_inverse.inference.design import Clock
from bopito_inverse.inference.fit import fit
from bopito_inverse.inference.likelihood import Nuisance
from bopito_inverse.inference.prediction import Prediction
from bopito_inverse.inference.prior import Prior
from bopito_inverse.inference.result import FitResult

__all__ = ["Clock", "FitResult", "Nuisance", "Prediction", "Prior", "fit"]
