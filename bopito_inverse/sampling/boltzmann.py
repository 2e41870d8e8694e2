r"""The equilibrium score as a Boltzmann generator: frames, their density, their exact weights.

In the log signal-to-noise ratio r = log alpha / sigma, the probability flow of a score is

    dx/dr = v(x, r) = sigma (sigma x - eps(x, t)),        d log p(x(r)) / dr = -div v,

with log p = log N(x; 0, I) at the noisy end (Song et al., arXiv 2011.13456, eqs. 38 and 39). It is
integrated by Runge-Kutta of fourth order in equal steps of r, towards the data to draw frames with
their density q, towards the noise to find the density of given frames. The divergence is exact, one
derivative of the score for each number in a frame: affordable for few. Densities are those of the
flow at t = 0, with the noise exp(-start) that is left there. `generate` has frames of the faster
solvers of rollouts, which take this noise off and have nearly, not exactly, that density: weights
need the frames of `importance_sample`.

In the Boltzmann distribution of an energy U, frames that were drawn with density q have the weights

    w_n ~ exp(-U(x_n) / kT) / q(x_n),    sum_n w_n = 1,

(Noe et al., Science 365, eaaw1147, 2019), whatever the errors of the score, as long as it covers
what U makes likely; Kish's 1 / sum_n w_n^2 says how many independent frames they are worth.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bopito_inverse.arguments import Device, as_count, as_device, as_frames, as_generator
from bopito_inverse.datasets import Array, Frames
from bopito_inverse.noise import VPSchedule
from bopito_inverse.sampling.rollout import Normal
from bopito_inverse.sampling.sample import BATCH_SIZE
from bopito_inverse.sampling.solvers import DPMSolver, Solver

N_STEPS = 25
LOWEST_ESS = 50.0


def generate(
    s_eq: nn.Module,
    n: int,
    seed: int = 0,
    solver: Solver | None = None,
    device: Device | str = "auto",
) -> Tensor:
    """Independent frames of an equilibrium score, (n, *event), in data units.

    Args:
        s_eq: an `EquilibriumScore`, trained or exact.
        n: number of frames.
        seed: integer.
        solver: how noise becomes a frame; by default the one of rollouts.
        device: `auto`, `cpu` or `cuda`.

    >>> import bopito_inverse as bi
    >>> exact = bi.systems.TransferOperator(bi.systems.Prinz(), grid_size=200)
    >>> bi.sampling.generate(exact.equilibrium_score(), 1000).shape
    torch.Size([1000, 1])
    """
    solver = solver or DPMSolver()
    noise: VPSchedule = s_eq.noise  # type: ignore[assignment]
    with torch.no_grad():
        parts = [solver(s_eq, noise, z, normal) for z, normal in _noises(s_eq, n, seed, device)]
    return s_eq.scaling.restore(torch.cat(parts))  # type: ignore[union-attr, operator]


def log_likelihood(
    s_eq: nn.Module, x: Array, n_steps: int = N_STEPS, device: Device | str = "auto"
) -> Tensor:
    """Log density of an equilibrium score at given frames, (n,), float64, in data units.

    Of a molecule it is the density in the space of frames with their centroid at zero.

    Args:
        s_eq: an `EquilibriumScore`, trained or exact, of few numbers in a frame.
        x: frames (n, *event).
        n_steps: steps of the flow, four evaluations each.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: frames of the wrong shape or not finite.

    >>> import bopito_inverse as bi
    >>> exact = bi.systems.TransferOperator(bi.systems.OrnsteinUhlenbeck())
    >>> float(log_likelihood(exact.equilibrium_score(), [[0.0]]).exp())  # 1 / sqrt(2 pi)
    0.398...
    """
    target = as_device(device)
    s_eq = s_eq.to(target)
    frames = as_frames("x", x, s_eq.event_shape, target)  # type: ignore[arg-type]
    parts = []
    with torch.no_grad():
        for part in frames.split(BATCH_SIZE[target.type]):
            y = s_eq.scaling.standardise(part)  # type: ignore[union-attr, operator]
            noised = y * s_eq.noise.alpha(y.new_zeros(()))  # type: ignore[union-attr, operator]
            noise, change = _flow(s_eq, noised, 0.0, 1.0, n_steps)
            parts.append(_log_normal(noise, _dimension(s_eq)) - change)
    return torch.cat(parts) + _log_volume(s_eq)


def importance_sample(
    s_eq: nn.Module,
    energy: Callable[[Tensor], Array],
    n: int,
    seed: int = 0,
    n_steps: int = N_STEPS,
    min_ess: float = LOWEST_ESS,
    device: Device | str = "auto",
) -> Frames:
    """Frames of an equilibrium score, weighted to the Boltzmann distribution of an energy.

    The share of frames that survive, `frames.ess / n`, says how good the score is; it cannot see
    what the score leaves out altogether.

    Args:
        s_eq: an `EquilibriumScore`, trained or exact, of few numbers in a frame.
        energy: U / kT of frames (B, *event) in data units, on `device`, (B,) on any device; inf
            where there is a clash.
        n: number of frames to draw.
        seed: integer.
        n_steps: steps of the flow, four evaluations each.
        min_ess: effective sample size below which the weights are refused.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: energies of the wrong shape or NaN, or an effective sample size below `min_ess`.

    >>> import bopito_inverse as bi
    >>> system = bi.systems.Prinz()
    >>> s_eq = bi.systems.TransferOperator(system, grid_size=200).equilibrium_score()
    >>> frames = importance_sample(s_eq, lambda x: system.energy(x) / system.kT, 1000)
    >>> bool(frames.ess > 950)
    True
    """
    x, log_w = [], []
    with torch.no_grad():
        for noise, _ in _noises(s_eq, n, seed, device):
            noised, change = _flow(s_eq, noise, 1.0, 0.0, n_steps)
            y = noised / s_eq.noise.alpha(noise.new_zeros(()))  # type: ignore[union-attr, operator]
            x.append(s_eq.scaling.restore(y))  # type: ignore[union-attr, operator]
            log_q = _log_normal(noise, _dimension(s_eq)) + change + _log_volume(s_eq)
            log_w.append(-_energies(energy, x[-1]).to(log_q.device) - log_q)
    log_weights = torch.cat(log_w)
    highest = log_weights.max()
    if not torch.isfinite(highest):
        raise ValueError(f"energy must be finite for some frame of s_eq, got none of {n}")
    frames = Frames(torch.cat(x), (log_weights - highest).exp())
    if frames.ess < min_ess:
        raise ValueError(
            f"{n} frames of s_eq are worth only {frames.ess:.1f} independent ones of this energy, "
            f"expected at least {min_ess:g}: draw more (n), train s_eq longer or on frames that "
            "cover the equilibrium, or check the unit of the energy (kT)"
        )
    return frames


def _noises(
    s_eq: nn.Module, n: int, seed: int, device: Device | str
) -> Iterator[tuple[Tensor, Normal]]:
    """Standard normal numbers (b, *event) in batches, each with the source of more."""
    target, n = as_device(device), as_count("n", n)
    s_eq.to(target)
    batch = BATCH_SIZE[target.type]
    for i, first in enumerate(range(0, n, batch)):
        normal = Normal(as_generator(seed, target, "boltzmann", i), scaling=s_eq.scaling)
        yield normal(torch.empty(min(batch, n - first), *s_eq.event_shape, device=target)), normal  # type: ignore[misc]


def _flow(
    s_eq: nn.Module, x: Tensor, start: float, end: float, n_steps: int
) -> tuple[Tensor, Tensor]:
    """Frames that the probability flow carries from one t to another, and the change of log p."""
    noise: VPSchedule = s_eq.noise  # type: ignore[assignment]
    times = torch.linspace(start, end, 2 * as_count("n_steps", n_steps) + 1, device=x.device)
    h = (noise.log_ratio(times[2]) - noise.log_ratio(times[0])).to(x.dtype)
    change = x.new_zeros(len(x), dtype=torch.float64)
    for t_0, t_1, t_2 in zip(times[:-1:2], times[1::2], times[2::2], strict=True):
        v_1, d_1 = _velocity(s_eq, x, t_0)
        v_2, d_2 = _velocity(s_eq, x + h / 2 * v_1, t_1)
        v_3, d_3 = _velocity(s_eq, x + h / 2 * v_2, t_1)
        v_4, d_4 = _velocity(s_eq, x + h * v_3, t_2)
        x = x + h / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)
        change = change - h / 6 * (d_1 + 2 * d_2 + 2 * d_3 + d_4).double()
    return x, change


def _velocity(s_eq: nn.Module, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """v (B, *event) and its divergence (B,)."""
    sigma = s_eq.noise.sigma(t)  # type: ignore[union-attr, operator]

    def v(x: Tensor) -> Tensor:
        return sigma * (sigma * x - s_eq(x, t))

    divergence = x.new_zeros(len(x))
    for i in range(x[0].numel()):
        direction = torch.zeros_like(x).flatten(1)
        direction[:, i] = 1.0
        direction = s_eq.scaling.project(direction.view_as(x))  # type: ignore[union-attr, operator]
        value, along = torch.func.jvp(v, (x,), (direction,))  # type: ignore[misc]
        divergence = divergence + along.flatten(1)[:, i]
    return value, divergence


def _dimension(s_eq: nn.Module) -> int:
    """Of the space in which frames live: without their centroid, three less."""
    shape: tuple[int, ...] = s_eq.event_shape  # type: ignore[assignment]
    centred: bool = s_eq.scaling.centred  # type: ignore[union-attr, assignment]
    return math.prod(shape) - (shape[-1] if centred else 0)


def _log_normal(z: Tensor, dimension: int) -> Tensor:
    """log N(z; 0, I), (B,), float64."""
    return -(z.double().flatten(1).square().sum(1) + dimension * math.log(2 * math.pi)) / 2


def _log_volume(s_eq: nn.Module) -> Tensor:
    """Log density in data units less that of the noised frames at t = 0."""
    scale: Tensor = s_eq.scaling.scale.double()  # type: ignore[union-attr, operator, assignment]
    signal = s_eq.noise.alpha(torch.zeros_like(scale))  # type: ignore[union-attr, operator]
    return _dimension(s_eq) * (signal / scale).log()


def _energies(energy: Callable[[Tensor], Array], x: Tensor) -> Tensor:
    """One energy for each frame, (B,), float64."""
    value = torch.as_tensor(energy(x)).double()
    if value.numel() != len(x) or value.isnan().any() or (value == -torch.inf).any():
        raise ValueError(
            f"energy must give one number above -inf for each of {len(x)} frames, got shape "
            f"{tuple(value.shape)} with {int(value.isnan().sum())} NaN"
        )
    return value.reshape(len(x))
