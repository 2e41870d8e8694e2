"""A look at everything that a run would read, and how far it is, without computing anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bopito_inverse.config import Config
from bopito_inverse.models import checkpoint
from bopito_inverse.stages import inputs
from bopito_inverse.stages.simulation import dihedral_atoms
from bopito_inverse.stages.verbs import SECTIONS, job, needed

Row = tuple[str, str, str]


def inspect(config: Config) -> list[Row]:
    """Rows (what, where, found) for the inputs that exist, the step, and the verbs.

    Raises:
        ValueError, FileNotFoundError: whatever a verb would refuse.
    """
    rows = [("system", str(config.path), repr(config.system.build()))]
    looks: dict[str, Callable[[Config], str]] = {
        "trajectories": _trajectories,
        "umbrella": _umbrella,
        "frames": _frames,
        "checkpoint": _checkpoint,
    }
    for name, look in looks.items():
        path = inputs.path_of(config, name)
        if getattr(config.data, name) is not None or inputs.is_there(path):
            rows.append((name, str(inputs.find(config, name)), look(config)))
        else:
            lacking = inputs.lacks(config, name)
            found = f"needs {lacking}" if lacking else f"`{inputs.PRODUCTS[name][0]}` makes it"
            rows.append((name, str(path), f"not yet, {found}"))
    if config.system.is_molecule:
        rows += _molecule(config)
    if config.experiment is not None:
        rows.append(("experiment", str(config.experiment.file), _experiment(config)))
    if config.step is not None:
        rows.append(("step", str(config.path), _step(config)))
    return rows + [
        (verb, str(config.output / verb), _state(config, verb)) for verb in needed(config)
    ]


def _trajectories(config: Config) -> str:
    read = inputs.read_trajectories if config.train is None else inputs.read_pairs
    data = read(config)
    shortest, longest = int(data.lengths.min()), int(data.lengths.max())
    length = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    found = f"{len(data)} of {length} frames, each of shape {data.event_shape}"
    return found + _assumed(config, inputs.path_of(config, "trajectories"))


def _assumed(config: Config, path: Path) -> str:
    """What must be taken on trust of a format that holds no times."""
    if inputs.is_timed(path):
        return ""
    return f", taken to be {config.system.build().frame_time:g} ps apart: the format holds no times"


def _umbrella(config: Config) -> str:
    data = inputs.read_umbrella(config)
    return f"{data.n_windows} windows of {data.n_frames} frames"


def _frames(config: Config) -> str:
    data = inputs.read_frames(config)
    return f"{len(data)} frames of shape {data.event_shape}, Kish ESS {data.ess:.0f}"


def _checkpoint(config: Config) -> str:
    model = inputs.read_model(config)
    header = checkpoint.read_header(inputs.path_of(config, "checkpoint"))
    return (
        f"{header['kind']} of {header['system']}, lag_max {model.lag_max}, lambda_hat "
        f"{model.lambda_hat:g}"
    )


def _experiment(config: Config) -> str:
    measured, fitted = inputs.read_experiment(config)
    held_out = f", {int((~fitted).sum())} held out" if not fitted.all() else ""
    lags = f"lags {measured.lags.min():g} to {measured.lags.max():g} frames"
    return f"{', '.join(config.observable.labels)}: {len(measured)} points, {lags}{held_out}"


def _molecule(config: Config) -> list[Row]:
    """What only molecules have; names of features are looked up in the topology."""
    rows = []
    if config.experiment is not None or "observable" in config.model_fields_set:
        inputs.read_observables(config)
    if config.simulate is not None:
        if config.simulate.umbrella is not None:
            dihedral_atoms(config)
        if config.simulate.starts is not None:
            found = f"{len(inputs.read_starts(config))} frames"
            rows.append(("starts", str(config.simulate.starts), found))
    if (reference := inputs.read_reference(config)) is not None:
        n_frames = sum(len(x) for x in reference.trajectories)
        path: Path = config.data.reference  # type: ignore[attr-defined]
        found = (
            f"{', '.join(reference.names)} of {n_frames} frames, {reference.frame_time:g} ps each"
        )
        rows.append(("reference", str(path), found + _assumed(config, path)))
    return rows


def _step(config: Config) -> str:
    section: Any = config.section("step")
    if not inputs.path_of(config, "checkpoint").exists():
        if section.relax is None:
            return f"{section.step_lag} frames: relax, renoise, relax"
        relax = ", ".join(f"{n:g}" for n in section.relax)
        return f"{section.step_lag} frames: interpolate, then relax {relax or 'not'}"
    step = inputs.read_step(config, inputs.read_model(config))
    return f"{step.step_lag:g} frames: {', '.join(map(repr, step.moves))}"


def _state(config: Config, verb: str) -> str:
    """How far a verb is."""
    missing = [name for name in SECTIONS[verb] if getattr(config, name) is None]
    if missing:
        return f"needs the section [{missing[0]}]"
    try:
        state = job(config, verb).state()
    except FileNotFoundError:
        return "waits for an earlier verb"
    return {"new": "ready to start", "unfinished": "unfinished, resumes", "done": "done"}[state]
