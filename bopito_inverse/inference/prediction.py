r"""What a model predicts for an experiment, at any n_int.

    g_k(n_int) = C[a(x_0), b(x_k)],    x_0 ~ mu,    x_k = K(n_int)^k x_0,

by Monte Carlo over replicas. The same starts and the same noise are used at every n_int (common
random numbers), so that g is a smooth function of n_int, and replicas come in antithetic pairs,
with the same start and opposite noise.

States that are rare in mu get few starts. With a `uniform_share` s, starts are drawn from frames i
of weight w_i not by w_i but by q_i = (1 - s) w_i + s / n, and all means over replicas are weighted
by w_i / q_i, which is at most 1 / (1 - s) (defensive importance sampling; Hesterberg, Technometrics
37, 185, 1995).

A replica r depends on its own n_int alone, so that one pass in forward mode, with the tangent one
for every replica, gives all derivatives dx_kr / dn_r beside the frames, and keeps nothing of the
solver steps that lead there. Reverse mode through the observable alone completes the chain rule,

    v . dg / dn_r = sum_k (d(v . g) / dx_kr) . (dx_kr / dn_r),

and the derivative in one shared n_int is the sum over r.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

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
        value: (K, M), M = n_observables n_steps + 1: the correlation of each observable after
            1, ..., n_steps composite steps, and last the second eigenvalue of the step.
        influence: (n, K, M), mean zero over n: the error of `value` is its mean.
    """

    value: Tensor
    influence: Tensor


class Prediction:
    """The observables of an experiment as functions of n_int.

    Args:
        model: the interpolator.
        step: the composite step; each lag must be a multiple of its `step_lag`.
        obs: the correlation function, or several by name, all made from the same rollouts.
        lags: lags in frames, (L,).
        starts: frames of mu, (n, *event), or weighted `Frames`; replicas start from a systematic
            resample of them.
        seed: integer; the same seed gives the same random numbers at every n_int.
        n_replicas: number of rollouts, in antithetic pairs.
        device: `auto`, `cpu` or `cuda`.
        uniform_share: share of the replicas whose starts are drawn from all frames alike, in
            [0, 1), for frames that hold more of rare states than mu does, as umbrella windows do.

    Attributes:
        weights: importance weight of each pair of replicas, (n_pairs,), mean one; None for equal
            ones.

    Raises:
        ValueError: lags that are not multiples of the step, starts of the wrong shape.
    """

    def __init__(
        self,
        model: Interpolator,
        step: Rollout,
        obs: Correlation | Mapping[str, Correlation],
        lags: Sequence[float] | np.ndarray,
        starts: Array | Frames,
        seed: int = 0,
        n_replicas: int = 4096,
        device: Device | str = "auto",
        uniform_share: float = 0.0,
    ) -> None:
        if not isinstance(model, Interpolator):
            raise ValueError(f"model must be an Interpolator, got {type(model).__name__}")
        self.device = as_device(device)
        self.model = model.to(self.device)
        self.step = step
        self.obs = as_observables(obs)
        self._single = isinstance(obs, Correlation)
        self.steps = self.steps_of(lags)
        self.seed = seed
        self.n_pairs = (as_count("n_replicas", n_replicas, 4) + 1) // 2
        if not isinstance(starts, Frames):
            starts = Frames(as_frames("starts", starts))
        as_frames("starts", starts.x[:1], model.event_shape)
        if not 0 <= uniform_share < 1:
            raise ValueError(f"uniform_share must lie in [0, 1), got {uniform_share}")
        drawn = _resample(starts.to(self.device), self.n_pairs, seed, uniform_share)
        self.starts, self.weights = drawn

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

    @property
    def n_replicas(self) -> int:
        """Number of rollouts R; replica r and replica r + R / 2 are antithetic partners."""
        return 2 * self.n_pairs

    @property
    def _both(self) -> Tensor | None:
        """Weights of all replicas, (n_replicas,)."""
        return None if self.weights is None else self.weights.repeat(2)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of all frames, that of the model: `model.double()` makes it float64."""
        return self.model.scaling.scale.dtype

    def __call__(self, n_int: float | Tensor) -> Tensor:
        """The prediction at each lag, float64, differentiable once in `n_int`.

        Its shape is (L,), or (n_observables, L) where several were given by name.

        Args:
            n_int: interpolation parameter above zero (inf allowed), () for all replicas or
                (n_replicas,) with one for each. Replicas r and r + n_replicas / 2 share their start
                and have opposite noise: the first half and the second half are antithetic partners.

        The gradient has the shape of `n_int`. A call that makes it costs four to six without, and
        its memory grows neither with solver evaluations nor with composite steps, but for the
        frames at the lags themselves. At N_max, where the family has a kink, it is the derivative
        from below; at inf it is zero.

        It is the derivative along each rollout, thus exactly that of this estimate with its random
        numbers held. Where a small change of n_int tips a walker over a barrier, the map of that
        walker is steep, and the mean over replicas is a noisy, heavy-tailed estimate of the
        derivative of the expectation, the more so the more steps; where the map jumps (exact
        scores of a barrier that nothing crosses; step functions as observables), the contribution
        of the jumps, most of the derivative, is missing altogether. Differences of `at` over a
        finite step see both.

        Raises:
            ValueError: `n_int` of another shape, or not above zero; where it requires a gradient,
                an observable with no derivative, such as a step function.
        """
        n = self._as_n_int(n_int)
        differentiate = n.requires_grad and torch.is_grad_enabled()
        if differentiate:
            self._check_differentiable()
        with torch.no_grad():
            frames, *tangents = self._along(n.detach(), differentiate)
            if not differentiate:
                return self._observe(frames)
        return _Observed.apply(n, frames, *tangents, self._observe)

    @torch.no_grad()
    def at(self, n_int: Tensor) -> NodePredictions:
        """Predictions at several values of n_int (K,), all steps to the longest lag."""
        per_batch = max(1, BATCH_SIZE[self.device.type] // (2 * PAIRS_PER_CHUNK))
        n = n_int.to(self.device, self.dtype)
        made = [self._node(own) for group in n.split(per_batch) for own in self._frames(group)]
        values, influences = zip(*made, strict=True)
        return NodePredictions(torch.stack(values).cpu(), torch.stack(influences, dim=1).cpu())

    def _node(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Value (M,) and influence (n_pairs, M) from the frames (n_steps + 1, R, *event)."""
        correlations = [
            obs.contributions(frames[0], frames[1:], 2, self._both) for obs in self.obs.values()
        ]
        eigenvalue, influence = second_eigenvalue(self._series(frames), 2, self._both)
        values = [made.value for made in correlations]
        influences = [made.influence for made in correlations]
        return torch.cat([*values, eigenvalue[None]]), torch.cat(
            [*influences, influence[:, None]], dim=1
        )

    def _as_n_int(self, n_int: float | Tensor) -> Tensor:
        n = n_int if isinstance(n_int, Tensor) else torch.as_tensor(n_int, dtype=torch.float64)
        n = n.to(self.device, n.dtype if n.is_floating_point() else self.dtype)
        if n.shape not in ((), (self.n_replicas,)):
            raise ValueError(
                f"n_int must be one number or one for each replica, shape () or "
                f"({self.n_replicas},), got shape {tuple(n.shape)}"
            )
        if not (n > 0).all():
            raise ValueError(f"n_int must be above zero (inf allowed), got {float(n.min())}")
        return n

    def _observe(self, frames: Tensor) -> Tensor:
        """The value of a call, from frames at the start and at the steps of lags."""
        where = np.unique(self.steps, return_inverse=True)[1]
        later = frames[torch.as_tensor(where + 1)]
        values = [obs(frames[0], later, self._both) for obs in self.obs.values()]
        return values[0] if self._single else torch.stack(values)

    def _check_differentiable(self) -> None:
        """Refuse observables whose derivative would be zero without a word."""
        x = self.starts[:1].to(self.dtype).clone().requires_grad_()
        for name, obs in self.obs.items():
            if not obs.b(x).requires_grad:
                raise ValueError(
                    f"obs {name!r} must be made of differentiable torch operations for a gradient "
                    "in n_int, got values that have no derivative in the frames, as of a step "
                    "function; take differences of `at` over a finite step"
                )

    def _along(self, n_int: Tensor, differentiate: bool) -> list[Tensor]:
        """Frames at the start and at the steps of lags, (1 + distinct lags, R, *event).

        With `differentiate`, also their derivatives in the n_int of their replica, same shape.
        """
        n = n_int.to(self.dtype).expand(self.n_replicas).contiguous().view(2, -1)
        chunks = [
            self._chunk_along(part.flatten(), chunk, differentiate)
            for chunk, part in enumerate(n.split(PAIRS_PER_CHUNK, dim=1))
        ]
        return [torch.cat(parts, dim=2).flatten(1, 2) for parts in zip(*chunks, strict=True)]

    def _chunk_along(self, n: Tensor, chunk: int, differentiate: bool) -> list[Tensor]:
        """The same for one chunk of replicas, (1 + distinct lags, 2, pairs, *event)."""
        wanted = {0, *self.steps.tolist()}
        frames, tangents = [], []
        with forward_ad.dual_level() if differentiate else nullcontext():
            if differentiate:
                n = forward_ad.make_dual(n, torch.ones_like(n))
            for step, frame in enumerate(self._steps(n, chunk)):
                if step in wanted:
                    x, tangent = forward_ad.unpack_dual(frame)
                    frames.append(x)
                    tangents.append(torch.zeros_like(x) if tangent is None else tangent)
        kept = [frames, tangents] if differentiate else [frames]
        return [torch.stack(part).unflatten(1, (2, -1)) for part in kept]

    def _series(self, frames: Tensor) -> Tensor:
        """What the slowest relaxation is looked for in, (n, n_steps + 1, R)."""
        flat = frames.flatten(0, 1)
        if flat[0].numel() <= FEW_COMPONENTS:  # all that happens, not only what is observed
            return flat.flatten(1).T.reshape(-1, *frames.shape[:2])
        functions = dict.fromkeys(f for obs in self.obs.values() for f in (obs.a, obs.b))
        return torch.stack([f(flat).reshape(frames.shape[:2]) for f in functions])

    def _frames(self, n_int: Tensor) -> Tensor:
        """Frames (K, n_steps + 1, 2 n_pairs, *event) of a few nodes and every replica."""
        chunks = [self._rollout(n_int, chunk) for chunk in range(len(self._chunks()))]
        return torch.cat(chunks, dim=3).flatten(2, 3).transpose(0, 1)

    def _chunks(self) -> tuple[Tensor, ...]:
        return self.starts.split(PAIRS_PER_CHUNK)

    def _rollout(self, n_int: Tensor, chunk: int) -> Tensor:
        """Frames (n_steps + 1, K, 2, pairs, *event) of one chunk of replicas."""
        k, pairs = len(n_int), len(self._chunks()[chunk])
        n = n_int.repeat_interleave(2 * pairs)
        return torch.stack([*self._steps(n, chunk, copies=k)]).unflatten(1, (k, 2, pairs))

    def _steps(self, n_int: Tensor, chunk: int, copies: int = 1) -> Iterator[Tensor]:
        """Frames after 0, ..., n_steps composite steps of one chunk, at `n_int` of each replica."""
        starts = self._chunks()[chunk].to(self.dtype)
        x_0 = starts.repeat(2 * copies, *[1] * (starts.ndim - 1))
        generator = as_generator(self.seed, self.device, "prediction", chunk)
        normal = Normal(generator, antithetic=True, copies=copies, scaling=self.model.scaling)
        yield x_0
        yield from self.step.frames(self.model, x_0, n_int, self.n_steps, normal)


class _Observed(torch.autograd.Function):
    """The observable of frames whose derivatives in n_int are known."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        n_int: Tensor,
        frames: Tensor,
        tangents: Tensor,
        observe: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(n_int, frames, tangents)
        ctx.observe = observe
        return observe(frames)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        n_int, frames, tangents = ctx.saved_tensors
        with torch.enable_grad():
            x = frames.detach().requires_grad_()
            (slope,) = torch.autograd.grad(ctx.observe(x), x, grad)
        own = torch.einsum("kri,kri->r", slope.flatten(2).double(), tangents.flatten(2).double())
        return (own if n_int.ndim else own.sum()).to(n_int.dtype), None, None, None


def as_observables(obs: Correlation | Mapping[str, Correlation]) -> dict[str, Correlation]:
    """Correlation functions by name."""
    named = {obs.name: obs} if isinstance(obs, Correlation) else obs
    if not (isinstance(named, Mapping) and named):
        raise ValueError(f"obs must be a Correlation or a mapping of names to them, got {obs!r}")
    for name, one in named.items():
        if not isinstance(one, Correlation):
            raise ValueError(f"obs[{name!r}] must be a Correlation, got {type(one).__name__}")
    return dict(named)


def _resample(frames: Frames, n: int, seed: int, share: float) -> tuple[Tensor, Tensor | None]:
    """Systematic resample of weighted frames in random order, with importance weights."""
    generator = as_generator(seed, frames.x.device, "starts")
    drawn = frames
    if share > 0:
        drawn = Frames(frames.x, (1 - share) * frames.weights + share / len(frames))
    index = drawn.systematic(n, generator)
    index = index[torch.randperm(n, generator=generator, device=frames.x.device)]
    if share == 0:
        return frames.x[index], None
    weights = frames.weights[index] / drawn.weights[index]
    return frames.x[index], weights / weights.mean()
