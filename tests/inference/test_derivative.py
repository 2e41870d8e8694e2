"""The derivative of a prediction in n_int.

The reference is an Ornstein-Uhlenbeck process, y_0 ~ N(m, v) and y_N | y_0 ~ N(m + rho^N (y_0 - m),
v (1 - rho^2N)). All its scores are linear, so that each move is y = a z + b y_0 + c with (a, b, c)
from one linear ODE, solved here by scipy at a complex n_int: the imaginary part over its step is
the derivative, to rounding, carried through moves, steps and observable alike.
"""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.autograd import forward_ad

import bopito_inverse as bi
from bopito_inverse.arguments import as_generator
from bopito_inverse.noise import Scaling, VPSchedule, per_replica
from bopito_inverse.sampling import DPMSolver, Interpolate, Propagate, Renoise, Rollout
from bopito_inverse.sampling.rollout import Normal
from bopito_inverse.systems import Prinz, TransferOperator

MEAN, VARIANCE, RHO = 0.3, 0.7, 0.95  # of the standardised frames
LAMBDA_HAT, LAG_MAX, RELAX = 0.96, 15, 5
COMPLEX_STEP = 1e-20j
INF = float("inf")
NOISE = VPSchedule()
CORRELATION = bi.observables.Correlation(lambda x: x, normalization="variance")


class Gaussian(nn.Module):
    """eps of the OU process; `decay` is rho^N, zero for the stationary density."""

    event_shape = (1,)
    noise = NOISE

    def __init__(self) -> None:
        super().__init__()
        self.scaling = Scaling(-0.4, 1.5)

    def eps(self, x_t: Tensor, t: Tensor, y_0: Tensor, decay: Tensor) -> Tensor:
        alpha, sigma = (per_replica(part(t), x_t) for part in (NOISE.alpha, NOISE.sigma))
        spread = alpha**2 * VARIANCE * (1 - decay**2) + sigma**2
        return sigma * (x_t - alpha * (MEAN + decay * (y_0 - MEAN))) / spread


class Equilibrium(Gaussian):
    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.eps(x_t, t, x_t, x_t.new_zeros(()))


class Dynamic(Gaussian):
    def bind(self, x_0: Tensor, lag: Tensor):
        lag = per_replica(lag, x_0)

        def eps_dyn(x_t: Tensor, t: Tensor) -> Tensor:
            stationary = self.eps(x_t, t, x_0, x_t.new_zeros(()))
            return (self.eps(x_t, t, x_0, RHO**lag) - stationary) / LAMBDA_HAT**lag

        return eps_dyn


def gaussian_model() -> bi.Interpolator:
    bopito = bi.models.BoPITOScore(Equilibrium(), Dynamic(), LAMBDA_HAT, LAG_MAX)
    return bi.Interpolator(bopito).double()


def network_model() -> bi.Interpolator:
    """A smooth model with random parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scores = [
            of((1,), {"width": 16, "depth": 2})
            for of in (bi.models.EquilibriumScore, bi.models.DynamicScore)
        ]
        for score in scores:
            nn.init.normal_(score.network.out.weight, std=0.3)
    return bi.Interpolator(bi.models.BoPITOScore(*scores, LAMBDA_HAT, LAG_MAX)).double()


def starts(n: int = 4000) -> Tensor:
    """Quantiles of the stationary density, in data units."""
    z = torch.special.ndtri((torch.arange(n) + 0.5) / n)[:, None]
    return 1.5 * (MEAN + VARIANCE**0.5 * z) - 0.4


def prediction(of=gaussian_model, lags=(20, 40, 60), moves=None, n_replicas=64, evaluations=12):
    moves = moves or [Interpolate(), Propagate(RELAX)]
    step = Rollout(moves, step_lag=20, solver=DPMSolver(evaluations))
    return bi.inference.Prediction(
        of(), step, CORRELATION, lags, starts(), 0, n_replicas, device="cpu"
    )


def parameter(n: float | Tensor, n_replicas: int | None = None, dtype=torch.float64) -> Tensor:
    value = torch.as_tensor(n, dtype=dtype)
    if n_replicas is not None:
        value = value.expand(n_replicas).clone()
    return value.requires_grad_()


def jacobian(predict, n: Tensor) -> Tensor:
    """Derivative of every lag, (L, *n.shape)."""
    value = predict(n)
    rows = [torch.autograd.grad(v, n, retain_graph=True)[0] for v in value]
    return torch.stack(rows)


def central(predict, n: Tensor | float, h: float) -> Tensor:
    n = torch.as_tensor(n, dtype=torch.float64)
    return (predict(n + h) - predict(n - h)) / (2 * h)


# the closed form


def amplitudes(r: float) -> tuple[float, float]:
    return (1 / (1 + np.exp(-2 * r))) ** 0.5, (1 / (1 + np.exp(2 * r))) ** 0.5


def affine_eps(r: float, n: complex, x: np.ndarray) -> np.ndarray:
    """Interpolated eps of x = (on z, on y_0, constant), at log alpha / sigma = r."""
    alpha, sigma = amplitudes(r)
    lag = n if n.real <= LAG_MAX else LAG_MAX
    weight = 0.0 if n.real == INF else LAMBDA_HAT ** (n - lag)
    total = 0
    for share, decay in ((1 - weight, 0.0), (weight, RHO**lag)):
        centre = np.array([0, decay, MEAN * (1 - decay)])
        spread = alpha**2 * VARIANCE * (1 - decay**2) + sigma**2
        total = total + share * sigma * (x - alpha * centre) / spread
    return total


def affine_move(n: complex) -> np.ndarray:
    """(a, b, c) of one draw: y = a z + b y_0 + c."""

    def slope(r: float, scaled: np.ndarray) -> np.ndarray:
        return -np.exp(-r) * affine_eps(r, n, amplitudes(r)[0] * scaled)

    z = np.array([1, 0, 0], dtype=complex)
    (alpha_1, sigma_1), (alpha_0, sigma_0) = amplitudes(-4.0), amplitudes(4.0)
    start = z + (z - sigma_1 * affine_eps(-4.0, n, z))
    path = solve_ivp(slope, (-4, 4), start / alpha_1, "DOP853", rtol=1e-11, atol=1e-12)
    x = alpha_0 * path.y[:, -1]
    return (x - sigma_0 * affine_eps(4.0, n, x)) / alpha_0


def perturbed(n: float) -> complex:
    return complex(INF) if n == INF else n + COMPLEX_STEP


def parts(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative."""
    return g.real, g.imag / COMPLEX_STEP.imag


def closed_form(predict, n: float, keep_chain: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """What `predict` should give, with its own starts and noise; observable in plain numpy."""
    moves = affine_move(perturbed(n)), affine_move(complex(RELAX))
    normal = Normal(as_generator(0, torch.device("cpu"), "prediction", 0), antithetic=True)
    x_0 = predict.starts.double().repeat(2, 1)
    y = predict.model.scaling.standardise(x_0).numpy().astype(complex)
    x, x_0 = [], x_0.numpy()
    for _ in range(predict.n_steps):
        y = y if keep_chain else y.real
        for a, b, c in moves:
            y = a * normal(torch.from_numpy(y.real)).numpy() + b * y + c
        x.append(1.5 * y - 0.4)
    covariance = [((x_0 - x_0.mean()) * (x_k - x_k.mean())).mean() for x_k in x]
    variance = [((x_k - x_k.mean()) ** 2).mean() for x_k in x]
    return parts(np.array(covariance) / np.sqrt(x_0.var() * np.array(variance)))


def population(n: float, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The correlation of infinitely many replicas."""
    memory, variance, result = 1.0, VARIANCE, []
    for _ in range(n_steps):
        for a, b, _ in (affine_move(perturbed(n)), affine_move(complex(RELAX))):
            memory, variance = memory * b, b**2 * variance + a**2
        result.append(memory * np.sqrt(VARIANCE) / np.sqrt(variance))
    return parts(np.array(result))


@pytest.mark.parametrize("n_int", [7.0, 40.0, INF])
def test_value_and_derivative_are_the_closed_form(n_int: float) -> None:
    predict = prediction(lags=(20, 40), evaluations=60)
    value, slope = closed_form(predict, n_int)
    n = parameter(n_int)
    np.testing.assert_allclose(predict(n_int), value, rtol=0, atol=2e-5)
    np.testing.assert_allclose(jacobian(predict, n), slope, rtol=5e-5, atol=0)
    if n_int == INF:
        assert (slope == 0).all()
    else:  # a derivative that forgets how earlier steps depend on n_int is another one
        forgetful = closed_form(predict, n_int, keep_chain=False)[1]
        assert (np.abs(forgetful[1:] / slope[1:] - 1) > 0.2).all()
        assert forgetful[0] == pytest.approx(slope[0], rel=1e-9)


def test_error_falls_with_the_order_of_the_solver() -> None:
    coarse, fine = (prediction(lags=(20,), evaluations=e) for e in (15, 30))
    slope = closed_form(fine, 40.0)[1]
    errors = [np.abs(jacobian(p, parameter(40.0)).numpy() - slope).max() for p in (coarse, fine)]
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("n_int", [7.0, 40.0])
def test_expectation_within_monte_carlo_error(n_int: float) -> None:
    predict = prediction(lags=(20, 40), n_replicas=4096, evaluations=12)
    made = predict.at(torch.tensor([n_int], dtype=torch.float64))
    own = jacobian(predict, parameter(n_int, predict.n_replicas))
    pairs = own.unflatten(1, (2, -1)).mean(1) * predict.n_replicas  # share r + R / 2 with r
    value, slope = population(n_int, 2)
    for estimate, each, truth in (
        (made.value[0, :-1], made.influence[:, 0, :-1], value),
        (pairs.mean(1), pairs.T, slope),
    ):
        error = (each.std(0) / len(each) ** 0.5).numpy()
        assert (np.abs(estimate.numpy() - truth) < 4 * error + 2e-3 * np.abs(truth)).all()
        assert (error < 0.1 * np.abs(truth)).all()


# differences


@pytest.fixture(scope="module")
def prinz() -> bi.inference.Prediction:
    """Exact scores; no transitions across x = 0 at lags up to 50."""
    exact = TransferOperator(Prinz(), grid_size=200)
    s_eq = exact.equilibrium_score()
    s_dyn = TransferOperator(Prinz(), barrier=0.0, grid_size=200).dynamic_score(s_eq, 0.99)
    model = bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, 0.99, 50)).double()
    step = Rollout([Interpolate(), Propagate(50)], 100, DPMSolver(12))
    x_0 = exact.sample(2000, torch.Generator().manual_seed(0))
    return bi.inference.Prediction(model, step, CORRELATION, [100, 200, 300], x_0, 0, 256, "cpu")


@pytest.mark.parametrize("n_int", [30.0, 80.0, 150.0])
def test_exact_scores_with_a_barrier(prinz, n_int: float) -> None:
    """Steep maps: at h = 0.01 walkers already tip over the barrier, at 1e-4 none of these does."""
    slope, numeric = jacobian(prinz, parameter(n_int)), central(prinz, n_int, 1e-4)
    assert ((slope - numeric).abs() < 1e-5 * slope.abs()).all()
    assert (slope != 0).all()


def test_jumps_over_a_barrier_are_not_in_the_derivative(prinz) -> None:
    """Walkers that change sides: a difference over a finite step counts them."""
    slope, difference = jacobian(prinz, parameter(100.0)), central(prinz, 100.0, 40.0)
    assert (difference < 10 * slope.abs().neg()).all()


@pytest.mark.parametrize(
    ("n_int", "moves"),
    [
        (8.0, [Interpolate(), Propagate(RELAX)]),
        (25.0, [Interpolate(), Propagate(RELAX)]),
        (60.0, [Interpolate(), Propagate(RELAX)]),
        (25.0, [Propagate(RELAX), Renoise(), Propagate(RELAX)]),
    ],
)
def test_network(n_int: float, moves: list) -> None:
    predict = prediction(network_model, moves=moves)
    slope = jacobian(predict, parameter(n_int))
    torch.testing.assert_close(slope, central(predict, n_int, 1e-3), rtol=1e-5, atol=1e-9)
    assert (slope.abs() > 1e-6).all()
    relaxed_only = jacobian(prediction(network_model, moves=[Propagate(5)]), parameter(n_int))
    assert (relaxed_only == 0).all()


def test_at_lag_max_it_is_the_derivative_from_below() -> None:
    predict, n, h = (
        prediction(evaluations=6),
        torch.tensor(float(LAG_MAX), dtype=torch.float64),
        1e-5,
    )
    slope = jacobian(predict, parameter(n))
    below, above = (predict(n) - predict(n - h)) / h, (predict(n + h) - predict(n)) / h
    torch.testing.assert_close(slope, below, rtol=1e-4, atol=0)
    assert ((above - slope).abs() > 0.1 * slope.abs()).all()


# one n_int for each replica


@pytest.mark.parametrize("of", [gaussian_model, network_model])
def test_replicas_with_their_own_n_int(of) -> None:
    predict = prediction(of, lags=(40, 20), n_replicas=6, evaluations=6)
    n = torch.tensor([8.0, 12.0, 20.0, 30.0, 60.0, INF], dtype=torch.float64)
    own = jacobian(predict, parameter(n))
    assert own.shape == (2, 6)
    for r in range(5):
        numeric = central(lambda h, r=r: predict(n + h * (torch.arange(6) == r)), 0.0, 1e-3)
        torch.testing.assert_close(own[:, r], numeric, rtol=1e-5, atol=1e-10)
    assert (own[:, 5] == 0).all()


def test_replicas_sum_to_the_derivative_of_all(monkeypatch) -> None:
    whole = prediction(network_model, lags=(20, 40), n_replicas=20, evaluations=6)
    expected, value = jacobian(whole, parameter(30.0)), whole(30.0)
    own = jacobian(whole, parameter(30.0, 20))
    torch.testing.assert_close(own.sum(1), expected, rtol=1e-10, atol=0)
    assert torch.equal(whole(parameter(30.0, 20)), value)
    monkeypatch.setattr("bopito_inverse.inference.prediction.PAIRS_PER_CHUNK", 4)
    n = torch.linspace(5, 60, 20, dtype=torch.float64)
    own = jacobian(whole, parameter(n))
    r = 13  # pair 3 of the second half, in the first of three chunks
    numeric = central(lambda h: whole(n + h * (torch.arange(20) == r)), 0.0, 1e-3)
    torch.testing.assert_close(own[:, r], numeric, rtol=1e-5, atol=1e-10)


def test_halves_are_antithetic_partners() -> None:
    predict = prediction(lags=(20,), n_replicas=10)
    frames = predict._along(torch.tensor(INF), False)[0]
    start, end = frames.unflatten(1, (2, 5))
    assert torch.equal(start[0], start[1])
    y = predict.model.scaling.standardise(end)
    _, b, c = affine_move(complex(RELAX))
    a_eq = affine_move(complex(INF))
    forgotten = 2 * (c + b * a_eq[2])  # what is left when opposite noises cancel
    torch.testing.assert_close(
        y.sum(0), torch.full((5, 1), forgotten.real).double(), rtol=0.02, atol=0
    )


# precision, cost and refusals


def test_precision_follows_the_model() -> None:
    predict = prediction(lags=(20,), evaluations=6)
    single = prediction(lambda: gaussian_model().float(), lags=(20,), evaluations=6)
    assert (predict.dtype, single.dtype) == (torch.float64, torch.float32)
    for of in (predict, single):
        numeric = central(of, 30.0, 0.5)
        for dtype in (torch.float32, torch.float64):
            n = parameter(30.0, dtype=dtype)
            slope = jacobian(of, n)
            assert (of(n).dtype, slope.dtype) == (torch.float64, dtype)
            torch.testing.assert_close(slope.double(), numeric, rtol=2e-3, atol=0)
    assert torch.equal(predict(30.1), predict(torch.tensor(30.1, dtype=torch.float64)))


def test_what_is_kept_grows_with_neither_evaluations_nor_steps() -> None:
    def kept(**options) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            prediction(network_model, **options)(parameter(30.0))
        return sum(sizes)

    few = kept(lags=(20,), evaluations=5)
    assert few > 0
    assert kept(lags=(20,), evaluations=30) == few
    assert kept(lags=(100,), evaluations=5) == few


def test_no_tangent_unless_asked(monkeypatch) -> None:
    predict = prediction()
    n = parameter(30.0)
    expected = predict(n).detach()

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(forward_ad, "make_dual", refuse)
    assert torch.equal(predict(30.0), expected)
    with torch.no_grad():
        assert torch.equal(predict(n), expected)
    with pytest.raises(AssertionError):
        predict(n)


def test_an_observable_with_no_derivative_is_refused() -> None:
    predict = prediction()
    side = bi.observables.Correlation(lambda x: (x > 0).double(), name="side")
    predict.obs = {"position": CORRELATION, "side": side}
    assert len(predict(30.0)) > 0
    with pytest.raises(ValueError, match="obs 'side' must be made of differentiable torch op"):
        predict(parameter(30.0))


# what the derivative is for


def test_torch_optimiser_recovers_n_int() -> None:
    """Data of infinitely many replicas: recovered within the Monte Carlo error."""
    predict = prediction(lags=(20,), n_replicas=2048, evaluations=12)
    truth, target = 37.0, torch.from_numpy(population(37.0, 1)[0])
    n = parameter(25.0)
    optimiser = torch.optim.LBFGS([n], max_iter=15, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        misfit = ((predict(n) - target) / 0.01).square().sum()
        misfit.backward()
        return misfit

    optimiser.step(loss)
    made = predict.at(torch.tensor([truth]))
    error = (made.influence[:, 0, 0].std() / 1024**0.5) / abs(population(truth, 1)[1][0])
    assert float(n.detach()) == pytest.approx(truth, abs=4 * float(error))
    assert error < 1.5


def test_scipy_recovers_n_int() -> None:
    """Data of the same replicas: recovered to the tolerance of the optimiser."""
    predict = prediction(lags=(20, 40), n_replicas=256, evaluations=8)
    target = predict(28.0)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        n = parameter(x[0])
        loss = ((predict(n) - target) / 0.01).square().sum()
        loss.backward()
        return loss.item(), n.grad.numpy()[None]

    found = minimize(objective, [20.0], jac=True, method="L-BFGS-B", bounds=[(LAG_MAX, 200)])
    assert found.x[0] == pytest.approx(28.0, rel=1e-4)
