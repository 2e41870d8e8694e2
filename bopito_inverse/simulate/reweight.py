r"""Reweighting of biased samples to the unbiased equilibrium by MBAR.

With reduced biases `b_k(x)` and `N_k` frames from window k, the reduced free energies
`f_k = -log E_mu[exp(-b_k)]` solve the equations of Shirts and Chodera (J. Chem. Phys. 129, 124105,
2008), and each frame of the pool has the weight

    w_n ~ 1 / sum_k N_k exp(f_k - b_k(x_n)),    sum_n w_n = 1.

The overlap of two windows is `O_kl = int p_k p_l / (p_k + p_l) dx`, between 0 and 1/2: the element
of the overlap matrix of Klimovich, Shirts and Mobley (J. Comput. Aided Mol. Des. 29, 397, 2015) for
these two windows alone, who advise at least 0.03 between neighbours. Neighbours are joined by the
maximum spanning tree of O, which is the sequence of centres, or of temperatures, in one dimension.

Errors of `log E_mu[a]` come from the influence that each frame has on it, to first order

    I_n = a_n w_n / sum_m a_m w_m - w_n + (E_a[P] - E_mu[P])^T H^+ P_n,
    P_nk = N_k w_n exp(f_k - b_k(x_n)),    H = diag(sum_n P_n) - P^T P,

where H is the response of the MBAR equations to f. With its mean over each window taken off, I is
summed over blocks, stretches of one walker, and the variance is the sum of the squares of these
sums. Frames of one block may be correlated in any way. Where there are ten walkers or more a block
is all of a walker, so that the errors also hold for walkers that rarely cross a barrier, if their
starts are forgotten.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.special import logsumexp
from torch import Tensor

from bopito_inverse.simulate.biased import BiasedSamples

LOWEST_ESS = 50.0
BLOCKS = 10  # in each window, at least; a walker is cut where there are fewer walkers


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
        f_k, w_nk = _solve(u_kn, biased.n_frames)
        overlap = _pair_overlap(w_nk)
        edges = _neighbours(overlap)
        inefficiency = _statistical_inefficiency(u_kn, edges, biased.n_frames, biased.n_walkers)
    log_w, _ = _log_weights(u_kn, f_k, biased.n_frames)
    pair = min(edges, key=lambda edge: overlap[edge], default=(0, 0))
    smallest = float(overlap[pair])
    ess = float(1 / (np.repeat(inefficiency, biased.n_frames) * np.exp(2 * log_w)).sum())
    return Reweighting(
        weights=torch.from_numpy(np.exp(log_w)).to(biased.frames.device),
        free_energies=torch.from_numpy(f_k),
        free_energy_errors=torch.from_numpy(log_mean_errors(biased, f_k, -u_kn.T)),
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


def log_mean_errors(biased: BiasedSamples, f_k: np.ndarray, log_a: np.ndarray) -> np.ndarray:
    """Standard errors of log E_mu[a], given the free energies of the windows.

    Args:
        biased: samples of biased windows; frames of one walker number in different windows are
            taken as independent, but for tempering, whose walkers exchange frames.
        f_k: free energy of each window above the unbiased state, `(n_windows,)`.
        log_a: logarithms of several a at each frame, -inf where a is zero, `(n_total, n_a)`.

    Returns:
        `(n_a,)`, infinite for one block in each window and where windows do not overlap.
    """
    u_kn = biased.reduced_bias.cpu().numpy()
    log_w, p = _log_weights(u_kn, f_k, biased.n_frames)
    log_aw = log_a + log_w[:, None]
    difference = np.exp(log_aw - logsumexp(log_aw, axis=0)) - np.exp(log_w)[:, None]
    response = np.linalg.pinv(np.diag(p.sum(0)) - p.T @ p, hermitian=True)
    influence = difference + p @ (response @ (p.T @ difference))
    influence = influence.reshape(biased.n_windows, biased.n_frames, -1)
    influence -= influence.mean(1, keepdims=True)
    sums = _block_sums(influence, biased.n_walkers)
    if "ladder" in biased.form:
        sums = sums.sum(0, keepdims=True)
    n_blocks = sums.shape[1]
    if n_blocks == 1:
        return np.full(log_a.shape[1], math.inf)
    with np.errstate(over="ignore"):  # windows that do not overlap: infinite
        return np.sqrt((sums**2).sum((0, 1)) * n_blocks / (n_blocks - 1))


def _block_sums(values: np.ndarray, n_walkers: int) -> np.ndarray:
    """Sums (n_windows, n_blocks, n) of values (n_windows, n_frames, n) over blocks of walkers."""
    n_windows, n_frames, n = values.shape
    walkers = values.reshape(n_windows, n_walkers, n_frames // n_walkers, n)
    stretches = min(math.ceil(BLOCKS / n_walkers), n_frames // n_walkers)
    parts = [part.sum(2) for part in np.array_split(walkers, stretches, axis=2)]
    return np.concatenate(parts, axis=1)


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


def _solve(u_kn: np.ndarray, n_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Free energies above the unbiased state, and MBAR's matrix W (n_total, n_windows)."""
    from pymbar import MBAR

    unbiased = np.zeros((1, u_kn.shape[1]))
    solution = MBAR(np.concatenate([u_kn, unbiased]), [n_frames] * len(u_kn) + [0])
    return solution.f_k[:-1] - solution.f_k[-1], solution.W_nk[:, :-1]


def _log_weights(u_kn: np.ndarray, f_k: np.ndarray, n_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the weights, (n_total,), and P, the chance of each window, (n_total, K)."""
    log_p = math.log(n_frames) + f_k[:, None] - u_kn
    log_d = logsumexp(log_p, axis=0)
    return -log_d - logsumexp(-log_d), np.exp(log_p - log_d).T


def _pair_overlap(w_nk: np.ndarray) -> np.ndarray:
    """O_kl = sum_n W_nk W_nl / (W_nk + W_nl), symmetric, 1/2 on the diagonal."""
    rows = []
    for w in w_nk.T:
        total = w[:, None] + w_nk
        rows.append((w[:, None] * w_nk / np.where(total > 0, total, 1)).sum(0))
    return np.array(rows)


def _neighbours(overlap: np.ndarray) -> list[tuple[int, int]]:
    """The edges of the maximum spanning tree; none for one window."""
    cost = 1 - np.log(np.maximum(overlap, np.finfo(float).tiny))  # zero would mean no edge
    tree = minimum_spanning_tree(cost).tocoo()
    return [(int(k), int(j)) for k, j in np.sort(np.stack([tree.row, tree.col], 1))]


def _statistical_inefficiency(
    u_kn: np.ndarray, edges: list[tuple[int, int]], n_frames: int, n_walkers: int
) -> np.ndarray:
    """g_k of the difference between a window's bias and that of a neighbour, the largest."""
    from pymbar.timeseries import statistical_inefficiency_multiple

    inefficiency = np.ones(len(u_kn))
    for k, j in [*edges, *((j, k) for k, j in edges)] or [(0, 0)]:
        own = u_kn[:, k * n_frames : (k + 1) * n_frames]
        series = own[j] - own[k] if j != k else own[k]
        if np.ptp(series) > 0:
            g = statistical_inefficiency_multiple(np.split(series, n_walkers))
            inefficiency[k] = max(inefficiency[k], g)
    return inefficiency


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
