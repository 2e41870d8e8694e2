r"""The diffusion that every score of this package belongs to.

Frames x are standardised, y = (x - mean) / scale, and noised with a variance-preserving schedule,

    x_t = alpha(t) y + sigma(t) eps,    alpha^2 + sigma^2 = 1,    eps ~ N(0, I),    t in [0, 1],

in which the log signal-to-noise ratio, log alpha(t) / sigma(t), falls linearly from `start` at
t = 0 (data) to `end` at t = 1 (noise). A linear ratio spends equal effort on every scale of the
density, and solvers of exponential-integrator type take their natural, equal steps in it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class VPSchedule:
    """Variance-preserving schedule with a linear log signal-to-noise ratio.

    Args:
        start: log(alpha / sigma) at t = 0; the finest resolved length is exp(-start) scales.
        end: log(alpha / sigma) at t = 1. It must be at most -4, because sampling starts from
            N(0, I): with more signal left, every sample would start from the wrong density.
    """

    def __init__(self, start: float = 4.0, end: float = -4.0) -> None:
        if not (math.isfinite(start) and start > 0):
            raise ValueError(f"start must be a positive number, got {start}")
        if not (math.isfinite(end) and end <= -4):
            raise ValueError(f"end must be at most -4 (negligible signal at t = 1), got {end}")
        self.start = float(start)
        self.end = float(end)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VPSchedule) and self.config() == other.config()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"VPSchedule(start={self.start:g}, end={self.end:g})"

    def config(self) -> dict[str, float]:
        """Constructor arguments."""
        return {"start": self.start, "end": self.end}

    def log_ratio(self, t: Tensor) -> Tensor:
        """log alpha(t) / sigma(t), same shape as `t`."""
        return self.start + t * (self.end - self.start)

    def time(self, alpha: Tensor) -> Tensor:
        """The t in [0, 1] with this signal amplitude, same shape as `alpha`."""
        ratio = alpha.log() - torch.log1p(-alpha.square()) / 2
        return (ratio - self.start) / (self.end - self.start)

    def alpha(self, t: Tensor) -> Tensor:
        """Signal amplitude, same shape as `t`."""
        return torch.sigmoid(2 * self.log_ratio(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise amplitude, same shape as `t`."""
        return torch.sigmoid(-2 * self.log_ratio(t)).sqrt()


class Scaling(nn.Module):
    """Map between frames in data units and the standardised frames that are noised.

    Args:
        mean: subtracted from frames, one number or shape `event`.
        scale: what frames are divided by.
        centred: frames are positions (B, n_atoms, 3), whose centroid is taken away: standardised
            frames and their noise live in the subspace of frames with their centroid at zero.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        mean: Sequence[float] | float = 0.0,
        scale: float = 1.0,
        centred: bool = False,
    ) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a positive number, got {scale}")
        self.centred = bool(centred)
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32))

    def standardise(self, x: Tensor) -> Tensor:
        """Frames in data units to standardised frames."""
        return self.project((x - self.mean) / self.scale)

    def project(self, y: Tensor) -> Tensor:
        """Standardised frames or noise, in the subspace where they live."""
        return y - y.mean(-2, keepdim=True) if self.centred else y

    def restore(self, y: Tensor) -> Tensor:
        """Standardised frames to frames in data units."""
        return y * self.scale + self.mean

    def matches(self, other: "Scaling") -> bool:
        """Whether both maps are the same, to float32 rounding."""
        return (
            self.centred == other.centred
            and torch.allclose(self.mean.cpu(), other.mean.cpu(), atol=1e-6)
            and torch.allclose(self.scale.cpu(), other.scale.cpu())
        )


def per_replica(value: Tensor, x: Tensor) -> Tensor:
    """A value of shape `()` or `(B,)`, shaped to multiply frames `x` of shape `(B, *event)`."""
    return value if value.ndim == 0 else value.reshape(-1, *[1] * (x.ndim - 1))
