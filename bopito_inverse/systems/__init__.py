"""Systems whose answers are known: analytic potentials and their exact transfer operators."""

from bopito_inverse.systems.exact import TransferOperator
from bopito_inverse.systems.potentials import (
    DoubleWell,
    OrnsteinUhlenbeck,
    Potential1D,
    Prinz,
    TripleWell,
)

__all__ = [
    "DoubleWell",
    "OrnsteinUhlenbeck",
    "Potential1D",
    "Prinz",
    "TransferOperator",
    "TripleWell",
]
