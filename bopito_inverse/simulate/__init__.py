"""Simulation of toy systems, enhanced sampling, and its reweighting to the unbiased equilibrium."""

from bopito_inverse.simulate.enhanced import BiasedSamples, tempering, umbrella
from bopito_inverse.simulate.langevin import langevin
from bopito_inverse.simulate.md import fastest_platform, molecular_dynamics
from bopito_inverse.simulate.reweight import Reweighting, mbar, mbar_weights

__all__ = [
    "BiasedSamples",
    "Reweighting",
    "fastest_platform",
    "langevin",
    "mbar",
    "mbar_weights",
    "molecular_dynamics",
    "tempering",
    "umbrella",
]
