r"""The corrected model of a molecule beside unbiased dynamics, where these are given.

Distributions of phi, psi and both are compared by the Jensen-Shannon divergence of their histograms
(see `dihedrals`), beside that of as many independent draws from the histogram of the reference,
its noise floor, and that of two halves of the reference. Kinetics are compared by the
variance-normalised autocorrelations of the sines and cosines, as in `comparison`, and by the frames
that follow some lags after those within 30 degrees of a start in the most populated well. Potential
energies are those of output frames, kJ/mol, beside those of equilibrium frames; they hold nothing
of constrained bonds, of which OpenMM leaves the terms out.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bopito_inverse import plots
from bopito_inverse.arguments import as_generator
from bopito_inverse.config import Config
from bopito_inverse.datasets import Frames, Trajectories
from bopito_inverse.interpolator import Interpolator
from bopito_inverse.observables import Correlation, Observable, implied_timescale
from bopito_inverse.stages.comparison import (
    N_CORRELATED,
    compared_lags,
    sample_uncorrected,
    unfitted,
)
from bopito_inverse.stages.dihedrals import (
    Dihedrals,
    angles_of,
    backbone,
    histogram,
    jensen_shannon,
    names_of,
)
from bopito_inverse.stages.fit_figures import Curve, Truth, figure_name
from bopito_inverse.stages.inputs import read_frames, read_observables, read_reference
from bopito_inverse.stages.movies import write_movies
from bopito_inverse.systems import Molecule

MARGINAL_BINS, JOINT_BINS = 60, 40  # for each angle
RARE = (0.0, 120.0)  # degrees of phi: the left-handed region
NEAR = 30.0  # degrees, of a start
N_ENERGIES = 200
QUARTILES = {"lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75}


def compare(
    config: Config,
    folder: Path,
    model: Interpolator,
    starts: Tensor,
    corrected: Trajectories,
    seed: int,
) -> dict[str, Any]:
    """Corrected and uncorrected trajectories beside the reference, with figures and movies."""
    molecule, frames = config.system.build(), read_frames(config)
    uncorrected = sample_uncorrected(config, model, starts, seed)
    models = {"uncorrected": uncorrected, "corrected": corrected}
    write_movies(folder, corrected, molecule)
    report = {"system": molecule.name, "energy": _energies(molecule, frames, models, seed)}
    pairs = backbone(molecule.topology)
    if not pairs:
        return report
    made = {name: Dihedrals.of(x, molecule.topology) for name, x in models.items()}
    reference = read_reference(config)
    equilibrium = angles_of(frames.x, names_of(pairs), molecule.topology), frames.weights
    torsions = {}
    for i, pair in enumerate(pairs):
        start = _densest(equilibrium[0][:, 2 * i : 2 * i + 2], frames.weights)
        torsions[", ".join(pair)] = _draw_ramachandran(config, folder, made, reference, pair, start)
        _draw_free_energy(folder, made, reference, pair[0], len(pairs))
    return report | {
        "ramachandran": torsions,
        "jensen_shannon": _divergences(pairs, made, equilibrium, reference, seed),
        "share_of_positive_phi": _shares(pairs, made, equilibrium, reference),
        "lags": compared_lags(config).tolist(),
        "correlations": _correlations(config, made, reference),
        "reference_timescale": _timescale(config, reference),
    }


def verdict(report: dict[str, Any]) -> str:
    """The main number of a comparison."""
    joint = [part for name, part in report.get("jensen_shannon", {}).items() if "," in name]
    if joint and "reference_halves" in joint[0]:
        return (
            "Jensen-Shannon divergence of phi and psi from the reference: "
            f"{joint[0]['corrected']:.4f} (noise floor {joint[0]['corrected_noise_floor']:.4f}, "
            f"halves of the reference {joint[0]['reference_halves']:.4f})"
        )
    energy = report["energy"]
    return (
        f"median potential energy {energy['corrected']['median']:.4g} kJ/mol (equilibrium frames "
        f"{energy['equilibrium_frames']['median']:.4g})"
    )


def truth(config: Config) -> Truth:
    """The reference beside the fit, as far as it holds what is fitted."""
    reference, molecule = read_reference(config), config.system.build()
    if reference is None:
        return Truth("MD")
    step = config.section("step").step_lag

    def curve(obs: Correlation, longest: float) -> Curve | None:
        a, b = (reference.function(f, molecule.topology) for f in (obs.a, obs.b))
        if a is None or b is None:
            return None
        lags = step * np.arange(1, 1 + round(longest / step))
        own = Correlation(a, b, obs.normalization)
        value, _ = reference.correlation(own, _in_reference(config, reference, lags))
        known = np.isfinite(value)
        return (lags[known], value[known]) if known.any() else None

    found = _timescale(config, reference) or {"value": math.inf}
    if not math.isfinite(found["value"]):
        return Truth("MD", curve)
    error = found["standard_error"]
    return Truth("MD", curve, (found["value"], error if math.isfinite(error) else 0.0))


def _energies(
    molecule: Molecule, frames: Frames, models: dict[str, Trajectories], seed: int
) -> dict[str, Any]:
    """Quartiles of the potential energy of some frames, kJ/mol."""
    generator = as_generator(seed, torch.device("cpu"), "energies")
    some = {"equilibrium_frames": frames.sample(N_ENERGIES, generator)}
    for name, trajectories in models.items():
        n, n_frames = len(trajectories), int(trajectories.lengths[0])
        i, k = (
            torch.randint(low, high, (N_ENERGIES,), generator=generator)
            for low, high in ((0, n), (1, n_frames))
        )
        some[name] = trajectories.frames.unflatten(0, (n, n_frames))[i, k]
    report: dict[str, Any] = {"unit": "kJ/mol", "frames": N_ENERGIES}
    for name, x in some.items():
        energy = molecule.energy(x).numpy()
        report[name] = {key: float(np.quantile(energy, q)) for key, q in QUARTILES.items()}
    return report


def _divergences(
    pairs: Sequence[tuple[str, str]],
    made: dict[str, Dihedrals],
    equilibrium: tuple[Tensor, Tensor],
    reference: Dihedrals | None,
    seed: int,
) -> dict[str, Any]:
    """Jensen-Shannon divergences from the reference, of each angle and each pair."""
    if reference is None:
        return {}
    names, rng = list(names_of(pairs)), np.random.default_rng(seed)
    angles, weights = equilibrium
    samples = {name: x.later() for name, x in made.items()}
    frames = {name: len(x.angles(names[0])) for name, x in samples.items()}
    report: dict[str, Any] = {
        "unit": "nats",
        "bins": {"marginal": MARGINAL_BINS, "joint": f"{JOINT_BINS} x {JOINT_BINS}"},
        "frames": frames | {"reference": len(reference.angles(names[0]))},
    }
    halves = reference.halves()
    for group in [part for pair in pairs for part in ((pair[0],), (pair[1],), pair)]:
        bins = MARGINAL_BINS if len(group) == 1 else JOINT_BINS
        target = reference.share(bins, *group)
        of_frames = angles[:, [names.index(name) for name in group]]
        own = {
            "equilibrium_frames": jensen_shannon(histogram(of_frames, bins, weights), target),
            "reference_halves": jensen_shannon(*(x.share(bins, *group) for x in halves)),
        }
        for name, x in samples.items():
            own[name] = jensen_shannon(x.share(bins, *group), target)
            drawn = rng.multinomial(frames[name], target.ravel()) / frames[name]
            own[f"{name}_noise_floor"] = jensen_shannon(drawn, target.ravel())
        report[", ".join(group)] = own
    return report


def _shares(
    pairs: Sequence[tuple[str, str]],
    made: dict[str, Dihedrals],
    equilibrium: tuple[Tensor, Tensor],
    reference: Dihedrals | None,
) -> dict[str, Any]:
    """Share of the frames with phi in `RARE`, with standard errors."""
    report: dict[str, Any] = {"interval_degrees": RARE}
    edges, (angles, weights) = np.radians(RARE), equilibrium
    for i, (phi, _) in enumerate(pairs):
        inside = (angles[:, 2 * i] > edges[0]) & (angles[:, 2 * i] < edges[1])
        report[phi] = {"equilibrium_frames": float(weights[inside].sum())}
        for name, x in _with(reference, {key: x.later() for key, x in made.items()}).items():
            share, error = x.shares(phi, edges)
            report[phi] |= {name: float(share[0]), f"{name}_standard_error": float(error[0])}
    return report


def _correlations(
    config: Config, made: dict[str, Dihedrals], reference: Dihedrals | None
) -> dict[str, Any]:
    """Autocorrelations of sines and cosines, with standard errors."""
    lags = compared_lags(config)
    steps = np.arange(1, 1 + len(lags))
    report = {}
    for label, function in _waves(made["corrected"].names).items():
        obs = Correlation(function, normalization="variance")
        own: dict[str, Any] = {}
        values = {}
        for name, x in _with(reference, made).items():
            at = steps if x is not reference else _in_reference(config, x, lags)
            some = x if x is reference else x.first(N_CORRELATED)
            values[name], error = some.correlation(obs, at)
            own |= {name: values[name].tolist(), f"{name}_standard_error": error.tolist()}
        compared, errors = unfitted(config, label, lags), {}
        if reference is not None:
            compared &= np.isfinite(values["reference"])
        if reference is not None and compared.any():
            errors = {
                name: float(np.abs(values[name] - values["reference"])[compared].mean())
                for name in made
            }
        report[label] = own | {"compared_lags": lags[compared].tolist(), "mean_abs_error": errors}
    return report


def _timescale(config: Config, reference: Dihedrals | None) -> dict[str, Any] | None:
    """The slowest timescale of the reference in frames of the run, at a lag of one step."""
    if reference is None:
        return None
    lag = int(_in_reference(config, reference, np.array([config.section("step").step_lag]))[0])
    blocks = reference.blocks(shortest=4 * lag)  # for standard errors
    if not 2 <= lag <= blocks.longest_lag:
        return None
    topology = config.system.build().topology
    features: list[Observable] = []
    if config.experiment is not None:
        built = read_observables(config).values()
        features = list(dict.fromkeys(f for obs in built for f in (obs.a, obs.b)))
    functions = [reference.function(one, topology) for one in features]
    if not functions or None in functions:
        functions = list(_waves(reference.names).values())
    found = implied_timescale(
        blocks.trajectories,
        lag,
        lambda angles: torch.stack([f(angles) for f in functions if f is not None], dim=1),
    )
    frames = reference.frame_time / config.system.build().frame_time
    seen = found.status in ("ok", "unsettled")
    return {
        "value": found.value * frames if seen else math.inf,
        "standard_error": found.error * frames,
        "status": found.status,
    }


def _waves(names: Sequence[str]) -> dict[str, Observable]:
    """Sine and cosine of each angle, as functions of all angles (n, n_dihedrals)."""
    return {
        f"{wave.__name__}({name})": partial(_wave, wave, column)
        for column, name in enumerate(names)
        for wave in (torch.sin, torch.cos)
    }


def _wave(wave: Observable, column: int, angles: Tensor) -> Tensor:
    return wave(angles[:, column])


def _with(reference: Dihedrals | None, made: dict[str, Dihedrals]) -> dict[str, Dihedrals]:
    return made if reference is None else made | {"reference": reference}


def _in_reference(config: Config, reference: Dihedrals, lags: np.ndarray) -> np.ndarray:
    """Lags of the run as whole numbers of frames of the reference."""
    ratio = config.system.build().frame_time / reference.frame_time
    return np.rint(lags * ratio).astype(int)


def _densest(angles: Tensor, weights: Tensor) -> np.ndarray:
    """The centre of the fullest bin of angles (n, 2), rad, (2,)."""
    share = histogram(angles, JOINT_BINS, weights)
    index = np.unravel_index(share.argmax(), share.shape)
    return -math.pi + 2 * math.pi * (np.array(index) + 0.5) / JOINT_BINS


def _draw_ramachandran(
    config: Config,
    folder: Path,
    made: dict[str, Dihedrals],
    reference: Dihedrals | None,
    pair: tuple[str, str],
    start: np.ndarray,
) -> dict[str, Any]:
    """Rows of phi and psi at increasing lags after frames near a start; what they show."""
    lags = compared_lags(config)
    if reference is not None:
        reached = lags[_in_reference(config, reference, lags) <= reference.longest_lag]
        lags = reached if len(reached) else lags
    chosen = lags[[k - 1 for k in sorted({1, min(3, len(lags)), len(lags)})]]
    step, frame_time = config.section("step").step_lag, config.system.build().frame_time
    rows = {
        name: [_after(x, pair, start, int(k)) for k in chosen // step] for name, x in made.items()
    }
    if reference is not None:
        own = _in_reference(config, reference, chosen)
        if own[-1] <= reference.longest_lag:
            rows["MD"] = [_after(reference, pair, start, int(k)) for k in own]
    titles = [f"{lag * frame_time:g} ps" for lag in chosen]
    figure = plots.ramachandran_figure(rows, titles, start)
    n_pairs = len(made["corrected"].names) // 2
    plots.save(figure, folder / figure_name("ramachandran", pair[0], n_pairs))
    return {
        "start_degrees": np.degrees(start).tolist(),
        "within_degrees": NEAR,
        "lags": chosen.tolist(),
        "frames": {name: [len(part) for part in parts] for name, parts in rows.items()},
    }


def _after(dihedrals: Dihedrals, pair: tuple[str, str], start: np.ndarray, k: int) -> np.ndarray:
    """Angles (n, 2), `k` frames after all that are near the start, or after the nearest one."""
    columns = [dihedrals.names.index(name) for name in pair]
    series = [x[:, columns] for x in dihedrals.trajectories if len(x) > k]
    now, later = (
        torch.cat(part).numpy() for part in ([x[:-k] for x in series], [x[k:] for x in series])
    )
    off = np.abs(np.remainder(now - start + math.pi, 2 * math.pi) - math.pi).max(1)
    return later[off <= max(math.radians(NEAR), off.min())]


def _draw_free_energy(
    folder: Path, made: dict[str, Dihedrals], reference: Dihedrals | None, phi: str, n_pairs: int
) -> None:
    """-log of the density of phi per rad, with standard errors."""
    edges = np.linspace(-math.pi, math.pi, MARGINAL_BINS + 1)
    centres, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    rows = {}
    for name, x in _with(reference, {key: x.later() for key, x in made.items()}).items():
        share, error = x.shares(phi, edges)
        if np.isfinite(error).all():
            with np.errstate(divide="ignore", invalid="ignore"):
                rows["MD" if name == "reference" else name] = (
                    centres,
                    -np.log(share / width),
                    np.where(share > 0, error / share, np.inf),
                )
    if rows:
        figure = plots.free_energy_figure(rows, f"{phi.replace('phi', 'φ')} / degrees")
        plots.save(figure, folder / figure_name("free_energy", phi, n_pairs))
