"""Importing has no side effects, and modules import only upwards in the order of the design."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bopito_inverse

PACKAGE = Path(bopito_inverse.__file__).parent
ORDER = (
    "arguments",
    "fan_out",
    "shipped",
    "noise",
    "systems",
    "datasets",
    "simulate",
    "models",
    "interpolator",
    "sampling",
    "observables",
    "inference",
    "diagnostics",
    "plots",
    "report",
    "config",
    "stages",
    "cli",
)
INDEPENDENT = {"observables": {"models", "interpolator", "sampling"}}
HEAVY = (
    "pymbar",
    "openmm",
    "mdtraj",
    "lightning",
    "pytorch_lightning",
    "arviz",
    "matplotlib",
    "deeptime",
)

SIDE_EFFECTS = f"""
import logging, random, sys, warnings
import numpy as np, torch

def state():
    loggers = logging.root.manager.loggerDict
    levels = {{name: getattr(loggers.get(name), "level", 0) for name in ("", *{HEAVY!r})}}
    levels["root"] = (logging.root.level, len(logging.root.handlers), logging.root.disabled)
    seeds = (torch.initial_seed(), torch.get_rng_state().tolist(), random.getstate())
    numpy_seed = np.random.get_state(legacy=False)["state"]["key"].tolist()
    torch_settings = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.get_default_device())
    return {{"filters": list(warnings.filters), "levels": levels, "seeds": seeds,
        "numpy": (numpy_seed, np.geterr()), "torch": torch_settings, "path": list(sys.path),
        "threads": torch.get_num_interop_threads(), "hook": sys.excepthook}}

import scipy.linalg, scipy.interpolate, scipy.special
before = state()
import bopito_inverse
after = state()
for name in before:
    if before[name] != after[name]:
        sys.exit(f"import changed {{name}}: {{before[name]}} to {{after[name]}}"[:2000])
loaded = sorted({set(HEAVY)!r} & set(sys.modules))
if loaded:
    sys.exit(f"import loaded {{loaded}}")
"""


def test_importing_has_no_side_effects() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", SIDE_EFFECTS], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def room(path: Path) -> str:
    """The part of the package that a file belongs to, empty for the package itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Rooms that a file imports, wherever in the file."""
    package = ["bopito_inverse", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "bopito_inverse" and name != "bopito_inverse.__version__":
                yield parts[1] if len(parts) > 1 else ""


def violations(source: str, path: Path) -> list[str]:
    own, found = room(path), []
    for other in imported(ast.parse(source), path):
        if other == own:
            continue
        if other not in ORDER:
            found.append(f"{own} imports {other or 'the package itself'}")
        elif ORDER.index(other) > ORDER.index(own) or other in INDEPENDENT.get(own, ()):
            found.append(f"{own} imports {other}")
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_upwards(path: Path) -> None:
    assert room(path) in ORDER
    assert not violations(path.read_text(), path)


@pytest.mark.parametrize(
    "source",
    [
        "from bopito_inverse.interpolator import Interpolator",
        "import bopito_inverse.sampling.solvers",
        "from bopito_inverse import inference",
        "import bopito_inverse as bi",
        "def late():\n    from bopito_inverse.cli import main",
        "from ..interpolator import Interpolator",
        "from .. import sampling",
        "from bopito_inverse.helpers import something",
    ],
)
def test_downward_imports_are_found(source: str) -> None:
    assert violations(source, PACKAGE / "models" / "scores.py")


def test_upward_imports_are_allowed() -> None:
    source = "from bopito_inverse.noise import Scaling\nfrom .networks import MLP\nimport torch"
    assert not violations(source, PACKAGE / "models" / "scores.py")


def test_there_is_no_drawer_for_everything() -> None:
    names = {path.stem for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils", "util", "base", "helpers", "manager", "common", "misc"}
    for path in PACKAGE.rglob("*.py"):
        assert len(path.relative_to(PACKAGE).parts) <= 2, "folders are one level deep"
