"""Features: functions of a frame, by name, for the observables of a run file.

Each maps frames `(B, 1)` of a one-dimensional system to one number each, `(B, 1)`:

    x      the position
    x^2    its square
    x>0    one where the position is above zero, else zero: which side of a barrier at zero
"""

from torch import Tensor

from bopito_inverse.observables.correlations import Observable


def position(x: Tensor) -> Tensor:
    """The position x."""
    return x


def square(x: Tensor) -> Tensor:
    """The squared position x^2."""
    return x.square()


def above_zero(x: Tensor) -> Tensor:
    """One where x > 0, else zero; its derivative vanishes."""
    return (x > 0).to(x.dtype)


FEATURES: dict[str, Observable] = {"x": position, "x^2": square, "x>0": above_zero}
