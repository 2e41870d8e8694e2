"""Simulations in independent parts, each kept in a file of a folder as soon as it is complete."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from bopito_inverse.datasets import read_npz, write_npz
from bopito_inverse.fan_out import Task, fan_out
from bopito_inverse.systems.molecules import Molecule


def in_parts(
    task: Task,
    shared: Mapping[str, Any],
    n_parts: int,
    what: str,
    settings: Mapping[str, Any],
    folder: str | os.PathLike | None = None,
    executor: Executor | int | None = None,
    progress: bool = False,
) -> list[dict[str, np.ndarray]]:
    """`task(shared, i)` for each part i: arrays by name.

    Args:
        task, shared, what, executor, progress: as in `fan_out`.
        n_parts: how many there are.
        settings: all that the arrays depend on, as values of JSON.
        folder: where complete parts are kept, so that a later call with the same settings does
            the rest; None keeps no files.

    Raises:
        ValueError: the folder was made with other settings; the message says which.
    """
    if folder is not None:
        folder = Path(folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_other(folder / "settings.json", json.loads(json.dumps(settings)))
    job = {"task": task, "shared": shared, "what": what, "folder": folder}
    return fan_out(_part, job, range(n_parts), what, executor, progress)


def settings_of(molecule: Molecule) -> dict[str, Any]:
    """What the frames of a simulation depend on, but for how it is run."""
    import openmm

    system = openmm.XmlSerializer.serialize(molecule.system)
    system = re.sub('openmmVersion="[^"]*"', "", system, count=1)
    return {
        "molecule": molecule.name,
        "system": hashlib.sha256(system.encode()).hexdigest(),
        "temperature": molecule.temperature,
        "friction": molecule.friction,
        "time_step": molecule.time_step,
        "steps_per_frame": molecule.steps_per_frame,
    }


def _part(job: Mapping[str, Any], i: int) -> dict[str, np.ndarray]:
    if job["folder"] is None:
        return job["task"](job["shared"], i)
    path = job["folder"] / f"{job['what'].replace(' ', '_')}_{i:03d}.npz"
    if not path.exists():  # a file appears when it is complete
        write_npz(path, **job["task"](job["shared"], i))
    return read_npz(path, ())


def _refuse_other(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(settings, indent=1))
        os.replace(partial, path)
    try:
        before = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no readable JSON: {error}") from error
    for name in settings:
        if before.get(name) != settings[name]:
            raise ValueError(
                f"folder {path.parent} was made with {name} {before.get(name)!r}, got "
                f"{settings[name]!r}; take another folder"
            )
