"""The derivative of a prediction in n_int: error, cost and peak memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_derivative.py          (some minutes)

Error: exact scores of Prinz, mu and the same with a barrier at x = 0, float64, against central
differences with the same random numbers, at several widths h; at wide h walkers tip over the
barrier, which differences count and the derivative along each rollout does not. Cost: a call with
backward over one without, for a network of the usual size and for exact scores, float32. Memory:
peak in a fresh process for each number of solver evaluations and of composite steps; reverse mode
through the whole rollout is the control. Writes data/results/derivative.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import store
import torch

import bopito_inverse as bi
from bopito_inverse.sampling import DPMSolver, Interpolate, Propagate, Rollout
from bopito_inverse.systems import Prinz, TransferOperator

SEED, GRID, LAG_MAX, LAMBDA_HAT, STEP_LAG = 0, 300, 50, 0.99, 100
WIDTHS = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
SIZES = [(10, 1), (50, 1), (200, 1), (10, 10), (50, 10), (200, 10)]  # evaluations, composite steps
CONTROLS = [(10, 1), (50, 1)]
FLAT = 1.1


def exact_model() -> bi.Interpolator:
    s_eq = TransferOperator(Prinz(), grid_size=GRID).equilibrium_score()
    dynamics = TransferOperator(Prinz(), barrier=0.0, grid_size=GRID)
    s_dyn = dynamics.dynamic_score(s_eq, LAMBDA_HAT)
    return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, LAG_MAX))


def network_model() -> bi.Interpolator:
    torch.manual_seed(SEED)
    scores = [of((1,)) for of in (bi.models.EquilibriumScore, bi.models.DynamicScore)]
    for score in scores:
        torch.nn.init.normal_(score.network.out.weight, std=0.03)
        score.requires_grad_(False)
    return bi.Interpolator(bi.models.BoPITOScore(*scores, LAMBDA_HAT, LAG_MAX))


def prediction(
    model: bi.Interpolator, n_replicas: int, evaluations: int = 20, lags: tuple = (100, 200, 300)
) -> bi.inference.Prediction:
    step = Rollout([Interpolate(), Propagate(LAG_MAX)], STEP_LAG, DPMSolver(evaluations))
    x = bi.observables.Correlation(lambda x: x, normalization="variance")
    generator = torch.Generator().manual_seed(SEED)
    starts = TransferOperator(Prinz(), grid_size=GRID).sample(5000, generator)
    return bi.inference.Prediction(model, step, x, lags, starts, SEED, n_replicas, "cpu")


def errors(n_replicas: int = 1024) -> list[dict]:
    """Largest relative error over three lags, at each h."""
    predict = prediction(exact_model().double(), n_replicas)
    rows = []
    for n_int in (30.0, 80.0, 150.0):
        n = torch.tensor(n_int, dtype=torch.float64, requires_grad=True)
        value = predict(n)
        slope = torch.stack([torch.autograd.grad(v, n, retain_graph=True)[0] for v in value])
        by_width = {}
        for h in WIDTHS:
            numeric = (predict(n_int + h) - predict(n_int - h)) / (2 * h)
            by_width[f"{h:g}"] = float(((slope - numeric) / numeric).abs().max())
        row = {"n_int": n_int, "derivative": slope.tolist(), "worst_relative_error": by_width}
        print(row)
        rows.append(row)
    return rows


def cost(model: bi.Interpolator, n_replicas: int = 2048, repeats: int = 5) -> dict:
    predict = prediction(model, n_replicas, lags=(100, 200))
    n = torch.tensor(80.0, requires_grad=True)

    def seconds(call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def derivative() -> None:
        predict(n).sum().backward()

    derivative()
    pairs = [(seconds(lambda: predict(80.0)), seconds(derivative)) for _ in range(repeats)]
    value_s, derivative_s = (min(column) for column in zip(*pairs, strict=True))
    return {"value_s": value_s, "derivative_s": derivative_s, "ratio": derivative_s / value_s}


def peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(evaluations: int, steps: int, reverse: bool) -> None:
    """Body of a fresh process: peak memory before and after one derivative of one chunk."""
    small = prediction(network_model(), 8, 2, (STEP_LAG,))  # what torch loads at first use
    small(torch.tensor(80.0, requires_grad=True)).sum().backward()
    predict = prediction(network_model(), 2048, evaluations, (steps * STEP_LAG,))
    n = torch.tensor(80.0, requires_grad=True)
    before = peak_mb()
    if reverse:
        frames = [*predict._steps(n.expand(2048), 0)]
        predict.obs(frames[0], frames[-1][None]).sum().backward()
    else:
        predict(n).sum().backward()
    made = {"evaluations": evaluations, "steps": steps, "before_mb": before, "peak_mb": peak_mb()}
    print(json.dumps(made | {"gradient": float(n.grad)}))


def memory(sizes: list[tuple[int, int]], *flags: str) -> list[dict]:
    rows = []
    for size in sizes:
        command = [sys.executable, __file__, "--measure", *map(str, size), *flags]
        made = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(made.stdout))
        print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measure", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--reverse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure, options.reverse)
        return
    rows = memory(SIZES)
    made = {
        "memory": rows,
        "memory_of_reverse_mode": memory(CONTROLS, "--reverse"),
        "peak_ratio": max(r["peak_mb"] for r in rows) / min(r["peak_mb"] for r in rows),
        "cost_network": cost(network_model()),
        "cost_exact": cost(exact_model()),
        "errors": errors(),
    }
    print({key: made[key] for key in ("peak_ratio", "cost_network", "cost_exact")})
    store.write("derivative", SEED, made)
    if made["peak_ratio"] > FLAT:
        sys.exit(f"peak memory varies by a factor {made['peak_ratio']:.2f}, expected {FLAT}")


if __name__ == "__main__":
    main()
