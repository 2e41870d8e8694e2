"""Correlation functions and slowest relaxation of trajectories; measured correlation functions."""

from bopito_inverse.observables.correlations import (
    NORMALIZATIONS,
    Correlation,
    CorrelationSamples,
    Observable,
)
from bopito_inverse.observables.experiment import LAG_UNITS, Experiment
from bopito_inverse.observables.features import FEATURES, Angle, Dihedral, Distance, feature
from bopito_inverse.observables.relaxation import ImpliedTimescale, implied_timescale

__all__ = [
    "FEATURES",
    "LAG_UNITS",
    "NORMALIZATIONS",
    "Angle",
    "Correlation",
    "CorrelationSamples",
    "Dihedral",
    "Distance",
    "Experiment",
    "ImpliedTimescale",
    "Observable",
    "feature",
    "implied_timescale",
]
