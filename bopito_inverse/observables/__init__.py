"""Correlation functions and slowest relaxation of trajectories; measured correlation functions."""

from bopito_inverse.observables.correlations import (
    NORMALIZATIONS,
    Correlation,
    CorrelationSamples,
    Observable,
)
from bopito_inverse.observables.experiment import LAG_UNITS, Experiment
from bopito_inverse.observables.relaxation import ImpliedTimescale, implied_timescale

__all__ = [
    "LAG_UNITS",
    "NORMALIZATIONS",
    "Correlation",
    "CorrelationSamples",
    "Experiment",
    "ImpliedTimescale",
    "Observable",
    "implied_timescale",
]
