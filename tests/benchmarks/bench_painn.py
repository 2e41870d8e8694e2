"""Time of the molecular network: evaluation, training step and samples of alanine dipeptide.

    python tests/benchmarks/bench_painn.py [--compile] [--device cuda]

64 features, 5 layers, 22 atoms, frames of random numbers, as the peer was timed: the official code
of BoPITO (olsson-group/bopito, f169f16) on a machine of the same kind, 2 threads, 2 cores, no GPU.
Ratios are its times over those measured here.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import store
import torch

import bopito_inverse as bi
from bopito_inverse.models.painn import PaiNN
from bopito_inverse.models.scores import DynamicScore, EquilibriumScore
from bopito_inverse.models.train import _velocity_loss
from bopito_inverse.noise import Scaling, VPSchedule
from bopito_inverse.sampling import DPMSolver, Normal, Propagate

PEER = {  # seconds; the shared figures of the peer
    "equilibrium": {
        "evaluation": {64: 1.10, 256: 6.5, 1024: 32.7},
        "training": {64: 1.92, 256: 14.3},
    },
    "dynamic": {"evaluation": {64: 1.30, 256: 10.2, 1024: 47.4}, "training": {64: 2.83, 256: 20.6}},
}
PEER_EVALUATIONS = 50
REPEATS = 5  # the median of so many


def model(device: str) -> bi.models.BoPITOScore:
    """Both scores, untrained."""
    molecule = bi.systems.AlanineDipeptide()
    network = {
        "kind": "painn",
        "atom_types": molecule.atom_types.tolist(),
        "bonds": molecule.bonds.tolist(),
        "width": 64,
        "depth": 5,
    }
    torch.manual_seed(0)
    parts = [
        kind(molecule.event_shape, network, VPSchedule(5.0), Scaling(0.0, 0.17, centred=True))
        for kind in (EquilibriumScore, DynamicScore)
    ]
    return bi.models.BoPITOScore(*parts, lambda_hat=0.999, lag_max=50).to(device)


def seconds(work: Callable[[], object], device: str) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[REPEATS // 2]


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = options.device
    bopito = model(device)
    if options.compile:
        for part in bopito.modules():
            if isinstance(part, PaiNN):
                part.compile_layers()
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "compiled": options.compile}
    generator = torch.Generator(device).manual_seed(0)
    for name, score in (("equilibrium", bopito.s_eq), ("dynamic", bopito.s_dyn)):
        found[name] = {"parameters": sum(p.numel() for p in score.parameters())}
        for batch in (64, 256, 1024):
            x = torch.randn(batch, 22, 3, device=device)
            lag = torch.tensor(20.0, device=device)
            t = torch.tensor(0.5, device=device)
            with torch.no_grad():
                eps = score if name == "equilibrium" else score.bind(x, lag)
                taken = seconds(lambda eps=eps, x=x, t=t: eps(x, t), device)
            keep(found[name], "evaluation", batch, taken, PEER[name])
        for batch in (64, 256):
            x = torch.randn(batch, 22, 3, device=device)
            condition = () if name == "equilibrium" else (x, torch.full((batch,), 20.0).to(device))

            def step(score=score, x=x, condition=condition) -> None:
                score.zero_grad()
                _velocity_loss(score, x, condition, generator).backward()

            keep(found[name], "training", batch, seconds(step, device), PEER[name])
    x = torch.randn(256, 22, 3, device=device)
    normal = Normal(generator, scaling=bopito.scaling)
    for evaluations in (20, PEER_EVALUATIONS):
        solver, move = DPMSolver(evaluations), Propagate(20)
        with torch.no_grad():
            taken = seconds(lambda m=move, s=solver: m(bopito, x, x[0, 0, 0], s, normal), device)
        rate = len(x) / taken
        peer = 256 / PEER_EVALUATIONS / sum(PEER[name]["evaluation"][256] for name in PEER)
        found[f"samples per second, {evaluations} evaluations"] = [rate, rate / peer]
        print(f"BoPITO, {evaluations} evaluations: {rate:.3g} samples/s, {rate / peer:.3g} times")
    store.write("painn_compiled" if options.compile else "painn", 0, found)


def keep(row: dict[str, Any], what: str, batch: int, taken: float, peer: dict[str, Any]) -> None:
    """Note a time and its ratio to the peer's."""
    ratio = peer[what][batch] / taken
    row[f"{what}, batch {batch}"] = {"seconds": round(taken, 4), "ratio": round(ratio, 1)}
    print(f"{what}, batch {batch}: {taken:.3g} s, peer {peer[what][batch]:g} s, {ratio:.3g} times")


if __name__ == "__main__":
    main()
