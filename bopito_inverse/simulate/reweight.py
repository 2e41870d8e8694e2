r"""Reweighting of biased samples to the unbiased equilibrium by MBAR.

With reduced biases `b_k(x)` and `N_k` frames from window k, the reduced free energies
`f_k = -log E_mu[exp(-b_k)]` solve the equations of Shirts and Chodera (J. Chem. Phys. 129, 124105,
2008), and each frame of the pool has the weight

    w_n ~ 1 / sum_k N_k exp(f_k - b_k(x_n)),    sum_n w_n = 1.

The free energies come from frames thinned by the statistical inefficiency g_k of each window, so
that their errors hold for correlated frames; the weights are for all frames. The overlap of two
windows is `O_kl = int p_k p_l / (p_k + p_l) dx`, between 0 and 1/2: the element of the overlap
matrix of Klimovich, Shirts and Mobley (J. Comput. Aided Mol. Des. 29, 397, 2015) for these two
windows alone, who advise at least 0.03 between neighbours. Neighbours are joined by the maximum
spanning tree of O, which is the sequence of centres, or of temperatures, in one dimension.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.special import logsumexp
from torch import Tensor

from bopito_inverse.simulate.enhanced import BiasedSamples

LOWEST_ESS = 50.0


@dataclass(frozen=True, eq=False)
class Reweighting:
    """What MBAR says about biased samples.

    Attributes:
        weights: weight of every frame of `frames_flat`, float64, sums to 1, `(n_total,)`.
        free_energies: free energy of each window above the unbiased state, in kT, `(n_windows,)`.
        free_energy_errors: their standard errors, in kT, `(n_windows,)`.
        overlap: overlap of each pair of windows, `(n_windows, n_windows)`.
        smallest_overlap: smallest overlap between neighbouring windows (0.5 for one window).
        statistical_inefficiency: correlated frames per independent one, `(n_windows,)`.
        ess: independent unbiased frames that the weighted frames are worth, 1 / sum_n g_n w_n^2,
            were the free energies exact; their errors add to that of a population.
        status: `"ok"`, or a sentence that says why not to trust the weights and what to do.
    """

    weights: Tensor
    free_energies: Tensor
    free_energy_errors: Tensor
    overlap: Tensor
    smallest_overlap: float
    statistical_inefficiency: Tensor
    ess: float
    status: str


def mbar(biased: BiasedSamples, min_overlap: float = 0.03) -> Reweighting:
    """Weights of all frames in the unbiased state, with free energies, overlap and status.

    Args:
        biased: samples of biased windows.
        min_overlap: smallest overlap between neighbouring windows for which the status is `"ok"`.

    Raises:
        ValueError: `min_overlap` outside [0, 0.5).
    """
    if not 0 <= min_overlap < 0.5:
        raise ValueError(f"min_overlap must be in [0, 0.5), got {min_overlap}")
    u_kn = biased.reduced_bias.cpu().numpy()
    with _quiet():
        inefficiency = _statistical_inefficiency(u_kn, biased.n_frames, biased.n_walkers)
        kept = _independent(inefficiency, biased)
        f_k, errors, w_nk = _solve(u_kn[:, np.concatenate(kept)], [len(part) for part in kept])
    weights = _weights(u_kn, f_k, biased.n_frames)
    overlap = _pair_overlap(w_nk)
    pair, smallest = _weakest_neighbours(overlap)
    ess = float(1 / (np.repeat(inefficiency, biased.n_frames) * weights**2).sum())
    return Reweighting(
        weights=torch.from_numpy(weights).to(biased.frames.device),
        free_energies=torch.from_numpy(f_k),
        free_energy_errors=torch.from_numpy(errors),
        overlap=torch.from_numpy(overlap),
        smallest_overlap=smallest,
        statistical_inefficiency=torch.from_numpy(inefficiency),
        ess=ess,
        status=_status(w_nk, smallest, pair, min_overlap, ess),
    )


def mbar_weights(biased: BiasedSamples, min_overlap: float = 0.03) -> Tensor:
    """Weights of all frames `(n_total,)` in the unbiased state, float64, sum 1; refused if poor.

    Raises:
        ValueError: neighbouring windows overlap too little or the effective sample size is too
            small; the message says where and what to do. `mbar` gives the same as a status.
    """
    result = mbar(biased, min_overlap)
    if result.status != "ok":
        raise ValueError(f"MBAR weights are not reliable: {result.status}")
    return result.weights


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pymbar's notices from the terminal, and its seeding from numpy's global state."""
    logger = logging.getLogger("pymbar")
    level, random_state = logger.level, np.random.get_state()  # noqa: NPY002
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        np.random.set_state(random_state)  # noqa: NPY002


def _statistical_inefficiency(u_kn: np.ndarray, n_frames: int, n_walkers: int) -> np.ndarray:
    """g_k of the energy difference to the next and the previous window, whichever is larger."""
    from pymbar.timeseries import statistical_inefficiency_multiple

    n_windows = len(u_kn)
    inefficiency = np.ones(n_windows)
    for k in range(n_windows):
        own = u_kn[:, k * n_frames : (k + 1) * n_frames]
        others = [j for j in (k - 1, k + 1) if 0 <= j < n_windows]
        for series in [own[j] - own[k] for j in others] or [own[k]]:
            if np.ptp(series) > 0:
                g = statistical_inefficiency_multiple(np.split(series, n_walkers))
                inefficiency[k] = max(inefficiency[k], g)
    return inefficiency


def _independent(inefficiency: np.ndarray, biased: BiasedSamples) -> list[np.ndarray]:
    """Columns of about every g_k-th frame of each walker, one array for each window."""
    per_walker = biased.n_frames // biased.n_walkers
    shape = (biased.n_windows, biased.n_walkers, 1)
    starts = np.arange(biased.n_windows * biased.n_walkers).reshape(shape) * per_walker
    return [
        (start + np.arange(0, per_walker, g).astype(int)).ravel()
        for start, g in zip(starts, inefficiency, strict=True)
    ]


def _solve(u_kn: np.ndarray, n_k: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Free energies above the unbiased state, their errors, and MBAR's matrix W (n, n_windows)."""
    from pymbar import MBAR

    unbiased = np.zeros((1, u_kn.shape[1]))
    solution = MBAR(np.concatenate([u_kn, unbiased]), [*n_k, 0])
    result = solution.compute_free_energy_differences()
    return result["Delta_f"][-1, :-1], result["dDelta_f"][-1, :-1], solution.W_nk[:, :-1]


def _weights(u_kn: np.ndarray, f_k: np.ndarray, n_frames: int) -> np.ndarray:
    log_w = -logsumexp(f_k[:, None] - u_kn, axis=0, b=n_frames)
    return np.exp(log_w - logsumexp(log_w))


def _pair_overlap(w_nk: np.ndarray) -> np.ndarray:
    """O_kl = sum_n W_nk W_nl / (W_nk + W_nl), symmetric, 1/2 on the diagonal."""
    rows = []
    for w in w_nk.T:
        total = w[:, None] + w_nk
        rows.append((w[:, None] * w_nk / np.where(total > 0, total, 1)).sum(0))
    return np.array(rows)


def _weakest_neighbours(overlap: np.ndarray) -> tuple[tuple[int, int], float]:
    """The edge of the maximum spanning tree with the smallest overlap, and that overlap."""
    if len(overlap) == 1:
        return (0, 0), 0.5
    cost = 1 - np.log(np.maximum(overlap, np.finfo(float).tiny))  # zero would mean no edge
    tree = minimum_spanning_tree(cost).tocoo()
    edges = [(int(k), int(j)) for k, j in np.sort(np.stack([tree.row, tree.col], 1))]
    pair = min(edges, key=lambda edge: overlap[edge])
    return pair, float(overlap[pair])


def _status(
    w_nk: np.ndarray, smallest: float, pair: tuple[int, int], min_overlap: float, ess: float
) -> str:
    if smallest < min_overlap:
        return (
            f"the overlap of neighbouring windows {pair[0]} and {pair[1]} is {smallest:.2g}, below "
            f"{min_overlap:g}; add windows between them or lower their stiffness"
        )
    if not np.abs(w_nk.sum(0) - 1).max() < 1e-3:
        return "the MBAR equations were not solved; sample more frames in each window"
    if ess < LOWEST_ESS:
        return (
            f"the weighted frames are worth only {ess:.0f} independent ones, below "
            f"{LOWEST_ESS:g}; sample more frames, or place windows where the equilibrium density is"
        )
    return "ok"
