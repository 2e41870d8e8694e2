"""Where benchmarks keep what they found: data/results/NAME.json, and figures beside it."""

import json
import os
import platform
import sys
from pathlib import Path

import torch

import bopito_inverse as bi

DATA = Path(__file__).resolve().parents[2] / "data"
RESULTS = DATA / "results"
KEPT = DATA.parent / "results"  # where runs that were killed go on from; git ignores it


def write(name: str, seed: int, found: dict) -> None:
    """Write NAME.json: what was found, with the command, seed, versions and machine."""
    script, *arguments = sys.argv
    about = {
        "command": " ".join(["python", f"tests/benchmarks/{Path(script).name}", *arguments]),
        "seed": seed,
        "version": bi.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}",
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(about | found, indent=1) + "\n")
    print(f"wrote {path}")
