"""BoPITO and ITO trained on unbiased Prinz data, beside the official BoPITO code.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_prinz_bopito.py                 (10 minutes)
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_prinz_bopito.py --longer 10000  (10 more)

The peer's workload: 5,000 trajectories of 2,000 frames from equilibrium, lag_max 1000, batch 4096,
3,000 optimiser steps for s_eq and 3,500 each for BoPITO and ITO; `--longer` adds a BoPITO of so
many steps to what is stored. Errors are of one step against the exact operator: C(lag) of x
normalised by its variance, and the conditional Wasserstein distance W1, by a 256 x 256 rank grid
with four random shifts (`quadrature_error` is the standard error over them, largest over the lags).
Training times are those of the whole call, wall and CPU; ratios and sampling speeds (batch 4096)
use CPU time, which hardly feels other programs: our one thread against the two of the peer.

Ratios are the peer's figure over ours, or ours over the peer's for speed: above 1 is better here.
Its errors are Monte Carlo estimates with the standard errors in PEER; that of its ancestral
sampling (0.0145 and 0.0152, standard error 0.015) is little more than this noise.

Writes data/results/prinz_bopito.json and prinz_bopito.png.
"""

import argparse
import json
import time
from collections.abc import Callable
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
from bopito_inverse.models import BoPITOScore, EquilibriumScore, ITOScore, TrainingConfig
from bopito_inverse.plots import DOUBLE, GREY, OKABE_ITO, STYLE
from bopito_inverse.sampling import DPMSolver
from bopito_inverse.systems import Prinz, TransferOperator

Score = BoPITOScore | ITOScore
LAGS = np.array([10, 25, 50, 75, 100, 200, 300, 500, 750, 1000])
SEED, RANKS, SHIFTS, EVALUATIONS = 0, 256, 4, 20
LAG_MAX, LAMBDA_HAT, LONGER = 1000, 0.994, "BoPITO, longer"
LOOKS: dict[str, dict[str, Any]] = {
    "s_eq": {"color": "black", "marker": "D"},
    "ITO": {"color": OKABE_ITO["vermillion"], "marker": "o"},
    "BoPITO": {"color": OKABE_ITO["blue"], "marker": "s"},
}
SAMPLERS = {"ode": "its ODE sampler", "ancestral": "its ancestral"}
RATIOS = {
    "samples_per_second": "samples/s",
    "mean_abs_error": "mean |error of C|",
    "mean_w1": "mean W₁",
}

# olsson-group/bopito, f169f16, on this workload and the same kind of machine: 2 shared cores, no
# GPU, torch 2.13, 2 threads, wall time. Hidden width 256. "ancestral" is its own sampler with 499
# evaluations, "ode" its ODE solver as shipped with 50; errors over the same ten lags.
PEER: dict[str, dict[str, Any]] = {
    "s_eq": {"step_s": 0.043, "steps": 3000, "parameters": 197_377},
    "ITO": {
        "step_s": 0.077,
        "steps": 3500,
        "parameters": 328_449,
        "ancestral": {"mean": 0.0145, "worst": 0.049, "se": 0.015, "w1": 0.020, "rate": 119},
        "ode": {"mean": 0.039, "worst": 0.085, "se": 0.007, "w1": 0.053, "rate": 1767},
    },
    "BoPITO": {
        "step_s": 0.089,
        "steps": 3500,
        "parameters": 328_449,
        "ancestral": {"mean": 0.0152, "worst": 0.055, "se": 0.015, "w1": 0.018, "rate": 109},
        "ode": {"mean": 0.030, "worst": 0.081, "se": 0.007, "w1": 0.057, "rate": 1436},
    },
}


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, its wall time and its CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = call()
    return made, time.perf_counter() - wall, time.process_time() - cpu


class Workload:
    """The peer's data, and the training of each model on it."""

    def __init__(self) -> None:
        self.exact = TransferOperator(Prinz())
        starts = self.exact.sample(5000, torch.Generator().manual_seed(SEED))
        self.trajectories, self.simulation_s, _ = timed(
            lambda: bi.simulate.langevin(Prinz(), starts, 2000, seed=SEED, device="cpu")
        )
        print(f"simulated in {self.simulation_s:.0f} s", flush=True)

    def s_eq(self, steps: int) -> tuple[EquilibriumScore, dict]:
        frames = self.trajectories.frames
        return took(
            lambda: bi.models.train_equilibrium(frames, None, at(steps), SEED, device="cpu"), steps
        )

    def ito(self, steps: int) -> tuple[ITOScore, dict]:
        arguments = (self.trajectories, LAG_MAX, at(steps), SEED)
        return took(lambda: bi.models.train_ito(*arguments, device="cpu"), steps)

    def bopito(self, steps: int, s_eq: EquilibriumScore) -> tuple[BoPITOScore, dict]:
        arguments = (self.trajectories, s_eq, LAG_MAX, LAMBDA_HAT, at(steps), SEED)
        return took(lambda: bi.models.train_bopito(*arguments, device="cpu"), steps)

    def data_error(self) -> np.ndarray:
        """Of C(x) as the trajectories themselves have it."""
        truth = self.exact.correlation(lambda x: x, lags=LAGS, normalization="variance")
        x = bi.observables.Correlation(lambda x: x, normalization="variance")
        return x.from_trajectories(self.trajectories, LAGS)[0].numpy() - truth


def at(steps: int) -> TrainingConfig:
    return TrainingConfig(steps=steps)


def took(call: Callable[[], Any], steps: int) -> tuple[Any, dict]:
    """A trained score, and what its training took."""
    score, wall, cpu = timed(call)
    own = score.s_dyn if isinstance(score, BoPITOScore) else score
    parameters = sum(p.numel() for p in own.parameters())
    print(f"{type(score).__name__}: {steps} steps, wall {wall:.0f} s, CPU {cpu:.0f} s", flush=True)
    return score, {"steps": steps, "parameters": parameters, "wall_s": wall, "cpu_s": cpu}


def accuracy(score: Score, exact: TransferOperator) -> dict:
    """Errors of one step at all lags."""
    rng = np.random.default_rng(SEED)
    made = [[against_exact(score, exact, lag, rng, RANKS) for lag in LAGS] for _ in range(SHIFTS)]
    x = np.array([[at["x"] for at in row] for row in made])
    w1 = np.mean([[at["w1"] for at in row] for row in made], axis=0)
    error = x.mean(0)
    return {
        "mean_abs_error": float(np.abs(error).mean()),
        "worst_abs_error": float(np.abs(error).max()),
        "quadrature_error": float((x.std(0, ddof=1) / SHIFTS**0.5).max()),
        "mean_w1": float(w1.mean()),
        "error": error.round(6).tolist(),
        "w1": w1.round(6).tolist(),
    }


def throughput(score: Score, evaluations: int, n: int = 4096, repeats: int = 20) -> float:
    """Samples per second, from the CPU time of all threads."""
    x_0, z = torch.zeros(n, 1), torch.randn(n, 1, generator=torch.Generator().manual_seed(SEED))
    solver, lag = DPMSolver(evaluations), torch.tensor(100.0)

    def batch() -> None:
        with torch.no_grad():
            bound = score.bind(score.scaling.standardise(x_0), lag)
            score.scaling.restore(solver(bound, score.noise, z, torch.randn_like))

    batch()
    cpu = timed(lambda: [batch() for _ in range(repeats)])[2]
    return n * repeats * torch.get_num_threads() / cpu


def against_peer(models: dict[str, dict]) -> dict:
    """Ratios, above 1 is better here; a step of training takes its CPU time over the threads."""
    table: dict = {}
    for name, peer in PEER.items():
        own = models[name]
        step = own["cpu_s"] / own["steps"] / torch.get_num_threads()
        table[name] = {"step_s": rounded(step), "training_step": rounded(peer["step_s"] / step)}
        for sampler, its in ((key, peer[key]) for key in SAMPLERS if key in peer):
            table[name][sampler] = {
                "mean_abs_error": rounded(its["mean"] / own["mean_abs_error"]),
                "worst_abs_error": rounded(its["worst"] / own["worst_abs_error"]),
                "mean_w1": rounded(its["w1"] / own["mean_w1"]),
                "samples_per_second": rounded(own["samples_per_second"] / its["rate"]),
            }
    return table


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


def assessed(score: Score, exact: TransferOperator) -> dict:
    found = {
        "samples_per_second": throughput(score, EVALUATIONS),
        "samples_per_second_50_evaluations": throughput(score, 50),
    } | accuracy(score, exact)
    values = (f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, float))
    print(f"{type(score).__name__}: {', '.join(values)}", flush=True)
    return found


def compared() -> dict:
    """Everything that is stored; BoPITO's own entries stand at the top as well."""
    work = Workload()
    s_eq, equilibrium = work.s_eq(PEER["s_eq"]["steps"])
    ito, of_ito = work.ito(PEER["ITO"]["steps"])
    bopito, of_bopito = work.bopito(PEER["BoPITO"]["steps"], s_eq)
    models = {
        "s_eq": equilibrium,
        "ITO": of_ito | assessed(ito, work.exact),
        "BoPITO": of_bopito | assessed(bopito, work.exact),
    }
    own, data = models["BoPITO"], work.data_error()
    same = ("mean_abs_error", "worst_abs_error", "quadrature_error", "samples_per_second", "error")
    return {key: own[key] for key in same} | {
        "data_mean_abs_error": float(np.abs(data).mean()),
        "data_worst_abs_error": float(np.abs(data).max()),
        "simulation_s": work.simulation_s,
        "training_s": equilibrium["wall_s"] + own["wall_s"],
        "training_cpu_s": equilibrium["cpu_s"] + own["cpu_s"],
        "threads": torch.get_num_threads(),
        "steps": [equilibrium["steps"], own["steps"]],
        "lags": LAGS.tolist(),
        "data_error": data.round(6).tolist(),
        "models": models,
        "peer": PEER,
        "against_peer": against_peer(models),
    }


def longer(steps: int) -> dict:
    """Another BoPITO, with the same s_eq."""
    work = Workload()
    s_eq, _ = work.s_eq(PEER["s_eq"]["steps"])
    score, training = work.bopito(steps, s_eq)
    return training | assessed(score, work.exact)


def draw(found: dict, path: Path) -> None:
    """Errors over the lag, and all ratios to the peer."""
    with rc_context(STYLE):
        figure = Figure(figsize=(DOUBLE, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
        draw_errors(left, found)
        draw_ratios(right, found["against_peer"])
        handles, labels = right.get_legend_handles_labels()
        more, names = left.get_legend_handles_labels()
        figure.legend(handles + more, labels + names, loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=150)


def draw_errors(axes: Axes, found: dict) -> None:
    """Ours at each lag, and the means of the peer, whose errors by lag are not known."""
    for name in ("ITO", "BoPITO"):
        color = LOOKS[name]["color"]
        axes.plot(LAGS, np.abs(found["models"][name]["error"]), lw=1, **LOOKS[name])
        for sampler, text in (("ode", "ODE"), ("ancestral", "ancestral")):
            mean = PEER[name][sampler]["mean"]
            axes.axhline(mean, color=color, ls="--", lw=0.9)
            above = (sampler, name) != ("ancestral", "ITO")
            place = {"va": "bottom" if above else "top", "color": color, "fontsize": 6.5}
            text += f" (± {PEER[name][sampler]['se']})"
            axes.text(10, mean, f"mean of the peer's {name}, {text}", **place)
    axes.plot(LAGS, np.abs(found["data_error"]), ":", color=GREY, lw=1.2, label="the data")
    axes.set(xscale="log", xlabel="lag / frames", ylabel="|error of C(x)|", ylim=(0, 0.043))


def draw_ratios(axes: Axes, ratios: dict) -> None:
    rows = {"training step": ("", "training_step")}
    for key, label in RATIOS.items():
        rows |= {f"{label}, {of}": (sampler, key) for sampler, of in SAMPLERS.items()}
    for y, (sampler, key) in enumerate(rows.values()):
        for shift, (name, look) in zip((-0.2, 0, 0.2), LOOKS.items(), strict=True):
            entry = ratios[name].get(sampler, {}) if sampler else ratios[name]
            if key in entry:
                label = name if y == 0 else None
                axes.plot(entry[key], y + shift, ls="", label=label, **look)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e5e5e5", lw=0.6)
    axes.set(xscale="log", xlabel="times better than the peer")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--longer", type=int, help="only add a BoPITO trained for so many steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="draw the stored results again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = store.RESULTS / "prinz_bopito.json"
    if options.longer:
        made = longer(options.longer)
        found = json.loads(path.read_text())
        found["models"][LONGER] = made
        store.write(path.stem, SEED, found)
    elif not options.draw:
        store.write(path.stem, SEED, compared())
    found = json.loads(path.read_text())
    print(json.dumps(found["against_peer"], indent=1))
    draw(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
