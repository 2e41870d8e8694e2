r"""Overdamped Langevin dynamics of many independent walkers at once.

Euler-Maruyama with step h of `dx = F(x) / gamma dt + sqrt(2 kT / gamma) dW`, F = -U' + bias:

    x <- x + h F(x) / gamma + sqrt(2 kT h / gamma) xi,    xi ~ N(0, 1).

With a barrier at b, a step that would cross b is rejected (x stays). The step is then still
reversible within each side, so that no probability flows across b while the Boltzmann density on
either side stays what it was.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bopito_inverse.arguments import Seed, as_count, as_device, as_frames, as_generator
from bopito_inverse.datasets import Array, Trajectories
from bopito_inverse.systems.potentials import Potential1D

Bias = Callable[[Tensor], Tensor]

CPU_CHUNK = 16_384  # walkers whose state and forces stay in the cache
CUDA_CHUNK = 1 << 21
NOISE_STEPS = 20  # random numbers are drawn for this many steps at once


def langevin(
    system: Potential1D,
    x_0: Array,
    n_frames: int,
    seed: Seed = 0,
    barrier: float | None = None,
    bias: Bias | None = None,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Trajectories:
    """Simulate one trajectory from each start.

    The same seed gives the same trajectories on the same kind of device, however many threads
    there are.

    Args:
        system: what moves; it sets kT, friction, time step and steps per frame.
        x_0: starts `(n_trajectories, 1)`.
        n_frames: frames in each trajectory. Frame 0 is `x_0`, so `n_frames - 1` are simulated.
        seed: integer or generator.
        barrier: no trajectory crosses this x.
        bias: force added to that of the system, elementwise on a tensor `(n, 1)`.
        device: `auto`, `cpu` or `cuda`.
        progress: show a progress bar.

    Raises:
        ValueError: bad starts, or trajectories that became infinite (time step too long).

    >>> from bopito_inverse.systems.potentials import OrnsteinUhlenbeck
    >>> langevin(OrnsteinUhlenbeck(), torch.zeros(100, 1), n_frames=5)
    Trajectories(100 trajectories, 500 frames of shape (1,), frame_time=0.05, \
system='OrnsteinUhlenbeck')
    """
    target = as_device(device)
    x = as_frames("x_0", x_0, system.event_shape, target)
    n_frames = as_count("n_frames", n_frames, minimum=2)
    if barrier is not None and not math.isfinite(barrier):
        raise ValueError(f"barrier must be a finite position, got {barrier}")
    seed = _as_integer(seed, target)
    chunks = x.split(CPU_CHUNK if target.type == "cpu" else CUDA_CHUNK)
    frames = x.new_empty(len(x), n_frames, *system.event_shape)
    with _progress_bar(progress, len(chunks) * (n_frames - 1)) as advance:
        for i, (chunk, out) in enumerate(zip(chunks, frames.split(len(chunks[0])), strict=True)):
            record(
                system,
                chunk,
                out,
                as_generator(seed, target, "langevin", i),
                barrier,
                bias,
                advance,
            )
    refuse_blown_up(frames, system)
    return Trajectories(frames, system.frame_time, system.name)


def record(
    system: Potential1D,
    x_0: Tensor,
    frames: Tensor,
    generator: torch.Generator,
    barrier: float | None = None,
    bias: Bias | None = None,
    on_frame: Callable[[], object] = lambda: None,
    kT: Tensor | None = None,
) -> None:
    """Fill `frames` `(n, n_frames, *event)`, frame 0 being `x_0` `(n, *event)`.

    `kT`, `(n, 1)`, gives each walker a thermal energy of its own.
    """
    step = _free_step(system, bias) if barrier is None else _walled_step(system, bias, barrier, x_0)
    noise = x_0.new_empty(NOISE_STEPS, *x_0.shape)
    scale = math.sqrt(2 * system.diffusion * system.time_step)
    heat = None if kT is None else (kT / system.kT).sqrt()
    x = x_0.clone()
    frames[:, 0] = x
    for frame in range(1, frames.shape[1]):
        for start in range(0, system.steps_per_frame, NOISE_STEPS):
            kicks = noise[: system.steps_per_frame - start].normal_(0, scale, generator=generator)
            if heat is not None:
                kicks *= heat
            for kick in kicks:
                step(x, kick)
        frames[:, frame] = x
        on_frame()


def _free_step(system: Potential1D, bias: Bias | None) -> Callable[[Tensor, Tensor], object]:
    force, mobility = _total_force(system, bias), system.time_step / system.friction

    def step(x: Tensor, kick: Tensor) -> None:
        x.add_(force(x), alpha=mobility).add_(kick)

    return step


def _walled_step(
    system: Potential1D, bias: Bias | None, barrier: float, x_0: Tensor
) -> Callable[[Tensor, Tensor], object]:
    force, mobility = _total_force(system, bias), system.time_step / system.friction
    above = x_0 > barrier

    def step(x: Tensor, kick: Tensor) -> None:
        proposal = kick.add_(force(x), alpha=mobility).add_(x)
        torch.where((proposal > barrier) == above, proposal, x, out=x)

    return step


def _total_force(system: Potential1D, bias: Bias | None) -> Bias:
    if bias is None:
        return system.force
    return lambda x: system.force(x) + bias(x).detach()


def _as_integer(seed: Seed, device: torch.device) -> int:
    """An integer seed from either kind, so that each chunk has its own stream."""
    if isinstance(seed, torch.Generator):
        seed = as_generator(seed, device)
        return int(torch.randint(1 << 62, (), generator=seed, device=seed.device))
    return seed


def refuse_blown_up(frames: Tensor, system: Potential1D) -> None:
    """Raise a `ValueError` where a trajectory (n, n_frames, *event) is not finite."""
    finite = torch.isfinite(frames).flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(frames)} trajectories became infinite or NaN: the "
            f"step is too long for the forces, use a time_step below {system.time_step:g}"
        )


@contextmanager
def _progress_bar(show: bool, total: int) -> Iterator[Callable[[], object]]:
    if not show:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("Langevin dynamics", total=total)
        yield lambda: bar.advance(task)
