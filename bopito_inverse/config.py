r"""The run file: one TOML that says everything about a run.

Each section is a model whose fields are the keys of the file; an unknown key is an error that
names the nearest known one. Files that are named in the run file (`[data]`, `[experiment]`) are
relative to its folder, so that it may be moved together with them; `output` is relative to the
current directory, because a run file may lie where nothing can be written.

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

    [experiment]
    file = "experiment.csv"

    [fit]                           # all optional: arguments of inference.fit
    n_replicas = 8192
    prior = { distribution = "lognorm", on = "timescale", s = 1.0, scale = 200.0 }
"""

import difflib
import inspect
import math
import tomllib
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from bopito_inverse import systems
from bopito_inverse.inference import Prior
from bopito_inverse.models.train import TrainingConfig
from bopito_inverse.observables.correlations import NORMALIZATIONS, Correlation
from bopito_inverse.observables.features import FEATURES

SYSTEMS = ("Prinz", "DoubleWell", "TripleWell", "OrnsteinUhlenbeck")


class _Section(BaseModel):
    """A section of the run file: unknown keys and infinities are errors, unless a key says so."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SystemSection(_Section):
    """`[system]`: a name, and arguments of that system's constructor."""

    name: Literal["Prinz", "DoubleWell", "TripleWell", "OrnsteinUhlenbeck"]
    a: float | None = None
    b: float | None = None
    height: float | None = None
    tilt: float | None = None
    stiffness: float | None = None
    kT: float | None = None
    friction: float | None = None
    time_step: float | None = None
    steps_per_frame: int | None = None

    @model_validator(mode="after")
    def _arguments_fit(self) -> "SystemSection":
        known = list(inspect.signature(getattr(systems, self.name).__init__).parameters)[1:]
        for key in self.arguments:
            if key not in known:
                takes = f"takes {', '.join(known)}" if known else "takes no arguments"
                raise ValueError(f"{self.name} {takes}, got {key}")
        self.build()
        return self

    @property
    def arguments(self) -> dict[str, float]:
        """The arguments that were given."""
        return self.model_dump(exclude={"name"}, exclude_none=True)

    def build(self) -> systems.Potential1D:
        """The system."""
        return getattr(systems, self.name)(**self.arguments)


class UmbrellaSection(_Section):
    """`[simulate.umbrella]`: equal harmonic windows with centres from `low` to `high`."""

    low: float
    high: float
    n_windows: int = Field(ge=1)
    stiffness: float = Field(gt=0)
    n_frames: int = Field(ge=1)
    n_walkers: int = Field(default=20, ge=1)
    burn_in: int = Field(default=50, ge=0)
    stride: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _numbers_fit(self) -> "UmbrellaSection":
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.n_frames % self.n_walkers:
            raise ValueError(
                f"n_frames must be a multiple of n_walkers ({self.n_walkers}), got {self.n_frames}"
            )
        return self


class SimulateSection(_Section):
    """`[simulate]`: trajectories from uniform starts, and umbrella windows."""

    n_trajectories: int = Field(ge=1)
    n_frames: int = Field(ge=2)
    starts: tuple[float, float]
    barrier: float | None = None
    umbrella: UmbrellaSection | None = None

    @field_validator("starts")
    @classmethod
    def _increasing(cls, starts: tuple[float, float]) -> tuple[float, float]:
        if not starts[0] < starts[1]:
            raise ValueError(f"must be [low, high] with low below high, got {list(starts)}")
        return starts


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

    With `relax` it is the paper's: interpolation, then propagation by each of these lags.
    """

    step_lag: int = Field(ge=1)
    relax: tuple[float, ...] | None = None
    evaluations: int = Field(default=20, ge=2)

    @field_validator("relax")
    @classmethod
    def _positive(cls, relax: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if relax is not None and not all(lag > 0 for lag in relax):
            raise ValueError(f"must hold positive lags, got {list(relax)}")
        return relax


class ObservableSection(_Section):
    """`[observable]`: the measured correlation function; `b` is `a` unless given.

    `name` is what the column `observable` of the experiment calls it, by default `a` or `a*b`.
    """

    a: str = "x"
    b: str | None = None
    normalization: str = "variance"
    name: str | None = None

    @field_validator("a", "b")
    @classmethod
    def _known_feature(cls, name: str | None) -> str | None:
        return name if name is None else _one_of(name, tuple(FEATURES))

    @field_validator("normalization")
    @classmethod
    def _known_normalization(cls, name: str) -> str:
        return _one_of(name, NORMALIZATIONS)

    @property
    def label(self) -> str:
        """Name of the observable in the experiment."""
        return self.name or (self.a if self.b is None else f"{self.a}*{self.b}")

    def build(self) -> Correlation:
        """The correlation function."""
        b = None if self.b is None else FEATURES[self.b]
        return Correlation(FEATURES[self.a], b, self.normalization, name=self.label)


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
        try:
            return cls(path=path, **_beside(path.parent, given))
        except ValidationError as error:
            problems = [_describe(given, details) for details in error.errors()]
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


def _beside(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The same values with the paths of `[data]` and `[experiment]` relative to `folder`."""
    moved = dict(given)
    for section, keys in (
        ("data", tuple(DataSection.model_fields)),
        ("experiment", ("file", "covariance")),
    ):
        if isinstance(given.get(section), dict):
            moved[section] = {
                key: folder / value if key in keys and isinstance(value, str) else value
                for key, value in given[section].items()
            }
    return moved


def _describe(given: dict[str, Any], details: ErrorDetails) -> str:
    """One problem as `key what was expected, got what came`."""
    location = tuple(str(part) for part in details["loc"])
    key, kind = ".".join(location), details["type"]
    if kind == "extra_forbidden":
        return _unknown(given, location)
    if kind == "missing":
        where = "section" if key == "system" else "key"
        return f"the {where} {key} is missing"
    if kind == "value_error":
        message = details["msg"].removeprefix("Value error, ")
        return f"{key}{' ' if message.startswith('must') else ': '}{message}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} must be a section, got {details['input']!r}"
    message = details["msg"].replace("Input should", "must")
    return f"{key} {message}, got {details['input']!r}"


def _unknown(given: dict[str, Any], location: tuple[str, ...]) -> str:
    """An unknown key, with the nearest known one."""
    key = ".".join(location)
    what = "section" if isinstance(_value(given, location), dict) else "key"
    return f"unknown {what} {key}{_suggestion(key, _known_keys(), location[-1])}"


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
    keys: list[str] = []
    for name, info in model.model_fields.items():
        if model is Config and name == "path":
            continue
        keys.append(prefix + name)
        parts = getattr(info.annotation, "__args__", (info.annotation,))
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys += _known_keys(part, f"{prefix}{name}.")
    return keys


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
