r"""Rollouts: moves repeated to make trajectories.

A composite step is a sequence of moves, each a draw from one transition kernel,

    K(n_int) = T_dyn(lag)^r o T_int(n_int),

where `Interpolate` draws from the interpolator and `Propagate` from the trained model at one of its
own lags (local relaxation). `K` stands for a physical step of `step_lag` frames, so that its k-fold
repetition predicts the dynamics at `k step_lag` frames.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from bopito_inverse.arguments import as_count, as_positive
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.models.scores import BoundScore
from bopito_inverse.sampling.solvers import DPMSolver, NormalDraw, Solver


class Normal:
    """Standard normal numbers from one generator, shared or mirrored between replicas.

    Args:
        generator: source of all numbers.
        antithetic: the second half of each set of replicas gets minus the numbers of the first
            half, which cancels the odd part of the Monte Carlo error.
        copies: the batch holds this many copies of the same replicas (for example at several
            n_int), one after the other, and all copies get the same numbers.
    """

    def __init__(
        self, generator: torch.Generator, antithetic: bool = False, copies: int = 1
    ) -> None:
        self.generator = generator
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
        return z if self.copies == 1 else z.repeat(self.copies, *[1] * (z.ndim - 1))


class Move(Protocol):
    """One kernel of a composite step."""

    def bind(self, model: nn.Module, x_0: Tensor, n_int: Tensor) -> BoundScore:
        """The score that the move draws from, given the standardised frame `x_0`."""
        ...

    def config(self) -> dict:
        """What identifies the move."""
        ...


class Interpolate:
    """A draw from the interpolator.

    Args:
        n_int: fixed interpolation parameter; by default the one given when the rollout is run.
    """

    def __init__(self, n_int: float | None = None) -> None:
        self.n_int = None if n_int is None else _as_n_int(n_int)

    def __repr__(self) -> str:
        return f"Interpolate({'' if self.n_int is None else f'n_int={self.n_int:g}'})"

    def config(self) -> dict:
        """What identifies the move."""
        return {"move": "interpolate", "n_int": self.n_int}

    def bind(self, model: nn.Module, x_0: Tensor, n_int: Tensor) -> BoundScore:
        """The interpolated score."""
        if not isinstance(model, Interpolator):
            raise ValueError(
                f"model must be an Interpolator for Interpolate moves, got {type(model).__name__}"
            )
        fixed = n_int if self.n_int is None else x_0.new_tensor(self.n_int)
        return model.bind(x_0, fixed)


class Propagate:
    """A draw from the trained model at one lag: a non-interpolation step.

    Args:
        lag: lag in frames, at most the `lag_max` of a BoPITO model.
    """

    def __init__(self, lag: float) -> None:
        self.lag = as_positive("lag", lag)

    def __repr__(self) -> str:
        return f"Propagate({self.lag:g})"

    def config(self) -> dict:
        """What identifies the move."""
        return {"move": "propagate", "lag": self.lag}

    def bind(self, model: nn.Module, x_0: Tensor, n_int: Tensor) -> BoundScore:
        """The score of the trained model."""
        trained = model.bopito if isinstance(model, Interpolator) else model
        lag_max = getattr(trained, "lag_max", None)
        if lag_max is not None and self.lag > lag_max:
            raise ValueError(
                f"lag of Propagate must be at most lag_max ({lag_max}), got {self.lag}"
            )
        return trained.bind(x_0, x_0.new_tensor(self.lag))  # type: ignore[operator]


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

    def step(self, model: nn.Module, y: Tensor, n_int: Tensor, normal: NormalDraw) -> Tensor:
        """One composite step of standardised frames (B, *event); `n_int` is () or (B,)."""
        for move in self.moves:
            y = self.solver(move.bind(model, y, n_int), model.noise, normal(y), normal)  # type: ignore[arg-type]
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


def _as_n_int(value: float) -> float:
    if not value > 0:
        raise ValueError(f"n_int must be above zero (inf allowed), got {value}")
    return float(value)
