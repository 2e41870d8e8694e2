r"""Checks of a composite step K: does it keep mu, is it Markovian, is the trained model consistent?

*Stationarity.* If K leaves mu invariant, frames after n steps from mu have the density mu again.
For a function f of a frame, with F_n and F_mu the distributions of f(x_n) and of f over the starts,

    KS = max_u |F_n(u) - F_mu(u)|,      TV = 1/2 sum_b |P_n(b) - P_mu(b)|,

at the percentiles of F_mu and on bins b of equal probability. Replicas begin at the frames that
F_mu is estimated from, so that the two sides are paired. With w_s the weight of start s and R
replicas, the error of P_n(b) - P_mu(b) is a sum over starts of

    phi_s = sum_{r from s} (1[x_n,r in b] - P_n(b)) / R - w_s (1[x_s in b] - P_mu(b)),

for few starts with many replicas each as for many starts of which few are used.

*Chapman-Kolmogorov.* With x_0 from mu in set i, P(k)_ij is the probability that k steps lead to
set j. If K is Markovian at the resolution of the sets, P(k) = P(1)^k (Prinz et al., J. Chem. Phys.
134, 174105, 2011): relaxation inside a set is fast compared to `step_lag`. K itself is Markovian in
x, whatever comes out. The trained model T is tested at its own lags: T(N_max) must be
T(N_max / 2)^2, for any sets. The distance of two matrices is the share of frames that lands in
another set, 1/2 sum_i mu_i sum_j |D_ij|. It is blind to rare crossings; the implied timescales
-N_max / log(lambda_2) of both are compared, too.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bopito_inverse.arguments import Device, as_count, as_generator, as_positive
from bopito_inverse.datasets import Array, Frames
from bopito_inverse.diagnostics.distances import Distance, covariance_by_start, measure
from bopito_inverse.diagnostics.replicas import Reader, Replicas
from bopito_inverse.diagnostics.transitions import (
    Transitions,
    compare_slowest,
    row_variation,
    transitions,
)
from bopito_inverse.diagnostics.verdicts import ChapmanKolmogorov, Stationarity
from bopito_inverse.observables.correlations import Observable
from bopito_inverse.sampling.rollout import Rollout

N_LEVELS = 100  # of the Kolmogorov-Smirnov distance
N_BINS = 20  # of the total variation
N_SETS = 4
FEW_COMPONENTS = 3  # numbers in a frame up to which each is looked at by default
TOLERANCE = 0.03
CPU = torch.device("cpu")

__all__ = ["ChapmanKolmogorov", "Stationarity", "chapman_kolmogorov", "stationarity"]


def stationarity(
    model: nn.Module,
    step: Rollout,
    n_int: float,
    starts: Array | Frames,
    n_steps: int = 20,
    functions: Mapping[str, Observable] | None = None,
    n_replicas: int = 10_000,
    seed: int = 0,
    device: Device | str = "auto",
    tolerance: float = TOLERANCE,
) -> Stationarity:
    """How far the distribution after `n_steps` composite steps from mu is from mu.

    Args:
        model: an `Interpolator`, or a conditional score where all moves are `Propagate`.
        step: the composite step.
        n_int: interpolation parameter above zero, inf allowed.
        starts: independent frames of mu, (n, *event), or weighted `Frames`. Frames of one
            trajectory that depend on each other make the noise look too small: thin them.
        n_steps: composite steps, enough for the slowest process.
        functions: functions of frames by name, (B, *event) to (B,); by default the components of
            frames of at most three numbers.
        n_replicas: number of rollouts. The floor falls with the root of it and of the number of
            starts, whichever is less.
        seed: integer.
        device: `auto`, `cpu` or `cuda`.
        tolerance: total variation that is accepted. The p-value of any trained model vanishes with
            enough replicas; the tolerance says what matters.

    Raises:
        ValueError: starts of the wrong shape or too few, n_int not positive, functions missing,
            constant, of the wrong shape, or not finite.

    >>> import bopito_inverse as bi
    >>> exact = bi.systems.TransferOperator(bi.systems.Prinz(), grid_size=100)
    >>> s_eq = exact.equilibrium_score()
    >>> bopito = bi.models.BoPITOScore(s_eq, exact.dynamic_score(s_eq, 0.99), 0.99, lag_max=50)
    >>> step = bi.sampling.renoising_step(lag_max=50, step_lag=100)
    >>> starts = exact.sample(4000, torch.Generator().manual_seed(0))
    >>> stationarity(bi.Interpolator(bopito), step, 120, starts, 2, n_replicas=1000).p_value > 0.01
    True
    """
    replicas = Replicas.begin(model, n_int, starts, n_replicas, seed, device)
    n_steps, tolerance = as_count("n_steps", n_steps), as_positive("tolerance", tolerance)
    chosen = _as_functions(functions, replicas.frames)

    def values(x: Tensor) -> Tensor:
        named = [_values(f"functions[{name!r}]", f, x) for name, f in chosen.items()]
        return torch.stack(named, dim=1)

    before = replicas.read(replicas.frames.x, values).T.contiguous()
    after = replicas.rollout(step, [n_steps], "stationarity", values)[0].T.contiguous()
    distances = {
        name: _distances(name, replicas, before[i], after[i]) for i, name in enumerate(chosen)
    }
    return Stationarity(
        {name: found[0] for name, found in distances.items()},
        {name: found[1] for name, found in distances.items()},
        n_int=float(n_int),
        n_steps=n_steps,
        n_replicas=len(replicas),
        n_starts=replicas.frames.ess,
        tolerance=tolerance,
    )


def chapman_kolmogorov(
    model: nn.Module,
    step: Rollout,
    n_int: float,
    starts: Array | Frames,
    n_steps: int = 4,
    sets: Observable | None = None,
    n_replicas: int = 10_000,
    seed: int = 0,
    device: Device | str = "auto",
    tolerance: float = TOLERANCE,
) -> ChapmanKolmogorov:
    """Whether the step is Markovian between sets of frames, and the trained model consistent.

    Args:
        model: an `Interpolator`, or a BoPITO model where all moves are `Propagate`.
        step: the composite step; its solver is used for the trained model, too.
        n_int: interpolation parameter above zero, inf allowed.
        starts: independent frames of mu, (n, *event), or weighted `Frames`.
        n_steps: composite steps, at least 2.
        sets: function of frames, (B, *event) to (B,), the whole number that labels the set of
            each; by default four sets between the quartiles of frames of one number.
        n_replicas: number of rollouts.
        seed: integer.
        device: `auto`, `cpu` or `cuda`.
        tolerance: share of frames landing in another set that is accepted.

    Raises:
        ValueError: starts of the wrong shape or too few, n_int not positive, a model with no
            lag_max of at least 2, sets missing, fewer than two, no whole numbers, or met by
            rollouts but by no start.

    >>> import bopito_inverse as bi
    >>> exact = bi.systems.TransferOperator(bi.systems.Prinz(), grid_size=100)
    >>> s_eq = exact.equilibrium_score()
    >>> bopito = bi.models.BoPITOScore(s_eq, exact.dynamic_score(s_eq, 0.99), 0.99, lag_max=50)
    >>> step = bi.sampling.renoising_step(lag_max=50, step_lag=100)
    >>> starts = exact.sample(4000, torch.Generator().manual_seed(0))
    >>> found = chapman_kolmogorov(
    ...     bi.Interpolator(bopito), step, 120, starts, 2, lambda x: x[:, 0] > 0, n_replicas=2000
    ... )
    >>> found.consistency_p_value > 0.01
    True
    """
    replicas = Replicas.begin(model, n_int, starts, n_replicas, seed, device)
    n_steps, tolerance = as_count("n_steps", n_steps, 2), as_positive("tolerance", tolerance)
    lag_max, label = _lag_max(model), _as_sets(sets, replicas.frames)
    first = replicas.read(replicas.x_0, label)
    labels = first.unique()
    if len(labels) < 2:
        raise ValueError(f"sets must part the starts into at least 2 sets, got {len(labels)}")
    ends = replicas.rollout(step, range(1, n_steps + 1), "chain", label)
    draws = replicas.one_and_two_draws(step, lag_max, label)
    begin, *ends = (_index(labels, end) for end in (first, *ends))
    both = [_index(labels, end) for end in draws]
    return ChapmanKolmogorov(
        labels=labels.numpy(),
        populations=_populations(begin).numpy(),
        **_memory(replicas, begin, ends),
        **_consistency(replicas, begin, both),
        n_int=float(n_int),
        step_lag=step.step_lag,
        lag_max=lag_max,
        n_replicas=len(replicas),
        tolerance=tolerance,
    )


def _distances(
    name: str, replicas: Replicas, before: Tensor, after: Tensor
) -> tuple[Distance, Distance]:
    """KS and TV of one function, from its values at the frames of mu and at the last frames."""
    weights = replicas.frames.weights.cpu()
    edges = _quantiles(before, weights, N_LEVELS)
    if before.min() == before.max():
        raise ValueError(f"functions[{name!r}] must vary between the starts, got a constant")
    difference, covariance = _difference(replicas, before, after, edges)
    coarse = _quantiles(before, weights, N_BINS)
    bins = torch.cat([torch.searchsorted(coarse, edges), torch.tensor([len(coarse)])])
    group = _one_hot(bins, len(coarse) + 1).T
    generator = as_generator(replicas.seed, CPU, "null", name)
    return (
        measure(_largest_step, difference, covariance, generator),
        measure(_half_sum, group @ difference, group @ covariance @ group.T, generator),
    )


def _difference(
    replicas: Replicas, before: Tensor, after: Tensor, edges: Tensor
) -> tuple[Tensor, Tensor]:
    """P_n - P_mu in the cells between `edges`, and its covariance."""
    n_cells, n, start = len(edges) + 1, len(replicas), replicas.start
    old, new = torch.searchsorted(edges, before), torch.searchsorted(edges, after)
    weights = replicas.frames.weights.cpu()
    p_mu = torch.bincount(old, weights, minlength=n_cells)
    p_n = torch.bincount(new, minlength=n_cells) / n
    copies = torch.bincount(start, minlength=len(weights))

    def rows(part: slice) -> Tensor:
        s = start[part]
        landed = (_one_hot(new[part], n_cells) - p_n) / n
        return landed - (weights[s] / copies[s])[:, None] * (_one_hot(old[s], n_cells) - p_mu)

    covariance = covariance_by_start(rows, start)
    unused = torch.where(copies == 0, weights, 0.0).square()  # sum of w^2 (e - p) (e - p)^T
    among = torch.bincount(old, unused, minlength=n_cells)
    cross = torch.outer(among, p_mu)
    spread = torch.diag(among) - cross - cross.T + unused.sum() * torch.outer(p_mu, p_mu)
    return p_n - p_mu, covariance + spread


def _memory(replicas: Replicas, begin: Tensor, ends: list[Tensor]) -> dict:
    """P(k) against P(1)^k."""
    statistic, n_sets = row_variation(_populations(begin)), int(begin.max()) + 1
    pairs = [transitions(begin, (ends[0], end), n_sets, replicas.start) for end in ends]
    beyond = [pair.beyond_power(k) for k, pair in enumerate(pairs, 1)]
    estimated = torch.stack([pair.value[1] for pair in pairs])
    return {
        "estimated": estimated.numpy(),
        "estimated_error": torch.stack([pair.error[1] for pair in pairs]).numpy(),
        "predicted": (estimated - torch.cat([b.value for b in beyond])).numpy(),
        "difference_error": torch.cat([b.error for b in beyond]).numpy(),
        "memory": tuple(
            _distance(statistic, found, replicas.seed, "memory", k)
            for k, found in enumerate(beyond[1:], 2)
        ),
    }


def _consistency(replicas: Replicas, begin: Tensor, ends: list[Tensor]) -> dict:
    """T(N_max) in one draw against two."""
    pair = transitions(begin, ends, int(begin.max()) + 1, replicas.start)
    difference, statistic = pair.difference(), row_variation(_populations(begin))
    return {
        "whole": pair.value[0].numpy(),
        "halves": pair.value[1].numpy(),
        "whole_error": pair.error[0].numpy(),
        "halves_error": difference.error[0].numpy(),
        "consistency": _distance(statistic, difference, replicas.seed, "consistency"),
        "slowest": compare_slowest(pair),
    }


def _distance(
    statistic: Callable[[Tensor], Tensor], found: Transitions, seed: int, *stream: str | int
) -> Distance:
    generator = as_generator(seed, CPU, "null", *stream)
    return measure(statistic, found.value.flatten(), found.covariance, generator)


def _largest_step(difference: Tensor) -> Tensor:
    """Kolmogorov-Smirnov."""
    return difference.cumsum(-1).abs().amax(-1)


def _half_sum(difference: Tensor) -> Tensor:
    """Total variation."""
    return difference.abs().sum(-1) / 2


def _one_hot(index: Tensor, n: int) -> Tensor:
    return torch.nn.functional.one_hot(index, n).double()


def _populations(begin: Tensor) -> Tensor:
    return torch.bincount(begin).double() / len(begin)


def _quantiles(values: Tensor, weights: Tensor, n: int) -> Tensor:
    """The different ones of n - 1 weighted quantiles that part `values` evenly; n divides N_LEVELS.

    Levels are the same numbers for all n, so that a coarse quantile is also a fine one.
    """
    ordered, order = values.sort()
    cumulative = weights[order].cumsum(0)
    levels = torch.arange(N_LEVELS // n, N_LEVELS, N_LEVELS // n) / N_LEVELS
    at = torch.searchsorted(cumulative / cumulative[-1], levels.double())
    return ordered[at.clamp(max=len(ordered) - 1)].unique()


def _as_functions(
    functions: Mapping[str, Observable] | None, frames: Frames
) -> Mapping[str, Observable]:
    if functions:
        return functions
    n = frames.x[0].numel()
    if functions is not None or n > FEW_COMPONENTS:
        raise ValueError(
            f"functions must name at least one function of frames of shape {frames.event_shape}, "
            f"got {functions}"
        )
    names = ["x"] if n == 1 else [f"x[{i}]" for i in range(n)]
    return {name: lambda x, i=i: x.flatten(1)[:, i] for i, name in enumerate(names)}  # type: ignore[misc]


def _as_sets(sets: Observable | None, frames: Frames) -> Reader:
    """A reader of labels, checked."""
    if sets is None:
        if frames.x[0].numel() != 1:
            raise ValueError(
                f"sets must be a function that labels frames of shape {frames.event_shape}, "
                "got None"
            )
        edges = _quantiles(frames.x.flatten().cpu(), frames.weights.cpu(), N_SETS)
        return lambda x: torch.searchsorted(edges, x.flatten().cpu())

    def label(x: Tensor) -> Tensor:
        found = _values("sets", sets, x)
        if not (found == found.round()).all():
            raise ValueError(f"sets must return whole numbers, got {float(found[0])}")
        return found.long()

    return label


def _values(name: str, function: Observable, x: Tensor) -> Tensor:
    """One finite number for each frame, (B,), float64."""
    value = function(x)
    if not isinstance(value, Tensor) or value.numel() != len(x):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return one number for each of {len(x)} frames, got {got}")
    if not value.isfinite().all():
        bad = int((~value.isfinite()).sum())
        raise ValueError(f"{name} must be finite, got NaN or infinite values at {bad} frames")
    return value.reshape(len(x)).double()


def _index(labels: Tensor, found: Tensor) -> Tensor:
    """Position of each label among `labels`, sorted."""
    index = torch.searchsorted(labels, found).clamp(max=len(labels) - 1)
    strange = found[labels[index] != found].unique().tolist()
    if strange:
        raise ValueError(
            f"sets must all hold starts, but rollouts meet {strange} where no start is: add frames "
            "of mu there, or join these sets to others"
        )
    return index


def _lag_max(model: nn.Module) -> int:
    lag_max = getattr(model, "lag_max", None)
    if not isinstance(lag_max, int) or lag_max < 2:
        raise ValueError(f"model must have a lag_max of at least 2 frames, got {lag_max}")
    return lag_max
