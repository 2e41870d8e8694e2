"""Inference: the fit of N_int to measured correlation functions."""

from bopito_inverse.inference.fit import FitResult, fit
from bopito_inverse.inference.prediction import Prediction

__all__ = ["FitResult", "Prediction", "fit"]
