r"""The run file: one TOML that says everything about a run.

Each section is a model whose fields are the keys of the file; an unknown key is an error that
names the nearest known one. Files that are named in a section are relative to the folder of the run
file, so that it may be moved together with them; `output` is relative to the current directory,
because a run file may lie where nothing can be written.

    seed = 0                        # everything random follows from it
    device = "auto"                 # auto, cpu or cuda
    output = "results/prinz"        # each verb writes a folder there

    [system]
    name = "Prinz"                  # with the arguments of its constructor (kT, friction, ...)

    [simulate]                      # biased, off-equilibrium trajectories
    n_trajectories = 4000
    n_frames = 100
    starts = [-0.95, 0.95]          # uniform between these
    barrier = 0.0                   # optional: no trajectory crosses it

    [simulate.umbrella]             # windows for the unbiased equilibrium
    low = -1.2
    high = 1.2
    n_windows = 25
    stiffness = 200.0
    n_frames = 8000                 # in each window

    [train]
    lag_max = 50
    lambda_hat = 0.99
    equilibrium = { steps = 4000 }  # fields of models.TrainingConfig
    dynamic = { steps = 4000, network = { width = 96 } }

    [step]
    step_lag = 100                  # frames that one composite step stands for
    # relax = [50]                  # the paper's step: interpolate, then propagate by these lags
    # slower = false                # where the data lack the slow process: half the predictions

    [experiment]
    file = "experiment.csv"

    [fit]                           # all optional: arguments of inference.fit
    n_replicas = 8192
    prior = { distribution = "lognorm", on = "timescale", s = 1.0, scale = 200.0 }

That of a molecule differs in these sections:

    [system]
    name = "Molecule"               # or "AlanineDipeptide"; with arguments of systems.Molecule
    structure = "my.pdb"
    force_field = ["amber99sbildn.xml", "amber99_obc.xml"]  # of OpenMM, or files of your own
    temperature = 300.0             # K
    constraints = "hbonds"          # hbonds, allbonds or none
    label = "my molecule"           # its name in files, by default that of the structure

    [simulate]
    n_trajectories = 100            # without these two, none are simulated
    n_frames = 500
    starts = "frames.npz"           # weighted frames or trajectories to draw starts from; by
                                    # default all start at the structure
    workers = 8                     # processes, by default one for each core

    [simulate.umbrella]
    dihedral = "phi"                # a name of observables.features
    low = -180.0                    # degrees; a whole circle has its windows evenly round it
    high = 180.0
    n_windows = 24
    stiffness = 100.0               # kJ/mol/rad^2
    n_frames = 500

    [simulate.tempering]            # or replica exchange; also in one dimension, as thermal
    low = 300.0                     # energies (kT) instead of K
    high = 600.0
    n_windows = 8
    n_frames = 2000

    [observable]
    a = ["sin(phi)", "cos(phi)"]    # several autocorrelations, fitted together

    [data]
    trajectories = "trajectories"   # a folder or a file that mdtraj reads
    reference = "reference.npz"     # unbiased MD to compare with: angles phi and psi in rad,
                                    # (n_trajectories, n_frames), and frame_time in ps
"""

import difflib
import inspect
import math
import tomllib
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from bopito_inverse import systems
from bopito_inverse.inference import Prior
from bopito_inverse.models.train import TrainingConfig
from bopito_inverse.observables.correlations import NORMALIZATIONS, Correlation, Observable
from bopito_inverse.observables.features import FEATURES, feature

MOLECULES = ("AlanineDipeptide", "Molecule")


class _Section(BaseModel):
    """A section of the run file: unknown keys and infinities are errors, unless a key says so."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SystemSection(_Section):
    """`[system]`: a name, and arguments of that system's constructor."""

    name: Literal[
        "Prinz", "DoubleWell", "TripleWell", "OrnsteinUhlenbeck", "AlanineDipeptide", "Molecule"
    ]
    a: float | None = None
    b: float | None = None
    height: float | None = None
    tilt: float | None = None
    stiffness: float | None = None
    kT: float | None = None
    friction: float | None = None
    time_step: float | None = None
    steps_per_frame: int | None = None
    structure: Path | None = None
    force_field: tuple[str, ...] | None = Field(default=None, min_length=1)
    temperature: float | None = Field(default=None, gt=0)
    constraints: Literal["hbonds", "allbonds", "none"] | None = None
    label: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _arguments_fit(self) -> "SystemSection":
        known = list(inspect.signature(getattr(systems, self.name).__init__).parameters)[1:]
        known = ["label" if key == "name" else key for key in known]
        for key in self.model_dump(exclude={"name"}, exclude_none=True):
            if key not in known:
                takes = f"takes {', '.join(known)}" if known else "takes no arguments"
                raise ValueError(f"{self.name} {takes}, got {key}")
        if self.name == "Molecule" and self.structure is None:
            raise ValueError("Molecule needs a structure, a file with all atoms (PDB, h5, ...)")
        if not self.is_molecule:
            self.build()
        return self

    @property
    def is_molecule(self) -> bool:
        """Whether it is simulated by OpenMM, in frames of atoms."""
        return self.name in MOLECULES

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that were given, as JSON values; of files only their names."""
        given = self.model_dump(mode="json", exclude={"name", "structure"}, exclude_none=True)
        if self.force_field is not None:
            own = self.files.values()
            given["force_field"] = [
                Path(file).name if Path(file) in own else file for file in self.force_field
            ]
        return given

    @property
    def files(self) -> dict[str, Path]:
        """Files of the user that the system is made of."""
        files = {} if self.structure is None else {"structure": self.structure}
        for i, file in enumerate(self.force_field or ()):
            if Path(file).is_file():
                files[f"force_field_{i}"] = Path(file)
        return files

    def build(self) -> Any:
        """The system, a `Potential1D` or a `Molecule`, made once.

        Raises:
            FileNotFoundError, ValueError: of a `Molecule`, as its constructor.
        """
        return self._built

    @cached_property
    def _built(self) -> Any:
        arguments: dict[str, Any] = self.model_dump(exclude={"name", "label"}, exclude_none=True)
        if not self.is_molecule:
            return getattr(systems, self.name)(**arguments)
        if self.label is not None:
            arguments["name"] = self.label
        if self.constraints == "none":
            arguments["constraints"] = None
        try:
            return getattr(systems, self.name)(**arguments)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"system.{error}") from error
        except ValueError as error:
            raise ValueError(f"system: {error}") from error


class _Windows(_Section):
    """What sections of enhanced sampling have in common."""

    low: float
    high: float
    n_windows: int = Field(ge=1)
    n_frames: int = Field(ge=1)
    n_walkers: int = Field(default=20, ge=1)
    burn_in: int = Field(default=50, ge=0)
    stride: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _numbers_fit(self) -> "_Windows":
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.n_frames % self.n_walkers:
            raise ValueError(
                f"n_frames must be a multiple of n_walkers ({self.n_walkers}), got {self.n_frames}"
            )
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments that all functions of enhanced sampling take."""
        return self.model_dump(include={"n_frames", "n_walkers", "burn_in", "stride"})


class UmbrellaSection(_Windows):
    """`[simulate.umbrella]`: equal harmonic windows with centres from `low` to `high`."""

    stiffness: float = Field(gt=0)

    @property
    def centers(self) -> np.ndarray:
        """Centres of the windows."""
        return np.linspace(self.low, self.high, self.n_windows)


class DihedralUmbrellaSection(_Windows):
    """`[simulate.umbrella]` of a molecule: windows along a dihedral, in degrees."""

    dihedral: str
    stiffness: float = Field(gt=0)
    n_walkers: int = Field(default=10, ge=1)
    burn_in: int = Field(default=40, ge=0)

    @field_validator("low", "high")
    @classmethod
    def _angle(cls, value: float) -> float:
        if not -360 <= value <= 360:
            raise ValueError(f"must be an angle in degrees, from -360 to 360, got {value:g}")
        return value

    @model_validator(mode="after")
    def _one_circle(self) -> "DihedralUmbrellaSection":
        if self.high - self.low > 360:
            raise ValueError(
                f"low and high must be 360 degrees apart at most, got {self.low:g} and "
                f"{self.high:g}"
            )
        return self

    @property
    def centers(self) -> np.ndarray:
        """Centres of the windows in rad, evenly round the circle if it is a whole one."""
        whole = self.high - self.low == 360
        return np.radians(np.linspace(self.low, self.high, self.n_windows, endpoint=not whole))


class TemperingSection(_Windows):
    """`[simulate.tempering]`: replica exchange on a geometric ladder of thermal energies kT."""

    low: float = Field(gt=0)

    @property
    def ladder(self) -> np.ndarray:
        """Thermal energies, or temperatures of a molecule, (n_windows,)."""
        return np.geomspace(self.low, self.high, self.n_windows)


class MoleculeTemperingSection(TemperingSection):
    """`[simulate.tempering]` of a molecule: the ladder is one of temperatures, K."""

    n_walkers: int = Field(default=4, ge=1)


class SimulateSection(_Section):
    """`[simulate]`: trajectories from uniform starts, and windows for the equilibrium."""

    n_trajectories: int = Field(ge=1)
    n_frames: int = Field(ge=2)
    starts: tuple[float, float]
    barrier: float | None = None
    umbrella: UmbrellaSection | None = None
    tempering: TemperingSection | None = None

    @field_validator("starts")
    @classmethod
    def _increasing(cls, starts: tuple[float, float]) -> tuple[float, float]:
        if not starts[0] < starts[1]:
            raise ValueError(f"must be [low, high] with low below high, got {list(starts)}")
        return starts

    @model_validator(mode="after")
    def _one_source(self) -> "SimulateSection":
        return _one_source(self)


class MoleculeSimulateSection(_Section):
    """`[simulate]` of a molecule: trajectories, and windows for the equilibrium.

    Results do not depend on `workers`, and of `starts` the content counts.
    """

    n_trajectories: int | None = Field(default=None, ge=1)
    n_frames: int | None = Field(default=None, ge=2)
    starts: Path | None = Field(default=None, exclude=True)
    format: Literal["trr", "xtc", "h5"] = "trr"
    workers: int | None = Field(default=None, ge=1, exclude=True)
    umbrella: DihedralUmbrellaSection | None = None
    tempering: MoleculeTemperingSection | None = None

    @model_validator(mode="after")
    def _something_to_do(self) -> "MoleculeSimulateSection":
        if (self.n_trajectories is None) != (self.n_frames is None):
            raise ValueError("n_trajectories and n_frames go together, got one of them")
        if self.n_trajectories is None and self.umbrella is None and self.tempering is None:
            raise ValueError("n_trajectories and n_frames, [umbrella] or [tempering] must be given")
        return _one_source(self)


class ReweightSection(_Section):
    """`[reweight]`: when MBAR weights are refused."""

    min_overlap: float = Field(default=0.03, ge=0, lt=0.5)


class TrainSection(_Section):
    """`[train]`: both scores; with `forces`, s_eq learns from the force field, too."""

    lag_max: int = Field(ge=1)
    lambda_hat: float = Field(gt=0, lt=1)
    forces: bool = False
    equilibrium: TrainingConfig = TrainingConfig()
    dynamic: TrainingConfig = TrainingConfig()


class StepSection(_Section):
    """`[step]`: the composite step, by default `sampling.renoising_step`.

    With `relax` it is the paper's: interpolation, then propagation by each of these lags. `slower`
    says whether the default step may be slower than the trained model.
    """

    step_lag: int = Field(ge=1)
    relax: tuple[float, ...] | None = None
    slower: bool = True
    evaluations: int = Field(default=20, ge=2)

    @model_validator(mode="after")
    def _slower_is_of_the_default_step(self) -> "StepSection":
        if self.relax is not None and not self.slower:
            raise ValueError("slower must be true where relax is given, got false")
        return self

    @field_validator("relax")
    @classmethod
    def _positive(cls, relax: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if relax is not None and not all(lag > 0 for lag in relax):
            raise ValueError(f"must hold positive lags, got {list(relax)}")
        return relax


class ObservableSection(_Section):
    """`[observable]`: the measured correlation functions.

    One correlation of `a` and `b`, which is `a` unless given; or, where `a` is a list, the
    autocorrelation of each. `name` is what the column `observable` of the experiment calls it, by
    default `a` or `a*b`.
    """

    a: str | tuple[str, ...] = "x"
    b: str | None = None
    normalization: str = "variance"
    name: str | None = None

    @field_validator("a", mode="before")
    @classmethod
    def _name_or_names(cls, a: Any) -> Any:
        names = a if isinstance(a, list | tuple) else [a]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"must be a name or a list of names, got {a!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"must hold different names, got {a!r}")
        return a

    @field_validator("normalization")
    @classmethod
    def _known_normalization(cls, name: str) -> str:
        return _one_of(name, NORMALIZATIONS)

    @model_validator(mode="after")
    def _one_pair(self) -> "ObservableSection":
        if len(self._firsts) > 1 and not (self.b is None and self.name is None):
            raise ValueError("b and name go with a single observable, but a is a list")
        return self

    @property
    def _firsts(self) -> tuple[str, ...]:
        return (self.a,) if isinstance(self.a, str) else self.a

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that are correlated."""
        return self._firsts if self.b is None else (*self._firsts, self.b)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the observables in the experiment."""
        if self.name is not None:
            return (self.name,)
        return self._firsts if self.b is None else (f"{self._firsts[0]}*{self.b}",)

    def build(self, topology: Any = None) -> dict[str, Correlation]:
        """The correlation functions by name; `topology` is that of a molecule.

        Raises:
            ValueError: a feature that the system does not have.
        """
        b = None if self.b is None else _feature("b", self.b, topology)
        return {
            label: Correlation(_feature("a", a, topology), b, self.normalization, name=label)
            for label, a in zip(self.labels, self._firsts, strict=True)
        }


class ExperimentSection(_Section):
    """`[experiment]`: the measurement; lags that are not in `fit_lags` are held out."""

    file: Path
    covariance: Path | None = None
    fit_lags: tuple[float, ...] | None = Field(default=None, min_length=1)


class FitSection(_Section):
    """`[fit]`: arguments of `inference.fit`.

    The prior is a scipy distribution of n_int, or of what its key `on` says.
    """

    n_replicas: int | None = Field(default=None, ge=4)
    target_mc_fraction: float | None = Field(default=None, gt=0, lt=1)
    discrepancy: Literal["auto"] | bool | float = "auto"
    dof: float | None = Field(default=None, gt=0)
    uniform_share: float = Field(default=0.0, ge=0, lt=1)
    prior: dict[str, float | str] | None = None

    @field_validator("prior")
    @classmethod
    def _exists(cls, prior: dict[str, float | str] | None) -> dict[str, float | str] | None:
        if prior is not None:
            _prior(prior)
        return prior

    def build_prior(self) -> Prior | None:
        """The prior, or None for the default one."""
        return None if self.prior is None else _prior(self.prior)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `inference.fit`."""
        return self.model_dump(exclude={"prior"}) | {"prior": self.build_prior()}


class SampleSection(_Section):
    """`[sample]`: corrected trajectories. `n_int` is the posterior mean unless given."""

    n_trajectories: int = Field(default=2000, ge=1)
    n_steps: int = Field(default=100, ge=1)
    n_int: float | None = Field(default=None, gt=0, allow_inf_nan=True)


class DataSection(_Section):
    """`[data]`: files that take the place of what earlier verbs would write."""

    trajectories: Path | None = None
    umbrella: Path | None = None
    frames: Path | None = None
    checkpoint: Path | None = None


class MoleculeDataSection(DataSection):
    """`[data]` of a molecule, which may name unbiased dynamics to compare with, too."""

    reference: Path | None = None


class Config(_Section):
    """A whole run file; `path` is where it was read from."""

    path: Path
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output: Path = Path("results")
    system: SystemSection
    simulate: SimulateSection | None = None
    reweight: ReweightSection = ReweightSection()
    train: TrainSection | None = None
    step: StepSection | None = None
    observable: ObservableSection = ObservableSection()
    experiment: ExperimentSection | None = None
    fit: FitSection = FitSection()
    sample: SampleSection = SampleSection()
    data: DataSection = DataSection()

    @model_validator(mode="after")
    def _known_features(self) -> "Config":
        if not self.system.is_molecule:  # of a molecule, its topology decides
            self.observable.build()
        return self

    @classmethod
    def read(
        cls,
        path: str | PathLike[str],
        device: str | None = None,
        output: str | PathLike[str] | None = None,
    ) -> "Config":
        """Read a run file.

        Args:
            path: the TOML.
            device: takes the place of the file's.
            output: takes the place of the file's.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no TOML, or a key is unknown, missing or bad; the message names file
                and keys, what was expected and what came.
        """
        path = Path(path)
        given = _parse(path)
        if "path" in given:
            raise ValueError(f"{path}: {_unknown(given, ('path',))}")
        over = {"device": device, "output": output}
        given |= {key: value for key, value in over.items() if value is not None}
        kind = MoleculeConfig if _value(given, ("system", "name")) in MOLECULES else Config
        try:
            return kind(path=path, **_beside(path.parent, given, kind))
        except ValidationError as error:
            problems = [_describe(given, details, kind) for details in error.errors()]
            raise ValueError(f"{path}: {'; '.join(problems)}") from None

    def section(self, name: str) -> Any:
        """A section that is needed now.

        Raises:
            ValueError: the run file does not have it.
        """
        value = self
        for part in name.split("."):
            value = getattr(value, part)
            if value is None:
                raise ValueError(f"{self.path}: the section [{name}] is needed, but missing")
        return value


class MoleculeConfig(Config):
    """The run file of a molecule."""

    simulate: MoleculeSimulateSection | None = None  # type: ignore[assignment]
    data: MoleculeDataSection = MoleculeDataSection()

    @model_validator(mode="after")
    def _forces_are_known(self) -> "MoleculeConfig":
        if self.train is not None and self.train.forces and self.system.constraints != "none":
            raise ValueError(
                "train.forces must be false for a molecule with constraints, along which the force "
                'field has no force; [system] name = "Molecule" with constraints = "none" has none'
            )
        return self


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such run file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: expected a run file (TOML), got a folder") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None


def _beside(folder: Path, given: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """The same values with the paths in sections relative to `folder`."""
    moved = dict(given)
    for name, section in _sections(kind).items():
        if isinstance(given.get(name), dict):
            paths = [key for key, info in section.model_fields.items() if Path in _kinds(info)]
            moved[name] = {
                key: folder / value if key in paths and isinstance(value, str) else value
                for key, value in given[name].items()
            }
    files = _value(given, ("system", "force_field"))
    if isinstance(files, list):  # of the user, if there is such a file, else one of OpenMM
        moved["system"]["force_field"] = [
            str(folder / file) if isinstance(file, str) and (folder / file).is_file() else file
            for file in files
        ]
    return moved


def _describe(given: dict[str, Any], details: ErrorDetails, kind_of_run: type[Config]) -> str:
    """One problem as `key what was expected, got what came`."""
    location = tuple(str(part) for part in details["loc"])
    key, kind = ".".join(location), details["type"]
    if kind == "extra_forbidden":
        return _unknown(given, location, kind_of_run)
    if kind == "missing":
        where = "section" if key == "system" else "key"
        return f"the {where} {key} is missing"
    if kind == "value_error":
        message = details["msg"].removeprefix("Value error, ")
        return f"{key}{' ' if message.startswith('must') else ': '}{message}" if key else message
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} must be a section, got {details['input']!r}"
    message = details["msg"].replace("Input should", "must")
    return f"{key} {message}, got {details['input']!r}"


def _unknown(given: dict[str, Any], location: tuple[str, ...], kind: type[Config] = Config) -> str:
    """An unknown key, with the nearest known one."""
    key = ".".join(location)
    what = "section" if isinstance(_value(given, location), dict) else "key"
    other, systems_of = (
        (Config, "one-dimensional systems")
        if kind is MoleculeConfig
        else (MoleculeConfig, "molecules")
    )
    name = _value(given, ("system", "name"))
    if name is not None and key in _known_keys(other):
        return f"the {what} {key} is for {systems_of}, not for {name}"
    return f"unknown {what} {key}{_suggestion(key, _known_keys(kind), location[-1])}"


def _value(given: Any, location: tuple[str, ...]) -> Any:
    for part in location:
        given = given.get(part) if isinstance(given, dict) else None
    return given


def _suggestion(name: str, known: list[str], last: str | None = None) -> str:
    """`; did you mean ...?`: near as a whole, or, misplaced, near in its last part."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not close and last is not None:
        tails = {key.split(".")[-1]: key for key in reversed(known)}
        found = difflib.get_close_matches(last, list(tails), n=1, cutoff=0.75)
        close = [tails[tail] for tail in found]
    return f"; did you mean {close[0]}?" if close else ""


def _known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key of the run file, dotted."""
    inner, keys = _sections(model), []
    for name in model.model_fields:
        if name == "path" and not prefix:
            continue
        keys.append(prefix + name)
        if name in inner:
            keys += _known_keys(inner[name], f"{prefix}{name}.")
    return keys


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields of a section that are sections."""
    return {
        name: part
        for name, info in model.model_fields.items()
        for part in _kinds(info)
        if isinstance(part, type) and issubclass(part, BaseModel)
    }


def _kinds(info: FieldInfo) -> tuple[Any, ...]:
    """What a field may hold."""
    return get_args(info.annotation) or (info.annotation,)


def _prior(prior: dict[str, float | str]) -> Prior:
    """A prior from the name and the arguments of a `scipy.stats` distribution."""
    from scipy import stats

    arguments = dict(prior)
    on = str(arguments.pop("on", "n_int"))
    name = str(arguments.pop("distribution", ""))
    continuous = getattr(stats, name, None)
    if not isinstance(continuous, stats.rv_continuous):
        known = [
            key for key, value in vars(stats).items() if isinstance(value, stats.rv_continuous)
        ]
        raise ValueError(
            "distribution must be a continuous distribution of scipy.stats, got "
            f"{name!r}{_suggestion(name, known)}"
        )
    try:
        frozen = continuous(**arguments)
        supported = math.isfinite(float(frozen.logpdf(frozen.median())))
    except TypeError as error:
        raise ValueError(f"arguments of scipy.stats.{name}: {error}") from error
    if not supported:
        raise ValueError(f"scipy.stats.{name} has no density with {arguments}")
    return Prior(frozen, on)


def _one_of(name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise ValueError(
            f"must be one of {', '.join(known)}, got {name!r}{_suggestion(name, list(known))}"
        )
    return name


def _feature(key: str, name: str, topology: Any) -> Observable:
    """A feature of a molecule, or of a one-dimensional system where there is no topology."""
    try:
        return (
            FEATURES[_one_of(name, tuple(FEATURES))]
            if topology is None
            else feature(name, topology)
        )
    except ValueError as error:
        raise ValueError(f"observable.{key} {str(error).removeprefix('name ')}") from error


def _one_source(section: Any) -> Any:
    """Refuse two sources of the equilibrium."""
    if section.umbrella is not None and section.tempering is not None:
        raise ValueError("take either [umbrella] or [tempering], got both")
    return section
