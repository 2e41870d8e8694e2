import numpy as np
import pytest
import torch

from bopito_inverse.simulate import langevin, mbar, tempering, umbrella
from bopito_inverse.systems import DoubleWell, OrnsteinUhlenbeck, Potential1D


def system() -> OrnsteinUhlenbeck:
    return OrnsteinUhlenbeck(stiffness=1.0, kT=2.0, time_step=2e-3, steps_per_frame=100)


def test_windows_of_a_harmonic_well_are_gaussian() -> None:
    centers, k, n_walkers = np.array([-2.0, 0.0, 1.5]), np.array([3.0, 6.0, 10.0]), 500
    biased = umbrella(system(), centers, k, n_frames=4 * n_walkers, n_walkers=n_walkers)
    assert tuple(biased.frames.shape) == (3, 2000, 1)
    x = biased.frames.double().view(3, n_walkers, 4)[:, :, -1].numpy()
    mean, variance = k * centers / (1 + k), 2.0 / (1 + k)
    variance = variance / (1 - 0.5 * (1 + k) * 2e-3)  # of Euler-Maruyama
    assert np.abs((x.mean(1) - mean) / np.sqrt(variance / n_walkers)).max() < 4
    assert np.abs((x.var(1, ddof=1) / variance - 1) / np.sqrt(2 / n_walkers)).max() < 4


def test_reduced_bias_is_that_of_every_frame_in_every_window() -> None:
    biased = umbrella(system(), [-1.0, 1.0], [3.0, 5.0], n_frames=6, n_walkers=2, burn_in=0)
    x = biased.frames_flat[:, 0].double()
    for k, (center, stiffness) in enumerate([(-1.0, 3.0), (1.0, 5.0)]):
        expected = 0.5 * stiffness * (x - center) ** 2 / 2.0
        assert torch.allclose(biased.reduced_bias[k], expected)
    assert torch.equal(biased.frames_flat[6:], biased.frames[1])


def test_same_seed_same_samples() -> None:
    first, again, other = (
        umbrella(system(), [-1.0, 1.0], 3.0, n_frames=20, burn_in=0, seed=s) for s in (4, 4, 5)
    )
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centers": []}, "centers must be"),
        ({"centers": [0.0, np.inf]}, "centers must be"),
        ({"stiffness": [1.0, 2.0, 3.0]}, "one for each of 2 windows"),
        ({"stiffness": -1.0}, "stiffness must be positive"),
        ({"stiffness": 1e3}, "stiffness must be at most 50 with time_step 0.002, got 1000"),
        ({"n_frames": 7}, r"n_frames must be a multiple of n_walkers \(3\), got 7"),
        ({"burn_in": -1}, "burn_in must be a whole number of at least 0"),
    ],
)
def test_bad_windows_are_refused(change: dict, message: str) -> None:
    arguments = {"centers": [-1.0, 1.0], "stiffness": 3.0, "n_frames": 6, "n_walkers": 3}
    with pytest.raises(ValueError, match=message):
        umbrella(system(), **(arguments | change))


def test_stride_keeps_every_so_many_frames() -> None:
    options = {"centers": [0.0, 0.5], "stiffness": 5.0, "seed": 3, "n_walkers": 4, "burn_in": 2}
    every = umbrella(OrnsteinUhlenbeck(), n_frames=48, **options)
    third = umbrella(OrnsteinUhlenbeck(), n_frames=16, stride=3, **options)
    kept = every.frames.unflatten(1, (4, 12))[:, :, 2::3].flatten(1, 2)
    assert torch.equal(third.frames, kept)


LADDER = np.geomspace(1.0, 5.0, 6)


def high_barrier() -> DoubleWell:
    """Barrier of 8 kT: no walker crosses it within these tests, unless it is hot."""
    return DoubleWell(a=8.0, b=0.5, time_step=5e-4, steps_per_frame=100)


def boltzmann(system: Potential1D, kT: float, x: np.ndarray) -> np.ndarray:
    """Distribution function of exp(-U / kT) at x."""
    low, high = system.bounds
    grid = np.linspace(low - 1, high + 1, 8001)
    cumulative = np.cumsum(np.exp(-system.energy(grid) / kT))
    return np.interp(x, grid, cumulative / cumulative[-1])


def test_tempering_and_mbar_give_the_boltzmann_density() -> None:
    system = high_barrier()
    biased = tempering(system, LADDER, n_frames=20_000, n_walkers=100, burn_in=200, seed=1)
    result = mbar(biased)
    assert result.status == "ok"
    x, order = biased.frames_flat[:, 0].double().sort()
    distribution = result.weights[order].cumsum(0).numpy()
    exact = boltzmann(system, system.kT, x.numpy())
    assert np.abs(distribution - exact).max() < 0.03  # the seeds differ by 0.01
    plain = np.arange(1, len(x) + 1) / len(x)
    assert np.abs(plain - exact).max() > 0.1
    crossed = 1 - boltzmann(system, system.kT, np.zeros(1))[0]
    cold = langevin(system, torch.full((100, 1), -1.0), 401).frames
    assert float((cold > 0).double().mean()) < 0.5 * crossed


def test_each_temperature_samples_its_own_density() -> None:
    system = high_barrier()
    biased = tempering(system, LADDER, n_frames=10_000, n_walkers=1000, burn_in=300, seed=2)
    x = biased.frames[..., 0].double().sort(1).values.numpy()
    level = (np.arange(10_000) + 0.5) / 10_000
    for kT, window in zip(LADDER, x, strict=True):
        assert np.abs(boltzmann(system, kT, window) - level).max() < 1.95 / np.sqrt(2000)
    assert np.abs(boltzmann(system, LADDER[1], x[0]) - level).max() > 1.95 / np.sqrt(2000)


def test_reduced_bias_of_a_temperature_is_that_of_every_frame() -> None:
    system = OrnsteinUhlenbeck(kT=2.0)
    biased = tempering(system, [1.5, 2.0, 3.0], n_frames=6, n_walkers=2, burn_in=0)
    assert tuple(biased.frames.shape) == (3, 6, 1)
    u = 0.5 * biased.frames_flat[:, 0].double() ** 2
    expected = torch.stack([u * (1 / kT - 1 / 2.0) for kT in (1.5, 2.0, 3.0)])
    assert torch.allclose(biased.reduced_bias, expected, atol=1e-6)
    assert (biased.kT, biased.n_walkers, biased.centers) == (2.0, 2, None)


def test_beyond_the_bounds_the_energy_is_that_of_the_force() -> None:
    system = OrnsteinUhlenbeck(stiffness=1.0)
    narrow = Potential1D(lambda x: 0.5 * x**2, bounds=(-1, 1), time_step=1e-3, steps_per_frame=50)
    options = {"kT": [1.0, 2.0], "n_frames": 200, "burn_in": 20}
    biased, same = (tempering(s, **options) for s in (narrow, system))
    assert float(biased.frames.abs().max()) > 2
    assert torch.allclose(biased.frames, same.frames, atol=1e-3)
    assert torch.allclose(biased.reduced_bias, same.reduced_bias, atol=1e-2)


def test_one_temperature_is_langevin_dynamics_at_it() -> None:
    biased = tempering(system(), [0.5], n_frames=4000, n_walkers=4000, burn_in=30)
    expected = 0.5 / (1 - 0.5 * 2e-3)
    assert float(biased.frames.var()) / expected == pytest.approx(1, abs=4 * np.sqrt(2 / 4000))


def test_tempering_same_seed_same_samples() -> None:
    first, again, other = (
        tempering(system(), [2.0, 3.0], n_frames=40, burn_in=2, seed=s) for s in (4, 4, 5)
    )
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, other.frames)


def test_tempering_starts_and_stride() -> None:
    options = {"kT": [1.0, 1.5], "n_walkers": 4, "burn_in": 0, "seed": 3}
    starts = torch.tensor([[-1.0], [0.0], [1.0], [2.0]])
    every = tempering(high_barrier(), n_frames=24, starts=starts, **options)
    other = tempering(high_barrier(), n_frames=8, starts=starts, stride=3, **options)
    kept = every.frames.unflatten(1, (4, 6))[:, :, 2::3].flatten(1, 2)
    assert torch.equal(other.frames, kept)
    one = tempering(high_barrier(), n_frames=4, **options)
    assert bool((one.frames < -0.5).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kT": []}, "kT must be a list of at least one positive number"),
        ({"kT": 1.0}, "kT must be a list of at least one positive number, got 1.0"),
        ({"kT": [0.0, 1.0]}, "kT must hold positive numbers that increase"),
        ({"kT": [1.0, 1.0]}, r"numbers that increase, got \[1.0, 1.0\]"),
        ({"kT": [2.0, 1.0]}, "numbers that increase"),
        ({"kT": [1.0, np.nan]}, "numbers that increase"),
        ({"n_frames": 7}, r"n_frames must be a multiple of n_walkers \(3\), got 7"),
        ({"stride": 0}, "stride must be a whole number of at least 1"),
        ({"starts": torch.zeros(2, 1)}, "starts must hold one frame for each of 3 walkers, got 2"),
        ({"starts": torch.zeros(3, 2)}, r"starts must hold frames of shape \(1,\)"),
    ],
)
def test_bad_ladders_are_refused(change: dict, message: str) -> None:
    arguments = {"kT": [1.0, 2.0], "n_frames": 6, "n_walkers": 3}
    with pytest.raises(ValueError, match=message):
        tempering(system(), **(arguments | change))
