"""What a posterior costs, and how near it comes to the bound that the experiment sets.

    python tests/benchmarks/bench_efficiency.py          (about 5 minutes on 2 cores)

1. The demo at the default budget: posterior sd of u over the Cramer-Rao bound of the experiment
   alone, 1 / sqrt(g'^T Sigma^-1 g') with noise-free predictions, and the cost of the whole fit in
   single predictions of as many replicas.
2. Against a root find (scipy's bounded Brent) of the best n_int, repeated for 200 parametric
   resamples of the data, each re-simulating at every n_int that it tries: network evaluations at
   the same number of replicas, and the error bars of both. On a harmonic well, so that it ends.

Writes data/results/efficiency.json.
"""

import json

import numpy as np
import store
import torch
from scipy.optimize import minimize_scalar

import bopito_inverse as bi
from bopito_inverse.sampling import DPMSolver, renoising_step
from bopito_inverse.systems import OrnsteinUhlenbeck, TransferOperator

SEED, RESAMPLES = 0, 200


def demo() -> dict:
    """The default budget against the Cramer-Rao bound."""
    prinz = store.DATA / "prinz"
    model = bi.Interpolator(bi.models.load(prinz / "bopito.safetensors"))
    frames = bi.datasets.Frames.read(prinz / "equilibrium.npz")
    exp = bi.observables.Experiment.read(prinz / "experiment.csv")
    obs = bi.observables.Correlation(lambda x: x, normalization="variance")
    step = renoising_step(model.lag_max, 100)
    rows = {}
    for label, discrepancy in (("without discrepancy", False), ("default", "auto")):
        result = bi.inference.fit(model, step, obs, exp, frames, seed=SEED, discrepancy=discrepancy)
        emulator = result._problem.emulator
        u, h = emulator.coordinate.from_n_int(np.array(result.map)), 0.01
        columns = result._problem.likelihood.points.columns
        ends = np.repeat([[u - h], [u + h]], len(columns), axis=1)
        slope = np.diff(emulator(ends, columns).mean, axis=0)[0] / (2 * h)
        bound = 1 / np.sqrt(slope @ np.linalg.solve(exp.covariance, slope))
        sd = float(result.idata.posterior["weight"].values.std())
        rows[label] = {
            "sd_over_bound": sd / float(bound),
            "n_replicas": result.n_replicas,
            "variance_shares": result.variance_shares,
            "cost_in_predictions": result.cost,
            "timescale": result.timescale.to_dict(),
        }
        print(label, json.dumps(rows[label], indent=1))
    return rows


def against_resampling(n_replicas: int = 1024) -> dict:
    """Network evaluations of the fit and of a bootstrap around a root find."""
    system = OrnsteinUhlenbeck()
    exact = TransferOperator(system, grid_size=100)
    s_eq = exact.equilibrium_score()
    bopito = bi.models.BoPITOScore(s_eq, exact.dynamic_score(s_eq, system.decay), system.decay, 10)
    model, step = bi.Interpolator(bopito), renoising_step(10, 20, DPMSolver(10))
    lags = 20 * np.arange(1, 5)
    values = system.decay**lags + 0.02 * np.random.default_rng(SEED).standard_normal(4)
    exp = bi.observables.Experiment(lags, values, np.full(4, 0.02))
    obs = bi.observables.Correlation(lambda x: x, normalization="variance")
    starts = exact.sample(20_000, torch.Generator().manual_seed(SEED))
    result = bi.inference.fit(
        model, step, obs, exp, starts, seed=SEED, n_replicas=n_replicas, discrepancy=False
    )
    calls = 0

    def misfit(n_int: float, y: np.ndarray, predict: bi.inference.Prediction) -> float:
        nonlocal calls
        calls += 1
        with torch.no_grad():
            residual = (y - predict(n_int).numpy()) / exp.sigma
        return float(residual @ residual)

    rng, best = np.random.default_rng(SEED), []
    for k in range(RESAMPLES + 1):
        y = values + (0.02 * rng.standard_normal(4) if k else 0.0)
        predict = bi.inference.Prediction(model, step, obs, lags, starts, k, n_replicas)
        found = minimize_scalar(
            misfit, bounds=(10.5, 60.0), args=(y, predict), method="bounded", options={"xatol": 0.1}
        )
        best.append(found.x)
    row = {
        "fit_predictions": result.cost,
        "resampling_predictions": calls,
        "ratio": calls / result.cost,
        "fit_sd": result.n_int.sd,
        "resampling_sd": float(np.std(best[1:])),
        "n_replicas": n_replicas,
    }
    print(json.dumps(row, indent=1))
    return row


def main() -> None:
    found = {"against_resampling": against_resampling(), "demo": demo()}
    store.write("efficiency", SEED, found)


if __name__ == "__main__":
    main()
