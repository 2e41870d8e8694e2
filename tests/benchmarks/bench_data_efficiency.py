"""How many trajectories does the equilibrium prior save? ITO against BoPITO on Prinz.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_data_efficiency.py     (70 CPU minutes)

Both models learn from the same 5 to 500 trajectories of 2,000 frames that start in equilibrium
(slowest timescale 166.8 frames), lags to 1000, five seeds of data and training, with the same
network, batch, steps and learning rate. BoPITO is also given the shipped s_eq, which comes from 1.1
million frames of umbrella sampling, as many as 560 of these trajectories have. `BoPITO, own s_eq`
trains its s_eq on the same trajectories: what the form of the model alone is worth. lambda_hat is
0.994, exp(-1 / 166.8); a user would take it from the data.

    C(x), C(x>0)   |error| of the autocorrelation by one step from mu, against the exact operator
    W1             Wasserstein distance from the exact transition density, mean over x_0 in mu
    data           the same error of C estimated from the trajectories themselves
    mu             C and W1 of a draw of mu that forgets x_0: no trajectory at all, and no dynamics

Each is a mean over the lags of a group. `needed` is the number of trajectories at which ITO,
interpolated in log-log, first has BoPITO's error, over BoPITO's number, with the 90 % interval of a
bootstrap over seeds; null says that 500 trajectories are not enough. `at_least_10` is the share of
the bootstrap that says ten or more; with over 50 trajectories that cannot be seen.

Three times the steps, with 500 trajectories, are a control for both (`longer_training`: error
over that of the same seeds before); this and `own s_eq` have two seeds. Rows go to
results/data_efficiency.jsonl one by one: a run that was killed goes on from there. Writes
data/results/data_efficiency.json and .png.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import store
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from one_step import against_exact

import bopito_inverse as bi
from bopito_inverse.datasets import Trajectories
from bopito_inverse.models import NetworkConfig, TrainingConfig
from bopito_inverse.plots import DOUBLE, GREY, OKABE_ITO, STYLE
from bopito_inverse.systems import Prinz, TransferOperator

SEED, N_SEEDS, N_CONTROL, DRAWS = 0, 5, 2, 2000
SIZES, FEW, ENDS = (5, 16, 50, 158, 500), (5, 50, 500), (500,)
N_FRAMES, LAG_MAX, LAMBDA_HAT = 2000, 1000, 0.994
STEPS, CONTROL_STEPS = 3000, 9000
GROUPS = {
    "short": (5, 10, 20),
    "medium": (50, 100, 150),
    "long": (300, 400, 500),
    "longest": (700, 850, 1000),
}
LAGS = [lag for group in GROUPS.values() for lag in group]
QUANTITIES = {"x": "C(x)", "x>0": "C(x>0)", "w1": "W1"}
ITO, BOPITO, OWN, DATA = "ITO", "BoPITO", "BoPITO, own s_eq", "data"
DRAWN = {"x": "|error of C(x)|", "w1": "W₁ of one step"}
LOOKS: dict[str, dict[str, Any]] = {
    ITO: {"color": OKABE_ITO["vermillion"], "marker": "o", "ls": "-"},
    BOPITO: {"color": OKABE_ITO["blue"], "marker": "s", "ls": "-"},
    OWN: {"color": OKABE_ITO["sky"], "marker": "D", "ls": ":"},
    DATA: {"color": GREY, "marker": "^", "ls": "--"},
}
NEEDED: dict[str, dict[str, Any]] = {
    "x": {"color": OKABE_ITO["green"], "marker": "s", "label": "ITO needs, by C(x)"},
    "w1": {"color": OKABE_ITO["purple"], "marker": "o", "label": "ITO needs, by W₁"},
}
RANKS = 96
PARTIAL = store.KEPT / "data_efficiency.jsonl"
Job = tuple[str, int, int, int]  # model, trajectories, seed, steps


class Mirrored:
    """Shifts s, 1 - s of a rank grid, in turn: the error that is linear in the shift cancels."""

    def __init__(self, seed: int) -> None:
        self.shift = np.random.default_rng(seed).random(2)

    def random(self, size: int) -> np.ndarray:
        self.shift = 1 - self.shift
        return self.shift[:size]


@cache
def operator() -> TransferOperator:
    return TransferOperator(Prinz())


def simulate(seed: int) -> dict[int, Trajectories]:
    """Trajectories of each size, independent of each other."""
    torch.set_num_threads(1)
    starts = operator().sample(sum(SIZES), torch.Generator().manual_seed(seed))
    made = bi.simulate.langevin(Prinz(), starts, N_FRAMES, seed=seed, device="cpu")
    parts = made.frames.view(len(made), N_FRAMES, 1).split(list(SIZES))
    return {n: Trajectories(x, made.frame_time) for n, x in zip(SIZES, parts, strict=True)}


def train(job: Job, trajectories: Trajectories) -> dict:
    """One model, and its errors at all lags."""
    torch.set_num_threads(1)
    name, n, seed, steps = job
    config = TrainingConfig(steps=steps, batch_size=1024, network=NetworkConfig(width=96))
    began = time.process_time()
    if name == ITO:
        score = bi.models.train_ito(trajectories, LAG_MAX, config, seed, device="cpu")
    else:
        s_eq = bi.models.load(store.DATA / "prinz" / "equilibrium.safetensors")
        if name == OWN:
            frames = trajectories.frames
            s_eq = bi.models.train_equilibrium(frames, None, config, seed, device="cpu")
        arguments = (trajectories, s_eq, LAG_MAX, LAMBDA_HAT, config, seed)
        score = bi.models.train_bopito(*arguments, device="cpu")
    seconds = time.process_time() - began
    found = []
    for lag in LAGS:
        shifts = Mirrored(seed)
        pair = [against_exact(score, operator(), lag, shifts, RANKS) for _ in range(2)]
        found.append({key: (pair[0][key] + pair[1][key]) / 2 for key in QUANTITIES})
    errors = {key: [round(at[key], 5) for at in found] for key in QUANTITIES}
    return {"model": name, "n": n, "seed": seed, "steps": steps, "cpu_s": round(seconds)} | errors


def direct(trajectories: Trajectories, n: int, seed: int) -> dict:
    """The error of C as estimated from the trajectories."""
    row = {"model": DATA, "n": n, "seed": seed, "steps": 0}
    for key, a in {"x": lambda x: x, "x>0": lambda x: x > 0}.items():
        found = bi.observables.Correlation(a, normalization="variance")
        error = found.from_trajectories(trajectories, LAGS)[0].numpy() - exact_correlation(a)
        row[key] = error.round(5).tolist()
    return row


def exact_correlation(a) -> np.ndarray:
    return operator().correlation(a, lags=np.array(LAGS), normalization="variance")


def forgetful() -> dict:
    """Errors of a draw of mu in place of the transition density."""
    exact = operator()
    mu, made = exact.stationary * exact.spacing, []
    for lag in LAGS:
        rows = exact.transition_density(lag) * exact.spacing
        distance = np.abs(np.cumsum(rows - mu, axis=1)).sum(1) * exact.spacing
        made.append(round(float(mu @ distance), 5))
    correlations = {"x": lambda x: x, "x>0": lambda x: x > 0}
    errors = {key: (-exact_correlation(a)).round(5).tolist() for key, a in correlations.items()}
    return {"model": "mu"} | errors | {"w1": made}


def jobs() -> list[Job]:
    seeds = range(N_SEEDS)
    main = [(name, n, seed, STEPS) for seed in seeds for n in SIZES for name in (ITO, BOPITO)]
    own = [(OWN, n, seed, STEPS) for seed in seeds[:N_CONTROL] for n in FEW]
    control = [
        (name, n, s, CONTROL_STEPS)
        for s in seeds[:N_CONTROL]
        for n in ENDS
        for name in (ITO, BOPITO)
    ]
    return main + control + own


def collect(workers: int) -> list[dict]:
    """All rows, those of an interrupted run from its file."""
    PARTIAL.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in PARTIAL.open()] if PARTIAL.exists() else []
    done = {(row["model"], row["n"], row["seed"], row["steps"]) for row in rows}
    began = time.perf_counter()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, PARTIAL.open("a") as file:
        data = list(pool.map(simulate, range(N_SEEDS)))
        todo: Iterable[Future] = [
            pool.submit(train, job, data[job[2]][job[1]]) for job in jobs() if job not in done
        ]
        for future in as_completed(todo):
            row = future.result()
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
            errors = " ".join(
                f"{np.abs(row['x'][k : k + 3]).mean():.4f}" for k in range(0, len(LAGS), 3)
            )
            print(
                f"{time.perf_counter() - began:6.0f} s  {row['model']:17s} n {row['n']:3d}  "
                f"seed {row['seed']}  steps {row['steps']}  |error of C(x)| {errors}",
                flush=True,
            )
    rows += [direct(data[seed][n], n, seed) for seed in range(N_SEEDS) for n in SIZES]
    order = [ITO, BOPITO, OWN, DATA]
    return sorted(
        rows, key=lambda row: (order.index(row["model"]), row["steps"], row["n"], row["seed"])
    )


def errors(rows: list[dict], model: str, steps: int, group: str, quantity: str) -> np.ndarray:
    """Mean over the lags of a group of the absolute errors, (sizes, seeds)."""
    columns = [LAGS.index(lag) for lag in GROUPS[group]]
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["model"], row["steps"]) == (model, steps):
            value = np.abs(np.array(row[quantity])[columns]).mean()
            found.setdefault(row["n"], []).append(float(value))
    return np.array([found[n] for n in sorted(found)])


def sizes_of(found: np.ndarray) -> tuple[int, ...]:
    return next(sizes for sizes in (SIZES, FEW, ENDS) if len(sizes) == len(found))


def first_crossing(curve: np.ndarray, error: float) -> float:
    """Where the curve over SIZES, log-log, first falls to this error; inf if it never does."""
    if curve[0] <= error:
        return float(SIZES[0])
    x, y = np.log(SIZES), np.log(curve)
    for k in range(1, len(curve)):
        if curve[k] <= error:
            share = (y[k - 1] - np.log(error)) / (y[k - 1] - y[k])
            return float(np.exp(x[k - 1] + share * (x[k] - x[k - 1])))
    return float("inf")


def needed(ito: np.ndarray, bopito: np.ndarray) -> np.ndarray:
    """Trajectories of ITO for the error of BoPITO, over those of BoPITO, (sizes,)."""
    curve = ito.mean(1)
    at = [first_crossing(curve, error) for error in bopito.mean(1)]
    return np.array(at) / SIZES


def bootstrapped(ito: np.ndarray, bopito: np.ndarray) -> dict:
    """`needed` and its 90 % interval; seeds are drawn anew at each size, the same for both."""
    rng, rows = np.random.default_rng(SEED), np.arange(len(SIZES))[:, None]
    ratio = np.empty((DRAWS, len(SIZES)))
    for draw in ratio:
        seeds = rng.integers(ito.shape[1], size=ito.shape)
        draw[:] = needed(ito[rows, seeds], bopito[rows, seeds])
    ends = np.quantile(ratio, [0.05, 0.95], axis=0, method="closest_observation")
    return {
        str(n): {
            "needed": finite(value),
            "interval_90": [finite(low), finite(high)],
            "at_least_10": round(float((ratio[:, k] >= 10).mean()), 3) if n <= 50 else None,
            "error_ratio": round(float(ito.mean(1)[k] / bopito.mean(1)[k]), 2),
        }
        for k, (n, value, low, high) in enumerate(
            zip(SIZES, needed(ito, bopito), *ends, strict=True)
        )
    }


def finite(value: float) -> float | None:
    return round(float(value), 2) if np.isfinite(value) else None


def summarised(rows: list[dict], mu: dict) -> dict:
    """Means over seeds with their standard errors, and what ITO needs."""
    cases = [(ITO, STEPS), (BOPITO, STEPS), (OWN, STEPS), (DATA, 0)]
    cases += [(ITO, CONTROL_STEPS), (BOPITO, CONTROL_STEPS)]
    table: dict = {}
    for group in GROUPS:
        for quantity, label in QUANTITIES.items():
            entry: dict = table.setdefault(f"{group}, {label}", {})
            for model, steps in cases:
                if model == DATA and quantity == "w1":
                    continue
                found = errors(rows, model, steps, group, quantity)
                sizes = sizes_of(found)
                error = found.std(1, ddof=1) / found.shape[1] ** 0.5
                name = f"{model}, {steps} steps" if steps == CONTROL_STEPS else model
                entry[name] = {
                    str(n): [round(float(m), 5), round(float(e), 5)]
                    for n, m, e in zip(sizes, found.mean(1), error, strict=True)
                }
            columns = [LAGS.index(lag) for lag in GROUPS[group]]
            entry["mu"] = round(float(np.abs(np.array(mu[quantity])[columns]).mean()), 5)
            pair = [errors(rows, model, STEPS, group, quantity) for model in (ITO, BOPITO)]
            entry["needed"] = bootstrapped(*pair)
            entry["longer_training"] = longer_training(rows, group, quantity)
    return table


def longer_training(rows: list[dict], group: str, quantity: str) -> dict:
    """Error after CONTROL_STEPS over that after STEPS, same seeds."""
    made: dict = {}
    for model in (ITO, BOPITO):
        after = errors(rows, model, CONTROL_STEPS, group, quantity)
        before = errors(rows, model, STEPS, group, quantity)[:, :N_CONTROL]
        for n, row in zip(ENDS, after, strict=True):
            ratio = row.mean() / before[SIZES.index(n)].mean()
            made.setdefault(model, {})[str(n)] = round(float(ratio), 2)
    return made


def report(table: dict) -> None:
    for name, entry in table.items():
        print(f"\n{name}: a draw of mu {entry['mu']:.4f}")
        for case, found in entry.items():
            if case not in ("mu", "needed", "longer_training"):
                cells = [f"{n}: {m:.4f} +- {e:.4f}" for n, (m, e) in found.items()]
                print(f"  {case:20s}", "  ".join(cells))
        for n, found in entry["needed"].items():
            print(f"  ITO needs, at {n}: {found}")
        print(f"  longer training: {entry['longer_training']}")


def draw(rows: list[dict], mu: dict, table: dict, path: Path) -> None:
    """Errors over trajectories, and what ITO needs; one column for each group of lags."""
    slowest = operator().timescales[0]
    with rc_context(STYLE):
        figure = Figure(figsize=(DOUBLE, 6.2), layout="constrained")
        axes = figure.subplots(len(DRAWN) + 1, len(GROUPS), sharex=True, sharey="row")
        for line, (quantity, label) in zip(axes, DRAWN.items(), strict=False):
            for axis, group in zip(line, GROUPS, strict=True):
                draw_errors(axis, rows, mu, group, quantity)
            line[0].set(yscale="log", ylabel=label)
        for axis, (group, lags) in zip(axes[0], GROUPS.items(), strict=True):
            low, high = (f"{lag / slowest:.2g}" for lag in (lags[0], lags[-1]))
            axis.set_title(f"{group}, {lags[0]} to {lags[-1]} frames\n{low} to {high} timescales")
        for axis, group in zip(axes[-1], GROUPS, strict=True):
            for side, (quantity, look) in zip((0.9, 1.1), NEEDED.items(), strict=True):
                draw_needed(axis, table[f"{group}, {QUANTITIES[quantity]}"]["needed"], side, look)
            axis.axhline(10, color="black", lw=0.8, ls=(0, (4, 2)))
            axis.set(xscale="log", xlabel="trajectories")
            axis.set_xticks(SIZES, SIZES)
            axis.minorticks_off()
        axes[-1, 1].text(SIZES[-1], 11.5, "the claim: 10", fontsize=7, ha="right")
        axes[-1, 0].plot([], [], "^", color=GREY, label="more than 500")
        axes[-1, 0].set(yscale="log", ylabel="times more that ITO needs", ylim=(0.25, 150))
        handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
        handles |= dict(zip(*reversed(axes[-1, 0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=150)


def draw_errors(axis: Axes, rows: list[dict], mu: dict, group: str, quantity: str) -> None:
    """Mean over seeds and its standard error."""
    columns = [LAGS.index(lag) for lag in GROUPS[group]]
    level = np.abs(np.array(mu[quantity])[columns]).mean()
    axis.axhline(level, color="black", lw=0.8, label="draws of μ, no dynamics")
    for side, (model, look) in zip((0.95, 1.05, 1, 1), LOOKS.items(), strict=True):
        if (model, quantity) != (DATA, "w1"):
            found = errors(rows, model, 0 if model == DATA else STEPS, group, quantity)
            error = found.std(1, ddof=1) / found.shape[1] ** 0.5
            x = side * np.array(sizes_of(found))
            axis.errorbar(x, found.mean(1), error, lw=1.2, elinewidth=0.8, label=model, **look)


def draw_needed(axis: Axes, needed: dict, side: float, look: dict) -> None:
    """Ratio with its 90 % interval; an arrow where 500 trajectories are not enough."""
    for n in (n for n in SIZES if n <= 50):
        value, (low, high), most = *(needed[str(n)][k] for k in ("needed", "interval_90")), 500 / n
        ends = [low or most, high or most]
        axis.plot([n * side] * 2, ends, color=look["color"], lw=0.9)
        if high is None:
            axis.plot(n * side, most, "^", ms=4, color=look["color"])
        if value is not None:
            axis.plot(n * side, value, ls="", **look)
    axis.plot([], [], ls="", **look)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--draw", action="store_true", help="draw the stored results again")
    options = parser.parse_args()
    figure = store.RESULTS / "data_efficiency.png"
    if options.draw:
        stored = json.loads(figure.with_suffix(".json").read_text())
        draw(stored["rows"], stored["mu"], stored["errors"], figure)
        return
    rows, mu = collect(options.workers), forgetful()
    table = summarised(rows, mu)
    report(table)
    settings = {
        "n_frames": N_FRAMES,
        "lag_max": LAG_MAX,
        "lambda_hat": LAMBDA_HAT,
        "lags": LAGS,
        "groups": GROUPS,
        "steps": STEPS,
        "width": 96,
        "batch": 1024,
        "n_seeds": N_SEEDS,
    }
    found = {"settings": settings, "errors": table, "mu": mu, "rows": rows}
    store.write("data_efficiency", SEED, found)
    draw(rows, mu, table, figure)
    PARTIAL.unlink()


if __name__ == "__main__":
    main()
