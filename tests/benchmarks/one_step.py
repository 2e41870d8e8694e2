"""One step of a conditional score against the exact transition density, with no Monte Carlo.

Starting frames x_0 are quantiles of mu and the noise is quantiles of N(0, 1), both randomly
shifted: a rank grid over the two numbers that one step depends on in one dimension.
"""

import numpy as np
import torch

from bopito_inverse.models import BoPITOScore, ITOScore
from bopito_inverse.sampling import DPMSolver
from bopito_inverse.systems import TransferOperator

CHUNK = 4096
OBSERVABLES = {"x": lambda x: x, "x>0": lambda x: x > 0}


def frames_after(
    score: BoPITOScore | ITOScore, x_0: np.ndarray, lag: float, levels: np.ndarray
) -> np.ndarray:
    """Frames at `lag` from each x_0 (n,), for noise at these levels of N(0, 1), (n, levels)."""
    z = torch.special.ndtri(torch.from_numpy(levels)).float()[:, None]
    start = torch.from_numpy(x_0).float().repeat_interleave(len(z))[:, None]
    rows = CHUNK // len(z)
    made = []
    with torch.no_grad():
        for part in start.split(rows * len(z)):
            bound = score.bind(score.scaling.standardise(part), torch.tensor(float(lag)))
            noise = z.repeat(len(part) // len(z), 1)
            made.append(DPMSolver(20)(bound, score.noise, noise, torch.randn_like))
    return score.scaling.restore(torch.cat(made)).double().numpy().reshape(len(x_0), len(z))


def against_exact(
    score: BoPITOScore | ITOScore,
    exact: TransferOperator,
    lag: float,
    rng: np.random.Generator,
    n: int = 128,
) -> dict[str, float]:
    """Signed errors of C(lag) of x and x > 0 (normalised by the exact variance), and W1.

    W1 is the Wasserstein distance between the two conditional densities, averaged over x_0 in mu.
    """
    shift, levels = rng.random(2), np.arange(n) / n
    grid, mu = exact.grid, exact.stationary * exact.spacing
    edges = np.append(grid - exact.spacing / 2, grid[-1] + exact.spacing / 2)
    x_0 = np.interp(levels + shift[0] / n, np.append(0, np.cumsum(mu)), edges)
    later = frames_after(score, x_0, lag, levels + shift[1] / n)
    found = {}
    for name, observable in OBSERVABLES.items():
        a = observable(grid).astype(float)
        mean = mu @ a
        variance = mu @ (a - mean) ** 2
        product = (observable(x_0) - mean) * (observable(later).mean(1) - mean)
        truth = exact.correlation(a, lags=lag, normalization="variance")
        found[name] = float(product.mean() / variance - truth)
    rows = exact.transition_density(lag)[np.searchsorted(edges, x_0) - 1] * exact.spacing
    quantiles = np.stack([np.interp(levels + shift[1] / n, np.cumsum(row), grid) for row in rows])
    found["w1"] = float(np.abs(np.sort(later, axis=1) - quantiles).mean())
    return found
