import json

import numpy as np
import pytest
import torch
from scipy.stats import uniform

import bopito_inverse as bi
from bopito_inverse.diagnostics.calibration import Calibration, Ranked, calibrate
from bopito_inverse.fan_out import fan_out
from bopito_inverse.sampling import DPMSolver, Interpolate, Rollout

SYSTEM = bi.systems.OrnsteinUhlenbeck()  # timescale 20 frames
EXACT = bi.systems.TransferOperator(SYSTEM, grid_size=40)
LAGS = 20 * np.arange(1, 4)
STEP = Rollout([Interpolate()], 20, DPMSolver(6))
N = 24


def position(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


def calibrated(function=position, **options) -> Calibration:
    s_eq = EXACT.equilibrium_score()
    s_dyn = EXACT.dynamic_score(s_eq, SYSTEM.decay)
    model = bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, SYSTEM.decay, 15))
    obs = bi.observables.Correlation(function, normalization="variance")
    exp = bi.observables.Experiment(LAGS, np.zeros(3), np.full(3, 0.05))
    starts = EXACT.sample(20_000, torch.Generator().manual_seed(7))
    options = {"n_experiments": N, "n_replicas": 128, "device": "cpu"} | options
    return calibrate(model, STEP, obs, exp, starts, **options)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes of an executor, so that both give the same numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def good() -> Calibration:
    return calibrated()


def test_intervals_hold_the_truth_as_often_as_they_say(good) -> None:
    assert good.n_experiments == N
    assert set(good.ranks) == {"n_int", "timescale"}
    assert len(good.coverage) == 6
    for row in good.coverage:
        assert abs(row.central - row.level) < 4 * row.error, row
        assert abs(row.hdi - row.level) < 4 * row.error, row
    for name in good.ranks:
        assert good.p_values[name] > 1e-3
        assert abs(good.shift(name)) < 4
        z = good.z_scores[name]
        assert abs(np.nanmean(z)) < 4 / N**0.5
        assert 0.5 < np.nanstd(z) < 1.6
    assert good.calibrated
    assert "no sign in 24 experiments" in good.verdict


def test_truths_are_those_of_the_prior(good) -> None:
    n = good.quantities["n_int"].truth
    assert (n > 0).all()
    assert 0.2 < (n < 15).mean() < 0.8  # half of the family is slower than the data
    order = np.argsort(n)
    assert (np.diff(good.quantities["timescale"].truth[order]) < 0).all()


def test_error_bars_that_are_too_small_are_found() -> None:
    """The control: data with three times the noise that the fits are told."""
    wrong = calibrated(noise_scale=3.0, n_experiments=16, n_replicas=256, prior=uniform(3, 12))
    assert not wrong.calibrated
    assert "n_int are too narrow" in wrong.verdict
    assert np.nanstd(wrong.z_scores["n_int"]) > 1.5


def test_ranks_of_known_posteriors() -> None:
    """Narrow, wide and shifted posteriors by construction, with no fit."""
    rng = np.random.default_rng(0)
    n = 300
    for sd, centre, word in ((1.0, 0.0, None), (0.5, 0.0, "narrow"), (2.0, 0.0, "wide")):
        assert _verdict(rng, n, sd, centre, word)
    assert _verdict(rng, n, 1.0, 1.0, "too high")
    assert _verdict(rng, n, 1.0, -1.0, "too low")


def _verdict(rng, n: int, sd: float, centre: float, word: str | None) -> bool:
    from bopito_inverse.diagnostics.calibration import _ranked

    rows = []
    for _ in range(n):
        truth = rng.standard_normal()
        mean = centre + truth + rng.standard_normal()
        rows.append(_ranked(mean + sd * rng.standard_normal(4000), truth, rng))
    ranked = Ranked(*map(np.array, zip(*rows, strict=True)))
    made = Calibration({"x": ranked}, {"ok": n}, 0.0, 1, 0)
    return made.calibrated if word is None else word in made.verdict


def test_truths_that_are_not_known_well_are_not_blamed_on_the_fit() -> None:
    rough = calibrated(truth_replicas=64, n_experiments=10, n_replicas=64)
    assert rough.truth_error > 0.3
    assert "raise truth_replicas" in rough.verdict


def test_parameters_of_several_kinds_are_ranked() -> None:
    options = {
        "mode": "direct",
        "clock": bi.inference.Clock(uniform(0.5, 1.0)),
        "nuisance": bi.inference.Nuisance(scale=uniform(0.9, 0.2)),
    }
    made = calibrated(n_experiments=10, n_replicas=64, **options)
    lags = {f"{name}[{k}]" for name in ("n_int", "timescale") for k in range(3)}
    assert set(made.ranks) == lags | {"kappa", "scale[x]"}
    scale, kappa = (made.quantities[name].truth for name in ("scale[x]", "kappa"))
    assert 0.9 <= scale.min() < scale.max() <= 1.1
    np.testing.assert_allclose(made.quantities["n_int[2]"].truth, 15 + kappa * 45, rtol=1e-6)


def test_processes_give_the_same_as_none(good) -> None:
    options = {"n_experiments": 10, "n_replicas": 64, "seed": 5}
    here, there = calibrated(**options), calibrated(executor=2, **options)
    for name, ranked in here.quantities.items():
        np.testing.assert_allclose(there.quantities[name].mean, ranked.mean, rtol=1e-6)
    np.testing.assert_array_equal(there.ranks["n_int"], here.ranks["n_int"])


def test_summary_is_plain_json_and_the_table_reads(good) -> None:
    summary = json.loads(json.dumps(good.summary()))
    assert summary["n_experiments"] == N
    assert len(summary["quantities"]["n_int"]["rank"]) == N
    assert set(summary["quantities"]["timescale"]["coverage"]) == {"0.5", "0.8", "0.94"}
    text = str(good)
    assert "timescale, central" in text
    assert "verdict  no sign" in text


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="n_replica"):
        calibrated(n_replica=64)
    with pytest.raises(ValueError, match="n_experiments must be a whole number of at least 10"):
        calibrated(n_experiments=3, n_replicas=64)
    with pytest.raises(ValueError, match=r"obs must be picklable .* \(no lambda\)"):
        calibrated(lambda x: x[:, 0], executor=2, n_replicas=64)


def _fails_at_two(shared, item):
    if item == 2:
        raise ValueError(shared["why"])
    return item


def test_a_failure_names_its_number() -> None:
    with pytest.raises(RuntimeError, match="experiment 2 failed: no luck"):
        fan_out(_fails_at_two, {"why": "no luck"}, range(5), "experiment")
    assert fan_out(_fails_at_two, {}, [0, 1], "experiment", progress=True) == [0, 1]
    with pytest.raises(ValueError, match="executor must be a whole number of at least 1"):
        fan_out(_fails_at_two, {}, [0, 1], "experiment", executor=0)
