"""Do the intervals cover the *exact* answer, where the data are biased?

    python tests/benchmarks/bench_coverage.py            (about 30 minutes on 2 idle cores)

Random cases with exact scores: a potential (Prinz, double wells, triple wells), a bias (the slow
process cut out of the data; short data of the right dynamics; dynamics too slow or too fast by a
factor; a wrong barrier in the force field), N_max, the step and the noise of the experiment are
drawn at random. The correlation of x is fitted, with and without the discrepancy term; the exact
slowest timescale, and the exact correlations of x > 0 and x^2 at the same lags, are held against
the 94 % intervals. Writes data/results/coverage.json.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context

import numpy as np
import store
import torch

import bopito_inverse as bi
from bopito_inverse.inference.explore import Explored
from bopito_inverse.inference.posterior import estimate
from bopito_inverse.inference.problem import Problem
from bopito_inverse.observables.relaxation import timescale
from bopito_inverse.sampling import renoising_step
from bopito_inverse.systems import DoubleWell, Potential1D, Prinz, TransferOperator, TripleWell

CASES, SEED, GRID, N_LAGS, LEVEL = 48, 2026, 120, 6, 0.94
TRUSTED = ("ok", "mc_limited")
KINDS = ("missing", "short", "rates", "force field")


def position(x: torch.Tensor) -> torch.Tensor:
    return x


def square(x: torch.Tensor) -> torch.Tensor:
    return x.square()


def side(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(x.dtype)


OBSERVABLES = {
    name: bi.observables.Correlation(f, normalization="variance", name=name)
    for name, f in (("x", position), ("x>0", side), ("x^2", square))
}


@dataclass(frozen=True)
class Case:
    """One biased case."""

    seed: int
    kind: str
    potential: str
    exact: float
    step_lag: int
    lag_max: int
    sigma: float
    factor: float


def draw(seed: int) -> tuple[Case, TransferOperator, TransferOperator]:
    """A case, its exact operator, and that of the biased dynamics."""
    rng = np.random.default_rng([SEED, seed])
    kind = KINDS[seed % len(KINDS)]
    name = rng.choice(["Prinz", "DoubleWell", "TripleWell"])
    if name == "Prinz":
        system: Potential1D = Prinz()
        barrier = 0.0
    elif name == "DoubleWell":
        system = DoubleWell(a=rng.uniform(2, 5), b=rng.uniform(-0.8, 0.8))
        barrier = 0.0
    else:
        system = TripleWell(height=rng.uniform(2.5, 4), tilt=rng.uniform(0.1, 0.8))
        barrier = float(rng.choice([-0.5, 0.5]))
    exact = TransferOperator(system, grid_size=GRID)
    slowest = float(exact.timescales[0])
    step_lag = max(4, round(slowest * rng.uniform(0.2, 0.7)))
    lag_max = max(2, round(step_lag * rng.choice([0.25, 0.5, 1.0])))
    sigma = float(rng.choice([0.01, 0.02, 0.04]))
    factor = float(rng.choice([0.5, 0.67, 1.5, 2.0])) if kind in ("rates", "force field") else 1.0
    case = Case(seed, kind, str(name), slowest, step_lag, lag_max, sigma, factor)
    return case, exact, biased(case, exact, barrier)


def biased(case: Case, exact: TransferOperator, barrier: float) -> TransferOperator:
    system = exact.system
    if case.kind == "missing":
        return TransferOperator(system, barrier=barrier, grid_size=GRID)
    if case.kind == "short":
        return exact
    if case.kind == "rates":
        friction = system.friction * case.factor
        energy = system.energy
    else:  # bump at the barrier, up or down by a part of kT
        friction = system.friction
        height = (1.0 if case.factor > 1 else -1.0) * system.kT

        def energy(x: np.ndarray) -> np.ndarray:
            return system.energy(x) + height * np.exp(-(((x - barrier) / 0.15) ** 2))

    other = Potential1D(
        energy,
        system.bounds,
        system.kT,
        friction,
        system.time_step,
        system.steps_per_frame,
    )
    return TransferOperator(other, grid_size=GRID)


def run(seed: int, n_replicas: int) -> dict:
    """Both fits of one case against the exact answers."""
    torch.set_num_threads(1)
    case, exact, wrong = draw(seed)
    lambda_hat = float(np.exp(-1 / case.exact))
    s_eq = exact.equilibrium_score()
    bopito = bi.models.BoPITOScore(
        s_eq, wrong.dynamic_score(s_eq, lambda_hat), lambda_hat, case.lag_max
    )
    held = wrong.timescales[0] < 3 * case.exact  # the user sees it in the trained model
    step = renoising_step(case.lag_max, case.step_lag, relaxation=case.step_lag if held else None)
    lags = case.step_lag * np.arange(1, N_LAGS + 1)
    truth = {
        name: exact.correlation(obs.a, lags=lags, normalization="variance")
        for name, obs in OBSERVABLES.items()
    }
    noise = case.sigma * np.random.default_rng([SEED, seed, 1]).standard_normal(N_LAGS)
    exp = bi.observables.Experiment(lags, truth["x"] + noise, np.full(N_LAGS, case.sigma))
    starts = exact.sample(50_000, torch.Generator().manual_seed(seed))
    begin = time.time()
    result = bi.inference.fit(
        bi.Interpolator(bopito), step, OBSERVABLES, exp, starts, seed=seed, n_replicas=n_replicas
    )
    problem = result._problem
    plain = Problem(problem.design, problem.keep, problem.likelihood.varied(discrepancy=None), None)
    row: dict = asdict(case) | {"status": str(result.status), "p_value": result.p_value}
    row |= {"shares": result.variance_shares, "seconds": time.time() - begin}
    row["with"] = held_against(problem, result._explored, case, truth)
    row["without"] = held_against(plain, plain.explore(seed), case, truth)
    return row


def held_against(problem: Problem, explored: Explored, case: Case, truth: dict) -> dict:
    """Whether the intervals of one posterior cover the exact answers."""
    parameters = problem.parameters(explored.draws.reshape(-1, 1))
    column = np.array([problem.emulator.eigenvalue])
    rng = np.random.default_rng(0)
    eigenvalue = problem.likelihood.draw(parameters, parameters.u, column, rng)
    found = estimate(timescale(torch.from_numpy(eigenvalue), case.step_lag).numpy())
    held = {}
    for name in ("x>0", "x^2"):
        lags = case.step_lag * np.arange(1, N_LAGS + 1)
        drawn = problem.predict(explored, lags, name, 0).reshape(-1, N_LAGS)
        ends = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        held[name] = ((ends[0] < truth[name]) & (truth[name] < ends[1])).tolist()
    low, high = found.hdi_94
    return {
        "timescale": found.to_dict(),
        "covers": bool(low < case.exact < high),
        "held_out": held,
    }


def coverage(rows: list[dict], label: str) -> dict:
    """Fractions covered, all cases and by kind; of fits with a trusted status."""
    good = [row for row in rows if row["status"] in TRUSTED]
    table = {}
    for kind in ("all", *KINDS):
        own = [row for row in good if kind in ("all", row["kind"])]
        n = len(own)
        inside = sum(row[label]["covers"] for row in own)
        held = [x for row in own for v in row[label]["held_out"].values() for x in v]
        ratio = [row[label]["timescale"]["mean"] / row["exact"] for row in own]
        table[kind] = {
            "cases": n,
            "timescale": inside / max(n, 1),
            "held_out": float(np.mean(held)) if held else None,
            "mean_ratio": float(np.mean(ratio)) if ratio else None,
            "rms_error": float(np.sqrt(np.mean((np.array(ratio) - 1) ** 2))) if ratio else None,
        }
    return table


def main() -> None:
    n_replicas = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    workers = os.cpu_count() or 1
    rows = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for row in pool.map(run, range(CASES), [n_replicas] * CASES):
            rows.append(row)
            print(
                f"{row['seed']:3d} {row['kind']:11s} {row['potential']:10s} {row['exact']:6.1f}",
                row["status"],
                *(
                    f"{k}: {row[k]['timescale']['mean']:.1f} {row[k]['timescale']['hdi_94']} "
                    f"{row[k]['covers']}"
                    for k in ("with", "without")
                ),
                flush=True,
            )
    tables = {label: coverage(rows, label) for label in ("with", "without")}
    for label, table in tables.items():
        print(f"\n{label} the discrepancy term")
        for kind, entry in table.items():
            print(f"  {kind:12s}", {k: v if v is None else round(v, 3) for k, v in entry.items()})
    found = {"n_replicas": n_replicas, "level": LEVEL, "coverage": tables, "cases": rows}
    store.write("coverage", SEED, found)


if __name__ == "__main__":
    main()
