r"""Sensitivity: how much an answer owes to choices that the data do not make.

*lambda_hat* and N_int cannot be told apart, but w can. Another lambda_hat' with the dynamic score
rescaled,

    s_dyn'(x_t, t | x_0, N) = (lambda_hat / lambda_hat')^N s_dyn(x_t, t | x_0, N),

is the same trained model at N <= N_max and the same family beyond, so that w and the timescale
stay and N_int' = N_max + log w / log lambda_hat' moves. They do move where a prior on N_int speaks
louder than the data.

*Relaxation* is a choice of the composite step: its length, and whether it is made once or twice.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bopito_inverse.datasets import Array, Frames
from bopito_inverse.fan_out import fan_out
from bopito_inverse.inference.fit import fit
from bopito_inverse.inference.posterior import Estimate
from bopito_inverse.inference.result import Estimates, as_tuple, plain
from bopito_inverse.inference.status import Status
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.models.scores import BoPITOScore, BoundScore
from bopito_inverse.noise import per_replica
from bopito_inverse.observables import Correlation, Experiment
from bopito_inverse.sampling.rollout import Move, Propagate, Rollout

TIMESCALES = (0.5, 2.0)  # factors on that of lambda_hat
RELAXATION = (0.5, 2.0)  # factors on the relaxation lag


def sensitivity(
    model: Interpolator,
    step: Rollout,
    obs: Correlation | Mapping[str, Correlation],
    exp: Experiment | Sequence[Experiment],
    starts: Array | Frames,
    *,
    lambda_hats: Sequence[float] | None = None,
    steps: Mapping[str, Rollout] | None = None,
    executor: Executor | int | None = None,
    progress: bool = False,
    **fit_options: Any,
) -> "Sensitivity":
    """Fit again under other choices.

    Args:
        model, step, obs, exp, starts: as in `fit`.
        lambda_hats: other values of lambda_hat; by default those of half and of twice the assumed
            timescale. Empty for none.
        steps: other composite steps, by name; by default those of `relaxations`. Empty for none.
        executor: as in `calibrate`.
        progress: show a progress bar.
        fit_options: other arguments of `fit`, the same for all.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: names the fit that failed.
    """
    if lambda_hats is None:
        lambda_hats = [model.lambda_hat ** (1 / factor) for factor in TIMESCALES]
    steps = relaxations(step, model.lag_max) if steps is None else steps
    varied: list[tuple[str, Interpolator, Rollout]] = [("as given", model, step)]
    varied += [(f"lambda_hat {x:.4g}", with_lambda_hat(model, x), step) for x in lambda_hats]
    varied += [(name, model, other) for name, other in steps.items()]
    shared = {"obs": obs, "exp": exp, "starts": starts, **fit_options}
    return Sensitivity(tuple(fan_out(_row, shared, varied, "fit", executor, progress)))


@dataclass(frozen=True)
class Row:
    """The answer under one choice; the first row is the choice that was made."""

    label: str
    n_int: Estimates
    weight: Estimates
    timescale: Estimates
    p_value: float
    status: Status


@dataclass(frozen=True)
class Sensitivity:
    """Answers under several choices.

    Attributes:
        rows: one for each choice, first that of the fit itself.
    """

    rows: tuple[Row, ...]

    def __getitem__(self, label: str) -> Row:
        """The row of a label."""
        return {row.label: row for row in self.rows}[label]

    def shift(self, label: str, quantity: str = "timescale") -> tuple[float, ...]:
        """Difference of means from the first row in its posterior sd, one for each n_int."""
        first, other = (as_tuple(getattr(row, quantity)) for row in (self.rows[0], self[label]))
        return tuple((b.mean - a.mean) / a.sd for a, b in zip(first, other, strict=True))

    def summary(self) -> list[dict[str, Any]]:
        """All numbers as plain JSON values."""
        return [
            {
                "label": row.label,
                **{
                    name: plain(getattr(row, name), Estimate.to_dict)
                    for name in ("n_int", "weight", "timescale")
                },
                "p_value": row.p_value,
                "status": str(row.status),
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        width = max(len(row.label) for row in self.rows) + 2
        names = ("n_int", "weight", "timescale")
        head = " " * width + "".join(f"{name:>20s}" for name in names)
        lines = [f"{head}{'shift':>8s}{'p':>9s}  status"]
        for row in self.rows:
            groups = zip(*(as_tuple(getattr(row, name)) for name in names), strict=True)
            for i, (group, shift) in enumerate(zip(groups, self.shift(row.label), strict=True)):
                cells = "".join(f"{f'{one.mean:.4g} +- {one.sd:.2g}':>20s}" for one in group)
                end = f"{row.p_value:9.2g}  {row.status}" if i == 0 else ""
                lines.append(f"{'' if i else row.label:{width}s}{cells}{shift:8.1f}{end}")
        return "\n".join([*lines, "shift: of the timescale, in posterior sd of the first row"])


def relaxations(step: Rollout, lag_max: int) -> dict[str, Rollout]:
    """Other steps: half the relaxation, twice, and relaxation made two times.

    Steps with no `Propagate` have none; lags beyond `lag_max` are left out.
    """
    if not any(isinstance(move, Propagate) for move in step.moves):
        return {}
    others = {f"relaxation x {factor:g}": _scaled(step, factor, lag_max) for factor in RELAXATION}
    twice = [(move,) * (2 if isinstance(move, Propagate) else 1) for move in step.moves]
    others["relaxation two times"] = _with(step, [move for moves in twice for move in moves])
    return {name: other for name, other in others.items() if other is not None}


def with_lambda_hat(model: Interpolator, lambda_hat: float) -> Interpolator:
    """The same trained model, under another assumed decay per frame."""
    if not 0 < lambda_hat < 1:
        raise ValueError(f"lambda_hat must lie in (0, 1), got {lambda_hat}")
    old = model.bopito
    s_dyn = _Rescaled(old.s_dyn, old.lambda_hat / lambda_hat)
    return Interpolator(BoPITOScore(old.s_eq, s_dyn, lambda_hat, old.lag_max))


class _Rescaled(nn.Module):
    """factor^lag times a dynamic score."""

    def __init__(self, s_dyn: nn.Module, factor: float) -> None:
        super().__init__()
        self.s_dyn, self.factor = s_dyn, factor
        self.event_shape, self.noise = s_dyn.event_shape, s_dyn.noise
        self.scaling = s_dyn.scaling

    def bind(self, x_0: Tensor, lag: Tensor) -> BoundScore:
        """eps_dyn as a function of (x_t, t)."""
        eps_dyn = self.s_dyn.bind(x_0, lag)  # type: ignore[operator]
        factor = per_replica(torch.pow(self.factor, lag), x_0)
        return lambda x_t, t: factor * eps_dyn(x_t, t)

    def forward(self, x_t: Tensor, t: Tensor, x_0: Tensor, lag: Tensor) -> Tensor:
        """Predicted noise, shape of `x_t`."""
        return self.bind(x_0, lag)(x_t, t)


def _row(shared: Mapping[str, Any], varied: tuple[str, Interpolator, Rollout]) -> Row:
    label, model, step = varied
    made = fit(model, step, **shared)
    return Row(label, made.n_int, made.weight, made.timescale, made.p_value, made.status)


def _scaled(step: Rollout, factor: float, lag_max: int) -> Rollout | None:
    """The step with other relaxation lags; None where one is beyond what was trained."""
    moves: list[Move] = []
    for move in step.moves:
        if not isinstance(move, Propagate):
            moves.append(move)
            continue
        share = (move.share or 0) * factor
        lag = (move.lag or 0) * factor
        if share > 1 or lag > lag_max:
            return None
        moves.append(Propagate(lag or None, share=share or None))
    return _with(step, moves)


def _with(step: Rollout, moves: Sequence[Move]) -> Rollout:
    return Rollout(moves, step.step_lag, step.solver)
