r"""What is fitted to what: points of all experiments, and the parameters that predict them.

    rollout              one n_int for all points, or one for each experiment
    direct, no clock     one n_int,k for each measured lag N_k, through a single composite step
    direct, with a clock n_int,k = N_max + kappa (N_k - N_max) + offset

and the nuisance parameters of each observable. All are functions of the levels of their priors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import block_diag
from scipy.stats import lognorm

from bopito_inverse.inference.emulator import Coordinate
from bopito_inverse.inference.likelihood import Nuisance, Parameters, Points
from bopito_inverse.inference.prior import Levels
from bopito_inverse.observables import Experiment

MODES = ("rollout", "direct")


@dataclass(frozen=True)
class Clock:
    """n_int,k = N_max + kappa (N_k - N_max) + offset in a direct fit.

    Args:
        kappa: prior of the slope, a frozen `scipy.stats` distribution of positive numbers.
        offset: prior of the offset in frames; None for zero.
    """

    kappa: Any = lognorm(1.0)  # noqa: RUF009  (frozen)
    offset: Any = None

    def __post_init__(self) -> None:
        for name, prior in self.priors().items():
            if not hasattr(prior, "ppf"):
                raise ValueError(f"{name} must be a frozen scipy.stats distribution, got {prior!r}")
        if "kappa" not in self.priors() or not self.kappa.cdf(0.0) == 0:
            raise ValueError("kappa must have a prior of positive numbers")

    def priors(self) -> dict[str, Any]:
        """The priors that are given, by name."""
        named = {"kappa": self.kappa, "clock_offset": self.offset}
        return {name: prior for name, prior in named.items() if prior is not None}


class Design:
    """The points and the parameters of one fit.

    Args:
        experiments: the measurements, lags in frames.
        names: names of the observables that the model predicts, in order.
        step_lag: physical length of a composite step.
        coordinate: the coordinate u of n_int.
        mode: `rollout` or `direct`.
        shared: whether all experiments have one n_int.
        clock: ties the n_int,k of a direct fit.
        nuisance: nuisance priors, for all observables or by name.

    Raises:
        ValueError: names the argument.
    """

    def __init__(
        self,
        experiments: Sequence[Experiment],
        names: Sequence[str],
        step_lag: int,
        coordinate: Coordinate,
        mode: str = "rollout",
        shared: bool = True,
        clock: Clock | None = None,
        nuisance: Nuisance | Mapping[str, Nuisance] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if clock is not None and mode != "direct":
            raise ValueError(f"clock ties the lags of mode 'direct', got mode {mode!r}")
        if not isinstance(clock, Clock | None):
            raise ValueError(f"clock must be a Clock or None, got {clock!r}")
        if mode == "direct" and not shared and len(experiments) > 1:
            raise ValueError("shared must be true in mode 'direct'; fit experiments one by one")
        self.names, self.coordinate, self.mode, self.clock = list(names), coordinate, mode, clock
        self.step_lag = step_lag
        self.points = self._points(experiments, shared)
        self.n_steps = self._steps(self.points.lags).max()
        self._nuisance = self._by_name(nuisance)
        self.n_groups = int(self.points.group.max()) + 1
        self.group_lags = np.array(
            [self.points.lags[self.points.group == g].max() for g in range(self.n_groups)]
            if mode == "direct"
            else [step_lag] * self.n_groups
        )

    @property
    def extra(self) -> dict[str, Any]:
        """Priors of all parameters but the n_int, by name."""
        clock = {} if self.clock is None else self.clock.priors()
        return clock | {
            f"{what}[{name}]": prior
            for name, nuisance in self._nuisance.items()
            for what, prior in nuisance.priors().items()
        }

    def box(self, levels: Levels, interval: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest level of each parameter, (D,), for u inside an interval."""
        ends = levels.of(np.array(interval)) if self.clock is None else np.zeros(2)
        n = self.n_groups if self.clock is None else 0
        m = len(self.extra)
        return np.r_[np.full(n, ends[0]), np.zeros(m)], np.r_[np.full(n, ends[1]), np.ones(m)]

    def parameters(self, drawn: np.ndarray, levels: Levels) -> Parameters:
        """Parameters at levels (B, D)."""
        values = self.extra_values(drawn)
        ones = np.ones((len(drawn), len(self.points)))
        scale, offset, sigma_scale = ones.copy(), 0 * ones, ones.copy()
        for what, target in (("scale", scale), ("offset", offset), ("sigma_scale", sigma_scale)):
            for j, name in enumerate(self.names):
                if (key := f"{what}[{name}]") in values:
                    target[:, self.points.observable == j] = values[key][:, None]
        return Parameters(self._u(drawn, values, levels), scale, offset, sigma_scale)

    def extra_values(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Values of all parameters but the n_int at levels (B, D), by name, (B,)."""
        first = drawn.shape[1] - len(self.extra)
        return {
            name: prior.ppf(drawn[:, first + i])
            for i, (name, prior) in enumerate(self.extra.items())
        }

    def _u(self, drawn: np.ndarray, values: dict[str, np.ndarray], levels: Levels) -> np.ndarray:
        if self.clock is None:
            return levels.u(drawn[:, : self.n_groups])
        kappa, offset = values["kappa"], values.get("clock_offset", np.zeros(len(drawn)))
        beyond = self.group_lags - self.coordinate.lag_max
        n = self.coordinate.lag_max + kappa[:, None] * beyond + offset[:, None]
        u = self.coordinate.from_n_int(np.maximum(n, 1e-9))
        return np.clip(u, self.coordinate.low, self.coordinate.high)

    def _steps(self, lags: np.ndarray) -> np.ndarray:
        """Composite steps to each lag, (L,)."""
        if self.mode == "rollout":
            return np.rint(lags / self.step_lag).astype(int)
        return np.ones(len(lags), dtype=int)

    def column(self, observable: np.ndarray, lags: np.ndarray) -> np.ndarray:
        """Output of the emulator for observables (L,), by index, at lags (L,)."""
        return observable * self.n_steps + self._steps(lags) - 1

    def _points(self, experiments: Sequence[Experiment], shared: bool) -> Points:
        for exp in experiments:
            if unknown := [name for name in exp.observables if name not in self.names]:
                raise ValueError(
                    f"exp holds observables {unknown} that obs lacks, which has {self.names}"
                )
            if self.mode == "rollout":
                exp.steps(self.step_lag)
            elif exp.lag_unit != "frames":
                raise ValueError(f"lags must be in frames, got {exp.lag_unit}; use to_frames")
            elif (short := exp.lags[exp.lags <= self.coordinate.lag_max]).size:
                raise ValueError(
                    f"lags of mode 'direct' must exceed lag_max ({self.coordinate.lag_max}): the "
                    f"trained model itself predicts {short.tolist()}"
                )
        lags = np.concatenate([exp.lags for exp in experiments])
        observable = np.array([self.names.index(n) for exp in experiments for n in exp.observable])
        group = np.zeros(len(lags), dtype=int)
        if self.mode == "direct":
            group = np.unique(lags, return_inverse=True)[1]
        elif not shared:
            group = np.repeat(np.arange(len(experiments)), [len(exp) for exp in experiments])
        self.n_steps = self._steps(lags).max()
        return Points(
            np.concatenate([exp.values for exp in experiments]),
            block_diag(*(exp.covariance for exp in experiments)),
            lags,
            observable,
            self.column(observable, lags),
            group,
        )

    def _by_name(self, nuisance: Nuisance | Mapping[str, Nuisance] | None) -> dict[str, Nuisance]:
        measured = {self.names[j] for j in self.points.observable}
        if nuisance is None:
            return {}
        if isinstance(nuisance, Nuisance):
            return {name: nuisance for name in self.names if name in measured}
        if not isinstance(nuisance, Mapping):
            raise ValueError(f"nuisance must be a Nuisance or several by name, got {nuisance!r}")
        for name, value in nuisance.items():
            if name not in measured or not isinstance(value, Nuisance):
                raise ValueError(
                    f"nuisance must map measured observables {sorted(measured)} to Nuisance, "
                    f"got {name!r}: {value!r}"
                )
        return dict(nuisance)
