import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest

from bopito_inverse.simulate import langevin
from bopito_inverse.systems import DoubleWell, OrnsteinUhlenbeck, Potential1D, Prinz


def discrete_decay(system: OrnsteinUhlenbeck, n_frames: int) -> np.ndarray:
    """E[x(k)] / x(0) of Euler-Maruyama, whose moments are known without time-step error."""
    per_step = 1 - system.stiffness * system.time_step / system.friction
    return per_step ** (system.steps_per_frame * np.arange(n_frames))


def test_ornstein_uhlenbeck_mean_and_variance() -> None:
    system = OrnsteinUhlenbeck(
        stiffness=2, kT=1.5, friction=0.7, time_step=1e-2, steps_per_frame=13
    )
    n, start = 20_000, 1.3
    x = torch.stack(list(langevin(system, torch.full((n, 1), start), 12, seed=1)))[:, :, 0].double()
    decay = discrete_decay(system, 12)
    stationary = system.kT / system.stiffness / (1 - 0.5 * 2 * 1e-2 / 0.7)
    variance = stationary * (1 - decay**2)
    assert torch.equal(x[:, 0], torch.full((n,), start).float().double())
    z_mean = (x.mean(0)[1:].numpy() - start * decay[1:]) / np.sqrt(variance[1:] / n)
    z_variance = (x.var(0)[1:].numpy() / variance[1:] - 1) / np.sqrt(2 / n)
    assert np.abs(z_mean).max() < 4
    assert np.abs(z_variance).max() < 4
    assert np.allclose(decay[1:], system.decay ** np.arange(1, 12), atol=0.02)
    wrong = (x.mean(0)[1:].numpy() - start * decay[1:] ** 1.1) / np.sqrt(variance[1:] / n)
    assert np.abs(wrong).max() > 4


def test_bias_adds_its_force() -> None:
    system = OrnsteinUhlenbeck(stiffness=1, time_step=1e-2, steps_per_frame=100)
    x_0 = torch.zeros(20_000, 1)
    shifted = langevin(system, x_0, 12, bias=lambda x: torch.full_like(x, 0.5)).frames
    x = shifted.view(20_000, 12)[:, -1].double()
    assert abs(float(x.mean()) - 0.5) < 4 / np.sqrt(20_000)


def boltzmann_cdf(system: Potential1D, low: float, high: float, x: np.ndarray) -> np.ndarray:
    grid = np.linspace(low, high, 4001)
    density = np.exp(-system.energy(grid) / system.kT)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.interp(x, grid, cumulative / cumulative[-1])


@pytest.mark.parametrize("side", [-1, 1])
def test_barrier_keeps_each_side_and_its_density(side: int) -> None:
    system = DoubleWell(a=1.0, b=0.5, time_step=1e-4, steps_per_frame=400)
    barrier, n = 0.3, 4000
    x_0 = torch.full((n, 1), barrier + side * 0.5)
    x = langevin(system, x_0, 60, seed=3, barrier=barrier).frames.view(n, 60)
    assert bool(((x > barrier) == (side > 0)).all())
    low, high = (barrier, system.bounds[1]) if side > 0 else (system.bounds[0], barrier)
    final = x[:, -1].double().numpy()
    assert kstest(final, lambda y: boltzmann_cdf(system, low, high, y)).pvalue > 1e-3
    free = langevin(system, x_0, 60, seed=3).frames.view(n, 60)
    assert bool(((free > barrier) != (side > 0)).any())


def test_stationary_density_of_prinz() -> None:
    system, n = Prinz(), 4000
    low, high = system.bounds
    grid = np.linspace(low, high, 4001)
    u = (np.arange(n) + 0.5) / n
    x_0 = np.interp(u, boltzmann_cdf(system, low, high, grid), grid)[:, None]
    x = langevin(system, x_0, 6).frames.view(n, 6)[:, -1].double().numpy()
    assert kstest(x, lambda y: boltzmann_cdf(system, low, high, y)).pvalue > 1e-3


def test_table_force_is_the_derivative() -> None:
    system = DoubleWell(a=3.0, b=0.7)
    x = torch.linspace(-1.4, 1.4, 1001)
    exact = -(4 * 3 * x * (x**2 - 1) + 0.7)
    assert torch.allclose(system.force(x), exact, atol=2e-4)
    work, _ = quad(lambda y: float(system.force(torch.tensor(y))), -1.0, 0.5, limit=200)
    energies = system.energy(np.array([-1.0, 0.5]))
    assert work == pytest.approx(energies[0] - energies[1], abs=1e-3)


def test_same_seed_same_trajectories_whatever_the_threads() -> None:
    system = OrnsteinUhlenbeck(steps_per_frame=7)
    x_0 = torch.zeros(40_000, 1)
    first = langevin(system, x_0, 3, seed=5).frames
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(first, langevin(system, x_0, 3, seed=5).frames)
    finally:
        torch.set_num_threads(threads)
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    again = [langevin(system, x_0[:50], 3, seed=g).frames for g in generators]
    assert torch.equal(*again)
    last = first.view(40_000, 3)[:, -1]
    assert not torch.equal(first, langevin(system, x_0, 3, seed=6).frames)
    assert len(last.unique()) > 39_000, "chunks share random numbers"


def test_shape_and_metadata() -> None:
    system = Prinz()
    trajectories = langevin(system, [[0.0], [0.5]], 3)
    assert trajectories.lengths.tolist() == [3, 3]
    assert trajectories.frame_time == pytest.approx(0.005)
    assert trajectories.system == "Prinz"


def test_progress_bar_is_shown_on_request(capsys) -> None:
    langevin(OrnsteinUhlenbeck(), torch.zeros(2, 1), 3)
    assert capsys.readouterr().out == ""
    langevin(OrnsteinUhlenbeck(), torch.zeros(2, 1), 3, progress=True)
    assert "100%" in capsys.readouterr().out


def test_bad_input_is_refused() -> None:
    system = OrnsteinUhlenbeck()
    with pytest.raises(ValueError, match=r"x_0 must hold frames of shape \(1,\), got \(2,\)"):
        langevin(system, torch.zeros(3, 2), 5)
    with pytest.raises(ValueError, match="x_0 must be finite"):
        langevin(system, [[0.0], [np.nan]], 5)
    with pytest.raises(ValueError, match="n_frames must be a whole number of at least 2"):
        langevin(system, torch.zeros(3, 1), 1)
    with pytest.raises(ValueError, match="barrier must be a finite position, got nan"):
        langevin(system, torch.zeros(3, 1), 5, barrier=float("nan"))
    stiff = OrnsteinUhlenbeck(stiffness=1e4, time_step=1e-3, steps_per_frame=100)
    with pytest.raises(ValueError, match=r"3 of 3 trajectories .* time_step below 0\.001"):
        langevin(stiff, torch.ones(3, 1), 5)


@pytest.mark.gpu
def test_cuda_agrees_with_cpu_in_distribution() -> None:
    system = DoubleWell(a=1.0)
    moments = []
    for device in ("cpu", "cuda"):
        x = langevin(system, torch.zeros(20_000, 1), 20, device=device).frames
        moments.append(x.view(20_000, 20)[:, -1].double().cpu())
    error = (moments[0].var() / 20_000 * 2).sqrt()
    assert abs(moments[0].mean() - moments[1].mean()) < 4 * error
