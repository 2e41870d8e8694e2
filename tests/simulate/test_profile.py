from functools import cache

import numpy as np
import pytest
import torch

from bopito_inverse.simulate import BiasedSamples, free_energy_profile, mbar, tempering, umbrella
from bopito_inverse.systems import DoubleWell

EDGES = np.linspace(-1.4, 1.4, 15)


def double_well() -> DoubleWell:
    return DoubleWell(a=5.0, b=1.0, time_step=1e-3, steps_per_frame=50)


def exact_profile(system: DoubleWell) -> np.ndarray:
    grid = np.linspace(*system.bounds, 40_001)
    density = np.exp(-system.energy(grid) / system.kT)
    probability = np.histogram(grid, EDGES, weights=density / density.sum())[0]
    return -np.log(probability / np.diff(EDGES))


SEEDS, WALKERS, FRAMES = 12, 20, 100


@cache
def soft_windows() -> list[BiasedSamples]:
    """Windows that span the barrier, where a walker crosses about once; independent samples."""
    centers, k = np.linspace(-1.3, 1.3, 5), np.full(5, 4.0)
    n_walkers = SEEDS * WALKERS
    biased = umbrella(
        double_well(), centers, k, n_frames=n_walkers * FRAMES, n_walkers=n_walkers, burn_in=250
    )
    parts = biased.frames.unflatten(1, (SEEDS, -1)).unbind(1)
    return [BiasedSamples.harmonic(x, centers, k, n_walkers=WALKERS) for x in parts]


def ladders() -> list[BiasedSamples]:
    kT = torch.tensor([1.0, 1.5, 2.3, 3.5])
    n_walkers = SEEDS * WALKERS
    biased = tempering(
        double_well(), kT.numpy(), n_walkers * FRAMES, n_walkers=n_walkers, burn_in=250
    )
    energies = biased.form["energies"].view(4, SEEDS, -1)
    parts = biased.frames.unflatten(1, (SEEDS, -1))
    return [
        BiasedSamples.thermal(parts[:, i], kT, energies[:, i].flatten(), n_walkers=WALKERS)
        for i in range(SEEDS)
    ]


@pytest.mark.parametrize("sample", [soft_windows, ladders])
def test_errors_of_the_profile_and_of_populations_hold(sample) -> None:
    exact, z, population = exact_profile(double_well()), [], []
    for biased in sample():
        x = biased.frames_flat[:, 0]
        profile = free_energy_profile(biased, x, EDGES)
        assert profile.status == "ok"
        z.append((profile.free_energy - exact) / profile.error)
        half = free_energy_profile(biased, x, [0.0, 3.0])
        population.append((half.free_energy - exact_half()) / half.error)
    assert np.isfinite(z).all()
    assert np.abs(z).max() < 5
    assert 0.75 < np.sqrt(np.mean(np.square(z))) < 1.3
    assert 0.5 < np.sqrt(np.mean(np.square(population))) < 1.6


def exact_half() -> float:
    system = double_well()
    grid = np.linspace(*system.bounds, 40_001)
    density = np.exp(-system.energy(grid) / system.kT)
    return -np.log(density[grid > 0].sum() / density.sum() / 3.0)


def test_errors_that_ignore_the_walkers_do_not_hold() -> None:
    exact, z = exact_profile(double_well()), []
    for biased in soft_windows():
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(biased.n_frames, generator=generator)
        c, k = biased.centers, biased.stiffness
        mixed = BiasedSamples.harmonic(biased.frames[:, order], c, k, n_walkers=WALKERS)
        profile = free_energy_profile(mixed, mixed.frames_flat[:, 0], EDGES)
        z.append((profile.free_energy - exact) / profile.error)
    assert np.sqrt(np.mean(np.square(z))) > 2


def unbiased(n: int = 4000) -> BiasedSamples:
    x = torch.rand(1, n, 1, generator=torch.Generator().manual_seed(0))
    return BiasedSamples(x, torch.zeros(1, n), n_walkers=20)


def test_profile_of_an_unbiased_sample_is_its_histogram_with_binomial_errors() -> None:
    biased = unbiased()
    x = biased.frames_flat[:, 0].double().numpy()
    profile = free_energy_profile(biased, x, [0.0, 0.1, 0.4, 1.0, 2.0])
    count = np.histogram(x, profile.edges)[0]
    expected = -np.log(count[:3] / 4000 / np.array([0.1, 0.3, 0.6]))
    assert np.allclose(profile.free_energy[:3], expected, atol=1e-12)
    binomial = np.sqrt((1 - count[:3] / 4000) / count[:3])
    assert np.allclose(profile.error[:3], binomial, rtol=0.6)  # of 20 blocks
    assert profile.free_energy[3] == profile.error[3] == np.inf
    assert np.allclose(profile.centers, [0.05, 0.25, 0.7, 1.5])


def test_values_are_wrapped_into_the_period() -> None:
    biased = unbiased()
    x = biased.frames_flat[:, 0].double()
    plain = free_energy_profile(biased, x, [0.25, 0.5, 1.0])
    turned = free_energy_profile(biased, x - 3, [0.25, 0.5, 1.0, 1.25], period=1.0)
    assert np.allclose(turned.free_energy[:2], plain.free_energy)
    assert np.exp(-turned.free_energy) @ np.diff(turned.edges) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(3)}, r"values must be 4000 finite numbers, got shape \(3,\)"),
        ({"edges": [0.0]}, "edges must be at least two increasing numbers"),
        ({"edges": [0.0, 1.0, 1.0]}, "edges must be at least two increasing numbers"),
        ({"edges": [0.0, 1.1]}, r"edges must span one period \(1\) at most"),
    ],
)
def test_bad_profiles_are_refused(change: dict, message: str) -> None:
    arguments = {"values": torch.zeros(4000), "edges": [0.0, 1.0], "period": 1.0}
    with pytest.raises(ValueError, match=message):
        free_energy_profile(unbiased(), **(arguments | change))


def test_a_profile_says_where_windows_do_not_overlap() -> None:
    biased = umbrella(double_well(), [-1.5, 1.5], 40.0, n_frames=400, burn_in=10)
    profile = free_energy_profile(biased, biased.frames_flat[:, 0], EDGES)
    assert profile.status == mbar(biased).status != "ok"
