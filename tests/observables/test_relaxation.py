import math

import numpy as np
import pytest
import torch
from deeptime.decomposition import EDMD
from deeptime.markov import TransitionCountEstimator
from deeptime.markov.msm import MaximumLikelihoodMSM

import bopito_inverse as bi
from bopito_inverse.datasets import Trajectories
from bopito_inverse.observables.relaxation import (
    ImpliedTimescale,
    hats,
    implied_timescale,
    quantile_knots,
)
from bopito_inverse.systems import DoubleWell, Potential1D, Prinz, TransferOperator, TripleWell

WELLS = DoubleWell(a=3.0)


def simulated(
    system: Potential1D, starts: torch.Tensor, n_frames: int, seed: int = 0, **options: float
) -> Trajectories:
    return bi.simulate.langevin(system, starts, n_frames, seed=seed, **options)


def in_equilibrium(system: Potential1D, n: int, n_frames: int, seed: int = 0) -> Trajectories:
    starts = TransferOperator(system).sample(n, torch.Generator().manual_seed(seed))
    return simulated(system, starts, n_frames, seed)


def agrees(found: ImpliedTimescale, truth: float, largest: float) -> bool:
    """Within three standard errors, which are a fraction `largest` of the truth or less."""
    return abs(found.value - truth) < 3 * found.error < 3 * largest * truth


@pytest.fixture(scope="module")
def wells() -> Trajectories:
    return in_equilibrium(WELLS, 400, 300)


@pytest.mark.parametrize(
    ("system", "n", "n_frames", "lag"),
    [(DoubleWell(a=3.0), 400, 300, 30), (TripleWell(), 400, 300, 60), (Prinz(), 300, 150, 40)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_value_is_that_of_the_exact_operator(
    system: Potential1D, n: int, n_frames: int, lag: int
) -> None:
    found = implied_timescale(in_equilibrium(system, n, n_frames), lag)
    truth = float(TransferOperator(system).timescales[0])
    assert found.status == "ok"
    assert agrees(found, truth, largest=0.15), (found, truth)


def test_trajectories_may_start_off_equilibrium_and_be_shorter_than_the_timescale() -> None:
    starts = torch.full((3000, 1), 1.0)  # all in the upper well
    found = implied_timescale(simulated(WELLS, starts, 50), lag=10)
    truth = float(TransferOperator(WELLS).timescales[0])
    assert truth > 50
    assert agrees(found, truth, largest=0.15), (found, truth)


def test_eigenvalue_is_that_of_deeptime(wells: Trajectories) -> None:
    lag, series = 20, wells.frames[:, 0].double()
    knots = quantile_knots(series, 32)
    phi = [hats(x[:, 0].double(), knots).numpy() for x in wells]
    now = np.concatenate([x[:-lag] for x in phi])
    later = np.concatenate([x[lag:] for x in phi])
    model = EDMD(basis=lambda x: x).fit((now, later)).fetch_model()
    second = np.sort(model.eigenvalues.real)[-2]
    assert implied_timescale(wells, lag).eigenvalue == pytest.approx(second, abs=1e-8)


def test_value_is_that_of_a_markov_model_by_deeptime(wells: Trajectories) -> None:
    lag = 40
    cells = [np.digitize(x[:, 0].numpy(), np.linspace(-1.4, 1.4, 41)) for x in wells]
    counts = TransitionCountEstimator(lag, "sliding").fit_fetch(cells).submodel_largest()
    peer = MaximumLikelihoodMSM(reversible=True).fit_fetch(counts).timescales()[0]
    assert implied_timescale(wells, lag).value == pytest.approx(peer, rel=0.03)


def test_reported_error_is_the_spread_over_repetitions() -> None:
    many = in_equilibrium(WELLS, 40 * 150, 100, seed=3).frames.view(40, 150, 100, 1)
    found = [implied_timescale(list(part), lag=15) for part in many]
    spread, error = np.std([f.value for f in found]), np.mean([f.error for f in found])
    assert spread == pytest.approx(error, rel=0.35)
    truth = TransferOperator(WELLS).timescales[0]
    assert np.mean([f.lower < truth for f in found]) > 0.85, np.mean(
        [f.lower < truth for f in found]
    )


def test_a_barrier_that_is_never_crossed_shows_no_relaxation() -> None:
    starts = torch.linspace(-1.2, 1.2, 1000)[:, None]
    found = implied_timescale(simulated(WELLS, starts, 100, barrier=0.1), lag=40)
    assert found.status == "not_seen"
    assert found.value == found.error == math.inf
    assert found.lower > 1000
    assert "no relaxation is seen" in str(found)


def test_an_estimate_that_grows_with_the_lag_is_not_ok() -> None:
    starts = torch.linspace(-1.2, 1.2, 1000)[:, None]
    found = implied_timescale(simulated(WELLS, starts, 100, barrier=0.1), lag=8)
    assert found.status != "ok"
    assert "lag" in str(found)


def test_an_estimate_that_differs_from_half_the_lag_is_not_ok() -> None:
    """At lag 27 of 30 frames, those that the lag starts from are all near the common start."""
    trajectories = simulated(WELLS, torch.full((3000, 1), 1.0), 30)
    assert implied_timescale(trajectories, lag=10).status == "ok"
    found = implied_timescale(trajectories, lag=27)
    assert found.status == "unsettled", found
    assert "has not levelled off" in str(found)


def test_independent_frames_have_no_timescale() -> None:
    frames = torch.randn(20, 200, 1, generator=torch.Generator().manual_seed(0))
    found = implied_timescale(list(frames), lag=4)
    assert found.status == "unresolved"
    assert "shorter lag" in str(found)


def test_one_trajectory_gives_a_value_without_error(wells: Trajectories) -> None:
    found = implied_timescale([wells.frames[:30_000]], lag=20)
    assert math.isinf(found.error)
    assert found.lower == 0
    assert "±" not in str(found)
    many = implied_timescale([wells[i] for i in range(100)], lag=20)
    assert found.value == pytest.approx(many.value, rel=0.2)


def test_trajectories_of_unequal_length_count_by_their_pairs(wells: Trajectories) -> None:
    """Cut where no pair is lost but those across the cut, and joined with pieces that hold none."""
    pieces = [part for x in wells for part in (x[:200], x[190:195], x[200:])]
    short = implied_timescale([p for p in pieces if len(p) > 20], lag=20)
    whole = implied_timescale(pieces, lag=20)
    assert whole.eigenvalue == pytest.approx(short.eigenvalue, abs=1e-3)
    assert whole.value == pytest.approx(implied_timescale(wells, 20).value, rel=0.05)


def test_order_and_chunks_do_not_matter(wells: Trajectories, monkeypatch: object) -> None:
    whole = implied_timescale(wells, lag=20)
    monkeypatch.setattr("bopito_inverse.observables.relaxation.FRAMES_PER_CHUNK", 1000)  # type: ignore[attr-defined]
    parts = implied_timescale(wells, lag=20)
    assert parts.value == pytest.approx(whole.value, rel=1e-9)
    assert parts.error == pytest.approx(whole.error, rel=1e-6)


def test_the_slow_process_is_found_in_any_of_several_numbers(wells: Trajectories) -> None:
    noise = torch.randn(len(wells.frames), 1, generator=torch.Generator().manual_seed(1))
    both = torch.cat([noise, wells.frames], dim=1).split(wells.lengths.tolist())
    alone, found = implied_timescale(wells, 20), implied_timescale(list(both), 20)
    assert found.value == pytest.approx(alone.value, rel=0.05)
    picked = implied_timescale(list(both), 20, observable=lambda x: x[:, 1])
    assert picked.value == pytest.approx(alone.value, rel=1e-9)


def test_observable_that_misses_the_slow_process(wells: Trajectories) -> None:
    """In a symmetric well the crossing cannot be seen in x^2; here little of it."""
    found = implied_timescale(wells, 20, observable=lambda x: x.square(), n_knots=8)
    assert found.value < 0.8 * TransferOperator(WELLS).timescales[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lag": 1}, "lag must be a whole number of at least 2"),
        ({"lag": 300}, "lag must be below the longest trajectory"),
        ({"lag": 20, "n_knots": 1}, "n_knots must be"),
        ({"lag": 20, "observable": lambda x: x[:, 0] * 0}, "observable must vary"),
        ({"lag": 20, "observable": lambda x: x[0]}, "observable must return shape"),
        ({"lag": 20, "observable": lambda x: x / 0}, "observable must be finite"),
    ],
)
def test_bad_arguments_are_refused(wells: Trajectories, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        implied_timescale(wells, **arguments)


def test_large_frames_need_an_observable() -> None:
    with pytest.raises(ValueError, match="observable must be given"):
        implied_timescale([torch.randn(10, 4)], lag=2)
