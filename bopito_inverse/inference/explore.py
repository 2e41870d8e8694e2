r"""Exploration of a posterior over levels of its priors, where the prior is uniform in a box.

In one or two dimensions a grid is narrowed until it holds what matters and no more: exact
quadrature. Beyond, affine-invariant ensembles (emcee; Goodman and Weare, 2010) sample it, several
independent ones, each of which is a chain.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CHAINS, DRAWS = 4, 1000
GRID = {1: 1501, 2: 101}  # midpoints for each dimension
DROP = 15.0  # log density below the peak that is left out
ROUNDS = 40
WALKERS, BURN_IN, STEPS = 8, 400, 1200  # walkers for each dimension

LogDensity = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Explored:
    """A posterior as weighted points and as draws.

    Attributes:
        levels: points, (P, D).
        log_density: log likelihood there, (P,).
        weights: posterior weights, (P,), sum to one.
        draws: (CHAINS, DRAWS, D).
    """

    levels: np.ndarray
    log_density: np.ndarray
    weights: np.ndarray
    draws: np.ndarray

    def above(self, weight: float) -> "Explored":
        """The points of more than a weight."""
        good = self.weights > weight
        return Explored(self.levels[good], self.log_density[good], self.weights[good], self.draws)

    def variance(self, values: np.ndarray, log_ratio: np.ndarray | float = 0.0) -> np.ndarray:
        """Of values (P, ...), under the posterior times exp(log_ratio)."""
        log = np.log(self.weights) + log_ratio
        w = np.exp(log - log.max())
        w /= w.sum()
        mean = np.tensordot(w, values, 1)
        return np.tensordot(w, (values - mean) ** 2, 1)


def explore(
    log_density: LogDensity, low: np.ndarray, high: np.ndarray, rng: np.random.Generator
) -> Explored:
    """The posterior in the box from `low` to `high` (D,), for a density of points (P, D)."""
    if len(low) <= max(GRID):
        return _quadrature(log_density, low, high, rng)
    return _ensembles(log_density, low, high, rng)


def _quadrature(
    log_density: LogDensity, low: np.ndarray, high: np.ndarray, rng: np.random.Generator
) -> Explored:
    n = len(low)
    for _ in range(ROUNDS):
        axes = [
            a + (b - a) * (np.arange(GRID[n]) + 0.5) / GRID[n]
            for a, b in zip(low, high, strict=True)
        ]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, n)
        value = log_density(points)
        inside = points[value > np.nanmax(value) - DROP]
        cell = (high - low) / GRID[n]
        narrow_low = np.maximum(low, inside.min(0) - cell)
        narrow_high = np.minimum(high, inside.max(0) + cell)
        if (narrow_high - narrow_low > 0.5 * (high - low)).all():
            break
        low, high = narrow_low, narrow_high
    weights = np.exp(value - np.nanmax(value))
    weights = np.where(np.isfinite(weights), weights, 0.0)
    weights /= weights.sum()
    size = CHAINS * DRAWS
    chosen = np.searchsorted(np.cumsum(weights), (np.arange(size) + rng.random(size)) / size)
    drawn = points[np.minimum(chosen, len(points) - 1)] + cell * (rng.random((size, n)) - 0.5)
    draws = rng.permutation(drawn).reshape(CHAINS, DRAWS, n)
    return Explored(points, value, weights, np.clip(draws, low, high))


def _ensembles(
    log_density: LogDensity, low: np.ndarray, high: np.ndarray, rng: np.random.Generator
) -> Explored:
    import emcee

    n, walkers = len(low), WALKERS * len(low)

    def inside(points: np.ndarray) -> np.ndarray:
        good = ((points > low) & (points < high)).all(1)
        value = np.full(len(points), -np.inf)
        if good.any():
            value[good] = log_density(points[good])
        return value

    chains, values = [], []
    for _ in range(CHAINS):
        sampler = emcee.EnsembleSampler(walkers, n, inside, vectorize=True)
        sampler.random_state = np.random.RandomState(int(rng.integers(2**31))).get_state()
        start = _starts(inside, low, high, walkers, rng)
        sampler.run_mcmc(start, BURN_IN + STEPS)
        # from each walker in turn, so that none is left out
        keep = (np.linspace(0, STEPS - 1, DRAWS).astype(int), np.arange(DRAWS) % walkers)
        chains.append(sampler.get_chain(discard=BURN_IN)[keep])
        values.append(sampler.get_log_prob(discard=BURN_IN)[keep])
    draws = np.stack(chains)
    levels = draws.reshape(-1, n)
    return Explored(levels, np.concatenate(values), np.full(len(levels), 1 / len(levels)), draws)


def _starts(
    log_density: LogDensity,
    low: np.ndarray,
    high: np.ndarray,
    walkers: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """The best of many random points, drawn again around the best until they are near a peak."""
    points = low + (high - low) * rng.random((100 * walkers, len(low)))
    for _ in range(8):
        value = log_density(points)
        best = points[np.argsort(value)[::-1][: 2 * walkers]]
        centre, spread = best.mean(0), best.std(0) + 1e-9 * (high - low)
        trial = centre + 1.5 * spread * rng.standard_normal((20 * walkers, len(low)))
        points = np.concatenate([best, np.clip(trial, low + 1e-12, high - 1e-12)])
    value = log_density(points)
    return points[np.argsort(value)[::-1][: 4 * walkers]][rng.permutation(4 * walkers)[:walkers]]
