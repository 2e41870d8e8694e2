"""Efficient data generation: do trajectories that start from the Boltzmann generator pay?

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_starts.py            (about 10 CPU minutes)

Langevin trajectories on Prinz (slowest timescale 166.8 frames) start from frames of the shipped
s_eq, or all from x = 0.75: 5 to 1,500 of them, of 100, 500 or 1,000 frames, 20 independent seeds.
Direct sampling of the autocorrelation of x, all pairs of a lag in all trajectories, is compared
with the exact transfer operator. C is estimated as by a user who has the trajectories and nothing
else, C = Cov(x_0, x_lag) / sqrt(Var(x_0) Var(x_lag)), means and variances from the same pairs.

    generator       starts of `bi.sampling.generate`
    one structure   all starts at x = 0.75; also with the first half of each trajectory discarded

Lags go to 0.4 of a trajectory, which all three reach. The error is |C - exact|, its mean over
seeds, with its standard error; `mean_error` is its mean over the lags as well. `limit` is that of
infinitely many trajectories, by the exact operator, with no simulation (starts of the generator:
a histogram of 10^6 draws). `needed` is the number of trajectories from one structure that have the
`mean_error` of N from the generator, interpolated in log-log: `never` if the limit is above it.
`known mean` is the same table for C = E[(x_0 - m) (x_lag - m)] / v with the exact equilibrium mean
m and variance v, by which the estimate from equilibrium starts is unbiased for any number.

The generator is not free: the shipped s_eq was trained on 25 umbrella windows, 10^6 simulated
frames in all. Writes data/results/starts.json and starts.png.
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import store
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import bopito_inverse as bi
from bopito_inverse.observables import Correlation
from bopito_inverse.plots import DOUBLE, GREY, OKABE_ITO, STYLE
from bopito_inverse.systems import Prinz, TransferOperator

SEED, N_SEEDS = 0, 20
START = 0.75
LENGTHS = (100, 500, 1000)
SIZES = (5, 15, 50, 150, 500, 1500)
SHOWN = (5, 50, 500)
N_LAGS, LONGEST_LAG = 20, 0.4  # of a trajectory
GENERATED = 1_000_000
GENERATOR, ONE, LATE = "generator", "one structure", "one structure, first half discarded"
SOURCES = (GENERATOR, ONE, LATE)
ESTIMATED, KNOWN = "estimated mean", "known mean"
COLOURS = {GENERATOR: OKABE_ITO["green"], ONE: OKABE_ITO["orange"], LATE: OKABE_ITO["purple"]}
DASHES = ((0, (1, 1)), (0, (4, 1.5)), "-")  # of the sizes that are shown
LIMIT = (0, (1, 1.5))
MARKERS = {GENERATOR: "o", ONE: "s", LATE: "^"}


def lags_of(length: int) -> np.ndarray:
    """Lags at which correlations are compared."""
    return np.unique(np.linspace(1, LONGEST_LAG * length, N_LAGS).astype(int))


def s_eq() -> torch.nn.Module:
    return bi.models.load(store.DATA / "prinz" / "equilibrium.safetensors")


def simulated(length: int) -> dict[str, torch.Tensor]:
    """Trajectories of every seed, (N_SEEDS, max(SIZES), length, 1), by where they start."""
    n = N_SEEDS * max(SIZES)
    drawn = bi.sampling.generate(s_eq(), n, seed=SEED, device="cpu")
    starts = torch.cat([drawn, torch.full_like(drawn, START)])
    made = bi.simulate.langevin(Prinz(), starts, length, seed=SEED + length, device="cpu")
    return dict(zip((GENERATOR, ONE), made.frames.view(2, N_SEEDS, -1, length, 1), strict=True))


def run(length: int) -> dict:
    """Errors at one length of trajectories."""
    torch.set_num_threads(1)
    clock = time.perf_counter()
    exact, lags = TransferOperator(Prinz()), lags_of(length)
    truth = exact.correlation(lambda x: x, lags=lags, normalization="variance")
    frames = simulated(length)
    frames[LATE] = frames[ONE][:, :, length // 2 :]
    print(f"{length} frames: simulated, {time.perf_counter() - clock:.0f} s", flush=True)
    found: dict = {"lags": lags.tolist(), "exact": rounded(truth), ESTIMATED: {}, KNOWN: {}}
    for source, own in frames.items():
        sums, expected = pair_sums(own, lags), expected_moments(exact, source, length, lags)
        check(sums, own, lags)
        for name in (ESTIMATED, KNOWN):
            error = np.abs(correlation(sums, exact, name) - truth)
            limit = np.abs(correlation(expected, exact, name) - truth).mean()
            found[name][source] = summarised(error) | {"limit": round(float(limit), 5)}
        print(f"{length} frames, {source}: {time.perf_counter() - clock:.0f} s", flush=True)
    for name in (ESTIMATED, KNOWN):
        found[name]["needed"] = needed(found[name])
    return found


def pair_sums(frames: torch.Tensor, lags: np.ndarray) -> np.ndarray:
    """Means of x_0, x_lag, x_0^2, x_lag^2, x_0 x_lag over all pairs of the first trajectories.

    From (seeds, trajectories, length, 1), shape (5, sizes, seeds, lags).
    """
    made = []
    for x in frames[..., 0].double():  # of one seed
        pairs = [(x[:, : x.shape[1] - lag], x[:, lag:]) for lag in lags]
        each = [[m.mean(1) for m in (a, b, a * a, b * b, a * b)] for a, b in pairs]
        table = torch.stack([torch.stack(row) for row in each], dim=-1)  # (5, trajectories, lags)
        made.append(torch.stack([table[:, :size].mean(1) for size in SIZES], dim=1))
    return torch.stack(made, dim=2).numpy()


def correlation(moments: np.ndarray, exact: TransferOperator, estimator: str) -> np.ndarray:
    """C from the five means (5, ...), with the means of x estimated or known."""
    a, b, aa, bb, ab = moments
    if estimator == ESTIMATED:
        return (ab - a * b) / np.sqrt((aa - a * a) * (bb - b * b))
    mu = exact.stationary * exact.spacing
    mean = mu @ exact.grid
    return (ab - mean * (a + b) + mean**2) / (mu @ (exact.grid - mean) ** 2)


def check(sums: np.ndarray, frames: torch.Tensor, lags: np.ndarray) -> None:
    """The package's own estimate from a few of the trajectories is the same."""
    made = Correlation(lambda x: x, normalization="variance")
    own = correlation(sums[:, 1, 0], TransferOperator(Prinz()), ESTIMATED)
    np.testing.assert_allclose(
        own, made.from_trajectories(frames[0, : SIZES[1]], lags)[0], atol=1e-6
    )


def summarised(error: np.ndarray) -> dict:
    """Means over seeds with standard errors, from (sizes, seeds, lags); lags for SHOWN sizes."""
    root = error.shape[1] ** 0.5
    over_lags, at = error.mean(2), [SIZES.index(size) for size in SHOWN]
    return {
        "mean_error": rounded(over_lags.mean(1)),
        "mean_error_se": rounded(over_lags.std(1, ddof=1) / root),
        "error": rounded(error.mean(1)[at]),
        "error_se": rounded(error.std(1, ddof=1)[at] / root),
    }


def expected_moments(
    exact: TransferOperator, source: str, length: int, lags: np.ndarray
) -> np.ndarray:
    """The five means for infinitely many trajectories, by the exact operator, (5, lags)."""
    x, half = exact.grid, exact.spacing / 2
    edges = np.append(x - half, x[-1] + half)
    if source == GENERATOR:
        drawn = bi.sampling.generate(s_eq(), GENERATED, seed=SEED + 1, device="cpu")
        start = np.histogram(drawn.numpy(), edges)[0] / GENERATED
    else:
        start = (np.arange(len(x)) == np.searchsorted(edges, START) - 1).astype(float)
    density, one_frame = [start], exact.transition_density(1) * exact.spacing
    for _ in range(length - 1):
        density.append(density[-1] @ one_frame)
    kept = np.array(density[length // 2 if source == LATE else 0 :])
    made = []
    for lag in lags:
        now, later = kept[: len(kept) - lag].mean(0), kept[lag:].mean(0)
        follows = exact.transition_density(lag) @ x * exact.spacing  # E[x_lag | x_0]
        made.append([now @ x, later @ x, now @ x**2, later @ x**2, now @ (x * follows)])
    return np.array(made).T


def needed(found: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Trajectories from one structure that have the error of N from the generator."""
    target = found[GENERATOR]["mean_error"]
    return {
        source: {str(n): count(found[source], goal) for n, goal in zip(SIZES, target, strict=True)}
        for source in (ONE, LATE)
    }


def count(found: dict, goal: float) -> str:
    """The number of trajectories at which `found` first has the error `goal`."""
    error = found["mean_error"]
    if found["limit"] > goal:
        return "never"
    reached = [i for i, e in enumerate(error) if e <= goal]
    if not reached:
        return f"> {SIZES[-1]}"
    last = reached[0]
    if last == 0:
        return f"<= {SIZES[0]}"
    log_n, log_e = np.log(SIZES[last - 1 : last + 1]), np.log(error[last - 1 : last + 1])
    return f"{np.exp(np.interp(-np.log(goal), -log_e, log_n)):.0f}"


def rounded(values: np.ndarray) -> list:
    return np.round(values, 5).tolist()


@rc_context(STYLE)
def draw(found: dict, slowest: float) -> Figure:
    """Above, the error over lag for a few sizes; below, its mean over lags and all sizes."""
    figure = Figure(figsize=(DOUBLE, 5.0), layout="constrained")
    axes = figure.subplots(2, len(LENGTHS), sharey="row")
    for column, (length, own) in enumerate(found.items()):
        over_lags(axes[0, column], own)
        over_sizes(axes[1, column], own)
        times = f"{int(length) / slowest:.1f}"
        axes[0, column].set_title(f"trajectories of {length} frames\n{times} slowest timescales")
    axes[0, 0].set_ylabel("|ΔC(lag)|, autocorrelation of x")
    axes[1, 0].set_ylabel("|ΔC|, mean over lags")
    dashes = [Line2D([], [], color=GREY, ls=dash) for dash in DASHES]
    limit = Line2D([], [], color=GREY, ls=LIMIT, lw=0.9)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    handles += [*dashes, limit]
    labels = [f"starts: {label}" for label in labels]
    labels += [f"{size} trajectories" for size in SHOWN]
    labels += ["infinitely many (exact operator)"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def over_lags(ax: Axes, own: dict) -> None:
    lags = own["lags"]
    for source in (GENERATOR, ONE):
        rows, color = own[ESTIMATED][source], COLOURS[source]
        pairs = map(np.array, (rows["error"], rows["error_se"]))
        for mean, se, dash in zip(*pairs, DASHES, strict=True):
            ax.plot(lags, mean, color=color, ls=dash)
            ax.fill_between(lags, mean - se, mean + se, color=color, alpha=0.18, lw=0)
    ax.set_yscale("log")
    ax.set_xlabel("lag / frames")
    ax.set_xlim(0, lags[-1])


def over_sizes(ax: Axes, own: dict) -> None:
    for source in SOURCES:
        rows, color = own[ESTIMATED][source], COLOURS[source]
        look = {"color": color, "marker": MARKERS[source], "capsize": 2}
        ax.errorbar(SIZES, rows["mean_error"], rows["mean_error_se"], label=source, **look)
        ax.axhline(rows["limit"], color=color, ls=LIMIT, lw=0.9, zorder=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(1e-3, 0.6)
    ax.set_xticks(SHOWN, [str(size) for size in SHOWN])
    ax.set_xlabel("number of trajectories")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    workers = parser.parse_args().workers
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        made = dict(zip(map(str, LENGTHS), pool.map(run, LENGTHS), strict=True))
    report(made)
    slowest = float(TransferOperator(Prinz()).timescales[0])
    about = {"n_seeds": N_SEEDS, "sizes": SIZES, "shown": SHOWN, "slowest_timescale": slowest}
    store.write("starts", SEED, about | {"frames": made})
    draw(made, slowest).savefig(store.RESULTS / "starts.png", dpi=150)


def report(made: dict) -> None:
    for length, own in made.items():
        for name in (ESTIMATED, KNOWN):
            print(f"\n{length} frames, {name}; trajectories {SIZES}")
            for source in SOURCES:
                rows = own[name][source]
                cells = zip(rows["mean_error"], rows["mean_error_se"], strict=True)
                text = "  ".join(f"{e:.4f}±{se:.4f}" for e, se in cells)
                print(f"  {source:36s} {text}  limit {rows['limit']:.4f}")
            for source, counts in own[name]["needed"].items():
                print(f"  needed, {source}: {counts}")


if __name__ == "__main__":
    main()
