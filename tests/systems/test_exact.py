import numpy as np
import pytest
import torch
from deeptime.data import prinz_potential
from scipy.stats import chisquare
from torch import Tensor

from bopito_inverse.models import BoPITOScore
from bopito_inverse.noise import VPSchedule
from bopito_inverse.systems import (
    DoubleWell,
    OrnsteinUhlenbeck,
    Potential1D,
    Prinz,
    TransferOperator,
)

LAMBDA_HAT = 0.994
OU = OrnsteinUhlenbeck(stiffness=2, kT=1.5, friction=0.7, steps_per_frame=20)
VARIANCE = OU.kT / OU.stiffness


@pytest.fixture(scope="module")
def prinz() -> TransferOperator:
    return TransferOperator(Prinz())


@pytest.fixture(scope="module")
def coarse() -> TransferOperator:
    return TransferOperator(Prinz(), grid_size=300)


@pytest.fixture(scope="module")
def ornstein() -> TransferOperator:
    return TransferOperator(OU)


def position(x: Tensor) -> Tensor:
    return x[:, 0]


def is_right(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).double()


def test_prinz_spectrum(prinz: TransferOperator) -> None:
    assert prinz.eigenvalues[0] == 1
    assert prinz.eigenvalues[1] == pytest.approx(0.99402, abs=5e-6)
    assert prinz.timescales[:3] == pytest.approx([166.8, 25.4, 13.0], rel=5e-3)
    assert (np.diff(prinz.eigenvalues) <= 0).all()


def test_prinz_autocorrelation(prinz: TransferOperator) -> None:
    lags = np.array([10, 25, 50, 75, 100, 200, 300, 500, 750, 1000])
    published = [0.890, 0.786, 0.665, 0.570, 0.490, 0.269, 0.148, 0.045, 0.010, 0.002]
    value = prinz.correlation(position, lags=lags, normalization="variance")
    assert np.abs(value - published).max() < 0.0015
    assert (
        np.abs(prinz.correlation(position, lags=1.1 * lags, normalization="variance")).max() < 0.9
    )


def test_double_well_timescale() -> None:
    system = DoubleWell(a=5, b=1, kT=2, friction=1000, time_step=1, steps_per_frame=1)
    assert TransferOperator(system).timescales[0] == pytest.approx(1374, rel=5e-3)


def test_ornstein_uhlenbeck_spectrum(ornstein: TransferOperator) -> None:
    k = np.arange(8)
    assert np.allclose(ornstein.eigenvalues[:8], OU.decay**k, rtol=2e-4)
    assert np.allclose(ornstein.timescales[:7], -1 / np.log(OU.decay) / k[1:], rtol=2e-4)


def test_ornstein_uhlenbeck_densities(ornstein: TransferOperator) -> None:
    x = ornstein.grid
    exact = np.exp(-(x**2) / (2 * VARIANCE)) / np.sqrt(2 * np.pi * VARIANCE)
    assert np.allclose(ornstein.stationary, exact, atol=1e-10)
    for lag in (0.5, 3, 40):
        decay = OU.decay**lag
        variance = VARIANCE * (1 - decay**2)
        density = ornstein.transition_density(lag)
        for start in (300, 500, 640):
            z = (x - decay * x[start]) / np.sqrt(variance)
            exact = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi * variance)
            assert np.abs(density[start] - exact).max() < 1e-3 * exact.max()


def test_ornstein_uhlenbeck_correlations(ornstein: TransferOperator) -> None:
    lags = np.array([0, 1, 7.5, 30])
    decay = OU.decay**lags

    def square(x: Tensor) -> Tensor:
        return x[:, 0] ** 2

    assert np.allclose(ornstein.correlation(position, lags=lags), VARIANCE * decay, rtol=1e-3)
    connected = ornstein.correlation(square, lags=lags, normalization="connected")
    assert np.allclose(connected, 2 * VARIANCE**2 * decay**2, rtol=1e-3)
    raw = ornstein.correlation(square, lags=lags)
    assert np.allclose(raw, VARIANCE**2 * (1 + 2 * decay**2), rtol=1e-3)
    variance = ornstein.correlation(square, lags=lags, normalization="variance")
    assert np.allclose(variance, decay**2, rtol=1e-3)
    c0 = ornstein.correlation(square, lags=lags, normalization="c0")
    assert np.allclose(c0, (1 + 2 * decay**2) / 3, rtol=1e-3)
    odd_even = ornstein.correlation(position, square, lags=lags)
    assert np.abs(odd_even).max() < 1e-10


def test_cross_correlation_is_a_sum_over_the_transition_matrix(coarse: TransferOperator) -> None:
    mu = coarse.stationary * coarse.spacing
    a, b = coarse.grid, (coarse.grid > 0).astype(float)
    joint = mu[:, None] * coarse.transition_density(40) * coarse.spacing
    raw = a @ joint @ b
    connected = raw - (mu @ a) * (mu @ b)
    deviations = np.sqrt((mu @ a**2 - (mu @ a) ** 2) * (mu @ b**2 - (mu @ b) ** 2))
    expected = {
        "raw": raw,
        "connected": connected,
        "variance": connected / deviations,
        "c0": raw / (mu @ (a * b)),
        "static": connected / (mu @ (a * b) - (mu @ a) * (mu @ b)),
    }
    for name, value in expected.items():
        by_function = coarse.correlation(position, is_right, 40.0, name)
        by_array = coarse.correlation(a, b, 40.0, name)
        swapped = coarse.correlation(b, a, 40.0, name)
        assert by_function == pytest.approx(value, abs=1e-10)
        assert by_array == pytest.approx(value, abs=1e-10)
        assert swapped == pytest.approx(value, abs=1e-10)  # time reversal
    assert coarse.correlation(position, is_right, np.ones((2, 3))).shape == (2, 3)


@pytest.mark.parametrize("barrier", [None, 0.0, 0.5])
def test_transition_matrix_is_a_reversible_semigroup(barrier: float | None) -> None:
    exact = TransferOperator(Prinz(), barrier=barrier, grid_size=300)
    mu = exact.stationary * exact.spacing

    def matrix(lag: float) -> np.ndarray:
        return exact.transition_density(lag) * exact.spacing

    for lag in (0.1, 5, 500):
        assert (matrix(lag) >= 0).all()
        assert np.allclose(matrix(lag).sum(axis=1), 1, atol=1e-12)
        flux = mu[:, None] * matrix(lag)
        assert np.allclose(flux, flux.T, atol=1e-12)
        assert np.allclose(mu @ matrix(lag), mu, atol=1e-12)
    inside = np.abs(exact.grid) < 1.25  # where mu is above 1e-10
    for s, t in ((1, 2), (0.5, 9.5), (40, 100)):
        assert np.abs(matrix(s) @ matrix(t) - matrix(s + t))[inside].max() < 1e-8
    assert np.abs(matrix(0) - np.eye(300))[inside].max() < 1e-8
    assert np.abs(matrix(10) @ matrix(10) - matrix(21))[inside].max() > 1e-4


@pytest.mark.parametrize("barrier", [None, 0.0])
def test_eigenfunctions(barrier: float | None) -> None:
    exact = TransferOperator(Prinz(), barrier=barrier, grid_size=300)
    mu = exact.stationary * exact.spacing
    f = exact.eigenfunctions[:, :30]
    assert np.allclose(f.T @ (mu[:, None] * f), np.eye(30), atol=1e-10)
    matrix = exact.transition_density(3) * exact.spacing
    inside = np.abs(exact.grid) < 1.25
    assert np.allclose((matrix @ f)[inside], (f * exact.eigenvalues[:30] ** 3)[inside], atol=1e-7)


def test_grid_refinement_is_of_second_order() -> None:
    sizes = np.array([126, 251, 501, 1001])
    reference = TransferOperator(Prinz(), grid_size=2001)
    coarse = [TransferOperator(Prinz(), grid_size=n) for n in sizes]
    error = np.array([abs(exact.timescales[0] - reference.timescales[0]) for exact in coarse])
    order = np.log2(error[:-1] / error[1:])
    assert np.allclose(order[:2], 2, atol=0.15)
    assert order[2] > 1.9  # the reference has an error of its own
    assert error[-1] / reference.timescales[0] < 3e-4


@pytest.mark.parametrize("barrier", [-0.3, 0.0, 0.5])
def test_barrier(prinz: TransferOperator, barrier: float) -> None:
    cut = TransferOperator(Prinz(), barrier=barrier, grid_size=500)
    assert np.allclose(cut.eigenvalues[:2], 1, atol=0)
    assert cut.eigenvalues[2] < 1 - 1e-3
    assert cut.timescales[0] == np.inf
    assert np.isfinite(cut.timescales[1:]).all()
    right = cut.grid >= barrier
    for lag in (1, 50, 1e5):
        density = cut.transition_density(lag)
        assert density[right][:, ~right].max() == 0
        assert density[~right][:, right].max() == 0
    for side in (right, ~right):
        restricted = np.where(side, cut.stationary, 0)
        restricted /= restricted.sum() * cut.spacing
        assert np.allclose(density[side], restricted, atol=1e-8)
    one_side = cut.correlation(np.where(right, 1.0, 0.0), lags=np.array([0.0, 1e6]))
    mass = cut.stationary[right].sum() * cut.spacing
    assert np.allclose(one_side, mass)
    assert prinz.correlation(is_right, lags=1e6) == pytest.approx(
        prinz.correlation(is_right, lags=0.0) ** 2
    )


def test_draws_have_the_stationary_density(prinz: TransferOperator) -> None:
    x = prinz.sample(200_000, torch.Generator().manual_seed(0))[:, 0].double().numpy()
    edges = np.quantile(x, np.linspace(0, 1, 41)[1:-1])
    cdf = np.interp(edges, prinz.grid + prinz.spacing / 2, np.cumsum(prinz.stationary))
    p = np.diff(cdf * prinz.spacing, prepend=0, append=1)
    counts = np.bincount(np.searchsorted(edges, x), minlength=40)
    assert chisquare(counts, len(x) * p).pvalue > 1e-3


def bin_probabilities(
    exact: TransferOperator, density: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    right_ends = exact.grid + exact.spacing / 2
    cdf = np.interp(edges, right_ends, np.cumsum(density) * exact.spacing)
    return np.diff(cdf, prepend=0, append=1)


@pytest.mark.parametrize("start", [-0.7, 0.02])
def test_transition_density_against_deeptime(prinz: TransferOperator, start: float) -> None:
    n, lag = 2000, 10
    x = np.full((n, 1), start)
    x = prinz_potential(n_steps=500 * lag)(x, seed=7, n_jobs=1)[:, 0]
    cell = int((start - prinz.grid[0]) / prinz.spacing)
    fraction = (start - prinz.grid[cell]) / prinz.spacing
    rows = prinz.transition_density(lag)
    density = (1 - fraction) * rows[cell] + fraction * rows[cell + 1]
    edges = np.interp(
        np.linspace(0, 1, 21)[1:-1],
        np.cumsum(density) * prinz.spacing,
        prinz.grid + prinz.spacing / 2,
    )
    counts = np.bincount(np.searchsorted(edges, x), minlength=20)
    assert chisquare(counts, n * bin_probabilities(prinz, density, edges)).pvalue > 1e-3
    other = prinz.transition_density(1.5 * lag)[cell]
    assert chisquare(counts, n * bin_probabilities(prinz, other, edges)).pvalue < 1e-3


def test_autocorrelation_against_deeptime(prinz: TransferOperator) -> None:
    n = 2000
    x_0 = prinz.sample(n, torch.Generator().manual_seed(2)).double().numpy()
    x_k = prinz_potential(n_steps=500 * 20)(x_0, seed=3, n_jobs=1)
    product = (x_0 * x_k)[:, 0]
    exact = float(prinz.correlation(position, lags=20.0))
    error = product.std() / np.sqrt(n)
    assert abs(product.mean() - exact) < 4 * error
    assert abs((x_0**2).mean() - exact) > 4 * error


def gaussian_eps(
    noise: VPSchedule, x_t: Tensor, t: Tensor, mean: Tensor | float, var: Tensor | float
) -> Tensor:
    """Noise prediction of N(mean, var): sigma (x_t - alpha mean) / (alpha^2 var + sigma^2)."""
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    return sigma * (x_t - alpha * mean) / (alpha**2 * var + sigma**2)


TIMES = (0.0, 0.05, 0.3, 0.7, 1.0)


@pytest.mark.parametrize("time", TIMES)
def test_equilibrium_score_of_a_gaussian(ornstein: TransferOperator, time: float) -> None:
    score = ornstein.equilibrium_score()
    x_t, t = torch.linspace(-3, 3, 61)[:, None], torch.tensor(time)
    exact = gaussian_eps(score.noise, x_t, t, 0.0, VARIANCE)
    torch.testing.assert_close(score(x_t, t), exact, atol=2e-3, rtol=2e-3)
    wrong = gaussian_eps(score.noise, x_t, t, 0.0, 1.1 * VARIANCE)
    assert time == 1.0 or float((score(x_t, t) - wrong).abs().max()) > 2e-3


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("lag", [1.0, 10.0, 60.0])
def test_conditional_score_of_a_gaussian(
    ornstein: TransferOperator, lag: float, time: float
) -> None:
    s_eq = ornstein.equilibrium_score(VPSchedule(3.5, -5.0))
    bopito = BoPITOScore(s_eq, ornstein.dynamic_score(s_eq, LAMBDA_HAT), LAMBDA_HAT, 60)
    x_0 = torch.linspace(-2, 2, 9)[:, None]
    decay = OU.decay**lag
    variance = VARIANCE * (1 - decay**2)
    x_t = decay * x_0 + 2 * variance**0.5 * torch.linspace(-1, 1, 9).flip(0)[:, None]
    t = torch.tensor(time)
    exact = gaussian_eps(s_eq.noise, x_t, t, decay * x_0, variance)
    eps = bopito(x_t, t, x_0, torch.tensor(lag))
    torch.testing.assert_close(eps, exact, atol=3e-3, rtol=3e-3)


def test_conditional_score_is_posterior_mean_of_the_transition_density(
    coarse: TransferOperator,
) -> None:
    """Against a direct float64 sum, at lags and times that differ within a batch."""
    s_eq = coarse.equilibrium_score()
    bopito = BoPITOScore(s_eq, coarse.dynamic_score(s_eq, LAMBDA_HAT), LAMBDA_HAT, 500)
    generator = np.random.default_rng(0)
    cells = generator.integers(20, 280, 40)
    lags = generator.choice([3.0, 50.0, 123.4], 40)
    t = torch.from_numpy(generator.uniform(0, 1, 40)).float()
    x_0 = torch.from_numpy(coarse.grid[cells]).float()[:, None]
    x_t = torch.from_numpy(generator.normal(0, 0.8, (40, 1))).float()
    alpha, sigma = s_eq.noise.alpha(t.double()).numpy(), s_eq.noise.sigma(t.double()).numpy()
    expected = []
    for i, (cell, lag) in enumerate(zip(cells, lags, strict=True)):
        p = coarse.transition_density(lag)[cell]
        likelihood = np.exp(-(((float(x_t[i]) - alpha[i] * coarse.grid) / sigma[i]) ** 2) / 2)
        mean = (p * likelihood) @ coarse.grid / (p @ likelihood)
        expected.append((float(x_t[i]) - alpha[i] * mean) / sigma[i])
    eps = bopito(x_t, t, x_0, torch.from_numpy(lags).float())[:, 0].double().numpy()
    assert np.allclose(eps, expected, atol=5e-3)
    one_by_one = [
        bopito(x_t[i : i + 1], t[i], x_0[i : i + 1], torch.tensor(float(lags[i])))
        for i in range(40)
    ]
    torch.testing.assert_close(
        torch.cat(one_by_one)[:, 0].double().numpy(), eps, atol=2e-4, rtol=1e-4
    )


def test_shapes(coarse: TransferOperator) -> None:
    s_eq = coarse.equilibrium_score()
    s_dyn = coarse.dynamic_score(s_eq, LAMBDA_HAT)
    x_t, x_0 = torch.linspace(-1, 1, 6)[:, None], torch.linspace(1, -1, 6)[:, None]
    scalar, many = torch.tensor(0.4), torch.full((6,), 0.4)
    lag, lags = torch.tensor(20.0), torch.full((6,), 20.0)
    assert s_eq.event_shape == s_dyn.event_shape == (1,)
    expected = s_dyn(x_t, scalar, x_0, lag)
    assert expected.shape == x_t.shape
    assert float(expected.abs().max()) > 0.1
    for t in (scalar, many):
        torch.testing.assert_close(s_eq(x_t, t), s_eq(x_t, scalar))
        for n in (lag, lags, torch.tensor(20)):
            torch.testing.assert_close(s_dyn(x_t, t, x_0, n), expected)


def test_score_of_starts_beyond_the_grid_is_that_of_its_end(coarse: TransferOperator) -> None:
    s_eq = coarse.equilibrium_score()
    s_dyn = coarse.dynamic_score(s_eq, LAMBDA_HAT)
    x_t, t, lag = torch.zeros(2, 1), torch.tensor(0.4), torch.tensor(20.0)
    far = s_dyn(x_t, t, torch.tensor([[-9.0], [1e6]]), lag)
    end = s_dyn(x_t, t, torch.tensor([[-1.4], [1.4]]), lag)
    torch.testing.assert_close(far, end)


@pytest.mark.parametrize("barrier", [0.0, 0.3, None])
def test_barrier_never_mixes_the_sides(barrier: float | None) -> None:
    unbiased = TransferOperator(Prinz(), grid_size=200)
    cut = TransferOperator(Prinz(), barrier=barrier, grid_size=200)
    s_eq = unbiased.equilibrium_score()
    s_dyn = cut.dynamic_score(s_eq, LAMBDA_HAT)
    middle = barrier or 0.0
    spread = torch.cat([torch.logspace(-6, 0, 60), torch.linspace(1e-4, 3 * cut.spacing, 60)])
    x_0 = torch.cat([middle - spread, middle + spread])[:, None]
    density = s_dyn._conditional(x_0, torch.tensor(50.0)).exp().double().numpy()
    right_mass = density[:, cut.grid >= middle].sum(axis=1) * cut.spacing
    started_right = x_0[:, 0].numpy() >= np.float32(middle)
    mixed = (right_mass > 1e-6) & (right_mass < 1 - 1e-6)
    if barrier is None:
        assert mixed.any()
    else:
        assert not mixed.any()
        assert np.array_equal(right_mass > 0.5, started_right)


@pytest.mark.parametrize("time", [0.0, 0.5, 1.0])
def test_scores_are_accurate_in_single_precision(prinz: TransferOperator, time: float) -> None:
    s_eq = prinz.equilibrium_score()
    t = torch.tensor(time, dtype=torch.float64)
    alpha, sigma = float(s_eq.noise.alpha(t)), float(s_eq.noise.sigma(t))
    x_t = torch.linspace(-1.3, 1.3, 101)[:, None]
    log_p = (
        np.log(prinz.stationary) - ((x_t.double().numpy() - alpha * prinz.grid) / sigma) ** 2 / 2
    )
    p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    exact = (x_t[:, 0].double().numpy() - alpha * (p @ prinz.grid) / p.sum(axis=1)) / sigma
    eps = s_eq(x_t, t.float())[:, 0].double().numpy()
    assert np.abs(eps - exact).max() < 2e-3


@pytest.mark.parametrize("time", [0.0, 0.5, 1.0])
def test_scores_far_outside_point_back(prinz: TransferOperator, time: float) -> None:
    s_eq = prinz.equilibrium_score()
    s_dyn = prinz.dynamic_score(s_eq, LAMBDA_HAT)
    x_t = torch.tensor([[-1e8], [-1e3], [-10.0], [10.0], [1e3], [1e8]])
    x_0, t, lag = torch.full_like(x_t, 0.3), torch.tensor(time), torch.tensor(20.0)
    for eps in (s_eq(x_t, t), s_eq(x_t, t) + LAMBDA_HAT**lag * s_dyn(x_t, t, x_0, lag)):
        assert bool(torch.isfinite(eps).all())
        assert torch.equal(eps.sign(), x_t.sign())
        alpha, sigma = s_eq.noise.alpha(t), s_eq.noise.sigma(t)
        data = (x_t - sigma * eps) / alpha
        assert float(data[2:4].abs().max()) < 1.4 + 1e-3


def test_a_decay_below_single_precision_leaves_equilibrium(coarse: TransferOperator) -> None:
    s_eq = coarse.equilibrium_score()
    bopito = BoPITOScore(s_eq, coarse.dynamic_score(s_eq, 0.5), 0.5, 500)
    x, t = torch.zeros(3, 1), torch.tensor(0.3)
    assert torch.equal(bopito(x, t, x, torch.tensor(400.0)), s_eq(x, t))


def test_derivative_of_the_score_in_the_lag(coarse: TransferOperator) -> None:
    s_eq = coarse.equilibrium_score()
    bopito = BoPITOScore(s_eq, coarse.dynamic_score(s_eq, LAMBDA_HAT), LAMBDA_HAT, 100)
    x_t, x_0, t = torch.tensor([[0.1], [0.6]]), torch.tensor([[-0.2], [0.5]]), torch.tensor(0.4)

    def eps(lag: Tensor) -> Tensor:
        return bopito(x_t, t, x_0, lag)

    lag = torch.tensor(20.0)
    _, tangent = torch.func.jvp(eps, (lag,), (torch.tensor(1.0),))
    difference = (eps(lag + 0.5) - eps(lag - 0.5)).detach()
    assert float(difference.abs().min()) > 1e-3
    torch.testing.assert_close(tangent, difference, rtol=0.02, atol=1e-5)
    lag.requires_grad_()
    (gradient,) = torch.autograd.grad(eps(lag).sum(), lag)
    torch.testing.assert_close(gradient, tangent.sum())


def test_memory_of_an_exact_score_is_bounded() -> None:
    exact = TransferOperator(Prinz(), grid_size=50)
    s_dyn = exact.dynamic_score(exact.equilibrium_score(), LAMBDA_HAT)
    x, t = torch.zeros(100, 1), torch.tensor(0.5)
    lags = torch.arange(1.0, 101.0)
    together = s_dyn(x, t, x, lags)
    assert len(s_dyn._known) <= 32
    alone = torch.cat([s_dyn(x[:1], t, x[:1], lag) for lag in lags])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: TransferOperator(Prinz(), barrier=2.0), "barrier must lie inside"),
        (lambda e: TransferOperator(Prinz(), barrier=float("nan")), "barrier must lie inside"),
        (lambda e: TransferOperator(Prinz(), grid_size=5), "grid_size must be"),
        (lambda e: e.transition_density(-1), "lag must be"),
        (lambda e: e.transition_density(float("inf")), "lag must be"),
        (lambda e: e.correlation(position, lags=np.array([1, -2])), "lags must be"),
        (lambda e: e.correlation(position, lags=1, normalization="x"), "normalization must be"),
        (lambda e: e.correlation(np.zeros(7)), r"a must give one value per grid point \(300\)"),
        (lambda e: e.correlation(position, np.zeros(7)), "b must give one value per grid point"),
        (lambda e: e.dynamic_score(e.equilibrium_score(), 1.0), "lambda_hat must lie in"),
    ],
)
def test_bad_input_is_refused_by_name(coarse: TransferOperator, make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(coarse)


@pytest.mark.gpu
def test_exact_scores_on_cuda(coarse: TransferOperator) -> None:
    s_eq = coarse.equilibrium_score()
    bopito = BoPITOScore(s_eq, coarse.dynamic_score(s_eq, LAMBDA_HAT), LAMBDA_HAT, 500)
    x, t, lag = torch.linspace(-1, 1, 50)[:, None], torch.tensor(0.3), torch.tensor(50.0)
    on_cpu = bopito(x, t, x.flip(0), lag)
    on_gpu = bopito.cuda()(x.cuda(), t.cuda(), x.flip(0).cuda(), lag.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-3, rtol=1e-3)


def test_bounds_far_up_the_walls_are_refused() -> None:
    system = Potential1D(lambda x: 10 * x**2, bounds=(-5, 5), name="steep")
    with pytest.raises(ValueError, match="bounds of steep span 250 kT of energy"):
        TransferOperator(system)
