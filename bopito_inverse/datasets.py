r"""Data that models learn from: trajectories, weighted equilibrium frames, time-lagged pairs.

A trajectory is a sequence of frames `x(0), x(1), ...` recorded every `frame_time`. Dynamic models
learn the transition density from lagged pairs `(x(s), x(s + N))`: a set of trajectories of lengths
`L_i` holds `P(N) = sum_i max(L_i - N, 0)` pairs of lag `N`, and `LaggedPairs` draws a lag from
`p(N)` and then one of these pairs uniformly. Equilibrium models learn the stationary density mu
from frames `x_n` with weights `w_n`, `sum_n w_n = 1`, such that `sum_n w_n a(x_n)` estimates
`E_mu[a]`.

Frames of molecules are positions `(n_atoms, 3)` in nm, as mdtraj reads and writes them. They are
left where they are: nothing is superposed or wrapped.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bopito_inverse.arguments import as_count, as_frames, as_positive

if TYPE_CHECKING:
    import mdtraj

LagSampling = Literal["log_uniform", "uniform"]
Array = np.ndarray | Tensor | Sequence[Any]

WRITTEN = (".h5", ".trr", ".xtc", ".dcd")  # formats of molecular trajectories
TIMED = (".h5", ".hdf5", ".trr", ".xtc", ".nc", ".ncdf", ".netcdf")  # those that hold times,
COMPLETE = (".h5", ".hdf5", ".pdb", ".cif", ".gro")  # and those that hold a topology
TOPOLOGY = "topology.pdb"


class Trajectories:
    """Trajectories of one system, of equal or unequal length.

    Args:
        trajectories: one array `(n_frames_i, *event)` for each trajectory, or one dense array
            `(n_trajectories, n_frames, *event)`; at least two frames each.
        frame_time: physical time between frames (ps for molecules, reduced units for toy systems).
        system: name of the system that was simulated.

    Attributes:
        frames: all frames in a row, float32, `(total, *event)`.
        lengths: frames in each trajectory, int64, `(n_trajectories,)`.

    Raises:
        ValueError: empty, one-frame, NaN or infinite trajectories, or frames of unequal shape; the
            message says which trajectory and frame.

    >>> trajectories = Trajectories([np.zeros((3, 1)), np.ones((5, 1))], frame_time=0.1)
    >>> len(trajectories), trajectories.lengths.tolist(), tuple(trajectories[1].shape)
    (2, [3, 5], (5, 1))
    """

    def __init__(
        self,
        trajectories: Sequence[Array] | np.ndarray | Tensor,
        frame_time: float,
        system: str | None = None,
    ) -> None:
        if len(trajectories) == 0:
            raise ValueError("trajectories must hold at least one trajectory, got none")
        self.frame_time = as_positive("frame_time", frame_time)
        self.system = system
        if isinstance(trajectories, np.ndarray | Tensor) and trajectories.ndim > 2:
            self.frames, lengths = _stack_dense(trajectories)
        else:
            self.frames, lengths = _stack_ragged(trajectories)
        self._index(lengths)

    def _index(self, lengths: np.ndarray) -> None:
        self._ends = np.cumsum(lengths)
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64, device=self.frames.device)

    def __repr__(self) -> str:
        return (
            f"Trajectories({len(self)} trajectories, {len(self.frames)} frames of shape "
            f"{self.event_shape}, frame_time={self.frame_time:g}, system={self.system!r})"
        )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one frame."""
        return tuple(self.frames.shape[1:])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Tensor:
        """The frames of one trajectory, a view `(n_frames, *event)`."""
        end = int(self._ends[index])
        index = index % len(self)
        return self.frames[int(self._ends[index - 1]) if index else 0 : end]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def take(self, index: Tensor) -> "Trajectories":
        """Some of the trajectories, by their numbers (n,)."""
        return Trajectories([self[i] for i in index.tolist()], self.frame_time, self.system)

    def to(self, device: torch.device | str) -> "Trajectories":
        """The same trajectories on another device."""
        moved = Trajectories.__new__(Trajectories)
        moved.frame_time, moved.system = self.frame_time, self.system
        moved.frames = self.frames.to(device)
        moved._index(np.diff(self._ends, prepend=0))
        return moved

    def write(
        self,
        path: str | os.PathLike,
        topology: "str | os.PathLike | mdtraj.Topology | None" = None,
    ) -> None:
        """Write `.npz`, or files that mdtraj, VMD and PyMOL read. A file appears complete or not.

        `.npz` holds `trajectories`, `frame_time` and `system`. Trajectories of equal length are one
        dense array `(n_trajectories, n_frames, *event)`; otherwise all frames in a row,
        `(total, *event)`, with an array `lengths`.

        `.h5`, `.trr`, `.xtc` (rounded to 0.001 nm) and `.dcd` (without times) hold one trajectory
        of a molecule each: several are numbered, `trajectory.xtc` gives `trajectory_0000.xtc` and
        so on. `topology.pdb`, with the first frame, is written beside them.

        Args:
            path: of the file; its suffix says which format.
            topology: of the molecule, mdtraj's or a file that holds it.

        Raises:
            ValueError: another suffix; no topology or one that does not fit the frames; other
                trajectories of that name that `read` would take for part of these.
        """
        path = Path(path)
        if path.suffix != ".npz":
            _write_molecules(path, self, topology)
            return
        frames, lengths = self.frames.cpu().numpy(), self.lengths.cpu().numpy()
        system, extra = np.str_(self.system or ""), {}
        if (lengths == lengths[0]).all():
            frames = frames.reshape(len(lengths), -1, *self.event_shape)
        else:
            extra["lengths"] = lengths
        frame_time = np.float64(self.frame_time)
        write_npz(path, trajectories=frames, frame_time=frame_time, system=system, **extra)

    @classmethod
    def read(
        cls,
        path: str | os.PathLike,
        topology: "str | os.PathLike | mdtraj.Topology | None" = None,
        frame_time: float | None = None,
    ) -> "Trajectories":
        """Read what `write` wrote, any `.npz` of that layout, or what mdtraj reads.

        Args:
            path: `.npz` (`system` may be missing); one trajectory of a molecule in any other format
                of mdtraj; or a folder of several, `trajectory_*`, read in the order of their names.
            topology: for formats that hold none, mdtraj's or a file that holds it; by default
                `topology.pdb` in the same folder.
            frame_time: in ps, needed where the format holds no times (dcd, pdb); where it is given,
                times in the file are not used.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, foreign, lacks a key or holds bad trajectories; times
                that are not evenly spaced, or none and no `frame_time`.
        """
        path = Path(path)
        if path.suffix != ".npz":
            return cls(*_read_molecules(path, topology, frame_time))
        arrays = read_npz(path, ("trajectories", "frame_time"))
        frames, lengths = arrays["trajectories"], arrays.get("lengths")
        system = str(arrays["system"]) if "system" in arrays else ""
        try:
            parts = frames if lengths is None else _split(frames, lengths)
            if frame_time is None:
                frame_time = _scalar("frame_time", arrays)
            return cls(parts, frame_time, system or None)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


class Frames:
    """Frames with weights that average to the unbiased equilibrium.

    Args:
        x: frames `(n, *event)`.
        weights: non-negative weight of each frame `(n,)`, for example from `simulate.mbar_weights`;
            equal weights by default. They are stored in float64, normalised to sum 1.

    Raises:
        ValueError: non-finite frames; weights of wrong length, negative, non-finite or all zero.

    >>> frames = Frames(np.array([[0.0], [1.0]]), weights=[1, 3])
    >>> float(frames.mean()), round(frames.ess, 3)
    (0.75, 1.6)
    """

    def __init__(self, x: Array, weights: Array | None = None) -> None:
        device = x.device if isinstance(x, Tensor) else "cpu"
        self.x = as_frames("x", x, device=device)
        if weights is None:
            weights = torch.ones(len(self.x), dtype=torch.float64)
        self.weights = _normalised(weights, self.x)
        cumulative = self.weights.cumsum(0)
        self._cumulative = cumulative / cumulative[-1]

    def __repr__(self) -> str:
        return f"Frames({len(self)} frames of shape {self.event_shape}, ess={self.ess:.1f})"

    def __len__(self) -> int:
        return len(self.x)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one frame."""
        return tuple(self.x.shape[1:])

    @property
    def ess(self) -> float:
        """Kish's effective sample size, (sum w)^2 / sum w^2."""
        return float(1 / self.weights.square().sum())

    def systematic(self, n: int, generator: torch.Generator) -> Tensor:
        """Index of n frames by weight, (n,), sorted: each appears n w times, give or take one."""
        device = self.x.device
        u = torch.rand((), generator=generator, device=device, dtype=torch.float64)
        levels = (torch.arange(n, device=device) + u) / n
        return torch.searchsorted(self._cumulative, levels).clamp(max=len(self) - 1)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Index of n frames drawn with replacement by weight, (n,)."""
        u = torch.rand(n, dtype=torch.float64, device=self.x.device, generator=generator)
        return torch.searchsorted(self._cumulative, u, right=True)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw `n` frames with replacement by weight, `(n, *event)`, on the device of the data."""
        return self.x.index_select(0, self.draw(n, generator))

    def take(self, index: Tensor) -> "Frames":
        """Some of the frames, by their numbers (n,), with their weights."""
        return Frames(self.x[index], self.weights[index])

    def mean(self) -> Tensor:
        """Weighted mean of each component of a frame, shape `event`."""
        return torch.tensordot(self.weights, self.x.double(), 1).float()

    def std(self) -> Tensor:
        """Weighted standard deviation of each component of a frame, shape `event`."""
        centred = self.x.double() - torch.tensordot(self.weights, self.x.double(), 1)
        return torch.tensordot(self.weights, centred.square(), 1).sqrt().float()

    def to(self, device: torch.device | str) -> "Frames":
        """The same weighted frames on another device."""
        moved = Frames.__new__(Frames)
        moved.x, moved.weights = self.x.to(device), self.weights.to(device)
        moved._cumulative = self._cumulative.to(device)
        return moved

    def write(self, path: str | os.PathLike) -> None:
        """Write `.npz` with `frames` `(n, *event)` and `weights` `(n,)`, complete or not at all."""
        write_npz(path, frames=self.x.cpu().numpy(), weights=self.weights.cpu().numpy())

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Frames":
        """Read what `write` wrote; `weights` may be missing (equal weights).

        Raises:
            ValueError: the file is truncated, foreign, lacks `frames` or holds bad values.
        """
        arrays = read_npz(path, ("frames",))
        try:
            return cls(arrays["frames"], arrays.get("weights"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


class LaggedPairs:
    """Batches of `(x(s), x(s + N), N)` from every valid pair of every trajectory.

    The lag is drawn from {1, ..., lag_max}, uniformly or with `p(N)` proportional to
    `log((N + 1) / N)` (uniform in log N), then a pair uniformly among all pairs of that lag. With
    trajectories sorted by falling length, those that hold pairs of lag N are the first `m(N)`, and
    the first k of them hold `cumL_k - k N`; a bisection for k finds the pair of a given rank, for
    the whole batch at once and on the device of the data.

    Args:
        trajectories: where the pairs come from.
        lag_max: longest lag in frames, below the longest trajectory.
        sampling: `"log_uniform"` or `"uniform"`.

    Raises:
        ValueError: `lag_max` is not below the longest trajectory, or an unknown `sampling`.
    """

    def __init__(
        self, trajectories: Trajectories, lag_max: int, sampling: LagSampling = "log_uniform"
    ) -> None:
        self.lag_max = as_count("lag_max", lag_max)
        longest = int(trajectories.lengths.max())
        if self.lag_max >= longest:
            raise ValueError(
                f"lag_max must be below the longest trajectory ({longest} frames), got {lag_max}"
            )
        if sampling not in get_args(LagSampling):
            raise ValueError(f"sampling must be one of {get_args(LagSampling)}, got {sampling!r}")
        self.trajectories = trajectories
        self.sampling = sampling
        self._sort(trajectories.lengths)

    def _sort(self, lengths: Tensor) -> None:
        zero = lengths.new_zeros(1)
        start = torch.cat([zero, lengths.cumsum(0)[:-1]])
        lengths, order = lengths.sort(descending=True, stable=True)
        self._start = start[order]
        self._cumulative = torch.cat([zero, lengths.cumsum(0)])  # cumL_k, k = 0 ... n
        lags = torch.arange(self.lag_max + 1, device=lengths.device)
        self._holding = len(lengths) - torch.searchsorted(lengths.flip(0), lags, right=True)
        self._bisections = len(lengths).bit_length()
        self._equal_length = int(lengths[0]) if bool(lengths[0] == lengths[-1]) else None

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `(x_0, x_lag, lag)`, shapes `(B, *event)`, `(B, *event)`, `(B,)` (int64)."""
        frames = self.trajectories.frames
        u = torch.rand(
            2, batch_size, dtype=torch.float64, device=frames.device, generator=generator
        )
        lag = self._draw_lag(u[0])
        position = self._draw_position(u[1], lag)
        return frames.index_select(0, position), frames.index_select(0, position + lag), lag

    def _draw_lag(self, u: Tensor) -> Tensor:
        if self.sampling == "uniform":
            lag = 1 + u * self.lag_max
        else:
            lag = torch.exp(u * math.log(self.lag_max + 1))
        return lag.long().clamp_(1, self.lag_max)

    def _draw_position(self, u: Tensor, lag: Tensor) -> Tensor:
        """Position of x(s) among all frames, uniform over the pairs of each lag."""
        high = self._holding[lag]
        n_pairs = self._cumulative[high] - high * lag
        rank = torch.minimum((u * n_pairs).long(), n_pairs - 1)
        if self._equal_length is not None:
            k = rank // (self._equal_length - lag)
        else:
            k = self._bisect(rank, lag, high)
        return self._start[k] + rank - (self._cumulative[k] - k * lag)

    def _bisect(self, rank: Tensor, lag: Tensor, high: Tensor) -> Tensor:
        """The last k below `high` with cumL_k - k N <= rank."""
        low = torch.zeros_like(high)
        for _ in range(self._bisections):
            middle = (low + high) // 2
            below = self._cumulative[middle] - middle * lag <= rank
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low


def write_npz(path: str | os.PathLike, **arrays: np.ndarray | np.generic) -> None:
    """Write arrays to `path` through a temporary file beside it, so that no reader meets a half."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_npz(path: str | os.PathLike, required: Sequence[str]) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` file, nothing unpickled; the names in `required` must be there.

    Raises:
        ValueError: the file is truncated or no `.npz`, or a required array is missing.
    """
    unreadable = (ValueError, EOFError, KeyError, OSError, zipfile.BadZipFile, zlib.error)
    with Path(path).open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (*unreadable, TypeError, AttributeError) as error:  # a .npy file is a bare array
            raise ValueError(f"{path} is no readable .npz file: {error}") from error
    for name in required:
        if name not in arrays:
            raise ValueError(f"{path} has no array {name!r}, only {sorted(arrays)}")
    return arrays


def require_pytables(suffix: str, what: str) -> None:
    """Refuse HDF5 files where PyTables, with which mdtraj reads and writes them, is missing."""
    if suffix in (".h5", ".hdf5") and find_spec("tables") is None:
        raise ValueError(f"{what} needs the package tables: `pip install tables`")


def _write_molecules(path: Path, trajectories: Trajectories, topology: Any) -> None:
    """Files of the trajectories and `topology.pdb` beside them."""
    import mdtraj

    if path.suffix not in WRITTEN:
        raise ValueError(f"path must end in .npz or one of {', '.join(WRITTEN)}, got {str(path)!r}")
    require_pytables(path.suffix, str(path))
    molecule = _topology(path, topology)
    if trajectories.event_shape != (molecule.n_atoms, 3):
        raise ValueError(
            f"topology must be that of the frames, of shape {trajectories.event_shape}, got one of "
            f"{molecule.n_atoms} atoms"
        )
    paths = [path]
    if len(trajectories) > 1:
        paths = [
            path.with_name(f"{path.stem}_{i:04d}{path.suffix}") for i in range(len(trajectories))
        ]
        others = sorted({*path.parent.glob(f"{path.stem}_[0-9]*{path.suffix}")} - {*paths})
        if others:
            raise ValueError(f"{path.parent} holds other trajectories, the first is {others[0]}")
    first = trajectories.frames[:1].cpu().numpy()
    _save(mdtraj.Trajectory(first, molecule), path.with_name(TOPOLOGY))
    for file, frames in zip(paths, trajectories, strict=True):
        time = np.arange(len(frames)) * trajectories.frame_time
        _save(mdtraj.Trajectory(frames.cpu().numpy(), molecule, time), file)


def _save(trajectory: "mdtraj.Trajectory", path: Path) -> None:
    """Save through a temporary file beside `path`, as `write_npz` does."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        trajectory.save(str(partial))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_molecules(
    path: Path, topology: Any, frame_time: float | None
) -> tuple[list[np.ndarray], float]:
    """Positions of each trajectory and the time between frames."""
    files = [path]
    if path.is_dir():
        files = [file for file in path.glob("trajectory_*") if file.suffix in WRITTEN]
        files.sort(key=lambda file: (len(file.name), file.name))
        if len({file.suffix for file in files}) != 1:
            raise ValueError(
                f"{path} must hold files trajectory_* of one format ({', '.join(WRITTEN)}), got "
                f"{[file.name for file in files[:10]]}"
            )
    elif not path.is_file():
        raise FileNotFoundError(f"there is no trajectory {path}")
    require_pytables(files[0].suffix, str(path))
    molecule = None if files[0].suffix in COMPLETE else _topology(files[0], topology)
    trajectories, steps = [], []
    for file in files:
        trajectory = _load(file, molecule)
        trajectories.append(as_frames(f"{file}: frames", trajectory.xyz).numpy())
        steps.append(_spacing(file, trajectory.time) if frame_time is None else frame_time)
        if not math.isclose(steps[-1], steps[0], rel_tol=1e-3):
            raise ValueError(
                f"frames must be equally far apart in all files, got {steps[0]:g} ps in "
                f"{files[0]} and {steps[-1]:g} ps in {file}"
            )
    return trajectories, steps[0]


def _load(path: Path, topology: "mdtraj.Topology | None") -> "mdtraj.Trajectory":
    import mdtraj

    try:
        trajectory = mdtraj.load(str(path), **({} if topology is None else {"top": topology}))
    except Exception as error:  # each reader of mdtraj has errors of its own
        raise ValueError(f"{path} cannot be read by mdtraj: {error}") from error
    if len(trajectory) < 2:
        raise ValueError(f"{path} must hold at least 2 frames, got {len(trajectory)}")
    return trajectory


def _topology(path: Path, topology: Any) -> "mdtraj.Topology":
    """The topology of the trajectory at `path`: mdtraj's, from a file, or from beside it."""
    import mdtraj

    if isinstance(topology, mdtraj.Topology):
        return topology
    file = path.with_name(TOPOLOGY) if topology is None else Path(topology)
    if not file.is_file():
        raise ValueError(f"topology must be given for {path}, there is no file {file}")
    try:
        return mdtraj.load_topology(str(file))
    except Exception as error:
        raise ValueError(f"topology {file} cannot be read by mdtraj: {error}") from error


def _spacing(path: Path, time: np.ndarray) -> float:
    """Time between frames, ps, from the times of a file, which may be in single precision."""
    if path.suffix not in TIMED:
        raise ValueError(f"frame_time must be given for {path}: the format holds no times")
    steps = np.diff(np.asarray(time, dtype=np.float64))
    if not (steps.mean() > 0 and abs(steps - steps.mean()).max() < 0.1 * steps.mean()):
        raise ValueError(
            f"{path} must hold evenly spaced frames, got {steps.min():g} to {steps.max():g} ps "
            "between them; frame_time overrides the times of the file"
        )
    return float(f"{steps.mean():.6g}")


def _stack_dense(trajectories: np.ndarray | Tensor) -> tuple[Tensor, np.ndarray]:
    """All frames and the lengths of a dense array, checked at once."""
    n, n_frames = trajectories.shape[:2]
    if n_frames < 2:
        raise ValueError(f"trajectories must hold at least 2 frames each, got {n_frames}")
    device = trajectories.device if isinstance(trajectories, Tensor) else "cpu"
    frames = torch.as_tensor(trajectories, dtype=torch.float32, device=device).flatten(0, 1)
    if not torch.isfinite(frames).all():
        bad = int((~torch.isfinite(frames).flatten(1).all(1)).nonzero()[0, 0])
        as_frames(f"trajectories[{bad // n_frames}]", trajectories[bad // n_frames])
    return frames, np.full(n, n_frames)


def _stack_ragged(trajectories: Sequence[Array] | np.ndarray | Tensor) -> tuple[Tensor, np.ndarray]:
    """All frames and the lengths of trajectories that are checked one by one."""
    device = trajectories[0].device if isinstance(trajectories[0], Tensor) else "cpu"
    checked: list[Tensor] = []
    for i, value in enumerate(trajectories):
        event_shape = tuple(checked[0].shape[1:]) if checked else None
        frames = as_frames(f"trajectories[{i}]", value, event_shape, device)
        if len(frames) < 2:
            raise ValueError(f"trajectories[{i}] must hold at least 2 frames, got {len(frames)}")
        checked.append(frames)
    return torch.cat(checked), np.array([len(frames) for frames in checked])


def _split(frames: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    lengths = np.atleast_1d(lengths)
    if not np.issubdtype(lengths.dtype, np.integer) or (lengths < 1).any():
        raise ValueError("lengths must be whole numbers of at least 1")
    if lengths.sum() != len(frames):
        raise ValueError(f"lengths must sum to the {len(frames)} frames, got {lengths.sum()}")
    return np.split(frames, np.cumsum(lengths)[:-1])


def _scalar(name: str, arrays: dict[str, np.ndarray]) -> float:
    if arrays[name].size != 1:
        raise ValueError(f"{name} must be one number, got shape {arrays[name].shape}")
    return float(arrays[name].item())


def _normalised(weights: Array, x: Tensor) -> Tensor:
    weights = torch.as_tensor(weights, dtype=torch.float64, device=x.device)
    if weights.shape != (len(x),):
        raise ValueError(f"weights must have shape ({len(x)},), got {tuple(weights.shape)}")
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"weights must be finite and not negative, got {float(weights[first])} at frame {first}"
        )
    if not weights.sum() > 0:
        raise ValueError("weights must have a positive sum, got all zero")
    return weights / weights.sum()
