import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from bopito_inverse import Interpolator
from bopito_inverse.arguments import as_generator
from bopito_inverse.models import BoPITOScore
from bopito_inverse.sampling import (
    Ancestral,
    DPMSolver,
    Interpolate,
    Normal,
    Propagate,
    Renoise,
    Rollout,
)
from bopito_inverse.sampling.solvers import standard_normal_quantiles
from bopito_inverse.systems import Prinz, TransferOperator

LAMBDA_HAT = 0.994
CPU = torch.device("cpu")
INF = torch.tensor(math.inf)
GRID_SIZE = 200


class FullGrid:
    """An operator and the model of its exact scores."""

    def __init__(self, barrier: float | None) -> None:
        self.unbiased = TransferOperator(Prinz(), grid_size=GRID_SIZE)
        self.biased = TransferOperator(Prinz(), barrier=barrier, grid_size=GRID_SIZE)
        s_eq = self.unbiased.equilibrium_score()
        s_dyn = self.biased.dynamic_score(s_eq, LAMBDA_HAT)
        self.model = Interpolator(BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, lag_max=50))

    def cdf(self, density: np.ndarray, x: np.ndarray) -> np.ndarray:
        exact = self.unbiased
        cumulative = np.cumsum(density) * exact.spacing
        return np.interp(x, exact.grid + exact.spacing / 2, cumulative)


@pytest.fixture(scope="module")
def cut() -> FullGrid:
    return FullGrid(barrier=0.0)


@pytest.fixture(scope="module")
def full() -> FullGrid:
    return FullGrid(barrier=None)


def quantiles(like: Tensor) -> Tensor:
    return standard_normal_quantiles(len(like))


def distance(full: FullGrid, density: np.ndarray, x: Tensor) -> float:
    """Kolmogorov-Smirnov distance of frames made from quantiles of the noise."""
    return float(kstest(x[:, 0].double().numpy(), lambda y: full.cdf(density, y)).statistic)


def test_infinite_n_int_gives_equilibrium_whatever_the_start(cut: FullGrid) -> None:
    step, n = Rollout([Interpolate()], 100), 500
    for x_0 in (-0.9, 0.1, 5.0):
        start = torch.full((n, 1), x_0)
        x = step.step(cut.model, start, INF, quantiles)
        assert distance(cut, cut.unbiased.stationary, x) < 0.01
        trained = step.step(cut.model, start, torch.tensor(50.0), quantiles)
        assert distance(cut, cut.unbiased.stationary, trained) > 0.2
    fixed = Rollout([Interpolate(math.inf)], 100)
    assert torch.equal(fixed.step(cut.model, start, torch.tensor(50.0), quantiles), x)


@pytest.mark.parametrize("lag", [3.0, 50.0])
def test_propagate_gives_the_transition_density(full: FullGrid, lag: float) -> None:
    cell, n = 140, 500
    start = torch.full((n, 1), float(full.unbiased.grid[cell]))
    density = full.unbiased.transition_density(lag)[cell]
    step = Rollout([Propagate(lag)], lag)
    for model in (full.model, full.model.bopito):
        (x,) = step.frames(model, start, INF, 1, quantiles)
        assert distance(full, density, x) < 0.01
    assert distance(full, full.unbiased.transition_density(1.5 * lag)[cell], x) > 0.01


def test_interpolate_at_lag_max_is_propagate(full: FullGrid) -> None:
    start = torch.linspace(-1, 1, 100)[:, None]
    interpolated = Rollout([Interpolate()], 50).step(
        full.model, start, torch.tensor(50.0), quantiles
    )
    propagated = Rollout([Propagate(50)], 50).step(full.model, start, INF, quantiles)
    assert torch.equal(interpolated, propagated)


def composite_matrix(grid: FullGrid, step: Rollout, n_int: float) -> np.ndarray:
    """Transition matrix of one composite step, one move after another, by quantiles of noise."""
    exact, n = grid.unbiased, 101
    centres = torch.from_numpy(exact.grid).float()
    matrix = torch.eye(GRID_SIZE)
    for move in step.moves:
        starts = centres.repeat_interleave(n)[:, None]
        draw = standard_normal_quantiles(n).repeat(GRID_SIZE, 1)
        single = Rollout([move], 1, step.solver)
        x = single.step(grid.model, starts, torch.tensor(n_int), lambda like, z=draw: z)[:, 0]
        position = ((x - centres[0]) / exact.spacing).clamp(0, GRID_SIZE - 1.001)
        low = position.long()
        rows = torch.arange(GRID_SIZE).repeat_interleave(n)
        kernel = torch.zeros(GRID_SIZE, GRID_SIZE)
        for cell, weight in ((low, 1 - (position - low)), (low + 1, position - low)):
            kernel.index_put_((rows, cell), weight / n, accumulate=True)
        matrix = matrix @ kernel
    return matrix.double().numpy()


def test_composite_steps_across_a_barrier(cut: FullGrid) -> None:
    """Moments of rollouts against powers of the matrix of one composite step."""
    step = Rollout([Interpolate(), Propagate(50)], step_lag=100, solver=DPMSolver(12))
    n_int, n, n_steps = 120.0, 4000, 4
    x_0 = torch.full((n, 1), float(cut.unbiased.grid[150]))
    with torch.no_grad():
        matrix = composite_matrix(cut, step, n_int)
        other = composite_matrix(cut, step, 1.4 * n_int)
        normal = Normal(as_generator(0, CPU))
        frames = list(step.frames(cut.model, x_0, torch.tensor(n_int), n_steps, normal))
    grid = cut.unbiased.grid
    density = np.eye(GRID_SIZE)[150]
    for x in frames:
        density = density @ matrix
        right = float((x > 0).double().mean())
        exact = density[grid > 0].sum()
        assert abs(right - exact) < 4 * math.sqrt(exact * (1 - exact) / n)
        mean, second = density @ grid, density @ grid**2
        assert abs(float(x.double().mean()) - mean) < 4 * math.sqrt((second - mean**2) / n)
    assert 0.5 < exact < 0.95  # it has begun to cross the barrier
    wrong = np.linalg.matrix_power(other, n_steps)[150, grid > 0].sum()
    assert abs(right - wrong) > 4 * math.sqrt(wrong * (1 - wrong) / n)
    without = Rollout([Propagate(50)], step_lag=50, solver=DPMSolver(12))
    *_, x = without.frames(cut.model, x_0[:500], INF, 4, normal)
    assert bool((x > 0).all())


def test_relaxation_repairs_the_stationary_density(cut: FullGrid) -> None:
    """Both composite steps relax at a finite rate; only the relaxed one keeps mu (to 3 %)."""
    mu = cut.unbiased.stationary * cut.unbiased.spacing
    found = {}
    for name, moves in (
        ("interpolate", [Interpolate()]),
        ("relaxed", [Interpolate(), Propagate(50)]),
    ):
        step = Rollout(moves, step_lag=100, solver=DPMSolver(16))
        with torch.no_grad():
            matrix = composite_matrix(cut, step, 150.0)
        density = mu @ np.linalg.matrix_power(matrix, 60)
        found[name] = 0.5 * np.abs(density - mu).sum()
    assert found["relaxed"] < 0.05
    assert found["interpolate"] > 0.1


@pytest.mark.parametrize(
    "step",
    [
        Rollout([Interpolate(), Propagate(20)], step_lag=100),
        Rollout([Propagate(share=0.5), Renoise(), Propagate(20)], step_lag=100),
    ],
    ids=repr,
)
def test_each_replica_has_its_own_n_int(cut: FullGrid, step: Rollout) -> None:
    x_0 = torch.linspace(-1, 1, 30)[:, None]
    n_int = torch.tensor([30.0, 90.0, math.inf])

    def run(x_0: Tensor, n_int: Tensor, copies: int) -> Tensor:
        normal = Normal(as_generator(4, CPU), copies=copies)
        return torch.stack(list(step.frames(cut.model, x_0, n_int, 3, normal)))

    together = run(x_0.repeat(3, 1), n_int.repeat_interleave(30), 3)
    for i in range(3):
        alone = run(x_0, n_int[i], 1)
        error = (together[:, 30 * i : 30 * (i + 1)] - alone).abs()
        assert float(error.median()) < 1e-5
        assert float(error.max()) < 1e-2
    assert float((together[:, :30] - together[:, 30:60]).abs().max()) > 0.05


def test_normal_numbers_are_mirrored_and_copied() -> None:
    like = torch.zeros(24, 2, 3)
    z = Normal(as_generator(0, CPU), antithetic=True, copies=3)(like)
    assert z.shape == like.shape
    for copy in z.split(8):
        assert torch.equal(copy, z[:8])
    assert torch.equal(z[4:8], -z[:4])
    assert z[:4].unique().numel() == z[:4].numel()
    plain = Normal(as_generator(0, CPU))
    first, second = plain(like), plain(like)
    assert first.unique().numel() == first.numel()
    assert not torch.equal(first, second)
    many = plain(torch.zeros(200_000, 1)).double()
    assert abs(float(many.mean())) < 4 / math.sqrt(200_000)
    assert abs(float(many.var()) - 1) < 4 * math.sqrt(2 / 200_000)


@pytest.mark.parametrize("settings", [{"copies": 4}, {"antithetic": True}])
def test_batches_that_cannot_be_shared_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="a batch of 7 cannot be split"):
        Normal(as_generator(0, CPU), **settings)(torch.zeros(7, 1))


@pytest.mark.parametrize("solver", [DPMSolver(6), Ancestral(6)], ids=repr)
def test_the_same_seed_gives_the_same_noise_at_every_n_int(
    cut: FullGrid, solver: DPMSolver | Ancestral
) -> None:
    class Recorded(Normal):
        def __call__(self, like: Tensor) -> Tensor:
            drawn.append(super().__call__(like))
            return drawn[-1]

    step = Rollout([Interpolate(), Propagate(50)], 100, solver)
    x_0, runs = torch.zeros(5, 1), []
    for n_int in (60.0, 200.0):
        drawn: list[Tensor] = []
        normal = Recorded(as_generator(1, CPU))
        list(step.frames(cut.model, x_0, torch.tensor(n_int), 2, normal))
        runs.append(torch.stack(drawn))
    assert len(runs[0]) == 4 * (1 if isinstance(solver, DPMSolver) else 6)
    assert torch.equal(*runs)


def test_propagate_beyond_lag_max_is_refused(full: FullGrid) -> None:
    step = Rollout([Propagate(51)], 100)
    with pytest.raises(
        ValueError, match=r"lag of Propagate must be at most lag_max \(50\), got 51"
    ):
        step.step(full.model, torch.zeros(2, 1), INF, quantiles)


def test_interpolate_needs_an_interpolator(full: FullGrid) -> None:
    step = Rollout([Interpolate()], 100)
    with pytest.raises(ValueError, match=r"model must be an Interpolator .* got BoPITOScore"):
        step.step(full.model.bopito, torch.zeros(2, 1), INF, quantiles)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interpolate(0.0), "n_int must be above zero"),
        (lambda: Interpolate(math.nan), "n_int must be above zero"),
        (lambda: Propagate(0), "lag must be a positive number"),
        (lambda: Propagate(math.inf), "lag must be a positive number"),
        (lambda: Rollout([], 100), "moves must hold at least one move"),
        (lambda: Rollout([Interpolate()], 0), "step_lag must be a whole number"),
    ],
)
def test_bad_input_is_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.gpu
def test_rollout_on_cuda() -> None:
    step = Rollout([Interpolate(), Propagate(50)], 100)
    x_0 = torch.linspace(-1, 1, 400)[:, None]

    def run(device: str) -> Tensor:
        normal = Normal(as_generator(0, CPU))
        model, n_int = FullGrid(barrier=0.0).model.to(device), torch.tensor(120.0, device=device)
        steps = step.frames(
            model, x_0.to(device), n_int, 2, lambda like: normal(like.cpu()).to(device)
        )
        return torch.stack(list(steps)).cpu()

    error = (run("cuda") - run("cpu")).abs()
    assert float(error.median()) < 1e-4
    assert float(error.quantile(0.98)) < 1e-2
