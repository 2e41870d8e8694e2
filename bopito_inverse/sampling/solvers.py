r"""Solvers that turn noise into frames by integrating the reverse diffusion.

Every solver visits n + 1 log signal-to-noise ratios r = log alpha / sigma, from t = 1 to t = 0,
calls the score once at each of them but for extra stages, and returns the data prediction
D(x_t, t) = (x_t - sigma eps) / alpha of the last call. The probability-flow ODE, written for D
between two ratios r < s, is

    x_s = (sigma_s / sigma_r) x_r + sigma_s \int_r^s e^u D(u) du,

(Lu et al., DPM-Solver++, arXiv 2211.01095, eq. 8). Solvers differ in how they extrapolate D.
No solver disables autograd: the caller chooses.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from bopito_inverse.arguments import as_count
from bopito_inverse.models.scores import BoundScore
from bopito_inverse.noise import VPSchedule, per_replica

SHORTEST = 0.01  # diffusion time; steps in the ratio must not vanish

NormalDraw = Callable[[Tensor], Tensor]
"""Standard normal numbers, shaped like the argument."""


class Solver(Protocol):
    """Maps noise to standardised frames; `evaluations` counts its score calls."""

    @property
    def evaluations(self) -> int:
        """Score calls for one sample."""
        ...

    def __call__(
        self,
        eps: BoundScore,
        noise: VPSchedule,
        x_t: Tensor,
        normal: NormalDraw,
        signal: Tensor | None = None,
    ) -> Tensor:
        """Standardised frames (B, *event) from noised ones `x_t` (B, *event).

        `signal` is the amplitude w of the signal in x_t = w y + sqrt(1 - w^2) eps, () or (B,), in
        [0, 1]: the integration starts at the time at which alpha = w. By default there is none,
        and `x_t` is pure noise.
        """
        ...


class DPMSolver:
    """Multistep DPM-Solver++ in the data prediction, of order 1 (DDIM), 2 or 3.

    One score call a step. Order 2 is DPM-Solver++(2M), arXiv 2211.01095, algorithm 2; order 3
    adds the second difference of the last three data predictions.

    Args:
        evaluations: score calls for one sample. The stiff bonds and angles of a molecule need some
            20; with 12 they are strained.
        order: order of the extrapolation.
    """

    def __init__(self, evaluations: int = 20, order: int = 3) -> None:
        self.evaluations = as_count("evaluations", evaluations, 2)
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {order}")
        self.order = order

    def __repr__(self) -> str:
        return f"DPMSolver(evaluations={self.evaluations}, order={self.order})"

    def __call__(
        self,
        eps: BoundScore,
        noise: VPSchedule,
        x_t: Tensor,
        normal: NormalDraw,
        signal: Tensor | None = None,
    ) -> Tensor:
        """Standardised frames (B, *event); deterministic given `x_t`."""
        times, x, data = _start(eps, noise, x_t, signal, self.evaluations)
        past: list[Tensor] = []
        for t, s in pairwise(times):
            past = [data, *past][: self.order]
            x = _multistep(x, past, noise, t, s)
            data = _data(eps, noise, x, s)
        return data


class Heun:
    """Second-order Runge-Kutta in the data prediction; two score calls a step."""

    def __init__(self, evaluations: int = 39) -> None:
        if as_count("evaluations", evaluations, 3) % 2 == 0:
            raise ValueError(f"evaluations must be odd for Heun, got {evaluations}")
        self.evaluations = evaluations

    def __repr__(self) -> str:
        return f"Heun(evaluations={self.evaluations})"

    def __call__(
        self,
        eps: BoundScore,
        noise: VPSchedule,
        x_t: Tensor,
        normal: NormalDraw,
        signal: Tensor | None = None,
    ) -> Tensor:
        """Standardised frames (B, *event); deterministic given `x_t`."""
        times, x, data = _start(eps, noise, x_t, signal, (self.evaluations + 1) // 2)
        for t, s in pairwise(times):
            trial = _multistep(x, [data], noise, t, s)
            slope = _data(eps, noise, trial, s) - data
            # the integral of a straight line in the ratio between the two predictions
            h = noise.log_ratio(s) - noise.log_ratio(t)
            x = trial + noise.alpha(s) * _phi_2(h) * slope
            data = _data(eps, noise, x, s)
        return data


class Ancestral:
    """First-order reverse SDE (ancestral sampling): fresh noise at every step."""

    def __init__(self, evaluations: int = 500) -> None:
        self.evaluations = as_count("evaluations", evaluations, 2)

    def __repr__(self) -> str:
        return f"Ancestral(evaluations={self.evaluations})"

    def __call__(
        self,
        eps: BoundScore,
        noise: VPSchedule,
        x_t: Tensor,
        normal: NormalDraw,
        signal: Tensor | None = None,
    ) -> Tensor:
        """Standardised frames (B, *event), random given `x_t`."""
        times, x, data = _start(eps, noise, x_t, signal, self.evaluations)
        for t, s in pairwise(times):
            shrink = torch.exp(noise.log_ratio(t) - noise.log_ratio(s))
            spread = noise.sigma(s) * torch.sqrt(1 - shrink**2)
            kept = noise.sigma(s) / noise.sigma(t) * shrink
            x = kept * x + noise.alpha(s) * (1 - shrink**2) * data + spread * normal(x)
            data = _data(eps, noise, x, s)
        return data


def _data(eps: BoundScore, noise: VPSchedule, x: Tensor, t: Tensor) -> Tensor:
    """Data prediction D(x, t) = (x - sigma eps) / alpha."""
    return (x - noise.sigma(t) * eps(x, t.reshape(-1) if t.ndim else t)) / noise.alpha(t)


def _start(
    eps: BoundScore, noise: VPSchedule, x_t: Tensor, signal: Tensor | None, n: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """n times in equal steps of the ratio down to 0, and frame and data prediction at the first.

    Where there is less signal than at t = 1, the rest is added: the mean of the noised density is
    alpha E[y], and the first data prediction is E[y] to order alpha, so that adding alpha D leaves
    an error of order alpha^2, at no cost.
    """
    w = x_t.new_zeros(()) if signal is None else signal.to(x_t.dtype)
    least, most = noise.alpha(w.new_tensor([1.0, SHORTEST])).unbind()
    first = noise.time(w.clamp(least, most))
    times = [per_replica(first * (1 - i / (n - 1)), x_t) for i in range(n)]
    data = _data(eps, noise, x_t, times[0])
    missing = (least - w).clamp(min=0)
    return times, x_t + per_replica(missing, x_t) * data, data


def _multistep(x: Tensor, past: list[Tensor], noise: VPSchedule, t: Tensor, s: Tensor) -> Tensor:
    """One exponential Adams-Bashforth step from t to s; equal steps in the ratio."""
    h = noise.log_ratio(s) - noise.log_ratio(t)
    step = (noise.sigma(s) / noise.sigma(t)) * x - noise.alpha(s) * torch.expm1(-h) * past[0]
    if len(past) == 2:
        step = step + noise.alpha(s) * _phi_2(h) * (past[0] - past[1])
    if len(past) == 3:
        first = 1.5 * past[0] - 2 * past[1] + 0.5 * past[2]
        second = past[0] - 2 * past[1] + past[2]
        step = step + noise.alpha(s) * (_phi_2(h) * first + _phi_3(h) * second)
    return step


def _phi_2(h: Tensor) -> Tensor:
    """e^-h times the integral of e^u u / h du over [0, h]."""
    return 1 + torch.expm1(-h) / h


def _phi_3(h: Tensor) -> Tensor:
    """e^-h times the integral of e^u (u / h)^2 / 2 du over [0, h]."""
    return 0.5 - _phi_2(h) / h


def standard_normal_quantiles(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Midpoint quantiles of N(0, 1), shape (n, 1): noise-free quadrature in one dimension."""
    u = (torch.arange(n, device=device, dtype=torch.float64) + 0.5) / n
    return (math.sqrt(2) * torch.erfinv(2 * u - 1)).float()[:, None]
