"""Time of the molecular network: evaluation, training step and samples of alanine dipeptide.

    python tests/benchmarks/bench_painn.py [--compile] [--precision bfloat16] [--device cuda]

64 features, 5 layers, 22 atoms, frames of random numbers, as the peer was timed: the official code
of BoPITO (olsson-group/bopito, f169f16) on a machine of the same kind, 2 threads, 2 cores, no GPU.
Ratios are its times over those measured here, and on a GPU say nothing of the code alone.

There, shares of two ceilings are given, too: the arithmetic of all matrix products over their time,
as a share of the rate of one large product in the same precision; and the bytes that the operators
of PyTorch read and write, one by one, over the same time, as a share of the rate of a large copy.
Compiled, operators share what they read, and the second is more than what goes through the memory.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import store
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

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


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that operators read and write, one by one; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        read, written = storages((args, kwargs)), storages(made)
        if written.keys() - read.keys():
            self.bytes += sum((read | written).values())
        return made


def storages(tree: Any) -> dict[int, int]:
    """Bytes of each tensor, by where it is stored; what is broadcast counts once."""
    return {
        x.untyped_storage().data_ptr(): min(
            x.numel() * x.element_size(), x.untyped_storage().nbytes()
        )
        for x in tree_leaves(tree)
        if isinstance(x, torch.Tensor)
    }


class Ceilings:
    """Rates of a GPU: operations a second of a matrix product, bytes a second of a copy."""

    def __init__(self, device: str, precision: str) -> None:
        a = torch.randn(8192, 8192, device=device, dtype=getattr(torch, precision))
        self.product = 2 * 8192**3 / seconds(lambda: a @ a, device)
        b = torch.zeros(2**31, dtype=torch.uint8, device=device)
        self.copy = 2 * len(b) / seconds(b.clone, device)
        print(f"{self.product / 1e12:.3g} TFLOP/s, {self.copy / 1e12:.3g} TB/s")

    def shares(self, work: Callable[[], object], taken: float) -> dict[str, float]:
        """Of both, for what takes so many seconds."""
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            work()
        shares = {
            "share of the matrix rate": flops.get_total_flops() / taken / self.product,
            "share of the bandwidth": traffic.bytes / taken / self.copy,
        }
        print(", ".join(f"{name} {share:.3g}" for name, share in shares.items()))
        return shares


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device, cuda = options.device, options.device != "cpu"
    if options.precision == "bfloat16":
        torch.set_autocast_dtype(device, torch.bfloat16)
        torch.set_autocast_enabled(device, True)
    bopito, plain = model(device), model(device)
    if options.compile:
        for part in bopito.modules():
            if isinstance(part, PaiNN):
                part.compile_layers()
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "compiled": options.compile}
    found["precision"] = options.precision
    ceilings = Ceilings(device, options.precision) if cuda else None
    generator = torch.Generator(device).manual_seed(0)
    for name, score in (("equilibrium", bopito.s_eq), ("dynamic", bopito.s_dyn)):
        found[name] = {"parameters": sum(p.numel() for p in score.parameters())}
        for batch in (64, 256, 1024, *([4096] if cuda else [])):
            x = torch.randn(batch, 22, 3, device=device)
            lag, t = torch.tensor(20.0, device=device), torch.tensor(0.5, device=device)

            def evaluation(kind: Any, x=x, lag=lag, t=t, name=name) -> Callable[[], object]:
                eps = kind.s_eq if name == "equilibrium" else kind.s_dyn.bind(x, lag)
                return lambda: eps(x, t)

            with torch.no_grad():
                taken = seconds(evaluation(bopito), device)
                keep(found[name], "evaluation", batch, taken, PEER[name])
                if ceilings is not None:  # operators inside compiled layers cannot be counted
                    shares = ceilings.shares(evaluation(plain), taken)
                    found[name][f"evaluation, batch {batch}"] |= shares
        for batch in (64, 256, *([1024, 4096] if cuda else [])):
            x = torch.randn(batch, 22, 3, device=device)
            condition = () if name == "equilibrium" else (x, torch.full((batch,), 20.0).to(device))

            def step(score=score, x=x, condition=condition) -> None:
                score.zero_grad()
                _velocity_loss(score, x, condition, generator).backward()

            keep(found[name], "training", batch, seconds(step, device), PEER[name])
    for batch in (256, *([4096] if cuda else [])):
        x = torch.randn(batch, 22, 3, device=device)
        normal = Normal(generator, scaling=bopito.scaling)
        for evaluations in (20, PEER_EVALUATIONS):
            move = partial(Propagate(20), bopito, x, x[0, 0, 0], DPMSolver(evaluations), normal)
            with torch.no_grad():
                taken = seconds(move, device)
            rate = len(x) / taken
            peer = 256 / PEER_EVALUATIONS / sum(PEER[name]["evaluation"][256] for name in PEER)
            what = f"samples per second, {evaluations} evaluations, batch {batch}"
            found[what] = [rate, rate / peer]
            print(f"{what}: {rate:.3g}, {rate / peer:.3g} times")
    name = "painn_gpu" if cuda else "painn"
    name += "_compiled" * options.compile + "_bfloat16" * (options.precision == "bfloat16")
    store.write(name, 0, found)


def keep(row: dict[str, Any], what: str, batch: int, taken: float, peer: dict[str, Any]) -> None:
    """Note a time and, where the peer was timed at this size, its ratio to the peer's."""
    row[f"{what}, batch {batch}"] = {"seconds": float(f"{taken:.4g}")}
    line = f"{what}, batch {batch}: {taken:.3g} s"
    if batch in peer[what]:
        ratio = peer[what][batch] / taken
        row[f"{what}, batch {batch}"]["ratio"] = round(ratio, 1)
        line += f", peer {peer[what][batch]:g} s, {ratio:.3g} times"
    print(line)


if __name__ == "__main__":
    main()
