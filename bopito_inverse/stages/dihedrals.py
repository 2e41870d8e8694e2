r"""Backbone dihedrals along trajectories of a molecule, and what is compared of them.

The Jensen-Shannon divergence of two histograms p and q, in nats,

    JS = 1/2 sum_b p_b log(p_b / m_b) + 1/2 sum_b q_b log(q_b / m_b),    m = (p + q) / 2,

is zero where they are equal and log 2 where they have no bin in common. Standard errors are of
*blocks*, trajectories or parts of them, which are taken as independent: a share
`p = sum_b h_b / sum_b n_b` has the variance `B / (B - 1) sum_b (h_b - p n_b)^2 / (sum_b n_b)^2`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bopito_inverse.arguments import as_positive
from bopito_inverse.datasets import Trajectories, read_npz
from bopito_inverse.observables import Correlation, Observable, feature

if TYPE_CHECKING:
    import mdtraj

N_BLOCKS = 20  # at least, where trajectories are long enough
CHUNK = 65_536  # frames
FUNCTIONS: dict[str, Observable] = {
    "{}": lambda angle: angle,
    "sin({})": torch.sin,
    "cos({})": torch.cos,
    "{}>0": lambda angle: (angle.sin() > 0).to(angle.dtype),
}


@dataclass(frozen=True, eq=False)
class Dihedrals:
    """Dihedrals along trajectories.

    Attributes:
        names: of the dihedrals.
        trajectories: angles in rad, from -pi to pi, each (n_frames, n_dihedrals).
        frame_time: ps.
        weights: of the frames of each trajectory, each (n_frames,), by which they average to the
            equilibrium; None for equal ones.
    """

    names: tuple[str, ...]
    trajectories: list[Tensor]
    frame_time: float
    weights: list[Tensor] | None = None

    @classmethod
    def of(cls, trajectories: Trajectories, topology: "mdtraj.Topology") -> "Dihedrals":
        """Those of the backbone, along trajectories of the molecule."""
        names = names_of(backbone(topology))
        angles = angles_of(trajectories.frames, names, topology)
        parts = angles.split(trajectories.lengths.tolist())
        return cls(names, list(parts), trajectories.frame_time)

    @classmethod
    def read(cls, path: Path, names: Sequence[str]) -> "Dihedrals":
        """From an `.npz` with an array (n_trajectories, n_frames) for each, and `frame_time`.

        It may hold `weights`, of trajectories (n_trajectories,) or of all frames, as the angles.

        Raises:
            ValueError: an array is missing, of another shape, or holds no angles in rad.
        """
        arrays = read_npz(path, (*names, "frame_time"))
        shape = arrays[names[0]].shape
        for name in names:
            angle = arrays[name]
            if angle.shape != shape or angle.ndim != 2 or angle.size < 2:
                raise ValueError(
                    f"{path}: {name} must have the shape (n_trajectories, n_frames) of all angles, "
                    f"got {angle.shape}"
                )
            if not (np.abs(angle) <= math.pi + 1e-4).all():
                raise ValueError(f"{path}: {name} must hold angles in rad, from -pi to pi")
        stacked = np.stack([arrays[name] for name in names], axis=-1).astype(np.float32)
        frame_time = as_positive(f"{path}: frame_time", float(arrays["frame_time"]))
        weights = None
        if "weights" in arrays:
            w = arrays["weights"]
            if w.shape not in (shape, shape[:1]) or not (w >= 0).all() or not w.any():
                raise ValueError(
                    f"{path}: weights must be zero or more, one for each of {shape[0]} "
                    f"trajectories or for each frame, {shape}, got shape {w.shape}"
                )
            w = w if w.ndim == 2 else w[:, None]
            weights = list(torch.from_numpy(np.broadcast_to(w, shape).astype(float)))
        return cls(tuple(names), list(torch.from_numpy(stacked)), frame_time, weights)

    @property
    def longest_lag(self) -> int:
        """The longest lag, in frames, that is not all noise: 4/5 of a trajectory.

        At the length of a trajectory each holds but one pair of frames.
        """
        return max(len(x) for x in self.trajectories) * 4 // 5

    @property
    def frame_weights(self) -> Tensor | None:
        """Weight of each frame, (n,), or None for equal ones."""
        return None if self.weights is None else torch.cat(self.weights)

    def share(self, bins: int, *names: str) -> np.ndarray:
        """Share of the frames in each of `bins` bins for each of these angles, sum 1."""
        return histogram(self.angles(*names), bins, self.frame_weights)

    def angles(self, *names: str) -> Tensor:
        """All frames in a row, (n, len(names))."""
        columns = [self.names.index(name) for name in names]
        return torch.cat(self.trajectories)[:, columns]

    def later(self) -> "Dihedrals":
        """Without the first frame of each trajectory."""
        return self._map(lambda x: [x[1:]])

    def first(self, n: int) -> "Dihedrals":
        """The first trajectories, at most n."""
        return self._part(slice(n))

    def _part(self, part: slice) -> "Dihedrals":
        weights = None if self.weights is None else self.weights[part]
        return replace(self, trajectories=self.trajectories[part], weights=weights)

    def halves(self) -> tuple["Dihedrals", "Dihedrals"]:
        """The first and the second half, of the trajectories or of the only one."""
        whole = self.blocks(2) if len(self.trajectories) == 1 else self
        middle = len(whole.trajectories) // 2
        return whole._part(slice(middle)), whole._part(slice(middle, None))

    def blocks(self, n_blocks: int = N_BLOCKS, shortest: int = 1) -> "Dihedrals":
        """The same frames in `n_blocks` trajectories or more, none cut below `shortest` frames."""
        n = math.ceil(n_blocks / len(self.trajectories))
        return self._map(lambda x: x.tensor_split(max(1, min(n, len(x) // shortest))))

    def _map(self, cut: Callable[[Tensor], Sequence[Tensor]]) -> "Dihedrals":
        """Each trajectory cut into parts, with its weights."""
        weights = self.weights
        if weights is not None:
            weights = [part for w in weights for part in cut(w)]
        return replace(
            self, trajectories=[part for x in self.trajectories for part in cut(x)], weights=weights
        )

    def shares(self, name: str, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the frames in the bins of one dihedral, and standard errors, each (n_bins,).

        Errors are infinite for one block.
        """
        column = self.names.index(name)
        whole = self.blocks()
        blocks = [block[:, column].numpy() for block in whole.trajectories]
        w = [np.ones(len(x)) for x in blocks] if whole.weights is None else whole.weights
        both = [(x, np.asarray(own)) for x, own in zip(blocks, w, strict=True)]
        hits = np.array([np.histogram(x, edges, weights=own)[0] for x, own in both])
        sizes = np.array([own.sum() for _, own in both])
        share, b = hits.sum(0) / sizes.sum(), len(blocks)
        if b == 1:
            return share, np.full(len(share), math.inf)
        deviation = hits - share * sizes[:, None]
        return share, np.sqrt(b / (b - 1) * (deviation**2).sum(0)) / sizes.sum()

    def correlation(self, obs: Correlation, lags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A correlation of functions of angles, with standard errors, each (L,).

        NaN at lags (whole numbers of frames) beyond `longest_lag`.
        """
        whole = self.blocks(shortest=4 * int(lags.max()))
        reached = lags <= self.longest_lag
        found = np.full((2, len(lags)), math.nan)
        if reached.any():
            value, error = obs.from_trajectories(
                whole.trajectories, lags[reached], weights=whole.weights
            )
            found[:, reached] = value.numpy(), error.numpy()
        return found[0], found[1]

    def function(self, of_frames: Observable, topology: Any) -> Observable | None:
        """A feature of the molecule as a function of angles (n, n_dihedrals), if it is one."""
        for column, own in enumerate(self.names):
            for form, function in FUNCTIONS.items():
                if feature(form.format(own), topology) == of_frames:
                    return _of_column(function, column)
        return None


def backbone(topology: "mdtraj.Topology") -> list[tuple[str, str]]:
    """Names of phi and psi of each residue that has both."""
    from mdtraj.geometry import indices_phi, indices_psi

    phi, psi = indices_phi(topology).tolist(), indices_psi(topology).tolist()
    return [
        (_numbered("phi", i, len(phi)), _numbered("psi", j, len(psi)))
        for i, first in enumerate(phi)
        for j, second in enumerate(psi)
        if first[1:] == second[:3]
    ]


def names_of(pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """All names of pairs."""
    return tuple(name for pair in pairs for name in pair)


def angles_of(frames: Tensor, names: Sequence[str], topology: "mdtraj.Topology") -> Tensor:
    """Angles (n, len(names)) of frames (n, n_atoms, 3), rad."""
    functions = [feature(name, topology) for name in names]
    parts = [
        torch.stack([function(part) for function in functions], dim=1)
        for part in frames.split(CHUNK)
    ]
    return torch.cat(parts)


def histogram(angles: Tensor, bins: int, weights: Tensor | None = None) -> np.ndarray:
    """Share of angles (n, d) in each of `bins` bins for each angle, sum 1."""
    x = angles.clamp(-math.pi, math.pi).numpy()
    limits = [(-math.pi, math.pi)] * x.shape[1]
    count = np.histogramdd(x, bins, limits, weights=None if weights is None else weights.numpy())[0]
    return count / count.sum()


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Divergence of two histograms in nats.

    >>> jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == math.log(2)
    True
    """
    middle = (p + q) / 2
    terms = [part[part > 0] @ np.log(part[part > 0] / middle[part > 0]) for part in (p, q)]
    return float(sum(terms) / 2)


def _numbered(kind: str, index: int, count: int) -> str:
    return kind if count == 1 else f"{kind}{index + 1}"


def _of_column(function: Observable, column: int) -> Callable[[Tensor], Tensor]:
    return lambda angles: function(angles[:, column])
