import numpy as np
import pytest
import torch

import bopito_inverse as bi
from bopito_inverse.inference.emulator import Coordinate, Emulator
from bopito_inverse.sampling import DPMSolver, Interpolate, Propagate, Rollout

SYSTEM = bi.systems.OrnsteinUhlenbeck()
EXACT = bi.systems.TransferOperator(SYSTEM, grid_size=150)
LAG_MAX, LAMBDA_HAT = 15, SYSTEM.decay
RARE = bi.systems.TransferOperator(bi.systems.DoubleWell(a=4.0, b=2.5), grid_size=200)


def model() -> bi.Interpolator:
    s_eq = EXACT.equilibrium_score()
    s_dyn = EXACT.dynamic_score(s_eq, LAMBDA_HAT)
    return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, LAG_MAX))


def starts(n: int = 2000) -> torch.Tensor:
    return EXACT.sample(n, torch.Generator().manual_seed(0))


def network() -> bi.Interpolator:
    """A smooth model with random parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"width": 16, "depth": 2}
        s_eq = bi.models.EquilibriumScore((1,), sizes)
        s_dyn = bi.models.DynamicScore((1,), sizes)
        for score in (s_eq, s_dyn):
            torch.nn.init.normal_(score.network.out.weight, std=0.3)
    return bi.Interpolator(bi.models.BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, LAG_MAX))


def prediction(lags=(20, 40, 60), moves=None, seed=0, n_replicas=512, of=model, device="cpu"):
    step = Rollout(moves or [Interpolate(), Propagate(5)], step_lag=20, solver=DPMSolver(12))
    obs = bi.observables.Correlation(lambda x: x, normalization="variance")
    return bi.inference.Prediction(of(), step, obs, lags, starts(), seed, n_replicas, device)


def test_below_lag_max_it_is_the_exact_dynamics() -> None:
    predict = prediction(moves=[Interpolate()], n_replicas=4096)
    made = predict.at(torch.tensor([10.0]))
    truth = SYSTEM.decay ** (10.0 * np.arange(1, 4))
    error = (made.influence.square().mean(0) / len(made.influence)).sqrt()[0].numpy()
    z = (made.value[0].numpy() - np.append(truth, truth[0])) / error
    assert np.abs(z[:-1]).max() < 4
    assert made.value[0, -1] == pytest.approx(truth[0], abs=4 * error[-1] + 0.01)


def test_equilibrium_at_infinite_n_int() -> None:
    made = prediction(moves=[Interpolate()]).at(torch.tensor([float("inf")]))
    error = (made.influence.square().mean(0) / len(made.influence)).sqrt()[0]
    assert (made.value[0, :-1].abs() < 4 * error[:-1]).all()


def test_same_seed_same_numbers_and_others_within_error() -> None:
    n = torch.tensor(30.0)
    value = prediction()(n)
    assert torch.equal(value, prediction()(n))
    other = prediction(seed=1)
    made = other.at(n[None])
    error = (made.influence.square().mean(0) / len(made.influence)).sqrt()[0, :-1]
    difference = (other(n) - value).abs()
    assert (difference > 0).all()
    assert (difference < 5 * error * 2**0.5).all()


def test_antithetic_pairs_reduce_the_error() -> None:
    made = prediction(n_replicas=4096).at(torch.tensor([30.0]))
    pairs = made.influence[:, 0, :-1].square().mean(0)
    assert (pairs < 0.6 * 0.5).all()  # half of 0.8 to 1, what independent pairs would have


@pytest.mark.parametrize("n_int", [8.0, 25.0, 60.0])
def test_derivative_against_central_differences(n_int: float) -> None:
    predict = prediction(lags=(20, 40), n_replicas=64, of=network)
    n = torch.tensor(n_int, requires_grad=True)
    predict(n).sum().backward()
    h = 0.05
    with torch.no_grad():
        numeric = (predict(n + h) - predict(n - h)).sum() / (2 * h)
    assert float(n.grad) == pytest.approx(float(numeric), rel=0.02)
    assert abs(float(n.grad)) > 1e-5


def test_emulator_is_the_prediction_between_its_nodes() -> None:
    predict = prediction(n_replicas=256, of=network)
    coordinate = Coordinate(LAG_MAX, LAMBDA_HAT)
    emulator = Emulator(predict, coordinate, (0.3, 1.5))
    u = np.array([0.33, 0.61, 0.92, 1.0, 1.27])
    made = emulator(np.repeat(u[:, None], 3, axis=1), np.arange(3))  # correlations at three lags
    direct = predict.at(torch.from_numpy(coordinate.n_int(u)))
    n = len(direct.influence)
    influence = direct.influence[..., :3]
    expected = torch.einsum("nkl,nkm->klm", influence, influence) / (n * (n - 1))
    sd = expected.diagonal(dim1=1, dim2=2).sqrt().numpy()
    assert (np.abs(made.mean - direct.value[:, :3].numpy()) < 0.1 * sd).all()
    emulated = np.sqrt(np.diagonal(made.covariance, axis1=1, axis2=2))
    np.testing.assert_allclose(emulated, sd, rtol=0.1)


def test_coordinate_there_and_back() -> None:
    coordinate = Coordinate(50, 0.98)
    u = np.array([0.01, 0.4, 0.999, 1.0, 1.3, 1.9])
    n = coordinate.n_int(u)
    np.testing.assert_allclose(coordinate.from_n_int(n), u, rtol=1e-12)
    assert coordinate.n_int(np.array(0.0)) == np.inf


@pytest.mark.parametrize("lags", [(10,), (25, 40), (0, 20), (-20,)])
def test_lags_that_no_step_reaches_are_refused(lags) -> None:
    with pytest.raises(ValueError, match="lags must be positive multiples of step_lag 20"):
        prediction(lags)


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"n_int must be one number or .* \(512,\), got shape \(2,\)"
    ):
        prediction()(torch.tensor([30.0, 40.0]))
    with pytest.raises(ValueError, match="n_int must be above zero"):
        prediction()(-1.0)
    with pytest.raises(ValueError, match="n_replicas must be"):
        prediction(n_replicas=1)
    step = Rollout([Interpolate()], 20)
    obs = bi.observables.Correlation(lambda x: x)
    with pytest.raises(ValueError, match="starts must hold frames of shape"):
        bi.inference.Prediction(model(), step, obs, [20], torch.zeros(5, 2))
    with pytest.raises(ValueError, match="model must be an Interpolator, got BoPITOScore"):
        bi.inference.Prediction(model().bopito, step, obs, [20], starts())


@pytest.mark.gpu
def test_prediction_on_cuda() -> None:
    n = torch.tensor([10.0, 40.0])
    cpu, cuda = prediction(n_replicas=4096).at(n), prediction(n_replicas=4096, device="cuda").at(n)
    error = (cpu.influence.square().mean(0) / len(cpu.influence)).sqrt()
    assert ((cpu.value - cuda.value).abs() < 5 * 2**0.5 * error).all()


def rare_state(share: float, seed: int, n_replicas: int = 512) -> bi.inference.Prediction:
    """The right well holds 1 % of mu and half of the frames, which are weighted."""
    frames = bi.datasets.Frames(RARE.grid[:, None], RARE.stationary)
    s_eq = RARE.equilibrium_score()
    model = bi.Interpolator(
        bi.models.BoPITOScore(s_eq, RARE.dynamic_score(s_eq, 0.98), 0.98, LAG_MAX)
    )
    step = Rollout([Propagate(LAG_MAX)], LAG_MAX, DPMSolver(12))
    obs = bi.observables.Correlation(lambda x: x, normalization="variance")
    lags = [LAG_MAX, 2 * LAG_MAX]
    return bi.inference.Prediction(
        model, step, obs, lags, frames, seed, n_replicas, "cpu", uniform_share=share
    )


def test_rare_states_and_their_errors() -> None:
    """Importance weights: unbiased, with honest errors."""
    z = []
    for seed in range(20):
        made = rare_state(0.5, seed).at(torch.tensor([float(LAG_MAX)]))
        error = (made.influence[:, 0].square().mean(0) / len(made.influence)).sqrt()
        truth = RARE.correlation(lambda x: x, None, [LAG_MAX, 2 * LAG_MAX], "variance")
        z.append((made.value[0, :2].numpy() - truth) / error[:2].numpy())
    assert abs(np.mean(z)) < 4 / np.sqrt(20)
    assert 0.6 < np.std(z) < 1.5


def test_starts_in_a_rare_state_save_replicas() -> None:
    error = {}
    for share in (0.0, 0.5):
        influence = rare_state(share, 0, 4096).at(torch.tensor([float(LAG_MAX)])).influence
        error[share] = influence[:, 0, :2].square().mean(0).sqrt()
    assert (error[0.5] < 0.5 * error[0.0]).all()  # a quarter of the replicas for the same error


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uniform_share must lie in \[0, 1\), got 1"):
        rare_state(1.0, 0)
