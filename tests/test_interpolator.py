import math

import pytest
import torch
from torch import Tensor, nn

from bopito_inverse import Interpolator
from bopito_inverse.models import BoPITOScore, DynamicScore, EquilibriumScore
from bopito_inverse.systems import DoubleWell, TransferOperator

LAG_MAX, LAMBDA_HAT, B = 50, 0.98, 6


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters everywhere: a new network is zero at its last layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return module


def trained(event_shape: tuple[int, ...]) -> BoPITOScore:
    size = {"width": 12, "depth": 2, "n_frequencies": 3}
    parts = EquilibriumScore(event_shape, size), DynamicScore(event_shape, size)
    bopito = BoPITOScore(*parts, LAMBDA_HAT, LAG_MAX)
    randomise(bopito)
    return bopito


def exact() -> BoPITOScore:
    operator = TransferOperator(DoubleWell(), grid_size=80)
    s_eq = operator.equilibrium_score()
    return BoPITOScore(s_eq, operator.dynamic_score(s_eq, LAMBDA_HAT), LAMBDA_HAT, LAG_MAX)


@pytest.fixture(params=["network", "network 2-D", "exact"])
def bopito(request: pytest.FixtureRequest) -> BoPITOScore:
    if request.param == "exact":
        return exact()
    return trained((1,) if request.param == "network" else (2,))


@pytest.fixture
def frames(bopito: BoPITOScore) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t, x_0 = torch.randn(2, B, *bopito.event_shape, generator=generator)
    return x_t, torch.linspace(0.05, 0.95, B), x_0.clamp(-1.2, 1.2)


def test_exact_limits(bopito: BoPITOScore, frames: tuple[Tensor, Tensor, Tensor]) -> None:
    x_t, t, x_0 = frames
    model = Interpolator(bopito)
    for n_int in (torch.tensor(float(LAG_MAX)), torch.full((B,), float(LAG_MAX))):
        at_lag_max = bopito(x_t, t, x_0, torch.tensor(LAG_MAX))
        assert torch.equal(model(x_t, t, x_0, n_int), at_lag_max)
    for n_int in (torch.tensor(math.inf), torch.full((B,), math.inf)):
        assert torch.equal(model(x_t, t, x_0, n_int), bopito.s_eq(x_t, t))
    assert not torch.allclose(bopito.s_eq(x_t, t), at_lag_max, atol=1e-3)


def test_per_replica_mix(bopito: BoPITOScore, frames: tuple[Tensor, Tensor, Tensor]) -> None:
    x_t, t, x_0 = frames
    n_int = torch.tensor([3.0, 49.5, LAG_MAX, 80.0, 700.0, math.inf])
    mixed = Interpolator(bopito)(x_t, t, x_0, n_int)
    for i, n in enumerate(n_int):
        one = Interpolator(bopito)(x_t[i : i + 1], t[i : i + 1], x_0[i : i + 1], n)
        torch.testing.assert_close(mixed[i : i + 1], one, atol=1e-4, rtol=1e-4)


def test_mixture_of_equilibrium_and_longest_lag(
    bopito: BoPITOScore, frames: tuple[Tensor, Tensor, Tensor]
) -> None:
    x_t, t, x_0 = frames
    model = Interpolator(bopito)
    n_int = torch.linspace(50, 200, B)
    w = model.weight(n_int)[:, None]
    expected = (1 - w) * bopito.s_eq(x_t, t) + w * bopito(x_t, t, x_0, torch.tensor(LAG_MAX))
    torch.testing.assert_close(model(x_t, t, x_0, n_int), expected, atol=1e-5, rtol=1e-5)


def test_below_lag_max_is_the_trained_model(
    bopito: BoPITOScore, frames: tuple[Tensor, Tensor, Tensor]
) -> None:
    x_t, t, x_0 = frames
    for lag in (1, 7, 49):
        expected = bopito(x_t, t, x_0, torch.tensor(lag))
        assert torch.equal(Interpolator(bopito)(x_t, t, x_0, torch.tensor(float(lag))), expected)


def test_weight_and_n_int_are_inverse() -> None:
    model = Interpolator(trained((1,)))
    w = torch.linspace(0, 1, 41, dtype=torch.float64)
    torch.testing.assert_close(model.weight(model.n_int(w)), w)
    n_int = torch.linspace(LAG_MAX, 900, 41, dtype=torch.float64)
    torch.testing.assert_close(model.n_int(model.weight(n_int)), n_int)
    assert float(model.weight(torch.tensor(LAG_MAX - 20.0))) == 1
    assert float(model.weight(torch.tensor(LAG_MAX + 1.0))) == pytest.approx(LAMBDA_HAT)
    assert float(model.n_int(torch.tensor(0.0))) == math.inf


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("event_shape", [(1,), (2,)])
@pytest.mark.parametrize("n_int", [12.5, 49.0, 51.0, 130.0])
def test_gradient_is_that_of_central_differences(
    event_shape: tuple[int, ...], n_int: float
) -> None:
    model = Interpolator(trained(event_shape)).double()
    generator = torch.Generator().manual_seed(2)
    x_t, x_0 = torch.randn(2, B, *event_shape, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, B, dtype=torch.float64)

    def eps(n: Tensor) -> Tensor:
        return model(x_t, t, x_0, n)

    n, h = torch.tensor(n_int, dtype=torch.float64), 1e-4
    _, forward = torch.func.jvp(eps, (n,), (torch.ones_like(n),))
    reverse = torch.autograd.functional.jacobian(eps, n)
    difference = ((eps(n + h) - eps(n - h)) / (2 * h)).detach()
    assert float(difference.abs().max()) > 1e-3
    torch.testing.assert_close(forward, difference, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(reverse, difference, atol=1e-8, rtol=1e-6)


def test_gradient_vanishes_at_infinity_and_stays_finite() -> None:
    model = Interpolator(trained((1,)))
    n_int = torch.tensor([math.inf, LAG_MAX, 60.0], requires_grad=True)
    x = torch.linspace(-1, 1, 3)[:, None]
    model(x, torch.tensor(0.4), x, n_int).sum().backward()
    assert n_int.grad is not None
    assert bool(torch.isfinite(n_int.grad).all())
    assert float(n_int.grad[0]) == 0
    assert float(n_int.grad[2]) != 0


def test_properties_are_those_of_the_model() -> None:
    bopito = trained((2,))
    model = Interpolator(bopito)
    assert model.noise is bopito.noise
    assert model.scaling is bopito.scaling
    assert (model.event_shape, model.lag_max, model.lambda_hat) == ((2,), LAG_MAX, LAMBDA_HAT)
