r"""The slowest relaxation of a composite step, from its own rollouts.

As in `bopito_inverse.observables.relaxation`, whose equations this uses: the pairs of frames are
all steps of all replicas, and replicas are what is independent. There are at most `N_KNOTS` hat
functions of an observable; fewer where there are few pairs, of which each function needs some.
"""

import torch
from torch import Tensor

from bopito_inverse.observables.relaxation import hats, quantile_knots, slow_mode

N_KNOTS, FEWEST_KNOTS = 16, 4
PAIRS_PER_FUNCTION = 40


def second_eigenvalue(
    series: Tensor, groups: int = 1, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """lambda_2 of one step, and the influence of each independent replica on it.

    Args:
        series: observables along rollouts, (n_observables, n_steps + 1, R).
        groups: replicas r, r + R / groups, ... are averaged, as in `Correlation.contributions`.
        weights: importance weights of the replicas, (R,), of mean one; equal ones by default.

    Returns:
        Value () and influence (R / groups,), float64.

    Raises:
        ValueError: all observables are constant.
    """
    series = series.double()
    if bool((series == series[:, :1, :1]).all()):
        raise ValueError("obs must vary between the predicted frames, got a constant")
    n_pairs = (series.shape[1] - 1) * series.shape[2]
    n = min(N_KNOTS, max(FEWEST_KNOTS, n_pairs // (PAIRS_PER_FUNCTION * len(series))))
    phi = torch.cat([hats(s, quantile_knots(s, n)) for s in series], dim=-1)
    now, later = phi[:-1].flatten(0, 1), phi[1:].flatten(0, 1)
    w = now.new_ones(1) if weights is None else weights.double().repeat(len(phi) - 1)
    weighted = w[:, None] * now
    mode = slow_mode(weighted.T @ now / len(now), weighted.T @ later / len(now))
    influence = w * mode.influence(now, later)
    influence = influence.unflatten(0, (len(phi) - 1, groups, -1)).mean((0, 1))
    return mode.eigenvalue, influence - influence.mean()
