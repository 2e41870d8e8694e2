"""Correct the kinetics of generative molecular dynamics with measured correlation functions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bopito_inverse import (
        datasets,
        diagnostics,
        inference,
        models,
        observables,
        sampling,
        simulate,
        systems,
    )
    from bopito_inverse.interpolator import Interpolator

__version__ = "0.1.0"

__all__ = [
    "Interpolator",
    "datasets",
    "diagnostics",
    "inference",
    "models",
    "observables",
    "sampling",
    "simulate",
    "systems",
]


def __getattr__(name: str) -> Any:
    """Import a part of the package when it is first used, so that `--help` needs no torch."""
    if name == "Interpolator":
        return import_module("bopito_inverse.interpolator").Interpolator
    if name in __all__:
        return import_module(f"bopito_inverse.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
