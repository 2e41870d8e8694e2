r"""Composite steps compared: how well each one, with its n_int fitted, is the exact dynamics.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_steps.py          (about ten minutes)

One dimension and no Monte Carlo: each move is a matrix between the cells of a grid. T and R have
closed forms with exact scores. R is the probability flow from alpha = w, which maps quantiles to
quantiles, so that with F_w the distribution function of w y + sigma eps, y from mu,

    R(x -> cell [c, d]) = Phi((b_d - w x) / sigma) - Phi((b_c - w x) / sigma),   F_w(b_c) = F_mu(c).

Interpolation, and all moves of the trained model, are the moves of the package at the quantiles of
their noise. n_int is fitted, above and below N_max, to the exact correlation C(k Delta) of x,
k = 1 to 8, by least squares. Below N_max the lags of all relaxations shrink with n_int.

    timescale   error of the slowest implied timescale of the step, in %
    misfit      root mean square error of C(k Delta), k = 1 to 8
    TV          total variation between mu and the stationary density of the step
    W1          Wasserstein distance at Delta from the exact conditional density, mean over mu
    held out    mean error of the correlations of x > 0, x > 0.5 and x^2, k = 1 to 15

Writes data/results/steps.json and steps.png. The matrices are checked against the moves, and those
of the shipped model also against a Monte Carlo rollout.
"""

import sys
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import store
import torch
from scipy.interpolate import CubicSpline
from scipy.special import ndtr
from torch import Tensor

import bopito_inverse as bi
from bopito_inverse.noise import per_replica
from bopito_inverse.sampling import Interpolate, Normal, Propagate, Renoise, Rollout, renoising_step
from bopito_inverse.sampling.rollout import Move
from bopito_inverse.sampling.solvers import standard_normal_quantiles
from bopito_inverse.systems import DoubleWell, Potential1D, Prinz, TransferOperator, TripleWell

SEED, GRID, QUANTILES, LAMBDA_HAT = 0, 200, 64, 0.99
FITTED, HELD_OUT = 8, 15  # composite steps
SLOWER = np.linspace(-0.9, 0, 6)  # nodes of n_int / N_max - 1
FASTER = np.linspace(0, 1, 9)  # nodes of sqrt(1 - w)
OBSERVABLES = {"x>0": lambda x: x > 0, "x>0.5": lambda x: x > 0.5, "x^2": lambda x: x**2}
SMALLEST = 0.1  # %, in the figure
TOLERANCE = 0.02  # largest distance between a matrix and the move that it stands for


class Bounded:
    """Interpolation without the dynamic score below sigma(t) = 0.5, for frames of this scale."""

    def __init__(self, scale: float) -> None:
        self.largest = 0.75**0.5 / 0.5 / scale  # alpha / sigma

    def __call__(self, model, y, n_int, solver, normal):  # type: ignore[no-untyped-def]
        score = model.bind(y, n_int)

        def eps(x_t: Tensor, t: Tensor) -> Tensor:
            kept = per_replica(model.noise.log_ratio(t).exp() < self.largest, x_t)
            return torch.where(kept, score(x_t, t), model.bopito.s_eq(x_t, t))

        return solver(eps, model.noise, normal(y), normal)


class Case:
    """An experiment, the dynamics that a model learnt, and the matrices of the model's moves.

    Args:
        system: the system of the experiment.
        lag_max: longest trained lag.
        delta: length of a composite step.
        barrier: the learnt dynamics never cross this x.
        learnt: the system of the learnt dynamics, if it is another.
    """

    def __init__(
        self,
        system: Potential1D,
        lag_max: int,
        delta: int,
        barrier: float | None = None,
        learnt: Potential1D | None = None,
    ) -> None:
        self.lag_max, self.delta = lag_max, delta
        self.exact = TransferOperator(system, grid_size=GRID)
        self.dynamics = TransferOperator(learnt or system, barrier, GRID)
        self.x, self.mu = self.exact.grid, self.exact.stationary * self.exact.spacing
        self.mean = self.mu @ self.x
        self.sd = float(np.sqrt(self.mu @ (self.x - self.mean) ** 2))
        self.bounded = Bounded(self.sd)
        self.known: dict[tuple, np.ndarray] = {}

    @cached_property
    def model(self) -> bi.Interpolator:
        s_eq = self.exact.equilibrium_score()
        s_dyn = self.dynamics.dynamic_score(s_eq, LAMBDA_HAT)
        return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, self.lag_max))

    def relax(self, lag: float) -> np.ndarray:
        return self.dynamics.transition_density(lag) * self.exact.spacing

    def renoise(self, w: float) -> np.ndarray:
        return renoising_matrix((self.x - self.mean) / self.sd, self.mu, w)

    def interpolate(self, w: float, clock: float, bounded: bool = False) -> np.ndarray:
        return self.moved(self.bounded if bounded else Interpolate(), w, clock)

    def moved(self, move: Move, w: float, clock: float) -> np.ndarray:
        """The matrix of a move of the package, at w or at n_int = clock N_max."""
        key = (type(move), getattr(move, "lag", None), w, clock)
        if key not in self.known:
            n_int = self.model.n_int(torch.tensor(w)) if w < 1 else clock * self.lag_max
            self.known[key] = move_matrix(self, move, float(n_int))
        return self.known[key]


class Trained(Case):
    """The model that is shipped with the package, and the experiment of its demo."""

    def __init__(self) -> None:
        super().__init__(Prinz(), 50, 100, 0.0)
        self.bounded = Bounded(1.0)  # its frames are standardised

    @cached_property
    def model(self) -> bi.Interpolator:
        return bi.Interpolator(bi.models.load(store.DATA / "prinz" / "bopito.safetensors"))

    def relax(self, lag: float) -> np.ndarray:
        return self.moved(Propagate(lag), 1.0, 1.0)

    def renoise(self, w: float) -> np.ndarray:
        return self.moved(Renoise(), w, 1.0)


def renoising_matrix(y: np.ndarray, mu: np.ndarray, w: float) -> np.ndarray:
    """R(w) on the grid points y."""
    if w >= 1:
        return np.eye(len(y))
    sigma = np.sqrt(1 - w**2)
    fine = np.linspace(min(w * y[0], 0) - 9 * sigma, max(w * y[-1], 0) + 9 * sigma, 3001)
    noised = ndtr((fine[:, None] - w * y) / sigma) @ mu
    ends = np.interp(np.append(0, np.cumsum(mu)), noised, fine)
    ends[[0, -1]] = -np.inf, np.inf
    return np.diff(ndtr((ends - w * y[:, None]) / sigma), axis=1)


def move_matrix(case: Case, move: Move, n_int: float) -> np.ndarray:
    """The matrix of a move that draws noise once; linear between the quantiles of the noise."""
    half = case.exact.spacing / 2
    edges = np.append(case.x - half, case.x[-1] + half)
    matrix = np.empty((GRID, GRID))
    levels = np.concatenate([[0], (np.arange(QUANTILES) + 0.5) / QUANTILES, [1]])
    for row, x in zip(matrix, quantiles_of(case, move, n_int, case.x), strict=True):
        x = np.concatenate([[2 * x[0] - x[1]], x, [2 * x[-1] - x[-2]]])
        row[:] = np.diff(np.interp(edges, x, levels, left=0, right=1))
    return matrix / matrix.sum(1, keepdims=True)


def quantiles_of(case: Case, move: Move, n_int: float, x_0: np.ndarray) -> np.ndarray:
    """Sorted frames after one move from each start, (starts, QUANTILES)."""
    step, z = Rollout([move], 1), standard_normal_quantiles(QUANTILES)
    starts = torch.from_numpy(x_0).float().repeat_interleave(QUANTILES)[:, None]
    n = torch.tensor(n_int)
    with torch.no_grad():
        made = [
            next(step.frames(case.model, part, n, 1, lambda y: z.repeat(len(y) // QUANTILES, 1)))
            for part in starts.split(10 * QUANTILES)
        ]
    return torch.cat(made).reshape(-1, QUANTILES).sort(1).values.double().numpy()


def renoising(
    case: Case, w: float, clock: float, times: float = 1, substeps: int = 1
) -> np.ndarray:
    """Renoising with `times` the relaxation of `renoising_step`, or in substeps."""
    rule = renoising_step(case.lag_max, case.delta // substeps).moves[0].share  # type: ignore[attr-defined]
    relax = case.relax(times * rule * clock * case.lag_max)
    return np.linalg.matrix_power(relax @ case.renoise(w) @ relax, substeps)


def within_wells(case: Case, w: float, clock: float) -> np.ndarray:
    """Renoising with relaxations as long as the slowest learnt process that N_max can show."""
    times = case.dynamics.timescales
    slowest = times[times < 2 * case.lag_max].max(initial=0)
    relax = case.relax(clock * min(case.delta / 4, slowest, case.lag_max))
    return relax @ case.renoise(w) @ relax


def mixture(case: Case, w: float, clock: float) -> np.ndarray:
    """A fresh draw of mu with probability 1 - w, then relaxation."""
    return w * case.relax(clock * case.lag_max) + (1 - w) * case.mu


def relaxed(case: Case, w: float, clock: float, bounded: bool = False) -> np.ndarray:
    return case.interpolate(w, clock, bounded) @ case.relax(clock * case.lag_max)


Step = Callable[[Case, float, float], np.ndarray]
"""The matrix of a step at w (1 at and below N_max) and at the clock n_int / N_max (1 above)."""

PAPER, RULE = "interpolate, relax", "renoise"
STEPS: dict[str, Step] = {
    "interpolate": Case.interpolate,
    PAPER: relaxed,
    "interpolate above sigma 0.5, relax": partial(relaxed, bounded=True),
    "mixture, relax": mixture,
    "renoise, half the relaxation": partial(renoising, times=0.5),
    RULE: renoising,
    "renoise, twice the relaxation": partial(renoising, times=2),
    "renoise, two substeps": partial(renoising, substeps=2),
    "renoise, relaxation time of the wells": within_wells,
}


def prinz(barrier: float = 1.0, friction: float = 1.0) -> Potential1D:
    """Prinz's potential with another barrier at x = 0, or another friction."""

    def energy(x: np.ndarray) -> np.ndarray:
        middle = barrier * 0.8 * np.exp(-80 * x**2)
        sides = 0.2 * np.exp(-80 * (x - 0.5) ** 2) + 0.5 * np.exp(-40 * (x + 0.5) ** 2)
        return 4 * (x**8 + middle + sides)

    bounds = Prinz().bounds
    return Potential1D(energy, bounds, friction=friction, time_step=1e-5, steps_per_frame=500)


def cases() -> dict[str, Case]:
    low = DoubleWell(a=2.0, b=0.5)
    return {
        "missing, N 50, Delta 50": Case(Prinz(), 50, 50, 0.0),
        "missing, N 50, Delta 100": Case(Prinz(), 50, 100, 0.0),
        "missing, N 50, Delta 200": Case(Prinz(), 50, 200, 0.0),
        "missing, N 20, Delta 100": Case(Prinz(), 20, 100, 0.0),
        "missing, N 100, Delta 200": Case(Prinz(), 100, 200, 0.0),
        "missing, side barrier of Prinz": Case(Prinz(), 50, 100, -0.5),
        "missing, triple well, left": Case(TripleWell(), 50, 100, -0.5),
        "missing, triple well, right": Case(TripleWell(), 50, 100, 0.5),
        "missing, low double well": Case(low, 5, 10, 0.0),
        "short data, N 50, Delta 100": Case(Prinz(), 50, 100),
        "short data, N 100, Delta 200": Case(Prinz(), 100, 200),
        "force field, barrier x 1.6": Case(Prinz(), 50, 100, learnt=prinz(barrier=1.6)),
        "force field, barrier x 0.5": Case(Prinz(), 50, 100, learnt=prinz(barrier=0.5)),
        "simulation slower by 2": Case(Prinz(), 50, 100, learnt=prinz(friction=2.0)),
        "simulation faster by 3": Case(Prinz(), 50, 100, learnt=prinz(friction=1 / 3)),
    }


def correlation(case: Case, matrix: np.ndarray, a: np.ndarray, n_steps: int) -> np.ndarray:
    """C(k Delta), k = 1 to n_steps, from mu."""
    centred = a - case.mu @ a
    b, values = centred, []
    for _ in range(n_steps):
        b = matrix @ b
        values.append(case.mu @ (centred * b))
    return np.array(values) / (case.mu @ centred**2)


def exact_correlation(case: Case, a: np.ndarray, n_steps: int) -> np.ndarray:
    lags = case.delta * np.arange(1, n_steps + 1)
    return case.exact.correlation(a, lags=lags, normalization="variance")


def fit(case: Case, step: Step, target: np.ndarray) -> tuple[float, float]:
    """w and the clock of least squares; C is a spline between nodes, refined at its best node."""
    found: dict[float, np.ndarray] = {}

    def misfit(node: float) -> float:
        if node not in found:
            found[node] = correlation(case, step(case, *at(node)), case.x, len(target))
        return float(((found[node] - target) ** 2).sum())

    def refined(nodes: list[float]) -> float:
        best = min(nodes, key=misfit)
        spline = CubicSpline(sorted(nodes), [found[node] for node in sorted(nodes)])
        fine = np.linspace(min(nodes), max(nodes), 10_001)
        trial = float(fine[((spline(fine) - target) ** 2).sum(1).argmin()])
        if min(abs(trial - node) for node in nodes) < 1e-3:
            return best if misfit(best) < misfit(trial) else trial
        return refined([*nodes, trial])

    best = refined(list(FASTER))
    return at(best if best > 0.05 else min(best, refined(list(SLOWER)), key=misfit))


def at(node: float) -> tuple[float, float]:
    """w and the clock: one coordinate for the whole family, from slow to fast."""
    return (1 - node**2, 1.0) if node > 0 else (1.0, 1 + node)


def scores(case: Case, matrix: np.ndarray) -> dict:
    """How far the step is from the exact dynamics."""
    second = np.sort(np.abs(np.linalg.eigvals(matrix)))[-2]
    stationary = case.mu @ np.linalg.matrix_power(matrix, 2**14)
    exact = case.exact.transition_density(case.delta) * case.exact.spacing
    distance = np.abs(np.cumsum(matrix - exact, axis=1)).sum(1) * case.exact.spacing
    target = exact_correlation(case, case.x, FITTED)
    held_out = {}
    for name, observable in OBSERVABLES.items():
        a = observable(case.x).astype(float)
        error = correlation(case, matrix, a, HELD_OUT) - exact_correlation(case, a, HELD_OUT)
        held_out[name] = float(np.abs(error).mean())
    return {
        "timescale_error": float(-case.delta / np.log(second) / case.exact.timescales[0] - 1) * 100,
        "misfit": float(
            np.sqrt(((correlation(case, matrix, case.x, FITTED) - target) ** 2).mean())
        ),
        "total_variation": float(np.abs(stationary / stationary.sum() - case.mu).sum() / 2),
        "wasserstein": float(case.mu @ distance),
        "held_out": held_out,
    }


def compare(case: Case, target: np.ndarray, *names: str) -> dict[str, dict]:
    made = {}
    for name in names or STEPS:
        step = STEPS[name]
        w, clock = fit(case, step, target)
        made[name] = {"w": w, "clock": clock} | scores(case, step(case, w, clock))
        print(row(name, made[name]), flush=True)
    return made


def row(name: str, made: dict) -> str:
    return (
        f"  {name:38s} w {made['w']:.3f}  clock {made['clock']:.2f}  "
        f"timescale {made['timescale_error']:+6.1f} %  misfit {made['misfit']:.4f}  "
        f"TV {made['total_variation']:.3f}  W1 {made['wasserstein']:.4f}  held out "
        + " ".join(f"{value:.4f}" for value in made["held_out"].values())
    )


def checked(case: Case) -> dict[str, float]:
    """Kolmogorov-Smirnov distance of a matrix from the move, mean over mu."""

    def distance(matrix: np.ndarray, move: Move, w: float) -> float:
        difference = np.cumsum(matrix - case.moved(move, w, 1.0), axis=1)
        return float(case.mu @ np.abs(difference).max(1))

    made = {"Propagate(25)": distance(case.relax(25), Propagate(25), 1.0)}
    for w in (0.2, 0.5, 0.8, 0.95, 0.99):
        # the frames of exact scores are not standardised
        made[f"Renoise at w = {w}"] = distance(renoising_matrix(case.x, case.mu, w), Renoise(), w)
    control = distance(renoising_matrix(case.x, case.mu, 0.9), Renoise(), 0.8)
    print(f"distance of matrices from moves {made}, of another w {control:.3f}")
    if not max(made.values()) < TOLERANCE < control:
        sys.exit(f"matrices must be within {TOLERANCE} of the moves, and the control must not")
    return made


def trained() -> dict:
    """The shipped model, fitted to the exact correlation and to the experiment of the demo."""
    case = Trained()
    experiment = bi.observables.Experiment.read(store.DATA / "prinz" / "experiment.csv")
    print("\nshipped model, exact correlation")
    made = {"exact correlation": compare(case, exact_correlation(case, case.x, FITTED))}
    print("shipped model, experiment of the demo")
    made["experiment"] = compare(case, np.asarray(experiment.values), PAPER, RULE)
    fitted = made["exact correlation"]
    made["rollout"] = {name: rollout(case, name, fitted[name]["w"]) for name in (PAPER, RULE)}
    return made


def rollout(case: Case, name: str, w: float, n: int = 20_000) -> dict:
    """A fitted step by the package's own rollout: against its matrix, exact correlations and mu."""
    moves: list[Move] = [Interpolate(), Propagate(case.lag_max)]
    step = Rollout(moves, case.delta) if name == PAPER else renoising_step(50, case.delta)
    starts = case.exact.sample(n, torch.Generator().manual_seed(SEED))
    normal = Normal(torch.Generator().manual_seed(SEED + 1))
    n_int = case.model.n_int(torch.tensor(w))
    with torch.no_grad():
        frames = torch.stack(list(step.frames(case.model, starts, n_int, HELD_OUT, normal)))
    matrix = STEPS[name](case, w, 1.0)
    made: dict = {"error": {}, "z": {}}
    for key, observable in {"x": lambda x: x, **OBSERVABLES}.items():
        a = observable(case.x).astype(float)
        mean = case.mu @ a
        start, later = (observable(x)[..., 0].double() - mean for x in (starts, frames))
        value = (start * later / (case.mu @ (a - mean) ** 2)).numpy()
        found, sigma = value.mean(1), value.std(1) / n**0.5
        exact = exact_correlation(case, a, HELD_OUT)
        made["error"][key] = float(np.abs(found - exact).mean())
        z = (found - correlation(case, matrix, a, HELD_OUT)) / sigma
        made["z"][key] = float(np.abs(z).max())
    draws = case.exact.sample(n, torch.Generator().manual_seed(SEED + 2))
    made["total_variation"] = histogram_distance(case, frames[-1])
    made["total_variation_of_draws_of_mu"] = histogram_distance(case, draws)
    print(f"rollout of {n} replicas, {name}: {made}")
    return made


def histogram_distance(case: Case, x: Tensor, bins: int = 50) -> float:
    """Total variation between frames and mu, in bins."""
    half = case.exact.spacing / 2
    counts, ends = np.histogram(x.numpy(), bins, range=(case.x[0] - half, case.x[-1] + half))
    levels = np.interp(ends, np.append(case.x - half, ends[-1]), np.append(0, np.cumsum(case.mu)))
    return float(np.abs(counts / x.numel() - np.diff(levels)).sum() / 2)


def draw(made: dict[str, dict[str, dict]], path: Path) -> None:
    """One row for each case, one dot for each step."""
    styles = {  # marker, color, size, place in the row
        "interpolate": ("o", "#b9b9b9", 42, -0.16),
        "interpolate above sigma 0.5, relax": ("s", "#8c8c8c", 30, -0.16),
        "mixture, relax": ("D", "#c9a227", 30, -0.16),
        PAPER: ("o", "#3d3d3d", 42, -0.16),
        "renoise, half the relaxation": ("<", "#8fbce6", 42, 0.16),
        "renoise, twice the relaxation": (">", "#8fbce6", 42, 0.16),
        "renoise, two substeps": ("P", "#5fb08f", 42, 0.16),
        "renoise, relaxation time of the wells": ("^", "#d9705a", 42, 0.16),
        RULE: ("o", "#1f5fa8", 75, 0.16),
    }
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(made) + 1.8), layout="constrained")
    for y, found in enumerate(made.values()):
        axes.axhspan(y - 0.42, y + 0.42, color="#f6f6f6", zorder=0)
        for name, (marker, color, size, place) in styles.items():
            x = max(abs(found[name]["timescale_error"]), SMALLEST)
            look = {"marker": marker, "color": color, "edgecolor": "white", "linewidth": 0.6}
            axes.scatter(x, y + place, size, label=name, **look)
    axes.set_yticks(range(len(made)), [name.replace("Delta", "Δ") for name in made])
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [SMALLEST, 0.3, 1, 3, 10, 30]
    axes.set_xticks(ticks, [f"<{SMALLEST:g}", *(f"{tick:g}" for tick in ticks[1:])])
    axes.minorticks_off()
    axes.set_xlabel("error of the slowest timescale after the fit (%)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles, labels = axes.get_legend_handles_labels()
    n = len(styles)
    figure.legend(handles[:n], labels[:n], loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def summarised(made: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """Each step over all cases."""
    summary = {}
    for name in STEPS:
        found = [case[name] for case in made.values()]
        error = np.abs([case["timescale_error"] for case in found])
        summary[name] = {
            "timescale_error_mean": float(error.mean()),
            "timescale_error_worst": float(error.max()),
            "total_variation_mean": float(np.mean([case["total_variation"] for case in found])),
            "wasserstein_mean": float(np.mean([case["wasserstein"] for case in found])),
            "held_out_mean": float(np.mean([[*case["held_out"].values()] for case in found])),
        }
        values = "  ".join(f"{key} {value:.4f}" for key, value in summary[name].items())
        print(f"  {name:38s} {values}")
    return summary


def main() -> None:
    clock = time.perf_counter()
    every = cases()
    checks = checked(every["missing, N 50, Delta 100"])
    made: dict = {"cases": {}}
    for name, case in every.items():
        print(f"\n{name}: slowest timescale {case.exact.timescales[0]:.1f} frames")
        made["cases"][name] = compare(case, exact_correlation(case, case.x, FITTED))
    print("\nall cases")
    made["summary"] = summarised(made["cases"])
    made["trained"] = trained()
    made |= {"distance_to_the_moves": checks, "seconds": time.perf_counter() - clock}
    store.write("steps", SEED, made)
    rows = made["cases"] | {"shipped model, N 50, Delta 100": made["trained"]["exact correlation"]}
    draw(rows, store.RESULTS / "steps.png")


if __name__ == "__main__":
    main()
