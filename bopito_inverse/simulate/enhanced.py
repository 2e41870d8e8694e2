r"""Enhanced sampling: samples of several biased ensembles that together cover the equilibrium.

Window k samples `p_k(x) ~ exp(-(U(x) + b_k(x)) / kT)`. Umbrella sampling takes harmonic biases

    b_k(x) = stiffness_k / 2 (x - c_k)^2

with centres `c_k` along x. Tempering takes thermal energies `kT_k`: `p_k(x) ~ exp(-U(x) / kT_k)` is
the bias

    b_k(x) / kT = U(x) (1 / kT_k - 1 / kT),

and hot windows cross barriers for cold ones. After each frame, walkers at neighbouring temperatures
exchange their positions with probability

    min(1, exp((1 / kT_k - 1 / kT_l) (U(x_k) - U(x_l)))),

which leaves every `p_k` what it is: replica exchange, Sugita and Okamoto (Chem. Phys. Lett. 314,
141, 1999).

The matrix of reduced biases `b_k(x_n) / kT` of every frame in every window is all that MBAR (Shirts
and Chodera 2008) needs to give each frame its weight at kT, see `reweight`. Files of harmonic
windows hold centres and stiffnesses instead, and the matrix is computed when they are read.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bopito_inverse.arguments import (
    Seed,
    as_count,
    as_device,
    as_frames,
    as_generator,
    as_positive,
)
from bopito_inverse.datasets import Array, read_npz, write_npz
from bopito_inverse.simulate.langevin import record, refuse_blown_up
from bopito_inverse.systems.potentials import Potential1D

ENERGY_GRID = 4001  # points within the bounds, for the lowest energy
LONGEST_STEP = 0.1  # stiffness * time_step / friction; beyond it Euler-Maruyama widens a window


@dataclass(eq=False)
class BiasedSamples:
    """Equal numbers of frames from biased windows, of any origin.

    Args:
        frames: `(n_windows, n_frames, *event)`; where a window was sampled by several walkers, the
            frames of one walker follow those of another.
        reduced_bias: `b_k(x_n) / kT`, float64, `(n_windows, n_windows * n_frames)`; the column of
            frame i of window k is `k * n_frames + i`.
        kT: thermal energy, in the unit of the biases.
        n_walkers: walkers in each window.
        system: name of the system that was simulated.

    Attributes:
        centers, stiffness: of harmonic windows (see `harmonic`), float64 `(n_windows,)`; None
            where the biases are of another form.

    Raises:
        ValueError: shapes that do not fit together, non-finite values, n_walkers that does not
            divide n_frames.
    """

    frames: Tensor
    reduced_bias: Tensor
    kT: float = 1.0
    n_walkers: int = 1
    system: str | None = None
    centers: Tensor | None = field(default=None, init=False)
    stiffness: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.frames = torch.as_tensor(self.frames, dtype=torch.float32)
        if self.frames.ndim < 3 or self.frames.shape[0] < 1 or self.frames.shape[1] < 1:
            raise ValueError(
                "frames must have shape (n_windows, n_frames, *event), got "
                f"{tuple(self.frames.shape)}"
            )
        for k, window in enumerate(self.frames):
            as_frames(f"frames[{k}]", window, device=window.device)
        self.reduced_bias = _as_bias(self.reduced_bias, self.n_windows, self.frames_flat)
        self.kT = as_positive("kT", self.kT)
        self.n_walkers = as_count("n_walkers", self.n_walkers)
        if self.n_frames % self.n_walkers:
            raise ValueError(
                f"n_walkers must divide the {self.n_frames} frames of a window, got "
                f"{self.n_walkers}"
            )

    @property
    def n_windows(self) -> int:
        """Number of biased windows."""
        return self.frames.shape[0]

    @property
    def n_frames(self) -> int:
        """Frames in each window."""
        return self.frames.shape[1]

    @property
    def frames_flat(self) -> Tensor:
        """All frames in a row, `(n_windows * n_frames, *event)`: what MBAR weights belong to."""
        return self.frames.flatten(0, 1)

    @classmethod
    def harmonic(
        cls,
        frames: Tensor,
        centers: Tensor,
        stiffness: Tensor,
        kT: float = 1.0,
        n_walkers: int = 1,
        system: str | None = None,
    ) -> "BiasedSamples":
        """Samples of harmonic windows, with their reduced biases.

        Args:
            frames: frames of one component, `(n_windows, n_frames, 1)`.
            centers, stiffness: of each window, `(n_windows,)`.
            kT, n_walkers, system: as in the constructor.
        """
        frames = torch.as_tensor(frames, dtype=torch.float32)
        if frames.ndim != 3 or frames.shape[2] != 1:
            raise ValueError(
                f"frames must have shape (n_windows, n_frames, 1), got {tuple(frames.shape)}"
            )
        c, k = (
            _per_window(name, value, frames)
            for name, value in (("centers", centers), ("stiffness", stiffness))
        )
        x = frames.double().flatten()
        bias = 0.5 * k[:, None] * (x - c[:, None]).square() / as_positive("kT", kT)
        samples = cls(frames, bias, kT, n_walkers, system)
        samples.centers, samples.stiffness = c, k
        return samples

    def write(self, path: str | os.PathLike) -> None:
        """Write `.npz` with one array per field, complete or not at all.

        Harmonic windows are stored as `centers` and `stiffness`, others as `reduced_bias`.
        """
        if self.centers is None or self.stiffness is None:
            bias = {"reduced_bias": self.reduced_bias}
        else:
            bias = {"centers": self.centers, "stiffness": self.stiffness}
        write_npz(
            path,
            frames=self.frames.cpu().numpy(),
            **{name: value.cpu().numpy() for name, value in bias.items()},
            kT=np.float64(self.kT),
            n_walkers=np.int64(self.n_walkers),
            system=np.str_(self.system or ""),
        )

    @classmethod
    def read(cls, path: str | os.PathLike) -> "BiasedSamples":
        """Read what `write` wrote (`n_walkers` and `system` may be missing).

        Raises:
            ValueError: the file is truncated, foreign, lacks a key or holds bad values.
        """
        arrays = read_npz(path, ("frames", "kT"))
        harmonic = "centers" in arrays
        names = ("frames", "centers", "stiffness") if harmonic else ("frames", "reduced_bias")
        _require(path, arrays, names)
        make: Callable[..., BiasedSamples] = cls.harmonic if harmonic else cls
        try:
            return make(
                *(torch.from_numpy(arrays[name]) for name in names),
                kT=float(arrays["kT"].item()),
                n_walkers=int(arrays["n_walkers"].item()) if "n_walkers" in arrays else 1,
                system=(str(arrays["system"]) or None) if "system" in arrays else None,
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def umbrella(
    system: Potential1D,
    centers: Sequence[float] | np.ndarray,
    stiffness: float | Sequence[float] | np.ndarray,
    n_frames: int,
    seed: Seed = 0,
    n_walkers: int = 20,
    burn_in: int = 50,
    stride: int = 1,
    device: str | torch.device = "auto",
) -> BiasedSamples:
    """Sample harmonic windows 0.5 k (x - c)^2, all windows and walkers in one batch.

    Walkers start at the centre of their window.

    Args:
        system: what moves.
        centers: window centres c, `(n_windows,)`.
        stiffness: k, one for all windows or one each, in energy per length^2.
        n_frames: frames kept in each window, a multiple of `n_walkers`.
        seed: integer or generator.
        n_walkers: independent walkers in each window, `n_frames / n_walkers` frames each.
        burn_in: frames of each walker left out at the start, to forget the centre.
        stride: frames simulated for each one kept; it saves space, not time, where frames are
            correlated.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: non-finite centres, stiffness not positive or too high for the time step, or
            n_frames no multiple of n_walkers.
    """
    n_simulated = _frames_to_simulate(n_frames, n_walkers, burn_in, stride)
    target = as_device(device)
    c, k = (part.to(target) for part in _as_windows(system, centers, stiffness))
    centre, spring = (v.float().repeat_interleave(n_walkers)[:, None] for v in (c, k))
    frames = centre.new_empty(len(centre), 1 + n_simulated, 1)
    generator = as_generator(seed, target, "umbrella")
    record(system, centre, frames, generator, bias=lambda x: spring * (centre - x))
    kept = frames[:, burn_in + stride :: stride].reshape(len(c), n_frames, 1)
    return BiasedSamples.harmonic(kept, c, k, system.kT, n_walkers, system.name)


def tempering(
    system: Potential1D,
    kT: Sequence[float] | np.ndarray,
    n_frames: int,
    seed: Seed = 0,
    n_walkers: int = 20,
    burn_in: int = 50,
    stride: int = 1,
    starts: Array | None = None,
    device: str | torch.device = "auto",
) -> BiasedSamples:
    """Sample a ladder of temperatures by replica exchange, all walkers in one batch.

    Walker w of a temperature exchanges with walker w of the next one: even and odd pairs of
    neighbours take turns, frame by frame. Beyond the bounds of the system the energy is that of its
    force, which continues linearly there.

    The biases know a frame by its energy alone, and so does the `ess` of `mbar`: wells of like
    energy between which walkers rarely move do not show in it. Compare seeds, or other `starts`.

    Args:
        system: what moves.
        kT: thermal energy of each window, increasing, `(n_windows,)`. Neighbours should be close
            enough to overlap (`mbar` says so). `system.kT` need not be one of them, but the frames
            weigh little where all of them are hotter.
        n_frames: frames kept in each window, a multiple of `n_walkers`.
        seed: integer or generator.
        n_walkers: independent walkers in each window, `n_frames / n_walkers` frames each.
        burn_in: frames of each walker left out at the start, to forget it.
        stride: frames simulated for each one kept.
        starts: where the walkers begin at every temperature, `(n_walkers, 1)`; by default all of
            them at the lowest energy within the bounds.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: thermal energies that are not positive or do not increase, starts of another
            shape, n_frames no multiple of n_walkers, or walkers that became infinite (time step
            too long).
    """
    n_simulated = _frames_to_simulate(n_frames, n_walkers, burn_in, stride)
    target = as_device(device)
    ladder = _as_ladder(kT).to(target)
    grid = np.linspace(*system.bounds, ENERGY_GRID)
    energy = system.energy(grid)
    first = torch.tensor([[grid[energy.argmin()]]] * n_walkers) if starts is None else starts
    x = as_frames("starts", first, system.event_shape, target)
    if len(x) != n_walkers:
        raise ValueError(
            f"starts must hold one frame for each of {n_walkers} walkers, got {len(x)}"
        )
    generator = as_generator(seed, target, "tempering")
    frames = x.new_empty(len(ladder), n_walkers, n_simulated, 1)
    x, heat = x.repeat(len(ladder), 1), ladder.float().repeat_interleave(n_walkers)[:, None]
    for i in range(n_simulated):
        step = x.new_empty(len(x), 2, 1)
        record(system, x, step, generator, kT=heat)
        x = _exchange(system, step[:, 1].view(len(ladder), n_walkers), ladder, i % 2, generator)
        frames[:, :, i] = x[..., None]
        x = x.view(-1, 1)
    refuse_blown_up(frames.flatten(0, 1), system)
    kept = frames[:, :, burn_in + stride - 1 :: stride].reshape(len(ladder), n_frames, 1)
    above = _energy(system, kept.flatten()) - energy.min()
    bias = (1 / ladder - 1 / system.kT)[:, None] * above
    return BiasedSamples(kept, bias, system.kT, n_walkers, system.name)


def _exchange(
    system: Potential1D, x: Tensor, kT: Tensor, first: int, generator: torch.Generator
) -> Tensor:
    """Positions `(n_windows, n_walkers)` after neighbours first, first + 2, ... tried to swap."""
    lower = torch.arange(len(kT) - 1, device=x.device)[first::2]
    u = _energy(system, x)
    gain = (1 / kT[lower] - 1 / kT[lower + 1])[:, None] * (u[lower] - u[lower + 1])
    chance = torch.rand(gain.shape, generator=generator, device=x.device, dtype=gain.dtype)
    swapped = chance < gain.exp()
    made = x.clone()
    made[lower] = torch.where(swapped, x[lower + 1], x[lower])
    made[lower + 1] = torch.where(swapped, x[lower], x[lower + 1])
    return made


def _energy(system: Potential1D, x: Tensor) -> Tensor:
    """The energy in float64 whose force is that of the system, also beyond its bounds."""
    inside = x.clamp(*system.bounds)
    within = torch.from_numpy(system.energy(inside.cpu().numpy())).to(x.device)
    return within - (x - inside).double() * (system.force(inside) + system.force(x)) / 2


def _frames_to_simulate(n_frames: int, n_walkers: int, burn_in: int, stride: int) -> int:
    """Frames of each walker, burn-in included; all counts checked."""
    n_walkers, stride = as_count("n_walkers", n_walkers), as_count("stride", stride)
    burn_in = as_count("burn_in", burn_in, minimum=0)
    if as_count("n_frames", n_frames) % n_walkers:
        raise ValueError(f"n_frames must be a multiple of n_walkers ({n_walkers}), got {n_frames}")
    return burn_in + stride * (n_frames // n_walkers)


def _as_ladder(kT: Sequence[float] | np.ndarray) -> Tensor:
    """Thermal energies `(n_windows,)`, checked."""
    ladder = np.asarray(kT, dtype=np.float64)
    if ladder.ndim != 1 or len(ladder) == 0:
        raise ValueError(f"kT must be a list of at least one thermal energy, got {kT!r}")
    if not (np.isfinite(ladder) & (ladder > 0)).all() or (np.diff(ladder) <= 0).any():
        raise ValueError(f"kT must hold positive thermal energies that increase, got {kT!r}")
    return torch.from_numpy(ladder)


def _as_windows(
    system: Potential1D,
    centers: Sequence[float] | np.ndarray,
    stiffness: float | Sequence[float] | np.ndarray,
) -> tuple[Tensor, Tensor]:
    """Centres and stiffnesses `(n_windows,)`, checked."""
    c = np.asarray(centers, dtype=np.float64)
    if c.ndim != 1 or len(c) == 0 or not np.isfinite(c).all():
        raise ValueError(f"centers must be a list of finite positions, got {centers!r}")
    k = np.asarray(stiffness, dtype=np.float64)
    if k.shape not in ((), c.shape) or not (np.isfinite(k) & (k > 0)).all():
        raise ValueError(
            f"stiffness must be positive, one number or one for each of {len(c)} windows, got "
            f"{stiffness!r}"
        )
    limit = LONGEST_STEP * system.friction / system.time_step
    if k.max() > limit:
        raise ValueError(
            f"stiffness must be at most {limit:g} with time_step {system.time_step:g}, got "
            f"{k.max():g}"
        )
    return torch.from_numpy(c), torch.from_numpy(np.broadcast_to(k, c.shape).copy())


def _per_window(name: str, value: Tensor, frames: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=frames.device)
    if value.shape != frames.shape[:1] or not torch.isfinite(value).all():
        raise ValueError(
            f"{name} must hold one finite number for each of {len(frames)} windows, got shape "
            f"{tuple(value.shape)}"
        )
    return value


def _require(path: str | os.PathLike, arrays: dict[str, np.ndarray], names: Sequence[str]) -> None:
    for name in names:
        if name not in arrays:
            raise ValueError(f"{path} has no array {name!r}, only {sorted(arrays)}")


def _as_bias(bias: Tensor, n_windows: int, frames: Tensor) -> Tensor:
    bias = torch.as_tensor(bias, dtype=torch.float64, device=frames.device)
    expected = (n_windows, len(frames))
    if bias.shape != expected:
        raise ValueError(f"reduced_bias must have shape {expected}, got {tuple(bias.shape)}")
    if not torch.isfinite(bias).all():
        k, n = (~torch.isfinite(bias)).nonzero()[0].tolist()
        raise ValueError(f"reduced_bias must be finite, got {float(bias[k, n])} at [{k}, {n}]")
    return bias
