r"""What the checks of a composite step find: distances, grades, and sentences that say what to do.

A p-value says whether a distance is there, which for any trained model it is, given enough
replicas. The grade says what it means, from the distance in excess of its noise and from what the
noise can hide, with a tolerance.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from bopito_inverse.diagnostics.distances import (
    ONE_SIDED,
    Distance,
    Grade,
    grade,
    grade_all,
    joint_p_value,
    table,
    worst_grade,
)
from bopito_inverse.diagnostics.transitions import Slowest
from bopito_inverse.observables.relaxation import timescale

TIMESCALE_TOLERANCE = 0.1
RESOLVED = 0.5  # relative error up to which a timescale is judged


@dataclass(frozen=True)
class Stationarity:
    """How far the distribution after some composite steps from mu is from mu.

    Attributes:
        kolmogorov_smirnov: the KS distance of each function.
        total_variation: the total variation of each function on bins of equal probability.
        n_int: interpolation parameter.
        n_steps: composite steps.
        n_replicas: number of rollouts.
        n_starts: effective number of starts.
        tolerance: total variation that is accepted.
    """

    kolmogorov_smirnov: dict[str, Distance]
    total_variation: dict[str, Distance]
    n_int: float
    n_steps: int
    n_replicas: int
    n_starts: float
    tolerance: float

    @property
    def p_value(self) -> float:
        """Chance of distances as large as these if mu is invariant, for all functions together."""
        distances = [*self.kolmogorov_smirnov.values(), *self.total_variation.values()]
        return joint_p_value(d.p_value for d in distances)

    @property
    def status(self) -> Grade:
        """`ok`, `small` (seen, within the tolerance), `large` or `unsure`."""
        return grade_all(self.total_variation.values(), self.p_value, self.tolerance)

    @property
    def verdict(self) -> str:
        """What was found and what to do, in one sentence."""
        found = self.total_variation
        name = max(found, key=lambda name: (found[name].excess, found[name].upper))
        upper = max(d.upper for d in found.values())
        excess = (
            f"total variation {found[name]} in excess of noise in {name} after {self.n_steps} "
            f"steps (p = {self.p_value:.1g})"
        )
        if self.status == "ok":
            return (
                f"the step keeps mu: no distance is seen after {self.n_steps} steps, and a total "
                f"variation above {upper:.3f} is excluded (95 %)"
            )
        if self.status == "small":
            return f"the step keeps mu to within the tolerance of {self.tolerance:g}: {excess}"
        if self.status == "large":
            return (
                f"the step does not keep mu: {excess}: take `renoising_step`, or relax longer with "
                "`Propagate`; where neither helps, give the solver more evaluations, train the "
                "model longer, or check that the starts are frames of mu"
            )
        return f"noise hides whether the step keeps mu: {excess}; {self._remedy(upper)}"

    def _remedy(self, upper: float) -> str:
        more = (upper / self.tolerance) ** 2
        if self.n_starts < self.n_replicas:
            return f"take at least {math.ceil(more * self.n_starts)} starts, and as many replicas"
        return f"raise n_replicas to at least {math.ceil(more * self.n_replicas)}"

    def __str__(self) -> str:
        rows = [(f"KS of {name}", d) for name, d in self.kolmogorov_smirnov.items()]
        rows += [(f"TV of {name}", d) for name, d in self.total_variation.items()]
        title = f"Stationarity: {self.n_steps} steps at n_int = {self.n_int:g}"
        return "\n".join([f"{title}, {self.n_replicas} replicas", table(rows), self.verdict])


@dataclass(frozen=True)
class ChapmanKolmogorov:
    """Whether the composite step is Markovian between sets, and the trained model consistent.

    Attributes:
        labels: label of each set, (S,).
        populations: probability of each set under mu, (S,).
        estimated: P(k) of rollouts for k = 1, ..., n_steps, (n_steps, S, S).
        estimated_error: its standard error.
        predicted: P(1)^k, (n_steps, S, S).
        difference_error: standard error of `estimated` - `predicted`, zero at k = 1.
        memory: distances between P(k) and P(1)^k for k = 2, ..., n_steps.
        whole: transition probabilities of T at N_max in one draw, (S, S).
        halves: the same in two draws of N_max / 2.
        whole_error: standard error of `whole`.
        halves_error: standard error of `whole` - `halves`.
        consistency: distance between `whole` and `halves`.
        slowest: second eigenvalues and timescales of `whole` and of `halves`, compared.
        n_int: interpolation parameter.
        step_lag: length of a composite step in frames.
        lag_max: N_max in frames.
        n_replicas: number of rollouts.
        tolerance: share of frames landing elsewhere that is accepted.
    """

    labels: np.ndarray
    populations: np.ndarray
    estimated: np.ndarray
    estimated_error: np.ndarray
    predicted: np.ndarray
    difference_error: np.ndarray
    memory: tuple[Distance, ...]
    whole: np.ndarray
    halves: np.ndarray
    whole_error: np.ndarray
    halves_error: np.ndarray
    consistency: Distance
    slowest: Slowest
    n_int: float
    step_lag: int
    lag_max: int
    n_replicas: int
    tolerance: float

    @property
    def timescales(self) -> tuple[float, float]:
        """Implied timescales of `whole` and of `halves`, in frames."""
        values = torch.tensor(self.slowest.eigenvalues, dtype=torch.float64)
        whole, halves = timescale(values, self.lag_max).tolist()
        return whole, halves

    @property
    def memory_p_value(self) -> float:
        """Chance of distances as large as these if the step is Markovian between the sets."""
        return joint_p_value(d.p_value for d in self.memory)

    @property
    def consistency_p_value(self) -> float:
        """Chance of differences as large as these if T(N_max) = T(N_max / 2)^2."""
        return joint_p_value([self.consistency.p_value, self.slowest.p_value])

    @property
    def memory_status(self) -> Grade:
        """`ok`, `small` (seen, within the tolerance), `large` or `unsure`."""
        return grade_all(self.memory, self.memory_p_value, self.tolerance)

    @property
    def consistency_status(self) -> Grade:
        """The same; timescales that differ by more than 10 % are `large`, too."""
        p, ratio, error = self.consistency_p_value, self.slowest.ratio, self.slowest.error
        grades = [grade_all([self.consistency], p, self.tolerance)]
        if error < RESOLVED * ratio:
            off = abs(math.log(ratio))
            grades.append(grade(off, off + ONE_SIDED * error / ratio, p, TIMESCALE_TOLERANCE))
        return worst_grade(grades)

    @property
    def verdict(self) -> str:
        """What was found and what to do: a sentence on the step, one on the trained model."""
        return f"{self._on_memory()}\n{self._on_consistency()}"

    def __str__(self) -> str:
        n, half = self.lag_max, self.lag_max // 2
        rows = [
            (f"P({k}) - P(1)^{k}, lag {k * self.step_lag}", d) for k, d in enumerate(self.memory, 2)
        ]
        rows.append((f"T({n}) - T({n - half}) T({half})", self.consistency))
        title = f"Chapman-Kolmogorov: {len(self.labels)} sets, n_int = {self.n_int:g}"
        whole, halves = self.timescales
        slowest = (
            f"timescale of T({n}) in frames: {whole:.4g} in one draw, {halves:.4g} in two "
            f"(p = {self.slowest.p_value:.2g})"
        )
        head = f"{title}, {self.n_replicas} replicas"
        return "\n".join([head, table(rows), slowest, self.verdict])

    def _on_memory(self) -> str:
        worst = max(self.memory, key=lambda d: (d.excess, d.upper))
        found = f"{worst} of the frames land in another set than P(1)^k says"
        if self.memory_status == "ok":
            return (
                "the step is Markovian between these sets: relaxation inside them is fast compared "
                f"to step_lag, and above {max(d.upper for d in self.memory):.3f} of the frames "
                "landing elsewhere are excluded (95 %)"
            )
        if self.memory_status == "small":
            return f"the step is Markovian between these sets to within the tolerance: {found}"
        if self.memory_status == "large":
            return (
                f"the step has memory between these sets: {found}, as relaxation inside them is "
                "not fast compared to step_lag; take finer sets or a longer step_lag before rates "
                "between them are read off (rollouts themselves need neither)"
            )
        return (
            f"noise hides whether the step is Markovian between these sets: {found}; "
            "raise n_replicas"
        )

    def _on_consistency(self) -> str:
        half, ratio, error = self.lag_max // 2, self.slowest.ratio, self.slowest.error
        draws = f"T({self.lag_max}) and T({self.lag_max - half}) T({half})"
        found = f"{self.consistency} of the frames land in another set"
        if error < RESOLVED * ratio:
            found += f" and the timescale is {ratio:.2f} ± {error:.2f} times as long"
        if self.consistency_status == "ok":
            return f"the trained model is consistent: {draws} agree"
        if self.consistency_status == "small":
            return f"the trained model is consistent to within the tolerance: by {draws}, {found}"
        if self.consistency_status == "large":
            return (
                f"the trained model is not consistent: by {draws}, {found} (p = "
                f"{self.consistency_p_value:.1g}); train the dynamic score longer or on more data"
            )
        return f"noise hides whether the trained model is consistent: {found}; raise n_replicas"
