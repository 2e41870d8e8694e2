"""Speed of Langevin simulation: python tests/benchmarks/bench_langevin.py [--device cuda]."""

import argparse
import time

import torch

from bopito_inverse.arguments import as_device
from bopito_inverse.simulate import langevin
from bopito_inverse.systems import Prinz

JOB = 50_000 * 99 * 500  # particle-steps of 50,000 trajectories of 100 frames of 500 steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trajectories", type=int, default=50_000)
    parser.add_argument("--frames", type=int, default=11)
    arguments = parser.parse_args()
    device, system = as_device(arguments.device), Prinz()
    x_0 = torch.rand(arguments.trajectories, 1) * 2 - 1
    n_steps = arguments.trajectories * (arguments.frames - 1) * system.steps_per_frame
    for label, barrier in (("free", None), ("barrier", 0.0)):
        langevin(system, x_0, 2, device=device)  # warm up
        start = time.perf_counter()
        langevin(system, x_0, arguments.frames, barrier=barrier, device=device)
        rate = n_steps / (time.perf_counter() - start)
        print(
            f"{label:8s} {device.type}: {rate / 1e6:.1f} million particle-steps per second; "
            f"50,000 trajectories x 100 frames x 500 steps: {JOB / rate:.1f} s"
        )


if __name__ == "__main__":
    main()
