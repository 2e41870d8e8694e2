"""Calibration: do intervals hold the truth as often as they say?

    OMP_NUM_THREADS=1 nice python tests/benchmarks/bench_calibration.py     (20 minutes on 2 cores)

Simulated experiments on the Prinz potential, correlation of x at 100, ..., 500 frames, fitted
through `renoising_step`: 100 for each of three error bars with exact scores, where the dynamics
never cross a barrier at x = 0, and 100 with the shipped trained model. The truth is the model
itself. The weight is uniform in [0.2, 0.98]. Solver and replicas are few on purpose: Monte Carlo
noise is a good part of what the posterior has to account for. Last a control that must fail, in
which the data have twice the noise that the fits are told.

Writes data/results/calibration.json and calibration.png.
"""

import json
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import store
import torch
from scipy.stats import binom, chisquare, uniform

import bopito_inverse as bi
from bopito_inverse.diagnostics import calibrate
from bopito_inverse.diagnostics.calibration import LEVELS, Calibration
from bopito_inverse.inference import Prior
from bopito_inverse.plots import STYLE
from bopito_inverse.sampling import DPMSolver, renoising_step
from bopito_inverse.systems import Prinz, TransferOperator

OUT = store.RESULTS / "calibration.json"
SEED, GRID, LAG_MAX, LAMBDA_HAT = 0, 80, 50, 0.99
N_EXPERIMENTS, N_REPLICAS, TRUTH_REPLICAS, EVALUATIONS = 100, 1024, 32768, 6
SIGMAS, TRAINED_SIGMA = (0.01, 0.03, 0.1), 0.02
PRIOR = Prior(uniform(0.2, 0.78), on="weight")
QUANTITIES = {"n_int": "N_int", "timescale": "timescale"}
BINS = 20
MARKERS = (
    ("o", "#0072B2"),
    ("s", "#009E73"),
    ("^", "#56B4E9"),
    ("D", "#E69F00"),
    ("x", "#7F7F7F"),
)


def position(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


def exact_model() -> bi.Interpolator:
    s_eq = TransferOperator(Prinz(), grid_size=GRID).equilibrium_score()
    cut = TransferOperator(Prinz(), barrier=0.0, grid_size=GRID)
    s_dyn = cut.dynamic_score(s_eq, LAMBDA_HAT)
    return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, LAG_MAX))


def run(
    model: bi.Interpolator, sigma: float, seed: int, processes: int, **options: float
) -> Calibration:
    lags = np.arange(100, 501, 100)
    exp = bi.observables.Experiment(lags, np.zeros(5), np.full(5, sigma))
    exact = TransferOperator(Prinz(), grid_size=GRID)
    starts = exact.sample(50_000, torch.Generator().manual_seed(SEED))
    return calibrate(
        model,
        renoising_step(model.lag_max, 100, DPMSolver(EVALUATIONS)),
        bi.observables.Correlation(position, normalization="variance"),
        exp,
        starts,
        n_experiments=N_EXPERIMENTS,
        prior=PRIOR,
        n_replicas=N_REPLICAS,
        truth_replicas=TRUTH_REPLICAS,
        seed=seed,
        device="cpu",
        executor=processes,
        **options,
    )


def main() -> None:
    torch.set_num_threads(1)
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    exact = exact_model()
    trained = bi.Interpolator(bi.models.load(store.DATA / "prinz" / "bopito.safetensors"))
    cases = {f"exact scores, sigma {sigma:g}": (exact, sigma, {}) for sigma in SIGMAS}
    cases[f"trained model, sigma {TRAINED_SIGMA:g}"] = (trained, TRAINED_SIGMA, {})
    cases["control: noise twice sigma 0.1"] = (exact, 0.1, {"noise_scale": 2.0})
    made, seconds = {}, {}
    for seed, (name, (model, sigma, options)) in enumerate(cases.items()):
        began = time.perf_counter()
        made[name] = run(model, sigma, seed, processes, **options)
        seconds[name] = round(time.perf_counter() - began)
        print(f"{name}, {seconds[name]} s\n{made[name]}\n", flush=True)
        write(made, seconds)
    draw()


def write(made: dict[str, Calibration], seconds: dict[str, int]) -> None:
    settings = {
        "n_experiments": N_EXPERIMENTS,
        "n_replicas": N_REPLICAS,
        "evaluations": EVALUATIONS,
        "grid": GRID,
        "truth_replicas": TRUTH_REPLICAS,
        "prior": "weight uniform in [0.2, 0.98]",
    }
    cases = {name: one.summary() | {"seconds": seconds[name]} for name, one in made.items()}
    found = {"settings": settings, "together": together(made), "cases": cases}
    store.write("calibration", SEED, found)


def ranks(made: dict[str, Calibration], quantity: str) -> np.ndarray:
    """Of all experiments with exact scores and honest error bars."""
    return np.concatenate([c.ranks[quantity] for name, c in made.items() if "exact" in name])


def together(made: dict[str, Calibration]) -> dict:
    """Coverage of central intervals over all sigmas, and the test of all ranks."""
    out = {}
    for quantity in QUANTITIES:
        rank = ranks(made, quantity)
        below = np.concatenate(
            [c.quantities[quantity].below for name, c in made.items() if "exact" in name]
        )
        counts = np.histogram(rank, BINS, (-0.5, 99.5))[0]
        out[quantity] = {
            "n": len(rank),
            "coverage": {f"{p:g}": float((abs(below - 0.5) <= p / 2).mean()) for p in LEVELS},
            "error": {f"{p:g}": float((p * (1 - p) / len(rank)) ** 0.5) for p in LEVELS},
            "p_value": float(chisquare(counts).pvalue),
        }
    return out


def draw() -> None:
    """The figure, from what was written."""
    cases = json.loads(OUT.read_text())["cases"]
    exact = [case for name, case in cases.items() if "exact" in name]
    trained = [case for name, case in cases.items() if "trained" in name]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(7.0, 4.4), layout="constrained")
        for row, (quantity, label) in zip(axes, QUANTITIES.items(), strict=True):
            histogram(row[0], exact, quantity, f"{label}, exact scores", 20)
            histogram(row[1], trained, quantity, f"{label}, trained model", 10)
            coverage(row[2], cases, quantity)
        handles, labels = axes[0, 2].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(OUT.with_suffix(".png"), dpi=200)


def histogram(axes: plt.Axes, cases: list[dict], quantity: str, title: str, bins: int) -> None:
    rank = np.concatenate([case["quantities"][quantity]["rank"] for case in cases])
    low, high = binom.ppf([0.005, 0.995], len(rank), 1 / bins)
    axes.hist(rank, bins, (-0.5, 99.5), histtype="stepfilled", color="#56B4E9")
    axes.axhspan(low, high, color="#7F7F7F", alpha=0.25, lw=0)  # 99 % of uniform ranks
    axes.axhline(len(rank) / bins, color="black", lw=0.6)
    axes.set(title=title, xlabel="rank of the truth", ylabel="experiments", xlim=(-0.5, 99.5))


def coverage(axes: plt.Axes, cases: dict[str, dict], quantity: str) -> None:
    offsets = np.linspace(-0.03, 0.03, len(cases))
    for (name, case), (marker, colour), offset in zip(cases.items(), MARKERS, offsets, strict=True):
        rows = case["quantities"][quantity]["coverage"].values()
        x = np.array(LEVELS) + offset
        y = [row["central"] - level for row, level in zip(rows, LEVELS, strict=True)]
        error = [row["error"] for row in rows]
        axes.errorbar(x, y, error, fmt=marker, color=colour, ms=3, lw=0.8, label=name)
    axes.axhline(0, color="black", lw=0.6)
    axes.set(title=QUANTITIES[quantity], xlabel="probability of the interval")
    axes.set(ylabel="covered minus claimed", ylim=(-0.45, 0.2), xticks=LEVELS)


if __name__ == "__main__":
    main()
