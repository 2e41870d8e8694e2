import math

import numpy as np
import pytest
import torch

import bopito_inverse as bi
from bopito_inverse.models.scores import EquilibriumScore
from bopito_inverse.noise import Scaling, VPSchedule
from bopito_inverse.sampling import generate, importance_sample, log_likelihood

SYSTEM = bi.systems.DoubleWell(a=3.0)
EXACT = bi.systems.TransferOperator(SYSTEM, grid_size=300)
S_EQ = EXACT.equilibrium_score()


class Gaussian(torch.nn.Module):
    """Exact score of N(mean, covariance) in two dimensions, with a scaling that is not trivial."""

    event_shape = (2,)

    def __init__(self, mean: list[float], covariance: list[list[float]]) -> None:
        super().__init__()
        self.noise = VPSchedule()
        self.scaling = Scaling(mean, 2.0)
        self.register_buffer("covariance", torch.tensor(covariance) / 4)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
        noised = alpha**2 * self.covariance + sigma**2 * torch.eye(2)
        return sigma * x_t @ torch.linalg.inv(noised)


GAUSSIAN = Gaussian([1.0, -2.0], [[4.0, 1.5], [1.5, 1.0]])
NORMAL = torch.distributions.MultivariateNormal(
    torch.tensor([1.0, -2.0]), torch.tensor([[4.0, 1.5], [1.5, 1.0]])
)


def energy(x: torch.Tensor) -> np.ndarray:
    return SYSTEM.energy(x.numpy()) / SYSTEM.kT


def ks(frames: bi.datasets.Frames) -> float:
    """Distance of weighted frames from the exact distribution."""
    x, order = frames.x[:, 0].sort()
    cumulative = np.cumsum(EXACT.stationary) * EXACT.spacing
    truth = np.interp(x.numpy(), EXACT.grid + EXACT.spacing / 2, cumulative)
    return float(np.abs(frames.weights[order].cumsum(0).numpy() - truth).max())


def test_density_is_that_of_the_closed_form() -> None:
    z = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    x = NORMAL.mean + z @ NORMAL.scale_tril.T
    left = (GAUSSIAN.scaling.scale * math.exp(-4)) ** 2 * torch.eye(2)  # noise at t = 0
    noised = torch.distributions.MultivariateNormal(NORMAL.mean, NORMAL.covariance_matrix + left)
    truth = noised.log_prob(x).double()
    torch.testing.assert_close(log_likelihood(GAUSSIAN, x), truth, atol=5e-3, rtol=0)


class CentredGaussian(Gaussian):
    """Exact score of three atoms whose positions are N(0, 0.3), less their centroid."""

    event_shape = (3, 3)

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.noise = VPSchedule()
        self.scaling = Scaling(0.0, 0.2, centred=True)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
        return sigma * x_t / (1.5**2 * alpha**2 + sigma**2)


def test_density_of_centred_frames_is_that_in_their_space() -> None:
    x = 0.3 * torch.randn(50, 3, 3, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(1, keepdim=True)
    width = math.hypot(0.3, 0.2 * math.exp(-4))  # with the noise at t = 0, in six dimensions
    truth = -x.double().square().sum((1, 2)) / 2 / width**2 - 6 * math.log(width)
    truth -= 3 * math.log(2 * math.pi)
    score = CentredGaussian()
    torch.testing.assert_close(log_likelihood(score, x), truth, atol=5e-3, rtol=0)
    flat = importance_sample(score, lambda x: torch.zeros(len(x)), 500, min_ess=1)
    log_w = flat.weights.log() + log_likelihood(score, flat.x)
    assert float(log_w.std()) < 1e-3


def test_density_is_that_of_the_exact_operator() -> None:
    log_q = log_likelihood(S_EQ, EXACT.grid[:, None])
    q = log_q.exp().numpy()
    assert q.sum() * EXACT.spacing == pytest.approx(1, abs=1e-3)
    assert np.abs(q - EXACT.stationary).sum() * EXACT.spacing / 2 < 0.01


def test_density_of_the_frames_that_are_drawn() -> None:
    """Weights for an energy of zero are 1 / q, with the q of the way back."""
    frames = importance_sample(GAUSSIAN, lambda x: torch.zeros(len(x)), 500, min_ess=1)
    log_w = frames.weights.log() + log_likelihood(GAUSSIAN, frames.x)
    assert float(log_w.std()) < 1e-3


def test_frames_are_those_of_the_score() -> None:
    x = generate(GAUSSIAN, 50_000)
    torch.testing.assert_close(x.mean(0), NORMAL.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(x.T.cov(), NORMAL.covariance_matrix, atol=0.08, rtol=0)
    assert torch.equal(generate(GAUSSIAN, 100), generate(GAUSSIAN, 100))
    assert not torch.equal(generate(GAUSSIAN, 100), generate(GAUSSIAN, 100, seed=1))


def test_exact_score_needs_no_weights() -> None:
    assert importance_sample(S_EQ, energy, 2000).ess > 0.99 * 2000


def test_weights_mend_a_wrong_score() -> None:
    other = bi.systems.TransferOperator(bi.systems.DoubleWell(a=3.0, b=0.0), grid_size=300)
    wrong = other.equilibrium_score()
    frames = importance_sample(wrong, energy, 4000)
    before, floor = ks(bi.datasets.Frames(frames.x)), 1.36 / math.sqrt(frames.ess)
    assert ks(frames) < 1.5 * floor < before / 4
    ratio = EXACT.stationary / other.stationary  # Kish: E_q[r]^2 / E_q[r^2]
    share = 1 / (EXACT.stationary * ratio * EXACT.spacing).sum()
    assert frames.ess / len(frames) == pytest.approx(share, rel=0.1)


def test_untrained_network_is_a_standard_normal() -> None:
    score = EquilibriumScore((1,), scaling=Scaling([3.0], 0.5))
    x = torch.linspace(1, 5, 50)[:, None]
    truth = torch.distributions.Normal(3.0, 0.5).log_prob(x[:, 0]).double()
    torch.testing.assert_close(log_likelihood(score, x), truth, atol=5e-3, rtol=0)


def test_a_clash_has_no_weight() -> None:
    frames = importance_sample(S_EQ, lambda x: torch.where(x[:, 0] > 0, torch.inf, 0.0), 1000)
    assert float(frames.weights[frames.x[:, 0] > 0].sum()) == 0


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda x: torch.zeros(3), "energy must give one number"),
        (lambda x: torch.full((len(x),), torch.nan), "with 1000 NaN"),
        (lambda x: torch.full((len(x),), torch.inf), "energy must be finite for some frame"),
        (lambda x: 1e4 * x[:, 0] ** 2, "worth only .* independent ones"),
    ],
)
def test_bad_energies(energy, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        importance_sample(S_EQ, energy, 1000)


def test_bad_frames() -> None:
    with pytest.raises(ValueError, match=r"x must hold frames of shape \(1,\)"):
        log_likelihood(S_EQ, torch.zeros(3, 2))
