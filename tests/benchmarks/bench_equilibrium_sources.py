r"""Where can s_eq come from? Generators trained from several sources, against the exact density.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_equilibrium_sources.py     (36 CPU minutes)

Prinz, the double and the triple well, three seeds of data and training, one network, the same
training for all (batch 512, 4000 steps, width 64). Sources:

    unbiased          5,000 independent frames of mu, or 200
    umbrella          10 harmonic windows, 5,000 frames in all, or 50,000, MBAR weights
    tempering         5 temperatures from kT to 4 kT, exchanged, all walkers started in the deepest
                      well, 5,000 frames in all, MBAR weights
    wrong wells       5,000 frames of mu, those right of the highest barrier with 4 times the weight
    too hot           5,000 frames of 1.5 kT, without weights
    with forces       the same frames, and -grad U / kT of each: denoising and target score matching
    reweighted        10,000 frames of the generator of wrong wells, or of 200 frames with forces,
                      weighted by exp(-U / kT) / q, and a new one trained on them in the same way
    without limit     two million frames of mu: the error of the training alone

Measures of the density q of a generator, by quadrature on the grid of the exact operator, q from
the probability flow, so that there is no sampling noise:

    kl        KL(mu || q), nats
    ks        largest distance between the distribution functions
    ess       the ESS fraction of importance weights, 1 / E_mu[mu / q]

`weighted` has what `importance_sample` says of 10,000 frames: their ESS fraction, their KS distance
before and after weighting, and the KS distance 0.87 / sqrt(ESS) that as many independent frames of
mu have on average. `data_ks` is that of the (weighted) frames that a generator was trained on.

Rows go to results/equilibrium_sources.jsonl one by one: a run that was killed goes on from there.
Writes data/results/equilibrium_sources.json and .png.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
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
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.signal import argrelmax
from torch import Tensor

import bopito_inverse as bi
from bopito_inverse.datasets import Frames
from bopito_inverse.models import NetworkConfig, TrainingConfig
from bopito_inverse.plots import DOUBLE, GREY, OKABE_ITO, PALE, STYLE
from bopito_inverse.systems import DoubleWell, Potential1D, Prinz, TransferOperator, TripleWell

SEED, N_SEEDS = 0, 3
MANY, FEW, UNLIMITED, DRAWN = 5000, 200, 2_000_000, 10_000
WRONG, HOT = 4.0, 1.5
LATER = 5  # from the seed of a generator's frames to that of the next generator's
WINDOWS, LADDER, PER_WALKER = 10, np.geomspace(1, 4, 5), 10
CONFIG = TrainingConfig(steps=4000, batch_size=512, network=NetworkConfig(width=64))
SYSTEMS: dict[str, Callable[[], Potential1D]] = {
    "Prinz": Prinz,
    "double well": DoubleWell,
    "triple well": TripleWell,
}
MARGIN = 0.2  # of the bounds, on either side: frames of a generator may lie beyond them
KS_MEAN = 0.8687  # sqrt(n) times the mean KS distance of n independent frames
CURVES = ("wrong wells", "wrong wells, reweighted", "200 frames", "200 frames, forces")
PARTIAL = store.KEPT / "equilibrium_sources.jsonl"


@cache
def exact(name: str) -> TransferOperator:
    return TransferOperator(SYSTEMS[name]())


def wells(operator: TransferOperator) -> float:
    """Where the highest barrier is."""
    u = operator.system.energy(operator.grid)
    tops = argrelmax(u)[0]
    return float(operator.grid[tops[u[tops].argmax()]])


def umbrella(operator: TransferOperator, n: int, seed: int) -> Frames:
    """Windows one standard deviation apart, over what has more than 1e-5 of the highest density."""
    system = operator.system
    inside = operator.grid[operator.stationary > 1e-5 * operator.stationary.max()]
    centers = np.linspace(inside[0], inside[-1], WINDOWS)
    stiffness = system.kT / (centers[1] - centers[0]) ** 2
    length = {"n_walkers": n // WINDOWS // PER_WALKER, "burn_in": 200, "stride": 20}
    biased = bi.simulate.umbrella(
        system, centers, stiffness, n // WINDOWS, seed, device="cpu", **length
    )
    return Frames(biased.frames_flat, bi.simulate.mbar_weights(biased))


def tempering(operator: TransferOperator, n: int, seed: int) -> Frames:
    system, each = operator.system, n // len(LADDER)
    length = {"n_walkers": each // PER_WALKER, "burn_in": 400, "stride": 20}
    biased = bi.simulate.tempering(system, LADDER * system.kT, each, seed, device="cpu", **length)
    return Frames(biased.frames_flat, bi.simulate.mbar_weights(biased))


def draws(operator: TransferOperator, n: int, seed: int) -> Tensor:
    return operator.sample(n, torch.Generator().manual_seed(1000 + seed))


def wrong_wells(operator: TransferOperator, seed: int) -> Frames:
    x = draws(operator, MANY, seed)
    return Frames(x, torch.where(x[:, 0] > wells(operator), WRONG, 1.0))


def too_hot(operator: TransferOperator, seed: int) -> Frames:
    system = operator.system
    hot = Potential1D(system.energy, system.bounds, kT=HOT * system.kT)
    return Frames(draws(TransferOperator(hot), MANY, seed))


def reweighted(operator: TransferOperator, s_eq: torch.nn.Module, seed: int) -> Frames:
    """Frames of a generator, weighted to mu; `seed` is not that of any training frame."""
    system = operator.system
    return bi.sampling.importance_sample(
        s_eq, lambda x: system.energy(x.numpy()) / system.kT, DRAWN, seed, min_ess=1, device="cpu"
    )


def train(operator: TransferOperator, frames: Frames, forces: bool, seed: int) -> torch.nn.Module:
    system = operator.system
    g = system.force(frames.x) / system.kT if forces else None
    return bi.models.train_equilibrium(
        frames, config=CONFIG, seed=seed, device="cpu", forces=g
    ).eval()


def log_density(s_eq: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    return bi.sampling.log_likelihood(s_eq, x[:, None], device="cpu").numpy()


def measures(operator: TransferOperator, s_eq: torch.nn.Module) -> dict[str, float]:
    """KL, KS and ESS fraction by quadrature."""
    mu, h = operator.stationary * operator.spacing, operator.spacing
    margin = int(MARGIN * len(mu))
    low, high = (h * np.arange(1, margin + 1) for _ in range(2))
    x = np.concatenate([operator.grid[0] - low[::-1], operator.grid, operator.grid[-1] + high])
    log_q = log_density(s_eq, x)
    inside = slice(margin, margin + len(mu))
    cumulative = np.cumsum(np.exp(log_q))[inside] * h
    log_ratio = np.log(operator.stationary) - log_q[inside]
    return {
        "kl": float(mu @ log_ratio),
        "ks": float(np.abs(cumulative - np.cumsum(mu)).max()),
        "ess": float(1 / (mu @ np.exp(log_ratio))),
        "mass": float(np.exp(log_q).sum() * h),
    }


def distance(operator: TransferOperator, frames: Frames) -> float:
    """KS distance of weighted frames from mu."""
    x, order = frames.x[:, 0].double().sort()
    found = np.append(0, frames.weights[order].cumsum(0).numpy())
    cumulative = np.append(0, np.cumsum(operator.stationary) * operator.spacing)
    edges = np.append(operator.grid, operator.grid[-1] + operator.spacing) - operator.spacing / 2
    truth = np.interp(x.numpy(), edges, cumulative)
    return float(max(np.abs(found[1:] - truth).max(), np.abs(found[:-1] - truth).max()))


def sources(operator: TransferOperator, seed: int) -> Iterator[tuple[str, Frames, bool]]:
    """Name, frames, and whether their forces are used, of all that needs no generator."""
    many, few = (Frames(draws(operator, n, seed)) for n in (MANY, FEW))
    wrong, hot = wrong_wells(operator, seed), too_hot(operator, seed)
    yield "5,000 frames", many, False
    yield "umbrella", umbrella(operator, MANY, seed), False
    yield "umbrella, 50,000", umbrella(operator, 10 * MANY, seed), False
    yield "tempering", tempering(operator, MANY, seed), False
    yield "200 frames", few, False
    yield "200 frames, forces", few, True
    yield "wrong wells", wrong, False
    yield "wrong wells, forces", wrong, True
    yield "too hot", hot, False
    yield "too hot, forces", hot, True
    yield "without limit", Frames(draws(operator, UNLIMITED, seed)), False


LOOPS = {  # generators whose weighted frames train another one, and whether by forces, too
    "wrong wells": False,
    "200 frames, forces": True,
}


def run(name: str, seed: int) -> dict[str, Any]:
    """All sources of one system and seed."""
    torch.set_num_threads(1)
    operator = exact(name)
    row: dict[str, Any] = {"system": name, "seed": seed, "sources": {}, "curves": {}}
    for source, frames, forces in sources(operator, seed):
        s_eq = train(operator, frames, forces, seed)
        weighted = reweighted(operator, s_eq, seed)
        row["sources"][source] = judged(operator, s_eq, frames, weighted)
        keep_curve(row, source, operator, s_eq)
        if source in LOOPS:
            again = train(operator, weighted, LOOPS[source], seed)
            target = f"{source}, reweighted"
            row["sources"][target] = judged(
                operator, again, weighted, reweighted(operator, again, seed + LATER)
            )
            keep_curve(row, target, operator, again)
    return row


def judged(
    operator: TransferOperator, s_eq: torch.nn.Module, frames: Frames, weighted: Frames
) -> dict[str, Any]:
    """Everything about one generator; `frames` are those that it was trained on."""
    return measures(operator, s_eq) | {
        "data_ks": distance(operator, frames),
        "data_ess": frames.ess,
        "weighted": {
            "ess": weighted.ess / len(weighted),
            "ks_before": distance(operator, Frames(weighted.x)),
            "ks": distance(operator, weighted),
            "ks_of_independent": KS_MEAN / weighted.ess**0.5,
        },
    }


def keep_curve(
    row: dict[str, Any], source: str, operator: TransferOperator, s_eq: torch.nn.Module
) -> None:
    """The density of one seed, for the figure."""
    if row["seed"] == SEED and source in CURVES:
        row["curves"][source] = np.exp(log_density(s_eq, shown(operator))).round(3).tolist()


def shown(operator: TransferOperator) -> np.ndarray:
    """Positions of the curves in the figure."""
    inside = operator.grid[operator.stationary > 1e-3 * operator.stationary.max()]
    return np.linspace(inside[0] - 0.1, inside[-1] + 0.1, 150)


def collect(n_seeds: int, workers: int) -> list[dict[str, Any]]:
    """All rows, those of an earlier run that was killed included."""
    lines = PARTIAL.read_text().splitlines() if PARTIAL.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["system"], row["seed"]) for row in rows}
    jobs = [(name, SEED + i) for i in range(n_seeds) for name in SYSTEMS]
    PARTIAL.parent.mkdir(exist_ok=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, *job) for job in jobs if job not in done]
        for future in as_completed(futures):
            rows.append(future.result())
            with PARTIAL.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{len(rows)} of {len(jobs)}: {rows[-1]['system']}, seed {rows[-1]['seed']}")
            for source, found in rows[-1]["sources"].items():
                print(f"  {source:32s} " + numbers(found), flush=True)
    return sorted(rows, key=lambda row: ([*SYSTEMS].index(row["system"]), row["seed"]))


def numbers(found: dict[str, Any]) -> str:
    weighted = found["weighted"]
    return (
        f"KL {found['kl']:.4f}  KS {found['ks']:.4f}  ESS {found['ess']:.3f}  weighted: "
        f"ESS {weighted['ess']:.3f}  KS {weighted['ks_before']:.4f} to {weighted['ks']:.4f} "
        f"({weighted['ks_of_independent']:.4f})  data: KS {found['data_ks']:.4f}"
    )


def summarised(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean over seeds, and the standard deviation of kl, ks and ess."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name in SYSTEMS:
        own = [row["sources"] for row in rows if row["system"] == name]
        table[name] = {source: averaged([row[source] for row in own]) for source in own[0]}
    return table


def averaged(found: list[dict[str, Any]]) -> dict[str, float]:
    flat = [row | {f"weighted_{k}": v for k, v in row["weighted"].items()} for row in found]
    made = {key: float(np.mean([row[key] for row in flat])) for key in flat[0] if key != "weighted"}
    for key in ("kl", "ks", "ess"):
        made[f"{key}_sd"] = float(np.std([row[key] for row in found], ddof=1))
    return made


def rounded(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def report(table: dict[str, dict[str, dict[str, float]]]) -> None:
    for name, own in table.items():
        print(f"\n{name}")
        for source, v in own.items():
            print(
                f"  {source:32s} KL {v['kl']:.4f} +- {v['kl_sd']:.4f}  KS {v['ks']:.4f} +- "
                f"{v['ks_sd']:.4f}  ESS {v['ess']:.3f} +- {v['ess_sd']:.3f}  weighted KS "
                f"{v['weighted_ks']:.4f} (independent frames {v['weighted_ks_of_independent']:.4f})"
            )


PLAIN = {"color": OKABE_ITO["vermillion"], "marker": "o", "label": "frames alone"}
FORCES = {"color": OKABE_ITO["blue"], "marker": "s", "label": "frames and forces"}
AGAIN = {
    "color": OKABE_ITO["green"],
    "marker": "D",
    "label": "its own frames, weighted, trained again",
}
ROWS: dict[str, dict[str, dict[str, str]]] = {  # what is drawn in each row
    "5,000 frames of μ": {"5,000 frames": PLAIN},
    "umbrella, 5,000": {"umbrella": PLAIN},
    "umbrella, 50,000": {"umbrella, 50,000": PLAIN},
    "tempering, 5,000": {"tempering": PLAIN},
    "200 frames of μ": {
        "200 frames": PLAIN,
        "200 frames, forces": FORCES,
        "200 frames, forces, reweighted": AGAIN,
    },
    "wrong populations": {
        "wrong wells": PLAIN,
        "wrong wells, forces": FORCES,
        "wrong wells, reweighted": AGAIN,
    },
    "1.5 times too hot": {"too hot": PLAIN, "too hot, forces": FORCES},
}
DASHED = (0, (3, 1.5))
OFFSET = 0.25  # of variants in one row


@rc_context(STYLE)
def draw(found: dict[str, Any], path: Path) -> None:
    """KL of the generators, KS of their frames before and after weighting, and densities."""
    figure = Figure(figsize=(DOUBLE, 6.6), layout="constrained")
    axes = figure.subplots(3, len(SYSTEMS), height_ratios=[1, 1, 0.75])
    for column, name in zip(axes.T, SYSTEMS, strict=True):
        table = found["summary"][name]
        column[0].set_title(name, fontweight="bold")
        draw_divergences(column[0], table)
        draw_distances(column[1], table)
        draw_densities(column[2], exact(name), found["curves"][name])
        for ax in column[:2]:
            ax.set(xscale="log", ylim=(len(ROWS) - 0.5, -0.5))
            ax.set_yticks(range(len(ROWS)), list(ROWS) if ax in axes[:, 0] else [""] * len(ROWS))
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
    share(axes[0], "KL(μ‖q) of the generator / nats")
    share(axes[1], "KS distance of 10,000 of its frames: drawn (symbol), and weighted (bar)")
    axes[2, 0].set_ylabel("probability density")
    for ax in axes.ravel():
        ax.tick_params(labelsize=7.5, width=0.6)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    figure.legend(known.values(), known, loc="outside upper center", ncols=4)
    densities = [
        Patch(fc=PALE, ec="black", lw=0.8, label="exact density"),
        Line2D([], [], color=GREY, lw=1, label="200 frames of μ"),
        Line2D([], [], color=GREY, lw=1, ls=DASHED, label="wrong populations"),
        Line2D([], [], color=GREY, lw=1, ls=":", label="10,000 independent frames"),
    ]
    figure.legend(handles=densities, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def share(row: np.ndarray, label: str) -> None:
    """The same limits, and one label below the middle panel."""
    low, high = (f(ax.get_xlim()[i] for ax in row) for f, i in ((min, 0), (max, 1)))
    for ax in row:
        ax.set_xlim(low, high)
    row[len(row) // 2].set_xlabel(label)


def variants(table: dict[str, Any]) -> Iterator[tuple[float, dict[str, str], dict[str, float]]]:
    """Height in the panel, look and numbers of all that is drawn."""
    for y, row in enumerate(ROWS.values()):
        for i, (source, look) in enumerate(row.items()):
            yield y + OFFSET * (i - (len(row) - 1) / 2), look, table[source]


def stripes(ax: Axes) -> None:
    for y in range(0, len(ROWS), 2):
        ax.axhspan(y - 0.5, y + 0.5, color="#f5f5f5", lw=0, zorder=0)


def draw_divergences(ax: Axes, table: dict[str, Any]) -> None:
    stripes(ax)
    limit = table["without limit"]
    ax.axvline(limit["kl"], color=GREY, lw=1, ls="--", label="two million frames of μ")
    for y, look, row in variants(table):
        style = {"mec": "white", "mew": 0.5, "ms": 5, "elinewidth": 1, "ls": "none", "zorder": 3}
        low = min(row["kl_sd"], 0.7 * row["kl"])  # a logarithmic axis has no zero
        ax.errorbar(row["kl"], y, xerr=[[low], [row["kl_sd"]]], **look, **style)


def draw_distances(ax: Axes, table: dict[str, Any]) -> None:
    stripes(ax)
    ax.axvline(KS_MEAN / DRAWN**0.5, color=GREY, lw=1, ls=":")
    for y, look, row in variants(table):
        before, after = row["weighted_ks_before"], row["weighted_ks"]
        ax.plot([before, after], [y, y], color=look["color"], lw=1, zorder=2)
        ax.plot(before, y, marker=look["marker"], color=look["color"], ms=5, mec="white", mew=0.5)
        ax.plot(after, y, marker="|", color=look["color"], ms=7, mew=1.6)


def draw_densities(ax: Axes, operator: TransferOperator, curves: dict[str, list[float]]) -> None:
    x = shown(operator)
    ax.fill_between(operator.grid, operator.stationary, color=PALE, lw=0)
    ax.plot(operator.grid, operator.stationary, color="black", lw=0.8)
    for source, look, dashes in (
        ("200 frames", PLAIN, "-"),
        ("200 frames, forces", FORCES, "-"),
        ("wrong wells", PLAIN, DASHED),
        ("wrong wells, reweighted", AGAIN, DASHED),
    ):
        ax.plot(x, curves[source], color=look["color"], ls=dashes, lw=1)
    ax.set(xlim=(x[0], x[-1]), ylim=(0, None), xlabel="x")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=N_SEEDS)
    parser.add_argument("--draw", action="store_true", help="draw the stored results again")
    options = parser.parse_args()
    figure = store.RESULTS / "equilibrium_sources.png"
    if options.draw:
        draw(json.loads(figure.with_suffix(".json").read_text()), figure)
        return
    rows = collect(options.seeds, options.workers)
    table = summarised(rows)
    report(table)
    found = {
        "settings": CONFIG.model_dump() | {"n_seeds": options.seeds},
        "summary": table,
        "rows": [{k: v for k, v in row.items() if k != "curves"} for row in rows],
        "curves": {row["system"]: row["curves"] for row in rows if row["seed"] == SEED},
    }
    store.write("equilibrium_sources", SEED, rounded(found))
    draw(found, figure)
    PARTIAL.unlink()


if __name__ == "__main__":
    main()
