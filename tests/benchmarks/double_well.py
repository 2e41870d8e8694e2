"""The two double wells of the dynAMMo tutorial: what is known about them exactly.

An "experiment" (a = 5, b = 1, kT = 2) and a "simulation" (a = 7, b = 1, kT = 4) of a particle in
V = a (x^2 - 1)^2 + b x, mass times friction 1000, time step 1. A frame is one step, so that all
lags and timescales count steps.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import bopito_inverse as bi
from bopito_inverse.systems import DoubleWell, Potential1D, TransferOperator

SEED, STEPS, STRIDE, LONGEST = 0, 50_000, 10, 690
HONEST_LAGS = np.array([30, 60, 90, 150, 300, 690])
REPLICATES, TESTED = 2000, 200  # experiments for the covariance, and for coverage
BINS, WALKS = 100, 200_000


def well(a: float, kT: float, steps_per_frame: int = 1) -> Potential1D:
    """A double well, on the range of the experiment's."""
    return Potential1D(
        DoubleWell(a, 1.0).energy,
        DoubleWell(5.0, 1.0, 2.0).bounds,
        kT=kT,
        friction=1000.0,
        time_step=1.0,
        steps_per_frame=steps_per_frame,
    )


EXPERIMENT, SIMULATION = well(5.0, 2.0), well(7.0, 4.0)


class Table:
    """A function of frames, linear between equidistant points."""

    def __init__(self, grid: np.ndarray, values: np.ndarray) -> None:
        self.low, self.spacing = float(grid[0]), float(grid[1] - grid[0])
        self.values = torch.from_numpy(np.ascontiguousarray(values))

    def __call__(self, x: Tensor) -> Tensor:
        last = len(self.values) - 1
        position = ((x[..., 0].double() - self.low) / self.spacing).clamp(0, last)
        cell = position.long().clamp(max=last - 1)
        return torch.lerp(self.values[cell], self.values[cell + 1], position - cell)


def eigenfunction() -> Table:
    """Psi_2 of the experiment, of unit variance in mu."""
    exact = TransferOperator(EXPERIMENT)
    return Table(exact.grid, exact.eigenfunctions[:, 1])


def binned(operator: TransferOperator) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the bins and exact probabilities in them."""
    half = operator.spacing / 2
    ends = np.append(operator.grid - half, operator.grid[-1] + half)
    levels = np.append(0, np.cumsum(operator.stationary) * operator.spacing)
    edges = np.linspace(*EXPERIMENT.bounds, BINS + 1)
    return edges, np.diff(np.interp(edges, ends, levels))


def total_variation(x: Tensor, weights: Tensor | None = None) -> float:
    """Of frames from mu of the experiment."""
    edges, exact = binned(TransferOperator(EXPERIMENT))
    w = None if weights is None else weights.numpy()
    counts = np.histogram(x.numpy().ravel(), edges, weights=w)[0]
    return float(np.abs(counts / (len(x) if w is None else w.sum()) - exact).sum() / 2)


def truths() -> dict:
    """Exact timescales, those of the integrator's own chain, and distances of densities."""
    found = {}
    for name, system in (("experiment", EXPERIMENT), ("simulation", SIMULATION)):
        exact = TransferOperator(system)
        found[name] = {
            "timescales": exact.timescales[:3].round(1).tolist(),
            "euler_maruyama": round(euler_maruyama(system), 1),
        }
    densities = [binned(TransferOperator(system))[1] for system in (EXPERIMENT, SIMULATION)]
    drawn = TransferOperator(EXPERIMENT).sample(WALKS, torch.Generator().manual_seed(SEED))
    return found | {
        "total_variation_of_the_simulation": float(np.abs(np.subtract(*densities)).sum() / 2),
        "total_variation_of_as_many_independent_frames": total_variation(drawn),
    }


def euler_maruyama(system: Potential1D) -> float:
    """Slowest timescale of the discrete chain x -> x + h F / gamma + noise."""
    x = np.linspace(*system.bounds, 1001)
    drift = system.force(torch.from_numpy(x)).numpy() * system.time_step / system.friction
    spread = np.sqrt(2 * system.diffusion * system.time_step)
    chain = np.exp(-(((x - (x + drift)[:, None]) / spread) ** 2) / 2)
    second = np.sort(np.linalg.eigvals(chain / chain.sum(1, keepdims=True)).real)[-2]
    return float(-system.time_step / np.log(second))


def sampling_theory() -> dict:
    """Bias and spread of correlations from one trajectory; covariance and data of (B)."""
    exact = TransferOperator(EXPERIMENT)
    n = REPLICATES + TESTED
    starts = exact.sample(n, torch.Generator().manual_seed(SEED + 1))
    made = bi.simulate.langevin(well(5.0, 2.0, STRIDE), starts, STEPS // STRIDE + 1, SEED + 2)
    psi = eigenfunction()(made.frames).reshape(n, -1).numpy()
    truth = np.exp(-HONEST_LAGS / exact.timescales[0])
    found: dict = {"lags": HONEST_LAGS.tolist(), "truth": truth.round(4).tolist()}
    for name, estimate in ESTIMATES.items():
        values = np.stack([estimate(psi, lag // STRIDE) for lag in HONEST_LAGS], axis=1)
        found[name] = {
            "bias": (values.mean(0) - truth).round(4).tolist(),
            "bias_over_spread": ((values.mean(0) - truth) / values.std(0)).round(3).tolist(),
            "spread": values.std(0).round(4).tolist(),
        }
        if name == UNBIASED:
            kept, tested = values[:REPLICATES], values[REPLICATES:]
            found |= {"covariance": np.cov(kept.T).tolist(), "experiments": tested.tolist()}
    return found


def differences(psi: np.ndarray, k: int) -> np.ndarray:
    return 1 - ((psi[:, k:] - psi[:, :-k]) ** 2).mean(1) / 2


def products(psi: np.ndarray, k: int) -> np.ndarray:
    return (psi[:, k:] * psi[:, :-k]).mean(1)


def quotient(psi: np.ndarray, k: int, centred: bool = False) -> np.ndarray:
    centre = psi - psi.mean(1, keepdims=True) if centred else psi
    return products(centre, k) / (centre**2).mean(1)


UNBIASED = "1 - E[(psi_k - psi_0)^2] / 2"
ESTIMATES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    UNBIASED: differences,
    "E[psi_0 psi_k]": products,
    "E[psi_0 psi_k] / E[psi^2]": quotient,
    "mean subtracted, over the variance": partial(quotient, centred=True),
}
