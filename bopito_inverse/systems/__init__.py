"""Systems: analytic potentials with their exact transfer operators, and molecules."""

from bopito_inverse.systems.exact import TransferOperator
from bopito_inverse.systems.molecules import AlanineDipeptide, Molecule
from bopito_inverse.systems.potentials import (
    DoubleWell,
    OrnsteinUhlenbeck,
    Potential1D,
    Prinz,
    TripleWell,
)

__all__ = [
    "AlanineDipeptide",
    "DoubleWell",
    "Molecule",
    "OrnsteinUhlenbeck",
    "Potential1D",
    "Prinz",
    "TransferOperator",
    "TripleWell",
]
