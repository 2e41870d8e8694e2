"""The demo with exact scores: what the method reaches, apart from the error of the networks.

    python tests/benchmarks/bench_demo_exact.py          (some minutes on 2 cores)

The same experiment, composite step and sampling as data/prinz/demo.toml, with the exact scores of
the Prinz potential (mu) and of the same with a barrier at x = 0 (the biased dynamics).
Writes data/results/demo_exact.json.
"""

import json
from pathlib import Path

import numpy as np
import torch

import bopito_inverse as bi
from bopito_inverse.sampling import Interpolate, Propagate, Rollout
from bopito_inverse.systems import Prinz, TransferOperator

DATA = Path(__file__).resolve().parents[2] / "data"
SEED, GRID = 0, 400


def total_variation(x: np.ndarray, exact: TransferOperator, bins: int = 100) -> float:
    counts, edges = np.histogram(x, bins, range=exact.system.bounds)
    mu = np.concatenate([[0], np.cumsum(exact.stationary) * exact.spacing])
    ends = np.append(exact.grid - exact.spacing / 2, exact.grid[-1] + exact.spacing / 2)
    return float(0.5 * np.abs(counts / len(x) - np.diff(np.interp(edges, ends, mu))).sum())


def main() -> None:
    exact = TransferOperator(Prinz(), grid_size=GRID)
    s_eq = exact.equilibrium_score()
    s_dyn = TransferOperator(Prinz(), barrier=0.0, grid_size=GRID).dynamic_score(s_eq, 0.99)
    model = bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, 0.99, 50))
    step = Rollout([Interpolate(), Propagate(50)], step_lag=100)
    x = bi.observables.Correlation(lambda x: x, normalization="variance")
    exp = bi.observables.Experiment.read(DATA / "prinz" / "experiment.csv")
    starts = exact.sample(50_000, torch.Generator().manual_seed(SEED))
    result = bi.inference.fit(model, step, x, exp, starts, seed=SEED, n_replicas=8192)
    print(result)
    trajectories = bi.sampling.sample(
        model, step, n_int=result.n_int.mean, starts=starts[:5000], n_steps=14, seed=SEED
    )
    assert trajectories is not None
    frames = trajectories.frames.reshape(5000, 15)[:, 5:].ravel().numpy()
    floor = exact.sample(len(frames), torch.Generator().manual_seed(1)).ravel().numpy()
    variation = {"total_variation": total_variation(frames, exact)}
    variation["noise_floor"] = total_variation(floor, exact)
    summary = result.summary() | variation
    print(
        "total variation {total_variation:.3f}, noise floor {noise_floor:.3f}".format(**variation)
    )
    out = DATA / "results" / "demo_exact.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
