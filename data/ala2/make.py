"""Make the files of this folder: `python data/ala2/make.py [STAGE ...]`, all stages by default.

    umbrella    umbrella.npz               windows on phi, and on psi at the barrier of phi
    biased      biased.npz                 short trajectories of both sides of phi, none of which
                                           crosses to the other
    reference   reference.npz              angles along unbiased MD, in batches, to 1 microsecond
    experiment  experiment.csv, held_out.csv    correlation functions of the reference
    frames      frames.npz                 equilibrium frames with weights, a part of those learned
    equilibrium equilibrium.safetensors
    dynamic     bopito.safetensors
    refine      bopito.safetensors, trained on where it is decided on which side of phi a draw ends

The work is done under results/ala2 and resumes there after a kill. On two cores, of which a step of
MD takes some 20 us, the stages take about 15 minutes, 5 minutes, 1 hour and 15 minutes, seconds,
seconds, half an hour, 2 to 3 hours and 50 minutes; the reference takes 3.5 hours where a step takes
50 us. The stage `dynamic` of the file that is here was run on one H200 GPU, in 2.5 minutes.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

import bopito_inverse as bi
from bopito_inverse.datasets import read_npz, write_npz
from bopito_inverse.models.train import NetworkConfig, TrainingConfig

HERE = Path(__file__).resolve().parent
WORK = Path("results/ala2")
SEED = 0
LAGS = np.array([1000, 2000, 3000])
DISTANCE = "distance(ALA2-H, ALA2-HA)"  # as an NOE sees it
REFERENCE = {"phi": "phi", "psi": "psi", "distance": DISTANCE}
N_REFERENCE, BATCH, BATCH_RIGHT = 200, 10, 8  # trajectories of 5 ns, those from the right side

LAG_MAX = 50
LAMBDA_HAT = 0.9995
SIZE = NetworkConfig(width=48, depth=4)
EQUILIBRIUM = TrainingConfig(
    steps=20_000,
    batch_size=128,
    learning_rate=3e-3,
    noise_start=5.0,
    validation=0.05,
    compile=True,
    network=SIZE,
)
DYNAMIC = EQUILIBRIUM.model_copy(
    update={
        "steps": 5_000,
        "batch_size": 2048,
        "lag_sampling": "uniform",
        "network": NetworkConfig(width=48, depth=3),
    }
)
REFINED = DYNAMIC.model_copy(
    update={"steps": 6_000, "batch_size": 512, "learning_rate": 2e-3, "noise_focus": 0.9}
)

# phi, its stiffness, psi, its stiffness: radians and kJ/mol/rad^2. Psi is free but where phi has
# its barrier: there the way leads through psi of 2.4 to 0.8, and psi relaxes too slowly.
WINDOWS = [
    *[(phi, 20.0, 0.0, 0.0) for phi in (3.0, -2.9, -2.6, -2.3, -2.0, -1.8, -1.6, -1.4, -1.2, -1.0)],
    (-0.90, 80.0, 2.4, 10.0),
    (-0.75, 120.0, 2.4, 20.0),
    (-0.60, 200.0, 2.4, 20.0),
    (-0.40, 200.0, 2.2, 20.0),
    (-0.20, 200.0, 1.9, 20.0),
    (-0.03, 250.0, 1.6, 20.0),
    (0.14, 250.0, 1.2, 20.0),
    (0.25, 200.0, 0.8, 10.0),
    (0.35, 150.0, 0.0, 0.0),
    *[(phi, 60.0, 0.0, 0.0) for phi in (0.6, 0.8, 1.0, 1.3)],
]


def umbrella(molecule: bi.systems.Molecule) -> None:
    """Windows that lead from one side of phi to the other."""
    first = bi.simulate.molecular_dynamics(
        molecule,
        molecule.positions.expand(10, *molecule.event_shape),
        n_frames=201,
        folder=WORK / "first",
        seed=SEED + 1,
        platform="Reference",
        executor=os.cpu_count(),
    )
    windows = np.array(WINDOWS)
    samples = bi.simulate.umbrella_dihedrals(
        molecule,
        ["phi", "psi"],
        windows[:, ::2],
        windows[:, 1::2],
        n_frames=1000,
        seed=SEED + 2,
        n_walkers=10,
        burn_in=50,
        stride=5,
        starts=torch.stack([trajectory[-1] for trajectory in first]),
        folder=WORK / "umbrella",
        executor=os.cpu_count(),
        progress=True,
    )
    samples.write(HERE / "umbrella.npz")
    print(bi.simulate.mbar(samples).status)


def biased(molecule: bi.systems.Molecule) -> None:
    """Short trajectories from equilibrium of either side of phi; those that cross are left out."""
    made = from_both_sides(molecule, 150, 150, 201, "biased", SEED + 3)
    sides = [on_the_right(molecule, trajectory) for trajectory in made]
    stays = torch.tensor([bool((side == side[0]).all()) for side in sides])
    print(f"{int(stays.sum())} of {len(made)} trajectories stay on their side of phi")
    made.take(stays.nonzero()[:, 0]).write(HERE / "biased.npz")


def reference(molecule: bi.systems.Molecule) -> None:
    """Unbiased MD in batches, of which two angles and a distance are kept, in half precision.

    Most trajectories start on the right side of phi, where few would ever go. At each time, frames
    are weighted so that each side has its share of the equilibrium; a time counts as it has frames
    on the right. Batches that the file holds are not simulated again.
    """
    path, kept = HERE / "reference.npz", {name: [] for name in REFERENCE}
    if path.exists():
        before = read_npz(path, tuple(REFERENCE))
        kept = {name: [before[name]] for name in REFERENCE}
    done, share = sum(map(len, kept["phi"])) // BATCH, right_share(molecule)
    for batch in range(done, N_REFERENCE // BATCH):
        print(f"batch {batch + 1} of {N_REFERENCE // BATCH}", flush=True)
        n, seed = (BATCH_RIGHT, BATCH - BATCH_RIGHT), SEED + 100 + 2 * batch
        made = from_both_sides(molecule, *n, 5001, f"reference/{batch:02d}", seed)
        for name, values in kept.items():
            feature = bi.observables.feature(REFERENCE[name], molecule.topology)
            values.append(feature(made.frames).view(BATCH, -1).numpy().astype(np.float16))
        series = {name: np.concatenate(values) for name, values in kept.items()}
        weights = at_each_time(torch.from_numpy(series["phi"]), share).float().numpy()
        frame_time = np.float64(molecule.frame_time)
        write_npz(path, **series, weights=weights, frame_time=frame_time)


def at_each_time(phi: torch.Tensor, share: float) -> torch.Tensor:
    """Weights of frames with angles phi (n, n_frames), with which the right side has its share."""
    right = is_right(phi)
    return torch.where(right, share, (1 - share) * right.sum(0) / (~right).sum(0))


def experiment(molecule: bi.systems.Molecule) -> None:
    """Correlation functions of the reference, with the covariance of a jackknife."""
    arrays = read_npz(HERE / "reference.npz", ("phi", "distance"))
    phi, distance = (torch.from_numpy(arrays[name]).float() for name in ("phi", "distance"))
    series = {"sin(phi)": phi.sin(), "cos(phi)": phi.cos(), DISTANCE: distance}
    for file, names in (("experiment", ("sin(phi)", "cos(phi)")), ("held_out", (DISTANCE,))):
        own = [series[name] for name in names]
        values, covariance = measured(own, phi, right_share(molecule))
        table = bi.observables.Experiment(
            np.tile(LAGS, len(names)),
            values,
            np.sqrt(np.diag(covariance)),
            covariance,
            observable=np.repeat(names, len(LAGS)),
        )
        table.write(HERE / f"{file}.csv", HERE / f"{file}_covariance.npz")
        print(table)


def measured(
    series: list[torch.Tensor], phi: torch.Tensor, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Autocorrelations of numbers along trajectories, each (n, n_frames), one after the other.

    C = sum_s p_s E[z_t z_{t + lag} | side s at t], where p_s is the share of a side, and z has mean
    zero and variance one in the equilibrium: frames of each side count alike, whatever their time.
    The covariance is that of a jackknife over trajectories, those of either side by themselves.
    """
    sides = torch.stack([is_right(phi), ~is_right(phi)]).double()  # (2, n, n_frames)
    weights = sum(p * own / own.sum() for p, own in zip((share, 1 - share), sides, strict=True))
    sums = []  # of z_t z_{t + lag} and of frames, by side: each (2, 2, n)
    for x in series:
        z = x.double() - (weights * x).sum()
        z = z / (weights * z.square()).sum().sqrt()
        for lag in LAGS:
            now, both = sides[..., :-lag], z[:, :-lag] * z[:, lag:]
            sums.append(torch.stack([(now * both).sum(-1), now.sum(-1)]))
    total = torch.stack(sums)  # (n_values, 2, 2, n)

    def values(rows: torch.Tensor) -> np.ndarray:
        product, count = total[..., rows].sum(-1).unbind(1)
        return (product / count @ torch.tensor([share, 1 - share]).double()).numpy()

    rows = torch.arange(len(phi))
    begins_right = is_right(phi[:, 0])
    covariance = np.zeros((len(total), len(total)))
    for side in (rows[begins_right], rows[~begins_right]):
        without = np.stack([values(rows[rows != i]) for i in side])
        off = without - without.mean(0)
        covariance += off.T @ off * (len(side) - 1) / len(side)
    return values(rows), covariance


def from_both_sides(
    molecule: bi.systems.Molecule, n_right: int, n_left: int, n_frames: int, name: str, seed: int
) -> bi.datasets.Trajectories:
    """MD from the umbrella equilibrium within each side of phi, first all of the right side."""
    windows = umbrella_frames()
    generator = torch.Generator().manual_seed(seed)
    right = on_the_right(molecule, windows.x)
    sides = [windows.take(side.nonzero()[:, 0]) for side in (right, ~right)]
    starts = [side.sample(n, generator) for side, n in zip(sides, (n_right, n_left), strict=True)]
    return bi.simulate.molecular_dynamics(
        molecule,
        torch.cat(starts),
        n_frames,
        folder=WORK / name,
        seed=seed + 1,
        platform="Reference",
        executor=os.cpu_count(),
        progress=True,
    )


def frames(molecule: bi.systems.Molecule) -> None:
    """Every fourth of the frames that s_eq learns from."""
    learned = equilibrium_frames(molecule)
    print(learned)
    learned.take(torch.arange(0, len(learned), 4)).write(HERE / "frames.npz")


def equilibrium(molecule: bi.systems.Molecule) -> None:
    """The score s_eq."""
    s_eq = bi.models.train_equilibrium(
        equilibrium_frames(molecule),
        config=EQUILIBRIUM,
        seed=SEED,
        folder=WORK / "equilibrium",
        progress=True,
        molecule=molecule,
    )
    made = {"seed": SEED, "settings": EQUILIBRIUM.model_dump(mode="json")}
    bi.models.save(s_eq, HERE / "equilibrium.safetensors", molecule.name, made)


def dynamic(molecule: bi.systems.Molecule) -> None:
    """The score s_dyn, beside s_eq."""
    bopito = bi.models.train_bopito(
        bi.datasets.Trajectories.read(HERE / "biased.npz"),
        bi.models.load(HERE / "equilibrium.safetensors", system=molecule.name),
        LAG_MAX,
        LAMBDA_HAT,
        config=DYNAMIC,
        seed=SEED,
        folder=WORK / "dynamic",
        progress=True,
    )
    made = {"seed": SEED, "settings": DYNAMIC.model_dump(mode="json")}
    bi.models.save(bopito, HERE / "bopito.safetensors", molecule.name, made)


def refine(molecule: bi.systems.Molecule) -> None:
    """The score s_dyn of the stage before, trained on with most of the noise levels in the middle.

    Before, about twice as many draws from the left side ended on the right as do then:
    `tests/benchmarks/bench_ala2_stationarity.py` after either stage.
    """
    first = bi.models.load(HERE / "bopito.safetensors", system=molecule.name)
    bopito = bi.models.train_bopito(
        bi.datasets.Trajectories.read(HERE / "biased.npz"),
        first.s_eq,
        LAG_MAX,
        LAMBDA_HAT,
        config=REFINED,
        seed=SEED + 1,
        folder=WORK / "refine",
        progress=True,
        s_dyn=first.s_dyn,
    )
    stages = [config.model_dump(mode="json") for config in (DYNAMIC, REFINED)]
    made = {"seed": [SEED, SEED + 1], "settings": stages}
    bi.models.save(bopito, HERE / "bopito.safetensors", molecule.name, made)


def equilibrium_frames(molecule: bi.systems.Molecule) -> bi.datasets.Frames:
    """Umbrella frames, and those of the biased trajectories, weighted.

    The trajectories are in equilibrium within each side of phi, so that their frames need but the
    share of their side, which the umbrella windows know. The two sets are weighted by their Kish
    effective sample sizes.
    """
    windows = umbrella_frames()
    x = bi.datasets.Trajectories.read(HERE / "biased.npz").frames
    paths = bi.datasets.Frames(x, by_side(molecule, on_the_right(molecule, x)))
    parts = [part.ess * part.weights for part in (windows, paths)]
    return bi.datasets.Frames(torch.cat([windows.x, paths.x]), torch.cat(parts))


def umbrella_frames() -> bi.datasets.Frames:
    """All frames of the windows, with their weights in the unbiased equilibrium."""
    samples = bi.simulate.BiasedSamples.read(HERE / "umbrella.npz")
    return bi.datasets.Frames(samples.frames_flat, bi.simulate.mbar_weights(samples))


def right_share(molecule: bi.systems.Molecule) -> float:
    """Probability of the right side of phi."""
    windows = umbrella_frames()
    return float(windows.weights[on_the_right(molecule, windows.x)].sum())


def by_side(molecule: bi.systems.Molecule, right: torch.Tensor) -> torch.Tensor:
    """Weights of frames that are in equilibrium within their side, so that each has its share."""
    share = right_share(molecule)
    return torch.where(right, share / right.sum(), (1 - share) / (~right).sum())


def on_the_right(molecule: bi.systems.Molecule, x: torch.Tensor) -> torch.Tensor:
    """Whether frames are on the right side of phi, (n,)."""
    return is_right(bi.observables.feature("phi", molecule.topology)(x))


def is_right(phi: torch.Tensor) -> torch.Tensor:
    """Whether phi (rad) is between 0 and 126 degrees."""
    return (phi > 0) & (phi < 2.2)


STAGES = {
    "umbrella": umbrella,
    "biased": biased,
    "reference": reference,
    "experiment": experiment,
    "frames": frames,
    "equilibrium": equilibrium,
    "dynamic": dynamic,
    "refine": refine,
}


def main() -> None:
    """Run the stages that are named, or all."""
    molecule = bi.systems.AlanineDipeptide()
    for stage in sys.argv[1:] or STAGES:
        print(stage)
        STAGES[stage](molecule)


if __name__ == "__main__":
    main()
