"""Peak memory of a sampling run that is streamed to a file, in a process of its own.

    python tests/benchmarks/bench_sampling_memory.py [--trajectories 10000] [--steps 1000]

10 million frames must stay under 2 GB. An untrained network of the usual size is used with few
solver evaluations: memory depends on neither the weights nor the number of evaluations. Give
`--checkpoint` to sample a trained model, and `--evaluations 20` for its time.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LIMIT_GB = 2.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--evaluations", type=int, default=2)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def sample_to(out: Path, options: argparse.Namespace) -> None:
    import bopito_inverse as bi

    if options.checkpoint:
        from bopito_inverse.models.checkpoint import load

        bopito = load(options.checkpoint)
    else:
        network = {"width": options.width, "depth": 1}
        s_eq = bi.models.EquilibriumScore((1,), network)
        bopito = bi.models.BoPITOScore(s_eq, bi.models.DynamicScore((1,), network), 0.994, 100)
    step = bi.sampling.Rollout(
        [bi.sampling.Interpolate()],
        step_lag=100,
        solver=bi.sampling.DPMSolver(options.evaluations),
    )
    before = peak_gb()
    start = time.perf_counter()
    bi.sampling.sample(
        bi.Interpolator(bopito),
        step,
        n_int=120.0,
        starts=torch.zeros(options.trajectories, 1),
        n_steps=options.steps,
        out=out,
        device="cpu",
    )
    seconds = time.perf_counter() - start
    frames = options.trajectories * options.steps
    print(f"{frames:,} frames in {seconds:.0f} s, {out.stat().st_size / 1e6:.0f} MB on disk")
    print(f"peak memory {peak_gb():.3f} GB, of which {before:.3f} GB before sampling")
    if peak_gb() > LIMIT_GB:
        sys.exit(f"peak memory is above {LIMIT_GB} GB")


def peak_gb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    options = arguments()
    if options.child:
        sample_to(options.child, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        child = [sys.executable, *sys.argv, "--child", str(Path(folder) / "frames.npz")]
        sys.exit(subprocess.run(child).returncode)


if __name__ == "__main__":
    main()
