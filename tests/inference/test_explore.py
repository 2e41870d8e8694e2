import arviz
import numpy as np
import pytest
from scipy.integrate import dblquad, quad
from scipy.stats import norm

from bopito_inverse.inference import explore as module
from bopito_inverse.inference.explore import CHAINS, DRAWS, explore


def explored(log_density, low, high, seed: int = 0):
    """By a density of one point (D,), as a function of its coordinates."""
    low, high = np.atleast_1d(np.asarray(low, float)), np.atleast_1d(np.asarray(high, float))
    return explore(lambda x: log_density(*x.T), low, high, np.random.default_rng(seed))


def skewed(x, centre: float, width: float):
    """Log density that is not Gaussian: Gumbel's."""
    z = (x - centre) / width
    return -z - np.exp(np.minimum(-z, 700.0))


def moments_1d(centre: float, width: float) -> tuple[float, float]:
    """Mean and standard deviation in [0, 1], in units of the width about the centre."""
    low, high = max(-centre / width, -6.0), min((1 - centre) / width, 25.0)

    def moment(k: int) -> float:
        return quad(lambda z: z**k * np.exp(skewed(z, 0.0, 1.0)), low, high, epsabs=0)[0]

    mean = moment(1) / moment(0)
    return mean, np.sqrt(moment(2) / moment(0) - mean**2)


@pytest.mark.parametrize(
    ("centre", "width"),
    [
        (0.5, 0.3),
        (0.3, 0.02),
        (0.3, 1e-5),
        (0.70001, 1e-9),
        (1.0, 0.05),
        (0.0, 1e-4),
        (-0.02, 0.03),
    ],
)
def test_quadrature_in_one_dimension(centre: float, width: float) -> None:
    """Wide, narrow, far narrower than a cell, at an edge, and with the peak outside."""

    def log_density(x):
        return skewed(x, centre, width)

    made = explored(log_density, 0.0, 1.0)
    mean, sd = moments_1d(centre, width)
    z = (made.levels[:, 0] - centre) / width
    assert made.weights.sum() == pytest.approx(1.0)
    assert abs(made.weights @ z - mean) < 0.002 * sd
    assert np.sqrt(made.variance(z)) == pytest.approx(sd, rel=0.005)
    assert made.draws.shape == (CHAINS, DRAWS, 1)
    drawn = (made.draws - centre) / width
    assert abs(drawn.mean() - mean) < 0.02 * sd
    assert drawn.std() == pytest.approx(sd, rel=0.02)


def banana(x, y):
    return -0.5 * ((x - 0.4) / 0.15) ** 2 - 0.5 * ((y - 0.2 - (x - 0.2) ** 2) / 0.05) ** 2


def test_quadrature_in_two_dimensions_of_a_banana() -> None:
    made = explored(banana, [0, 0], [1, 1])
    moments = [
        dblquad(lambda y, x, i=i, j=j: x**i * y**j * np.exp(banana(x, y)), 0, 1, 0, 1)[0]
        for i, j in ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1))
    ]
    _, x, y, xx, yy, xy = np.array(moments) / moments[0]
    expected = np.array([[xx - x * x, xy - x * y], [xy - x * y, yy - y * y]])
    sd = np.sqrt(np.diag(expected))
    assert np.abs((made.weights @ made.levels - [x, y]) / sd).max() < 0.005
    centred = made.levels - made.weights @ made.levels
    covariance = (made.weights[:, None] * centred).T @ centred
    assert np.abs((covariance - expected) / np.outer(sd, sd)).max() < 0.01
    drawn = made.draws.reshape(-1, 2)
    assert np.abs((np.cov(drawn.T) - expected) / np.outer(sd, sd)).max() < 0.1


@pytest.mark.parametrize("width", [0.1, 1e-3, 1e-6])
@pytest.mark.parametrize("rho", [0.0, -0.9, 0.99])
def test_quadrature_of_a_correlated_gaussian_of_any_width(width: float, rho: float) -> None:
    centre, sd = np.array([0.4123456, 0.6]), np.array([width, 0.5 * width])

    def log_density(x, y):
        a, b = (x - centre[0]) / sd[0], (y - centre[1]) / sd[1]
        return -0.5 * (a**2 - 2 * rho * a * b + b**2) / (1 - rho**2)

    made = explored(log_density, [0, 0], [1, 1])
    mean = made.weights @ made.levels
    assert np.abs((mean - centre) / sd).max() < 0.02
    z = (made.levels - mean) / sd
    assert np.sqrt(made.weights @ z**2) == pytest.approx([1, 1], rel=0.02)
    assert made.weights @ z.prod(1) == pytest.approx(rho, abs=0.02)


def test_quadrature_at_an_edge_in_two_dimensions() -> None:
    made = explored(lambda x, y: -x / 0.003 - 0.5 * ((y - 1) / 0.1) ** 2, [0, 0], [1, 1])
    mean = made.weights @ made.levels
    assert mean[0] == pytest.approx(0.003, rel=0.01)
    assert mean[1] == pytest.approx(1 - 0.1 * np.sqrt(2 / np.pi), abs=0.001)
    assert (made.draws >= 0).all()
    assert (made.draws <= 1).all()


def test_points_without_a_density_do_not_count() -> None:
    made = explored(lambda x: np.where(x < 0.5, np.nan, -x), 0.0, 1.0)
    assert (made.levels[made.weights > 0] >= 0.5).all()


def test_variance_under_another_density() -> None:
    """A Gaussian times a Gaussian."""
    made = explored(lambda x: norm.logpdf(x, 0.5, 0.1), 0.0, 1.0)
    x = made.levels[:, 0]
    ratio = -0.5 * ((x - 0.5) / 0.1) ** 2
    assert made.variance(x, ratio) == pytest.approx(0.1**2 / 2, rel=1e-3)


def check_draws(draws: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Four chains that agree, with the right moments within their own error."""
    posterior = arviz.convert_to_dataset({"x": draws})
    assert draws.shape[:2] == (CHAINS, DRAWS)
    assert arviz.rhat(posterior)["x"].max() < 1.05
    sd = np.sqrt(np.diag(covariance))
    flat = draws.reshape(-1, draws.shape[2])
    assert np.abs((flat.mean(0) - mean) / sd).max() < 0.12
    assert np.abs((np.cov(flat.T) - covariance) / np.outer(sd, sd)).max() < 0.2


@pytest.fixture
def short(monkeypatch) -> None:
    monkeypatch.setattr(module, "STEPS", 500)
    monkeypatch.setattr(module, "BURN_IN", 300)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("width", [0.05, 1e-6])
def test_ensembles_find_a_correlated_gaussian(width: float) -> None:
    mean = np.array([0.3, 0.6123, 0.5, 0.8])
    root = width * np.tril(np.random.default_rng(3).normal(size=(4, 4)) / 2 + np.eye(4))
    precision = np.linalg.inv(root @ root.T)

    def log_density(*x):
        z = np.stack(x, axis=1) - mean
        return -0.5 * np.einsum("bi,ij,bj->b", z, precision, z)

    made = explored(log_density, np.zeros(4), np.ones(4))
    check_draws(made.draws, mean, root @ root.T)
    assert made.weights == pytest.approx(1 / (CHAINS * DRAWS))
    np.testing.assert_allclose(made.log_density, log_density(*made.levels.T), rtol=1e-9)


@pytest.mark.usefixtures("short")
def test_ensembles_find_a_banana_at_an_edge() -> None:
    """A banana in two dimensions and a half Gaussian in the third."""

    def log_density(x, y, z):
        return banana(x, y) - 0.5 * (z / 0.1) ** 2

    made = explored(log_density, np.zeros(3), np.ones(3))
    flat = explored(banana, [0, 0], [1, 1])
    mean = flat.weights @ flat.levels
    covariance = np.zeros((3, 3))
    centred = flat.levels - mean
    covariance[:2, :2] = (flat.weights[:, None] * centred).T @ centred
    covariance[2, 2] = 0.1**2 * (1 - 2 / np.pi)
    check_draws(made.draws, np.r_[mean, 0.1 * np.sqrt(2 / np.pi)], covariance)
