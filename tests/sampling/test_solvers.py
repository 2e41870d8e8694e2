import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from torch import Tensor

from bopito_inverse import Interpolator
from bopito_inverse.models import BoPITOScore, DynamicScore, EquilibriumScore
from bopito_inverse.noise import VPSchedule, per_replica
from bopito_inverse.sampling import (
    Ancestral,
    DPMSolver,
    Heun,
    Interpolate,
    Propagate,
    Renoise,
    Rollout,
)
from bopito_inverse.sampling.rollout import Move
from bopito_inverse.sampling.solvers import BoundScore, Solver, standard_normal_quantiles
from bopito_inverse.systems import Prinz, TransferOperator

LAMBDA_HAT = 0.994
NOISE = VPSchedule()
MEAN, STD = 0.4, 0.3


def gaussian_eps(x_t: Tensor, t: Tensor) -> Tensor:
    """Noise prediction of N(MEAN, STD^2)."""
    t = per_replica(t, x_t)
    alpha, sigma = NOISE.alpha(t), NOISE.sigma(t)
    return sigma * (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def gaussian_data(x_t: Tensor, t: Tensor) -> Tensor:
    """Data prediction of N(MEAN, STD^2)."""
    return (x_t - NOISE.sigma(t) * gaussian_eps(x_t, t)) / NOISE.alpha(t)


def gaussian_flow(x_1: Tensor) -> Tensor:
    """Where the probability flow takes x_1 + alpha D(x_1), then the data prediction at t = 0."""
    one = torch.ones((), dtype=x_1.dtype)
    return flow_from(x_1 + NOISE.alpha(one) * gaussian_data(x_1, one), one)


def flow_from(x_t: Tensor, t: Tensor) -> Tensor:
    """Where the probability flow takes x_t from t, then the data prediction at t = 0."""
    zero = torch.zeros((), dtype=x_t.dtype)
    shrink = gaussian_spread(zero) / gaussian_spread(t)
    return gaussian_data(NOISE.alpha(zero) * MEAN + shrink * (x_t - NOISE.alpha(t) * MEAN), zero)


def gaussian_spread(t: Tensor) -> Tensor:
    """Standard deviation of N(MEAN, STD^2) noised to t."""
    return (NOISE.alpha(t) ** 2 * STD**2 + NOISE.sigma(t) ** 2).sqrt()


def no_draw(like: Tensor) -> Tensor:
    raise AssertionError("a deterministic solver drew noise")


def from_generator(seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


@pytest.fixture(scope="module")
def prinz() -> TransferOperator:
    return TransferOperator(Prinz())


@pytest.mark.parametrize("x_0", [-0.7, 0.02, 0.75])
@pytest.mark.parametrize("lag", [10.0, 100.0, 500.0])
def test_twenty_evaluations_reach_the_transition_density(
    prinz: TransferOperator, lag: float, x_0: float
) -> None:
    """Kolmogorov-Smirnov distance at midpoint quantiles of the noise: no Monte Carlo error."""
    n = 500
    s_eq = prinz.equilibrium_score()
    bopito = BoPITOScore(s_eq, prinz.dynamic_score(s_eq, LAMBDA_HAT), LAMBDA_HAT, 1000)
    start, z = torch.full((n, 1), x_0), standard_normal_quantiles(n)
    cell = int((x_0 - prinz.grid[0]) / prinz.spacing)
    fraction = (x_0 - prinz.grid[cell]) / prinz.spacing
    rows = prinz.transition_density(lag)
    density = (1 - fraction) * rows[cell] + fraction * rows[cell + 1]
    cdf = np.cumsum(density) * prinz.spacing

    def distance(solver: Solver) -> float:
        assert solver.evaluations <= 20
        x = solver(bopito.bind(start, torch.tensor(lag)), s_eq.noise, z, no_draw)[:, 0]
        level = np.interp(x.sort().values.numpy(), prinz.grid + prinz.spacing / 2, cdf)
        return float(np.abs(level - (np.arange(n) + 0.5) / n).max())

    assert distance(DPMSolver()) <= 0.01
    assert distance(DPMSolver(evaluations=5, order=1)) > 0.01


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda steps: DPMSolver(steps + 1, order=1), 1),
        (lambda steps: DPMSolver(steps + 1, order=2), 2),
        (lambda steps: Heun(2 * steps + 1), 2),
    ],
    ids=["DPMSolver 1", "DPMSolver 2", "Heun"],
)
def test_order_of_convergence(make: Callable[[int], Solver], order: int) -> None:
    assert np.allclose(slopes(make, (40, 80, 160)), order, atol=0.05)


def test_third_order_of_convergence() -> None:
    """Its slope is above three at first, because an error of fourth order is large."""
    found = slopes(lambda steps: DPMSolver(steps + 1, order=3), (160, 320, 640))
    assert (found > 2.9).all()
    assert (found < 4).all()


def slopes(make: Callable[[int], Solver], steps: tuple[int, ...]) -> np.ndarray:
    """Slopes of log error against log steps, for noise x_1 in [-2, 2]."""
    x_1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    solutions = [make(n)(gaussian_eps, NOISE, x_1, no_draw) for n in steps]
    error = [float((x - gaussian_flow(x_1)).abs().max()) for x in solutions]
    return -np.diff(np.log(error)) / np.diff(np.log(steps))


def test_noise_becomes_the_density() -> None:
    """The map from noise to frames is that of the quantiles of N(MEAN, STD^2)."""
    x_1 = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    made = DPMSolver(200)(gaussian_eps, NOISE, x_1, no_draw)
    assert float((made - (MEAN + STD * x_1)).abs().max()) < 3e-3


def test_higher_orders_are_more_accurate_at_twenty_evaluations() -> None:
    x_1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    error = [
        float(
            (DPMSolver(20, k)(gaussian_eps, NOISE, x_1, no_draw) - gaussian_flow(x_1)).abs().max()
        )
        for k in (1, 2, 3)
    ]
    assert error[0] > 4 * error[1] > 16 * error[2]
    assert error[2] < 2e-3


def test_two_steps_of_order_one_by_hand() -> None:
    """DDIM: x_s = alpha_s D + sigma_s (x_t - alpha_t D) / sigma_t."""
    x_1 = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    one, half, zero = (torch.tensor(t, dtype=torch.float64) for t in (1, 0.5, 0))
    data = gaussian_data(x_1, one)
    x = x_1 + NOISE.alpha(one) * data
    for t, s in ((one, half), (half, zero)):
        eps = (x - NOISE.alpha(t) * data) / NOISE.sigma(t)
        x = NOISE.alpha(s) * data + NOISE.sigma(s) * eps
        data = gaussian_data(x, s)
    made = DPMSolver(3, order=1)(gaussian_eps, NOISE, x_1, no_draw)
    torch.testing.assert_close(made, data)


@pytest.mark.parametrize("solver", [DPMSolver(), DPMSolver(200, 1), Heun()], ids=repr)
def test_a_signal_starts_the_flow_where_it_belongs(solver: Solver) -> None:
    """One signal for each replica, against the closed form."""
    w = torch.tensor([0.0, 0.05, 0.3, 0.8, 0.99, 0.9995, 1.0], dtype=torch.float64)
    x_t = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    made = solver(gaussian_eps, NOISE, x_t, no_draw, w)
    torch.testing.assert_close(made[:1], gaussian_flow(x_t[:1]), atol=5e-3, rtol=0)
    torch.testing.assert_close(made[:1], solver(gaussian_eps, NOISE, x_t[:1], no_draw))
    exact = flow_from(x_t[1:-1], NOISE.time(w[1:-1])[:, None])
    torch.testing.assert_close(made[1:-1], exact, atol=5e-3, rtol=0)
    torch.testing.assert_close(made[-1], x_t[-1], atol=2e-2, rtol=0)  # close to the identity
    others = flow_from(x_t[1:-1], NOISE.time(w[1:-1].roll(1))[:, None])
    assert float((made[1:-1] - others).abs().min()) > 0.02
    for i in range(7):
        torch.testing.assert_close(made[i], solver(gaussian_eps, NOISE, x_t[i], no_draw, w[i]))


@pytest.mark.parametrize("w", [0.0, 0.005, 0.0178, 0.0184, 0.1, 0.6, 0.95, 0.9996, 0.99999])
@pytest.mark.parametrize("solver", [DPMSolver(), Heun(), Ancestral(1000)], ids=repr)
def test_noised_frames_return_to_their_density_from_any_signal(solver: Solver, w: float) -> None:
    """x_t = w y + sqrt(1 - w^2) eps; all is linear, so that moments follow from the gradient."""
    count = solver.evaluations if isinstance(solver, Ancestral) else 1
    z = torch.zeros(1 + count, 1, 1, dtype=torch.float64, requires_grad=True)
    draws = iter(z[2:])
    noised = w * (MEAN + STD * z[0]) + math.sqrt(1 - w**2) * z[1]
    signal = torch.tensor(w, dtype=torch.float64)
    x = solver(gaussian_eps, NOISE, noised, lambda like: next(draws), signal)
    (gradient,) = torch.autograd.grad(x.sum(), z)
    assert next(draws, None) is None
    assert float(x.detach()) == pytest.approx(MEAN, abs=2e-3)
    assert float(gradient.square().sum()) / STD**2 == pytest.approx(1, abs=0.04)


def test_ancestral_sampling_from_a_signal_has_the_conditional_moments() -> None:
    """Mean and variance of y given x_t = w y + sigma eps."""
    n, w = 500, torch.tensor(0.8, dtype=torch.float64)
    z = torch.zeros(n - 1, 1, 1, dtype=torch.float64, requires_grad=True)
    draws = iter(z)
    x_t = torch.tensor([[0.9]], dtype=torch.float64)
    x = Ancestral(n)(gaussian_eps, NOISE, x_t, lambda like: next(draws), w)
    (gradient,) = torch.autograd.grad(x.sum(), z)
    precision = 1 / STD**2 + w**2 / (1 - w**2)
    mean = (MEAN / STD**2 + w * x_t / (1 - w**2)) / precision
    assert float(x.detach()) == pytest.approx(float(mean), abs=1e-3)
    assert float(gradient.square().sum() * precision) == pytest.approx(1, abs=0.03)


def test_ancestral_sampling_of_a_gaussian_converges_at_first_order() -> None:
    """Its result is linear in all noise, so that mean and variance follow from the gradient."""

    def moments(evaluations: int) -> tuple[float, float]:
        noise = torch.zeros(evaluations, 1, 1, dtype=torch.float64, requires_grad=True)
        draws = iter(noise[1:])
        x = Ancestral(evaluations)(gaussian_eps, NOISE, noise[0], lambda like: next(draws))
        (gradient,) = torch.autograd.grad(x.sum(), noise)
        assert next(draws, None) is None
        return float(x.detach()), float(gradient.square().sum())

    mean, variance = np.transpose([moments(n + 1) for n in (100, 200, 400)])
    assert np.allclose(mean, MEAN, atol=2e-3)
    deficit = 1 - variance / STD**2
    steps = -np.diff(deficit)
    assert steps[0] / steps[1] == pytest.approx(2, abs=0.15)
    denoising = np.exp(-2 * NOISE.start) / STD**2  # what the last data prediction takes away
    assert 2 * deficit[2] - deficit[1] == pytest.approx(denoising, abs=1e-3)


def test_ancestral_sampling_recovers_a_gaussian() -> None:
    n, draw = 4000, from_generator(0)
    x = Ancestral(500)(gaussian_eps, NOISE, draw(torch.zeros(n, 1)), draw)[:, 0].double()
    assert abs(float(x.mean()) - MEAN) < 4 * STD / math.sqrt(n)
    assert abs(float(x.var()) / STD**2 - 1) < 4 * math.sqrt(2 / n)
    assert kstest(x.numpy(), norm(MEAN, STD).cdf).pvalue > 1e-3
    assert kstest(x.numpy(), norm(MEAN + 0.1 * STD, STD).cdf).pvalue < 1e-3


def test_ancestral_sampling_recovers_a_multimodal_density() -> None:
    exact = TransferOperator(Prinz(), grid_size=300)
    s_eq, n, draw = exact.equilibrium_score(), 4000, from_generator(1)
    x = Ancestral(150)(s_eq, s_eq.noise, draw(torch.zeros(n, 1)), draw)[:, 0].numpy()
    right_ends, cdf = exact.grid + exact.spacing / 2, np.cumsum(exact.stationary) * exact.spacing
    assert kstest(x, lambda y: np.interp(y, right_ends, cdf)).pvalue > 1e-3
    assert kstest(x, norm(x.mean(), x.std()).cdf).pvalue < 1e-3


def test_signal_left_at_the_start_is_refused_because_it_biases() -> None:
    """A schedule that ends at alpha^2 = 0.1 would start from the wrong density."""
    end = 0.5 * math.log(0.1 / 0.9)
    with pytest.raises(ValueError, match=r"^end must be at most -4"):
        VPSchedule(end=end)
    x_1 = standard_normal_quantiles(2000).double()
    means, weights = torch.tensor([-2.0, 1.0]), torch.tensor([0.2, 0.8])

    def error_of_weight(noise: VPSchedule) -> float:
        def eps(x_t: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = noise.alpha(t), noise.sigma(t)
            variance = alpha**2 * STD**2 + sigma**2
            offset = x_t - alpha * means
            share = torch.softmax(weights.log() - offset**2 / (2 * variance), dim=1)
            return sigma * (share * offset).sum(1, keepdim=True) / variance

        x = DPMSolver(100)(eps, noise, x_1, no_draw)
        return abs(float((x < -0.5).double().mean()) - 0.2)

    unchecked = VPSchedule()
    unchecked.end = end
    assert error_of_weight(unchecked) > 0.02
    assert error_of_weight(VPSchedule()) < 0.003


@pytest.mark.parametrize(
    "solver",
    [
        DPMSolver(),
        DPMSolver(2, 3),
        DPMSolver(7, 1),
        Heun(),
        Heun(3),
        Ancestral(),
        Ancestral(2),
    ],
    ids=repr,
)
def test_evaluations_are_counted_exactly(solver: Solver) -> None:
    times: list[float] = []

    def counted(x_t: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return gaussian_eps(x_t, t)

    x_1 = standard_normal_quantiles(5)
    made = solver(counted, NOISE, x_1, from_generator(0))
    assert made.shape == x_1.shape
    assert len(times) == solver.evaluations
    assert times[0] == 1
    assert times[-1] == 0
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 3, 4)])
@pytest.mark.parametrize("solver", [DPMSolver(8), Heun(9), Ancestral(8)], ids=repr)
def test_frames_of_any_shape_are_solved_independently(
    solver: Solver, shape: tuple[int, ...]
) -> None:
    x_1 = from_generator(3)(torch.zeros(shape))
    fixed = from_generator(4)(torch.zeros(shape))
    together = solver(gaussian_eps, NOISE, x_1, lambda like: fixed)
    flat = solver(gaussian_eps, NOISE, x_1.reshape(-1, 1), lambda like: fixed.reshape(-1, 1))
    torch.testing.assert_close(together.reshape(-1, 1), flat)


def small_model() -> Interpolator:
    """An untrained model of two-dimensional frames in float64, its output layers not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = {"width": 8, "depth": 1, "n_frequencies": 2}
        s_eq, s_dyn = EquilibriumScore((2,), network), DynamicScore((2,), network)
        for score in (s_eq, s_dyn):
            torch.nn.init.normal_(score.network.out.weight, std=0.3)
    return Interpolator(BoPITOScore(s_eq, s_dyn, 0.97, 20)).double()


SOLVERS = [DPMSolver(6, 1), DPMSolver(6, 2), DPMSolver(6, 3), Heun(7), Ancestral(6)]


@pytest.mark.parametrize("n_int", [12.0, 35.0])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize(
    "moves",
    [[Interpolate(), Propagate(15)], [Propagate(share=0.5), Renoise(), Propagate(share=0.2)]],
    ids=repr,
)
def test_gradient_in_n_int(moves: list[Move], solver: Solver, n_int: float) -> None:
    """Through one move and through a rollout, one n_int per replica, by finite differences."""
    model = small_model()
    x_0 = torch.tensor([[0.3, -0.2], [0.5, 0.1]], dtype=torch.float64)
    n = torch.full((2,), n_int, dtype=torch.float64, requires_grad=True)
    step = Rollout(moves[:1], 30, solver)

    def one_move(n: Tensor) -> Tensor:
        return step.step(model, x_0, n, from_generator(5))

    composite = Rollout(moves, 30, solver)

    def rollout(n: Tensor) -> Tensor:
        return torch.stack(list(composite.frames(model, x_0, n, 2, from_generator(6))))

    assert torch.autograd.gradcheck(one_move, (n,))
    assert torch.autograd.gradcheck(rollout, (n,), check_forward_ad=True)
    (gradient,) = torch.autograd.grad(rollout(n)[-1].sum(), n)
    assert float(gradient.abs().min()) > 1e-6


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradient_reaches_every_parameter_and_the_start(solver: Solver) -> None:
    model = small_model()
    x_0 = torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    step = Rollout([Interpolate(35.0)], 30, solver)
    step.step(model, x_0, torch.tensor(35.0), from_generator(5)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    assert x_0.grad is not None
    assert float(x_0.grad.abs().min()) > 0


def test_quantiles_of_the_noise() -> None:
    z = standard_normal_quantiles(999)[:, 0].double().numpy()
    assert np.allclose(norm.cdf(z), (np.arange(999) + 0.5) / 999, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolver(evaluations=1), "evaluations must be a whole number of at least 2"),
        (lambda: DPMSolver(evaluations=7.5), "evaluations must be a whole number"),  # type: ignore[arg-type]
        (lambda: DPMSolver(order=4), "order must be 1, 2 or 3, got 4"),
        (lambda: Heun(evaluations=20), "evaluations must be odd for Heun, got 20"),
        (lambda: Heun(evaluations=1), "evaluations must be"),
        (lambda: Ancestral(evaluations=0), "evaluations must be"),
    ],
)
def test_bad_input_is_refused_by_name(make: Callable[[], Solver], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.gpu
@pytest.mark.parametrize("solver", [DPMSolver(), Heun(21), Ancestral(50)], ids=repr)
def test_solvers_on_cuda(solver: Solver) -> None:
    exact = TransferOperator(Prinz(), grid_size=300)
    x_1, noise = standard_normal_quantiles(500), exact.equilibrium_score().noise

    def made(device: str) -> Tensor:
        draw = from_generator(0)
        score: BoundScore = exact.equilibrium_score().to(device)
        return solver(score, noise, x_1.to(device), lambda like: draw(like.cpu()).to(device)).cpu()

    error = (made("cuda") - made("cpu")).abs()
    assert float(error.median()) < 1e-4
    assert float(error.quantile(0.99)) < 1e-2
