"""The Boltzmann generator of alanine dipeptide against unbiased MD.

    python tests/benchmarks/bench_ala2_equilibrium.py [--frames 5000]

Dihedrals: Jensen-Shannon divergence (nats) of phi, psi and of both to the reference, with that of
its two halves, and of as many frames drawn from it; the same for the weighted frames of which s_eq
learned four times as many. The share of the right side of phi, 0 to 126 degrees, is that of the
umbrella windows in the reference, too (see data/ala2/README.md): what is compared is how angles are
distributed within each side, and how well s_eq keeps the share that it was given. Bonds, angles and
potential energies (OpenMM): those of frames of s_eq beside those of the weighted frames, as
quantiles of the energy and ratios of standard deviations.

Solver: frames from the same noise by several solvers, as root mean square distances (Angstrom, mean
over atoms, median over frames) to those of 150 evaluations.
"""

import argparse
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import store
import torch

import bopito_inverse as bi
from bopito_inverse import plots
from bopito_inverse.stages.dihedrals import Dihedrals, angles_of, histogram, jensen_shannon

FOLDER = store.DATA / "ala2"
NAMES = ("phi", "psi")
BINS, JOINT_BINS = 60, 40
N_ENERGIES = 2000
N_SOLVED, FINE = 128, 150  # frames, evaluations
SOLVERS = [(12, 3), (20, 3), (50, 3), (20, 1), (50, 1)]  # evaluations, order; order 1 is DDIM
RIGHT = (0.0, 2.2)  # rad


def main() -> None:
    """Measure, print, draw and keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=5000)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--checkpoint", default=FOLDER / "equilibrium.safetensors")
    options = parser.parse_args()
    molecule = bi.systems.AlanineDipeptide()
    s_eq = bi.models.load(options.checkpoint, system=molecule.name)
    solver = bi.sampling.DPMSolver(options.evaluations)
    made = bi.sampling.generate(s_eq, options.frames, seed=0, solver=solver)
    learned = bi.datasets.Frames.read(FOLDER / "frames.npz")
    md = Dihedrals.read(FOLDER / "reference.npz", NAMES)
    drawn = md.frame_weights.multinomial(
        len(made), True, generator=torch.Generator().manual_seed(0)
    )
    halves = [(half.angles(*NAMES), half.frame_weights) for half in md.halves()]
    sets: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {
        "s_eq": (angles_of(made, NAMES, molecule.topology), None),
        "weighted frames": (angles_of(learned.x, NAMES, molecule.topology), learned.weights),
    }
    sets["as many frames of MD"] = (md.angles(*NAMES)[drawn], None)
    found: dict[str, Any] = {"frames": len(made), "evaluations": options.evaluations}
    found["jensen_shannon"] = {
        name: divergence(angles, weights, md.angles(*NAMES), md.frame_weights)
        for name, (angles, weights) in sets.items()
    }
    sets["MD"] = (md.angles(*NAMES), md.frame_weights)
    found["jensen_shannon"]["halves of MD"] = divergence(*halves[0], *halves[1])
    del sets["as many frames of MD"]
    found["right side of phi"] = {name: right_share(*both) for name, both in sets.items()}
    found["MD, ns"] = len(md.angles("phi")) * md.frame_time / 1000
    found |= geometry(molecule, made, learned)
    found["energy"] = energies(molecule, made, learned)
    found["solver, Angstrom"] = solver_errors(s_eq)
    for key, value in found.items():
        print(f"{key}: {value}")
    figure = plots.ramachandran_figure(
        {"equilibrium": [x if w is None else (x, w) for x, w in sets.values()]},
        list(sets),
    )
    figure.savefig(store.RESULTS / "ala2_equilibrium.png", dpi=150)
    plt.close(figure)
    store.write("ala2_equilibrium", 0, found)


def divergence(
    p: torch.Tensor, p_weights: torch.Tensor | None, q: torch.Tensor, q_weights: Any
) -> dict[str, float]:
    """Of phi, psi and both."""
    columns = {"phi": [0], "psi": [1], "joint": [0, 1]}
    bins = {"phi": BINS, "psi": BINS, "joint": JOINT_BINS}
    return {
        name: jensen_shannon(
            histogram(p[:, own], bins[name], p_weights).ravel(),
            histogram(q[:, own], bins[name], q_weights).ravel(),
        )
        for name, own in columns.items()
    }


def right_share(angles: torch.Tensor, weights: torch.Tensor | None) -> float:
    """Probability of phi between 0 and 126 degrees."""
    inside = ((angles[:, 0] > RIGHT[0]) & (angles[:, 0] < RIGHT[1])).double()
    return float(inside.mean() if weights is None else inside @ weights / weights.sum())


def geometry(
    molecule: bi.systems.Molecule, made: torch.Tensor, learned: bi.datasets.Frames
) -> dict[str, Any]:
    """Means and standard deviations of bonds (nm) and angles (rad), s_eq beside its frames."""
    bonds = molecule.bonds.tolist()
    near = [sorted({i for b in bonds if j in b for i in b} - {j}) for j in range(len(made[0]))]
    angles = [(i, j, k) for j, own in enumerate(near) for i in own for k in own if i < k]
    rows = {
        "bonds": [bi.observables.Distance(*atoms) for atoms in bonds],
        "angles": [bi.observables.Angle(*atoms) for atoms in angles],
    }
    found = {}
    for name, features in rows.items():
        worst_shift, ratios = 0.0, []
        for feature in features:
            own, truth = feature(made).double(), feature(learned.x).double()
            mean = learned.weights @ truth
            std = float((learned.weights @ (truth - mean).square()).sqrt())
            worst_shift = max(worst_shift, abs(float(own.mean() - mean)))
            if std > 1e-4:  # others are constrained
                ratios.append(float(own.std()) / std)
        found[name] = {
            "largest shift of a mean": worst_shift,
            "ratio of standard deviations, smallest, median, largest": [
                float(x) for x in np.quantile(ratios, [0, 0.5, 1])
            ],
        }
    return found


def solver_errors(s_eq: torch.nn.Module) -> dict[str, float]:
    """Median distance of frames to those of many evaluations from the same noise."""

    def frames(evaluations: int, order: int) -> torch.Tensor:
        solver = bi.sampling.DPMSolver(evaluations, order)
        return bi.sampling.generate(s_eq, N_SOLVED, seed=0, solver=solver)

    exact = frames(FINE, 3)
    return {
        f"{evaluations} evaluations, order {order}": round(
            10 * float((frames(evaluations, order) - exact).norm(dim=2).mean(1).median()), 4
        )
        for evaluations, order in SOLVERS
    }


def energies(
    molecule: bi.systems.Molecule, made: torch.Tensor, learned: bi.datasets.Frames
) -> dict[str, list[float]]:
    """5, 25, 50, 75 and 95 % quantiles of the potential energy, kJ/mol."""
    truth = learned.sample(N_ENERGIES, torch.Generator().manual_seed(0))
    sets = {"s_eq": made[:N_ENERGIES], "weighted frames": truth}
    return {
        name: np.quantile(molecule.energy(x).numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])
        .round(1)
        .tolist()
        for name, x in sets.items()
    }


if __name__ == "__main__":
    main()
