"""Free energy along a coordinate, with its error, from biased samples.

In a bin of width h that holds the probability P of the equilibrium, `F = -log(P / h)` in kT: the
negative logarithm of the density, no reference but its normalisation. Its standard error is that of
log P, see `reweight`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from bopito_inverse.datasets import Array
from bopito_inverse.simulate.biased import BiasedSamples
from bopito_inverse.simulate.reweight import log_mean_errors, mbar


@dataclass(frozen=True, eq=False)
class FreeEnergyProfile:
    """Free energy along a coordinate.

    Attributes:
        edges: of the bins, `(n_bins + 1,)`.
        free_energy: kT, `(n_bins,)`; infinite where no frame is.
        error: standard error of it, kT, `(n_bins,)`; infinite where no frame is.
        status: of `mbar`; `"ok"`, or a sentence that says why not to trust the profile.
    """

    edges: np.ndarray
    free_energy: np.ndarray
    error: np.ndarray
    status: str

    @property
    def centers(self) -> np.ndarray:
        """Centres of the bins, `(n_bins,)`."""
        return (self.edges[1:] + self.edges[:-1]) / 2


def free_energy_profile(
    biased: BiasedSamples, values: Array, edges: Array, period: float | None = None
) -> FreeEnergyProfile:
    """Free energy along a coordinate, by MBAR.

    Unbiased trajectories are one window with biases of zero, and a walker each.

    Args:
        biased: samples of biased windows.
        values: the coordinate at each frame of `biased.frames_flat`, `(n_total,)`.
        edges: of the bins, increasing, `(n_bins + 1,)`. Frames outside count for normalisation.
        period: of the coordinate, 2 pi for an angle in rad: values are wrapped into one period
            from the first edge on.

    Raises:
        ValueError: values of another shape or not finite, edges that do not increase or span more
            than the period.

    >>> import math, torch
    >>> frames = torch.randn(1, 1000, 1, generator=torch.Generator().manual_seed(0))
    >>> unbiased = BiasedSamples(frames, torch.zeros(1, 1000), n_walkers=20)
    >>> profile = free_energy_profile(unbiased, frames.flatten(), [-0.5, 0.5])
    >>> abs(profile.free_energy[0] + math.log(0.3829)) < 3 * profile.error[0]
    np.True_
    """
    x = torch.as_tensor(values, dtype=torch.float64).cpu().numpy()
    n_total = biased.n_windows * biased.n_frames
    if x.shape != (n_total,) or not np.isfinite(x).all():
        raise ValueError(f"values must be {n_total} finite numbers, got shape {x.shape}")
    bins = torch.as_tensor(edges, dtype=torch.float64).cpu().numpy()
    if bins.ndim != 1 or len(bins) < 2 or not (np.diff(bins) > 0).all():
        raise ValueError(f"edges must be at least two increasing numbers, got {edges!r}")
    if period is not None:
        if bins[-1] - bins[0] > period * (1 + 1e-9):
            raise ValueError(f"edges must span one period ({period:g}) at most, got {edges!r}")
        x = bins[0] + np.remainder(x - bins[0], period)
    result = mbar(biased)
    number = np.searchsorted(bins, x, side="right") - 1
    inside = number[:, None] == np.arange(len(bins) - 1)
    probability = (result.weights.cpu().numpy()[:, None] * inside).sum(0)
    hit = probability > 0
    free_energy, error = np.full((2, len(hit)), np.inf)
    free_energy[hit] = -np.log(probability[hit] / np.diff(bins)[hit])
    with np.errstate(divide="ignore"):
        log_a = np.log(inside[:, hit].astype(float))
    error[hit] = log_mean_errors(biased, result.free_energies.numpy(), log_a)
    return FreeEnergyProfile(bins, free_energy, error, result.status)
