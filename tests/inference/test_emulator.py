"""The emulator on predictions that are known functions of n_int."""

import numpy as np
import pytest
import torch

from bopito_inverse.inference.emulator import Coordinate, Emulator
from bopito_inverse.inference.prediction import NodePredictions

LAG_MAX, LAMBDA_HAT = 50, 0.99
FAMILY = Coordinate(LAG_MAX, LAMBDA_HAT)
COLUMNS = np.arange(4)


class Known:
    """Decays with a kink at N_max, after one to three steps, and a second eigenvalue."""

    n_steps = 3

    def __init__(self, noise: float = 0.0, n: int = 40) -> None:
        rng = np.random.default_rng(0)
        self.noise = noise * rng.standard_normal((n, 2, 4))
        self.noise -= self.noise.mean(0)
        self.n_calls = 0

    def value(self, u: np.ndarray) -> np.ndarray:
        """The true outputs (K, 4)."""
        faster = 0.6 * u / (0.3 + u) + 0.2 * np.sin(3 * u)
        slower = faster.clip(max=1) * 0 + 0.6 / 1.3 + 0.2 * np.sin(3) + 0.15 * np.tanh(4 * (u - 1))
        first = np.where(u <= 1, faster, slower)
        return np.stack([first, first**2, first**3, first], axis=1)

    def at(self, n_int: torch.Tensor) -> NodePredictions:
        """Replicas whose contributions are linear in u, so that the truth of them is known."""
        self.n_calls += len(n_int)
        u = FAMILY.from_n_int(n_int.numpy())
        influence = self.noise[:, None, 0] + self.noise[:, None, 1] * u[:, None]
        return NodePredictions(torch.from_numpy(self.value(u)), torch.from_numpy(influence))


def missed(emulator: Emulator, u: np.ndarray) -> np.ndarray:
    """True error of the interpolation, (G, 4)."""
    made = emulator(np.repeat(u[:, None], 4, axis=1), COLUMNS)
    return made.mean - emulator.prediction.value(u)


def reported(emulator: Emulator, u: np.ndarray) -> np.ndarray:
    return np.abs(emulator(np.repeat(u[:, None], 4, axis=1), COLUMNS).error)


def grid(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 503)[1:-1]


@pytest.mark.parametrize("interval", [(0.0, FAMILY.high), (0.2, 0.7), (1.1, 1.6), (0.7, 1.3)])
def test_reported_error_covers_the_true_one(interval: tuple[float, float]) -> None:
    emulator, u = Emulator(Known(), FAMILY, interval, n_nodes=7), grid(*interval)
    true, said = np.abs(missed(emulator, u)), reported(emulator, u)
    assert np.mean(true < 2 * said) > 0.85
    assert np.mean(true < 4 * said) > 0.98
    assert true.max() < 2 * said.max()
    assert said.max() < 40 * true.max()  # and is of use


def test_nodes_are_met_without_error() -> None:
    emulator = Emulator(Known(), FAMILY, (0.3, 1.5))
    assert np.abs(missed(emulator, emulator.nodes)).max() < 1e-12
    assert reported(emulator, emulator.nodes).max() < 1e-12
    assert emulator.remoteness(emulator.nodes).max() < 1e-12
    assert emulator.remoteness(grid(0.3, 1.5)).max() == pytest.approx(1.0, abs=0.02)


def test_full_relaxation_is_reached_without_overflow() -> None:
    emulator = Emulator(Known(), FAMILY, (0.0, 1.5))
    made = emulator(np.array([[1e-300], [1e-320], [1e-90], [0.0]]), np.array([0]))
    np.testing.assert_allclose(made.mean, Known().value(np.zeros(1))[0, 0], atol=1e-9)


def test_added_nodes_lower_the_error() -> None:
    emulator, u = Emulator(Known(), FAMILY, (0.0, FAMILY.high)), grid(0, FAMILY.high)
    errors = [(np.abs(missed(emulator, u)).max(), reported(emulator, u).max())]
    while len(emulator.nodes) < 17:
        emulator.add(u[np.argmax(reported(emulator, u).max(1))])
        errors.append((np.abs(missed(emulator, u)).max(), reported(emulator, u).max()))
    true, said = np.array(errors).T
    assert true[-1] < 0.1 * true[0]
    assert said[-1] < 0.1 * said[0]
    assert (true < 2 * said).all()


def test_kink_at_lag_max_is_kept() -> None:
    emulator = Emulator(Known(), FAMILY, (0.5, 1.5), n_nodes=9)
    assert 1.0 in emulator.nodes
    eps = 1e-6
    u = np.array([1 - 2 * eps, 1 - eps, 1 + eps, 1 + 2 * eps])
    value = emulator(np.repeat(u[:, None], 4, axis=1), COLUMNS).mean[:, 0]
    slopes = np.diff(value)[[0, 2]] / eps
    assert slopes[0] == pytest.approx(0.6 * 0.3 / 1.3**2 + 0.6 * np.cos(3), abs=0.01)
    assert slopes[1] == pytest.approx(0.15 * 4, abs=0.05)


def test_monte_carlo_covariance_between_any_two_points() -> None:
    """Contributions that are linear in u are interpolated without error."""
    known = Known(noise=0.1)
    emulator = Emulator(known, FAMILY, (0.2, 1.6))
    u = np.array([[0.3, 0.9, 1.2, 1.5]])
    made = emulator(u, np.array([0, 2, 3, 0])).covariance[0]
    own = known.noise[:, 0] + known.noise[:, 1] * 0
    for i, (v, column) in enumerate(zip(u[0], (0, 2, 3, 0), strict=True)):
        for j, (w, other) in enumerate(zip(u[0], (0, 2, 3, 0), strict=True)):
            one = own[:, column] + v * known.noise[:, 1, column]
            two = own[:, other] + w * known.noise[:, 1, other]
            assert made[i, j] == pytest.approx(one @ two / (40 * 39), rel=1e-9)


def test_each_node_is_predicted_once() -> None:
    known = Known()
    emulator = Emulator(known, FAMILY, (0.2, 1.6))
    assert known.n_calls == len(emulator.nodes) == 9  # both pieces share u = 1
    emulator.add(0.33)
    emulator.add(1.44)
    assert known.n_calls == len(emulator.nodes) == 11
    assert (np.diff(emulator.nodes) > 0).all()


def test_coordinate_covers_the_family_once() -> None:
    n = np.array([1.0, 10.0, 49.999, 50.0, 51.0, 500.0, 3000.0, np.inf])
    u = FAMILY.from_n_int(n)
    np.testing.assert_allclose(FAMILY.n_int(u), n, rtol=1e-9)
    assert (np.diff(u) < 0).all()
    assert u[0] == FAMILY.high
    assert u[-1] == 0
    np.testing.assert_allclose(FAMILY.weight(u), LAMBDA_HAT ** np.maximum(n - 50, 0))
