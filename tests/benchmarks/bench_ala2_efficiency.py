"""How many trajectories does the equilibrium prior save? ITO against BoPITO, alanine dipeptide.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_ala2_efficiency.py     (some 60 minutes)

Both models learn from the same 1, 5 or 20 unbiased trajectories of 1 ns, frames of 1 ps, with the
same network, batch, steps and learning rate. BoPITO is also given the shipped s_eq, which comes
from umbrella windows that cross the barrier of phi, and s_dyn starts from its layers. Scaled down
from the paper, for one core: 20 ns of data at most in implicit solvent, networks of width 48 and
depth 3, one set of trajectories of each size, and 2,500 steps of 64 pairs, where the shipped model
had 12,000 of 128: losses still fall. More steps: --steps.

Phi of 0 to 126 degrees, the right side, has 2 % of the equilibrium. Coming and going there is the
slow process, 63 % of the variance of sin(phi) and 5 % of cos(phi); all else that phi does is over
in some ps. 20 trajectories from equilibrium held not one frame of it, and no model can learn what
is not there. So trajectories start on the right side and in all of equilibrium in turn; the set of
1 starts on the right, and hardly leaves it.

C is the autocorrelation of sin(phi) and cos(phi) by one step from equilibrium frames, with the mean
and variance of equilibrium; its error is that to long unbiased MD. A quarter of the starts are on
the right side, with their weight. Each draw of noise serves one group of starts that is spread over
the equilibrium, so that what forgets x_0 has a C of nearly zero in every group; standard errors are
of groups. Those of MD and of the data are of whole trajectories, given the share of either side.

    data    C of the training trajectories: no model, but the share of either side, the mean and
            the variance of equilibrium, which s_eq knows
    s_eq    draws of s_eq, which forget x_0: no trajectory at all, and no dynamics (C = 0)

Of 5 and 20 trajectories one and three are held out, and training ends early where their loss rises;
of 1 there is nothing to hold out, and all steps are made. `right` is the share of the right side in
the data and after one step of the longest lag.

Simulations, trainings and samples are kept in results/ala2/efficiency, and a run that was killed
goes on from there: called again when the reference has grown, it takes seconds. Writes
data/results/ala2_efficiency.json and .png.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import store
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import bopito_inverse as bi
from bopito_inverse.datasets import Frames, Trajectories, read_npz, write_npz
from bopito_inverse.models import NetworkConfig, TrainingConfig
from bopito_inverse.models.painn import PaiNN
from bopito_inverse.observables import Correlation
from bopito_inverse.plots import DOUBLE, GREY, OKABE_ITO, PALE, STYLE
from bopito_inverse.sampling import DPMSolver, Normal, Propagate

ALA2, WORK = store.DATA / "ala2", store.KEPT / "ala2" / "efficiency"
SEED, LAMBDA_HAT = 0, 0.9995
RIGHT = (0.0, 2.2)  # rad
LEFT_STARTS, RIGHT_STARTS = 6, 2  # of each group
ITO, BOPITO, DATA, S_EQ = "ITO", "BoPITO", "data", "s_eq"
LOOKS: dict[str, dict[str, Any]] = {
    ITO: {"color": OKABE_ITO["vermillion"], "marker": "o", "ls": "-"},
    BOPITO: {"color": OKABE_ITO["blue"], "marker": "s", "ls": "-"},
    DATA: {"color": GREY, "marker": "^", "ls": "--"},
}
Job = tuple[str, int, int]  # model, number of trajectories, number of the set
Estimate = tuple[np.ndarray, np.ndarray]  # values and standard errors, (n_lags,)
Errors = dict[str, Any]


class Plan(NamedTuple):
    """Sizes of a run; `sets` has the number of sets of each number of trajectories."""

    folder: Path
    n_frames: int
    sets: dict[int, int]
    lags: tuple[int, ...]
    steps: int
    groups: int
    evaluations: int

    def jobs(self, *models: str) -> list[Job]:
        """Those of most data first."""
        sets = [(n, k) for n in sorted(self.sets, reverse=True) for k in range(self.sets[n])]
        return [(name, *own) for own in sets for name in models]

    def folder_of(self, job: Job) -> Path:
        return self.folder / "_".join(map(str, (*job, self.steps)))


FULL = Plan(WORK, 1001, {1: 1, 5: 1, 20: 1}, (2, 100, 500), 2500, 48, 12)
QUICK = Plan(WORK / "quick", 21, {1: 1, 2: 1}, (2, 5, 10), 4, 3, 4)


def main() -> None:
    """Simulate, train and sample what is not kept; compare, draw and keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny run that writes no results")
    parser.add_argument("--steps", type=int, help="of each training")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    plan = plan._replace(steps=options.steps or plan.steps)
    torch.set_num_threads(1)
    here = Setting(plan)
    made = {job: one_steps(here, job) for job in plan.jobs(ITO, BOPITO)}
    found: dict[str, Any] = {"settings": plan._asdict() | {"folder": None}}
    found["settings"] |= {"lambda_hat": LAMBDA_HAT, "training": settings(plan, 1).model_dump()}
    found["reference"] = here.truth | {"C": {k: [x.tolist() for x in v] for k, v in here.c.items()}}
    found["rows"] = [model_row(here, job, phi) for job, phi in made.items()]
    found["rows"] += [data_row(here, job) for job in plan.jobs(DATA)] + [s_eq_row(here)]
    report(found)
    figure = draw(found)
    figure.savefig(plan.folder / "figure.png", dpi=150)
    if not options.quick:
        store.write("ala2_efficiency", SEED, found)
        figure.savefig(store.RESULTS / "ala2_efficiency.png", dpi=150)


class Setting:
    """What all models have in common: the data, the starts, and the truth."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.molecule = bi.systems.AlanineDipeptide()
        self.equilibrium = Frames.read(ALA2 / "frames.npz")
        phi = self.phi(self.equilibrium.x)
        self.share = float(self.equilibrium.weights[is_right(phi)].sum())
        self.z = standardised(phi, self.equilibrium.weights)
        self.data = simulate(self)
        self.starts, self.weights = grouped_starts(self)
        long = torch.from_numpy(read_npz(ALA2 / "reference.npz", ("phi",))["phi"]).double()
        self.truth = {"trajectories": len(long), "n_frames": long.shape[1], "right": self.share}
        self.c = along(self, long)

    def phi(self, x: Tensor) -> Tensor:
        """phi of frames (..., n_atoms, 3), float64."""
        feature = bi.observables.feature("phi", self.molecule.topology)
        return feature(x.flatten(0, -3)).view(x.shape[:-2]).double()


def is_right(phi: Tensor) -> Tensor:
    return (phi > RIGHT[0]) & (phi < RIGHT[1])


def standardised(phi: Tensor, w: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """sin and cos of phi, less their means and over their standard deviations in equilibrium."""

    def one(function: Any) -> Any:
        a = function(phi)
        mean = w @ a
        return lambda phi: (function(phi) - mean) / (w @ (a - mean).square()).sqrt()

    return {"sin(phi)": one(torch.sin), "cos(phi)": one(torch.cos)}


def simulate(here: Setting) -> Trajectories:
    """The training data: starts on the right side of phi and in all of equilibrium, in turn."""
    n = max(here.plan.sets)
    right = is_right(here.phi(here.equilibrium.x)).nonzero()[:, 0]
    parts = []
    for name, source in (("right", here.equilibrium.take(right)), ("all", here.equilibrium)):
        made = bi.simulate.molecular_dynamics(
            here.molecule,
            source.sample((n + 1) // 2, torch.Generator().manual_seed(SEED)),
            here.plan.n_frames,
            folder=here.plan.folder / f"md_{name}",
            seed=SEED,
            platform="Reference",
        )
        parts.append(made.frames.view(len(made), -1, *made.event_shape))
    frames = torch.stack(parts, dim=1).flatten(0, 1)[:n]
    return Trajectories(frames, here.molecule.frame_time, here.molecule.name)


def grouped_starts(here: Setting) -> tuple[Tensor, Tensor]:
    """Starts (m, groups, n_atoms, 3), evenly by weight along phi on either side; weights (m,)."""
    phi, generator = here.phi(here.equilibrium.x), torch.Generator().manual_seed(SEED)
    order = ((phi - RIGHT[1]) % (2 * torch.pi)).argsort()  # the left side is one piece
    x, weights = [], []
    shares = (1 - here.share, here.share)
    sides = (~is_right(phi), is_right(phi))
    for count, side, share in zip((LEFT_STARTS, RIGHT_STARTS), sides, shares, strict=True):
        own = here.equilibrium.take(order[side[order]])
        drawn = [own.systematic(count, generator) for _ in range(here.plan.groups)]
        x.append(own.x[torch.stack(drawn, dim=1)])
        weights += [share / count] * count
    return torch.cat(x), torch.tensor(weights, dtype=torch.float64)


def settings(plan: Plan, n: int) -> TrainingConfig:
    """Of a training on n trajectories."""
    return TrainingConfig(
        steps=plan.steps,
        batch_size=64,
        learning_rate=3e-3,
        noise_start=5.0,
        validation=max(0.15, 1 / n) if n > 1 else 0.0,
        validate_every=500,
        patience=4 if n > 1 else None,
        checkpoint_every=250,
        compile=True,
        network=NetworkConfig(width=48, depth=3),
    )


def train(here: Setting, job: Job) -> nn.Module:
    """One model, kept in a folder of its own."""
    name, n, k = job
    own = here.data.take(torch.arange(n * k, n * (k + 1)))
    lag_max, config, folder = max(here.plan.lags), settings(here.plan, n), here.plan.folder_of(job)
    if name == ITO:
        return bi.models.train_ito(own, lag_max, config, k, folder, "cpu", molecule=here.molecule)
    s_eq: Any = bi.models.load(ALA2 / "equilibrium.safetensors", system=here.molecule.name)
    return bi.models.train_bopito(own, s_eq, lag_max, LAMBDA_HAT, config, k, folder, "cpu")


def one_steps(here: Setting, job: Job) -> Tensor:
    """phi after one step of each lag, (n_lags, m, groups), NaN where a sample is not finite."""
    path = here.plan.folder_of(job) / "phi.npz"
    if path.exists():
        return torch.from_numpy(read_npz(path, ("phi",))["phi"])
    times = [time.time()]
    torch.compiler.reset()  # after some compiled models, no more are compiled
    model: Any = train(here, job)
    times.append(time.time())
    torch.compiler.reset()
    for part in model.modules():
        if isinstance(part, PaiNN):
            part.compile_layers()
    y, made = model.scaling.standardise(here.starts.flatten(0, 1)), []
    for lag in here.plan.lags:
        generator = torch.Generator().manual_seed(SEED + lag)
        normal = Normal(generator, copies=len(here.starts), scaling=model.scaling)
        solver = DPMSolver(here.plan.evaluations)
        with torch.no_grad():
            x = model.scaling.restore(Propagate(lag)(model, y, y.new_zeros(()), solver, normal))
        bad = ~x.isfinite().flatten(1).all(1)
        phi = here.phi(x.nan_to_num(0.0, 0.0, 0.0)).masked_fill(bad, torch.nan)
        made.append(phi.view(here.starts.shape[:2]))
    write_npz(path, phi=torch.stack(made).numpy())
    spent = np.diff([*times, time.time()]).round()
    print(f"{job}: {spent[0]:.0f} s of training, {spent[1]:.0f} s of sampling", flush=True)
    return torch.stack(made)


def along(here: Setting, phi: Tensor) -> dict[str, Estimate]:
    """C along trajectories (n, n_frames) and its standard error, for each function of phi.

    Pairs begin where the longest lag still fits; those that begin on either side have its share,
    and a side without any adds nothing. Errors are those of the means within the sides, by
    trajectories, and not known (NaN) where fewer than two were on one of the sides.
    """
    n, last = len(phi), phi.shape[1] - max(here.plan.lags)
    first = phi[:, :last].reshape(-1, 1)
    later = torch.stack([phi[:, lag : lag + last].reshape(-1, 1) for lag in here.plan.lags])
    right = is_right(first[:, 0])
    w = torch.where(right, here.share / right.sum(), (1 - here.share) / (~right).sum())
    known = min(int(side.view(n, last).any(1).sum()) for side in (right, ~right)) > 1
    found: dict[str, Any] = {}
    for name, function in here.z.items():
        samples = Correlation(function, normalization="raw").contributions(first, later, weights=w)
        off = samples.influence.clone()
        for side in (right, ~right):
            off[side] -= off[side].mean(0)  # weights are equal within a side
        off = off.view(n, last, -1).mean(1)
        error = (off.square().sum(0) / n / (n - 1)).sqrt() if known else off[0] * torch.nan
        found[name] = tuple(float(w.sum()) * x.numpy() for x in (samples.value, error))
    return found


def model_row(here: Setting, job: Job, phi: Tensor) -> Errors:
    """Errors of one model; samples that are not finite are counted, and taken for the mean."""
    row: Errors = dict(zip(("model", "n", "set"), job, strict=True))
    row["not finite"] = int(phi.isnan().sum())
    phi_0 = here.phi(here.starts)
    products = {name: f(phi_0) * f(phi).nan_to_num(0.0) for name, f in here.z.items()}
    row |= errors(here, {name: over_groups(here, x) for name, x in products.items()})
    value, error = over_groups(here, is_right(phi).double())
    row["right"] = [float(value[-1]), float(error[-1])]
    path = here.plan.folder_of(job) / "validation.csv"
    if path.exists():
        row["validation"] = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2).tolist()
    return row


def over_groups(here: Setting, x: Tensor) -> Estimate:
    """Weighted mean of (n_lags, m, groups), and its standard error."""
    sums = torch.einsum("m,lmg->lg", here.weights, x)
    return sums.mean(1).numpy(), (sums.std(1) / sums.shape[1] ** 0.5).numpy()


def data_row(here: Setting, job: Job) -> Errors:
    """Errors of C along the training trajectories."""
    kind, n, k = job
    phi = here.phi(here.data.frames).view(len(here.data), -1)[n * k : n * (k + 1)]
    right = is_right(phi)
    row = {"model": kind, "n": n, "set": k, "right": [float(right.double().mean()), None]}
    row["crossings"] = int((right[:, 1:] != right[:, :-1]).sum())
    return row | errors(here, along(here, phi))


def s_eq_row(here: Setting) -> Errors:
    """Errors of draws of s_eq."""
    path = here.plan.folder / "equilibrium.npz"
    if not path.exists():
        s_eq, n = bi.models.load(ALA2 / "equilibrium.safetensors"), 20 * here.plan.groups
        drawn = bi.sampling.generate(s_eq, n, SEED, DPMSolver(here.plan.evaluations), "cpu")
        write_npz(path, phi=here.phi(drawn).numpy())
    right = is_right(torch.from_numpy(read_npz(path, ("phi",))["phi"])).double()
    row = {"model": S_EQ, "n": 0, "set": 0}
    row["right"] = [float(right.mean()), float(right.std()) / len(right) ** 0.5]
    none = np.zeros(len(here.plan.lags))
    return row | errors(here, dict.fromkeys(here.z, (none, none)))


def errors(here: Setting, found: dict[str, Estimate]) -> Errors:
    """C, its error and its standard error, for each function of phi and each lag."""
    return {
        name: {
            "C": value.tolist(),
            "error": (value - here.c[name][0]).tolist(),
            "standard error": error.tolist() if np.isfinite(error).all() else None,
        }
        for name, (value, error) in found.items()
    }


def report(found: dict[str, Any]) -> None:
    """A line for each set: |errors| at each lag and their mean over both functions."""
    lags, truth = found["settings"]["lags"], found["reference"]
    print(f"\nMD, {truth['trajectories']} trajectories, right side {truth['right']:.4f}")
    for name, (value, error) in truth["C"].items():
        cells = [f"{v:.3f} +- {e:.3f}" for v, e in zip(value, error, strict=True)]
        print(f"  C of {name} at {lags} ps: {', '.join(cells)}")
    print(f"\n|errors of C|   {''.join(f'{lag:6d} ps: sin, cos, mean   ' for lag in lags)}")
    for row in found["rows"]:
        cells = [f"{row['model']:8s}{row['n']:3d} set {row['set']} "]
        for k in range(len(lags)):
            own = [row[name] for name in truth["C"]]
            off = [abs(x["error"][k]) for x in own]
            bars = [f"({x['standard error'][k]:.3f})" if x["standard error"] else "" for x in own]
            pairs = [f"{x:.3f}{bar:7s}" for x, bar in zip(off, bars, strict=True)]
            cells.append(f"{pairs[0]} {pairs[1]} {np.mean(off):.3f} | ")
        value, error = row["right"]
        cells.append(f"right {value:.3f}" + ("" if error is None else f"({error:.3f})"))
        if "crossings" in row:
            cells.append(f", {row['crossings']} crossings")
        if row.get("not finite"):
            cells.append(f", {row['not finite']} samples NOT FINITE")
        print("".join(cells))


def draw(found: dict[str, Any]) -> Figure:
    """|error of C| over trajectories, a row for each function and a column for each lag."""
    lags, names = found["settings"]["lags"], tuple(found["reference"]["C"])
    with rc_context(STYLE):
        figure = Figure(figsize=(DOUBLE, 4.4), layout="constrained")
        axes = figure.subplots(len(names), len(lags), sharex=True)
        for line, name in zip(axes, names, strict=True):
            for k, axis in enumerate(line):
                draw_panel(axis, found, name, k)
            line[0].set_ylabel(f"|error of C|, {name}")
        for first, last, lag in zip(axes[0], axes[-1], lags, strict=True):
            first.set_title(f"{lag} ps")
            last.set_xlabel("trajectories of 1 ns")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def draw_panel(axis: Axes, found: dict[str, Any], name: str, k: int) -> None:
    """Each set a point with its standard error, and a line through the means of the sets."""
    truth, error = (x[k] for x in found["reference"]["C"][name])
    axis.axhspan(0, error, color=PALE, lw=0, label="standard error of MD")
    axis.axhline(abs(truth), color="black", lw=0.8, label="draws of $s_{eq}$")
    sizes = sorted(found["settings"]["sets"])
    for side, (model, look) in zip((0.93, 1.07, 1.0), LOOKS.items(), strict=True):
        means: dict[int, list[float]] = {n: [] for n in sizes}
        for row in (row for row in found["rows"] if row["model"] == model):
            off, bars = abs(row[name]["error"][k]), row[name]["standard error"]
            means[row["n"]].append(off)
            point = {**look, "ls": "", "alpha": 0.5, "ms": 3, "elinewidth": 0.7}
            axis.errorbar(row["n"] * side, off, bars[k] if bars else None, **point)
        x = [n * side for n in sizes]
        axis.plot(x, [np.mean(means[n]) for n in sizes], lw=1.2, ms=4.5, label=model, **look)
    axis.set(xscale="log", ylim=(0, None))
    axis.set_xticks(sizes, sizes)
    axis.minorticks_off()


if __name__ == "__main__":
    main()
