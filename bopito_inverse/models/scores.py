r"""Scores, as predictions of the noise eps; the score itself is -eps / sigma(t).

    equilibrium  eps_eq(x_t, t)            = sigma x_t + alpha F(x_t, t)
    dynamic      eps_dyn(x_t, t | x_0, N)  = alpha F(x_t, t, x_0, N)
    ITO          eps(x_t, t | x_0, N)      = sigma x_t + alpha F(x_t, t, x_0, N)
    BoPITO       eps(x_t, t | x_0, N)      = eps_eq(x_t, t) + lambda_hat^N eps_dyn(x_t, t | x_0, N)

(Viguera Diez et al., arXiv 2410.10605, eqs. 8 to 10.) F is the network; written in this way it
predicts the velocity alpha eps - sigma y of the diffusion, of order one at every noise level, so
that its error is amplified neither at t = 0 nor at t = 1 (Salimans and Ho, arXiv 2202.00512).

Shapes: `x_t` and `x_0` are standardised frames (B, *event); `t` and `lag` are () or (B,). `lag`
counts frames and may be any real number above zero.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bopito_inverse.models.networks import MLP
from bopito_inverse.models.painn import PaiNN
from bopito_inverse.noise import Scaling, VPSchedule, per_replica

BoundScore = Callable[[Tensor, Tensor], Tensor]
"""A score whose conditioning is fixed: (x_t (B, *event), t ()) -> eps (B, *event)."""


NETWORKS: dict[str, Any] = {"mlp": MLP, "painn": PaiNN}


class _NetworkScore(nn.Module):
    """A network, the diffusion that it was trained on, and the standardisation of its frames.

    `network` holds the arguments of an `MLP`, or of a `PaiNN` with `kind = "painn"`.
    """

    conditional: bool

    def __init__(
        self,
        event_shape: tuple[int, ...],
        network: dict[str, Any] | None = None,
        noise: VPSchedule | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.noise = noise or VPSchedule()
        self.scaling = _own(scaling or Scaling(), self.event_shape)
        arguments = {"kind": "mlp", **(network or {})}
        kind = NETWORKS[arguments.pop("kind")]
        self.network = kind(self.event_shape, self.conditional, **arguments)

    def config(self) -> dict[str, Any]:
        """All hyperparameters, as plain JSON values; `from_config` rebuilds the score."""
        return {
            "event_shape": list(self.event_shape),
            "network": self.network.config(),
            "noise": self.noise.config(),
            "centred": self.scaling.centred,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "_NetworkScore":
        """An untrained score with these hyperparameters."""
        return cls(
            tuple(config["event_shape"]),
            config["network"],
            VPSchedule(**config["noise"]),
            Scaling(centred=config.get("centred", False)),
        )


class EquilibriumScore(_NetworkScore):
    """Score of the stationary density, a Boltzmann generator."""

    conditional = False

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicted noise, shape of `x_t`."""
        f = self.network(x_t, self.noise.log_ratio(t))
        return (
            per_replica(self.noise.sigma(t), x_t) * x_t + per_replica(self.noise.alpha(t), x_t) * f
        )


class DynamicScore(_NetworkScore):
    """What distinguishes the transition density from the stationary one, before its decay."""

    conditional = True

    def bind(self, x_0: Tensor, lag: Tensor) -> BoundScore:
        """eps_dyn as a function of (x_t, t)."""
        context = self.network.context(x_0, lag)

        def eps_dyn(x_t: Tensor, t: Tensor) -> Tensor:
            f = self.network(x_t, self.noise.log_ratio(t), context)
            return per_replica(self.noise.alpha(t), x_t) * f

        return eps_dyn

    def forward(self, x_t: Tensor, t: Tensor, x_0: Tensor, lag: Tensor) -> Tensor:
        """Predicted noise, shape of `x_t`."""
        return self.bind(x_0, lag)(x_t, t)


class ITOScore(DynamicScore):
    """Implicit transfer operator: the transition density by one network, with no prior."""

    def bind(self, x_0: Tensor, lag: Tensor) -> BoundScore:
        """Eps as a function of (x_t, t)."""
        velocity = super().bind(x_0, lag)

        def eps(x_t: Tensor, t: Tensor) -> Tensor:
            return per_replica(self.noise.sigma(t), x_t) * x_t + velocity(x_t, t)

        return eps


def _own(scaling: Scaling, event_shape: tuple[int, ...]) -> Scaling:
    """A copy with one mean per component of a frame."""
    mean = scaling.mean.cpu()
    if mean.ndim and tuple(mean.shape) != event_shape:
        raise ValueError(
            f"scaling must have a mean of shape () or {event_shape}, got {tuple(mean.shape)}"
        )
    return Scaling(mean.expand(event_shape).tolist(), float(scaling.scale), scaling.centred)


class BoPITOScore(nn.Module):
    """Equilibrium score plus decaying dynamic score.

    Args:
        s_eq: an `EquilibriumScore`, trained or exact.
        s_dyn: a `DynamicScore` of the same diffusion, trained or exact.
        lambda_hat: assumed decay per frame of the slowest process, in (0, 1).
        lag_max: longest lag, in frames, that `s_dyn` was trained on.

    Raises:
        ValueError: lambda_hat outside (0, 1), lag_max no whole number above zero, or the two scores
            differ in event shape, noise schedule or standardisation.
    """

    def __init__(self, s_eq: nn.Module, s_dyn: nn.Module, lambda_hat: float, lag_max: int) -> None:
        super().__init__()
        if not 0 < lambda_hat < 1:
            raise ValueError(f"lambda_hat must lie in (0, 1), got {lambda_hat}")
        if not (math.isfinite(lag_max) and lag_max >= 1 and lag_max == int(lag_max)):
            raise ValueError(f"lag_max must be a whole number of frames above 0, got {lag_max}")
        for what in ("event_shape", "noise"):
            if getattr(s_eq, what) != getattr(s_dyn, what):
                raise ValueError(
                    f"s_eq and s_dyn must have the same {what}, "
                    f"got {getattr(s_eq, what)} and {getattr(s_dyn, what)}"
                )
        if not s_eq.scaling.matches(s_dyn.scaling):  # type: ignore[operator, union-attr]
            raise ValueError("s_eq and s_dyn must standardise frames in the same way")
        self.s_eq = s_eq
        self.s_dyn = s_dyn
        self.lambda_hat = float(lambda_hat)
        self.lag_max = int(lag_max)
        self.event_shape: tuple[int, ...] = s_eq.event_shape  # type: ignore[assignment]
        self.noise: VPSchedule = s_eq.noise  # type: ignore[assignment]

    @property
    def scaling(self) -> Scaling:
        """Standardisation of the frames, shared by both scores."""
        return self.s_eq.scaling  # type: ignore[return-value]

    def decay(self, lag: Tensor) -> Tensor:
        """lambda_hat^lag, same shape as `lag`; zero at infinite lag."""
        return torch.pow(self.lambda_hat, lag)

    def bind(self, x_0: Tensor, lag: Tensor, decay: Tensor | None = None) -> BoundScore:
        """Eps as a function of (x_t, t); `decay` replaces lambda_hat^lag (see `Interpolator`)."""
        lag = lag.to(x_0.dtype)
        weight = per_replica(self.decay(lag) if decay is None else decay, x_0)
        eps_dyn = self.s_dyn.bind(x_0, lag)  # type: ignore[operator]

        def eps(x_t: Tensor, t: Tensor) -> Tensor:
            return self.s_eq(x_t, t) + weight * eps_dyn(x_t, t)

        return eps

    def forward(self, x_t: Tensor, t: Tensor, x_0: Tensor, lag: Tensor) -> Tensor:
        """Predicted noise, shape of `x_t`, for `lag` <= `lag_max`."""
        return self.bind(x_0, lag)(x_t, t)

    def config(self) -> dict[str, Any]:
        """All hyperparameters, as plain JSON values."""
        return {
            "lambda_hat": self.lambda_hat,
            "lag_max": self.lag_max,
            "s_eq": self.s_eq.config(),  # type: ignore[operator]
            "s_dyn": self.s_dyn.config(),  # type: ignore[operator]
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BoPITOScore":
        """An untrained score with these hyperparameters."""
        s_eq = EquilibriumScore.from_config(config["s_eq"])
        s_dyn = DynamicScore.from_config(config["s_dyn"])
        return cls(s_eq, s_dyn, config["lambda_hat"], config["lag_max"])
