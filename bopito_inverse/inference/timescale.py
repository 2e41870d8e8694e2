r"""The slowest relaxation of a composite step, from its own rollouts.

With hat functions phi of the observables as a basis, the matrices

    C_0 = E[phi(x_k) phi(x_k)^T],    C_1 = E[phi(x_k) phi(x_{k+1})^T]

over all steps of all replicas give the Koopman matrix C_0^{-1} C_1 of the step (extended dynamic
mode decomposition, Williams et al., J. Nonlinear Sci. 25, 1307, 2015). Its eigenvalue closest to
one, after that of the constant function, is lambda_2, and -step_lag / log(lambda_2) is the implied
timescale. To first order, with left and right eigenvectors u and v, replica r adds

    u^T (phi_k phi_{k+1}^T - lambda_2 phi_k phi_k^T) v / (u^T C_0 v)

to the error of lambda_2. Where lambda_2 drowns in noise, u and v are those of the noise and nearly
orthogonal, and this would blow up; the divisor is kept above half of what it is for u = v, the case
of reversible dynamics.
"""

import torch
from torch import Tensor

N_KNOTS = 16
OVERLAP = 0.5  # smallest overlap of left and right eigenfunctions that is believed


def second_eigenvalue(series: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """lambda_2 of one step, and the influence of each independent replica on it.

    Args:
        series: observables along rollouts, (n_observables, n_steps + 1, R).
        groups: replicas r, r + R / groups, ... are averaged, as in `Correlation.contributions`.

    Returns:
        Value () and influence (R / groups,), float64.
    """
    phi = torch.cat([_hats(s) for s in series.double()], dim=-1)  # (n_steps + 1, R, m)
    now, later = phi[:-1].flatten(0, 1), phi[1:].flatten(0, 1)
    c_0, c_1 = now.T @ now / len(now), now.T @ later / len(now)
    root = _inverse_root(c_0)
    koopman = root.T @ c_1 @ root
    values, right = torch.linalg.eig(koopman)
    left_values, left = torch.linalg.eig(koopman.T)
    if len(values) < 2:
        raise ValueError("obs must vary between the predicted frames, got a constant")
    second = values.real.argsort(descending=True)[1]
    value = values[second].real
    match = (left_values - values[second]).abs().argmin()
    v, u = root @ right[:, second].real, root @ left[:, match].real
    f, g = now @ u, now @ v
    overlap = (f * g).mean()
    smallest = OVERLAP * (f.square().mean() * g.square().mean()).sqrt()
    scale = torch.where(overlap < 0, -1.0, 1.0) * overlap.abs().maximum(smallest)
    influence = f * (later @ v - value * g) / scale
    influence = influence.unflatten(0, (len(phi) - 1, groups, -1)).mean((0, 1))
    return value, influence - influence.mean()


def timescale(eigenvalue: Tensor, step_lag: float | Tensor) -> Tensor:
    """-step_lag / log(lambda_2) in frames: 0 at or below zero, inf at or above one."""
    inside = eigenvalue.clamp(1e-12, 1 - 1e-12)
    value = -step_lag / inside.log()
    return torch.where(eigenvalue >= 1, torch.inf, torch.where(eigenvalue <= 0, 0.0, value))


def _hats(series: Tensor) -> Tensor:
    """Hat functions with knots at the quantiles of `series` (T, R), (T, R, m); they sum to one."""
    levels = torch.linspace(0, 1, N_KNOTS, dtype=series.dtype, device=series.device)
    pool = series.flatten()
    pool = pool[:: max(1, len(pool) // 100_000)]
    knots = torch.quantile(pool, levels).unique()
    if len(knots) < 2:
        return torch.ones(*series.shape, 1, dtype=series.dtype, device=series.device)
    cell = (torch.searchsorted(knots, series.contiguous()) - 1).clamp(0, len(knots) - 2)
    fraction = ((series - knots[cell]) / (knots[cell + 1] - knots[cell])).clamp(0, 1)
    phi = torch.zeros(*series.shape, len(knots), dtype=series.dtype, device=series.device)
    phi.scatter_(-1, cell[..., None], (1 - fraction)[..., None])
    return phi.scatter_(-1, cell[..., None] + 1, fraction[..., None])


def _inverse_root(c: Tensor) -> Tensor:
    """R with R^T C R = 1 on the space where C is not numerically singular, (m, rank)."""
    values, vectors = torch.linalg.eigh(c)
    keep = values > 1e-10 * values[-1]
    return vectors[:, keep] / values[keep].sqrt()
