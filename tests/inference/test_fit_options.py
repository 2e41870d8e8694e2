"""Options of a fit, against an oscillator whose n_int is known."""

import contextlib
import sys
import warnings

import numpy as np
import pytest
from oscillator import (
    BOTH,
    LAG_MAX,
    LAGS,
    MODEL,
    RENOISING,
    STARTS,
    STEP_LAG,
    Exact,
    experiment,
    fit,
    x,
    z_score,
)
from scipy.stats import halfnorm, kstest, lognorm, norm, uniform

import bopito_inverse as bi
from bopito_inverse.inference import Clock, Nuisance, Prior
from bopito_inverse.inference import explore as exploration
from bopito_inverse.inference.posterior import read_netcdf, write_netcdf
from bopito_inverse.observables import Experiment

WELL_KNOWN = {"n_replicas": 8192}
ALL_GROUPS = {
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
}


def draws(result, name: str, group: str = "posterior") -> np.ndarray:
    values = result.idata[group][name].values
    return values.reshape(-1, *values.shape[2:])


@pytest.fixture
def short_chains(monkeypatch) -> None:
    _shorten(monkeypatch)


def _shorten(patch) -> None:
    patch.setattr(exploration, "STEPS", 200)
    patch.setattr(exploration, "BURN_IN", 120)


@pytest.fixture(scope="module")
def plain():
    return fit(experiment(seed=1))


# priors


@pytest.mark.parametrize(
    "prior",
    [
        Prior(lognorm(1.0, scale=20.0)),
        Prior(uniform(21.0, 0.3)),
        Prior(uniform(0.2, 0.5), "weight"),
        Prior(norm(0.6, 0.01), "weight"),
        Prior(lognorm(0.5, scale=30.0), "timescale"),
        Prior(norm(25.0, 0.2), "timescale"),
    ],
    ids=["n_int", "n_int narrow", "weight", "weight narrow", "timescale", "timescale narrow"],
)
def test_posterior_is_the_prior_where_data_say_nothing(prior: Prior) -> None:
    result = fit(experiment(sigma=50.0), prior=prior)
    first, last = {"n_int": (1, np.inf), "weight": (0, 1), "timescale": (0, 400)}[prior.on]
    low, high = prior.distribution.cdf([first, last])

    def truncated(values: np.ndarray) -> np.ndarray:
        return (prior.distribution.cdf(values) - low) / (high - low)

    if prior.on == "timescale":  # the step knows its own but for Monte Carlo noise, of 3 %
        values = STEP_LAG * 20.0 / draws(result, "n_int")
        shift = np.median(values) / prior.distribution.median()
        assert shift == pytest.approx(1.0, abs=0.1)
        assert kstest(values / shift, truncated).statistic < 0.1
    else:
        assert kstest(draws(result, prior.on), truncated).statistic < 0.02
        assert kstest(draws(result, prior.on, "prior"), truncated).pvalue > 1e-3
    assert result.status in ("unidentified", "bound")  # some lean on w = 0 by themselves


def test_default_prior_is_uniform_in_the_coordinate() -> None:
    n = draws(fit(experiment(sigma=50.0)), "n_int")
    u = np.where(n >= LAG_MAX, np.exp(-(n - LAG_MAX) / 20), 2 - n / LAG_MAX)
    assert kstest(u, uniform(0, 2 - 1 / LAG_MAX).cdf).statistic < 0.02


def test_prior_predictive_is_what_the_prior_predicts(plain) -> None:
    replicated = draws(plain, "correlation", "prior_predictive")
    n = draws(plain, "n_int", "prior")
    truth = np.exp(-n[:, None] / 20 * np.arange(1, 6))
    z = (replicated - truth) / np.hypot(0.02, 0.05)
    assert np.abs(z.mean(0)).max() < 0.3
    assert replicated.shape == (1000, 5)


# nuisance parameters and errors of the experiment


def test_unknown_scale_is_recovered_and_biases_n_int_where_it_is_left_out() -> None:
    exp = experiment(5.0, sigma=0.01, seed=3, scale=0.9)
    result = fit(exp, nuisance=Nuisance(scale=norm(1, 0.1)), **WELL_KNOWN)
    scale = draws(result, "scale[x]")
    assert abs(scale.mean() - 0.9) < 3 * scale.std()
    assert scale.std() < 0.03
    assert abs(z_score(result.n_int, 5.0)) < 3
    assert result.status == "ok"
    without = fit(exp, **WELL_KNOWN)
    assert z_score(without.n_int, 5.0) > 4


def test_unknown_offset_is_recovered() -> None:
    exp = experiment(sigma=0.01, seed=4)
    shifted = Experiment(exp.lags, exp.values + 0.1, exp.sigma)
    result = fit(shifted, nuisance={"x": Nuisance(offset=norm(0, 0.2))}, **WELL_KNOWN)
    offset = draws(result, "offset[x]")
    assert abs(offset.mean() - 0.1) < 3 * offset.std()
    assert offset.std() < 0.03
    assert abs(z_score(result.n_int, 20.0)) < 3
    assert abs(z_score(fit(shifted, **WELL_KNOWN).n_int, 20.0)) > 4


def test_understated_errors_are_seen() -> None:
    lags = STEP_LAG * np.arange(1, 13)
    noisy = experiment(sigma=0.04, seed=5, lags=lags)
    exp = Experiment(lags, noisy.values, np.full(12, 0.02))
    result = fit(exp, nuisance=Nuisance(sigma_scale=lognorm(1.0)), n_replicas=2048)
    stretch = draws(result, "sigma_scale[x]")
    low, high = np.quantile(stretch, [0.02, 0.98])
    assert low < 2.0 < high
    assert np.median(stretch) == pytest.approx(2.0, rel=0.35)
    assert result.n_int.sd > 1.3 * fit(exp, n_replicas=2048).n_int.sd


def test_student_t_errors_survive_an_outlier() -> None:
    exp = experiment(seed=6)
    values = exp.values.copy()
    values[1] += 10 * 0.02
    wrong = Experiment(exp.lags, values, exp.sigma)
    robust, clean = fit(wrong, dof=2.5), fit(exp, dof=2.5)
    gaussian = fit(wrong)
    assert abs(robust.n_int.mean - clean.n_int.mean) < clean.n_int.sd
    assert abs(gaussian.n_int.mean - clean.n_int.mean) > 1.5 * clean.n_int.sd
    assert gaussian.status == "poor_fit"
    assert robust.status == "ok"


def test_correlated_errors_count() -> None:
    """A common error of all points looks like a change of scale, not like random errors."""
    covariance = 0.03**2 * (0.95 + 0.05 * np.eye(5))
    exp = experiment(sigma=0.03, seed=7, covariance=covariance)
    correlated = fit(exp, **WELL_KNOWN)
    diagonal = fit(Experiment(exp.lags, exp.values, exp.sigma), **WELL_KNOWN)
    assert abs(z_score(correlated.n_int, 20.0)) < 3
    slope = -np.arange(1, 6) / 20 * np.exp(-np.arange(1, 6.0))  # d g_k / d n_int
    for result, noise in ((correlated, covariance), (diagonal, np.diag(np.diag(covariance)))):
        expected = (slope @ np.linalg.solve(noise, slope)) ** -0.5
        own = np.sqrt(result.n_int.sd**2 * (1 - result.monte_carlo_share))
        assert own == pytest.approx(expected, rel=0.2)
    assert correlated.n_int.sd < 0.7 * diagonal.n_int.sd


# several observables and experiments


def test_second_observable_improves_the_posterior() -> None:
    early = LAGS[:2]
    exp = [
        experiment(sigma=0.03, seed=8, lags=early),
        experiment(sigma=0.03, seed=9, lags=early, name="x2"),
    ]
    joint = fit(exp, BOTH)
    single = [fit(one, BOTH) for one in exp]
    for result in (joint, *single):
        assert abs(z_score(result.n_int, 20.0)) < 3
    precision = sum(one.n_int.sd**-2 for one in single)
    assert joint.n_int.sd < 0.95 * min(one.n_int.sd for one in single)
    assert joint.n_int.sd == pytest.approx(precision**-0.5, rel=0.15)
    table = Experiment(
        np.r_[early, early],
        np.r_[exp[0].values, exp[1].values],
        np.full(4, 0.03),
        observable=["x", "x", "x2", "x2"],
    )
    again = fit(table, BOTH)  # the same in one table
    assert again.n_int.mean == pytest.approx(joint.n_int.mean, rel=1e-9)


def test_observable_that_was_not_measured_is_predicted() -> None:
    result = fit(experiment(seed=10), BOTH, **WELL_KNOWN)
    predicted = result.predict(LAGS, "x2").reshape(-1, 5)
    truth = np.exp(-2 * np.arange(1, 6.0))
    assert (np.abs(predicted.mean(0) - truth) < 3.5 * predicted.std(0)).all()
    assert predicted.std(0).max() < 0.05
    with pytest.raises(ValueError, match="observable must be one of"):
        result.predict(LAGS, "x3")


def test_experiments_share_n_int_or_have_their_own() -> None:
    exp = [experiment(20.0, seed=11), experiment(28.0, seed=12)]
    own = fit(exp, shared=False)
    assert isinstance(own.n_int, tuple)
    for estimate, rate, truth in zip(own.n_int, own.timescale, (20.0, 28.0), strict=True):
        assert abs(z_score(estimate, truth)) < 3
        assert abs(z_score(rate, STEP_LAG * 20 / truth)) < 3
    assert own.idata.posterior["n_int"].dims == ("chain", "draw", "group")
    for index, truth in enumerate((20.0, 28.0)):
        predicted = own.predict(LAGS[:1], experiment=index)
        assert abs(predicted.mean() - np.exp(-truth / 20)) < 3 * predicted.std()
    with pytest.raises(ValueError, match="experiment must be below 2"):
        own.predict(LAGS, experiment=2)
    shared = fit([exp[0], experiment(20.0, seed=13)])
    assert abs(z_score(shared.n_int, 20.0)) < 3
    assert shared.n_int.sd < 0.9 * fit(exp[0]).n_int.sd
    assert fit(exp).status == "poor_fit"  # one n_int for what are two


def test_points_that_are_masked_are_not_fitted() -> None:
    exp = experiment(seed=14)
    keep = np.array([True, False, True, True, False])
    wrong = Experiment(exp.lags, np.where(keep, exp.values, 0.9), exp.sigma)
    masked, subset = fit(wrong, mask=keep), fit(exp[keep])
    assert masked.n_int.mean == pytest.approx(subset.n_int.mean, abs=0.2 * subset.n_int.sd)
    assert masked.n_int.sd == pytest.approx(subset.n_int.sd, rel=0.1)
    assert masked.p_value == pytest.approx(subset.p_value, abs=0.1)
    np.testing.assert_array_equal(masked.idata.observed_data["lag"], exp.lags[keep])
    held_out = masked.predict(exp.lags[~keep]).reshape(-1, 2)
    truth = np.exp(-exp.lags[~keep] / 20)
    assert (np.abs(held_out.mean(0) - truth) < 3.5 * held_out.std(0)).all()


# direct mode


@pytest.mark.usefixtures("short_chains")
def test_each_lag_of_a_direct_fit_has_its_own_n_int() -> None:
    """The renoising step is exact here: n_int of each lag is the lag itself."""
    exp = experiment(seed=15, sigma=0.01, lags=np.array([16, 20, 30]))
    result = fit(exp, moves=RENOISING, mode="direct")
    assert len(result.n_int) == 3
    for estimate, lag in zip(result.n_int, exp.lags, strict=True):
        assert abs(z_score(estimate, lag)) < 3.5
        assert estimate.sd < 0.1 * lag
    for estimate in result.timescale[:2]:
        assert abs(z_score(estimate, 20.0)) < 3.5
    predicted = result.predict([30, 16]).reshape(-1, 2)
    z = (predicted.mean(0) - np.exp([-1.5, -0.8])) / np.hypot(predicted.std(0), 0.01)
    assert np.abs(z).max() < 3.5
    with pytest.raises(ValueError, match="lags must be among those fitted"):
        result.predict([17])


def test_clock_ties_the_lags_of_a_direct_fit() -> None:
    lags = np.array([16, 20, 30, 50])
    for slope, seed in ((1.0, 16), (1.5, 17)):
        values = np.exp(-(LAG_MAX + slope * (lags - LAG_MAX)) / 20)
        noise = 0.01 * np.random.default_rng(seed).standard_normal(4)
        exp = Experiment(lags, values + noise, np.full(4, 0.01))
        result = fit(exp, moves=RENOISING, mode="direct", clock=Clock())
        kappa = draws(result, "kappa")
        assert abs(kappa.mean() - slope) < 3 * kappa.std()
        assert kappa.std() < 0.15
        n = draws(result, "n_int")
        np.testing.assert_allclose(n, LAG_MAX + kappa[:, None] * (lags - LAG_MAX), rtol=1e-6)
        assert result.status == "ok"


def test_clock_with_an_offset_and_with_an_informative_prior() -> None:
    lags = np.array([16, 20, 30, 50])
    exp = Experiment(lags, np.exp(-(lags + 4) / 20), np.full(4, 0.01))
    clock = Clock(kappa=lognorm(0.5), offset=norm(0, 10))
    result = fit(exp, mode="direct", clock=clock)
    for name, truth in (("kappa", 1.0), ("clock_offset", 4.0)):
        values = draws(result, name)
        assert abs(values.mean() - truth) < 3 * values.std()
    pulled = fit(exp, mode="direct", clock=Clock(kappa=norm(1.3, 0.001)))
    assert draws(pulled, "kappa").mean() == pytest.approx(1.3, abs=0.02)


def test_prior_of_kappa_is_its_posterior_where_data_say_nothing() -> None:
    prior = lognorm(0.4)
    result = fit(experiment(sigma=50.0, lags=[16, 30]), mode="direct", clock=Clock(prior))
    assert kstest(draws(result, "kappa"), prior.cdf).statistic < 0.02
    assert kstest(draws(result, "kappa", "prior"), prior.cdf).pvalue > 1e-3


# InferenceData


@contextlib.contextmanager
def third_party():
    """ArviZ and matplotlib announce their next versions."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")
        yield


@pytest.fixture(scope="module")
def three_kinds(plain):
    nuisance = Nuisance(scale=norm(1, 0.1))
    with pytest.MonkeyPatch.context() as patch:
        _shorten(patch)
        both = Nuisance(scale=norm(1, 0.1), offset=norm(0, 0.05))
        sampled = fit(experiment(seed=1), nuisance=both)
    return {"one": plain, "nuisance": fit(experiment(seed=1), nuisance=nuisance), "emcee": sampled}


@pytest.mark.parametrize("kind", ["one", "nuisance", "emcee"])
def test_arviz_understands_every_kind_of_fit(three_kinds, kind: str, tmp_path) -> None:
    with third_party():
        import arviz as az
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        idata = three_kinds[kind].idata
        assert set(idata.groups()) >= ALL_GROUPS
        names = [name for name in idata.posterior if name not in ("prediction",)]
        table = az.summary(idata, var_names=names)
        assert table.loc["n_int", "mean"] == pytest.approx(three_kinds[kind].n_int.mean, rel=1e-2)
        assert (table["r_hat"].dropna() < 1.06).all()
        az.plot_posterior(idata, var_names=["n_int"])
        az.plot_ppc(idata, num_pp_samples=20, random_seed=0)
        az.plot_ppc(idata, num_pp_samples=20, random_seed=0, group="prior")
        az.plot_trace(idata, var_names=["n_int"])
        az.plot_forest(idata, var_names=["prediction"], combined=True)
        plt.close("all")
        assert np.isfinite(az.loo(idata).elpd_loo)
        write_netcdf(idata, tmp_path / "posterior.nc")
        again = read_netcdf(tmp_path / "posterior.nc")
        for group in ALL_GROUPS:
            assert again[group].equals(idata[group])


def test_several_groups_and_points_are_named() -> None:
    two = Nuisance(scale=norm(1, 0.01))
    exp = [experiment(seed=1, lags=LAGS[:2]), experiment(seed=2, lags=LAGS[:2], name="x2")]
    idata = fit(exp, BOTH, shared=True, nuisance={"x": two}).idata
    assert idata.posterior_predictive["point"].values.tolist() == ["x@20", "x@40", "x2@20", "x2@40"]
    assert idata.constant_data["observable"].values.tolist() == ["x", "x", "x2", "x2"]
    assert "scale[x]" in idata.prior
    assert "scale[x2]" not in idata.posterior


def test_models_are_compared_by_what_they_predict() -> None:
    """The right step, and one whose slowest decay depends on the lag."""
    lags = STEP_LAG * np.arange(1, 7)
    exp = experiment(seed=18, lags=lags)
    squared = bi.observables.Correlation(lambda f: x(f) + 0.6 * x(f) ** 2, normalization="variance")
    right, wrong = fit(exp), fit(exp, squared)
    with third_party():
        import arviz as az

        table = az.compare({"right": right.idata, "wrong": wrong.idata})
    assert table.index[0] == "right"
    assert table.loc["wrong", "elpd_diff"] > 0


# replicas


def test_monte_carlo_share_falls_with_the_number_of_replicas() -> None:
    """share / (1 - share) goes as one over the number of replicas."""
    exp = experiment(seed=19, sigma=0.01)
    odds = []
    for n in (1024, 4096, 16384):
        share = np.mean([fit(exp, n_replicas=n, seed=s).monte_carlo_share for s in range(2)])
        odds.append(share / (1 - share))
    assert odds[0] / odds[1] == pytest.approx(4, rel=0.35)
    assert odds[1] / odds[2] == pytest.approx(4, rel=0.35)


def test_variance_shares_are_parts_of_a_whole(plain) -> None:
    shares = plain.variance_shares
    assert set(shares) == {"monte_carlo", "emulator", "discrepancy"}
    assert all(0 <= share <= 1 for share in shares.values())
    assert sum(shares.values()) < 1
    assert shares["discrepancy"] == 0
    assert shares["emulator"] < 0.01
    precise = fit(experiment(sigma=1e-4))
    assert precise.monte_carlo_share > 0.95
    assert precise.status == "mc_limited"


def test_replicas_for_a_tenth_give_a_tenth() -> None:
    exp = experiment(seed=20)
    first = fit(exp, n_replicas=1024)
    assert first.monte_carlo_share > 0.15
    again = fit(exp, n_replicas=first.replicas_for_tenth)
    assert again.monte_carlo_share == pytest.approx(0.1, rel=0.4)


def test_replicas_are_added_until_the_target_is_met_or_the_limit() -> None:
    exp = experiment(seed=21)
    result = fit(exp, n_replicas=512, target_mc_fraction=0.1)
    assert result.n_replicas > 512
    assert result.monte_carlo_share == pytest.approx(0.1, rel=0.5)
    limited = fit(exp, n_replicas=512, target_mc_fraction=0.01, max_replicas=1000)
    assert limited.n_replicas == 1000
    enough = fit(exp, n_replicas=512, target_mc_fraction=0.9)
    assert enough.n_replicas == 512
    by_default = fit(experiment(seed=21, sigma=0.1), n_replicas=None)
    assert by_default.n_replicas == 4096
    assert by_default.monte_carlo_share < 0.15


def test_cost_counts_every_rollout(monkeypatch) -> None:
    module = sys.modules["bopito_inverse.inference.prediction"]
    spent, at = [], module.Prediction.at
    monkeypatch.setattr(
        module.Prediction,
        "at",
        lambda self, n: spent.append(len(n) * self.n_replicas) or at(self, n),
    )
    result = fit(experiment(seed=22), n_replicas=1024, moves=[*RENOISING], discrepancy="auto")
    assert result.cost == pytest.approx(sum(spent) / 1024)


def test_starts_may_be_weighted() -> None:
    """Frames of a wider well, weighted to mu."""
    wide = STARTS * 1.3
    weights = norm.pdf(wide[:, 0]) / norm.pdf(wide[:, 0], scale=1.3)
    frames = bi.datasets.Frames(wide, weights=np.asarray(weights))
    step = bi.sampling.Rollout([Exact()], STEP_LAG)
    result = bi.inference.fit(MODEL, step, BOTH["x"], experiment(seed=23), frames, n_replicas=1024)
    assert abs(z_score(result.n_int, 20.0)) < 3


def test_scale_prior_may_have_an_edge() -> None:
    """Signals that can only be lost: a prior that ends where it is largest."""
    loss = Nuisance(scale=halfnorm(1.0, 0.1))
    result = fit(experiment(seed=24), nuisance=loss)
    scale = draws(result, "scale[x]")
    assert scale.min() >= 1.0
    assert np.median(scale) < 1.1
