"""A harmonic well with exact scores, and a composite step that is exact: its n_int is known.

With the step `Exact`, correlations of x after k steps are decay^(n_int k), those of x^2 decay at
twice the rate, and its implied timescale is step_lag / n_int times that of the well.
"""

import numpy as np
import torch
from torch import Tensor

import bopito_inverse as bi
from bopito_inverse.sampling import DPMSolver, Propagate, Renoise, Rollout

SYSTEM = bi.systems.OrnsteinUhlenbeck()  # timescale 20 frames
EXACT = bi.systems.TransferOperator(SYSTEM, grid_size=100)
LAG_MAX, STEP_LAG = 15, 20
LAGS = STEP_LAG * np.arange(1, 6)
STARTS = EXACT.sample(20_000, torch.Generator().manual_seed(7))


def _model() -> bi.Interpolator:
    s_eq = EXACT.equilibrium_score()
    s_dyn = EXACT.dynamic_score(s_eq, SYSTEM.decay)
    return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, SYSTEM.decay, LAG_MAX))


MODEL = _model()


class Exact:
    """The process itself over n_int frames, times `factor`."""

    needs_n_int, share = True, 1.0

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def config(self) -> dict:
        return {"move": "exact", "factor": self.factor}

    def __call__(self, model, y: Tensor, n_int: Tensor, solver, normal) -> Tensor:
        decay = (SYSTEM.decay ** (self.factor * n_int.to(y))).expand(len(y))[:, None]
        return decay * y + (1 - decay**2).sqrt() * normal(y)


RENOISING = (Propagate(share=0.5), Renoise(), Propagate(share=0.5))  # exact in a harmonic well


def x(frames: Tensor) -> Tensor:
    return frames[:, 0]


def x_squared(frames: Tensor) -> Tensor:
    return frames[:, 0] ** 2


X = bi.observables.Correlation(x, normalization="variance")
BOTH = {"x": X, "x2": bi.observables.Correlation(x_squared, normalization="variance")}


def experiment(
    n: float = 20.0,
    sigma: float = 0.02,
    seed: int | None = None,
    lags: np.ndarray = LAGS,
    name: str = "x",
    scale: float = 1.0,
    covariance: np.ndarray | None = None,
) -> bi.observables.Experiment:
    """Of a well in which n frames of the model pass in a step; exact without a seed."""
    rate = (2 if name == "x2" else 1) * n / 20.0
    values = scale * np.exp(-np.asarray(lags) / STEP_LAG * rate)
    if seed is not None:
        noise = np.diag(np.full(len(lags), sigma**2)) if covariance is None else covariance
        values = np.random.default_rng(seed).multivariate_normal(values, noise)
    return bi.observables.Experiment(lags, values, np.full(len(lags), sigma), covariance, name)


def fit(exp, obs=X, moves=None, n_replicas: int | None = 1024, seed: int = 0, **options):
    options.setdefault("discrepancy", False)
    step = Rollout(moves or [Exact()], STEP_LAG, DPMSolver(12))
    return bi.inference.fit(
        MODEL, step, obs, exp, STARTS, n_replicas=n_replicas, seed=seed, **options
    )


def z_score(estimate, truth: float) -> float:
    return (estimate.mean - truth) / estimate.sd
