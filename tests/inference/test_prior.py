import numpy as np
import pytest
from scipy.stats import beta, kstest, lognorm, norm, uniform

from bopito_inverse.inference import Prior
from bopito_inverse.inference.emulator import Coordinate
from bopito_inverse.inference.prior import Levels

FAMILY = Coordinate(lag_max=50, lambda_hat=0.99)
FASTER = Coordinate(lag_max=50, lambda_hat=0.99, slower=False)
UNIT = (np.arange(4000) + 0.5) / 4000


def timescale(u: np.ndarray) -> np.ndarray:
    """An increasing function of u that no other part of the package knows."""
    return 30 * u + 40 * u**3


def levels(prior: Prior | None, coordinate: Coordinate = FAMILY) -> Levels:
    return Levels(prior, coordinate, timescale)


def uniform_levels(made: Levels, coordinate: Coordinate = FAMILY) -> np.ndarray:
    """Coordinate u at levels that are uniform between those of the ends of the family."""
    low, high = made.of(np.array([coordinate.low, coordinate.high]))
    return made.u(low + (high - low) * UNIT)


BROAD_AND_NARROW = [
    ("n_int", lognorm(1.5, scale=60.0), 1.0, np.inf),
    ("n_int", uniform(49.9, 0.2), 1.0, np.inf),
    ("n_int", uniform(1.0, 5000.0), 1.0, np.inf),
    ("n_int", norm(300.0, 0.5), 1.0, np.inf),
    ("weight", uniform(0, 1), 0.0, 1.0),
    ("weight", beta(2, 5), 0.0, 1.0),
    ("weight", norm(0.999, 0.01), 0.0, 1.0),
    ("timescale", lognorm(1.0, scale=50.0), 0.0, timescale(FAMILY.high)),
    ("timescale", norm(100.0, 0.5), 0.0, timescale(FAMILY.high)),
]


@pytest.mark.parametrize(("on", "distribution", "low", "high"), BROAD_AND_NARROW)
def test_levels_are_uniform_where_the_quantity_has_its_prior(on, distribution, low, high) -> None:
    u = uniform_levels(levels(Prior(distribution, on)))
    values = {"n_int": FAMILY.n_int, "weight": FAMILY.weight, "timescale": timescale}[on](u)
    first, last = distribution.cdf([low, high])

    def truncated(x: np.ndarray) -> np.ndarray:
        return np.clip((distribution.cdf(x) - first) / (last - first), 0, 1)

    assert kstest(values, truncated).statistic < 0.01


def test_default_prior_is_uniform_in_u() -> None:
    for coordinate in (FAMILY, FASTER):
        u = uniform_levels(levels(None, coordinate), coordinate)
        assert kstest(u, uniform(0, coordinate.high).cdf).statistic < 0.01


@pytest.mark.parametrize("on", ["n_int", "weight", "timescale"])
def test_levels_and_u_are_inverse(on: str) -> None:
    made = levels(Prior(lognorm(1.0, scale={"n_int": 60, "weight": 0.5, "timescale": 60}[on]), on))
    u = np.linspace(0.02, 0.98, 40)
    np.testing.assert_allclose(made.u(made.of(u)), u, atol=1e-6)
    assert (np.diff(made.of(u)) > 0).all()


def test_prior_of_the_weight_allows_nothing_slower_than_the_data() -> None:
    made = levels(Prior(uniform(0, 1), "weight"))
    assert made.of(np.array([1.0]))[0] == made.of(np.array([1.9]))[0] == 1.0


def test_family_that_ends_at_lag_max_cuts_the_prior() -> None:
    u = uniform_levels(levels(Prior(lognorm(1.0, scale=60.0)), FASTER), FASTER)
    assert (FASTER.n_int(u) >= 50).all()
    median = FASTER.n_int(u[2000])
    assert median == pytest.approx(
        lognorm(1.0, scale=60.0).isf(lognorm(1.0, scale=60.0).sf(50) / 2), rel=1e-3
    )


@pytest.mark.parametrize(
    ("on", "distribution"),
    [
        ("n_int", uniform(-100, 50)),
        ("weight", uniform(2, 1)),
        ("timescale", uniform(900, 10)),
    ],
)
def test_prior_without_mass_in_the_family_is_refused(on: str, distribution) -> None:
    with pytest.raises(ValueError, match="prior must have mass in the family of the model"):
        levels(Prior(distribution, on))


def test_prior_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="on must be one of n_int, weight, timescale, got 'rate'"):
        Prior(norm(0, 1), "rate")
    with pytest.raises(ValueError, match=r"prior must be a frozen scipy\.stats distribution"):
        Prior(0.3)


def test_density_is_that_of_the_quantity_of_the_prior() -> None:
    u = np.array([0.2, 0.6, 1.4])
    for on, value in (("n_int", FAMILY.n_int(u)), ("timescale", timescale(u))):
        made = levels(Prior(lognorm(0.7, scale=60.0), on)).log_density(u)
        np.testing.assert_allclose(made, lognorm(0.7, scale=60.0).logpdf(value), rtol=1e-5)
