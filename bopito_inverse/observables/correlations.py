r"""Time-correlation functions, each with the error of its own estimate.

Let `a` and `b` be functions of a frame, `a_0 = a(x_0)` and `b_k = b(x_k)`, where `x_k` lies `k`
after `x_0`. With `E` and `Var` over replicas, a correlation function is a smooth function `f` of
the means of `m = (a_0, b_k, a_0^2, b_k^2, a_0 b_k, a_0 b_0, b_0)`:

    raw        E[a_0 b_k]
    connected  E[a_0 b_k] - E[a_0] E[b_k]
    variance   (E[a_0 b_k] - E[a_0] E[b_k]) / sqrt(Var[a_0] Var[b_k])
    c0         E[a_0 b_k] / E[a_0 b_0]
    static     (E[a_0 b_k] - E[a_0] E[b_k]) / (E[a_0 b_0] - E[a_0] E[b_0])

In a stationary process `variance` and `static` of an autocorrelation are one function; their
estimates differ. Where a rare state holds much of the variance, few jumps into it are most of the
noise of Var[b_k], and `static`, which does without, is the better one.

To first order its estimate is a mean over the `R` replicas of the *influence* (delta method)

    f(mean m) - f(E[m]) ~ 1/R sum_r phi_r,      phi_r = grad f (mean m) . (m_r - mean m),

so that `sum_r phi_r phi_r^T / (R (R - 1))` is the covariance of the estimates at all lags. Where
replicas come in groups (antithetic pairs), `phi` is first averaged over each group. Where they
carry weights `w_r` of mean one, `E` and `Var` are weighted and `phi_r` is multiplied by `w_r`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bopito_inverse.arguments import as_count

Observable = Callable[[Tensor], Tensor]


class _Moments(NamedTuple):
    """Means of `m` at each lag, shapes that broadcast to `(..., L)`."""

    a: Tensor
    b: Tensor
    aa: Tensor
    bb: Tensor
    ab: Tensor
    ab_0: Tensor
    b_0: Tensor


class _Normalization(NamedTuple):
    """`value` is f(moments); `influence` is phi(moments, a_0, b_k, a_0 b_0), shape `(R, L)`."""

    value: Callable[[_Moments], Tensor]
    influence: Callable[[_Moments, Tensor, Tensor, Tensor], Tensor]
    centred: bool  # whether f is unchanged when constants are added to a and b


def _raw(m: _Moments) -> Tensor:
    return m.ab


def _raw_influence(m: _Moments, a: Tensor, b: Tensor, ab_0: Tensor) -> Tensor:
    return a * b - m.ab


def _connected(m: _Moments) -> Tensor:
    return m.ab - m.a * m.b


def _connected_influence(m: _Moments, a: Tensor, b: Tensor, ab_0: Tensor) -> Tensor:
    return (a - m.a) * (b - m.b) - _connected(m)


def _variance(m: _Moments) -> Tensor:
    return _connected(m) / ((m.aa - m.a**2) * (m.bb - m.b**2)).sqrt()


def _variance_influence(m: _Moments, a: Tensor, b: Tensor, ab_0: Tensor) -> Tensor:
    z_a = (a - m.a) / (m.aa - m.a**2).sqrt()
    z_b = (b - m.b) / (m.bb - m.b**2).sqrt()
    return z_a * z_b - _variance(m) * (z_a**2 + z_b**2) / 2


def _c0(m: _Moments) -> Tensor:
    return m.ab / m.ab_0


def _c0_influence(m: _Moments, a: Tensor, b: Tensor, ab_0: Tensor) -> Tensor:
    return (a * b - _c0(m) * ab_0) / m.ab_0


def _static(m: _Moments) -> Tensor:
    return _connected(m) / (m.ab_0 - m.a * m.b_0)


def _static_influence(m: _Moments, a: Tensor, b: Tensor, ab_0: Tensor) -> Tensor:
    """Where a_0 and b_0 are centred, as `_linearize` does."""
    return ((a - m.a) * (b - m.b) - _static(m) * ab_0) / m.ab_0


_NORMALIZATIONS = {
    "raw": _Normalization(_raw, _raw_influence, centred=False),
    "connected": _Normalization(_connected, _connected_influence, centred=True),
    "variance": _Normalization(_variance, _variance_influence, centred=True),
    "c0": _Normalization(_c0, _c0_influence, centred=False),
    "static": _Normalization(_static, _static_influence, centred=True),
}
NORMALIZATIONS = tuple(_NORMALIZATIONS)


@dataclass(frozen=True)
class CorrelationSamples:
    """An estimated correlation function and what each independent replica adds to its error.

    Attributes:
        value: the estimate at each lag, shape `(L,)`, float64.
        influence: phi of each independent replica (or group of replicas), shape `(n, L)`, float64;
            its mean over replicas is zero.
    """

    value: Tensor
    influence: Tensor

    @property
    def covariance(self) -> Tensor:
        """Covariance of `value` between lags, `phi^T phi / (n (n - 1))`, shape `(L, L)`.

        Raises:
            ValueError: there is only one independent replica.
        """
        n = len(self.influence)
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 independent replicas, got {n}")
        return self.influence.T @ self.influence / (n * (n - 1))

    @property
    def standard_error(self) -> Tensor:
        """Standard error of `value` at each lag, shape `(L,)`."""
        return self.covariance.diagonal().sqrt()


class Correlation:
    """A time-correlation function of two observables.

    Args:
        a: observable of the first frame: maps frames `(B, *event)` to `(B,)`. For events of shape
            `(1,)` it may return `(B, 1)`. To be differentiated it must be made of torch operations.
        b: observable of the later frame; None for the autocorrelation of `a`.
        normalization: `raw`, `connected`, `variance`, `c0` or `static`; equations at the top of
            this file.
        name: appears in figures and messages; by default the names of the functions.

    Raises:
        ValueError: `normalization` is unknown, or an observable is not callable.

    Where the divisor of `variance`, `c0` or `static` vanishes (a constant observable) the value is
    NaN or infinite: it is not checked, because that would copy from the device at each call.

    >>> position = Correlation(lambda x: x)
    >>> x_0 = torch.tensor([[-1.0], [1.0]])
    >>> position(x_0, torch.stack([x_0, 0.5 * x_0])).tolist()
    [1.0, 0.5]
    """

    def __init__(
        self,
        a: Observable,
        b: Observable | None = None,
        normalization: str = "connected",
        name: str | None = None,
    ) -> None:
        for argument, function in (("a", a), ("b", a if b is None else b)):
            if not callable(function):
                raise ValueError(f"{argument} must be a function of frames, got {function!r}")
        if normalization not in _NORMALIZATIONS:
            raise ValueError(
                f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}"
            )
        self.a = a
        self.b = a if b is None else b
        self.normalization = normalization
        self.name = name or (_label(a) if b is None else f"{_label(a)}*{_label(b)}")

    def __repr__(self) -> str:
        return f"Correlation({self.name}, normalization={self.normalization!r})"

    def __call__(self, x_0: Tensor, x_k: Tensor, weights: Tensor | None = None) -> Tensor:
        """The estimate at each lag, shape `(L,)`, float64; arguments as in `contributions`."""
        return self.contributions(x_0, x_k, weights=weights).value

    def contributions(
        self, x_0: Tensor, x_k: Tensor, groups: int = 1, weights: Tensor | None = None
    ) -> CorrelationSamples:
        """The estimate at each lag with the contribution of each replica.

        Args:
            x_0: first frames, shape `(R, *event)`.
            x_k: the frames of the same replicas at L later times, shape `(L, R, *event)`.
            groups: replicas `r`, `r + R/groups`, ... are not independent of each other and are
                averaged; 2 for `x_0 = torch.cat([x, x])` with noise `torch.cat([z, -z])`.
            weights: importance weight of each replica, `(R,)`; equal ones by default.

        Returns:
            `value (L,)` and `influence (R / groups, L)`, both differentiable in `x_0` and `x_k`.

        Raises:
            ValueError: shapes do not fit each other, or an observable returns another shape.
        """
        if x_k.ndim != x_0.ndim + 1 or x_k.shape[1:] != x_0.shape or 0 in x_k.shape[:2]:
            raise ValueError(
                f"x_k must have shape (n_lags, *x_0.shape) = (n_lags, {_csv(x_0.shape)}) with at "
                f"least one lag and one replica, got ({_csv(x_k.shape)})"
            )
        n_lags, n_replicas = x_k.shape[:2]
        if n_replicas % as_count("groups", groups):
            raise ValueError(f"groups must divide the {n_replicas} replicas, got {groups}")
        a_0 = _evaluate("a", self.a, x_0)[:, None]
        b_0 = _evaluate("b", self.b, x_0)[:, None]
        b_k = _evaluate("b", self.b, x_k.flatten(0, 1)).view(n_lags, n_replicas).T
        value, influence = self._linearize(a_0, b_0, b_k, _as_weights(weights, n_replicas))
        return CorrelationSamples(value, influence.unflatten(0, (groups, -1)).mean(0))

    def uncorrelated(self, frames: Tensor, weights: Tensor | None = None) -> Tensor:
        """The value between independent frames, to which it decays, ().

        Args:
            frames: `(R, *event)`.
            weights: of the frames, `(R,)`; equal ones by default.
        """
        a, b = _evaluate("a", self.a, frames), _evaluate("b", self.b, frames)
        if _NORMALIZATIONS[self.normalization].centred:
            return torch.zeros_like(a[0])
        w = _as_weights(weights, len(frames))
        a, b, ab = (x if w is None else w[:, 0] * x for x in (a, b, a * b))
        product = a.mean() * b.mean()
        return product / ab.mean() if self.normalization == "c0" else product

    def _linearize(
        self, a_0: Tensor, b_0: Tensor, b_k: Tensor, w: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Value `(L,)` and influence `(R, L)` from a_0, b_0, w `(R, 1)` and b_k `(R, L)`."""

        def mean(x: Tensor) -> Tensor:
            return x.mean(0) if w is None else (w * x).mean(0)

        f = _NORMALIZATIONS[self.normalization]
        if f.centred:  # no cancellation in E[a b] - E[a] E[b] when the means are large
            a_0, b_0, b_k = (x - mean(x) for x in (a_0, b_0, b_k))
        ab_0 = a_0 * b_0
        powers = (a_0, b_k, a_0**2, b_k**2, a_0 * b_k, ab_0, b_0)
        moments = _Moments(*map(mean, powers))
        influence = f.influence(moments, a_0, b_k, ab_0)
        return f.value(moments), influence if w is None else w * influence

    def from_trajectories(
        self,
        trajectories: Iterable[Tensor | np.ndarray],
        lags: Sequence[int] | np.ndarray | Tensor,
        n_blocks: int = 50,
        weights: Sequence[Any] | np.ndarray | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Time-averaged estimate: E runs over every pair of frames of every trajectory.

        Args:
            trajectories: tensors `(n_frames, *event)` of any lengths, read once.
            lags: whole numbers of frames, zero allowed, shape `(L,)`.
            n_blocks: trajectories, in the order given, are joined into at most this many blocks
                for the jackknife. Trajectories that depend on each other should be neighbours.
            weights: by which frames average to equilibrium, where starts were not drawn from it:
                a number for each trajectory, or `(n_frames,)` for each. A pair weighs as its first
                frame does, so that the frames of each time must average to equilibrium, not only
                all of them. Blocks should be alike: let trajectories of large and of small weights
                take turns.

        Returns:
            `(value, standard_error)`, each `(L,)`, float64. The standard error is that of a
            delete-one-block jackknife; it is infinite at lags that only one block reaches.

        Raises:
            ValueError: a lag is not a whole number or longer than every trajectory; a trajectory
                is empty or its observables are not finite.
        """
        k = _as_lags(lags)
        sums, shift = [], None
        for index, trajectory in enumerate(trajectories):
            a, b = self._series(f"trajectory {index}", torch.as_tensor(trajectory))
            w = _frame_weights(weights, index, a)
            if shift is None and _NORMALIZATIONS[self.normalization].centred:
                shift = (a.mean(), b.mean())
            if shift is not None:
                a, b = a - shift[0], b - shift[1]
            sums.append(_pair_sums(a, b, w, k.to(a.device)))
        if not sums:
            raise ValueError("trajectories must hold at least one trajectory, got none")
        if weights is not None and len(weights) != len(sums):
            raise ValueError(
                f"weights must be one for each of {len(sums)} trajectories, got {len(weights)}"
            )
        per_trajectory = torch.stack(sums)
        _check_reached(k, per_trajectory)
        blocks = per_trajectory.tensor_split(min(as_count("n_blocks", n_blocks), len(sums)))
        return self._jackknife(torch.stack([block.sum(0) for block in blocks]))

    def _series(self, name: str, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Observables along one trajectory, checked."""
        if frames.ndim == 0 or len(frames) == 0:
            raise ValueError(f"{name} must hold at least one frame, got shape {_csv(frames.shape)}")
        a, b = _evaluate("a", self.a, frames), _evaluate("b", self.b, frames)
        finite = a.isfinite() & b.isfinite()
        if not finite.all():
            first = int((~finite).nonzero()[0, 0])
            raise ValueError(f"{name} must have finite observables, got NaN or inf, frame {first}")
        return a, b

    def _jackknife(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Value and standard error from the sums of each block, shape `(n_blocks, 8, L)`."""
        value = self._from_sums(blocks.sum(0))
        reached = blocks[:, 0] > 0
        n = reached.sum(0)
        left_out = self._from_sums(blocks.sum(0) - blocks)
        left_out = torch.where(reached, left_out, 0.0)
        deviation = torch.where(reached, left_out - left_out.sum(0) / n, 0.0)
        error = ((deviation**2).sum(0) * (n - 1) / n).sqrt()
        return value, torch.where(n > 1, error, torch.inf)

    def _from_sums(self, sums: Tensor) -> Tensor:
        """f from (weight of all pairs, sums of m), shape `(..., 8, L)`."""
        count, *totals = sums.unbind(-2)
        return _NORMALIZATIONS[self.normalization].value(_Moments(*(t / count for t in totals)))


def _pair_sums(a: Tensor, b: Tensor, w: Tensor, lags: Tensor) -> Tensor:
    """Weight of all pairs (t, t + lag) of one trajectory and the sums of m over them, `(8, L)`."""
    n = len(a)
    inside = lags < n
    k = lags.clamp(max=n - 1)
    size = n + int(k.max())  # padding that keeps the circular correlation from wrapping
    first = torch.fft.rfft(torch.stack([w, w, w * a]), size).conj()
    later = torch.fft.rfft(torch.stack([b, b**2, b]), size)
    b_k, bb_k, ab_k = torch.fft.irfft(first * later, size)[:, k]
    heads = w * torch.stack([torch.ones_like(a), a, a**2, a * b, b])
    total, a_0, aa, ab_0, b_0 = heads.cumsum(1)[:, n - 1 - k]
    return torch.where(inside, torch.stack([total, a_0, b_k, aa, bb_k, ab_k, ab_0, b_0]), 0.0)


def _evaluate(argument: str, function: Observable, frames: Tensor) -> Tensor:
    """One float64 number for each frame, shape `(B,)`."""
    value = function(frames)
    if not isinstance(value, Tensor):
        raise ValueError(f"{argument} must return a tensor, got {type(value).__name__}")
    n = len(frames)
    if frames.shape[1:] == (1,) and value.shape == (n, 1):
        value = value.squeeze(1)
    if value.shape != (n,):
        raise ValueError(
            f"{argument} must map frames of shape ({_csv(frames.shape)}) to one number each, "
            f"shape ({n},), got ({_csv(value.shape)})"
        )
    return value.to(torch.float64)


def _as_weights(weights: Tensor | None, n: int) -> Tensor | None:
    """Weights (n, 1) of mean one, float64."""
    if weights is None:
        return None
    if weights.shape != (n,):
        raise ValueError(f"weights must have shape ({n},), got ({_csv(weights.shape)})")
    w = weights.double()[:, None]
    return w / w.mean()


def _frame_weights(weights: Any, index: int, a: Tensor) -> Tensor:
    """Weights of the frames of one trajectory, shape and kind of `a`."""
    if weights is None:
        return torch.ones_like(a)
    if index >= len(weights):
        raise ValueError(f"weights must be as many as trajectories, got {len(weights)}")
    w = torch.as_tensor(weights[index]).to(a)
    if w.shape not in ((), a.shape) or not (w >= 0).all():
        raise ValueError(
            f"weights[{index}] must be zero or more, one number or one for each of {len(a)} "
            f"frames, got {weights[index]!r}"
        )
    return w.expand(a.shape)


def _as_lags(lags: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """Lags as int64, shape `(L,)`."""
    k = torch.as_tensor(lags).detach().cpu()
    if k.ndim != 1 or len(k) == 0:
        raise ValueError(f"lags must be a list of whole numbers, got shape ({_csv(k.shape)})")
    if not ((k >= 0) & (k == k.round())).all():
        raise ValueError(f"lags must be whole numbers of frames, zero or more, got {k.tolist()}")
    return k.long()


def _check_reached(lags: Tensor, per_trajectory: Tensor) -> None:
    """Refuse lags with no pair of frames."""
    pairs = per_trajectory[:, 0].cpu()
    missing = lags[pairs.sum(0) == 0].tolist()
    if missing:
        raise ValueError(f"lags must be shorter than the longest trajectory, got {missing}")


def _label(function: Observable) -> str:
    return getattr(function, "__name__", type(function).__name__).strip("<>")


def _csv(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
