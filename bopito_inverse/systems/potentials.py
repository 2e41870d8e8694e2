r"""Analytic one-dimensional systems under overdamped Langevin dynamics.

A particle in an energy `U(x)` moves by

    dx = -U'(x) / gamma dt + sqrt(2 kT / gamma) dW,

and a *frame* is recorded every `steps_per_frame` integrator steps of length `time_step`. All
quantities are in reduced units; lags elsewhere in the package count frames.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from bopito_inverse.arguments import as_count, as_positive

FORCE_TABLE_SIZE = 8192


class Potential1D:
    """A particle in a one-dimensional energy landscape given by any callable.

    Args:
        energy: `U(x)`, elementwise on a numpy array or on a torch tensor.
        bounds: interval that holds all of the probability that matters. It is the range of the
            grid of `TransferOperator`; beyond it the force continues linearly.
        kT: thermal energy.
        friction: friction coefficient gamma.
        time_step: integrator step.
        steps_per_frame: integrator steps between recorded frames.
        name: written into checkpoints, so that a model is not used on another system.

    The force is tabulated once from `energy`, so that one step costs the same for every landscape.

    >>> harmonic = Potential1D(lambda x: 0.5 * x**2, bounds=(-6, 6), time_step=1e-2)
    >>> float(harmonic.force(torch.tensor([1.0]))[0])
    -1.0
    """

    event_shape = (1,)

    def __init__(
        self,
        energy: Callable,
        bounds: tuple[float, float],
        kT: float = 1.0,
        friction: float = 1.0,
        time_step: float = 1e-4,
        steps_per_frame: int = 100,
        name: str | None = None,
    ) -> None:
        if len(bounds) != 2 or not (np.isfinite(bounds).all() and bounds[0] < bounds[1]):
            raise ValueError(f"bounds must be two increasing finite numbers, got {bounds}")
        low, high = float(bounds[0]), float(bounds[1])
        self.bounds = (low, high)
        self.kT = as_positive("kT", kT)
        self.friction = as_positive("friction", friction)
        self.time_step = as_positive("time_step", time_step)
        self.steps_per_frame = as_count("steps_per_frame", steps_per_frame)
        self.name = name or type(self).__name__
        self._energy = energy
        grid = np.linspace(low, high, FORCE_TABLE_SIZE)
        force = -CubicSpline(grid, self.energy(grid))(grid, 1)
        slope = np.diff(force) / np.diff(grid)
        table = np.stack([force[:-1] - slope * grid[:-1], slope])
        self._force_table = torch.as_tensor(table, dtype=torch.float32)

    def __repr__(self) -> str:
        return (
            f"{self.name}(kT={self.kT:g}, friction={self.friction:g}, "
            f"time_step={self.time_step:g}, steps_per_frame={self.steps_per_frame})"
        )

    @property
    def frame_time(self) -> float:
        """Physical time between frames, in reduced units."""
        return self.time_step * self.steps_per_frame

    @property
    def diffusion(self) -> float:
        """Diffusion coefficient kT / gamma."""
        return self.kT / self.friction

    def energy(self, x: np.ndarray | Tensor) -> np.ndarray:
        """Energy U(x) in float64 on the CPU, same shape as `x`."""
        x = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)
        try:
            value = np.asarray(self._energy(x), dtype=np.float64)
        except (TypeError, AttributeError):  # made of torch functions or methods
            value = torch.as_tensor(self._energy(torch.from_numpy(x))).detach().double().numpy()
        if value.shape != x.shape or not np.isfinite(value).all():
            raise ValueError(
                f"energy must return one finite value for each x in {self.bounds}, got shape "
                f"{value.shape} with {int((~np.isfinite(value)).sum())} non-finite values"
            )
        return value

    def force(self, x: Tensor) -> Tensor:
        """Force -U'(x), linear in x within each cell of the table, same shape as `x`."""
        low, high = self.bounds
        if self._force_table.device != x.device:
            self._force_table = self._force_table.to(x.device)
        cell = ((x - low) * ((FORCE_TABLE_SIZE - 1) / (high - low))).to(torch.int32)
        cell = cell.clamp_(0, FORCE_TABLE_SIZE - 2).flatten()
        offset, slope = (part.index_select(0, cell) for part in self._force_table)
        return torch.addcmul(offset, slope, x.flatten()).view(x.shape)


class Prinz(Potential1D):
    """Four-well potential of Prinz et al. (J. Chem. Phys. 134, 174105, 2011), kT = friction = 1.

    V(x) = 4 (x^8 + 0.8 exp(-80 x^2) + 0.2 exp(-80 (x - 0.5)^2) + 0.5 exp(-40 (x + 0.5)^2)); a
    frame is 500 steps of 1e-5.
    """

    def __init__(self) -> None:
        super().__init__(_prinz_energy, bounds=(-1.4, 1.4), time_step=1e-5, steps_per_frame=500)


class DoubleWell(Potential1D):
    """Tilted double well U(x) = a (x^2 - 1)^2 + b x."""

    def __init__(
        self,
        a: float = 5.0,
        b: float = 1.0,
        kT: float = 1.0,
        friction: float = 1.0,
        time_step: float = 1e-3,
        steps_per_frame: int = 50,
    ) -> None:
        width = np.sqrt(1 + np.sqrt(25 * as_positive("kT", kT) / as_positive("a", a)))
        super().__init__(
            partial(_double_well, a=a, b=b),
            bounds=(-width, width),
            kT=kT,
            friction=friction,
            time_step=time_step,
            steps_per_frame=steps_per_frame,
        )


class TripleWell(Potential1D):
    """Three wells at -1, 0 and 1 with barriers of about `height`, tilted.

    U(x) = height (1 - cos 2 pi x) / 2 + tilt x + 2 (x / 1.3)^16.
    """

    def __init__(
        self,
        height: float = 4.0,
        tilt: float = 0.5,
        kT: float = 1.0,
        friction: float = 1.0,
        time_step: float = 2e-4,
        steps_per_frame: int = 50,
    ) -> None:
        super().__init__(
            partial(_triple_well, height=height, tilt=tilt),
            bounds=(-1.6, 1.6),
            kT=kT,
            friction=friction,
            time_step=time_step,
            steps_per_frame=steps_per_frame,
        )


class OrnsteinUhlenbeck(Potential1D):
    """Harmonic well U(x) = stiffness x^2 / 2, with densities and correlations in closed form.

    The stationary density is N(0, kT / stiffness), and correlations decay by `decay` per frame.
    """

    def __init__(
        self,
        stiffness: float = 1.0,
        kT: float = 1.0,
        friction: float = 1.0,
        time_step: float = 1e-3,
        steps_per_frame: int = 50,
    ) -> None:
        self.stiffness = as_positive("stiffness", stiffness)
        width = 7 * np.sqrt(as_positive("kT", kT) / stiffness)
        super().__init__(
            partial(_harmonic, stiffness=stiffness),
            bounds=(-width, width),
            kT=kT,
            friction=friction,
            time_step=time_step,
            steps_per_frame=steps_per_frame,
        )

    @property
    def decay(self) -> float:
        """Correlation of x over one frame, exp(-stiffness frame_time / friction)."""
        return float(np.exp(-self.stiffness * self.frame_time / self.friction))


def _prinz_energy(x: np.ndarray) -> np.ndarray:
    return 4 * (
        x**8
        + 0.8 * np.exp(-80 * x**2)
        + 0.2 * np.exp(-80 * (x - 0.5) ** 2)
        + 0.5 * np.exp(-40 * (x + 0.5) ** 2)
    )


def _double_well(x: np.ndarray, a: float, b: float) -> np.ndarray:
    return a * (x**2 - 1) ** 2 + b * x


def _triple_well(x: np.ndarray, height: float, tilt: float) -> np.ndarray:
    return height * (1 - np.cos(2 * np.pi * x)) / 2 + tilt * x + 2 * (x / 1.3) ** 16


def _harmonic(x: np.ndarray, stiffness: float) -> np.ndarray:
    return 0.5 * stiffness * x**2
