import subprocess
import sys

import numpy as np
import pytest
import torch

from bopito_inverse.datasets import Frames
from bopito_inverse.simulate import BiasedSamples, mbar, mbar_weights, umbrella
from bopito_inverse.systems import DoubleWell, OrnsteinUhlenbeck

CENTERS, STIFFNESS = np.linspace(-2.5, 2.5, 7), 3.0


def gaussian_windows(seed: int, n_frames: int, correlation: float = 0.0) -> BiasedSamples:
    """Exact samples of harmonic windows on U = x^2 / 2, kT = 1, correlated from frame to frame."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((len(CENTERS), n_frames))
    for i in range(1, n_frames):
        fresh = np.sqrt(1 - correlation**2) * noise[:, i]
        noise[:, i] = correlation * noise[:, i - 1] + fresh
    x = (STIFFNESS * CENTERS[:, None]) / (1 + STIFFNESS) + noise / np.sqrt(1 + STIFFNESS)
    bias = 0.5 * STIFFNESS * (x.ravel() - CENTERS[:, None]) ** 2
    return BiasedSamples(torch.from_numpy(x)[..., None], torch.from_numpy(bias))


def exact_free_energies() -> np.ndarray:
    """-log E[exp(-k (x - c)^2 / 2)] for x ~ N(0, 1)."""
    return 0.5 * np.log(1 + STIFFNESS) + 0.5 * STIFFNESS / (1 + STIFFNESS) * CENTERS**2


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_free_energies_and_their_errors(correlation: float) -> None:
    z, inefficiency = [], []
    for seed in range(12):
        result = mbar(gaussian_windows(seed, 1000, correlation))
        error = result.free_energies.numpy() - exact_free_energies()
        z.append(error / result.free_energy_errors.numpy())
        inefficiency.append(result.statistical_inefficiency.numpy())
    assert np.abs(z).max() < 4
    assert 0.6 < np.sqrt(np.mean(np.square(z))) < 1.4
    expected = (1 + correlation) / (1 - correlation)
    assert np.mean(inefficiency) == pytest.approx(expected, rel=0.25)


def test_overlap_of_two_windows_against_quadrature() -> None:
    result = mbar(gaussian_windows(0, 5000))
    x = np.linspace(-8, 8, 20001)
    means = STIFFNESS * CENTERS / (1 + STIFFNESS)
    sd = 1 / np.sqrt(1 + STIFFNESS)
    p = np.exp(-0.5 * ((x - means[:, None]) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))
    exact = (p[:, None] * p / np.maximum(p[:, None] + p, 1e-300)).sum(-1) * (x[1] - x[0])
    assert np.allclose(result.overlap, exact, atol=0.02)
    assert result.smallest_overlap == pytest.approx(exact[0, 1], abs=0.02)
    assert result.status == "ok"


def kolmogorov_smirnov(system: DoubleWell, x: np.ndarray, weights: np.ndarray) -> float:
    grid = np.linspace(*system.bounds, 4001)
    density = np.exp(-system.energy(grid) / system.kT)
    cumulative = np.cumsum(density) / density.sum()
    order = np.argsort(x)
    return np.abs(np.cumsum(weights[order]) - np.interp(x[order], grid, cumulative)).max()


def test_umbrella_and_mbar_give_the_boltzmann_density() -> None:
    system = DoubleWell(a=5.0, b=1.0, time_step=2e-4, steps_per_frame=250)
    centers = np.linspace(-1.5, 1.5, 11)
    biased = umbrella(system, centers, 25.0, n_frames=4000, n_walkers=200, burn_in=10)
    result = mbar(biased)
    weights = mbar_weights(biased).numpy()
    assert result.status == "ok"
    assert np.array_equal(weights, result.weights.numpy())
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    x = biased.frames_flat[:, 0].double().numpy()
    distance = kolmogorov_smirnov(system, x, weights)
    population = weights[x > 0].sum()  # its error is that of the free energy across the barrier
    error = population * (1 - population) * float(result.free_energy_errors.max())
    assert distance < 1.95 / np.sqrt(result.ess) + 3 * error
    assert distance < 0.025
    assert kolmogorov_smirnov(system, x, np.full(len(x), 1 / len(x))) > 0.1
    assert result.ess <= Frames(biased.frames_flat, result.weights).ess


def test_order_of_the_windows_does_not_matter() -> None:
    biased = gaussian_windows(0, 300)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    columns = torch.arange(7 * 300).view(7, 300)[order].flatten()
    shuffled = BiasedSamples(biased.frames[order], biased.reduced_bias[order][:, columns])
    ordered, other = mbar(biased), mbar(shuffled)
    assert other.status == "ok"
    assert torch.allclose(ordered.free_energies[order], other.free_energies, atol=0.05)


def far_windows() -> BiasedSamples:
    system = OrnsteinUhlenbeck(time_step=1e-3, steps_per_frame=20)
    return umbrella(system, [-2.0, -1.6, 2.0], 50.0, n_frames=400, burn_in=10)


def test_poor_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match=r"windows 1 and 2 is .*, below 0\.03; add windows"):
        mbar_weights(far_windows())
    assert "windows 1 and 2" in mbar(far_windows()).status
    with pytest.raises(ValueError, match=r"below 0\.4; add windows between them or lower"):
        mbar_weights(gaussian_windows(0, 500), min_overlap=0.4)
    with pytest.raises(ValueError, match=r"min_overlap must be in \[0, 0.5\), got 0.5"):
        mbar(gaussian_windows(0, 500), min_overlap=0.5)


def test_few_effective_frames_are_refused() -> None:
    rng = np.random.default_rng(0)
    x = 6 + 0.5 * rng.standard_normal((1, 1000))
    bias = -0.5 * x**2 + 0.5 * (x - 6) ** 2 / 0.25
    biased = BiasedSamples(torch.from_numpy(x)[..., None], torch.from_numpy(bias))
    with pytest.raises(ValueError, match=r"worth only \d+ independent ones, below 50"):
        mbar_weights(biased)


def test_numpy_global_random_state_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    mbar(gaussian_windows(0, 100))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


SCRIPT = """
import logging, warnings
import torch
import numpy, scipy.stats  # they add filters of their own
handlers, level = list(logging.root.handlers), logging.root.level
filters = list(warnings.filters)
from bopito_inverse.simulate import BiasedSamples, mbar
torch.manual_seed(0)
x = torch.randn(3, 200, 1, dtype=torch.float64) * 0.7
bias = 0.5 * (x.flatten() - torch.tensor([-0.5, 0.0, 0.5])[:, None]) ** 2
assert mbar(BiasedSamples(x, bias)).status
assert logging.root.handlers == handlers and logging.root.level == level
assert logging.getLogger("pymbar").level == logging.NOTSET
assert logging.getLogger("pymbar").isEnabledFor(logging.WARNING)
assert not logging.getLogger("pymbar").handlers
assert warnings.filters == filters
"""


def test_pymbar_is_silent_and_leaves_logging_as_it_was() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout + run.stderr == ""
    loud = subprocess.run(
        [sys.executable, "-c", "import pymbar"], capture_output=True, text=True, check=True
    )
    assert loud.stderr != "", "pymbar is silent by itself, this test cannot fail"
