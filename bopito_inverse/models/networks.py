r"""Networks: smooth functions of (x_t, t) or of (x_t, t, x_0, lag).

`MLP` is for frames of a few numbers, `painn.PaiNN` for molecules. The diffusion time t enters
through the log signal-to-noise ratio and the lag through its logarithm, each with sines and cosines
of bounded frequency, so that the output is smooth in both. What depends on (x_0, lag) alone is
computed by `context`, once per move of a rollout, and not at every step of the solver.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

FRAMES_AT_ONCE = {"cpu": 512}  # whose activations stay in the cache


class Fourier(nn.Module):
    """[u, sin(f u), cos(f u)] for frequencies f spaced evenly in the logarithm."""

    frequencies: Tensor

    def __init__(self, n_frequencies: int, lowest: float, highest: float) -> None:
        super().__init__()
        frequencies = torch.logspace(math.log10(lowest), math.log10(highest), n_frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def size(self, n_inputs: int) -> int:
        """Number of features for `n_inputs` numbers."""
        return n_inputs * (1 + 2 * len(self.frequencies))

    def forward(self, u: Tensor) -> Tensor:
        """Features (..., size) of `u` (..., n_inputs)."""
        angle = (u[..., None] * self.frequencies).flatten(-2)
        return torch.cat([u, angle.sin(), angle.cos()], dim=-1)


class MLP(nn.Module):
    """Residual multilayer perceptron for frames of a few numbers, in Fourier features.

    Args:
        event_shape: shape of a frame.
        conditional: whether it depends on (x_0, lag).
        width: hidden width.
        depth: number of residual layers.
        n_frequencies: Fourier frequencies per input.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        conditional: bool,
        width: int = 128,
        depth: int = 3,
        n_frequencies: int = 8,
    ) -> None:
        super().__init__()
        n = math.prod(event_shape)
        self.frame = Fourier(n_frequencies, 0.7, 14.0)
        self.time = Fourier(n_frequencies, 0.2, 3.0)
        self.embed_frame = nn.Linear(self.frame.size(n), width)
        self.embed_time = nn.Linear(self.time.size(1), (depth + 1) * width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, n)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        if conditional:
            self.log_lag = Fourier(n_frequencies, 0.2, 3.0)
            self.embed_context = nn.Sequential(
                nn.Linear(self.frame.size(n) + self.log_lag.size(1), width),
                nn.SiLU(),
                nn.Linear(width, width),
            )

    def config(self) -> dict[str, int]:
        """Sizes, as constructor arguments."""
        return {
            "width": self.out.in_features,
            "depth": len(self.layers),
            "n_frequencies": len(self.frame.frequencies),
        }

    def context(self, x_0: Tensor, lag: Tensor) -> Tensor:
        """What (x_0, lag) contribute, shape (B, width)."""
        log_lag = self.log_lag(lag.to(x_0.dtype).log().reshape(-1, 1)).expand(len(x_0), -1)
        return self.embed_context(torch.cat([self.frame(x_0.flatten(1)), log_lag], dim=1))

    def forward(self, x_t: Tensor, log_ratio: Tensor, context: Tensor | None = None) -> Tensor:
        """Output shaped like `x_t` (B, *event), for `log_ratio` of shape () or (B,)."""
        return in_parts(self._forward, FRAMES_AT_ONCE, x_t, log_ratio, context)

    def _forward(self, x_t: Tensor, log_ratio: Tensor, context: Tensor | None) -> Tensor:
        times = self.embed_time(self.time(log_ratio.reshape(-1, 1))).chunk(len(self.layers) + 1, 1)
        h = _shifted(self.embed_frame, self.frame(x_t.flatten(1)), times[0])
        h = silu(h if context is None else h + context)
        for layer, time in zip(self.layers, times[1:], strict=True):
            h = h + silu(_shifted(layer, h, time))  # type: ignore[arg-type]
        return self.out(h).reshape(x_t.shape)


def _shifted(layer: nn.Linear, h: Tensor, shift: Tensor) -> Tensor:
    """layer(h) + shift; a shift that the whole batch shares is added to the bias, at no cost."""
    if len(shift) == 1:
        return linear(h, layer.weight, layer.bias + shift[0])
    return layer(h) + shift


def in_parts(
    function: Callable[..., Tensor], limits: Mapping[str, int], x: Tensor, *given: Tensor | None
) -> Tensor:
    """function(x, *given), for parts of a large batch one after the other.

    Args:
        function: maps batches to a batch.
        limits: frames at once, by kind of device; no entry is no limit.
        x: (B, ...).
        given: of the whole batch (B, ...), or shared by it: shape (), (1, ...) or None.
    """
    limit = limits.get(x.device.type, len(x))
    if len(x) <= limit:
        return function(x, *given)
    parts = x.split(limit)
    shared = [value is None or value.ndim == 0 or len(value) == 1 for value in given]
    rest = [
        [value] * len(parts) if one else value.split(limit)  # type: ignore[union-attr]
        for value, one in zip(given, shared, strict=True)
    ]
    return torch.cat([function(*part) for part in zip(parts, *rest, strict=True)])
