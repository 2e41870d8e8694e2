r"""The double well of the dynAMMo tutorial: can kinetics *and* stationary density be corrected?

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_double_well.py [--workers 2]

Kolloff and Olsson (dynAMMo, 2023; tutorial of olsson-group/dynAMMo): V = a (x^2 - 1)^2 + b x, mass
times friction 1000, time step 1, one trajectory of 50,000 steps each of an "experiment" (a = 5,
b = 1, kT = 2) and of a "simulation" (a = 7, b = 1, kT = 4). The observable is the second
eigenfunction, its correlation known at multiples of 10 steps up to 690. The experiment is *slower*
than the simulation, and has another stationary density mu. dynAMMo matches the timescale, and keeps
the stationary density of the simulation.

Here s_eq is trained on umbrella windows at the experiment's potential, reweighted by MBAR; that is
5.4 million steps, a hundred times the simulation (`umbrella_cost`: what fewer steps give). Times
are in steps, densities are compared in 100 bins.

1. Composite steps with exact scores on a grid, fitted to the exact correlation. T of the simulation
   does not leave mu invariant, so that every step that holds it pays with a bias of the density:
   `renoising_step` and the paper's step (interpolation and relaxation) miss a total variation of
   0.03, and slowed down by n_int < N_max they *are* the simulation with another clock, which is
   what dynAMMo finds. Renoising alone, R(w), leaves mu invariant at every w. For w near one it is a
   step of overdamped Langevin dynamics in mu, of the diffusion time (1 - w^2) / 2, and the fit
   finds its diffusion coefficient. It takes nothing from the simulation. The timescale that it
   finds is too long by 0.1 % for steps of 10, by 0.6 % for 30, by 4 % for 100.
2. The same steps with trained scores (s_dyn from the simulation's one trajectory).
3. Ten repetitions of everything (experiment, umbrella windows, training, fit) with renoising alone,
   in steps of 30 (23 of the 69 lags):
   (A) the data as dynAMMo makes them, lambda_2^k of a reversible Markov model of the trajectory at
       lag 10 (deeptime). Its timescale is the truth of these data.
   (B) time averages of one trajectory with the covariance of such averages over other experiments:
       how often does the 94 % interval hold the timescale of the potential? Twenty experiments for
       each of the ten models. Correlated errors give weight to the shortest lags, where a step of
       30 is least exact: its rate is too low by 5 %, a fifth of the statistical error.
   (C) the exact correlation.
   (A) and (C) have independent errors of 0.01, chosen by hand.

(B) estimates the normalised correlation by 1 - E[(psi_k - psi_0)^2] / 2, with psi of unit variance
in mu. That has no bias, unlike quotients of time averages, which are compared with it.

Renoising alone meets both targets of the comparison, the timescale within 3 % with the truth inside
the 94 % interval and a total variation of at most 0.03, for each of the ten seeds; no step that
holds T of the simulation for more than a twentieth of its length meets the second one.

Results that are there already are kept in results/double_well; without that folder all is made
anew. Writes data/results/double_well.json and double_well.png.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import store
import torch
from double_well import (
    EXPERIMENT,
    HONEST_LAGS,
    LONGEST,
    SEED,
    SIMULATION,
    STEPS,
    STRIDE,
    TESTED,
    WALKS,
    Table,
    binned,
    eigenfunction,
    sampling_theory,
    total_variation,
    truths,
    well,
)
from double_well_steps import (
    EVALUATIONS,
    Trained,
    compared,
    exact_steps,
    judged,
    move_matrix,
    weighted_fits,
)
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulated import Tabulated
from torch import Tensor

import bopito_inverse as bi
from bopito_inverse import plots
from bopito_inverse.models import NetworkConfig, TrainingConfig
from bopito_inverse.sampling import DPMSolver, Renoise, Rollout
from bopito_inverse.systems import TransferOperator

KEPT = store.KEPT / "double_well"
SEEDS, START = range(10), 0.5
DYNAMMO = {"simulation": 480, "experiment": 1627, "fitted": 1680}

DELTA, SIGMA = 30, 0.01
LAGS = np.arange(DELTA, LONGEST + 1, DELTA)
EXPERIMENTS, HONEST_REPLICAS = TESTED // len(SEEDS), 8192  # of each model in (B)

WINDOWS = {"centers": np.linspace(-1.7, 1.7, 18), "stiffness": 60.0}
WALKERS, BURN_IN, FRAMES = 100, 1000, 20_000  # of each window
TRAINING = TrainingConfig(steps=4000, batch_size=1024, network=NetworkConfig(width=64))
DYNAMIC = TrainingConfig(steps=3000, batch_size=1024, network=NetworkConfig(width=96))
LAG_MAX, LAMBDA_HAT = 50, 0.998
WALKED = 320  # composite steps, for the density
WITH_TRAINED = [  # of the compared steps, the sensible ones
    "R(w), Delta 30",
    "T R(w) T, T 10% of Delta 30",
    "renoising_step, N_max 50, Delta 50",
    "renoising_step, N_max 10, Delta 50",
    "interpolate, relax, N_max 50, Delta 50",
    "interpolate, relax, N_max 10, Delta 100",
]
BLUE, RED = plots.MEANING["corrected"], plots.MEANING["uncorrected"]
DASHED = plots.DASHES["uncorrected"]


def trained_steps() -> dict:
    """The comparison with trained scores, and what the number of evaluations does to R."""
    print("trained scores")
    starts, weights, _ = equilibrium_frames(SEED)
    s_eq = bi.models.train_equilibrium(starts, weights, config=TRAINING, seed=SEED)
    simulated = bi.simulate.langevin(SIMULATION, [[START]], STEPS + 1, SEED)
    bopito = bi.models.train_bopito(simulated, s_eq, LAG_MAX, LAMBDA_HAT, config=DYNAMIC, seed=SEED)

    def case_of(lag_max: int, delta: int) -> Trained:
        scores = (bopito.s_eq, bopito.s_dyn, LAMBDA_HAT, min(lag_max, LAG_MAX))
        return Trained(bi.Interpolator(bi.models.BoPITOScore(*scores)), delta)

    found = compared(case_of, WITH_TRAINED)
    case = case_of(10, DELTA)
    w = found["R(w), Delta 30"]["w"]
    n = case.model.n_int(torch.tensor(w))
    evaluations = {
        k: judged(case, move_matrix(case, Renoise(), n, k)) for k in (5, 8, 10, 12, 15, 20, 40)
    }
    for k, row in evaluations.items():
        print(f"  R({w}) with {k} evaluations", row, flush=True)
    return {"steps": found, "evaluations_of_R": evaluations}


def equilibrium_frames(seed: int, frames: int = FRAMES) -> tuple[Tensor, Tensor, int]:
    """Frames of umbrella windows at the experiment's potential, MBAR weights, integrator steps."""
    biased = bi.simulate.umbrella(
        well(5.0, 2.0, STRIDE), **WINDOWS, n_frames=frames, seed=seed, n_walkers=WALKERS,
        burn_in=BURN_IN // STRIDE,
    )  # fmt: skip
    steps = biased.n_windows * (frames * STRIDE + WALKERS * BURN_IN)
    return biased.frames_flat, bi.simulate.mbar_weights(biased), steps


def markov_model(x: np.ndarray) -> tuple[float, Table]:
    """Slowest timescale and second eigenfunction of a reversible Markov model; lag 10."""
    from deeptime.markov.msm import MaximumLikelihoodMSM

    edges = np.linspace(-1.5, 1.5, 50)[:-1]
    model = MaximumLikelihoodMSM(reversible=True).fit(np.digitize(x, edges), lagtime=10)
    msm = model.fetch_model()
    centres = edges[0] + (edges[1] - edges[0]) * (np.arange(50) - 0.5)
    visited = msm.count_model.state_symbols
    values = np.interp(np.arange(50), visited, msm.eigenvectors_right()[:, 1])
    return float(msm.timescales()[0]), Table(centres, values)


def untrained(s_eq: bi.models.EquilibriumScore) -> bi.Interpolator:
    """A model whose dynamic score is never asked: renoising alone needs s_eq only."""
    s_dyn = bi.models.DynamicScore((1,), {"width": 1}, s_eq.noise, s_eq.scaling)
    return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, LAG_MAX))


class Corrected:
    """Renoising alone with one trained s_eq, fitted to one experiment after another."""

    def __init__(self, starts: Tensor, weights: Tensor, seed: int) -> None:
        self.seed = seed
        self.frames = bi.datasets.Frames(starts, weights)
        s_eq = bi.models.train_equilibrium(self.frames, config=TRAINING, seed=seed)
        self.model = untrained(s_eq)
        self.step = Rollout([Renoise()], DELTA, Tabulated(DPMSolver(EVALUATIONS)))

    def fit(
        self,
        a: Table,
        lags: np.ndarray,
        values: np.ndarray,
        covariance: np.ndarray,
        **options: int,
    ) -> bi.inference.FitResult:
        sigma = np.sqrt(np.diagonal(covariance))
        return bi.inference.fit(
            self.model,
            self.step,
            bi.observables.Correlation(a, normalization="variance", name="psi"),
            bi.observables.Experiment(lags, values, sigma, covariance, "psi"),
            self.frames,
            seed=self.seed,
            device="cpu",
            **options,
        )

    @torch.no_grad()
    def density(self, n_int: float) -> Tensor:
        """Frames of many walkers, long after they started at one place."""
        normal = bi.sampling.Normal(torch.Generator().manual_seed(self.seed))
        starts = torch.full((WALKS, 1), START)
        *_, last = self.step.frames(self.model, starts, torch.tensor(n_int), WALKED, normal)
        return last

    def matrix(self, weight: float) -> dict:
        """The step without Monte Carlo noise."""
        case = Trained(self.model, DELTA)
        return judged(case, case.renoise(weight))


def row_of(result: bi.inference.FitResult, truth: float) -> dict:
    low, high = result.timescale.hdi_94
    return {
        "truth": round(truth, 1),
        "timescale": round(result.timescale.mean, 1),
        "median": round(float(result.idata.posterior["timescale"].median()), 1),
        "sd": round(result.timescale.sd, 1),
        "hdi_94": [round(low, 1), round(high, 1)],
        "inside": bool(low < truth < high),
        "error_percent": round(100 * (result.timescale.mean / truth - 1), 2),
        "weight": round(result.weight.mean, 5),
        "status": str(result.status),
        "monte_carlo_share": round(result.monte_carlo_share, 3),
        "n_replicas": result.n_replicas,
    }


def repetition(seed: int, theory: dict) -> dict:
    """Experiment, simulation, umbrella windows, training and all fits, from one seed."""
    torch.set_num_threads(1)
    clock = time.perf_counter()
    slowest = float(TransferOperator(EXPERIMENT).timescales[0])
    measured, simulated = (
        bi.simulate.langevin(system, [[START]], STEPS + 1, 1000 + seed + offset).frames
        for system, offset in ((EXPERIMENT, 0), (SIMULATION, 500))
    )
    truth, psi_msm = markov_model(measured[:, 0].numpy())
    starts, weights, steps = equilibrium_frames(seed)
    made = Corrected(starts, weights, seed)
    independent = SIGMA**2 * np.eye(len(LAGS))
    a = made.fit(psi_msm, LAGS, np.exp(-LAGS / truth), independent)
    c = made.fit(eigenfunction(), LAGS, np.exp(-LAGS / slowest), independent)
    row: dict = {"seed": seed, "A": row_of(a, truth), "C": row_of(c, slowest), "B": []}
    last = made.density(a.n_int.mean)
    row["density"] = {
        "total_variation": round(total_variation(last), 4),
        "by_matrix": made.matrix(a.weight.mean),
        "umbrella_frames": round(total_variation(starts, weights), 4),
        "umbrella_steps": steps,
        "simulated_trajectory": round(total_variation(simulated), 4),
        "simulated_trajectory_reweighted": round(
            total_variation(simulated, reweighted(simulated)), 4
        ),
    }
    row["simulated_timescale"] = round(markov_model(simulated[:, 0].numpy())[0], 1)
    if seed == SEED:
        row["figure"] = for_figure(a, last)
        row["table_error"] = table_error(made, a.n_int.mean)
    psi, covariance = eigenfunction(), np.array(theory["covariance"])
    for values in theory["experiments"][EXPERIMENTS * seed : EXPERIMENTS * (seed + 1)]:
        result = made.fit(
            psi, HONEST_LAGS, np.array(values), covariance, n_replicas=HONEST_REPLICAS
        )
        row["B"].append(row_of(result, slowest))
    row["seconds"] = round(time.perf_counter() - clock)
    return row


def reweighted(x: Tensor) -> Tensor:
    """Weights that turn the simulation's frames into those of the experiment's potential."""
    u = x.double()[:, 0].numpy()
    log = SIMULATION.energy(u) / SIMULATION.kT - EXPERIMENT.energy(u) / EXPERIMENT.kT
    w = np.exp(log - log.max())
    return torch.from_numpy(w / w.sum())


def for_figure(result: bi.inference.FitResult, last: Tensor) -> dict:
    """The band of the fitted correlation, and the density of the corrected model."""
    drawn = result.predict(LAGS).reshape(-1, len(LAGS))
    band = [drawn.mean(0), *np.quantile(drawn, [0.03, 0.97], axis=0)]
    edges, _ = binned(TransferOperator(EXPERIMENT))
    counts = np.histogram(last.numpy()[:, 0], edges)[0] / len(last)
    return {"band": np.round(band, 4).tolist(), "density": counts.round(6).tolist()}


def table_error(made: Corrected, n_int: float) -> float:
    """Largest difference between correlations with the table and with the solver itself."""
    plain = Rollout([Renoise()], DELTA, DPMSolver(EVALUATIONS))
    obs = bi.observables.Correlation(eigenfunction(), normalization="variance", name="psi")
    options = {"seed": 0, "n_replicas": 1024, "device": "cpu"}
    with torch.no_grad():
        both = [
            bi.inference.Prediction(made.model, step, obs, LAGS, made.frames, **options)(n_int)
            for step in (plain, made.step)
        ]
    return float((both[0] - both[1]).abs().max())


def umbrella_cost() -> list[dict]:
    """Total variation of the weighted frames alone, against the length of the windows."""
    found = []
    for frames in (1000, 2000, 5000, 10_000, FRAMES, 2 * FRAMES):
        made = [equilibrium_frames(100 + seed, frames) for seed in range(5)]
        distance = [total_variation(x, w) for x, w, _ in made]
        found.append({"steps": made[0][2], "total_variation": np.round(distance, 4).tolist()})
    return found


def summarised(rows: list[dict], truth: float) -> dict:
    """All repetitions together."""

    def of(kind: str) -> dict:
        error = np.array([row[kind]["error_percent"] for row in rows])
        return {
            "seeds": len(rows),
            "mean_error_percent": round(float(error.mean()), 2),
            "largest_error_percent": round(float(np.abs(error).max()), 2),
            "within_3_percent": int((np.abs(error) <= 3).sum()),
            "truth_inside_94_hdi": sum(row[kind]["inside"] for row in rows),
        }

    honest = [one for row in rows for one in row["B"]]
    inside = np.mean([one["inside"] for one in honest])
    fitted = np.array([one["median"] for one in honest])
    density = {
        name: [row["density"][name] for row in rows]
        for name in ("total_variation", "umbrella_frames", "simulated_trajectory",
                     "simulated_trajectory_reweighted")
    }  # fmt: skip
    return {
        "A": of("A"),
        "B": {
            "experiments": len(honest),
            "coverage_of_94_hdi": round(float(inside), 3),
            "binomial_error": round(float((0.94 * 0.06 / len(honest)) ** 0.5), 3),
            "mean_rate_over_truth": round(float((truth / fitted).mean()), 3),
            "sd_of_rate_over_truth": round(float((truth / fitted).std()), 3),
            "median_hdi_over_truth": np.round(
                np.median([one["hdi_94"] for one in honest], axis=0) / truth, 3
            ).tolist(),
            "status": {s: sum(one["status"] == s for one in honest)
                       for s in sorted({one["status"] for one in honest})},
        },
        "C": of("C"),
        "total_variation": {
            name: {"mean": round(float(np.mean(v)), 4), "largest": float(np.max(v))}
            for name, v in density.items()
        } | {"at_most_0.03": sum(v <= 0.03 for v in density["total_variation"])},
        "truths_of_the_data": [row["A"]["truth"] for row in rows],
        "simulated_timescales": [row["simulated_timescale"] for row in rows],
    }  # fmt: skip


def kept(name: str, make: Callable[[], dict | list]) -> dict | list:
    """What was found before, or is found now."""
    path = KEPT / f"{name}.json"
    if not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        made = json.dumps(make())
        path.write_text(made)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    workers = parser.parse_args().workers
    torch.set_num_threads(1)
    known, theory = kept("truths", truths), kept("theory", sampling_theory)
    print(json.dumps(known, indent=1))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = [seed for seed in SEEDS if not (KEPT / f"seed_{seed}.json").exists()]
        for row in pool.map(repetition, waiting, [theory] * len(waiting)):
            kept(f"seed_{row['seed']}", lambda row=row: row)
            print({k: row[k] for k in ("seed", "A", "C", "density", "seconds")}, flush=True)
    rows = [kept(f"seed_{seed}", dict) for seed in SEEDS]
    found = {
        "truths": known,
        "dynammo": DYNAMMO,
        "summary": summarised(rows, known["experiment"]["timescales"][0]),
        "exact_scores": kept("exact_steps", exact_steps),
        "trained_scores": kept("trained_steps", trained_steps),
        "umbrella_cost": kept("umbrella_cost", umbrella_cost),
        "rate_of_R_over_truth_with_the_covariance_of_B": kept(
            "weighted_fits", lambda: weighted_fits(np.array(theory["covariance"]))
        ),
        "estimates": {k: v for k, v in theory.items() if k != "experiments"},
        "rows": [{k: v for k, v in row.items() if k != "B"} for row in rows],
        "rows_B": [
            [seed, one["median"], *one["hdi_94"], one["inside"], one["status"]]
            for seed, row in zip(SEEDS, rows, strict=True)
            for one in row["B"]
        ],
    }
    print(json.dumps(found["summary"], indent=1))
    store.write("double_well", SEED, found)
    draw(found)


@rc_context(plots.STYLE)
def draw(found: dict) -> None:
    """Correlation and free energy of the first seed, errors of all seeds, steps compared."""
    figure = Figure(figsize=(plots.DOUBLE, 5.4), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    first = found["rows"][0]
    panel_correlation(axes[0], first)
    panel_free_energy(axes[1], first)
    panel_timescales(axes[2], found["rows"])
    panel_steps(axes[3], found["exact_scores"]["steps"], found["trained_scores"]["steps"])
    for ax, letter in zip(axes, "abcd", strict=True):
        ax.set_title(letter, loc="left", fontweight="bold")
    figure.savefig(store.RESULTS / "double_well.png", dpi=150)


def panel_correlation(ax: Axes, row: dict) -> None:
    simulation, exact = TransferOperator(SIMULATION), TransferOperator(EXPERIMENT)
    fine = np.arange(0, LONGEST + 1, 10)
    before = simulation.correlation(eigenfunction(), lags=fine, normalization="variance")
    truth, (mean, low, high) = row["A"]["truth"], row["figure"]["band"]
    ax.plot(fine, before, color=RED, ls=DASHED,
            label=f"simulation ({simulation.timescales[0]:.0f} steps)")  # fmt: skip
    ax.plot(fine, np.exp(-fine / exact.timescales[0]), color=plots.GREY, lw=0.8,
            label=f"exact ({exact.timescales[0]:.0f} steps)")  # fmt: skip
    ax.fill_between(LAGS, low, high, color=BLUE, alpha=0.3, lw=0)
    ax.plot(LAGS, mean, color=BLUE, label="corrected, 94 % band")
    ax.errorbar(LAGS, np.exp(-LAGS / truth), SIGMA, fmt="o", color="black", ms=2.5, lw=0.8,
                label=f"data, seed 0 ({truth:.0f} steps)")  # fmt: skip
    ax.set(xlabel="lag (steps)", ylabel="correlation of the 2nd eigenfunction")
    ax.set(xlim=(0, LONGEST + 10), ylim=(0, 1.02))
    small_legend(ax, "lower left")


def panel_free_energy(ax: Axes, row: dict) -> None:
    edges, exact = binned(TransferOperator(EXPERIMENT))
    simulation = binned(TransferOperator(SIMULATION))[1]
    corrected = np.array(row["figure"]["density"])
    x, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    seen = corrected > 1e-4
    apart = np.abs(simulation - exact).sum() / 2
    ax.plot(x, -np.log(simulation / width), color=RED, ls=DASHED,
            label=f"simulation, kept by dynAMMo (TV {apart:.2f})")  # fmt: skip
    ax.plot(x, -np.log(exact / width), color="black", lw=1.0, label="experiment, exact")
    ax.plot(x[seen], -np.log(corrected[seen] / width), "o", color=BLUE, ms=2.5,
            label=f"corrected (TV {row['density']['total_variation']:.2f})")  # fmt: skip
    ax.set(xlabel="x", ylabel="free energy (kT)", xlim=(-1.75, 1.75), ylim=(-0.3, 7.5))
    small_legend(ax, "upper center")


def panel_timescales(ax: Axes, rows: list[dict]) -> None:
    place = np.arange(len(rows))
    ax.axhspan(-3, 3, color=plots.PALE, alpha=0.6, lw=0, zorder=0)
    ax.axhline(0, color="black", lw=0.8, zorder=1)
    marks = (("A", -0.13, BLUE, "(A) one trajectory"),
             ("C", 0.13, plots.OKABE_ITO["sky"], "(C) exact correlation"))  # fmt: skip
    for kind, offset, colour, label in marks:
        truth = np.array([row[kind]["truth"] for row in rows])
        mean = np.array([row[kind]["timescale"] for row in rows])
        ends = np.array([row[kind]["hdi_94"] for row in rows]).T
        bars = np.abs(ends - mean) / truth * 100
        ax.errorbar(place + offset, 100 * (mean / truth - 1), bars, fmt="o", color=colour, ms=3.5,
                    lw=0.9, label=label)  # fmt: skip
    error = 100 * (DYNAMMO["fitted"] / DYNAMMO["experiment"] - 1)
    ax.errorbar(len(rows), error, fmt="D", color=plots.OKABE_ITO["orange"], ms=4.5, label="dynAMMo")
    ticks = [f"{row['A']['truth']:.0f}" for row in rows] + [str(DYNAMMO["experiment"])]
    ax.set_xticks([*place, len(rows)], ticks, rotation=45, fontsize=6.5)
    ax.set(xlabel="timescale of the data in (A), each seed (steps)")
    ax.set(ylabel="error of the fitted timescale (%)", ylim=(-6, 8))
    small_legend(ax, "upper center", ncols=3)


def panel_steps(ax: Axes, exact: dict, trained: dict) -> None:
    looks = {
        "alone": ("o", BLUE, "R(w), Δ in steps"),
        "short": ("s", plots.OKABE_ITO["green"], "T R(w) T, Δ 30, T 2 to 30 %"),
        "rule": ("^", plots.OKABE_ITO["purple"], "renoising_step, Δ 50"),
        "paper": ("D", plots.GREY, "interpolate (, relax)"),
        "clock": ("v", RED, "simulation, slower clock"),
    }
    for group, (marker, colour, label) in looks.items():
        for made, face in ((exact, colour), (trained, "white")):
            own = [row for name, row in made.items()
                   if row["group"] == group and "uncorrected" not in name]  # fmt: skip
            x, y = ([row[key] for row in own] for key in ("wasserstein", "total_variation"))
            ax.plot(x, y, ls="none", marker=marker, ms=4.5, color=colour, mfc=face, mew=0.9,
                    label=label if made is exact else None, zorder=3)  # fmt: skip
    for row in exact.values():
        if row["group"] == "alone":
            ax.annotate(str(row["delta"]), (row["wasserstein"], row["total_variation"]),
                        (0, -9), textcoords="offset points", ha="center", fontsize=6)  # fmt: skip
    ax.axhline(0.03, color="black", lw=0.8, ls=":")
    ax.set(xlabel="W1 of one step from the exact dynamics", ylabel="TV of the stationary density")
    ax.set(ylim=(-0.022, 0.235), xlim=(0.015, 0.115))
    ax.text(0.113, 0.033, "target", ha="right", fontsize=6)
    small_legend(ax, "upper center", ncols=2, title="filled: exact scores, open: trained")


def small_legend(ax: Axes, loc: str, **options: Any) -> None:
    """A legend inside the axes that does not change their size."""
    legend = ax.legend(
        loc=loc,
        fontsize=6.3,
        title_fontsize=6.3,
        columnspacing=0.8,
        handletextpad=0.4,
        handlelength=1.8,
        **options,
    )
    legend.set_in_layout(False)


if __name__ == "__main__":
    main()
