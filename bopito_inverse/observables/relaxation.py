r"""The slowest relaxation, estimated from trajectories.

With hat functions phi as a basis, the matrices of all pairs of frames that lie `lag` apart,

    C_0 = E[phi(x_s) phi(x_s)^T],    C_1 = E[phi(x_s) phi(x_{s + lag})^T],

give the Koopman matrix C_0^{-1} C_1 (extended dynamic mode decomposition, Williams et al.,
J. Nonlinear Sci. 25, 1307, 2015). Its eigenvalue closest to one, after that of the constant
function, is lambda_2, and -lag / log(lambda_2) is the implied timescale. Neither equilibrium nor
reversibility is assumed: trajectories may start anywhere. To first order, with left and right
eigenvectors u and v, a pair of frames adds

    u^T (phi_s phi_{s + lag}^T - lambda_2 phi_s phi_s^T) v / (u^T C_0 v)

to the error of lambda_2. Where lambda_2 drowns in noise, u and v are those of the noise and nearly
orthogonal, and this would blow up; the divisor is kept above half of what it is for u = v, the case
of reversible dynamics.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bopito_inverse.arguments import as_count
from bopito_inverse.datasets import Array, Trajectories
from bopito_inverse.observables.correlations import Observable

N_KNOTS = 32
SETTLED = 1.25  # largest ratio of timescales at a lag and half of it, either way
GROWS = 1.4  # a ratio that makes one doubt the relaxation; it is 2 where there is none
UNRELAXED = 0.5  # above, a lambda_2 that stays what it is belongs to a process, below to noise
RELAXED = 0.05  # below, a timescale is shorter than a third of the lag
OVERLAP = 0.5  # smallest overlap of left and right eigenfunctions that is believed
FEW_COMPONENTS = 3  # numbers in a frame up to which each is a basis by default
SEEN = 2.0  # standard errors
ONE_SIDED = 1.645  # standard errors to a 95 % bound
FRAMES_PER_CHUNK = 65_536
LARGEST_SAMPLE = 100_000  # numbers that quantiles are taken of

Status = Literal["ok", "unsettled", "not_seen", "unresolved"]


@dataclass(frozen=True)
class ImpliedTimescale:
    """The slowest implied timescale, in frames of the trajectories.

    Attributes:
        value: the timescale; inf where no relaxation is seen.
        error: its standard error; inf where `value` is inf or zero, or with one trajectory.
        lower: 95 % lower bound of the timescale.
        at_half_lag: the estimate at half the lag.
        eigenvalue: lambda_2 at `lag`.
        lag: lag in frames.
        status: `ok`; `unsettled` where the estimate differs much from that at half the lag;
            `not_seen` where lambda_2 cannot be told from one, or does not fall as the lag grows;
            `unresolved` where the process is over within the lag, or lost in noise.
    """

    value: float
    error: float
    lower: float
    at_half_lag: float
    eigenvalue: float
    lag: int
    status: Status

    @property
    def statement(self) -> str:
        """What was found and what to do, in one sentence."""
        if self.status == "not_seen":
            return (
                f"no relaxation is seen between lags of {self.lag // 2} and {self.lag} frames: the "
                f"slowest timescale is above {self.lower:.3g} frames (95 %), or its process is "
                "missing from the trajectories: take a longer lag, or more and longer trajectories"
            )
        if self.status == "unresolved":
            return (
                f"lambda_2 of {self.eigenvalue:.2g} at lag {self.lag} cannot be told from noise: "
                "take a shorter lag or more trajectories"
            )
        error = f" ± {self.error:.3g}" if math.isfinite(self.error) else ""
        found = (
            f"the slowest timescale is {self.value:.4g}{error} frames at lag {self.lag} "
            f"({self.at_half_lag:.4g} at half the lag)"
        )
        if self.status == "unsettled":
            return f"{found}: it has not levelled off, try other lags or take more trajectories"
        return found

    def __str__(self) -> str:
        return self.statement


class SlowMode(NamedTuple):
    """Second eigenvalue () of a Koopman matrix, with its eigenfunctions on the basis, each (m,).

    `scale` is the divisor of the influence, see the top of this file.
    """

    eigenvalue: Tensor
    left: Tensor
    right: Tensor
    scale: Tensor

    def influence(self, now: Tensor, later: Tensor) -> Tensor:
        """What each pair (phi_s, phi_{s + lag}), (n, m), adds to the eigenvalue, (n,)."""
        f, g = now @ self.left, now @ self.right
        return f * (later @ self.right - self.eigenvalue * g) / self.scale


def implied_timescale(
    trajectories: Trajectories | Sequence[Array],
    lag: int,
    observable: Observable | None = None,
    n_knots: int = N_KNOTS,
) -> ImpliedTimescale:
    """The slowest timescale of the dynamics in `trajectories`, in frames.

    The estimate is too short where hat functions do not resolve the slow process. This error falls
    as the lag grows, while noise rises: take a lag at which the value has levelled off. A
    relaxation is seen where lambda_2 is below one by more than two standard errors, and, where the
    estimate still grows with the lag, falls by as much from half the lag to the whole lag: what
    has decayed at once and does not decay further is the error of the basis. Standard errors need
    some twenty trajectories to be believed, and a lag well below the length of trajectories that
    start alike.

    Args:
        trajectories: independent of each other, of any lengths; two or more for an error. They
            need neither start in equilibrium nor be as long as the timescale.
        lag: lag in frames, at least 2 and below the longest trajectory.
        observable: maps frames (B, *event) to one number each, (B,), or to several, (B, k), in
            which the slow process is looked for; by default the components of frames of at most
            three numbers.
        n_knots: hat functions for each number, with knots at its quantiles.

    Raises:
        ValueError: the lag does not fit the trajectories, an observable is missing, constant, not
            finite or of the wrong shape.

    The decay per frame that a BoPITO model is trained with, lambda_hat, follows from the timescale:

    >>> import bopito_inverse as bi
    >>> system = bi.systems.DoubleWell(a=3.0)
    >>> bi.systems.TransferOperator(system).timescales[:1].round()
    array([61.])
    >>> starts = torch.linspace(-1, 1, 1000)[:, None]
    >>> trajectories = bi.simulate.langevin(system, starts, n_frames=100, seed=0)
    >>> found = implied_timescale(trajectories, lag=20)
    >>> found.status, abs(found.value - 61) < 3 * found.error
    ('ok', True)
    >>> lambda_hat = math.exp(-1 / found.value)
    >>> round(lambda_hat, 2)
    0.98
    """
    if not isinstance(trajectories, Trajectories):
        trajectories = Trajectories(trajectories, frame_time=1.0)
    lag = as_count("lag", lag, minimum=2)
    if lag >= int(trajectories.lengths.max()):
        raise ValueError(
            f"lag must be below the longest trajectory ({int(trajectories.lengths.max())} frames), "
            f"got {lag}"
        )
    basis = _Basis(trajectories, _values(trajectories.frames, observable), n_knots)
    (half, half_influence), (whole, influence) = (
        basis.second_eigenvalue(n) for n in (lag // 2, lag)
    )
    return _conclude(lag, half, whole, half_influence, influence)


def timescale(eigenvalue: Tensor, lag: float | Tensor) -> Tensor:
    """-lag / log(lambda_2) in frames: 0 at or below zero, inf at or above one."""
    inside = eigenvalue.clamp(1e-12, 1 - 1e-12)
    value = -lag / inside.log()
    return torch.where(eigenvalue >= 1, torch.inf, torch.where(eigenvalue <= 0, 0.0, value))


def slow_mode(c_0: Tensor, c_1: Tensor) -> SlowMode:
    """The slowest mode but the constant one, from C_0 and C_1, each (m, m).

    Raises:
        ValueError: the basis holds nothing but the constant.
    """
    root = _inverse_root(c_0)
    koopman = root.T @ c_1 @ root
    values, right = torch.linalg.eig(koopman)
    left_values, left = torch.linalg.eig(koopman.T)
    if len(values) < 2:
        raise ValueError("c_0 must have rank 2 or more, got a basis of nothing but the constant")
    second = values.real.argsort(descending=True)[1]
    match = (left_values - values[second]).abs().argmin()
    v, u = root @ right[:, second].real, root @ left[:, match].real
    overlap = u @ c_0 @ v
    smallest = OVERLAP * ((u @ c_0 @ u) * (v @ c_0 @ v)).sqrt()
    scale = torch.where(overlap < 0, -1.0, 1.0) * overlap.abs().maximum(smallest)
    return SlowMode(values[second].real, u, v, scale)


def quantile_knots(series: Tensor, n: int) -> Tensor:
    """The different ones of `n` quantiles of all numbers in `series`, increasing."""
    levels = torch.linspace(0, 1, n, dtype=series.dtype, device=series.device)
    pool = series.flatten()
    return torch.quantile(pool[:: max(1, len(pool) // LARGEST_SAMPLE)], levels).unique()


def hats(series: Tensor, knots: Tensor) -> Tensor:
    """Hat functions with these knots (m,) of `series` (...), (..., m); they sum to one."""
    if len(knots) < 2:
        return torch.ones(*series.shape, 1, dtype=series.dtype, device=series.device)
    cell = (torch.searchsorted(knots, series.contiguous()) - 1).clamp(0, len(knots) - 2)
    fraction = ((series - knots[cell]) / (knots[cell + 1] - knots[cell])).clamp(0, 1)
    phi = torch.zeros(*series.shape, len(knots), dtype=series.dtype, device=series.device)
    phi.scatter_(-1, cell[..., None], (1 - fraction)[..., None])
    return phi.scatter_(-1, cell[..., None] + 1, fraction[..., None])


class _Basis:
    """Hat functions along trajectories, made in chunks."""

    def __init__(self, trajectories: Trajectories, values: Tensor, n_knots: int) -> None:
        n = as_count("n_knots", n_knots, 2)
        self.columns = [(x, quantile_knots(x, n)) for x in values.unbind(-1)]
        if all(len(knots) < 2 for _, knots in self.columns):
            raise ValueError("observable must vary along the trajectories, got a constant")
        self.lengths = trajectories.lengths
        index = torch.arange(len(self.lengths), device=self.lengths.device)
        self.owner = torch.repeat_interleave(index, self.lengths)

    def pairs(self, lag: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Basis functions now and later, each (b, m), and the trajectory of each pair, (b,)."""
        for first in range(0, len(self.owner) - lag, FRAMES_PER_CHUNK):
            chunk = slice(first, first + FRAMES_PER_CHUNK + lag)
            owner = self.owner[chunk]
            inside = owner[:-lag] == owner[lag:]
            phi = torch.cat([hats(x[chunk], knots) for x, knots in self.columns], dim=-1)
            yield phi[:-lag][inside], phi[lag:][inside], owner[:-lag][inside]

    def second_eigenvalue(self, lag: int) -> tuple[Tensor, Tensor]:
        """lambda_2 () at this lag, and what each trajectory adds to its error, (n,)."""
        n_pairs = int((self.lengths - lag).clamp(min=0).sum())
        products = [torch.stack([a.T @ a, a.T @ b]) for a, b, _ in self.pairs(lag)]
        c_0, c_1 = torch.stack(products).sum(0)
        mode = slow_mode(c_0 / n_pairs, c_1 / n_pairs)
        influence = c_0.new_zeros(len(self.lengths))
        for now, later, owner in self.pairs(lag):
            influence.index_add_(0, owner, mode.influence(now, later) / n_pairs)
        return mode.eigenvalue, influence


def _conclude(
    lag: int, half: Tensor, whole: Tensor, half_influence: Tensor, influence: Tensor
) -> ImpliedTimescale:
    """The timescale from lambda_2 at half the lag and at the whole lag."""
    error = _standard_error(influence)
    value, at_half = float(timescale(whole, lag)), float(timescale(half, lag // 2))
    lower = float(timescale(whole.clamp(max=1.0) - ONE_SIDED * error, lag))
    spread = value**2 / lag / float(whole) * float(error) if 0 < value < math.inf else math.inf
    fall = half.log() - whole.log()  # NaN where one is below zero, which no comparison passes
    falls = bool(fall > SEEN * _standard_error(half_influence / half - influence / whole))
    known, grows = len(influence) > 1, value > GROWS * at_half
    idle = known and grows and not falls
    if value == math.inf or (known and whole + SEEN * error >= 1) or (idle and whole > UNRELAXED):
        status: Status = "not_seen"
        value = spread = math.inf
    elif whole < RELAXED or (known and whole < SEEN * error) or idle:
        status = "unresolved"
    else:
        status = "ok" if max(value, at_half) <= SETTLED * min(value, at_half) else "unsettled"
    return ImpliedTimescale(value, spread, lower, at_half, float(whole), lag, status)


def _values(frames: Tensor, observable: Observable | None) -> Tensor:
    """What hat functions are made of, (B, k), float64."""
    if observable is None:
        values = frames.flatten(1)
        if values.shape[1] > FEW_COMPONENTS:
            raise ValueError(
                f"observable must be given for frames of shape {tuple(frames.shape[1:])}, got None"
            )
    else:
        values = observable(frames)
    if not isinstance(values, Tensor) or values.ndim not in (1, 2) or len(values) != len(frames):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"observable must return shape ({len(frames)},) or ({len(frames)}, k), got {got}"
        )
    if not values.isfinite().all():
        raise ValueError("observable must be finite, got NaN or infinite values")
    return values.double().reshape(len(frames), -1)


def _standard_error(influence: Tensor) -> Tensor:
    """From what each independent trajectory adds, (n,); inf where there is one."""
    n = len(influence)
    if n < 2:
        return torch.tensor(torch.inf, dtype=influence.dtype)
    return ((influence - influence.mean()).square().sum() * n / (n - 1)).sqrt()


def _inverse_root(c: Tensor) -> Tensor:
    """R with R^T C R = 1 on the space where C is not numerically singular, (m, rank)."""
    values, vectors = torch.linalg.eigh(c)
    keep = values > 1e-10 * values[-1]
    return vectors[:, keep] / values[keep].sqrt()
