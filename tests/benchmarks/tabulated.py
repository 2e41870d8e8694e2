"""Renoising in one dimension by table, for benchmarks that repeat a fit many times on a CPU.

The probability flow of s_eq from alpha = w to the data is a function of one number. It is
integrated once for each w on a fine grid, and interpolated: the same frames, to the error of a
straight line between neighbouring points of the grid, at a fraction of the cost.
"""

import torch
from torch import Tensor

from bopito_inverse.models.scores import BoundScore
from bopito_inverse.noise import VPSchedule
from bopito_inverse.sampling.solvers import NormalDraw, Solver

SIZE, REACH = 2001, 8.0  # points of the grid, which ends at +- REACH standard deviations


class Tabulated:
    """A solver for `Renoise` alone, with the same s_eq in every call.

    Args:
        solver: what integrates the flow; it must be deterministic.
    """

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self._tables: dict[float, Tensor] = {}

    def __repr__(self) -> str:
        return f"Tabulated({self.solver!r})"

    @property
    def evaluations(self) -> int:
        """Score calls for one sample, had it been made without a table."""
        return self.solver.evaluations

    def __call__(
        self,
        eps: BoundScore,
        noise: VPSchedule,
        x_t: Tensor,
        normal: NormalDraw,
        signal: Tensor | None = None,
    ) -> Tensor:
        """Standardised frames (B, 1)."""
        if signal is None:
            raise ValueError("signal must be given: other moves than Renoise have no table")
        made = torch.empty_like(x_t)
        w = signal.expand(len(x_t))
        for value in signal.unique():
            rows = w == value
            table = self._table(eps, noise, value, normal)
            position = (x_t[rows, 0] + REACH) * ((SIZE - 1) / (2 * REACH))
            cell = position.long().clamp(0, SIZE - 2)
            made[rows, 0] = torch.lerp(table[cell], table[cell + 1], position - cell)
        return made

    def _table(self, eps: BoundScore, noise: VPSchedule, w: Tensor, normal: NormalDraw) -> Tensor:
        key = float(w)
        if key not in self._tables:
            grid = torch.linspace(-REACH, REACH, SIZE, dtype=w.dtype, device=w.device)[:, None]
            self._tables[key] = self.solver(eps, noise, grid, normal, w)[:, 0]
        return self._tables[key]
