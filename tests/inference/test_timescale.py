import numpy as np
import pytest
import torch

from bopito_inverse.inference.timescale import second_eigenvalue
from bopito_inverse.observables.relaxation import timescale


def ar1(decay: float, n_steps: int, n: int, seed: int) -> torch.Tensor:
    """Stationary AR(1) series (1, n_steps + 1, n) of unit variance."""
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(n, generator=g)]
    for _ in range(n_steps):
        x.append(decay * x[-1] + (1 - decay**2) ** 0.5 * torch.randn(n, generator=g))
    return torch.stack(x)[None]


@pytest.mark.parametrize("decay", [0.2, 0.6, 0.9])
def test_eigenvalue_of_a_gaussian_process(decay: float) -> None:
    value, influence = second_eigenvalue(ar1(decay, 10, 4000, seed=1))
    error = float(influence.square().mean().sqrt()) / 4000**0.5
    assert abs(float(value) - decay) < 4 * error + 0.01  # hat functions cost up to 0.01
    assert error < 0.01


def test_reported_error_is_the_spread_over_repetitions() -> None:
    values, errors = [], []
    for seed in range(60):
        value, influence = second_eigenvalue(ar1(0.6, 5, 500, seed))
        values.append(float(value))
        errors.append(float(influence.square().mean().sqrt()) / 500**0.5)
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.3)


def test_groups_average_dependent_replicas() -> None:
    series = ar1(0.6, 5, 400, seed=3)
    value, influence = second_eigenvalue(series)
    twice, grouped = second_eigenvalue(torch.cat([series, series], dim=2), groups=2)
    assert float(twice) == pytest.approx(float(value), abs=1e-9)
    torch.testing.assert_close(grouped, influence, atol=1e-6, rtol=1e-6)


def test_independent_frames_have_no_timescale() -> None:
    value, _ = second_eigenvalue(ar1(0.0, 5, 4000, seed=4))
    assert abs(float(value)) < 0.05


def test_two_states_that_never_mix_have_eigenvalue_one() -> None:
    side = torch.tensor([-1.0, 1.0]).repeat(200)
    noise = 0.1 * torch.randn(1, 6, 400, generator=torch.Generator().manual_seed(5))
    value, _ = second_eigenvalue(side + noise)
    assert float(value) == pytest.approx(1.0, abs=1e-3)


def test_a_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="obs must vary"):
        second_eigenvalue(torch.ones(1, 4, 10))


def test_timescale_limits() -> None:
    eigenvalue = torch.tensor([-0.1, 0.0, np.exp(-0.5), 1.0], dtype=torch.float64)
    assert timescale(eigenvalue, 100).tolist() == [0.0, 0.0, pytest.approx(200.0), float("inf")]


def test_weights_are_those_of_a_repeated_replica() -> None:
    """Each replica twice, once with all the weight: as if it were there once."""
    series = ar1(0.6, 5, 400, seed=3)
    other = ar1(0.9, 5, 400, seed=4).sort(dim=2).values[:, :, series[0, 0].argsort().argsort()]
    both = torch.cat([series, other], dim=2)
    weights = torch.tensor([2.0, 0.0]).repeat_interleave(400)
    value, influence = second_eigenvalue(both, weights=weights)
    alone, _ = second_eigenvalue(series)
    assert float(value) == pytest.approx(float(alone), abs=0.01)  # other knots
    assert float(second_eigenvalue(both)[0]) > float(alone) + 0.05
    assert (influence[400:] - influence[400]).abs().max() < 1e-9  # they add nothing
