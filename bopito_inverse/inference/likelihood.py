r"""The likelihood of measured correlations given the parameters of a fit.

Point i was measured as y_i at a lag, for an observable. The model has an output g_i(u) for it,
known to Monte Carlo covariance C, to an interpolation error delta, and to a discrepancy along a
direction d (see `emulator` and `discrepancy`):

    y = A (g(u) + e) + B + eps,     e ~ N(0, C + delta delta^T + tau^2 d d^T),     eps ~ N(0, S),

with the experiment's covariance S. Nuisance parameters, each with a prior, may scale and shift an
observable (A, B) and stretch its error bars (S_ij -> s_i s_j S_ij).

Student-t errors are Gaussian given a precision for each point: eps_i ~ N(0, sigma_i^2 / v_i) with
v_i ~ Gamma(nu / 2, nu / 2), and so is y. The density of y is the average of these Gaussians over
v, by importance sampling with quasi-random v from the best factorised approximation to their
distribution given y,

    q(v_i) = Gamma((nu + 1) / 2, (nu + E[(y_i - A g_i - A e_i - B)^2] / sigma_i^2) / 2),

which is exact where the model has no error, and where nu is large.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import gammaln, logsumexp
from scipy.stats import gamma, norm, qmc

from bopito_inverse.inference.discrepancy import Discrepancy
from bopito_inverse.inference.emulator import Emulator

CHUNK = 400
T_DRAWS, T_ROUNDS = 32, 8  # quasi-random precisions in a Student-t likelihood, and rounds to q


@dataclass(frozen=True)
class Points:
    """Measured points of all experiments, one after the other.

    Attributes:
        values: (L,).
        covariance: covariance of the errors, (L, L).
        lags: in frames, (L,).
        observable: index of the observable, (L,).
        columns: which output of the emulator predicts each point, (L,).
        group: which n_int each point belongs to, (L,).
    """

    values: np.ndarray
    covariance: np.ndarray
    lags: np.ndarray
    observable: np.ndarray
    columns: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, keep: np.ndarray) -> "Points":
        """The points at which `keep` (L,) is true."""
        return Points(
            self.values[keep],
            self.covariance[np.ix_(keep, keep)],
            self.lags[keep],
            self.observable[keep],
            self.columns[keep],
            self.group[keep],
        )


@dataclass(frozen=True)
class Nuisance:
    """Priors of what may be wrong with a measured observable; None where nothing is.

    Args:
        scale: frozen `scipy.stats` distribution of the factor A, for example `norm(1, 0.05)`.
        offset: of the shift B.
        sigma_scale: of the factor s on the standard errors, positive, for example `lognorm(0.3)`.
    """

    scale: Any = None
    offset: Any = None
    sigma_scale: Any = None

    def __post_init__(self) -> None:
        for name, prior in self.priors().items():
            if not hasattr(prior, "ppf"):
                raise ValueError(f"{name} must be a frozen scipy.stats distribution, got {prior!r}")
        if self.sigma_scale is not None and not self.sigma_scale.cdf(0.0) == 0:
            raise ValueError("sigma_scale must have a prior of positive numbers")

    def priors(self) -> dict[str, Any]:
        """The priors that are given, by name."""
        named = {"scale": self.scale, "offset": self.offset, "sigma_scale": self.sigma_scale}
        return {name: prior for name, prior in named.items() if prior is not None}


@dataclass(frozen=True)
class Parameters:
    """What one draw says, for B draws and L points.

    Attributes:
        u: coordinate of each group, (B, n_groups).
        scale, offset, sigma_scale: of each point, (B, L).
    """

    u: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    sigma_scale: np.ndarray

    def split(self, size: int) -> Iterator["Parameters"]:
        """Pieces of at most `size` draws."""
        for first in range(0, len(self.u), size):
            part = slice(first, first + size)
            yield Parameters(
                self.u[part], self.scale[part], self.offset[part], self.sigma_scale[part]
            )


@dataclass(frozen=True)
class Moments:
    """Gaussian description of model and noise at B draws, (B, L) and (B, L, L)."""

    mean: np.ndarray
    model: np.ndarray
    noise: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Covariance of the data, (B, L, L)."""
        return self.model + self.noise

    def of(self, points: np.ndarray) -> "Moments":
        """Those of some of the points, by index."""
        rows, columns = points[:, None], points
        return Moments(
            self.mean[:, points], self.model[:, rows, columns], self.noise[:, rows, columns]
        )


@dataclass(frozen=True)
class Likelihood:
    """Log likelihood of points, and what the points say about other outputs of the model.

    Args:
        points: the measured points.
        emulator: predictions of the model.
        discrepancy: direction in which the model may be wrong, or None.
        dof: degrees of freedom of Student-t errors; None for Gaussian ones.
        mc_scale: factor on the Monte Carlo covariance (what another number of replicas would do).
        with_error: whether the error of the emulator counts.
    """

    points: Points
    emulator: Emulator
    discrepancy: Discrepancy | None = None
    dof: float | None = None
    mc_scale: float = 1.0
    with_error: bool = True

    def varied(self, **changes: Any) -> "Likelihood":
        """The same with other settings."""
        return replace(self, **changes)

    def __call__(self, parameters: Parameters) -> np.ndarray:
        """Log likelihood, (B,)."""
        return self._by_chunk(parameters, self._log_density)

    def pointwise(self, parameters: Parameters) -> np.ndarray:
        """Log density of each point given all others, (B, L); what leave-one-out needs.

        With Student-t errors, of each point by itself.
        """
        return self._by_chunk(parameters, self._pointwise)

    def moments(self, parameters: Parameters) -> Moments:
        """Mean and covariances of the data."""
        points = self.points
        mean, model = self._latent(parameters.u[:, points.group], points.columns)
        a, s = parameters.scale, parameters.sigma_scale
        return Moments(
            a * mean + parameters.offset,
            a[:, :, None] * a[:, None] * model,
            s[:, :, None] * s[:, None] * points.covariance,
        )

    def draw(
        self,
        parameters: Parameters,
        u: np.ndarray,
        columns: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """One draw of the true outputs in `columns` (E,) at `u` (B, E) given the data, (B, E).

        Errors of the model are shared between all its outputs, so that the residuals say something
        about all of them. Student-t errors count with their variance.
        """
        n = len(self.points)
        out = []
        first = 0
        for part in parameters.split(CHUNK):
            own = slice(first, first + len(part.u))
            first += len(part.u)
            both = np.concatenate([part.u[:, self.points.group], u[own]], axis=1)
            every = np.concatenate([self.points.columns, columns])
            mean, model = self._latent(both, every)
            a = part.scale
            observed = a[:, :, None] * model[:, :n]  # covariance of data and outputs
            noise = self.moments(part).noise * _t_variance(self.dof)
            total = observed[:, :, :n] * a[:, None] + noise
            gain = np.linalg.solve(total, observed).transpose(0, 2, 1)
            residual = self.points.values - a * mean[:, :n] - part.offset
            centre = mean + np.einsum("bij,bj->bi", gain, residual)
            left = model - gain @ observed
            out.append(centre[:, n:] + gaussian(left[:, n:, n:], rng))
        return np.concatenate(out)

    def noise(self, parameters: Parameters, rng: np.random.Generator) -> np.ndarray:
        """One draw of the measurement noise for each of B draws, (B, L)."""
        shape = parameters.scale.shape
        z = rng.standard_normal(shape) if self.dof is None else rng.standard_t(self.dof, shape)
        return parameters.sigma_scale * (z @ np.linalg.cholesky(self.points.covariance).T)

    def _latent(self, u: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the outputs themselves."""
        made = self.emulator(u, columns)
        covariance = self.mc_scale * made.covariance
        if self.with_error:
            covariance = covariance + made.error[:, :, None] * made.error[:, None]
        if self.discrepancy is not None:
            d = self.discrepancy(u, columns)
            covariance = covariance + d[:, :, None] * d[:, None]
        return made.mean, covariance

    def _by_chunk(
        self, parameters: Parameters, function: Callable[[Parameters], np.ndarray]
    ) -> np.ndarray:
        return np.concatenate([function(part) for part in parameters.split(CHUNK)])

    def _log_density(self, parameters: Parameters) -> np.ndarray:
        residual, moments = self._residual(parameters)
        if self.dof is None:
            return _log_normal(residual, moments.total)
        return self._log_student_t(residual, moments)

    def _residual(self, parameters: Parameters) -> tuple[np.ndarray, Moments]:
        moments = self.moments(parameters)
        return self.points.values - moments.mean, moments

    def _pointwise(self, parameters: Parameters) -> np.ndarray:
        residual, moments = self._residual(parameters)
        if self.dof is not None:
            own = [np.array([i]) for i in range(residual.shape[1])]
            each = [self._log_student_t(residual[:, i], moments.of(i)) for i in own]
            return np.stack(each, axis=1)
        precision = np.linalg.inv(moments.total)
        diagonal = np.diagonal(precision, axis1=1, axis2=2)
        other = np.einsum("bij,bj->bi", precision, residual) / diagonal
        return norm.logpdf(other, scale=1 / np.sqrt(diagonal))

    def _log_student_t(self, residual: np.ndarray, moments: Moments) -> np.ndarray:
        """Log density of residuals (B, L), averaged over precisions v (B, T_DRAWS, L)."""
        sigma_2 = np.diagonal(moments.noise, axis1=1, axis2=2)
        prior, shape = self.dof / 2, (self.dof + 1) / 2  # type: ignore[operator]
        rate = prior + _squared(residual, moments.model, sigma_2, self.dof) / 2
        v = gamma.ppf(_quasi_uniform(residual.shape[1]), shape) / rate[:, None]
        log_p = prior * np.log(prior) - gammaln(prior) + (prior - 1) * np.log(v) - prior * v
        rate = rate[:, None]
        log_q = shape * np.log(rate) - gammaln(shape) + (shape - 1) * np.log(v) - rate * v
        total = moments.model[:, None] + _diagonal(sigma_2[:, None] / v)
        given = _log_normal(residual[:, None], total)
        return logsumexp(given + (log_p - log_q).sum(2), axis=1) - np.log(T_DRAWS)


def gaussian(covariance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw of N(0, covariance) for each (B, L, L); singular ones allowed."""
    root = _root(covariance)
    return np.einsum("bij,bj->bi", root, rng.standard_normal(root.shape[:2]))


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with R R^T = covariance, (B, L, L); to rounding, where it is singular."""
    largest = np.abs(np.diagonal(covariance, axis1=1, axis2=2)).max(1)
    tiny = (1e-9 * largest + 1e-30)[:, None, None] * np.eye(covariance.shape[1])
    return np.linalg.cholesky(covariance + tiny)


def _squared(
    residual: np.ndarray, model: np.ndarray, sigma_2: np.ndarray, dof: float | None
) -> np.ndarray:
    """E[eps_i^2 | y] / sigma_i^2 (B, L) in the factorised approximation, by iteration."""
    v = np.ones_like(sigma_2)
    for _ in range(T_ROUNDS):
        noise = sigma_2 / v
        precision = np.linalg.inv(model + _diagonal(noise))
        mean = noise * np.einsum("bij,bj->bi", precision, residual)
        variance = noise - noise**2 * np.diagonal(precision, axis1=1, axis2=2)
        squared = (mean**2 + variance) / sigma_2
        v = (dof + 1) / (dof + squared)  # type: ignore[operator]
    return squared


def _diagonal(values: np.ndarray) -> np.ndarray:
    """Diagonal matrices (..., L, L) of values (..., L)."""
    return values[..., None] * np.eye(values.shape[-1])


def _quasi_uniform(n: int) -> np.ndarray:
    """Quasi-random numbers in (0, 1), (T_DRAWS, n)."""
    return qmc.Sobol(n, seed=0).random(T_DRAWS)


def _t_variance(dof: float | None) -> float:
    """Variance of a t variable; a large one where it has none."""
    if dof is None:
        return 1.0
    return dof / (dof - 2) if dof > 2.2 else 11.0


def _log_normal(residual: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """log N(residual; 0, covariance) of (..., L) and (..., L, L), (...)."""
    root = np.linalg.cholesky(covariance)
    z = np.linalg.solve(root, np.broadcast_to(residual, root.shape[:-1])[..., None])[..., 0]
    log_det = np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
    return -0.5 * (z**2).sum(-1) - log_det - 0.5 * residual.shape[-1] * np.log(2 * np.pi)
