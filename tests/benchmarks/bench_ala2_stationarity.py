"""Does the corrected step leave the equilibrium of alanine dipeptide alone?

    python tests/benchmarks/bench_ala2_stationarity.py [--walkers 1024] [--device auto]

From weighted equilibrium frames, ten steps of 1 ns at the n_int that `bench_ala2_kinetics.py`
found, the paper's step beside the one that was fitted. After each, the share of walkers on the
right side of phi, which should stay that of the umbrella windows. First, the share that one move
carries over from the left side: no trajectory of the training data crosses, so that what a
relaxation carries over is error of the trained model.
"""

import argparse
import json

import numpy as np
import store
import torch
from bench_ala2_kinetics import FOLDER, STEP_LAG, compiled_model
from torch import Tensor

import bopito_inverse as bi
from bopito_inverse.arguments import as_device
from bopito_inverse.datasets import Frames
from bopito_inverse.sampling import Interpolate, Propagate, Renoise, Rollout, renoising_step

N_STEPS = 10


def main() -> None:
    """Sample and keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--walkers", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = as_device(options.device)
    molecule = bi.systems.AlanineDipeptide()
    model = compiled_model(molecule)
    phi = bi.observables.feature("phi", molecule.topology)

    def right(x: Tensor) -> Tensor:
        return (phi(x) > 0) & (phi(x) < 2.2)

    frames = Frames.read(FOLDER / "frames.npz")
    starts = frames.sample(options.walkers, torch.Generator().manual_seed(options.seed))
    n_int = json.loads((store.RESULTS / "ala2_kinetics.json").read_text())["fit"]["n_int"]["mean"]
    relax = Propagate(model.lag_max)
    found = {"equilibrium": float(frames.weights[right(frames.x)].sum())}
    steps = {
        "relax": (Rollout([relax], STEP_LAG), 1),
        "renoise": (Rollout([Renoise()], STEP_LAG), 1),
        "relax, renoise, relax": (renoising_step(model.lag_max, STEP_LAG, slower=False), N_STEPS),
        "interpolate, relax": (Rollout([Interpolate(), relax], STEP_LAG), N_STEPS),
    }
    for name, (step, n_steps) in steps.items():
        made = bi.sampling.sample(
            model,
            step,
            starts=starts,
            n_steps=n_steps,
            n_int=n_int,
            seed=options.seed,
            device=device,
            progress=True,
        )
        assert made is not None
        x = made.frames.unflatten(0, (len(made), -1))
        side = torch.stack([right(x[:, k]) for k in range(n_steps + 1)])
        share = side.double().mean(1).numpy()
        found[name] = {
            "right side after each step": share.round(4).tolist(),
            "standard error": np.sqrt(share * (1 - share) / len(made)).round(4).tolist(),
            "from the left side, first step": round(float(side[1, ~side[0]].double().mean()), 4),
        }
        print(f"{name}: {found[name]}", flush=True)
    store.write("ala2_stationarity", options.seed, found)


if __name__ == "__main__":
    main()
