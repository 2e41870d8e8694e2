"""Renoising, relaxation that slows down with n_int, and the step that is made of both."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn
from torch.autograd import forward_ad

from bopito_inverse import Interpolator
from bopito_inverse.arguments import as_generator
from bopito_inverse.models import BoPITOScore
from bopito_inverse.sampling import (
    DPMSolver,
    Interpolate,
    Normal,
    Propagate,
    Renoise,
    Rollout,
    renoising_step,
)
from bopito_inverse.sampling.rollout import Move
from bopito_inverse.sampling.solvers import standard_normal_quantiles
from bopito_inverse.systems import OrnsteinUhlenbeck, Potential1D, Prinz, TransferOperator

LAMBDA_HAT, LAG_MAX = 0.99, 50
N_MU, N_NOISE = 120, 61
INF = torch.tensor(math.inf)


def exact_model(
    system: Potential1D, barrier: float | None, lambda_hat: float, lag_max: int, size: int = 300
) -> Interpolator:
    s_eq = TransferOperator(system, grid_size=size).equilibrium_score()
    s_dyn = TransferOperator(system, barrier, size).dynamic_score(s_eq, lambda_hat)
    return Interpolator(BoPITOScore(s_eq, s_dyn, lambda_hat, lag_max))


@pytest.fixture(scope="module")
def cut() -> Interpolator:
    """Exact scores of Prinz's potential, the dynamics cut at the main barrier."""
    return exact_model(Prinz(), 0.0, LAMBDA_HAT, LAG_MAX)


def exact_cdf(model: Interpolator, x: np.ndarray) -> np.ndarray:
    exact = model.bopito.s_eq.operator
    return np.interp(x, exact.grid + exact.spacing / 2, np.cumsum(exact.stationary) * exact.spacing)


def distance(model: Interpolator, x: Tensor) -> float:
    """Kolmogorov-Smirnov distance to mu."""
    return float(kstest(x[:, 0].numpy(), lambda y: exact_cdf(model, y)).statistic)


def quantiles_of_mu(model: Interpolator) -> Tensor:
    fine = np.linspace(-1.4, 1.4, 20_000)
    levels = (np.arange(N_MU) + 0.5) / N_MU
    x = np.interp(levels, exact_cdf(model, fine), fine)
    return torch.from_numpy(x).float().repeat_interleave(N_NOISE)[:, None]


def quantiles(like: Tensor) -> Tensor:
    """The quantiles of the noise, the same for each start."""
    z = standard_normal_quantiles(min(N_NOISE, len(like)))
    return z.repeat(len(like) // len(z), 1)


def moved(model: nn.Module, x: Tensor, n_int: float | Tensor, *moves: Move) -> Tensor:
    return Rollout(moves, 100).step(model, x, torch.as_tensor(n_int), quantiles)


@pytest.mark.parametrize("n_int", [0.5, 20.0, 50.0])
def test_renoise_keeps_the_frame_at_and_below_lag_max(cut: Interpolator, n_int: float) -> None:
    x = torch.linspace(-1, 1, N_NOISE)[:, None]
    assert torch.equal(moved(cut, x, n_int, Renoise()), x)
    assert torch.equal(moved(cut, x, INF, Renoise(n_int)), x)
    assert not torch.equal(moved(cut, x, 50.1, Renoise()), x)


def test_renoise_at_infinite_n_int_draws_from_mu_whatever_the_start(cut: Interpolator) -> None:
    def drawn(x_0: float, n_int: float) -> Tensor:
        z = standard_normal_quantiles(500)
        step = Rollout([Renoise()], 100)
        return step.step(cut, torch.full((500, 1), x_0), torch.tensor(n_int), lambda like: z)

    left, right = drawn(-0.9, math.inf), drawn(0.7, math.inf)
    assert torch.equal(left, right)
    assert distance(cut, left) < 0.01
    assert distance(cut, drawn(0.7, 150.0)) > 0.05


@pytest.mark.parametrize("w", [0.01, 0.1, 0.4, 0.7, 0.9, 0.99])
def test_renoise_leaves_mu_invariant(cut: Interpolator, w: float) -> None:
    """All quantiles of mu with all quantiles of the noise: no Monte Carlo error."""
    x, n_int = quantiles_of_mu(cut), cut.n_int(torch.tensor(w))
    assert distance(cut, x) < 0.005
    assert distance(cut, moved(cut, x, n_int, Renoise())) < 0.01


@pytest.mark.parametrize("w", [0.4, 0.7, 0.9])
def test_interpolate_does_not_leave_mu_invariant(cut: Interpolator, w: float) -> None:
    """What the check above finds where it should fail: the slow process is missing."""
    x, n_int = quantiles_of_mu(cut), cut.n_int(torch.tensor(w))
    assert distance(cut, moved(cut, x, n_int, Interpolate())) > 0.02


def test_renoise_crosses_the_barrier_from_near_it(cut: Interpolator) -> None:
    x = torch.tensor([-0.8, -0.4, -0.15]).repeat_interleave(N_NOISE)[:, None]
    crossed = moved(cut, x, cut.n_int(torch.tensor(0.95)), Renoise()) > 0
    far, middle, near = crossed.double().reshape(3, N_NOISE).mean(1).tolist()
    assert far < 0.03 < middle < near - 0.1


@pytest.mark.parametrize("n_int", [3.0, 10.0, 20.0, 26.0, 40.0, 90.0, 400.0, math.inf])
def test_the_step_is_exact_in_a_harmonic_well(n_int: float) -> None:
    """All moves are linear there: x = a x_0 + sum b_i z_i, a the correlation at n_int frames."""
    system = OrnsteinUhlenbeck()
    model = exact_model(system, None, system.decay, lag_max=20, size=800).double()
    solver = DPMSolver(80)
    step = Rollout([Propagate(share=0.5), Renoise(), Propagate(share=0.5)], 40, solver)

    def made(start: float, noise: tuple[float, float, float]) -> float:
        draws = iter(torch.tensor(noise, dtype=torch.float64))
        x_0 = torch.full((1, 1), start, dtype=torch.float64)
        n = torch.tensor(n_int, dtype=torch.float64)
        return float(step.step(model, x_0, n, lambda like: next(draws).expand_as(like)))

    correlation = made(1.0, (0, 0, 0))
    assert correlation == pytest.approx(system.decay**n_int, abs=1e-3)
    spread = [made(0.0, z) for z in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert correlation**2 + sum(b**2 for b in spread) == pytest.approx(1, abs=2e-3)


def test_a_fixed_lag_is_not_exact_below_lag_max() -> None:
    system = OrnsteinUhlenbeck()
    model = exact_model(system, None, system.decay, lag_max=20, size=800)
    step, x_0 = Rollout([Propagate(10), Renoise(), Propagate(10)], 40), torch.ones(1, 1)
    made = float(step.step(model, x_0, torch.tensor(10.0), torch.zeros_like))
    assert made == pytest.approx(system.decay**20, abs=3e-3)


@pytest.mark.parametrize("n_int", [12.0, 50.0, 80.0, math.inf])
def test_a_share_is_a_lag_that_slows_down_with_the_experiment(
    cut: Interpolator, n_int: float
) -> None:
    x = torch.linspace(-1, 1, N_NOISE)[:, None]
    expected = moved(cut, x, INF, Propagate(0.4 * min(n_int, LAG_MAX)))
    for model in (cut, cut.bopito):
        assert torch.equal(moved(model, x, n_int, Propagate(share=0.4)), expected)


@pytest.mark.parametrize(
    ("step_lag", "share"), [(40, 0.2), (50, 0.25), (100, 0.5), (101, 0.5), (400, 0.5)]
)
def test_the_recommended_step_relaxes_for_half_its_length_at_most(
    step_lag: int, share: float
) -> None:
    solver = DPMSolver(7)
    step = renoising_step(50, step_lag, solver)
    assert step.config() == {
        "moves": [
            {"move": "propagate", "share": share},
            {"move": "renoise", "n_int": None},
            {"move": "propagate", "share": share},
        ],
        "step_lag": step_lag,
        "solver": repr(solver),
    }
    assert json.loads(json.dumps(step.config())) == step.config()
    assert repr(step) == (
        f"Rollout([Propagate(share={share:g}), Renoise(), Propagate(share={share:g})], "
        f"step_lag={step_lag}, solver={solver!r})"
    )
    assert repr(Renoise(70)) == "Renoise(n_int=70)"
    assert Renoise(70).config() == {"move": "renoise", "n_int": 70.0}


def test_a_step_that_is_never_slower_than_the_model() -> None:
    """It is the default step above N_max, and does not know n_int below."""
    model = exact_model(Prinz(), 0.0, LAMBDA_HAT, LAG_MAX)
    x_0 = torch.linspace(-1, 1, 12)[:, None]
    default, fixed = (renoising_step(LAG_MAX, 100, slower=slower) for slower in (True, False))
    assert default.slower
    assert not fixed.slower
    assert str(Propagate(LAG_MAX / 2)) in str(fixed)

    def frames(step: Rollout, n_int: float) -> Tensor:
        normal = Normal(as_generator(1, torch.device("cpu")))
        return torch.stack(list(step.frames(model, x_0, torch.tensor(n_int), 2, normal)))

    torch.testing.assert_close(frames(fixed, 80.0), frames(default, 80.0))
    assert torch.equal(frames(fixed, 10.0), frames(fixed, float(LAG_MAX)))


@pytest.mark.parametrize("n_int", [20.0, 50.0, 51.0, 120.0, math.inf])
def test_derivative_in_n_int(n_int: float) -> None:
    """Forward mode: finite at w = 1 and w = 0, and the slope of the frames in between."""
    model = exact_model(Prinz(), 0.0, LAMBDA_HAT, LAG_MAX).double()
    x_0 = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    step = renoising_step(LAG_MAX, 100)

    def frames(n: Tensor) -> Tensor:
        normal = Normal(as_generator(1, torch.device("cpu")))
        return torch.stack(list(step.frames(model, x_0, n, 2, normal)))

    n = torch.tensor(n_int, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(n, torch.ones_like(n))
        _, slope = forward_ad.unpack_dual(frames(dual))
        assert slope is not None
    assert bool(slope.isfinite().all())
    if n_int == math.inf:
        assert float(slope.abs().max()) == 0
    elif n_int != LAG_MAX:
        change = (frames(n + 1e-4) - frames(n - 1e-4)) / 2e-4
        error = (slope - change).abs() / (1e-3 + change.abs())
        assert float(error.median()) < 1e-4
        assert float(error.max()) < 0.02


def test_backward_derivative_is_finite_where_replicas_are_kept_or_drawn(cut: Interpolator) -> None:
    n = torch.tensor([20.0, 50.0, 120.0, math.inf], requires_grad=True)
    step = renoising_step(LAG_MAX, 100)
    step.step(cut, torch.full((4, 1), 0.3), n, quantiles).sum().backward()
    assert n.grad is not None
    assert bool(n.grad.isfinite().all())
    assert float(n.grad[:3].abs().min()) > 0


def test_moves_that_need_more_than_the_model_has_are_refused(cut: Interpolator) -> None:
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"model must be an Interpolator for Renoise .* BoPITO"):
        moved(cut.bopito, x, INF, Renoise())
    with pytest.raises(ValueError, match=r"share of Propagate needs a model with lag_max"):
        moved(cut.bopito.s_dyn, x, INF, Propagate(share=0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Renoise(0.0), "n_int must be above zero"),
        (lambda: Renoise(math.nan), "n_int must be above zero"),
        (lambda: Propagate(), "Propagate takes either lag or share, got None and None"),
        (lambda: Propagate(5, share=0.5), "Propagate takes either lag or share, got 5 and 0.5"),
        (lambda: Propagate(share=1.01), "share must be at most 1, got 1.01"),
        (lambda: Propagate(share=0.0), "share must be a positive number"),
        (lambda: renoising_step(0, 100), "lag_max must be a whole number"),
        (lambda: renoising_step(50, 0), "step_lag must be a whole number"),
    ],
)
def test_bad_input_is_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
