r"""Enhanced sampling of one-dimensional systems.

Umbrella sampling takes harmonic biases along x, tempering the thermal energies of a ladder, both as
in `biased`: hot windows cross barriers for cold ones. After each frame, walkers at neighbouring
temperatures exchange their positions with probability

    min(1, exp((1 / kT_k - 1 / kT_l) (U(x_k) - U(x_l)))),

which leaves the density of each window what it is: replica exchange, Sugita and Okamoto (Chem.
Phys. Lett. 314, 141, 1999).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bopito_inverse.arguments import Seed, as_count, as_device, as_frames, as_generator
from bopito_inverse.datasets import Array
from bopito_inverse.simulate.biased import BiasedSamples
from bopito_inverse.simulate.langevin import record, refuse_blown_up
from bopito_inverse.systems.potentials import Potential1D

ENERGY_GRID = 4001  # points within the bounds, for the lowest energy
LONGEST_STEP = 0.1  # stiffness * time_step / friction; beyond it Euler-Maruyama widens a window


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
    n_simulated = frames_to_simulate(n_frames, n_walkers, burn_in, stride)
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
    n_simulated = frames_to_simulate(n_frames, n_walkers, burn_in, stride)
    target = as_device(device)
    ladder = as_ladder("kT", kT).to(target)
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
        x = step[:, 1].view(len(ladder), n_walkers)
        x = x.gather(0, exchanged(_energy(system, x), ladder, i % 2, generator))
        frames[:, :, i] = x[..., None]
        x = x.view(-1, 1)
    refuse_blown_up(frames.flatten(0, 1), system)
    kept = frames[:, :, burn_in + stride - 1 :: stride].reshape(len(ladder), n_frames, 1)
    above = _energy(system, kept.flatten()) - energy.min()
    return BiasedSamples.thermal(kept, ladder, above, system.kT, n_walkers, system.name)


def exchanged(u: Tensor, kT: Tensor, first: int, generator: torch.Generator) -> Tensor:
    """Which window each walker's position comes from, `(n_windows, n_walkers)`.

    Neighbours (first, first + 1), (first + 2, first + 3), ... of the ladder `kT`, `(n_windows,)`,
    try to exchange, given their energies `u`, `(n_windows, n_walkers)`.
    """
    lower = torch.arange(len(kT) - 1, device=u.device)[first::2]
    order = torch.arange(len(kT), device=u.device)[:, None].repeat(1, u.shape[1])
    gain = (1 / kT[lower] - 1 / kT[lower + 1])[:, None] * (u[lower] - u[lower + 1])
    chance = torch.rand(gain.shape, generator=generator, device=u.device, dtype=gain.dtype)
    swapped = (chance < gain.exp()).long()
    order[lower] += swapped
    order[lower + 1] -= swapped
    return order


def _energy(system: Potential1D, x: Tensor) -> Tensor:
    """The energy in float64 whose force is that of the system, also beyond its bounds."""
    inside = x.clamp(*system.bounds)
    within = torch.from_numpy(system.energy(inside.cpu().numpy())).to(x.device)
    return within - (x - inside).double() * (system.force(inside) + system.force(x)) / 2


def frames_to_simulate(n_frames: int, n_walkers: int, burn_in: int, stride: int) -> int:
    """Frames of each walker, burn-in included; all counts checked."""
    n_walkers, stride = as_count("n_walkers", n_walkers), as_count("stride", stride)
    burn_in = as_count("burn_in", burn_in, minimum=0)
    if as_count("n_frames", n_frames) % n_walkers:
        raise ValueError(f"n_frames must be a multiple of n_walkers ({n_walkers}), got {n_frames}")
    return burn_in + stride * (n_frames // n_walkers)


def as_ladder(name: str, values: Sequence[float] | np.ndarray) -> Tensor:
    """Temperatures or thermal energies `(n_windows,)`, checked."""
    ladder = np.asarray(values, dtype=np.float64)
    if ladder.ndim != 1 or len(ladder) == 0:
        raise ValueError(f"{name} must be a list of at least one positive number, got {values!r}")
    if not (np.isfinite(ladder) & (ladder > 0)).all() or (np.diff(ladder) <= 0).any():
        raise ValueError(f"{name} must hold positive numbers that increase, got {values!r}")
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
