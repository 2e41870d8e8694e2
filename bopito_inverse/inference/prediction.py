r"""What a model predicts for an experiment, at any n_int.

    g_k(n_int) = C[a(x_0), b(x_k)],    x_0 ~ mu,    x_k = K(n_int)^k x_0,

by Monte Carlo over replicas. The same starts and the same noise are used at every n_int (common
random numbers), so that g is a smooth function of n_int, and replicas come in antithetic pairs,
with the same start and opposite noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from bopito_inverse.arguments import Device, as_count, as_device, as_frames, as_generator
from bopito_inverse.datasets import Array, Frames
from bopito_inverse.inference.timescale import second_eigenvalue
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.observables import Correlation
from bopito_inverse.sampling.rollout import Normal, Rollout
from bopito_inverse.sampling.sample import BATCH_SIZE

PAIRS_PER_CHUNK = 1024
FEW_COMPONENTS = 3  # numbers in a frame up to which each is a basis for the timescale


@dataclass(frozen=True)
class NodePredictions:
    """Predictions at K values of n_int with the contributions of each of n replicas.

    Attributes:
        value: (K, n_steps + 1): the correlation after 1, ..., n_steps composite steps, and last
            the second eigenvalue of the step.
        influence: (n, K, n_steps + 1), mean zero over n: the error of `value` is its mean.
    """

    value: Tensor
    influence: Tensor


class Prediction:
    """The observable of an experiment as a function of n_int.

    Args:
        model: the interpolator.
        step: the composite step; each lag must be a multiple of its `step_lag`.
        obs: the correlation function.
        lags: lags in frames, (L,).
        starts: frames of mu, (n, *event), or weighted `Frames`; replicas start from a systematic
            resample of them.
        seed: integer; the same seed gives the same random numbers at every n_int.
        n_replicas: number of rollouts, in antithetic pairs.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: lags that are not multiples of the step, starts of the wrong shape.
    """

    def __init__(
        self,
        model: Interpolator,
        step: Rollout,
        obs: Correlation,
        lags: Sequence[float] | np.ndarray,
        starts: Array | Frames,
        seed: int = 0,
        n_replicas: int = 4096,
        device: Device | str = "auto",
    ) -> None:
        if not isinstance(model, Interpolator):
            raise ValueError(f"model must be an Interpolator, got {type(model).__name__}")
        self.device = as_device(device)
        self.model = model.to(self.device)
        self.step = step
        self.obs = obs
        self.steps = self.steps_of(lags)
        self.seed = seed
        self.n_pairs = (as_count("n_replicas", n_replicas, 4) + 1) // 2
        if not isinstance(starts, Frames):
            starts = Frames(as_frames("starts", starts))
        as_frames("starts", starts.x[:1], model.event_shape)
        self.starts = _resample(starts.to(self.device), self.n_pairs, seed)

    @property
    def n_steps(self) -> int:
        """Composite steps to the longest lag."""
        return int(self.steps.max())

    def steps_of(self, lags: Sequence[float] | np.ndarray) -> np.ndarray:
        """Numbers of composite steps (L,) that reach lags in frames; multiples of `step_lag`."""
        step_lag = self.step.step_lag
        values = np.atleast_1d(np.asarray(lags, dtype=np.float64))
        steps = np.rint(values / step_lag).astype(int)
        bad = values[(np.abs(steps * step_lag - values) > 1e-6 * step_lag) | (steps < 1)]
        if len(bad):
            raise ValueError(f"lags must be positive multiples of step_lag {step_lag:g}, got {bad}")
        return steps

    def __call__(self, n_int: float | Tensor) -> Tensor:
        """The predicted observable at each lag, (L,), float64, differentiable in `n_int` ().

        The derivative is made in forward mode beside the value, so that memory does not grow with
        the number of steps; backward then multiplies by it. It is the derivative along each
        rollout: at lags of several steps, where a small change tips few walkers over a barrier by
        much, it is a noisy estimate, and differences of `at` over a finite step are better.
        """
        n = torch.as_tensor(n_int, dtype=torch.float32, device=self.device)
        if n.ndim != 0:
            raise ValueError(f"n_int must be one number, got shape {tuple(n.shape)}")
        if not n > 0:
            raise ValueError(f"n_int must be above zero (inf allowed), got {float(n)}")
        with torch.no_grad():
            if not n.requires_grad:
                return self._observe(n)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(n.detach(), torch.ones_like(n))
                value, tangent = forward_ad.unpack_dual(self._observe(dual))
        slope = torch.zeros_like(value) if tangent is None else tangent
        return value + slope * (n - n.detach())

    @torch.no_grad()
    def at(self, n_int: Tensor) -> NodePredictions:
        """Predictions at several values of n_int (K,), all steps to the longest lag."""
        frames = self._frames(n_int.to(self.device, torch.float32))
        values, influences = [], []
        for k in range(len(n_int)):
            own = frames[:, k]
            correlation = self.obs.contributions(own[0], own[1:], groups=2)
            eigenvalue, influence = second_eigenvalue(self._series(own), groups=2)
            values.append(torch.cat([correlation.value, eigenvalue[None]]))
            influences.append(torch.cat([correlation.influence, influence[:, None]], dim=1))
        return NodePredictions(torch.stack(values).cpu(), torch.stack(influences, dim=1).cpu())

    def _observe(self, n_int: Tensor) -> Tensor:
        frames = self._frames(n_int.reshape(1))[:, 0]
        return self.obs(frames[0], frames[torch.as_tensor(self.steps)])

    def _series(self, frames: Tensor) -> Tensor:
        """What the slowest relaxation is looked for in, (n, n_steps + 1, R)."""
        flat = frames.flatten(0, 1)
        if flat[0].numel() <= FEW_COMPONENTS:  # all that happens, not only what is observed
            return flat.flatten(1).T.reshape(-1, *frames.shape[:2])
        functions = [self.obs.a] if self.obs.b is self.obs.a else [self.obs.a, self.obs.b]
        return torch.stack([f(flat).reshape(frames.shape[:2]) for f in functions])

    def _frames(self, n_int: Tensor) -> Tensor:
        """Frames (n_steps + 1, K, 2 n_pairs, *event) of every node and replica."""
        per_batch = max(1, BATCH_SIZE[self.device.type] // (2 * PAIRS_PER_CHUNK))
        nodes = [
            torch.cat([self._rollout(group, c) for c in range(len(self._chunks()))], dim=3)
            for group in n_int.split(per_batch)
        ]
        return torch.cat(nodes, dim=1).flatten(2, 3)

    def _chunks(self) -> tuple[Tensor, ...]:
        return self.starts.split(PAIRS_PER_CHUNK)

    def _rollout(self, n_int: Tensor, chunk: int) -> Tensor:
        """Frames (n_steps + 1, K, 2, pairs, *event) of one chunk of replicas."""
        starts = self._chunks()[chunk]
        k, pairs = len(n_int), len(starts)
        x_0 = starts.repeat(2 * k, *[1] * (starts.ndim - 1))
        generator = as_generator(self.seed, self.device, "prediction", chunk)
        normal = Normal(generator, antithetic=True, copies=k)
        n = n_int.repeat_interleave(2 * pairs)
        steps = self.step.frames(self.model, x_0, n, self.n_steps, normal)
        return torch.stack([x_0, *steps]).unflatten(1, (k, 2, pairs))


def _resample(frames: Frames, n: int, seed: int) -> Tensor:
    """Systematic resample of weighted frames in random order: each appears n w times, +-1."""
    generator = as_generator(seed, frames.x.device, "starts")
    u = torch.rand((), generator=generator, device=frames.x.device, dtype=torch.float64)
    levels = (torch.arange(n, device=frames.x.device) + u) / n
    cumulative = frames.weights.cumsum(0)
    index = torch.searchsorted(cumulative / cumulative[-1], levels).clamp(max=len(frames) - 1)
    order = torch.randperm(n, generator=generator, device=frames.x.device)
    return frames.x[index[order]]
