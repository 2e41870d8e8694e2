r"""Priors of the interpolation parameter, as levels of the coordinate u of its family.

A prior may be given for n_int, for the weight w, or for the implied timescale of the step. Each is
a monotonic function v of the coordinate u (see `emulator`), so that its distribution function
orders the family,

    p(u) = P(v(u') with u' <= u)   in [0, 1],

and the prior of the *level* p is uniform, whatever v is. Posteriors are explored over levels: no
Jacobian is left, and a prior of any width or shape is as easy as another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import uniform

from bopito_inverse.inference.emulator import Coordinate

SCALES = ("n_int", "weight", "timescale")
TABLE = 2001


@dataclass(frozen=True)
class Prior:
    """A prior of N_int by way of one of the quantities that it sets.

    Args:
        distribution: a frozen `scipy.stats` distribution.
        on: the quantity that it describes: `n_int` (frames), `weight` (in [0, 1]; nothing slower
            than the data) or `timescale` (implied timescale of the step, frames).

    Raises:
        ValueError: no frozen distribution, or another quantity.

    >>> from scipy.stats import lognorm
    >>> prior = Prior(lognorm(0.5, scale=200), on="timescale")
    """

    distribution: Any
    on: str = "n_int"

    def __post_init__(self) -> None:
        if not (hasattr(self.distribution, "logpdf") and hasattr(self.distribution, "ppf")):
            raise ValueError(
                f"prior must be a frozen scipy.stats distribution, got {self.distribution!r}"
            )
        if self.on not in SCALES:
            raise ValueError(f"on must be one of {', '.join(SCALES)}, got {self.on!r}")


class Levels:
    """The map between levels of a prior and the coordinate u.

    Args:
        prior: None for the default, uniform in u: dynamics faster and slower than the data are
            equally likely, and among the faster ones w is uniform.
        coordinate: the coordinate u.
        timescale: the timescale at u (G,), increasing; needed for priors on the timescale.

    Raises:
        ValueError: the prior has no mass in the family.
    """

    def __init__(
        self,
        prior: Prior | None,
        coordinate: Coordinate,
        timescale: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._on = "u" if prior is None else prior.on
        self._distribution = (
            uniform(coordinate.low, coordinate.high - coordinate.low)
            if prior is None
            else prior.distribution
        )
        self._coordinate = coordinate
        self._u = np.linspace(coordinate.low, coordinate.high, TABLE)
        if self._on == "timescale":
            if timescale is None:
                raise ValueError("timescale must be given for a prior on it, got None")
            self._timescales = np.maximum.accumulate(timescale(self._u))
        low, high = self.of(np.array([coordinate.low, coordinate.high]))
        if not high > low:
            ends = coordinate.n_int(np.array([coordinate.high, coordinate.low]))
            raise ValueError(
                f"prior must have mass in the family of the model, n_int from {ends[0]:g} to "
                f"{ends[1]:g} frames, got none"
            )

    def of(self, u: np.ndarray) -> np.ndarray:
        """Levels p(u), same shape as `u`, increasing."""
        value = self._value(u)
        return (
            self._distribution.sf(value) if self._on == "n_int" else self._distribution.cdf(value)
        )

    def u(self, level: np.ndarray) -> np.ndarray:
        """Coordinate u at each level, same shape."""
        coordinate, quantile = self._coordinate, self._distribution
        if self._on == "n_int":
            u = coordinate.from_n_int(np.maximum(quantile.isf(level), 1e-9))
        elif self._on == "timescale":
            u = np.interp(quantile.ppf(level), self._timescales, self._u)
        else:
            u = quantile.ppf(level)
        return np.clip(u, coordinate.low, coordinate.high)

    def log_density(self, u: np.ndarray) -> np.ndarray:
        """Log density of the prior's own quantity at u, up to a constant, same shape."""
        return self._distribution.logpdf(self._value(u))

    def _value(self, u: np.ndarray) -> np.ndarray:
        if self._on == "n_int":
            return self._coordinate.n_int(u)
        if self._on == "timescale":
            return np.interp(u, self._u, self._timescales)
        return np.where(u <= 1, u, 1.0 + (u - 1) * (self._on == "u"))
