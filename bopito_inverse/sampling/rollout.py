r"""Rollouts: moves repeated to make trajectories.

A composite step is a sequence of moves, each a draw from one transition kernel. It stands for a
physical step of `step_lag` frames, so that its k-fold repetition predicts the dynamics at
`k step_lag` frames. With w = lambda_hat^(n_int - N_max), the weight of the `Interpolator`,

    Propagate    T(lag)     the trained model at one of its own lags
    Interpolate  T_int(w)   the interpolated score, (1 - w) s_eq + w s_BoPITO(N_max)
    Renoise      R(w)       x -> w x + sqrt(1 - w^2) eps, denoised with s_eq from alpha(t) = w

Two steps are made of them. The paper's alternates interpolation and local relaxation,
K = T(lag) T_int(w). `renoising_step` renoises halfway through a relaxation, K = T(lag) R(w) T(lag).
R leaves the stationary density mu invariant at every w: if x has the density mu, the noised frame
has that of mu noised to alpha = w, which the reverse diffusion of s_eq takes back to mu. So K
leaves mu invariant wherever T does. R is local, too: it crosses a barrier from near the barrier.
It is the identity at w = 1 and a fresh draw of mu at w = 0. In a harmonic well where lambda_hat is
the true decay, T(N_max / 2) R(w) T(N_max / 2) is the exact dynamics at n_int frames.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bopito_inverse.arguments import as_count, as_positive
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.noise import Scaling, per_replica
from bopito_inverse.sampling.solvers import DPMSolver, NormalDraw, Solver


class Normal:
    """Standard normal numbers from one generator, shared or mirrored between replicas.

    Args:
        generator: source of all numbers.
        antithetic: the second half of each set of replicas gets minus the numbers of the first
            half, which cancels the odd part of the Monte Carlo error.
        copies: the batch holds this many copies of the same replicas (for example at several
            n_int), one after the other, and all copies get the same numbers.
        scaling: that of the frames; noise of molecules has no centroid.
    """

    def __init__(
        self,
        generator: torch.Generator,
        antithetic: bool = False,
        copies: int = 1,
        scaling: nn.Module | Tensor | None = None,
    ) -> None:
        self.generator = generator
        self.scaling: Any = scaling or Scaling()
        self.antithetic = antithetic
        self.copies = copies

    def __call__(self, like: Tensor) -> Tensor:
        """Numbers shaped like the argument, (B, *event)."""
        n, rest = divmod(len(like), self.copies * (2 if self.antithetic else 1))
        if rest:
            raise ValueError(
                f"a batch of {len(like)} cannot be split into copies={self.copies}"
                f"{' of antithetic pairs' if self.antithetic else ''}"
            )
        z = torch.randn(
            n, *like.shape[1:], generator=self.generator, device=like.device, dtype=like.dtype
        )
        if self.antithetic:
            z = torch.cat([z, -z])
        z = self.scaling.project(z)
        return z if self.copies == 1 else z.repeat(self.copies, *[1] * (z.ndim - 1))


class Move(Protocol):
    """One kernel of a composite step."""

    @property
    def needs_n_int(self) -> bool:
        """Whether it uses the n_int of the rollout."""
        ...

    def __call__(
        self, model: nn.Module, y: Tensor, n_int: Tensor, solver: Solver, normal: NormalDraw
    ) -> Tensor:
        """The next standardised frames (B, *event) given `y` (B, *event); `n_int` is () or (B,)."""
        ...

    def config(self) -> dict:
        """What identifies the move."""
        ...


class _Tuned:
    """A move that n_int tunes, the one of the rollout or a fixed one."""

    def __init__(self, n_int: float | None = None) -> None:
        self.n_int = None if n_int is None else _as_n_int(n_int)

    def __repr__(self) -> str:
        fixed = "" if self.n_int is None else f"n_int={self.n_int:g}"
        return f"{type(self).__name__}({fixed})"

    @property
    def needs_n_int(self) -> bool:
        """Whether it uses the n_int of the rollout."""
        return self.n_int is None

    def config(self) -> dict:
        """What identifies the move."""
        return {"move": type(self).__name__.lower(), "n_int": self.n_int}


class Interpolate(_Tuned):
    """A draw from the interpolator.

    Args:
        n_int: fixed interpolation parameter; by default the one given when the rollout is run.
    """

    def __call__(
        self, model: nn.Module, y: Tensor, n_int: Tensor, solver: Solver, normal: NormalDraw
    ) -> Tensor:
        """Draws from the interpolated score."""
        model = _interpolator(model, "Interpolate")
        score = model.bind(y, n_int if self.n_int is None else y.new_tensor(self.n_int))
        return solver(score, model.noise, normal(y), normal)


class Renoise(_Tuned):
    """Noise to the level at which alpha = w, then denoising with the equilibrium score.

    Args:
        n_int: fixed interpolation parameter, inf for a fresh draw of equilibrium; by default the
            one given when the rollout is run. At and below N_max nothing happens.
    """

    def __call__(
        self, model: nn.Module, y: Tensor, n_int: Tensor, solver: Solver, normal: NormalDraw
    ) -> Tensor:
        """The renoised frames."""
        model = _interpolator(model, "Renoise")
        w = model.weight(n_int.to(y) if self.n_int is None else y.new_tensor(self.n_int))
        kept = per_replica(w, y)
        # the derivative of the square root has no value at w = 1, where the frame is kept
        spread = (1 - torch.where(kept < 1, kept, 0.0).square()).sqrt()
        noised = kept * y + spread * normal(y)
        return torch.where(kept < 1, solver(model.bopito.s_eq, model.noise, noised, normal, w), y)


class Propagate:
    """A draw from the trained model at one lag: a non-interpolation step.

    Args:
        lag: lag in frames, at most the `lag_max` of a BoPITO model.
        share: instead of a lag, a share of min(n_int, N_max), at most one: below N_max, where
            the experiment is slower than the data, the move then slows down with the others.
    """

    def __init__(self, lag: float | None = None, *, share: float | None = None) -> None:
        if (lag is None) == (share is None):
            raise ValueError(f"Propagate takes either lag or share, got {lag} and {share}")
        self.lag = None if lag is None else as_positive("lag", lag)
        self.share = None if share is None else as_positive("share", share)
        if self.share is not None and self.share > 1:
            raise ValueError(f"share must be at most 1, got {share}")

    def __repr__(self) -> str:
        if self.lag is None:
            return f"Propagate(share={self.share:g})"
        return f"Propagate({self.lag:g})"

    @property
    def needs_n_int(self) -> bool:
        """Whether it uses the n_int of the rollout."""
        return self.lag is None

    def config(self) -> dict:
        """What identifies the move."""
        if self.lag is None:
            return {"move": "propagate", "share": self.share}
        return {"move": "propagate", "lag": self.lag}

    def __call__(
        self, model: nn.Module, y: Tensor, n_int: Tensor, solver: Solver, normal: NormalDraw
    ) -> Tensor:
        """Draws from the trained model."""
        trained = model.bopito if isinstance(model, Interpolator) else model
        score = trained.bind(y, self._lag(trained, y, n_int))  # type: ignore[operator]
        return solver(score, trained.noise, normal(y), normal)  # type: ignore[arg-type]

    def _lag(self, trained: nn.Module, y: Tensor, n_int: Tensor) -> Tensor:
        lag_max: Any = getattr(trained, "lag_max", None)
        if self.share is not None:
            if lag_max is None:
                raise ValueError(f"share of Propagate needs a model with lag_max, got {trained}")
            return self.share * n_int.to(y).clamp(max=lag_max)
        if lag_max is not None and self.lag > lag_max:  # type: ignore[operator]
            raise ValueError(
                f"lag of Propagate must be at most lag_max ({lag_max}), got {self.lag}"
            )
        return y.new_tensor(self.lag)


class Rollout:
    """Moves that are repeated to make a trajectory.

    Args:
        moves: the moves of one composite step, in order.
        step_lag: physical length Delta of one composite step, in frames.
        solver: how each move turns noise into a frame.
    """

    def __init__(self, moves: Sequence[Move], step_lag: int, solver: Solver | None = None) -> None:
        if not moves:
            raise ValueError("moves must hold at least one move, got none")
        self.moves = tuple(moves)
        self.step_lag = as_count("step_lag", step_lag)
        self.solver = solver or DPMSolver()

    def __repr__(self) -> str:
        moves = ", ".join(map(repr, self.moves))
        return f"Rollout([{moves}], step_lag={self.step_lag:g}, solver={self.solver!r})"

    def config(self) -> dict:
        """What identifies the step."""
        return {
            "moves": [move.config() for move in self.moves],
            "step_lag": self.step_lag,
            "solver": repr(self.solver),
        }

    @property
    def slower(self) -> bool:
        """Whether the step depends on n_int below N_max, and so can be slower than the data."""
        return any(move.needs_n_int and not isinstance(move, Renoise) for move in self.moves)

    def step(self, model: nn.Module, y: Tensor, n_int: Tensor, normal: NormalDraw) -> Tensor:
        """One composite step of standardised frames (B, *event); `n_int` is () or (B,)."""
        for move in self.moves:
            y = move(model, y, n_int, self.solver, normal)
        return y

    def frames(
        self, model: nn.Module, x_0: Tensor, n_int: Tensor, n_steps: int, normal: NormalDraw
    ) -> Iterator[Tensor]:
        """The frames after 1, ..., n_steps composite steps, each (B, *event), in data units.

        Args:
            model: an `Interpolator`, or any conditional score where all moves are `Propagate`.
            x_0: starting frames (B, *event), in data units.
            n_int: interpolation parameter, () or (B,); may be inf and may require a gradient.
            n_steps: number of composite steps.
            normal: source of noise.
        """
        y = model.scaling.standardise(x_0)  # type: ignore[union-attr, operator]
        for _ in range(n_steps):
            y = self.step(model, y, n_int, normal)
            yield model.scaling.restore(y)  # type: ignore[union-attr, operator]


def renoising_step(
    lag_max: int,
    step_lag: int,
    solver: Solver | None = None,
    relaxation: float | None = None,
    slower: bool = True,
) -> Rollout:
    """The recommended composite step, T(relaxation / 2) R(w) T(relaxation / 2).

    Args:
        lag_max: longest trained lag N_max of the model.
        step_lag: physical length of the step, in frames.
        solver: how each move turns noise into a frame.
        relaxation: frames that the trained model moves in one step. By default `step_lag` / 2, or
            N_max where that is less. Renoising moves frames within their wells too, so that more
            is not better where the slow process is missing from the data: best is some twice the
            slowest relaxation within a well. Where the data hold the slow process (its timescale
            in the trained model is less than some three times that of the experiment), take
            `step_lag` (`tests/benchmarks/bench_steps.py`).
        slower: whether the step may be slower than the trained model, at n_int below N_max. Data
            that lack the slow process altogether cannot be too fast: with False, relaxations keep
            their length, a fit searches w <= 1 alone, and takes about half the predictions.

    Where the simulation has the wrong equilibrium (another force field, another temperature), T
    does not leave mu invariant, and below N_max the step is the simulation with a slower clock.
    `Rollout([Renoise()], step_lag)` with a short `step_lag` then mends both: for w near one, R is a
    step of overdamped Langevin dynamics in mu. It takes nothing from the trajectories
    (`tests/benchmarks/bench_double_well.py`).

    >>> renoising_step(lag_max=50, step_lag=100)
    Rollout([Propagate(share=0.5), Renoise(), Propagate(share=0.5)], step_lag=100, ...)
    """
    n_max = as_count("lag_max", lag_max)
    total = min(as_count("step_lag", step_lag) / 2, n_max) if relaxation is None else relaxation
    shares = as_positive("relaxation", total) / 2 / n_max
    n = math.ceil(shares)
    one = Propagate(share=shares / n) if slower else Propagate(shares / n * n_max)
    half = [one] * n
    return Rollout([*half, Renoise(), *half], step_lag, solver)


def _interpolator(model: nn.Module, move: str) -> Interpolator:
    if not isinstance(model, Interpolator):
        raise ValueError(
            f"model must be an Interpolator for {move} moves, got {type(model).__name__}"
        )
    return model


def _as_n_int(value: float) -> float:
    if not value > 0:
        raise ValueError(f"n_int must be above zero (inf allowed), got {value}")
    return float(value)
