r"""The exact transfer operator of a one-dimensional system, on a grid.

Overdamped Langevin dynamics is discretised as jumps between neighbouring grid points with rates

    q(i -> i +- 1) = (D / h^2) exp(-(U(i +- 1) - U(i)) / 2 kT),

which obey detailed balance with the Boltzmann distribution mu exactly. Scaling by sqrt(mu) makes
the generator a symmetric tridiagonal matrix, Q = -V diag(kappa) V^T; everything follows from its
eigenpairs: T(N) = exp(N frame_time Q), implied timescales 1 / (kappa frame_time), densities,
correlations at any real lag N, and, by convolving exact densities with the noise of a schedule,
the exact scores that a perfect network would have.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.special import logsumexp
from torch import Tensor, nn

from bopito_inverse.arguments import as_count
from bopito_inverse.noise import Scaling, VPSchedule
from bopito_inverse.systems.potentials import Potential1D

Observable = Callable[[Tensor], Tensor]
LOG_DENSITY_FLOOR = -80.0
HIGHEST_ENERGY = 70.0  # kT; exp(-35) is the rounding error of an eigenvector
LAGS_KEPT = 32  # an exact score remembers the densities of this many lags


class TransferOperator:
    """Exact transfer operator of a one-dimensional system.

    Args:
        system: the system; its `bounds` give the range of the grid.
        barrier: no flux across this x. The density on each side stays what it is at the start,
            so that the slow process is missing, as in trajectories that never cross.
        grid_size: number of grid points.

    Attributes:
        grid: (G,) grid points.
        stationary: (G,) density of the Boltzmann distribution mu at the grid points.

    >>> from bopito_inverse.systems import Prinz
    >>> TransferOperator(Prinz()).timescales[:3].round(1)
    array([166.8,  25.4,  13. ])
    """

    def __init__(
        self, system: Potential1D, barrier: float | None = None, grid_size: int = 1000
    ) -> None:
        low, high = system.bounds
        if barrier is not None and not low < barrier < high:
            raise ValueError(f"barrier must lie inside {system.bounds}, got {barrier}")
        self.system = system
        self.barrier = barrier
        self.grid = np.linspace(low, high, as_count("grid_size", grid_size, 10))
        self.spacing = self.grid[1] - self.grid[0]
        u = system.energy(self.grid) / system.kT
        if not np.ptp(u) <= HIGHEST_ENERGY:
            raise ValueError(
                f"bounds of {system.name} span {np.ptp(u):.0f} kT of energy, expected at most "
                f"{HIGHEST_ENERGY:g}: rows of the operator so far up would be lost to rounding"
            )
        log_mu = -u - logsumexp(-u)
        self._mu = np.exp(log_mu)
        self.stationary = self._mu / self.spacing

        coupling = np.full(len(u) - 1, system.diffusion / self.spacing**2)
        if barrier is not None:
            coupling[np.searchsorted(self.grid, barrier) - 1] = 0.0
        half_step = np.exp(-np.diff(u) / 2)
        self._up, self._down = coupling * half_step, coupling / half_step
        outflow = np.zeros(len(u))
        outflow[:-1] += self._up
        outflow[1:] += self._down
        kappa, vectors = eigh_tridiagonal(-outflow, coupling)
        order = np.argsort(kappa)[::-1]
        self._rates = np.clip(-kappa[order], 0, None) * system.frame_time  # per frame
        self._rates[: 1 if barrier is None else 2] = 0.0
        self._vectors = vectors[:, order]
        self._sqrt_mu = np.exp(log_mu / 2)

    @property
    def eigenvalues(self) -> np.ndarray:
        """Eigenvalues of T(1 frame), shape (G,), decreasing, from 1."""
        return np.exp(-self._rates)

    @property
    def timescales(self) -> np.ndarray:
        """Implied timescales in frames, shape (G - 1,), slowest first; inf across a barrier."""
        with np.errstate(divide="ignore"):
            return 1 / self._rates[1:]

    @property
    def eigenfunctions(self) -> np.ndarray:
        """Right eigenfunctions in columns, shape (G, G), orthonormal under mu."""
        return self._vectors / self._sqrt_mu[:, None]

    def transition_density(self, lag: float) -> np.ndarray:
        """p(x_j at `lag` frames | x_i now), shape (G, G), rows integrate to one."""
        return self._transition_matrix(lag) / self.spacing

    def correlation(
        self,
        a: Observable | np.ndarray,
        b: Observable | np.ndarray | None = None,
        lags: np.ndarray | float = 1.0,
        normalization: str = "raw",
    ) -> np.ndarray:
        """E[a(x_0) b(x_lag)] under mu, at any real lags (in frames), shape of `lags`.

        Args:
            a: observable of frames (B, 1), or its values on the grid (G,).
            b: the same; `None` for the autocorrelation of `a`.
            lags: lags in frames, at least 0.
            normalization: `raw`, `connected`, `variance`, `c0` or `static`, as in
                `bopito_inverse.observables.Correlation`.
        """
        a_grid = self._on_grid("a", a)
        b_grid = a_grid if b is None else self._on_grid("b", b)
        lag = np.asarray(lags, dtype=np.float64)
        if not (np.isfinite(lag).all() and (lag >= 0).all()):
            raise ValueError(f"lags must be finite and at least 0, got {lags}")
        mean_a, mean_b = self._mu @ a_grid, self._mu @ b_grid
        if normalization in ("connected", "variance", "static"):
            a_grid, b_grid = a_grid - mean_a, b_grid - mean_b
        amplitude = (self._vectors.T @ (self._sqrt_mu * a_grid)) * (
            self._vectors.T @ (self._sqrt_mu * b_grid)
        )
        value = np.exp(-np.multiply.outer(lag, self._rates)) @ amplitude
        if normalization in ("raw", "connected"):
            return value
        if normalization == "variance":
            return value / np.sqrt((self._mu @ a_grid**2) * (self._mu @ b_grid**2))
        if normalization in ("c0", "static"):
            return value / (self._mu @ (a_grid * b_grid))
        raise ValueError(
            f"normalization must be raw, connected, variance, c0 or static, got {normalization!r}"
        )

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Independent draws of mu by inversion, shape (n, 1)."""
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        cdf = np.concatenate([[0.0], np.cumsum(self._mu)])
        edges = np.concatenate([self.grid - self.spacing / 2, [self.grid[-1] + self.spacing / 2]])
        x = np.interp(u.cpu().numpy(), cdf, edges)
        return torch.as_tensor(x, dtype=torch.float32, device=generator.device)[:, None]

    def equilibrium_score(self, noise: VPSchedule | None = None) -> "ExactEquilibriumScore":
        """The exact eps_eq(x_t, t) of mu."""
        return ExactEquilibriumScore(self, noise or VPSchedule())

    def dynamic_score(
        self, s_eq: "ExactEquilibriumScore", lambda_hat: float
    ) -> "ExactDynamicScore":
        """The exact eps_dyn(x_t, t | x_0, N) = (eps(x_t, t | x_0, N) - eps_eq) / lambda_hat^N.

        Args:
            s_eq: the equilibrium score to be completed; it may belong to another operator (an
                unbiased one, while this one has a barrier).
            lambda_hat: assumed decay per frame of the slowest process.
        """
        return ExactDynamicScore(self, s_eq, lambda_hat)

    def _transition_matrix(self, lag: float) -> np.ndarray:
        if not (np.isfinite(lag) and lag >= 0):
            raise ValueError(f"lag must be a finite number of at least 0, got {lag}")
        symmetric = (self._vectors * np.exp(-self._rates * lag)) @ self._vectors.T
        matrix = np.clip(symmetric * (self._sqrt_mu / self._sqrt_mu[:, None]), 0, None)
        return matrix / matrix.sum(axis=1, keepdims=True)

    def _transition_slope(self, matrix: np.ndarray) -> np.ndarray:
        """Derivative of T(lag) in the lag, T(lag) Q, by the flux between neighbours."""
        flux = matrix[:, :-1] * self._up - matrix[:, 1:] * self._down
        return -np.diff(flux, axis=1, prepend=0.0, append=0.0) * self.system.frame_time

    def _on_grid(self, name: str, f: Observable | np.ndarray) -> np.ndarray:
        if callable(f):
            f = np.asarray(f(torch.from_numpy(self.grid)[:, None]), dtype=np.float64)
        value = np.asarray(f, dtype=np.float64).reshape(-1)
        if value.shape != self.grid.shape:
            raise ValueError(
                f"{name} must give one value per grid point ({len(self.grid)}), got {len(value)}"
            )
        return value


class _ExactScore(nn.Module):
    """Posterior mean of a density on the grid under Gaussian noise, as a noise prediction."""

    grid: Tensor
    event_shape = (1,)

    def __init__(self, operator: TransferOperator, noise: VPSchedule) -> None:
        super().__init__()
        self.operator = operator
        self.noise = noise
        self.scaling = Scaling()
        self.register_buffer("grid", torch.as_tensor(operator.grid, dtype=torch.float32))
        self.register_buffer("rates", torch.as_tensor(operator._rates, dtype=torch.float32))

    def _eps(self, x_t: Tensor, t: Tensor, log_density: Tensor) -> Tensor:
        """(x_t - alpha E[x | x_t]) / sigma, for `log_density` (G,) or (B, G)."""
        t = t.reshape(-1, 1)
        alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
        logits = log_density - ((x_t - alpha * self.grid) / sigma).square() / 2
        mean = torch.softmax(logits, dim=1) @ self.grid
        return (x_t - alpha * mean[:, None]) / sigma


class ExactEquilibriumScore(_ExactScore):
    """Exact eps_eq of a one-dimensional system; an `EquilibriumScore` with no network."""

    log_mu: Tensor

    def __init__(self, operator: TransferOperator, noise: VPSchedule) -> None:
        super().__init__(operator, noise)
        log_mu = np.log(np.maximum(operator.stationary, np.exp(LOG_DENSITY_FLOOR)))
        self.register_buffer("log_mu", torch.as_tensor(log_mu, dtype=torch.float32))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicted noise, shape of `x_t`, (B, 1)."""
        return self._eps(x_t, t, self.log_mu)


class ExactDynamicScore(_ExactScore):
    """Exact eps_dyn of a one-dimensional system; a `DynamicScore` with no network."""

    def __init__(
        self, operator: TransferOperator, s_eq: ExactEquilibriumScore, lambda_hat: float
    ) -> None:
        super().__init__(operator, s_eq.noise)
        if not 0 < lambda_hat < 1:
            raise ValueError(f"lambda_hat must lie in (0, 1), got {lambda_hat}")
        self.s_eq = s_eq
        self.lambda_hat = float(lambda_hat)
        self._known: dict[tuple[float, torch.dtype], Tensor] = {}

    def forward(self, x_t: Tensor, t: Tensor, x_0: Tensor, lag: Tensor) -> Tensor:
        """Predicted noise, shape of `x_t`, (B, 1); `lag` in frames, () or (B,), any real > 0."""
        return self.bind(x_0, lag)(x_t, t)

    def bind(self, x_0: Tensor, lag: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The score as a function of (x_t, t), with the densities of `x_0` looked up once."""
        log_density = self._conditional(x_0, lag)
        decay = (self.lambda_hat**lag).reshape(-1, 1).clamp_min(1e-30)

        def eps_dyn(x_t: Tensor, t: Tensor) -> Tensor:
            return (self._eps(x_t, t, log_density) - self.s_eq(x_t, t)) / decay

        return eps_dyn

    def _conditional(self, x_0: Tensor, lag: Tensor) -> Tensor:
        """log p(. | x_0, lag) on the grid, (B, G), linear in x_0 between grid points."""
        cell, fraction = self._locate(x_0[:, 0])
        rows = self.grid.new_empty(2, len(x_0), len(self.grid))
        lags = lag.detach().expand(len(x_0))
        for value in lags.unique().tolist():
            at = lags == value
            tables, c = self._tables(value), cell[at]
            rows[:, at] = torch.lerp(tables[:, c], tables[:, c + 1], fraction[at, None])
        density, slope = rows
        density = density + (lag - lag.detach()).reshape(-1, 1) * slope  # carries the derivative
        return density.clamp_min(np.exp(LOG_DENSITY_FLOOR)).log()

    def _locate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cell of each x and position there, in [0, 1]; the sides of a barrier do not mix."""
        position = (x - self.grid[0]) / self.operator.spacing
        cell = position.detach().clamp(0, len(self.grid) - 2).long()
        fraction = (position - cell).clamp(0, 1)
        if self.operator.barrier is not None:
            edge = int(np.searchsorted(self.operator.grid, self.operator.barrier)) - 1
            above = x >= self.operator.barrier
            cell = torch.where(above, cell.clamp(min=edge), cell.clamp(max=edge))
            fraction = torch.where(cell == edge, above.to(fraction.dtype), fraction)
        return cell, fraction

    def _tables(self, lag: float) -> Tensor:
        """The transition density at `lag` and its derivative in the lag, shape (2, G, G)."""
        key = (lag, self.grid.dtype)  # float32 tables are too coarse for a model made float64
        known = self._known.pop(key, None)
        if known is None:
            if len(self._known) == LAGS_KEPT:
                self._known.pop(next(iter(self._known)))
            density = self.operator.transition_density(lag)
            both = np.stack([density, self.operator._transition_slope(density)])
            known = torch.from_numpy(both)
        self._known[key] = known.to(self.grid)
        return self._known[key]
