"""Corrected kinetics of alanine dipeptide against unbiased MD.

    python tests/benchmarks/bench_ala2_kinetics.py [--replicas 2048] [--device auto]

The model was trained on trajectories of 200 ps, none of which crosses the barrier of phi. N_int is
fitted to the correlation functions of sin(phi) and cos(phi) of MD. Compared with MD: the slowest
timescale, both with errors; a distance that was not fitted, by its reduced chi-square; frames that
follow a start; and what each move of the step does to bonds, angles and potential energies.
"""

import argparse
import time
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import store
import torch

import bopito_inverse as bi
from bopito_inverse import plots
from bopito_inverse.arguments import as_device
from bopito_inverse.datasets import Frames, read_npz
from bopito_inverse.models.painn import PaiNN
from bopito_inverse.sampling import DPMSolver, Normal, Propagate, Rollout

FOLDER = store.DATA / "ala2"
STEP_LAG = 1000
LONGEST = 3000  # lag that is fitted
UNIFORM_SHARE = 0.5  # of the replicas, for the right side of phi
FITTED = ("sin(phi)", "cos(phi)")
HELD_OUT = "distance(ALA2-H, ALA2-HA)"
N_SHOWN = 512  # walkers that follow a start
N_ENERGIES = 300
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def main() -> None:
    """Fit, compare, draw and keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, default=2048)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = as_device(options.device)
    molecule = bi.systems.AlanineDipeptide()
    model = compiled_model(molecule)
    starts = Frames.read(FOLDER / "frames.npz")
    solver = DPMSolver(options.evaluations)
    step = bi.sampling.renoising_step(model.lag_max, STEP_LAG, solver, slower=False)
    obs = {
        name: bi.observables.Correlation(
            bi.observables.feature(name, molecule.topology), normalization="static", name=name
        )
        for name in (*FITTED, HELD_OUT)
    }
    measured, held_out = (
        bi.observables.Experiment.read(FOLDER / f"{name}.csv", FOLDER / f"{name}_covariance.npz")
        for name in ("experiment", "held_out")
    )
    measured, held_out = (table[table.lags <= LONGEST] for table in (measured, held_out))
    begin = time.time()
    result = bi.inference.fit(
        model,
        step,
        obs,
        measured,
        starts,
        seed=options.seed,
        device=device,
        n_replicas=options.replicas,
        uniform_share=UNIFORM_SHARE,
    )
    found: dict[str, Any] = {"fit": result.summary(), "seconds of the fit": time.time() - begin}
    print(result)
    found["MD timescale, frames"] = reference_timescale()
    predicted = result.predict(held_out.lags, HELD_OUT).reshape(-1, len(held_out.lags))
    off = held_out.values - predicted.mean(0)
    covariance = held_out.covariance + np.cov(predicted.T)
    found["held out"] = {
        "lags": held_out.lags.tolist(),
        "measured": held_out.values.tolist(),
        "sigma": held_out.sigma.tolist(),
        "predicted": predicted.mean(0).tolist(),
        "predicted sd": predicted.std(0).tolist(),
        "reduced chi-square": float(off @ np.linalg.solve(covariance, off) / len(off)),
    }
    found["moves"] = after_moves(molecule, model, step, starts, result.n_int.mean, options.seed)
    for key in ("MD timescale, frames", "held out", "moves"):
        print(f"{key}: {found[key]}")
    store.write("ala2_kinetics", options.seed, found)
    with plt.rc_context(plots.STYLE):
        draw_correlations(result, measured, held_out)
    draw_rows(molecule, model, step, starts, result.n_int.mean, options.seed)


def compiled_model(molecule: bi.systems.Molecule) -> bi.Interpolator:
    """The shipped model, its layers compiled."""
    bopito = bi.models.load(FOLDER / "bopito.safetensors", system=molecule.name)
    for part in bopito.modules():
        if isinstance(part, PaiNN):
            part.compile_layers()
    return bi.Interpolator(bopito)


def reference_timescale() -> dict[str, Any]:
    """The slowest timescale of MD, in which sin(phi) and cos(phi) are the basis."""
    phi = torch.from_numpy(read_npz(FOLDER / "reference.npz", ("phi",))["phi"]).float()
    found = bi.observables.implied_timescale(
        [x[:, None] for x in phi], STEP_LAG, lambda x: torch.cat([x.sin(), x.cos()], dim=1)
    )
    print(found)
    return {"value": found.value, "standard error": found.error, "status": found.status}


def after_moves(
    molecule: bi.systems.Molecule,
    model: bi.Interpolator,
    step: Rollout,
    starts: Frames,
    n_int: float,
    seed: int,
) -> dict[str, Any]:
    """Energies, bonds and angles after each move of some steps, beside equilibrium frames.

    Energies: quantiles in kJ/mol. Bonds, angles: root mean square of the deviation from the mean
    over equilibrium frames, in units of its standard deviation there, over those not constrained.
    """
    device = model.scaling.scale.device
    generator = torch.Generator(device).manual_seed(seed)
    truth = starts.to(device).sample(10 * N_ENERGIES, generator)
    normal = Normal(generator, scaling=model.scaling)
    sets = {"MD": truth[:N_ENERGIES]}
    n = torch.tensor(n_int, device=device)
    paper = Rollout([bi.sampling.Interpolate(), Propagate(model.lag_max)], STEP_LAG, step.solver)
    with torch.no_grad():
        for title, rollout in (("renoising", step), ("paper", paper)):
            y = model.scaling.standardise(truth[:N_ENERGIES])
            for move in rollout.moves:
                y = move(model, y, n, rollout.solver, normal)
                sets[f"{title}: after {move!r}"] = model.scaling.restore(y)
    rows = {}
    features = internal(molecule)
    means = {
        name: [(f(truth).mean(), f(truth).std()) for f in own] for name, own in features.items()
    }
    for name, x in sets.items():
        energy = np.quantile(molecule.energy(x.cpu()).numpy(), QUANTILES).round(1).tolist()
        rows[name] = {"energy": energy}
        for kind, own in features.items():
            z = [
                ((f(x) - mean) / std).square().mean()
                for f, (mean, std) in zip(own, means[kind], strict=True)
                if std > 1e-4
            ]
            rows[name][kind] = float(torch.stack(z).mean().sqrt())
    return rows


def internal(molecule: bi.systems.Molecule) -> dict[str, list[Any]]:
    """Features of all bonds and angles."""
    bonds = molecule.bonds.tolist()
    near = [
        sorted({i for b in bonds if j in b for i in b} - {j})
        for j in range(len(molecule.positions))
    ]
    angles = [(i, j, k) for j, own in enumerate(near) for i in own for k in own if i < k]
    return {
        "bonds": [bi.observables.Distance(*atoms) for atoms in bonds],
        "angles": [bi.observables.Angle(*atoms) for atoms in angles],
    }


def draw_correlations(
    result: bi.inference.FitResult,
    measured: bi.observables.Experiment,
    held_out: bi.observables.Experiment,
) -> None:
    """Measured and fitted correlation functions, and the one that was not fitted."""
    figure, axes = plt.subplots(1, 3, figsize=(plots.DOUBLE, 2.5), layout="constrained")
    tables = [measured.select(name) for name in FITTED] + [held_out]
    for ax, name, table in zip(axes, (*FITTED, HELD_OUT), tables, strict=True):
        draws = result.predict(table.lags, name).reshape(-1, len(table.lags))
        low, high = np.quantile(draws, [0.03, 0.97], axis=0)
        ns = table.lags / 1000
        band = {"color": plots.MEANING["corrected"], "alpha": 0.3, "lw": 0}
        ax.fill_between(ns, low, high, label="corrected model, 94 %", **band)
        md, left_out = plots.MEANING["MD"], name == HELD_OUT
        face = {"marker": "o", "ms": 4, "mfc": "white" if left_out else md}
        ax.errorbar(ns, table.values, table.sigma, color=md, ls="", capsize=2, label="MD", **face)
        ax.axhline(0, color=plots.GREY, lw=0.5)
        title = "distance H to H$_\\alpha$, held out" if left_out else name
        ax.set(title=title, xlabel="lag / ns", xticks=ns)
    axes[0].set_ylabel("C(lag)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(store.RESULTS / "ala2_correlations.png", dpi=150)
    plt.close(figure)


def draw_rows(
    molecule: bi.systems.Molecule,
    model: bi.Interpolator,
    step: Rollout,
    starts: Frames,
    n_int: float,
    seed: int,
) -> None:
    """phi and psi at increasing lags after one frame of the right side of phi."""
    phi, psi = (bi.observables.feature(name, molecule.topology) for name in ("phi", "psi"))
    first = starts.x[(phi(starts.x) - 1.0).abs().argmin()]
    alone = Rollout([Propagate(model.lag_max)] * (STEP_LAG // model.lag_max), STEP_LAG, step.solver)
    lags = (1, 2, 3)
    rows: dict[str, Any] = {}
    for name, rollout in (("uncorrected", alone), ("corrected", step)):
        made = bi.sampling.sample(
            model,
            rollout,
            starts=first.expand(N_SHOWN, -1, -1),
            n_steps=max(lags),
            n_int=n_int,
            seed=seed,
            device=model.scaling.scale.device,
        )
        assert made is not None
        x = made.frames.unflatten(0, (len(made), -1))
        rows[name] = [torch.stack([phi(x[:, k]), psi(x[:, k])], dim=1).numpy() for k in lags]
    md = read_npz(FOLDER / "reference.npz", ("phi", "psi"))
    series = [np.stack([md["phi"], md["psi"]], axis=-1).astype(np.float32)]
    near = (
        np.abs(series[0] - np.array([float(phi(first[None])), float(psi(first[None]))])) < 0.5
    ).all(-1)
    rows["MD"] = [
        series[0][:, k * STEP_LAG :][near[:, : near.shape[1] - k * STEP_LAG]] for k in lags
    ]
    figure = plots.ramachandran_figure(
        rows,
        [f"{k * STEP_LAG / 1000:g} ns" for k in lags],
        start=np.array([float(phi(first[None])), float(psi(first[None]))]),
        bins=36,
    )
    figure.savefig(store.RESULTS / "ala2_ramachandran.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
