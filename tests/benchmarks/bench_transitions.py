r"""Transition densities of Prinz's system, uncorrected and corrected, for four kinds of bias.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_transitions.py [--workers 2] [--draw]

    missing   the slow process is missing: no trajectory crosses x = 0
    short     60 frames each, all from one structure, x = 0.75: few cross, and at lags near
              N_max = 50 hardly any pair starts on the other side
    slow      wrong force field: the barrier at x = 0 is 1.6 times as high
    fast      wrong force field: the barrier at x = 0 is 0.5 times as high

The equilibrium score is the shipped one, of the right force field. For each kind and seed (which
changes the simulation, the training and the noise of the measurement) s_dyn is trained on 4,000
trajectories; n_int is fitted to the autocorrelation of x at 100, 200, ..., 1000 frames (exact,
with noise of sigma 0.02); then 20,000 replicas start from each of two frames: x_0 = 0.75, far from
the barrier, and x_0 = -0.25, beside it on the other side. Uncorrected is what one would do without
the measurement: the trained model repeated at its longest lag.

How long a step relaxes follows the rule of `renoising_step`: step_lag where the timescale of the
trained model is below three times that of the measurement (of one exponential fitted to it), the
default where it is not. Neither number knows the answer.

    TV            total variation from the exact transition density, in 100 bins
    W1            Wasserstein distance from it
    floor         the same for as many independent draws of the exact density
    exact scores  the same step with exact scores of the biased dynamics, fitted to the correlation
                  with no noise, by matrices (`bench_steps`): the error of the method alone
    stationary    TV from mu of 1,000 replicas from each start, lags 900 to 3,800 together; its
                  floor is that of chains of the exact operator from the same starts

Writes data/results/transitions.json and transitions.png; --draw draws what is stored. Each finished
kind and seed is kept under results/transitions/, and a second call goes on from there.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context

import matplotlib.pyplot as plt
import numpy as np
import one_step
import store
import torch
from bench_steps import Case, correlation, exact_correlation, move_matrix, prinz, renoising
from bench_steps import fit as least_squares
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image
from scipy.optimize import curve_fit

import bopito_inverse as bi
from bopito_inverse import plots
from bopito_inverse.models import BoPITOScore, TrainingConfig
from bopito_inverse.observables import Experiment
from bopito_inverse.sampling import Propagate, Rollout, renoising_step
from bopito_inverse.systems import Potential1D, Prinz, TransferOperator

PARTS = store.KEPT / "transitions"
SEEDS = range(3)
LAG_MAX, DELTA, LAMBDA_HAT = 50, 100, 0.99
STEPS = (1, 2, 4, 8)  # composite steps
STARTS = (0.75, -0.25)
MODELS = ("uncorrected", "corrected")
BINS, DRAWN = 100, np.linspace(-1.2, 1.2, 61)
TRAINING = TrainingConfig(
    steps=3000, batch_size=1024, lag_sampling="uniform", network={"width": 96}
)


@dataclass(frozen=True)
class Bias:
    """A kind of bias: the dynamics that are simulated, and from where."""

    title: str
    middle: float = 1.0  # height of the barrier at x = 0, in units of the right one
    cut: float | None = None
    starts: tuple[float, float] = (-0.95, 0.95)
    n_frames: int = 100
    n_trajectories: int = 4000

    @property
    def system(self) -> Potential1D:
        return Prinz() if self.middle == 1 else prinz(self.middle)


KINDS = {
    "missing": Bias("slow process missing", cut=0.0),
    "short": Bias("short, from one structure", starts=(0.75, 0.75), n_frames=60),
    "slow": Bias("wrong force field, too slow", middle=1.6),
    "fast": Bias("wrong force field, too fast", middle=0.5),
}


@dataclass(frozen=True)
class Budget:
    """What a part was made with; another budget makes it anew."""

    n_replicas: int = 2048
    n_samples: int = 20_000  # from each start
    n_late: int = 1000  # of these go on, for the stationary density
    late_steps: int = 30
    sigma: float = 0.02


BUDGET = Budget()


@cache
def exact() -> TransferOperator:
    return TransferOperator(Prinz())


class Truth:
    """A density on the grid of the exact operator, (G,), and distances of samples from it."""

    def __init__(self, density: np.ndarray) -> None:
        operator = exact()
        self.ends = np.append(operator.grid, operator.grid[-1] + operator.spacing)
        self.ends -= operator.spacing / 2
        self.cdf = np.append(0, np.cumsum(density) * operator.spacing)
        self.cdf /= self.cdf[-1]
        outer = np.interp([1e-5, 1 - 1e-5], np.append(0, np.cumsum(mu())), self.ends)
        self.inner = np.linspace(*outer, BINS + 1)[1:-1]

    def distances(self, x: np.ndarray) -> dict[str, float]:
        """TV and W1 of samples."""
        share = np.bincount(np.searchsorted(self.inner, x), minlength=BINS) / len(x)
        found = np.searchsorted(np.sort(x), self.ends, side="right") / len(x)
        return self._distances(share, found)

    def distances_of(self, ends: np.ndarray, cdf: np.ndarray) -> dict[str, float]:
        """TV and W1 of a distribution function, linear between `ends`."""
        inner = np.interp(self.inner, ends, cdf)
        share = np.diff(np.concatenate([[0], inner, [1]]))
        return self._distances(share, np.interp(self.ends, ends, cdf))

    def floor(self, n: int) -> dict[str, float]:
        """TV and W1 of n independent draws, mean of 50."""
        rng = np.random.default_rng(0)
        made = [self.distances(np.interp(rng.random(n), self.cdf, self.ends)) for _ in range(50)]
        return {name: float(np.mean([one[name] for one in made])) for name in made[0]}

    def _distances(self, share: np.ndarray, cdf: np.ndarray) -> dict[str, float]:
        expected = np.diff(np.concatenate([[0], np.interp(self.inner, self.ends, self.cdf), [1]]))
        middle = np.abs(cdf - self.cdf)
        width = np.diff(self.ends)
        return {
            "tv": float(np.abs(share - expected).sum() / 2),
            "w1": float(((middle[1:] + middle[:-1]) / 2 * width).sum()),
        }


def mu() -> np.ndarray:
    return exact().stationary * exact().spacing


@cache
def truth(start: float, k: int) -> Truth:
    """The exact transition density after k steps."""
    return Truth(row_at(exact().transition_density(k * DELTA), exact().grid, start))


def row_at(matrix: np.ndarray, grid: np.ndarray, x: float) -> np.ndarray:
    """The row of a starting frame, linear between those of the grid."""
    cell = int(np.searchsorted(grid, x)) - 1
    share = (x - grid[cell]) / (grid[cell + 1] - grid[cell])
    return (1 - share) * matrix[cell] + share * matrix[cell + 1]


def position(x: torch.Tensor) -> torch.Tensor:
    return x


LAGS = DELTA * np.arange(1, 11)
OBSERVABLE = bi.observables.Correlation(position, normalization="variance")
UNCORRECTED = Rollout([Propagate(LAG_MAX)] * (DELTA // LAG_MAX), DELTA)


def measure(seed: int) -> Experiment:
    """The exact autocorrelation of x, with noise."""
    values = exact().correlation(position, lags=LAGS, normalization="variance")
    noise = np.random.default_rng([seed, 4]).normal(0, BUDGET.sigma, len(LAGS))
    return Experiment(LAGS, values + noise, np.full(len(LAGS), BUDGET.sigma))


def decay_time(measured: Experiment) -> float:
    """Decay time of one exponential fitted to the measurement, in frames."""
    (_, time), _ = curve_fit(
        lambda lag, a, tau: a * np.exp(-lag / tau), measured.lags, measured.values, [1.0, 200.0]
    )
    return float(time)


def simulate(bias: Bias, seed: int) -> bi.datasets.Trajectories:
    low, high = bias.starts
    generator = torch.Generator().manual_seed(1000 + seed)
    x_0 = low + (high - low) * torch.rand(bias.n_trajectories, 1, generator=generator)
    return bi.simulate.langevin(bias.system, x_0, bias.n_frames, seed=seed, barrier=bias.cut)


class Learnt(Case):
    """A trained model on the grid."""

    def __init__(self, model: bi.Interpolator) -> None:
        super().__init__(Prinz(), LAG_MAX, DELTA)
        self.trained = model

    @property
    def model(self) -> bi.Interpolator:  # type: ignore[override]
        return self.trained

    def timescale(self) -> float:
        """Slowest implied timescale of the trained model at its longest lag, in frames."""
        values = np.linalg.eigvals(move_matrix(self, Propagate(LAG_MAX), float(LAG_MAX)))
        return float(-LAG_MAX / np.log(np.sort(np.abs(values))[-2]))


def relaxation(learnt: float, measured: float) -> int | None:
    """The rule of `renoising_step`."""
    return DELTA if learnt < 3 * measured else None


def run(kind: str, seed: int) -> dict:
    """One kind of bias with one seed: simulation, training, measurement, fit, samples."""
    torch.set_num_threads(1)
    clock, bias = time.process_time(), KINDS[kind]
    trajectories = simulate(bias, seed)
    s_eq = bi.models.load(store.DATA / "prinz" / "equilibrium.safetensors")
    bopito = bi.models.train_bopito(
        trajectories, s_eq, LAG_MAX, LAMBDA_HAT, config=TRAINING, seed=seed, device="cpu"
    )
    model, measured = bi.Interpolator(bopito), measure(seed)
    learnt, decay = Learnt(model).timescale(), decay_time(measured)
    step = renoising_step(LAG_MAX, DELTA, relaxation=relaxation(learnt, decay))
    frames = bi.datasets.Frames.read(store.DATA / "prinz" / "equilibrium.npz")
    fitted = bi.inference.fit(
        model, step, OBSERVABLE, measured, frames, seed=seed, n_replicas=BUDGET.n_replicas
    )
    low, high = fitted.timescale.hdi_94
    x = trajectories.frames.view(bias.n_trajectories, -1)
    return {
        "kind": kind,
        "seed": seed,
        "crossed": float(((x > 0) != (x[:, :1] > 0)).any(1).float().mean()),
        "one_step": training_error(bopito, bias, seed),
        "learnt_timescale": learnt,
        "measured_decay": decay,
        "step": [repr(move) for move in step.moves],
        "n_int": fitted.n_int.to_dict(),
        "weight": fitted.weight.to_dict(),
        "timescale": fitted.timescale.to_dict(),
        "covers": bool(low < exact().timescales[0] < high),
        "status": str(fitted.status),
        "p_value": fitted.p_value,
        **compare(model, step, fitted.n_int.mean, seed),
        "cpu_s": time.process_time() - clock,
    }


def training_error(bopito: BoPITOScore, bias: Bias, seed: int) -> dict:
    """One step of the trained model against the exact operator of the simulated dynamics."""
    operator, rng = TransferOperator(bias.system, bias.cut), np.random.default_rng(seed)
    return {lag: one_step.against_exact(bopito, operator, lag, rng, 96) for lag in (25, 50)}


def compare(model: bi.Interpolator, step: Rollout, n_int: float, seed: int) -> dict:
    """Sampled transition densities against the exact ones."""
    found: dict = {"distances": {}, "stationary": {}, "densities": {}}
    for name, of in zip(MODELS, (UNCORRECTED, step), strict=True):
        starts = torch.tensor(STARTS).repeat_interleave(BUDGET.n_samples)[:, None]
        made = bi.sampling.sample(
            model, of, starts=starts, n_steps=STEPS[-1], n_int=n_int, seed=seed, device="cpu"
        )
        assert made is not None
        x = made.frames.view(len(STARTS), BUDGET.n_samples, -1).double().numpy()
        found["stationary"][name] = late(model, of, n_int, x[:, : BUDGET.n_late, -1], seed)
        for start, own in zip(STARTS, x, strict=True):
            key = f"{start:g}"
            found["distances"].setdefault(key, {})[name] = [
                truth(start, k).distances(own[:, k]) for k in STEPS
            ]
            found["densities"].setdefault(key, {})[name] = [
                (np.histogram(own[:, k], DRAWN)[0] / len(own) / np.diff(DRAWN)).tolist()
                for k in STEPS
            ]
    return found


def late(model: bi.Interpolator, step: Rollout, n_int: float, x: np.ndarray, seed: int) -> float:
    """TV from mu of the frames that follow."""
    starts = torch.from_numpy(x.reshape(-1, 1)).float()
    made = bi.sampling.sample(
        model,
        step,
        starts=starts,
        n_steps=BUDGET.late_steps,
        n_int=n_int,
        seed=1000 + seed,
        device="cpu",
    )
    assert made is not None
    frames = made.frames.view(len(starts), -1)[:, 1:].double().numpy()
    return Truth(exact().stationary).distances(frames.ravel())["tv"]


def late_floor(repeats: int = 5) -> float:
    """`late` of chains of the exact operator, mean of some."""
    operator, rng, n = exact(), np.random.default_rng(0), BUDGET.n_late
    rows = np.cumsum(operator.transition_density(DELTA) * operator.spacing, axis=1)
    found = []
    for _ in range(repeats):
        x = np.concatenate([np.interp(rng.random(n), t.cdf, t.ends) for t in last_truths()])
        made = []
        for _ in range(BUDGET.late_steps):
            cell = np.rint((x - operator.grid[0]) / operator.spacing).astype(int)
            cell = cell.clip(0, len(rows) - 1)
            cell = (rows[cell] < rng.random((len(x), 1))).sum(1).clip(max=len(rows) - 1)
            x = operator.grid[cell] + operator.spacing * (rng.random(len(x)) - 0.5)
            made.append(x)
        found.append(Truth(operator.stationary).distances(np.concatenate(made))["tv"])
    return float(np.mean(found))


def last_truths() -> list[Truth]:
    return [truth(start, STEPS[-1]) for start in STARTS]


def with_exact_scores(kind: str) -> dict:
    """The method alone: exact scores of the biased dynamics, no noise, no Monte Carlo."""
    bias = KINDS[kind]
    case = Case(Prinz(), LAG_MAX, DELTA, bias.cut, bias.system)
    learnt, slowest = float(case.dynamics.timescales[0]), float(case.exact.timescales[0])
    times = 2 if relaxation(learnt, slowest) else 1

    def step(case: Case, w: float, clock: float) -> np.ndarray:
        return renoising(case, w, clock, times)

    target = exact_correlation(case, case.x, len(LAGS))
    w, clock = least_squares(case, step, target)
    corrected = step(case, w, clock)
    second = np.sort(np.abs(np.linalg.eigvals(corrected)))[-2]
    matrices = {"uncorrected": case.relax(DELTA), "corrected": corrected}
    error = correlation(case, corrected, case.x, len(LAGS)) - target
    return {
        "learnt_timescale": learnt,
        "relaxation": DELTA if times == 2 else LAG_MAX,
        "weight": w,
        "clock": clock,
        "timescale": float(-DELTA / np.log(second)),
        "misfit": float(np.sqrt((error**2).mean())),
        "distances": {
            f"{start:g}": {
                name: [matrix_distances(case, matrix, start, k) for k in STEPS]
                for name, matrix in matrices.items()
            }
            for start in STARTS
        },
        "stationary": {
            name: distances_of(case, case.mu @ np.linalg.matrix_power(matrix, 2**14))["tv"]
            for name, matrix in matrices.items()
        },
    }


def matrix_distances(case: Case, matrix: np.ndarray, start: float, k: int) -> dict[str, float]:
    power = np.linalg.matrix_power(matrix, k)
    return distances_of(case, row_at(power, case.x, start), truth(start, k))


def distances_of(case: Case, row: np.ndarray, of: Truth | None = None) -> dict[str, float]:
    """Distances of probabilities on the coarse grid, by default from mu."""
    half = case.exact.spacing / 2
    ends = np.append(case.x - half, case.x[-1] + half)
    cdf = np.append(0, np.cumsum(row / row.sum()))
    return (of or Truth(exact().stationary)).distances_of(ends, cdf)


def part(kind: str, seed: int) -> dict:
    """`run`, or what it found before with the same settings."""
    settings = {
        "bias": asdict(KINDS[kind]),
        "budget": asdict(BUDGET),
        "training": TRAINING.model_dump(),
        "others": [LAG_MAX, DELTA, LAMBDA_HAT, STEPS, STARTS],
    }
    settings = json.loads(json.dumps(settings))
    path = PARTS / f"{kind}-{seed}.json"
    if path.exists():
        known = json.loads(path.read_text())
        if known["settings"] == settings:
            return known
    made = run(kind, seed) | {"settings": settings}
    PARTS.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".partial").write_text(json.dumps(made))
    path.with_suffix(".partial").rename(path)
    return json.loads(path.read_text())


def summary(rows: list[dict]) -> dict:
    """Mean and standard deviation over seeds."""
    table: dict = {}
    for key in rows[0]["distances"]:
        for name in MODELS:
            for distance in ("tv", "w1"):
                values = np.array(
                    [[at[distance] for at in row["distances"][key][name]] for row in rows]
                )
                table.setdefault(key, {}).setdefault(name, {})[distance] = {
                    "mean": values.mean(0),
                    "sd": values.std(0, ddof=1),
                }
    return {
        "distances": table,
        "timescale": [row["timescale"]["mean"] for row in rows],
        "covers": sum(row["covers"] for row in rows),
        "status": [row["status"] for row in rows],
        "stationary": {name: np.mean([row["stationary"][name] for row in rows]) for name in MODELS},
    }


def curves(rows: list[dict]) -> dict:
    """Mean, lowest and highest density over seeds, in thousandths, one string for each."""

    def packed(values: np.ndarray) -> str:
        return " ".join(f"{1000 * v:.0f}" for v in values)

    table: dict = {}
    for key in rows[0]["densities"]:
        for name in MODELS:
            values = np.array([row["densities"][key][name] for row in rows])
            table.setdefault(key, {})[name] = [
                [packed(at.mean(0)), packed(at.min(0)), packed(at.max(0))]
                for at in values.swapaxes(0, 1)
            ]
    return table


def rounded(value: object, digits: int = 4) -> object:
    """All numbers with few digits, arrays as lists."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{digits}g}")
    return value


def collect(parts: dict[str, list[dict]]) -> dict:
    """What is stored."""
    dropped = ("densities", "settings", "kind")
    found: dict = {"exact_timescale": exact().timescales[0]}
    found["lags"] = [k * DELTA for k in STEPS]
    found["floor"] = {
        f"{start:g}": [truth(start, k).floor(BUDGET.n_samples) for k in STEPS] for start in STARTS
    }
    found["floor"]["stationary"] = late_floor()
    found["kinds"] = {
        kind: {
            "settings": rows[0]["settings"],
            "exact scores": with_exact_scores(kind),
            "summary": summary(rows),
            "seeds": [{k: v for k, v in row.items() if k not in dropped} for row in rows],
            "densities": curves(rows),
        }
        for kind, rows in parts.items()
    }
    return rounded(found)  # type: ignore[return-value]


def line(row: dict) -> str:
    """One finished part."""
    estimate = row["timescale"]
    tv = {
        key: " ".join(f"{a['tv']:.3f}/{b['tv']:.3f}" for a, b in zip(*at.values(), strict=True))
        for key, at in row["distances"].items()
    }
    return (
        f"{row['kind']:8s} {row['seed']}  T(50) W1 {row['one_step']['50']['w1']:.4f}  "
        f"learnt {row['learnt_timescale']:.0f}  measured {row['measured_decay']:.0f}  "
        f"{row['step']}  fitted {estimate['mean']:.0f} {estimate['hdi_94']} {row['status']}  "
        f"TV uncorrected/corrected {tv}  stationary {row['stationary']}  {row['cpu_s']:.0f} s"
    )


@plt.rc_context(plots.STYLE)
def draw(found: dict) -> None:
    """Densities, a row for each lag, over distances, a row for each start."""
    figure = plt.figure(figsize=(plots.DOUBLE, 8.0), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[5.4, 3.0])
    panels = upper.subplots(len(STEPS), len(KINDS), sharex=True, sharey="row")
    for column, kind in zip(panels.T, KINDS, strict=True):
        column[0].set_title(KINDS[kind].title)
        for i, ax in enumerate(column):
            draw_densities(ax, found["kinds"][kind]["densities"], i)
    for ax, lag in zip(panels[:, 0], found["lags"], strict=True):
        ax.set_ylabel(f"lag {lag}", rotation=0, ha="right", va="center", labelpad=4)
    for start, height in zip(STARTS, (0.93, 0.0), strict=True):
        text = f"from $x_0$ = {minus(start)}"
        panels[0, 0].text(0.02, height, text, fontsize=7, transform=panels[0, 0].transAxes)
    upper.supxlabel("x / reduced units")
    rows = lower.subplots(len(STARTS), len(KINDS), sharex=True, sharey=True)
    for row, start in zip(rows, STARTS, strict=True):
        for ax, kind in zip(row, KINDS, strict=True):
            draw_distances(ax, found, kind, f"{start:g}")
        row[0].set_ylabel(f"TV from $x_0$ = {minus(start)}")
    lower.supxlabel("lag / frames")
    figure.legend(handles=legend(), loc="outside upper center", ncols=5)
    path = store.RESULTS / "transitions.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(
        path
    )  # a small file
    print(f"wrote {path}")


def minus(value: float) -> str:
    """A number with a minus sign of its own width."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def draw_densities(ax: Axes, densities: dict, i: int) -> None:
    """From the first start upwards, from the second downwards."""
    grid, middle = exact().grid, (DRAWN[1:] + DRAWN[:-1]) / 2
    for start, sign in zip(STARTS, (1, -1), strict=True):
        density = row_at(exact().transition_density(STEPS[i] * DELTA), grid, start)
        ax.fill_between(grid, sign * density, color=plots.PALE, lw=0)
        ax.plot(grid, sign * density, color="black", lw=0.6)
        for name in MODELS:
            packed = densities[f"{start:g}"][name][i]
            mean, low, high = (sign * np.array(p.split(), float) / 1000 for p in packed)
            color = plots.MEANING[name]
            ax.fill_between(middle, low, high, color=color, alpha=0.25, lw=0)
            ax.plot(middle, mean, color=color, ls=plots.DASHES[name], lw=1.1)
        ax.plot([start, start], [0, sign * 0.4], color="black", lw=1.0)
        ax.plot(start, sign * 0.4, "o", color="black", ms=2.5)
    ax.axhline(0, color="black", lw=0.5)
    ax.set(xlim=(-1.2, 1.2), yticks=[])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(bottom=i == len(STEPS) - 1, length=2.5, width=0.6)


def draw_distances(ax: Axes, found: dict, kind: str, key: str) -> None:
    """Total variation over lag, mean and standard deviation over seeds."""
    lags, entry = np.array(found["lags"]), found["kinds"][kind]
    floor = np.array([at["tv"] for at in found["floor"][key]])
    ax.fill_between([80, *lags, 1000], 0, [floor[0], *floor, floor[-1]], color=plots.PALE, lw=0)
    for name, shift in zip(MODELS, (0.97, 1.03), strict=True):
        tv, color = entry["summary"]["distances"][key][name]["tv"], plots.MEANING[name]
        style = {"color": color, "ls": plots.DASHES[name], "marker": "o", "ms": 3}
        ax.errorbar(lags * shift, tv["mean"], tv["sd"], capsize=1.5, elinewidth=0.8, **style)
        alone = [at["tv"] for at in entry["exact scores"]["distances"][key][name]]
        ax.plot(lags, alone, "_", color=color, ms=9, mew=1.2)
    ax.set(xscale="log", xlim=(80, 1000), ylim=(0, 0.65))
    ax.set_xticks(lags, [str(lag) for lag in lags], minor=False)
    ax.set_xticks([], minor=True)


def legend() -> list:
    """Handles for all panels."""
    blue, red = plots.MEANING["corrected"], plots.MEANING["uncorrected"]
    return [
        Patch(fc=plots.PALE, ec="black", lw=0.6, label="exact"),
        Line2D([], [], color=red, ls=plots.DASHES["uncorrected"], label="uncorrected"),
        Line2D([], [], color=blue, label="corrected"),
        Line2D([], [], color="black", marker="o", ms=2.5, lw=1, label="start"),
        Line2D(
            [], [], color=plots.GREY, ls="none", marker="_", ms=9, mew=1.2, label="exact scores"
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--draw", action="store_true", help="draw what is stored")
    arguments = parser.parse_args()
    if not arguments.draw:
        torch.set_num_threads(1)
        parts: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        tasks = [(kind, seed) for seed in SEEDS for kind in KINDS]
        with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
            for row in pool.map(part, *zip(*tasks, strict=True)):
                print(line(row), flush=True)
                parts[row["kind"]].append(row)
        store.write("transitions", SEEDS[0], collect(parts))
    draw(json.loads((store.RESULTS / "transitions.json").read_text()))


if __name__ == "__main__":
    main()
