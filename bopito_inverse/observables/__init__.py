"""Time-correlation functions of a model, and the measured ones that it is compared with."""

from bopito_inverse.observables.correlations import (
    NORMALIZATIONS,
    Correlation,
    CorrelationSamples,
    Observable,
)
from bopito_inverse.observables.experiment import LAG_UNITS, Experiment

__all__ = [
    "LAG_UNITS",
    "NORMALIZATIONS",
    "Correlation",
    "CorrelationSamples",
    "Experiment",
    "Observable",
]
