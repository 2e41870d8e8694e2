import itertools

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from scipy.stats import t as student_t

from bopito_inverse.inference.emulator import Emulated
from bopito_inverse.inference.likelihood import Likelihood, Nuisance, Parameters, Points, gaussian

SLOPES = np.array([1.0, 0.7, 0.3, -0.4, 0.2])  # of the five outputs of the model
ROOT = np.random.default_rng(1).normal(size=(5, 5)) / 20
MONTE_CARLO = ROOT @ ROOT.T
ERROR = 0.01 * np.arange(1, 6)


def emulator(u: np.ndarray, columns: np.ndarray) -> Emulated:
    """Outputs that are linear in u."""
    covariance = np.broadcast_to(
        MONTE_CARLO[np.ix_(columns, columns)], (*u.shape, len(columns))
    ) * (1 + u[:, :, None] * u[:, None])
    return Emulated(u * SLOPES[columns], covariance, ERROR[columns] * u)


def discrepancy(u: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return 0.05 * (1 - u) * SLOPES[columns]


def points(covariance: np.ndarray) -> Points:
    n = len(covariance)
    values = np.array([0.8, 0.3, 0.35])[:n]
    return Points(values, covariance, np.arange(1.0, n + 1), np.zeros(n, int), *columns(n))


def columns(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array([0, 2, 1])[:n], np.array([0, 1, 0])[:n]


def correlated(n: int = 3) -> np.ndarray:
    sigma = np.array([0.05, 0.1, 0.08])[:n]
    return np.outer(sigma, sigma) * (0.4 + 0.6 * np.eye(n))


def parameters(n: int = 3, b: int = 4, seed: int = 2) -> Parameters:
    rng = np.random.default_rng(seed)
    return Parameters(
        rng.uniform(0.3, 0.9, (b, 2)),
        rng.uniform(0.8, 1.2, (b, n)),
        rng.uniform(-0.1, 0.1, (b, n)),
        rng.uniform(0.5, 2.0, (b, n)),
    )


def by_hand(p: Parameters, i: int, s: np.ndarray, mc_scale: float = 1.0):
    """Mean of the data, covariance of the model and of the noise for draw i, from the equation."""
    column, group = columns(len(s))
    u = p.u[i, group]
    delta, d = ERROR[column] * u, 0.05 * (1 - u) * SLOPES[column]
    c = mc_scale * MONTE_CARLO[np.ix_(column, column)] * (1 + np.outer(u, u))
    a = np.diag(p.scale[i])
    model = a @ (c + np.outer(delta, delta) + np.outer(d, d)) @ a
    stretch = np.diag(p.sigma_scale[i])
    return a @ (u * SLOPES[column]) + p.offset[i], model, stretch @ s @ stretch


@pytest.mark.parametrize("mc_scale", [1.0, 0.25])
def test_gaussian_density_is_that_of_scipy(mc_scale: float) -> None:
    s, p = correlated(), parameters()
    made = Likelihood(points(s), emulator, discrepancy, mc_scale=mc_scale)(p)
    for i in range(4):
        mean, model, noise = by_hand(p, i, s, mc_scale)
        expected = multivariate_normal(mean, model + noise).logpdf(points(s).values)
        assert made[i] == pytest.approx(expected, rel=1e-10)


def test_each_source_of_error_can_be_left_out() -> None:
    s, p = correlated(), parameters()
    made = Likelihood(points(s), emulator, None, mc_scale=0.0, with_error=False)(p)
    for i in range(4):
        mean, _, noise = by_hand(p, i, s)
        assert made[i] == pytest.approx(multivariate_normal(mean, noise).logpdf(points(s).values))


def test_pointwise_density_is_that_given_all_other_points() -> None:
    s, p = correlated(), parameters()
    made = Likelihood(points(s), emulator, discrepancy).pointwise(p)
    values = points(s).values
    for i, j in itertools.product(range(4), range(3)):
        mean, model, noise = by_hand(p, i, s)
        total, other = model + noise, np.arange(3) != j
        gain = np.linalg.solve(total[np.ix_(other, other)], total[other, j])
        centre = mean[j] + gain @ (values - mean)[other]
        spread = np.sqrt(total[j, j] - gain @ total[other, j])
        assert made[i, j] == pytest.approx(norm.logpdf(values[j], centre, spread), rel=1e-9)


def test_student_t_with_many_degrees_of_freedom_is_gaussian() -> None:
    s, p = np.diag([0.05, 0.1, 0.08]) ** 2, parameters(b=50)
    gaussian_one = Likelihood(points(s), emulator, discrepancy)(p)
    limit = Likelihood(points(s), emulator, discrepancy, dof=1e7)(p)
    np.testing.assert_allclose(limit, gaussian_one, atol=1e-3)


def test_student_t_density_where_the_model_has_no_error() -> None:
    s, p = np.diag([0.05, 0.1, 0.08]) ** 2, parameters()
    made = Likelihood(points(s), emulator, mc_scale=0.0, with_error=False, dof=2.5)(p)
    for i in range(4):
        mean, _, noise = by_hand(p, i, s)
        scale = np.sqrt(np.diag(noise))
        expected = student_t(2.5, mean, scale).logpdf(points(s).values).sum()
        assert made[i] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dof", [1.5, 4.0])
def test_student_t_density_of_three_points_is_the_average_over_errors(dof: float) -> None:
    s, p = np.diag([0.1, 0.2, 0.16]) ** 2, parameters()
    made = Likelihood(points(s), emulator, discrepancy, dof=dof)
    rng = np.random.default_rng(0)
    values = made(p)
    for i in range(4):
        mean, model, noise = by_hand(p, i, s)
        e = rng.multivariate_normal(mean, model, 200_000)
        scale = np.sqrt(np.diag(noise))
        log = student_t.logpdf(points(s).values, dof, e, scale).sum(1)
        assert values[i] == pytest.approx(logsumexp(log) - np.log(len(e)), abs=0.03)


@pytest.mark.parametrize("dof", [1.5, 3.0, 10.0])
def test_student_t_density_of_one_point_is_the_convolution(dof: float) -> None:
    s, p = np.array([[0.05**2]]), parameters(1, b=6)
    likelihood = Likelihood(points(s), emulator, discrepancy, dof=dof)
    made, pointwise = likelihood(p), likelihood.pointwise(p)
    for i in range(6):
        mean, model, noise = by_hand(p, i, s)
        e = np.linspace(-8, 8, 20001) * np.sqrt(model[0, 0])
        scale = np.sqrt(noise[0, 0])
        residual = points(s).values[0] - mean[0] - e
        density = student_t.pdf(residual / scale, dof) / scale * norm.pdf(e, 0, np.sqrt(model[0]))
        assert made[i] == pytest.approx(np.log(np.trapezoid(density, e)), abs=0.15)
        assert pointwise[i, 0] == pytest.approx(made[i])


def conditional(p: Parameters, s: np.ndarray, u: np.ndarray, column: np.ndarray):
    """Mean and covariance of outputs given the data, in closed form, for the first draw."""
    measured, group = columns(len(s))
    every, at = np.r_[measured, column], np.r_[p.u[0, group], u]
    c = MONTE_CARLO[np.ix_(every, every)] * (1 + np.outer(at, at))
    for direction in (ERROR[every] * at, 0.05 * (1 - at) * SLOPES[every]):
        c = c + np.outer(direction, direction)
    n = len(s)
    a = np.diag(p.scale[0])
    stretch = np.diag(p.sigma_scale[0])
    total = a @ c[:n, :n] @ a + stretch @ s @ stretch
    gain = c[n:, :n] @ a @ np.linalg.inv(total)
    residual = points(s).values - p.scale[0] * SLOPES[measured] * p.u[0, group] - p.offset[0]
    return u * SLOPES[column] + gain @ residual, c[n:, n:] - gain @ a @ c[:n, n:]


def test_draws_of_true_outputs_are_those_given_the_data() -> None:
    s, one, n = correlated(), parameters(b=1), 20_000
    p = Parameters(*(np.repeat(x, n, axis=0) for x in vars(one).values()))
    column, u = np.array([0, 3, 4]), np.array([one.u[0, 0], 0.5, 0.7])
    drawn = Likelihood(points(s), emulator, discrepancy).draw(
        p, np.repeat(u[None], n, axis=0), column, np.random.default_rng(5)
    )
    mean, covariance = conditional(one, s, u, column)
    spread = np.sqrt(np.diag(covariance))
    assert np.abs((drawn.mean(0) - mean) / spread).max() < 4 / np.sqrt(n)
    relative = (np.cov(drawn.T) - covariance) / np.outer(spread, spread)
    assert np.abs(relative).max() < 4 * np.sqrt(2 / n)
    prior = MONTE_CARLO[0, 0] * (1 + u[0] ** 2) + (0.05 * (1 - u[0])) ** 2
    assert covariance[0, 0] < 0.8 * prior  # the data say something


@pytest.mark.parametrize("sigma", [1e-2, 1e-5, 1e-8])
def test_draws_where_the_data_leave_nothing_open(sigma: float) -> None:
    """The same outputs again, measured precisely: what was measured, within its error."""
    s, p = sigma**2 * np.eye(3), parameters(b=300)
    plain = Parameters(p.u, np.ones((300, 3)), np.zeros((300, 3)), np.ones((300, 3)))
    column, group = columns(3)
    likelihood = Likelihood(points(s), emulator, discrepancy)
    drawn = likelihood.draw(plain, p.u[:, group], column, np.random.default_rng(5))
    difference = drawn - points(s).values
    if sigma < 1e-3:
        assert np.abs(difference).max() < 6 * sigma + 1e-5
    assert np.isfinite(drawn).all()


def test_draws_of_a_singular_covariance() -> None:
    direction = np.array([1.0, -2.0, 0.5])
    covariance = np.repeat(np.outer(direction, direction)[None], 4000, axis=0)
    drawn = gaussian(covariance, np.random.default_rng(0))
    along = drawn[:, 0]
    np.testing.assert_allclose(drawn, along[:, None] * direction, atol=2e-3)
    assert along.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * 4000))
    assert not gaussian(np.zeros((1, 2, 2)), np.random.default_rng(0)).round(9).any()


def test_points_that_are_kept_keep_their_covariance() -> None:
    kept = points(correlated())[np.array([True, False, True])]
    np.testing.assert_array_equal(kept.covariance, correlated()[np.ix_([0, 2], [0, 2])])
    np.testing.assert_array_equal(kept.columns, [0, 1])
    assert len(kept) == 2


def test_priors_of_nuisance_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match=r"scale must be a frozen scipy\.stats distribution"):
        Nuisance(scale=1.0)
    with pytest.raises(ValueError, match="sigma_scale must have a prior of positive numbers"):
        Nuisance(sigma_scale=norm(1, 0.1))
    assert list(Nuisance(offset=norm(0, 0.1)).priors()) == ["offset"]
