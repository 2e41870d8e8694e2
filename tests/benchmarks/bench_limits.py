"""Limits: long lags forget x_0; lambda_hat from data; what lambda_hat does to a trained model.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_limits.py            (about 25 CPU minutes)

*Forgetting.* Frames by one move from five x_0 (wells, the barrier, a rare frame at -1.1), by
`Interpolate` and `Renoise`, n_int from 1 to 100 lag_max, w = lambda_hat^(n_int - lag_max):
Kolmogorov-Smirnov distance from s_eq. `ks` is free of noise: both sets have the same 4,096 noise
quantiles, and distances below 0.001 are not resolved. `independent` draws 20,000 independent
frames of each, at 10 and 100 lag_max; its floor is the distance of as many independent frames of
one distribution. `dynamics` is the distance of the exact transition density at n_int frames
from mu.

    shipped         trained, lag_max 50, lambda_hat 0.99, no crossing of x = 0 in its data
    exact scores    of the full dynamics, lag_max 50, lambda_hat = exp(-1 / 166.8)

*lambda_hat from data.* `bi.observables.implied_timescale` over lag: 1,000 trajectories of 500
frames from equilibrium, 4,000 of 100 frames that all start at x = 0.75, and the shipped biased
data, where the slowest process is missing.

*Sensitivity.* BoPITO trained on the first of these with lambda_hat from far too small to too
large, and from the data (shipped s_eq, lag_max 200, width 64, batch 1,024, 3,000 steps, 3 seeds of
data and training): errors of one step against the exact operator up to lag_max, of the interpolator
at n_int = 400 and 800 frames (the physical lag, where lambda_hat is right), and
Chapman-Kolmogorov, T(200) in one draw against two of T(100).

Rows are kept in results/limits.jsonl: a run that was killed goes on from there. Writes
data/results/limits.json and limits.png.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context

import numpy as np
import store
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from one_step import against_exact
from scipy.stats import ks_2samp

import bopito_inverse as bi
from bopito_inverse.datasets import Trajectories
from bopito_inverse.models import BoPITOScore, NetworkConfig, TrainingConfig
from bopito_inverse.plots import DOUBLE, GREY, OKABE_ITO, STYLE
from bopito_inverse.sampling import DPMSolver, Interpolate, Propagate, Renoise, Rollout
from bopito_inverse.sampling.rollout import Move
from bopito_inverse.systems import Prinz, TransferOperator

SEED = 0
ROWS = store.KEPT / "limits.jsonl"
SHIPPED, EXACT = "shipped", "exact scores"
COLOURS = [OKABE_ITO[name] for name in ("green", "orange", "purple", "sky")]
MODELS = {SHIPPED: OKABE_ITO["orange"], EXACT: OKABE_ITO["green"]}
X_0 = (-1.1, -0.7, 0.0, 0.3, 0.75)
FACTORS = (1, 2, 3, 5, 10, 20, 50, 100)  # n_int in units of lag_max
FAR = (10, 100)
N_LEVELS, N_INDEPENDENT, N_FLOOR = 4096, 20_000, 1000
GRID = 200  # of exact scores
MOVES: dict[str, Callable[[], Move]] = {"interpolate": Interpolate, "renoise": Renoise}

START = 0.75
DATA_SETS = {
    "equilibrium": "equilibrium starts",
    "one structure": "one structure, short",
    "cut": "no crossing in the data",
}
LAGS_OF_DATA = (5, 10, 20, 40, 80, 160)

SHADES = ("#440154", "#3b528b", "#21918c", "#5ec962", "#e3c800", "#000000")
LAMBDAS = ("0.9", "0.97", "0.99", "0.994", "0.999", "data")
SEEDS, LAG_MAX, LAG_FOR_LAMBDA = (0, 1, 2), 200, 50
LAGS = (5, 10, 25, 50, 100, 150, 200)
BEYOND = (400, 800)
CONFIG = TrainingConfig(steps=3000, batch_size=1024, network=NetworkConfig(width=64))


@cache
def exact() -> TransferOperator:
    return TransferOperator(Prinz())


@cache
def s_eq() -> torch.nn.Module:
    return bi.models.load(store.DATA / "prinz" / "equilibrium.safetensors")


@cache
def model(name: str) -> bi.Interpolator:
    if name == SHIPPED:
        return bi.Interpolator(bi.models.load(store.DATA / "prinz" / "bopito.safetensors"))
    operator = TransferOperator(Prinz(), grid_size=GRID)
    lambda_hat = math.exp(-1 / operator.timescales[0])
    score = operator.equilibrium_score()
    dynamic = operator.dynamic_score(score, lambda_hat)
    return bi.Interpolator(BoPITOScore(score, dynamic, lambda_hat, lag_max=50))


def moved(
    own: bi.Interpolator, move: Move, x_0: float, n_int: float, z: torch.Tensor
) -> np.ndarray:
    """Frames by one move from x_0, for noise z (n, 1)."""
    with torch.no_grad():
        y = own.scaling.standardise(torch.full_like(z, x_0))
        parts = [
            move(own, a, torch.tensor(float(n_int)), DPMSolver(), lambda like, b=b: b)
            for a, b in zip(y.split(4096), z.split(4096), strict=True)
        ]
        return own.scaling.restore(torch.cat(parts))[:, 0].numpy()


def equilibrium(own: bi.Interpolator, z: torch.Tensor) -> np.ndarray:
    """Frames of s_eq for noise z: what the interpolator gives at infinite n_int."""
    return moved(own, Interpolate(), 0.0, math.inf, z)


def forgetting(name: str, kind: str) -> dict:
    """Distances from s_eq after one move."""
    own, move = model(name), MOVES[kind]()
    levels = (torch.arange(N_LEVELS, dtype=torch.float64) + 0.5) / N_LEVELS
    z = torch.special.ndtri(levels).float()[:, None]
    reference = equilibrium(own, z)
    n_int = [factor * own.lag_max for factor in FACTORS]
    weight = own.weight(torch.tensor(n_int, dtype=torch.float64)).tolist()
    ks = [[distance(moved(own, move, x, n, z), reference) for n in n_int] for x in X_0]
    return {"weight": weight, "ks": rounded(ks), "independent": independent(own, move)}


def independent(own: bi.Interpolator, move: Move) -> dict:
    """The same by independent frames, with what as many frames of s_eq give."""
    generator = torch.Generator().manual_seed(SEED)

    def noise() -> torch.Tensor:
        return torch.randn(N_INDEPENDENT, 1, generator=generator)

    reference = equilibrium(own, noise())
    rng = np.random.default_rng(SEED)  # the distance does not depend on the distribution
    floor = [distance(*rng.random((2, N_INDEPENDENT))) for _ in range(N_FLOOR)]
    found = {
        str(factor): [
            distance(moved(own, move, x, factor * own.lag_max, noise()), reference) for x in X_0
        ]
        for factor in FAR
    }
    return {
        "floor_mean": round(float(np.mean(floor)), 5),
        "floor_99": round(float(np.quantile(floor, 0.99)), 5),
        "ks": {factor: rounded(values) for factor, values in found.items()},
    }


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(ks_2samp(a, b, method="asymp").statistic)


def dynamics() -> dict:
    """Distance of the exact transition density at n_int frames from mu."""
    mu, found = np.cumsum(exact().stationary) * exact().spacing, []
    rows = [int(np.abs(exact().grid - x).argmin()) for x in X_0]
    for factor in FACTORS:
        density = exact().transition_density(factor * 50)[rows] * exact().spacing
        found.append(np.abs(np.cumsum(density, axis=1) - mu).max(1))
    return {"ks": rounded(np.array(found).T)}


@cache
def data(seed: int) -> Trajectories:
    """1,000 trajectories from equilibrium."""
    starts = exact().sample(1000, torch.Generator().manual_seed(SEED + seed))
    return bi.simulate.langevin(Prinz(), starts, 500, seed=SEED + seed, device="cpu")


def from_data(name: str) -> dict:
    """Implied timescales of one set of trajectories."""
    if name == "equilibrium":
        trajectories = data(0)
    elif name == "one structure":
        starts = torch.full((4000, 1), START)
        trajectories = bi.simulate.langevin(Prinz(), starts, 100, seed=SEED, device="cpu")
    else:
        trajectories = Trajectories.read(store.DATA / "prinz" / "biased.npz")
    longest = int(trajectories.lengths.max())
    rows = []
    for lag in [lag for lag in LAGS_OF_DATA if lag < 0.9 * longest]:
        found = bi.observables.implied_timescale(trajectories, lag)
        row = {"lag": lag, "value": found.value, "error": found.error, "lower": found.lower}
        rows.append({k: v if math.isfinite(v) else None for k, v in row.items()})
        rows[-1] |= {"status": found.status, "statement": found.statement}
    return {"rows": rows}


def sensitivity(label: str, seed: int) -> dict:
    """A model trained with one lambda_hat, against the exact operator."""
    trajectories = data(seed)
    found = bi.observables.implied_timescale(trajectories, LAG_FOR_LAMBDA)
    lambda_hat = math.exp(-1 / found.value) if label == "data" else float(label)
    clock = time.perf_counter()
    bopito = bi.models.train_bopito(
        trajectories, s_eq(), LAG_MAX, lambda_hat, CONFIG, seed, device="cpu"
    )
    row: dict = {"lambda_hat": lambda_hat, "training_s": round(time.perf_counter() - clock, 1)}
    rng = np.random.default_rng([SEED, seed])
    row["within"] = [against(bopito, lag, rng) for lag in LAGS]
    row["beyond"] = [against(bi.Interpolator(bopito), lag, rng) for lag in BEYOND]
    starts = exact().sample(20_000, torch.Generator().manual_seed(SEED + 100 + seed))
    step = Rollout([Propagate(LAG_MAX // 2)], LAG_MAX // 2)
    checked = bi.diagnostics.chapman_kolmogorov(
        bopito, step, LAG_MAX, starts, 2, n_replicas=20_000, seed=seed, device="cpu"
    )
    row["consistency"] = [round(checked.consistency.excess, 5), round(checked.consistency.error, 5)]
    row["timescales"] = [round(t, 2) if math.isfinite(t) else None for t in checked.timescales]
    row["consistency_status"] = str(checked.consistency_status)
    return row


def against(score: torch.nn.Module, lag: float, rng: np.random.Generator) -> dict[str, float]:
    return {k: round(v, 5) for k, v in against_exact(score, exact(), lag, rng).items()}


def between_quartiles(lag: int = LAG_MAX) -> float:
    """The timescale that Chapman-Kolmogorov would find with the exact operator, by its sets."""
    mu = exact().stationary * exact().spacing
    label = np.searchsorted([0.25, 0.5, 0.75], np.cumsum(mu))
    member = np.eye(4)[label]
    joint = member.T @ (mu[:, None] * exact().transition_density(lag)) @ member * exact().spacing
    second = np.sort(np.linalg.eigvals(joint / joint.sum(1, keepdims=True)).real)[-2]
    return float(-lag / np.log(second))


JOBS: dict[str, tuple[Callable[..., dict], tuple]] = {
    "dynamics": (dynamics, ()),
    **{
        f"forgetting, {name}, {kind}": (forgetting, (name, kind))
        for name in MODELS
        for kind in MOVES
    },
    **{f"data, {name}": (from_data, (name,)) for name in DATA_SETS},
    **{f"{label}, {seed}": (sensitivity, (label, seed)) for seed in SEEDS for label in LAMBDAS},
}


def run(name: str) -> tuple[str, dict]:
    torch.set_num_threads(1)
    function, arguments = JOBS[name]
    return name, function(*arguments)


def rounded(values: Iterable) -> list:
    return np.round(np.asarray(values), 5).tolist()


def finished() -> dict[str, dict]:
    """Rows of an earlier run."""
    if not ROWS.exists():
        return {}
    return dict(json.loads(line) for line in ROWS.read_text().splitlines())


def compute(workers: int) -> dict[str, dict]:
    rows = finished()
    missing = [name for name in JOBS if name not in rows]
    ROWS.parent.mkdir(exist_ok=True)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, ROWS.open("a") as file:
        for future in as_completed([pool.submit(run, name) for name in missing]):
            name, row = future.result()
            rows[name] = row
            print(json.dumps([name, row]), file=file, flush=True)
            print(name, json.dumps(row)[:300], flush=True)
    return rows


def gathered(rows: dict[str, dict]) -> dict:
    """What is kept: rows in their order, and means of the trained models over seeds."""
    forgetting = {
        name: {kind: rows[f"forgetting, {name}, {kind}"] for kind in MOVES} for name in MODELS
    }
    runs = {label: [rows[f"{label}, {seed}"] for seed in SEEDS] for label in LAMBDAS}
    return {
        "forgetting": {
            "x_0": X_0,
            "factors": FACTORS,
            "dynamics": rows["dynamics"]["ks"],
            **forgetting,
        },
        "lambda_hat_from_data": {name: rows[f"data, {name}"]["rows"] for name in DATA_SETS},
        "exact_timescale": float(exact().timescales[0]),
        "exact_timescale_between_quartiles": between_quartiles(),
        "sensitivity": {
            "lags": LAGS,
            "beyond": BEYOND,
            "summary": {label: summarised(own) for label, own in runs.items()},
            "runs": runs,
        },
    }


def summarised(runs: list[dict]) -> dict:
    """Means over seeds of absolute errors, with standard errors."""
    root = len(runs) ** 0.5
    made: dict = {"lambda_hat": round(float(np.mean([run["lambda_hat"] for run in runs])), 5)}
    for part in ("within", "beyond"):
        for key in ("x", "x>0", "w1"):
            values = np.abs([[row[key] for row in run[part]] for run in runs])
            made[f"{part} {key}"] = rounded(values.mean(0))
            made[f"{part} {key} se"] = rounded(values.std(0, ddof=1) / root)
    for key in ("consistency", "timescales"):
        values = np.array([run[key] for run in runs], dtype=float)  # None becomes NaN
        made[key] = rounded(values.mean(0))
        made[f"{key} sd"] = rounded(values.std(0, ddof=1))
    return made


def report(found: dict) -> None:
    own = found["forgetting"]
    at = [FACTORS.index(factor) for factor in (1, *FAR)]
    for name in MODELS:
        for kind in MOVES:
            rows = own[name][kind]
            print(f"\n{name}, {kind}: KS from s_eq at n_int / lag_max of 1, 10, 100")
            print("  w", [f"{rows['weight'][i]:.2g}" for i in at])
            for x, ks in zip(X_0, rows["ks"], strict=True):
                print(f"  x_0 = {x:5.2f}  {[f'{ks[i]:.4f}' for i in at]}")
            print(f"  independent frames {rows['independent']}")
    print("\nexact dynamics", [[f"{row[i]:.4f}" for i in at] for row in own["dynamics"]])
    for name, rows in found["lambda_hat_from_data"].items():
        print(f"\n{name}")
        for row in rows:
            print(f"  {row['statement']}")
    print(f"\nlags {LAGS}, beyond {BEYOND}")
    for label, own in found["sensitivity"]["summary"].items():
        print(f"lambda_hat {label} ({own['lambda_hat']})")
        for key, value in own.items():
            print(f"  {key:14s} {value}")


@rc_context(STYLE)
def draw(found: dict) -> Figure:
    """Forgetting, lambda_hat from data, and sensitivity to lambda_hat."""
    figure = Figure(figsize=(DOUBLE, 4.9), layout="constrained")
    axes = figure.subplots(2, 3)
    for ax, name in zip(axes[0, :2], MODELS, strict=True):
        draw_forgetting(ax, found["forgetting"], name)
    draw_from_data(axes[0, 2], found)
    own = found["sensitivity"]["summary"]
    draw_one_step(axes[1, 0], own)
    draw_beyond(axes[1, 1], own)
    draw_timescales(axes[1, 2], own, found["exact_timescale_between_quartiles"])
    for ax, letter in zip(axes.flat, "abcdef", strict=True):
        ax.set_title(f"{letter}  {ax.get_title()}", loc="left", fontsize=7.5)
        ax.set_title("")
    return figure


def draw_forgetting(ax: Axes, own: dict, name: str) -> None:
    floor = 4 / N_LEVELS
    for kind, color in zip(MOVES, COLOURS, strict=False):
        rows = np.array(own[name][kind]["ks"])
        ax.fill_between(FACTORS, rows.min(0), rows.max(0), color=color, alpha=0.3, lw=0)
        ax.plot(FACTORS, rows.max(0), color=color, lw=1.2, label=kind.capitalize())
    if name == EXACT:
        rows = np.array(own["dynamics"])
        worst = np.where(rows.max(0) > 0, rows.max(0), np.nan)
        ax.plot(FACTORS, worst, color="black", ls=(0, (4, 2)), label="exact dynamics")
    weight = own[name][next(iter(MOVES))]["weight"]
    ax.plot(FACTORS, weight, color=GREY, ls=(0, (1, 1.5)), label="w")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(1, 50)
    ax.set_ylim(floor, 1.2)
    ax.set_xticks([1, 10], ["1", "10"])
    ax.set_xlabel("n_int / lag_max")
    ax.set_ylabel("KS distance from s_eq")
    ax.set_title(f"{name}: five x_0 (line: worst)")
    ax.legend(loc="lower left", handlelength=1.6)


def draw_from_data(ax: Axes, found: dict) -> None:
    ax.axhline(found["exact_timescale"], color="black", lw=0.8)
    for (name, label), color in zip(DATA_SETS.items(), COLOURS[1:], strict=False):
        rows = found["lambda_hat_from_data"][name]
        seen = [row for row in rows if row["value"] is not None]
        value, error = ([row[key] for row in seen] for key in ("value", "error"))
        lag = [row["lag"] for row in seen]
        ax.errorbar(lag, value, error, color=color, capsize=2, label=label)
        for row in seen:
            face = color if row["status"] == "ok" else "white"
            ax.plot(row["lag"], row["value"], "o", color=color, mfc=face, ms=4)
        unseen = [(row["lag"], row["lower"]) for row in rows if row["value"] is None]
        if unseen:
            ax.plot(*np.transpose(unseen), "^", color=color, mfc="none", ms=5)
    ax.plot([], [], "o", color=GREY, mfc="white", label="not levelled off")
    ax.plot([], [], "^", color=GREY, mfc="none", label="not seen: lower bound")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(30, 3e7)
    ax.set_xlabel("lag / frames")
    ax.set_ylabel("implied timescale / frames")
    ax.set_title("timescale from trajectories")
    ax.legend(loc="upper left", handlelength=1.2, fontsize=6.5)


def draw_one_step(ax: Axes, own: dict) -> None:
    for (label, row), color in zip(own.items(), SHADES, strict=True):
        look = {"color": color, "marker": "o", "ms": 3, "lw": 1.1}
        mean, se = np.array(row["within x"]), np.array(row["within x se"])
        name = f"data: {row['lambda_hat']:.3f}" if label == "data" else label
        if label == "data":
            look |= {"ls": (0, (1, 1.5))}
        ax.plot(LAGS, mean, label=name, **look)
        ax.errorbar(LAGS, mean, se, fmt="none", color=color, capsize=2, lw=0.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(8e-4, 8)
    ax.set_xlabel("lag / frames")
    ax.set_ylabel("|error of C(x)|, one step")
    ax.set_title("trained with lambda_hat of")
    ax.legend(handlelength=1.6, ncols=2, loc="upper left", columnspacing=1)


def assumed(own: dict) -> np.ndarray:
    """The timescale that each lambda_hat assumes, in frames."""
    return np.array([-1 / math.log(row["lambda_hat"]) for row in own.values()])


def over_lambda(ax: Axes, own: dict, key: str, se: str, i: int, **look: str) -> None:
    """One quantity over the assumed timescale; the lambda_hat from data as an open diamond."""
    x = assumed(own)
    mean, error = (np.array([row[k][i] for row in own.values()]) for k in (key, se))
    ax.errorbar(x[:-1], mean[:-1], error[:-1], ms=3.5, capsize=2, **look)
    ax.plot(x[-1], mean[-1], "D", color=look["color"], mfc="white", ms=5)
    ax.set_xscale("log")
    ax.set_xlabel("assumed timescale / frames")


def draw_beyond(ax: Axes, own: dict) -> None:
    for i, (lag, color) in enumerate(zip(BEYOND, COLOURS, strict=False)):
        look = {"color": color, "marker": "os"[i], "label": f"n_int = {lag}"}
        over_lambda(ax, own, "beyond x", "beyond x se", i, **look)
        truth = float(exact().correlation(lambda x: x, lags=lag, normalization="variance"))
        ax.axhline(truth, color=color, ls=(0, (1, 1.5)), lw=0.8)
    ax.plot([], [], color=GREY, ls=(0, (1, 1.5)), lw=0.8, label="exact C itself")
    ax.axvline(exact().timescales[0], color="black", lw=0.6)
    ax.set_yscale("log")
    ax.set_ylim(1e-4, 8)
    ax.set_ylabel("|error of C(x)|, interpolator")
    ax.set_title("beyond lag_max, n_int = lag")
    ax.legend(handlelength=1.6, loc="upper left")


def draw_timescales(ax: Axes, own: dict, truth: float) -> None:
    ax.axhline(truth, color="black", lw=0.8, label="exact, by the same sets")
    ax.axvline(exact().timescales[0], color="black", lw=0.6)
    for i, name in enumerate(("T(200)", "T(100) twice")):
        look = {"color": COLOURS[i], "marker": "os"[i], "label": name}
        over_lambda(ax, own, "timescales", "timescales sd", i, **look)
    ax.plot([], [], "D", color=GREY, mfc="white", ms=5, label="lambda_hat from data")
    ax.set_ylim(0, 260)
    ax.set_ylabel("slowest timescale / frames")
    ax.set_title("Chapman-Kolmogorov")
    ax.legend(handlelength=1.6, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    found = gathered(compute(parser.parse_args().workers))
    report(found)
    store.write("limits", SEED, found)
    draw(found).savefig(store.RESULTS / "limits.png", dpi=140)


if __name__ == "__main__":
    main()
