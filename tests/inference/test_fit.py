import copy
import json
import sys

import numpy as np
import pytest
import torch
from scipy.stats import kstest, lognorm, norm, uniform

import bopito_inverse as bi
from bopito_inverse.inference.posterior import estimate, read_netcdf, write_netcdf
from bopito_inverse.sampling import DPMSolver, Interpolate, Propagate, Rollout

SYSTEM = bi.systems.OrnsteinUhlenbeck()  # timescale 20 frames
EXACT = bi.systems.TransferOperator(SYSTEM, grid_size=150)
LAG_MAX, STEP_LAG = 15, 20
LAGS = STEP_LAG * np.arange(1, 6)


def model(lambda_hat: float = SYSTEM.decay) -> bi.Interpolator:
    s_eq = EXACT.equilibrium_score()
    s_dyn = EXACT.dynamic_score(s_eq, lambda_hat)
    return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, lambda_hat, LAG_MAX))


def experiment(timescale: float, sigma: float = 0.02, seed: int | None = None):
    values = np.exp(-LAGS / timescale)
    if seed is not None:
        values = values + sigma * np.random.default_rng(seed).standard_normal(len(LAGS))
    return bi.observables.Experiment(LAGS, values, np.full(len(LAGS), sigma))


def fit(exp, moves=None, n_replicas=2048, seed=0, lambda_hat=SYSTEM.decay, **options):
    step = Rollout(moves or [Interpolate()], STEP_LAG, DPMSolver(12))
    obs = bi.observables.Correlation(lambda x: x, normalization="variance")
    starts = EXACT.sample(4000, torch.Generator().manual_seed(7))
    return bi.inference.fit(
        model(lambda_hat), step, obs, exp, starts, n_replicas=n_replicas, seed=seed, **options
    )


@pytest.fixture(scope="module")
def slow():
    """An experiment twice as slow as the model: n = 10 in a step of 20, timescale 40."""
    return fit(experiment(40.0, seed=1))


def test_slower_experiment_is_found_below_lag_max(slow) -> None:
    assert slow.status == "ok"
    low, high = slow.n_int.hdi_94
    assert low < 10.0 < high
    assert slow.n_int.mean == pytest.approx(10.0, rel=0.1)
    low, high = slow.timescale.hdi_94
    assert low < 40.0 < high
    assert slow.timescale.mean == pytest.approx(40.0, rel=0.1)
    assert slow.weight.mean == pytest.approx(1.0)


def test_faster_experiment_is_found_above_lag_max() -> None:
    result = fit(experiment(20.0), moves=[Interpolate(), Propagate(2)])
    assert result.status == "ok"
    assert result.n_int.mean > LAG_MAX
    assert 0.1 < result.weight.mean < 0.99
    low, high = result.timescale.hdi_94
    assert low < 20.0 < high
    assert result.map == pytest.approx(result.n_int.mean, rel=0.1)
    weight, n = (result.idata.posterior[name].values for name in ("weight", "n_int"))
    above = weight < 1
    expected = LAG_MAX + np.log(weight[above]) / np.log(SYSTEM.decay)
    np.testing.assert_allclose(n[above], expected, rtol=1e-9)
    assert (n[~above] <= LAG_MAX).all()


def test_weight_does_not_depend_on_lambda_hat() -> None:
    one = fit(experiment(20.0), moves=[Interpolate(), Propagate(2)], n_replicas=512)
    other = fit(experiment(20.0), [Interpolate(), Propagate(2)], n_replicas=512, lambda_hat=0.9)
    assert other.weight.mean == pytest.approx(one.weight.mean, abs=0.1 * one.weight.sd)
    assert abs(other.n_int.mean - one.n_int.mean) > 1


def test_posterior_equals_brute_force(slow) -> None:
    """The same posterior from direct predictions on a grid, with no emulator."""
    predict = slow._problem.emulator.prediction
    exp = experiment(40.0, seed=1)
    n_int = np.linspace(7.5, 13.5, 25)
    made = predict.at(torch.from_numpy(n_int))
    n = len(made.influence)
    log_density = []
    for k in range(len(n_int)):
        influence = made.influence[:, k, :-1].numpy()
        total = exp.covariance + influence.T @ influence / (n * (n - 1))
        residual = exp.values - made.value[k, :-1].numpy()
        squared = residual @ np.linalg.solve(total, residual)
        log_density.append(-0.5 * squared - 0.5 * np.linalg.slogdet(total)[1])
    density = np.exp(np.array(log_density) - max(log_density))
    density /= np.trapezoid(density, n_int)
    mean = np.trapezoid(density * n_int, n_int)
    sd = np.sqrt(np.trapezoid(density * (n_int - mean) ** 2, n_int))
    assert slow.n_int.mean == pytest.approx(mean, abs=0.05 * sd)
    assert slow.n_int.sd == pytest.approx(sd, rel=0.05)


def test_intervals_cover_the_truth_at_their_rate() -> None:
    """Standard scores of the timescale over repeated experiments and random numbers."""
    z = []
    for seed in range(16):
        result = fit(experiment(40.0, seed=seed), n_replicas=512, seed=seed)
        z.append((result.timescale.mean - 40.0) / result.timescale.sd)
    assert abs(np.mean(z)) < 4 / 16**0.5
    assert 0.5 < np.std(z) < 1.6


def test_fewer_replicas_widen_the_posterior(slow) -> None:
    few = fit(experiment(40.0, seed=1), n_replicas=64)
    assert few.n_int.sd > 1.3 * slow.n_int.sd
    assert few.monte_carlo_share > 0.5 > slow.monte_carlo_share
    assert few.status == "mc_limited"
    assert "n_replicas" in few.status.message


def test_prior_on_n_int_is_the_posterior_where_data_say_nothing() -> None:
    prior = lognorm(0.3, scale=20.0)  # on both sides of lag_max
    result = fit(experiment(20.0, sigma=50.0), n_replicas=128, prior=prior)
    draws = result.idata.posterior["n_int"].values.ravel()
    assert kstest(draws, prior.cdf).statistic < 0.01


def test_prior_far_beyond_the_data_and_one_narrower_than_the_grid() -> None:
    far = fit(experiment(20.0, sigma=50.0), n_replicas=64, prior=uniform(5000, 1000))
    assert 5000 < far.n_int.hdi_94[0] < far.n_int.hdi_94[1] < 6000
    narrow = fit(experiment(20.0, sigma=50.0), n_replicas=64, prior=uniform(18, 0.01))
    assert narrow.n_int.mean == pytest.approx(18.005, abs=0.002)


def test_broad_prior_does_not_hide_a_bound() -> None:
    relaxed = bi.observables.Experiment(LAGS, np.zeros(5), np.full(5, 0.02))
    result = fit(relaxed, n_replicas=512, prior=uniform(1, 3000))
    assert result.status == "bound"
    assert result.n_int.hdi_94[1] > 2500


def test_estimate_of_infinite_draws_has_a_median() -> None:
    draws = np.append(np.arange(1.0, 100.0), np.inf).reshape(4, 25)
    found = estimate(draws)
    assert found.mean == found.sd == np.inf
    assert str(found) == "median 50 (94 % HDI 3 to 97)"
    assert found.to_dict() == {"mean": None, "sd": None, "median": 50, "hdi_94": [3, 97]}


def test_status_survives_a_copy(slow) -> None:
    copied = copy.deepcopy(slow.status)
    assert copied == slow.status
    assert copied.message == slow.status.message


def test_interval_is_widened_until_it_holds_the_posterior(monkeypatch) -> None:
    module = sys.modules["bopito_inverse.inference.fit"]
    monkeypatch.setattr(module._Fit, "_interval", lambda *_: (1.0, 1.05))
    result = fit(experiment(40.0, seed=1), n_replicas=512)
    assert result.n_int.hdi_94[0] < 10.0 < result.n_int.hdi_94[1]


def test_timescale_is_that_of_the_step_whatever_is_observed() -> None:
    obs = bi.observables.Correlation(lambda x: x**2, normalization="variance")
    step = Rollout([Interpolate()], STEP_LAG, DPMSolver(12))
    starts = EXACT.sample(4000, torch.Generator().manual_seed(7))
    values = np.exp(-2 * LAGS / 40.0)  # x^2 relaxes at twice the rate of x
    exp = bi.observables.Experiment(LAGS, values, np.full(5, 0.02))
    result = bi.inference.fit(model(), step, obs, exp, starts, n_replicas=2048)
    assert result.timescale.hdi_94[0] < 40.0 < result.timescale.hdi_94[1]


def test_informative_prior_moves_the_posterior(slow) -> None:
    pulled = fit(experiment(40.0, seed=1), prior=norm(12.0, 0.05))
    assert pulled.n_int.mean == pytest.approx(12.0, abs=0.2)


@pytest.mark.parametrize(
    ("values", "code", "hint"),
    [
        (np.zeros(5), "bound", "w = 0"),
        (np.full(5, 0.999), "bound", "slower than the model"),
        (np.array([0.1, 0.9, -0.5, 0.8, 0.2]), "poor_fit", "no n_int explains"),
    ],
)
def test_answers_not_to_be_trusted_say_so(values: np.ndarray, code: str, hint: str) -> None:
    exp = bi.observables.Experiment(LAGS, values, np.full(5, 0.02))
    result = fit(exp, n_replicas=1024)
    assert result.status == code
    assert hint in result.status.message


def test_predicts_lags_that_were_left_out() -> None:
    exp = experiment(40.0, seed=2)
    result = fit(exp[exp.lags != 60], n_replicas=1024)
    draws = result.predict([60])
    assert draws.shape == (4, 1000, 1)
    assert abs(draws.mean() - np.exp(-60 / 40.0)) < 4 * draws.std()
    assert draws.std() < 0.05
    with pytest.raises(ValueError, match=r"lags must be at most 100 \(the longest fitted\)"):
        result.predict([120])


def test_inference_data_works_with_arviz(slow, tmp_path) -> None:
    import arviz

    groups = {"posterior", "posterior_predictive", "log_likelihood", "observed_data"}
    assert groups | {"constant_data"} <= set(slow.idata.groups())
    table = arviz.summary(slow.idata, var_names=["n_int", "timescale"])
    assert table.loc["n_int", "mean"] == pytest.approx(slow.n_int.mean, rel=1e-3)
    assert table.loc["n_int", "r_hat"] < 1.01
    assert np.isfinite(arviz.loo(slow.idata).elpd_loo)
    assert slow.ess_bulk > 3000
    write_netcdf(slow.idata, tmp_path / "posterior.nc")
    again = read_netcdf(tmp_path / "posterior.nc")
    np.testing.assert_array_equal(again.posterior["n_int"], slow.idata.posterior["n_int"])


def test_posterior_predictive_has_the_noise_of_the_experiment(slow) -> None:
    predicted = slow.idata.posterior["prediction"].values
    replicated = slow.idata.posterior_predictive["correlation"].values
    added = replicated.var((0, 1)) - predicted.var((0, 1))
    np.testing.assert_allclose(added, 0.02**2, rtol=0.25)


def test_summary_is_plain_json(slow) -> None:
    summary = json.loads(json.dumps(slow.summary()))
    for name in ("n_int", "weight", "timescale"):
        assert set(summary[name]) == {"mean", "sd", "median", "hdi_94"}
    expected = {"status", "ess_bulk", "lag_max", "lambda_hat", "step_lag", "n_replicas", "seed"}
    assert expected <= set(summary)
    assert "94 % HDI" in str(slow)


def test_same_seed_same_posterior() -> None:
    one, two = (fit(experiment(40.0), n_replicas=128, seed=3) for _ in range(2))
    draws = (result.idata.posterior["n_int"].values for result in (one, two))
    np.testing.assert_allclose(*draws, rtol=1e-9)
    assert one.timescale.mean == pytest.approx(two.timescale.mean, rel=1e-9)


def test_bad_input_is_refused_by_name() -> None:
    exp = experiment(40.0)
    with pytest.raises(ValueError, match=r"mode must be one of rollout, direct, got .both."):
        fit(exp, mode="both")
    with pytest.raises(ValueError, match="prior must be a frozen"):
        fit(exp, n_replicas=64, prior=3.0)
    with pytest.raises(ValueError, match="prior must have mass"):
        fit(exp, n_replicas=64, prior=norm(-500.0, 0.1))
    off = bi.observables.Experiment([30.0], [0.5], [0.1])
    with pytest.raises(ValueError, match="30"):
        fit(off)
    two = bi.observables.Experiment([20.0, 20.0], [0.5, 0.4], [0.1, 0.1], observable=["x", "y"])
    with pytest.raises(ValueError, match="exp must hold one observable for one obs"):
        fit(two)


@pytest.mark.gpu
def test_fit_on_cuda() -> None:
    cpu = fit(experiment(40.0, seed=1), device="cpu")
    cuda = fit(experiment(40.0, seed=1), device="cuda")
    assert cuda.n_int.mean == pytest.approx(cpu.n_int.mean, abs=0.5 * cpu.n_int.sd)
