"""Inputs that no fit can answer well: a refusal by name, or a status that says what to do."""

import numpy as np
import pytest
import torch
from oscillator import (
    BOTH,
    LAGS,
    MODEL,
    RENOISING,
    STEP_LAG,
    X,
    experiment,
    fit,
    x,
    z_score,
)
from scipy.linalg import expm
from scipy.stats import beta, lognorm, norm, uniform

import bopito_inverse as bi
from bopito_inverse.inference import Clock, Nuisance, Prior
from bopito_inverse.inference.status import p_value
from bopito_inverse.observables import NORMALIZATIONS, Correlation, Experiment
from bopito_inverse.sampling import Interpolate, Propagate, Rollout


def test_one_point_is_enough_for_one_n_int() -> None:
    exp = experiment(lags=[STEP_LAG], sigma=0.02, seed=1)
    result = fit(exp, n_replicas=8192)
    slope = np.exp(-1) / 20
    own = result.n_int.sd * np.sqrt(1 - result.monte_carlo_share)
    assert own == pytest.approx(0.02 / slope, rel=0.1)
    assert abs(z_score(result.n_int, -20 * np.log(exp.values[0]))) < 2
    assert result.p_value == 1
    assert result.status == "ok"


@pytest.mark.parametrize("sigma", [0.0, -0.1, np.nan, np.inf])
def test_errors_must_be_positive(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must"):
        experiment(sigma=sigma)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match="values must"):
        Experiment([20.0, 40.0], [0.4, value], [0.1, 0.1])


def test_useless_data_are_said_to_be_useless() -> None:
    result = fit(experiment(sigma=50.0))
    assert result.status == "unidentified"
    assert "the posterior is the prior" in result.status.message


@pytest.mark.parametrize(
    ("values", "codes"),
    [
        (np.full(5, -0.5), ("bound", "poor_fit")),
        (np.full(5, 1.5), ("bound", "poor_fit")),
        (np.array([0.9, -0.9, 0.9, -0.9, 0.9]), ("poor_fit",)),
    ],
)
def test_data_that_no_n_int_reaches(values: np.ndarray, codes: tuple[str, ...]) -> None:
    result = fit(Experiment(LAGS, values, np.full(5, 0.02)))
    assert result.status in codes
    assert "no n_int explains the data" in result.status.message
    assert result.p_value < 1e-6


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_observable_is_refused(normalization: str, value: float) -> None:
    constant = Correlation(lambda f: 0 * x(f) + value, normalization=normalization)
    with pytest.raises(ValueError, match="obs 'x' must vary between frames of mu"):
        fit(experiment(), constant)


def test_observable_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"obs .x. must vary .* not finite"):
        fit(experiment(), Correlation(lambda f: x(f).log(), normalization="raw"))


REFUSED = [
    ({"mode": "both"}, "mode must be one of rollout, direct"),
    ({"mask": np.zeros(5, bool)}, "mask must hold 5 booleans, at least one of them true"),
    ({"mask": [True]}, "mask must hold 5 booleans"),
    ({"mask": [1, 1, 1, 1, 0]}, "mask must hold 5 booleans"),
    ({"prior": norm(-500, 0.1)}, "prior must have mass in the family"),
    ({"prior": Prior(uniform(2, 1), "weight")}, "prior must have mass in the family"),
    ({"prior": Prior(uniform(9000, 1), "timescale")}, "prior must have mass in the family"),
    ({"prior": 3.0}, r"prior must be a frozen scipy\.stats distribution"),
    ({"n_replicas": 2}, "n_replicas must be a whole number of at least 32, got 2"),
    ({"n_replicas": None, "max_replicas": -3}, "max_replicas must be a whole number"),
    ({"seed": -1}, "seed must be a whole number of at least 0"),
    ({"target_mc_fraction": 0.0}, r"target_mc_fraction must lie in \(0, 1\), got 0.0"),
    ({"target_mc_fraction": 1.0}, r"target_mc_fraction must lie in \(0, 1\), got 1.0"),
    ({"target_mc_fraction": np.nan}, r"target_mc_fraction must lie in \(0, 1\), got nan"),
    ({"discrepancy": -1.0}, "discrepancy must be 'auto', a boolean or a number >= 0, got -1.0"),
    ({"discrepancy": np.inf}, "discrepancy must be .*, got inf"),
    ({"discrepancy": "yes"}, "discrepancy must be .*, got 'yes'"),
    ({"dof": 0.0}, "dof must be a positive number, got 0.0"),
    ({"nuisance": norm(1, 0.1)}, "nuisance must be a Nuisance or several by name"),
    ({"nuisance": {"z": Nuisance(scale=norm(1, 0.1))}}, "nuisance must map measured .*got 'z'"),
    ({"nuisance": {"x": norm(1, 0.1)}}, "nuisance must map measured observables"),
    ({"clock": Clock()}, "clock ties the lags of mode 'direct'"),
    ({"mode": "direct", "clock": 1.0}, "clock must be a Clock or None, got 1.0"),
    ({"mode": "direct", "clock": Clock(), "prior": norm(20, 1)}, "prior must be None with a clock"),
    (
        {"mode": "direct", "prior": Prior(norm(20, 1), "timescale")},
        "prior on the timescale needs lags of one step_lag",
    ),
    ({"moves": [Propagate(10)]}, "step must have a move that depends on n_int"),
    ({"moves": [Interpolate(n_int=50), Propagate(5)]}, "step must have a move that depends"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_options_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(experiment(), **options)


REFUSED_EXPERIMENTS = [
    ([], "exp must hold at least one experiment, got none"),
    (None, "exp must be an Experiment or several, got NoneType"),
    ([3.0], "exp must be an Experiment or several, got float"),
    (experiment(name="y"), r"exp holds observables \['y'\] that obs lacks"),
    (experiment(lags=[5, 10]), r"lags must be multiples of the step of 20 frames, got \[5, 10\]"),
    (experiment(lags=[20, 30]), r"lags must be multiples of the step of 20 frames, got \[30\]"),
    (Experiment([20], [0.4], [0.1], lag_unit="ps"), "lags must be in frames"),
]


@pytest.mark.parametrize(("exp", "message"), REFUSED_EXPERIMENTS)
def test_bad_experiments_are_refused_by_name(exp, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(exp, BOTH)


def test_more_refusals() -> None:
    with pytest.raises(ValueError, match=r"lags of mode 'direct' must exceed lag_max \(15\)"):
        fit(experiment(lags=[10, 20]), mode="direct")
    with pytest.raises(ValueError, match="lags must be in frames, got ps"):
        fit(Experiment([20], [0.4], [0.1], lag_unit="ps"), mode="direct")
    with pytest.raises(ValueError, match="shared must be true in mode 'direct'"):
        fit([experiment(), experiment()], mode="direct", shared=False)
    with pytest.raises(ValueError, match="dof is for experiments with independent errors"):
        fit(experiment(covariance=4e-4 * (0.5 + 0.5 * np.eye(5))), dof=3.0)
    with pytest.raises(ValueError, match=r"obs\['x'\] must be a Correlation, got function"):
        fit(experiment(), {"x": x})
    with pytest.raises(ValueError, match="exp must hold one observable for one obs"):
        fit([experiment(), experiment(name="x2")])
    with pytest.raises(ValueError, match="kappa must have a prior of positive numbers"):
        Clock(kappa=norm(1, 0.5))
    with pytest.raises(ValueError, match=r"offset must be a frozen scipy\.stats distribution"):
        Clock(offset=3.0)


def test_few_replicas_are_called_few() -> None:
    result = fit(experiment(seed=2), n_replicas=32)
    assert result.status == "mc_limited"
    assert abs(z_score(result.n_int, 20.0)) < 3


def test_clock_is_no_bound_where_only_the_longest_lags_have_relaxed() -> None:
    tied = fit(experiment(seed=3), moves=RENOISING, mode="direct", clock=Clock())
    assert tied.status == "ok"
    relaxed = Experiment(LAGS, np.zeros(5), np.full(5, 0.02))
    bound = fit(relaxed, moves=RENOISING, mode="direct", clock=Clock(lognorm(2.0)))
    assert bound.status == "bound"


@pytest.mark.parametrize("prior", [Prior(norm(60.0, 1.0)), Prior(beta(2, 50), "weight")])
def test_prior_against_the_data_is_seen(prior: Prior) -> None:
    assert fit(experiment(sigma=0.005), prior=prior, n_replicas=4096).status == "poor_fit"


def test_p_value_of_gaussian_and_of_student_t_residuals() -> None:
    """Uniform where the errors are what they are said to be."""
    rng = np.random.default_rng(4)
    root = np.array([[0.1, 0, 0], [0.05, 0.2, 0], [0.1, -0.1, 0.3]])
    covariance = root @ root.T
    normal = [p_value(root @ rng.standard_normal(3), covariance, 0) for _ in range(1000)]
    diagonal = np.diag([0.1, 0.2, 0.3]) ** 2
    scale = np.sqrt(np.diag(diagonal))
    heavy = [p_value(scale * rng.standard_t(2.0, 3), diagonal, 0, 2.0) for _ in range(1000)]
    wrong = [p_value(scale * rng.standard_t(2.0, 3), diagonal, 0) for _ in range(1000)]
    for p in (normal, heavy):
        assert np.mean(p) == pytest.approx(0.5, abs=4 / np.sqrt(12 * 1000))
        assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=4 * np.sqrt(0.05 / 1000))
    assert np.mean(np.array(wrong) < 0.05) > 0.2
    assert p_value(np.array([100.0]), np.eye(1), 1) == 1


# a system with two slow processes, and one n_int


class Jumps:
    """Jumps between three wells at -1, 0 and 1, exact over n_int frames of the model's clock."""

    needs_n_int, share = True, 1.0

    def __init__(self, left: float, right: float) -> None:
        self.rates = np.array([[-left, left, 0], [left, -left - right, right], [0, right, -right]])

    def config(self) -> dict:
        return {"move": "jumps", "rates": self.rates.tolist()}

    def __call__(self, model, y, n_int, solver, normal):
        wells = (y[:, 0] * model.scaling.scale).round().long().clamp(-1, 1) + 1
        after, which = n_int.to(y).clamp(max=1e6).expand(len(y)).unique(return_inverse=True)
        p = torch.matrix_exp(torch.as_tensor(self.rates) * after.double()[:, None, None])
        levels = torch.special.ndtr(normal(y)[:, 0].double())
        reached = (levels[:, None] > p[which, wells].cumsum(1)[:, :2]).sum(1) - 1
        return reached.to(y)[:, None] / model.scaling.scale

    def correlation(self, lags: np.ndarray) -> np.ndarray:
        """Of the well, normalised by its variance; all wells are equally likely."""
        x_0 = np.array([-1.0, 0.0, 1.0])
        return np.array([x_0 @ expm(self.rates * lag) @ x_0 for lag in lags]) / 2


def test_one_n_int_for_two_slow_processes_is_called_a_poor_fit() -> None:
    """Twice as fast as the data in all, or in one of the two processes by more."""
    lags = STEP_LAG * np.arange(1, 9)
    values = Jumps(0.02, 0.005).correlation(lags)
    values = values + 0.003 * np.random.default_rng(6).standard_normal(8)
    exp = Experiment(lags, values, np.full(8, 0.003))
    starts = torch.arange(-1.0, 2.0).repeat(1000)[:, None]
    results = {}
    for name, moves in (("right", Jumps(0.04, 0.01)), ("wrong", Jumps(0.02, 0.04))):
        step = Rollout([moves], STEP_LAG)
        results[name] = bi.inference.fit(
            MODEL, step, X, exp, starts, n_replicas=65536, discrepancy=False
        )
    assert results["right"].status != "poor_fit"
    assert results["right"].p_value > 0.01
    assert abs(z_score(results["right"].n_int, STEP_LAG / 2)) < 3
    assert results["wrong"].status == "poor_fit"
    assert "use another composite step" in results["wrong"].status.message
