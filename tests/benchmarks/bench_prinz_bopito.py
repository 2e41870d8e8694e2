"""BoPITO trained on unbiased Prinz data: accuracy of one step, and speed.

    python tests/benchmarks/bench_prinz_bopito.py [--steps 10000]      (about ten minutes)

5,000 trajectories of 2,000 frames from equilibrium, lag_max 1000, as in the peer's workload. The
one-step correlation is an integral over two numbers, x_0 and the noise, made by a 256 x 256
randomly shifted rank grid; its error is the spread over 4 shifts. Writes
data/results/prinz_bopito.json.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

import bopito_inverse as bi
from bopito_inverse.models import BoPITOScore, TrainingConfig
from bopito_inverse.sampling import DPMSolver
from bopito_inverse.systems import Prinz, TransferOperator

LAGS = np.array([10, 25, 50, 75, 100, 200, 300, 500, 750, 1000])
OUT = Path(__file__).resolve().parents[2] / "data" / "results" / "prinz_bopito.json"
SEED = 0
N, SHIFTS = 256, 4


def normal_quantiles(u: torch.Tensor) -> torch.Tensor:
    return (2**0.5 * torch.erfinv(2 * u - 1)).float()[:, None]


def one_step(score: BoPITOScore, x_0: torch.Tensor, z: torch.Tensor, lag: float) -> torch.Tensor:
    y = score.scaling.standardise(x_0)
    bound = score.bind(y, torch.tensor(float(lag)))
    return score.scaling.restore(DPMSolver(20)(bound, score.noise, z, torch.randn_like))


def correlation(
    score: BoPITOScore, exact: TransferOperator, lag: float, shift: np.ndarray
) -> float:
    """C(lag) of x by one step from mu, normalised by the exact variance."""
    ranks = np.arange(N) / N
    mu = np.concatenate([[0], np.cumsum(exact.stationary) * exact.spacing])
    edges = np.append(exact.grid - exact.spacing / 2, exact.grid[-1] + exact.spacing / 2)
    x_0 = torch.tensor(np.interp(ranks + shift[0] / N, mu, edges), dtype=torch.float32)[:, None]
    z = normal_quantiles(torch.tensor(ranks + shift[1] / N))
    made = [
        one_step(score, a, b, lag)
        for a, b in zip(
            x_0.repeat_interleave(N, 0).split(4096), z.repeat(N, 1).split(4096), strict=True
        )
    ]
    mean = torch.cat(made).double().reshape(N, N).mean(1)
    weights = exact.stationary * exact.spacing
    centre = weights @ exact.grid
    variance = weights @ (exact.grid - centre) ** 2
    return float(((x_0[:, 0].double() - centre) * (mean - centre)).mean() / variance)


def throughput(score: BoPITOScore, n: int = 4096, repeats: int = 20) -> float:
    x_0, z = torch.zeros(n, 1), torch.randn(n, 1)
    one_step(score, x_0, z, 100.0)
    start = time.perf_counter()
    for _ in range(repeats):
        one_step(score, x_0, z, 100.0)
    return n * repeats / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    exact = TransferOperator(Prinz())
    generator = torch.Generator().manual_seed(SEED)
    clock = time.perf_counter()
    trajectories = bi.simulate.langevin(Prinz(), exact.sample(5000, generator), 2000, seed=SEED)
    simulated, clock = time.perf_counter() - clock, time.perf_counter()
    s_eq = bi.models.train_equilibrium(trajectories.frames, config=TrainingConfig(steps=3000))
    score = bi.models.train_bopito(
        trajectories, s_eq, 1000, 0.994, config=TrainingConfig(steps=steps), seed=SEED
    )
    trained = time.perf_counter() - clock
    truth = exact.correlation(lambda x: x, lags=LAGS, normalization="variance")
    x = bi.observables.Correlation(lambda x: x, normalization="variance")
    data = x.from_trajectories(trajectories, LAGS)[0].numpy() - truth
    rng = np.random.default_rng(SEED)
    with torch.no_grad():
        made = np.array(
            [[correlation(score, exact, lag, rng.random(2)) for lag in LAGS] for _ in range(SHIFTS)]
        )
        rate = throughput(score)
    error = made.mean(0) - truth
    spread = made.std(0, ddof=1) / SHIFTS**0.5
    print("  lag    exact    error  +- quadrature   data's own error")
    for row in zip(LAGS, truth, error, spread, data, strict=True):
        print("{:5d}  {:7.4f}  {:7.4f}  +- {:.4f}      {:7.4f}".format(*row))
    result = {
        "mean_abs_error": float(np.abs(error).mean()),
        "worst_abs_error": float(np.abs(error).max()),
        "quadrature_error": float(spread.max()),
        "data_mean_abs_error": float(np.abs(data).mean()),
        "data_worst_abs_error": float(np.abs(data).max()),
        "samples_per_second": rate,
        "simulation_s": simulated,
        "training_s": trained,
        "lags": LAGS.tolist(),
        "error": error.tolist(),
        "seed": SEED,
        "steps": [3000, steps],
        "version": bi.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("mean_abs_error", "worst_abs_error", "samples_per_second", "training_s"):
        print(f"{name:20} {result[name]:.4g}")


if __name__ == "__main__":
    main()
