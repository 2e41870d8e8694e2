"""Simulation, enhanced sampling, and its reweighting to the unbiased equilibrium."""

from bopito_inverse.simulate.biased import BiasedSamples
from bopito_inverse.simulate.enhanced import tempering, umbrella
from bopito_inverse.simulate.enhanced_md import replica_exchange, umbrella_dihedrals
from bopito_inverse.simulate.langevin import langevin
from bopito_inverse.simulate.md import fastest_platform, molecular_dynamics
from bopito_inverse.simulate.profile import FreeEnergyProfile, free_energy_profile
from bopito_inverse.simulate.reweight import Reweighting, mbar, mbar_weights

__all__ = [
    "BiasedSamples",
    "FreeEnergyProfile",
    "Reweighting",
    "fastest_platform",
    "free_energy_profile",
    "langevin",
    "mbar",
    "mbar_weights",
    "molecular_dynamics",
    "replica_exchange",
    "tempering",
    "umbrella",
    "umbrella_dihedrals",
]
