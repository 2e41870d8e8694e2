import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bopito_inverse.observables import NORMALIZATIONS, Correlation

DECAY = 0.8
LAGS = torch.tensor([1, 2, 4])
MEAN = 0.7  # of x, so that raw and connected differ
SCALE = 1.3


def position(x: Tensor) -> Tensor:
    return x[..., 0]


def square(x: Tensor) -> Tensor:
    return x[..., 0] ** 2


def replicas(n: int, generator: torch.Generator, antithetic: bool = False) -> tuple[Tensor, Tensor]:
    """Stationary AR(1) replicas, x_0 `(R, 1)` and x at LAGS `(L, R, 1)`."""
    u_0 = torch.randn(n, generator=generator, dtype=torch.float64)
    noise = torch.randn(int(LAGS.max()), n, generator=generator, dtype=torch.float64)
    if antithetic:
        u_0, noise = torch.cat([u_0, u_0]), torch.cat([noise, -noise], 1)
    path = [u_0]
    for kick in noise:
        path.append(DECAY * path[-1] + math.sqrt(1 - DECAY**2) * kick)
    x = MEAN + SCALE * torch.stack(path)[..., None]
    return x[0], x[LAGS]


def exact(normalization: str, cross: bool) -> Tensor:
    """Closed forms for E over x = m + s u: autocorrelation of x, or x against x^2."""
    rho = DECAY ** LAGS.double()
    m, s = MEAN, SCALE
    if cross:  # cov(x_0, x_k^2) = 2 m s^2 rho; var x^2 = 4 m^2 s^2 + 2 s^4
        covariance, product = 2 * m * s**2 * rho, m * (m**2 + s**2)
        variance = s * math.sqrt(4 * m**2 * s**2 + 2 * s**4)
        at_zero = 2 * m * s**2 + product
    else:
        covariance, product, variance, at_zero = s**2 * rho, m**2, s**2, s**2 + m**2
    return {
        "raw": covariance + product,
        "connected": covariance,
        "variance": covariance / variance,
        "c0": (covariance + product) / at_zero,
        "static": covariance / (at_zero - product),
    }[normalization]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_value_meets_the_closed_form(normalization, cross):
    x_0, x_k = replicas(20_000, torch.Generator().manual_seed(1))
    correlation = Correlation(position, square if cross else None, normalization)
    samples = correlation.contributions(x_0, x_k)
    z = (samples.value - exact(normalization, cross)) / samples.standard_error
    assert z.abs().max() < 4
    wrong = (samples.value - exact(normalization, cross) * 1.2) / samples.standard_error
    assert wrong.abs().max() > 4  # negative control: the test has the power to fail


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_standard_error_is_the_spread_of_repeated_experiments(normalization, cross, antithetic):
    generator = torch.Generator().manual_seed(2)
    correlation = Correlation(position, square if cross else None, normalization)
    values, covariances = [], []
    for _ in range(600):
        x_0, x_k = replicas(500, generator, antithetic)
        samples = correlation.contributions(x_0, x_k, groups=2 if antithetic else 1)
        values.append(samples.value)
        covariances.append(samples.covariance)
    empirical = torch.stack(values).T.cov()
    claimed = torch.stack(covariances).mean(0)
    if normalization == "static" and antithetic and not cross:  # all noise cancels
        assert empirical.abs().max() < 1e-20
        assert claimed.abs().max() < 1e-20
        return
    ratio = claimed.diagonal().sqrt() / empirical.diagonal().sqrt()
    assert (ratio - 1).abs().max() < 0.12  # the spread itself is known to 3 %
    assert (_unit(claimed) - _unit(empirical)).abs().max() < 0.12


def _unit(covariance: Tensor) -> Tensor:
    scale = covariance.diagonal().sqrt()
    return covariance / torch.outer(scale, scale)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_weight_of_two_is_a_replica_that_is_there_twice(normalization: str):
    x_0, x_k = replicas(50, torch.Generator().manual_seed(5))
    correlation = Correlation(position, square, normalization)
    twice = torch.arange(50).repeat_interleave(torch.tensor([2, 1]).repeat(25))
    repeated = correlation.contributions(x_0[twice], x_k[:, twice])
    weights = torch.tensor([2.0, 1.0]).repeat(25)
    weighted = correlation.contributions(x_0, x_k, weights=7 * weights)
    torch.testing.assert_close(weighted.value, repeated.value)
    first = torch.searchsorted(twice, torch.arange(50))
    expected = repeated.influence[first] * (weights / 1.5)[:, None]
    torch.testing.assert_close(weighted.influence, expected)
    limit = correlation.uncorrelated(x_0, weights)
    torch.testing.assert_close(limit, correlation.uncorrelated(x_0[twice]))


def test_ignoring_antithetic_pairs_misjudges_the_error():
    x_0, x_k = replicas(2000, torch.Generator().manual_seed(3), antithetic=True)
    correlation = Correlation(position, normalization="raw")
    paired = correlation.contributions(x_0, x_k, groups=2)
    unpaired = correlation.contributions(x_0, x_k)
    torch.testing.assert_close(paired.value, unpaired.value)
    assert paired.influence.shape == (2000, 3)
    ratio = paired.standard_error / unpaired.standard_error
    assert (ratio - 1).abs().max() > 0.2


@settings(deadline=None, max_examples=50)
@given(
    normalization=st.sampled_from(NORMALIZATIONS),
    seed=st.integers(0, 2**31),
    n=st.integers(3, 40),
    shift=st.floats(-5, 5),
    scale=st.floats(0.1, 10),
)
def test_identities(normalization, seed, n, shift, scale):
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x_k = torch.randn(4, n, 1, generator=generator, dtype=torch.float64)
    x_k[0] = x_0
    samples = Correlation(position, normalization=normalization).contributions(x_0, x_k)
    size = samples.influence.abs().max() + 1
    assert samples.influence.mean(0).abs().max() < 1e-12 * size
    if normalization in ("variance", "c0", "static"):
        assert abs(samples.value[0] - 1) < 1e-12
        assert samples.influence[:, 0].abs().max() < 1e-10 * size
    if normalization == "variance":
        assert samples.value.abs().max() <= 1 + 1e-12
    shift *= normalization in ("connected", "variance", "static")
    factor = scale**2 if normalization in ("raw", "connected") else 1.0
    other = Correlation(lambda x: scale * x[..., 0] + shift, normalization=normalization)
    moved = other.contributions(x_0, x_k)
    for found, expected in (
        (moved.value, factor * samples.value),
        (moved.influence, factor * samples.influence),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(size))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_influence_is_the_derivative_with_respect_to_a_replica_weight(normalization):
    x_0, x_k = replicas(20, torch.Generator().manual_seed(4))
    samples = Correlation(position, square, normalization).contributions(x_0, x_k)

    def value(weights: Tensor) -> Tensor:
        p = (weights / weights.sum())[:, None]
        a, b, b_0 = position(x_0)[:, None], square(x_k).T, square(x_0)[:, None]
        ab, a_mean, b_mean = (p * a * b).sum(0), (p * a).sum(0), (p * b).sum(0)
        covariance = ab - a_mean * b_mean
        variances = ((p * a**2).sum(0) - a_mean**2) * ((p * b**2).sum(0) - b_mean**2)
        return {
            "raw": ab,
            "connected": covariance,
            "variance": covariance / variances.sqrt(),
            "c0": ab / (p * a * b_0).sum(0),
            "static": covariance / ((p * a * b_0).sum(0) - a_mean * (p * b_0).sum(0)),
        }[normalization]

    weights = torch.ones(20, dtype=torch.float64)
    torch.testing.assert_close(samples.value, value(weights))
    jacobian = torch.autograd.functional.jacobian(value, weights)
    torch.testing.assert_close(samples.influence, 20 * jacobian.T)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own import
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients(normalization):
    x_0, x_k = replicas(6, torch.Generator().manual_seed(5))
    correlation = Correlation(torch.sin, square, normalization)

    def outputs(x_0: Tensor, x_k: Tensor) -> tuple[Tensor, Tensor]:
        samples = correlation.contributions(x_0, x_k, groups=2)
        return samples.value, samples.influence

    inputs = (x_0.requires_grad_(), x_k.requires_grad_())
    assert torch.autograd.gradcheck(outputs, inputs, check_forward_ad=True)


def test_large_mean_does_not_cancel():
    x_0, x_k = replicas(1000, torch.Generator().manual_seed(6))
    far = Correlation(lambda x: x[..., 0] + 1e7, normalization="variance")
    near = Correlation(position, normalization="variance")
    torch.testing.assert_close(far(x_0, x_k), near(x_0, x_k), rtol=1e-6, atol=1e-6)


def test_column_of_a_one_dimensional_event_is_accepted():
    x_0, x_k = replicas(10, torch.Generator().manual_seed(7))
    torch.testing.assert_close(
        Correlation(lambda x: x)(x_0, x_k), Correlation(position)(x_0, x_k), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("function", "event"),
    [
        (lambda x: x, 2),
        (lambda x: x.sum(), 1),
        (lambda x: x[..., :1], 2),
        (lambda x: x[:-1, 0], 1),
        (lambda x: x[..., 0].numpy(), 1),
    ],
)
def test_wrong_observable_is_refused(function, event):
    x_0, x_k = torch.zeros(5, event), torch.zeros(3, 5, event)
    with pytest.raises(ValueError, match=r"^a must (map frames of shape \(5, |return a tensor)"):
        Correlation(function)(x_0, x_k)
    with pytest.raises(ValueError, match=r"^b must (map frames of shape \(5, |return a tensor)"):
        Correlation(position, function)(x_0, x_k)


@pytest.mark.parametrize("shape", [(5, 1), (3, 4, 1), (3, 5, 2), (0, 5, 1)])
def test_frames_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"x_k must have shape .*\(n_lags, 5, 1\)"):
        Correlation(position)(torch.zeros(5, 1), torch.zeros(shape))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="raw, connected, variance, c0, static, got 'pearson'"):
        Correlation(position, normalization="pearson")
    with pytest.raises(ValueError, match="b must be a function of frames, got 3"):
        Correlation(position, 3)
    with pytest.raises(ValueError, match="groups must divide the 5 replicas, got 2"):
        Correlation(position).contributions(torch.zeros(5, 1), torch.zeros(1, 5, 1), groups=2)
    with pytest.raises(ValueError, match=r"weights must have shape \(5,\), got \(4\)"):
        Correlation(position)(torch.zeros(5, 1), torch.zeros(1, 5, 1), torch.ones(4))
    one = Correlation(position).contributions(torch.zeros(2, 1), torch.zeros(1, 2, 1), groups=2)
    with pytest.raises(ValueError, match="at least 2 independent replicas, got 1"):
        _ = one.covariance


def test_names():
    assert Correlation(position).name == "position"
    assert Correlation(position, square).name == "position*square"
    assert Correlation(lambda x: x).name == "lambda"
    assert Correlation(position, name="x").name == "x"


def ar1(rng: np.random.Generator, lengths: np.ndarray) -> list[Tensor]:
    """Ornstein-Uhlenbeck trajectories `(n_frames, 1)`, sampled exactly."""
    u = rng.normal(size=(int(lengths.max()), len(lengths)))
    for t in range(1, len(u)):
        u[t] = DECAY * u[t - 1] + math.sqrt(1 - DECAY**2) * u[t]
    x = torch.from_numpy(MEAN + SCALE * u)
    return [x[: int(n), i, None] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_trajectories_meet_the_closed_form(normalization, cross):
    rng = np.random.default_rng(8)
    trajectories = ar1(rng, rng.integers(2, 400, size=400))
    correlation = Correlation(position, square if cross else None, normalization)
    value, error = correlation.from_trajectories(trajectories, LAGS)
    z = (value - exact(normalization, cross)) / error
    assert z.abs().max() < 4
    assert (error < 0.1 * value).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_jackknife_error_is_the_spread_of_repeated_experiments(normalization):
    rng = np.random.default_rng(9)
    lengths = rng.integers(20, 200, size=30)
    correlation = Correlation(position, normalization=normalization)
    runs = [correlation.from_trajectories(ar1(rng, lengths), LAGS) for _ in range(150)]
    values, errors = (torch.stack(column) for column in zip(*runs, strict=True))
    ratio = errors.square().mean(0).sqrt() / values.std(0)
    assert (ratio - 1).abs().max() < 0.2  # the spread is known to 6 %


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    normalization=st.sampled_from(["raw", "connected", "c0"]),
)
def test_trajectories_use_every_pair_once(seed, lengths, normalization):
    rng = np.random.default_rng(seed)
    trajectories = [torch.from_numpy(rng.normal(1, 1, size=(n, 1))) for n in lengths]
    lags = list(range(max(lengths)))
    correlation = Correlation(position, square, normalization)
    value, _ = correlation.from_trajectories(iter(trajectories), lags)
    for lag, found in zip(lags, value, strict=True):
        head = torch.cat([x[: max(len(x) - lag, 0)] for x in trajectories])
        tail = torch.cat([x[lag:] for x in trajectories])
        torch.testing.assert_close(found, correlation(head, tail[None])[0], rtol=1e-8, atol=1e-8)


def test_error_is_infinite_where_one_block_reaches():
    trajectories = [torch.randn(n, 1, generator=torch.Generator().manual_seed(n)) for n in (5, 9)]
    value, error = Correlation(position, normalization="raw").from_trajectories(
        trajectories, [0, 4, 5, 8]
    )
    assert value.isfinite().all()
    assert error.isfinite().tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("trajectories", "lags", "message"),
    [
        ([torch.zeros(5, 1), torch.zeros(3, 1)], [2, 5, 7], r"longest trajectory, got \[5, 7\]"),
        ([torch.zeros(5, 1)], [1.5], r"whole numbers of frames, zero or more, got \[1.5\]"),
        ([torch.zeros(5, 1)], [-1], r"zero or more, got \[-1\]"),
        ([torch.zeros(5, 1)], [], r"lags must be a list of whole numbers, got shape \(0\)"),
        ([], [1], "at least one trajectory, got none"),
        ([torch.zeros(5, 1), torch.zeros(0, 1)], [1], "trajectory 1 must hold at least one frame"),
        ([torch.tensor([[0.0], [math.nan]])], [1], "trajectory 0 .* NaN or inf, frame 1"),
    ],
)
def test_wrong_trajectories_are_refused(trajectories, lags, message):
    with pytest.raises(ValueError, match=message):
        Correlation(position).from_trajectories(trajectories, lags)


@pytest.mark.gpu
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_cuda_agrees_with_cpu(normalization):
    x_0, x_k = replicas(100, torch.Generator().manual_seed(10))
    correlation = Correlation(position, square, normalization)
    on_cpu = correlation.contributions(x_0, x_k)
    on_gpu = correlation.contributions(x_0.cuda(), x_k.cuda())
    torch.testing.assert_close(on_gpu.value.cpu(), on_cpu.value)
    torch.testing.assert_close(on_gpu.influence.cpu(), on_cpu.influence)
    trajectories = [x_k[:, i] for i in range(100)]
    value, error = correlation.from_trajectories([x.cuda() for x in trajectories], [0, 1])
    expected = correlation.from_trajectories(trajectories, [0, 1])
    torch.testing.assert_close((value.cpu(), error.cpu()), expected)


def test_weights_make_biased_starts_an_equilibrium() -> None:
    """Two states that exchange seldom, three quarters of the walkers in the one of weight 1/10."""
    rng, leave = np.random.default_rng(0), np.array([0.002, 0.018])
    starts = np.array([1, 1, 1, 0] * 400)  # equilibrium has 0.9 and 0.1
    states = [starts]
    for _ in range(150):
        jump = rng.random(len(starts)) < leave[states[-1]]
        states.append(np.where(jump, 1 - states[-1], states[-1]))
    trajectories = torch.from_numpy(np.stack(states, axis=1)[..., None].astype(np.float32))
    weights = np.where(starts == 0, 0.9 / 400, 0.1 / 1200)
    correlation, lags = Correlation(position, normalization="connected"), [0, 20, 60, 100]
    value, error = correlation.from_trajectories(trajectories, lags, weights=weights)
    truth = torch.from_numpy(0.09 * (1 - leave.sum()) ** np.array(lags))
    assert (error < 0.1 * truth[0]).all()
    assert ((value - truth).abs() < 4 * error).all()
    equal, _ = correlation.from_trajectories(trajectories, lags)
    assert ((equal - truth).abs() > 4 * error).all()
    rare = trajectories[..., 0] == 1
    by_state = torch.where(rare, 0.1, 0.9 * rare.sum(0) / (~rare).sum(0))  # at each time
    framewise, smaller = correlation.from_trajectories(trajectories, lags, weights=by_state)
    assert ((framewise - truth).abs() < 4 * smaller + 1e-12).all()
    assert (smaller[1:] < 0.8 * error[1:]).all()
    by_state[:, 120:] = 0  # a time may be left out
    earlier, _ = correlation.from_trajectories(trajectories, lags, weights=by_state)
    assert ((earlier - truth).abs() < 4 * error).all()
    for bad in (weights[:-1], np.append(weights, 1.0)):
        with pytest.raises(ValueError, match="weights must be "):
            correlation.from_trajectories(trajectories, lags, weights=bad)
    with pytest.raises(ValueError, match=r"weights\[0\] must be zero or more, one number or"):
        correlation.from_trajectories(trajectories, lags, weights=by_state[:, :-1])
