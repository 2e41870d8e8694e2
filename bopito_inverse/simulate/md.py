"""Molecular dynamics of molecules: one trajectory from each start, by OpenMM.

A trajectory is made in *segments* of some 100,000 steps. Segment k of trajectory i goes on from the
positions and velocities, in float64, that segment k - 1 ended with, and its thermostat is seeded by
(seed, i, k). A trajectory is therefore the same, bit for bit on the platforms Reference and CPU,
whatever the executor and whether or not it was interrupted.

With a folder, finished segments are kept in its subfolder `partial`, from where a call that was
killed goes on. The folder ends as

    topology.pdb         atoms and bonds
    trajectory_0000.trr  frames, one file for each start
    report.json          which trajectories were minimised or dropped; mean temperature and energy
    settings.json        what was simulated
"""

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from bopito_inverse.arguments import as_count, as_generator
from bopito_inverse.datasets import Array, Trajectories, read_npz, require_pytables, write_npz
from bopito_inverse.fan_out import _bar, _one_thread, fan_out
from bopito_inverse.systems.molecules import GAS_CONSTANT, Molecule, _platform

if TYPE_CHECKING:
    import openmm

Format = Literal["trr", "xtc", "h5"]

SEGMENT_STEPS = 100_000  # what a kill loses at most, of each trajectory under way
# kJ/(mol nm) at 300 K: 181,000 frames of alanine dipeptide had at most 7200 on any atom
LARGEST_FORCE = 12_000.0
# kT per degree of freedom, up or down from the minimum; the mean of a harmonic system is 1/2
LARGEST_ENERGY = 10.0
SPEED_TEST = 0.1  # seconds for each platform


def molecular_dynamics(
    molecule: Molecule,
    starts: Array,
    n_frames: int,
    folder: str | os.PathLike | None = None,
    seed: int = 0,
    minimize: bool | Literal["auto"] = "auto",
    platform: str = "auto",
    format: Format = "trr",
    executor: Executor | int | None = None,
    progress: bool = False,
) -> Trajectories:
    """Simulate one trajectory from each start.

    Velocities are drawn at the molecule's temperature. A trajectory that blows up is dropped with a
    warning: where OpenMM raises, a position is not finite, or the potential energy is further from
    that of the minimised molecule than 10 kT for each degree of freedom.

    Args:
        molecule: what moves; it sets the temperature, friction, time step and steps per frame.
        starts: (n_trajectories, n_atoms, 3), nm.
        n_frames: frames in each trajectory. Frame 0 is the start, its constraints applied and
            minimised where needed, so `n_frames - 1` are simulated.
        folder: where frames are streamed to; nothing is written by default. A call that was
            killed goes on when it is made again, and finished work is not repeated.
        seed: a non-negative integer. Give `platform` as well for results that do not depend on
            which one wins the speed test.
        minimize: minimise the starts. `"auto"` does so where the force on an atom is larger than
            12,000 kJ/(mol nm) * sqrt(temperature / 300 K), 1.7 times the largest in a long
            simulation: frames of a generative model may clash.
        platform: as OpenMM names them; `"auto"` is what `fastest_platform` finds, or what was used
            in `folder` before.
        format: of the files. `"trr"` (exact) and `"xtc"` (half the size, rounded to 0.001 nm) are
            read by mdtraj, VMD and PyMOL; `"h5"` (exact) is mdtraj's own and needs the package
            `tables`.
        executor: None for this process; a number for that many processes; or anything with the
            interface of `concurrent.futures.Executor`. One task is one trajectory. Threads take
            turns.
        progress: show a progress bar with the time that remains.

    Returns:
        The trajectories that were not dropped, in the order of `starts`; with a folder, as its
        files hold them.

    Raises:
        ValueError: bad starts; a `folder` with other settings; an unknown platform or format; or
            all trajectories blew up.
        RuntimeError: names the trajectory that failed, for example for want of disk space.

    >>> from bopito_inverse.systems.molecules import AlanineDipeptide
    >>> molecule = AlanineDipeptide(steps_per_frame=10)
    >>> molecular_dynamics(molecule, molecule.positions[None], 3, platform="Reference")
    Trajectories(1 trajectories, 3 frames of shape (22, 3), frame_time=0.02, \
system='alanine dipeptide')
    """
    x = molecule.as_frames("starts", starts).numpy()
    n_frames = as_count("n_frames", n_frames, minimum=2)
    seed = as_count("seed", seed, 0)
    if minimize not in (True, False, "auto"):
        raise ValueError(f"minimize must be True, False or 'auto', got {minimize!r}")
    _as_format(format)
    if platform != "auto":
        _platform(platform)
    place = None if folder is None else _Folder(Path(folder), format)
    if place is not None and platform == "auto":
        platform = place.settings().get("platform", "auto")
    if platform == "auto":
        platform = fastest_platform(molecule)
    if place is not None:
        place.claim(_settings(molecule, x, n_frames, seed, minimize, platform, format), molecule)
        if place.reports() is not None:
            return _result(molecule, place.reports(), place.read(molecule, n_frames), place)
    segment = max(1, SEGMENT_STEPS // molecule.steps_per_frame)
    lowest = _lowest_energy(molecule, platform)
    plan = _Plan(molecule, n_frames, seed, minimize, platform, segment, lowest)
    with _counting(executor, len(x) * plan.n_segments, progress) as (pool, advance, shown):
        shared = {"plan": plan, "place": place, "advance": advance}
        made = fan_out(_simulate, shared, list(enumerate(x)), "trajectory", pool, shown)
    reports = [report for _, report in made]
    if place is not None:
        place.finish(reports, platform)
        return _result(molecule, reports, place.read(molecule, n_frames), place)
    kept = [frames for frames, _ in made if frames is not None]
    return _result(molecule, reports, np.stack(kept) if kept else None, None)


@lru_cache(maxsize=16)
def fastest_platform(molecule: Molecule) -> str:
    """The OpenMM platform with most steps per second for this molecule, by a test of about 0.3 s.

    The CPU platform is tested with one thread, as it is used: small molecules gain nothing from
    more, and trajectories run beside each other. The answer is kept for later calls.
    """
    import openmm

    fastest = {}
    for i in range(openmm.Platform.getNumPlatforms()):
        name = openmm.Platform.getPlatform(i).getName()
        try:
            context = molecule.context(name)
            fastest[name] = _seconds_for_steps(context)
        except openmm.OpenMMException:  # a GPU platform on a machine without GPU
            continue
    return min(fastest, key=lambda name: fastest[name])


def _seconds_for_steps(context: "openmm.Context") -> float:
    """The shortest time of ten steps."""
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < SPEED_TEST:
        start = time.perf_counter()
        context.getIntegrator().step(10)
        context.getState(getPositions=True)  # waits for a GPU
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class _Plan:
    """What all trajectories of a call share."""

    molecule: Molecule
    n_frames: int
    seed: int
    minimize: bool | str
    platform: str
    segment: int  # frames
    lowest_energy: float

    @property
    def n_segments(self) -> int:
        return -(-(self.n_frames - 1) // self.segment)

    @cached_property
    def n_dof(self) -> int:
        system = self.molecule.system
        still = 3 if any("CMMotionRemover" in f.getName() for f in system.getForces()) else 0
        return 3 * system.getNumParticles() - system.getNumConstraints() - still

    def thermostat_seed(self, trajectory: int, segment: int) -> int:
        """A different one for each segment of a run."""
        generator = as_generator(self.seed, torch.device("cpu"), "molecular dynamics")
        first = int(torch.randint(2**31, (), generator=generator))
        return first + trajectory * self.n_segments + segment

    def velocities(self, trajectory: int) -> np.ndarray:
        """Drawn at temperature, constraints not yet applied, nm/ps."""
        system = self.molecule.system
        mass = [system.getParticleMass(i)._value for i in range(system.getNumParticles())]
        cpu = torch.device("cpu")
        generator = as_generator(self.seed, cpu, "molecular dynamics velocities", trajectory)
        normal = torch.randn(len(mass), 3, dtype=torch.float64, generator=generator).numpy()
        return np.sqrt(self.molecule.kT / np.array(mass))[:, None] * normal


@dataclass
class _State:
    """Where a trajectory stands: all that its next segment needs, and sums for the report."""

    done: int  # frames
    positions: np.ndarray
    velocities: np.ndarray
    minimized: bool
    energy: float = 0.0  # sums over simulated frames
    kinetic: float = 0.0

    @classmethod
    def read(cls, path: Path) -> "_State":
        arrays: dict[str, Any] = read_npz(path, tuple(cls.__dataclass_fields__))
        return cls(**{k: v if v.ndim else v.item() for k, v in arrays.items()})


class _BlownUp(Exception):
    pass


_TURN = Lock()  # the Reference platform has one random number generator for the whole process


def _simulate(shared: Mapping[str, Any], item: Any) -> tuple[Any, dict[str, Any]]:
    """One trajectory: its frames, where they are not kept in a folder, and its report."""
    import openmm

    plan, place, advance = shared["plan"], shared["place"], shared["advance"]
    trajectory, start = item
    report = place.report(trajectory) if place else None
    if report is not None:
        advance(plan.n_segments)
        return None, report
    state, blocks = place.load(trajectory, plan) if place else (None, [])
    first = 0 if state is None else (state.done - 1) // plan.segment
    advance(first)
    report = {"trajectory": trajectory}
    try:
        for k in range(first, plan.n_segments):
            with _TURN:
                state, block = _segment(plan, trajectory, k, start if state is None else state)
            blocks.append(block)
            if place and k + 1 < plan.n_segments:
                place.keep(trajectory, block, state)
            advance(1)
    except (_BlownUp, openmm.OpenMMException) as error:
        advance(plan.n_segments - k)
        report |= {"dropped": str(error)}
        if place:
            place.conclude(trajectory, report)
        return None, report
    simulated = plan.n_frames - 1
    report |= {
        "minimized": state.minimized,
        "mean_temperature": 2 * state.kinetic / simulated / (plan.n_dof * GAS_CONSTANT),
        "mean_potential_energy": state.energy / simulated,
    }
    if place is None:
        return np.concatenate(blocks), report
    place.conclude(trajectory, report, np.concatenate(blocks), plan.molecule)
    return None, report


def _segment(
    plan: _Plan, trajectory: int, k: int, before: "_State | np.ndarray"
) -> tuple[_State, np.ndarray]:
    """The state after segment k, and its frames."""
    molecule = plan.molecule
    context = molecule.context(plan.platform, seed=plan.thermostat_seed(trajectory, k))
    integrator = context.getIntegrator()
    frames = []
    if isinstance(before, _State):
        context.setPositions(before.positions)
        context.setVelocities(before.velocities)
        done, minimized, sums = before.done, before.minimized, [before.energy, before.kinetic]
    else:
        minimized = _place(context, before, plan)
        context.setVelocities(plan.velocities(trajectory))
        context.applyVelocityConstraints(integrator.getConstraintTolerance())
        frames.append(_recorded(context, plan, 0)[0])
        done, sums = 1, [0.0, 0.0]
    last = min(1 + (k + 1) * plan.segment, plan.n_frames)
    for number in range(done, last):
        integrator.step(molecule.steps_per_frame)
        frame, *energies = _recorded(context, plan, number)
        frames.append(frame)
        sums = [total + new for total, new in zip(sums, energies, strict=True)]
    end = context.getState(getPositions=True, getVelocities=True)
    positions = end.getPositions(asNumpy=True)._value
    velocities = end.getVelocities(asNumpy=True)._value
    return _State(last, positions, velocities, minimized, *sums), np.stack(frames)


def _place(context: "openmm.Context", start: np.ndarray, plan: _Plan) -> bool:
    """Put the molecule where a trajectory starts; whether that took a minimisation."""
    import openmm

    context.setPositions(start.astype(np.float64))
    context.applyConstraints(context.getIntegrator().getConstraintTolerance())
    minimize = plan.minimize
    if minimize == "auto":
        force = context.getState(getForces=True).getForces(asNumpy=True)._value
        limit = LARGEST_FORCE * np.sqrt(plan.molecule.temperature / 300)
        minimize = not np.linalg.norm(force, axis=1).max() <= limit  # NaN is no small force
    if minimize:
        openmm.LocalEnergyMinimizer.minimize(context)
    return bool(minimize)


def _recorded(
    context: "openmm.Context", plan: _Plan, number: int
) -> tuple[np.ndarray, float, float]:
    """A frame, float32, its potential and kinetic energy, if they are sound."""
    state = context.getState(getPositions=True, getEnergy=True)
    frame = state.getPositions(asNumpy=True)._value.astype(np.float32)
    potential, kinetic = state.getPotentialEnergy()._value, state.getKineticEnergy()._value
    if not np.isfinite(frame).all():
        raise _BlownUp(f"positions were not finite in frame {number}")
    limit = LARGEST_ENERGY * plan.n_dof * plan.molecule.kT
    strained = number == 0 and plan.minimize is False  # as the caller wants it
    if not strained and not abs(potential - plan.lowest_energy) <= limit:
        raise _BlownUp(
            f"the potential energy was {potential:.4g} kJ/mol in frame {number}, that of the "
            f"minimised molecule is {plan.lowest_energy:.4g}"
        )
    return frame, potential, kinetic


def _lowest_energy(molecule: Molecule, platform: str) -> float:
    """Potential energy of the minimised molecule, kJ/mol."""
    import openmm

    context = molecule.context(platform)
    openmm.LocalEnergyMinimizer.minimize(context)
    return context.getState(getEnergy=True).getPotentialEnergy()._value


class _Folder:
    """What a run keeps on disk. Each file appears complete or not at all.

    The frames of an unfinished trajectory are written at their own place in a raw file before the
    state that counts them. All content follows from the settings, so a process that outlives its
    parent by a moment can only write what is there already.
    """

    def __init__(self, path: Path, format: str) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"folder must be a folder, got the file {path}")
        self.path = path
        self.format = format
        self.partial = path / "partial"

    def settings(self) -> dict[str, Any]:
        """Of the run that the folder holds; empty where it holds none."""
        return _read_json(self.path / "settings.json") or {}

    def claim(self, settings: dict[str, Any], molecule: Molecule) -> None:
        """Take the folder for this run, or refuse where it holds another."""
        before = self.settings()
        changed = sorted(k for k in settings if before and before.get(k) != settings[k])
        if changed:
            what = ", ".join(f"{k} {before.get(k)} (now {settings[k]})" for k in changed)
            raise ValueError(
                f"folder {self.path} holds simulations with other settings: {what}; choose another "
                "folder, or delete this one"
            )
        finished = self.reports() is not None
        if not before and (finished or any(self.partial.glob("[0-9]*"))):
            raise ValueError(
                f"folder {self.path} holds simulations without their settings.json; choose another "
                "folder, or delete this one"
            )
        if finished:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        self.partial.mkdir(parents=True, exist_ok=True)
        if not before:
            _save(molecule.positions.numpy()[None], molecule, self.path / "topology.pdb", self)
            self._write_json(self.path / "settings.json", settings)

    def reports(self) -> Any:
        """Of all trajectories, or None where not all are finished."""
        report = _read_json(self.path / "report.json")
        return None if report is None else report["trajectories"]

    def report(self, trajectory: int) -> Any:
        """Of a finished trajectory, or None."""
        return _read_json(self._partial(trajectory, "json"))

    def load(self, trajectory: int, plan: _Plan) -> tuple[_State | None, list[np.ndarray]]:
        """State and frames of an unfinished trajectory."""
        path = self._partial(trajectory, "npz")
        if not path.exists():
            return None, []
        state = _State.read(path)
        shape = (state.done, *plan.molecule.event_shape)
        raw = self._partial(trajectory, "f32")
        frames = np.fromfile(raw, np.float32, int(np.prod(shape))) if raw.exists() else np.empty(0)
        if frames.size != np.prod(shape):
            raise ValueError(f"{raw} lacks frames; delete {path} to start the trajectory anew")
        return state, [frames.reshape(shape)]

    def keep(self, trajectory: int, block: np.ndarray, state: _State) -> None:
        """Add the frames of a segment, then the state after it."""
        raw = self._partial(trajectory, "f32")
        with raw.open("r+b" if raw.exists() else "wb") as file:
            file.seek((state.done - len(block)) * block[0].nbytes)
            file.write(block.tobytes())
            file.flush()
            os.fsync(file.fileno())
        arrays = {name: np.asarray(value) for name, value in asdict(state).items()}
        write_npz(self._partial(trajectory, "npz"), **arrays)

    def conclude(
        self,
        trajectory: int,
        report: dict[str, Any],
        frames: np.ndarray | None = None,
        molecule: Molecule | None = None,
    ) -> None:
        """Keep the report of a trajectory, and its frames unless it was dropped."""
        if frames is not None and molecule is not None:
            name = f"trajectory_{trajectory:04d}.{self.format}"
            report["file"] = name
            _save(frames, molecule, self.path / name, self)
        self._write_json(self._partial(trajectory, "json"), report)
        for kind in ("npz", "f32"):
            self._partial(trajectory, kind).unlink(missing_ok=True)

    def finish(self, reports: list[dict[str, Any]], platform: str) -> None:
        """Write the report of the run; what was needed to resume goes."""
        import openmm

        content = {"openmm": openmm.__version__, "platform": platform, "trajectories": reports}
        self._write_json(self.path / "report.json", content)
        shutil.rmtree(self.partial, ignore_errors=True)

    def read(self, molecule: Molecule, n_frames: int) -> np.ndarray | None:
        """All frames of the finished run, (n_kept, n_frames, n_atoms, 3)."""
        import mdtraj

        paths = [self.path / r["file"] for r in self.reports() if "file" in r]
        if not paths:
            return None
        frames = np.empty((len(paths), n_frames, *molecule.event_shape), dtype=np.float32)
        top: dict[str, Any] = {} if self.format == "h5" else {"top": molecule.topology}
        for path, out in zip(paths, frames, strict=True):
            try:
                out[:] = mdtraj.load(str(path), **top).xyz
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{path} was not found or is damaged ({error}); delete report.json to "
                    "simulate again"
                ) from error
        return frames

    def _partial(self, trajectory: int, kind: str) -> Path:
        return self.partial / f"{trajectory:04d}.{kind}"

    def _write_json(self, path: Path, content: dict[str, Any]) -> None:
        temporary = self.partial / f".{path.name}.{os.getpid()}"
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)


def _save(frames: np.ndarray, molecule: Molecule, path: Path, folder: _Folder) -> None:
    import mdtraj

    times = molecule.frame_time * np.arange(len(frames))
    temporary = folder.partial / f".{os.getpid()}.{path.name}"
    mdtraj.Trajectory(frames, molecule.topology, time=times).save(str(temporary))
    os.replace(temporary, path)


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is unreadable, delete it: {error}") from error


def _settings(
    molecule: Molecule,
    starts: np.ndarray,
    n_frames: int,
    seed: int,
    minimize: bool | str,
    platform: str,
    format: str,
) -> dict[str, Any]:
    """All that the frames depend on."""
    import openmm

    system = openmm.XmlSerializer.serialize(molecule.system)
    system = re.sub('openmmVersion="[^"]*"', "", system, count=1)
    return {
        "molecule": molecule.name,
        "force_field": list(molecule.force_field),
        "system": hashlib.sha256(system.encode()).hexdigest()[:16],
        "temperature": molecule.temperature,
        "friction": molecule.friction,
        "time_step": molecule.time_step,
        "steps_per_frame": molecule.steps_per_frame,
        "n_trajectories": len(starts),
        "starts": hashlib.sha256(starts.tobytes()).hexdigest()[:16],
        "n_frames": n_frames,
        "seed": seed,
        "minimize": minimize,
        "platform": platform,
        "format": format,
        "segment_steps": SEGMENT_STEPS,
    }


def _result(
    molecule: Molecule,
    reports: list[dict[str, Any]],
    frames: np.ndarray | None,
    place: _Folder | None,
) -> Trajectories:
    """The trajectories that were not dropped, and a warning about those that were."""
    dropped = {r["trajectory"]: r["dropped"] for r in reports if "dropped" in r}
    where = "" if place is None else f" (see {place.path / 'report.json'})"
    shown = "; ".join(f"{i}: {why}" for i, why in list(dropped.items())[:5])
    if len(dropped) > 5:
        shown += f"; and {list(dropped)[5:]}"
    if frames is None:
        raise ValueError(
            f"all {len(reports)} trajectories blew up{where}: {shown}. Use a shorter time_step "
            f"than {molecule.time_step:g} ps, minimize=True, or other starts"
        )
    if dropped:
        warnings.warn(
            f"{len(dropped)} of {len(reports)} trajectories blew up and were dropped{where}: "
            f"{shown}",
            stacklevel=3,
        )
    return Trajectories(frames, molecule.frame_time, molecule.name)


def _as_format(format: str) -> None:
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    require_pytables(f".{format}", f"format {format!r}")


_counter: Any = None  # segments that the processes of one call have finished, in such a process


def _advance(n: int) -> None:
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += n


@contextmanager
def _counting(
    executor: Executor | int | None, n_segments: int, progress: bool
) -> Iterator[tuple[Executor | None, Callable[[int], None], bool]]:
    """The executor, what counts segments in its tasks, and whether it should count tasks itself."""
    if executor is not None and not isinstance(executor, int):
        yield executor, _advance, progress
        return
    with _bar("molecular dynamics", n_segments, progress) as one:

        def advance(n: int) -> None:
            for _ in range(n):
                one(None)

        if executor is None:
            yield None, advance, False
        else:
            with _processes(executor, advance) as pool:
                yield pool, _advance, False


@contextmanager
def _processes(n: int, advance: Callable[[int], None]) -> Iterator[ProcessPoolExecutor]:
    """Processes that end at once when this one leaves by an exception, or is killed."""
    spawn = get_context("spawn")
    counter = spawn.Value("q", 0)
    reader, writer = spawn.Pipe(duplex=False)
    finished = Event()

    def watch() -> None:
        seen = 0
        while not finished.wait(0.5) or counter.value > seen:
            now = counter.value
            advance(now - seen)
            seen = now

    watcher = Thread(target=watch, daemon=True)
    workers = ProcessPoolExecutor(as_count("executor", n), spawn, _enter, (counter, reader))
    with workers as pool, reader:
        watcher.start()
        try:
            yield pool
        except BaseException:
            writer.close()
            raise
        finally:
            finished.set()
            watcher.join()
    writer.close()


def _enter(counter: Any, reader: Any) -> None:
    """In a new process: one thread, its share of the counter, an eye on the parent."""
    global _counter
    _counter = counter
    _one_thread()
    Thread(target=_leave_with_parent, args=(reader,), daemon=True).start()


def _leave_with_parent(reader: Any) -> None:
    try:
        reader.recv()
    except EOFError:
        os._exit(1)
