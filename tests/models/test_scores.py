import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bopito_inverse.models import (
    BoPITOScore,
    DynamicScore,
    EquilibriumScore,
    ITOScore,
    load,
    save,
)
from bopito_inverse.noise import Scaling, VPSchedule
from bopito_inverse.systems import DoubleWell, TransferOperator

LAMBDA_HAT, LAG_MAX, B = 0.97, 40, 5
SIZE = {"width": 10, "depth": 2, "n_frequencies": 3}
NOISE = VPSchedule(3.5, -4.2)


def randomise(module: nn.Module) -> nn.Module:
    """Random parameters everywhere: a new network is zero at its last layer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return module


def network(kind: type, event_shape: tuple[int, ...], **changes: Any) -> Any:
    scaling = Scaling([0.3] * event_shape[0], 1.7)
    return kind(event_shape, **{"network": SIZE, "noise": NOISE, "scaling": scaling} | changes)


def bopito(event_shape: tuple[int, ...]) -> BoPITOScore:
    parts = network(EquilibriumScore, event_shape), network(DynamicScore, event_shape)
    return BoPITOScore(*parts, LAMBDA_HAT, LAG_MAX)


OPERATOR = TransferOperator(DoubleWell(), grid_size=60)
EXACT_EQ = OPERATOR.equilibrium_score(NOISE)
EXACT_DYN = OPERATOR.dynamic_score(EXACT_EQ, LAMBDA_HAT)

SCORES: dict[str, Callable[[], nn.Module]] = {
    "exact equilibrium": lambda: EXACT_EQ,
    "exact dynamic": lambda: EXACT_DYN,
    "exact BoPITO": lambda: BoPITOScore(EXACT_EQ, EXACT_DYN, LAMBDA_HAT, LAG_MAX),
}
for shape in ((1,), (2,)):
    for kind in (EquilibriumScore, DynamicScore, ITOScore):
        SCORES[f"{kind.__name__} {shape}"] = lambda kind=kind, shape=shape: network(kind, shape)
    SCORES[f"BoPITOScore {shape}"] = lambda shape=shape: bopito(shape)


@pytest.fixture(params=list(SCORES))
def score(request: pytest.FixtureRequest) -> Any:
    return randomise(SCORES[request.param]())


def frames(score: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_t, x_0 = torch.randn(2, B, *score.event_shape, generator=generator)
    return x_t, x_0.clamp(-1.2, 1.2)


def condition(score: Any, x_0: Tensor, lag: Tensor) -> tuple[Tensor, ...]:
    return (x_0, lag) if hasattr(score, "bind") else ()


def test_shapes_agree_elementwise(score: Any) -> None:
    """One call of the batch, with t and lag of shape () or (B,), equals a call for each replica."""
    x_t, x_0 = frames(score)
    times, lags = torch.linspace(0, 1, B), torch.tensor([1, 2, 7, 20, 40])
    for t in (times, times[2]):
        for lag in (lags, lags[1], lags.float(), lags[1].float()):
            eps = score(x_t, t, *condition(score, x_0, lag))
            assert eps.shape == x_t.shape
            for i in range(B):
                lag_i, t_i = lag.expand(B)[i], t.expand(B)[i]
                given = condition(score, x_0[i : i + 1], lag_i)
                one = score(x_t[i : i + 1], t_i, *given)
                torch.testing.assert_close(eps[i : i + 1], one, atol=2e-4, rtol=2e-4)


def test_bind_is_forward(score: Any) -> None:
    if not hasattr(score, "bind"):
        assert isinstance(score, EquilibriumScore) or score is EXACT_EQ
        return
    x_t, x_0 = frames(score)
    lag = torch.tensor([1, 2, 7, 20, 40])
    bound = score.bind(x_0, lag)
    for t in (torch.tensor(0.1), torch.linspace(0, 1, B)):
        assert torch.equal(bound(x_t, t), score(x_t, t, x_0, lag))


def test_each_input_matters(score: Any) -> None:
    x_t, x_0 = frames(score)
    t, lag = torch.tensor(0.4), torch.tensor(5)
    eps = score(x_t, t, *condition(score, x_0, lag))
    changed = [(x_t + 0.1, t, x_0, lag), (x_t, t + 0.1, x_0, lag)]
    if hasattr(score, "bind"):
        changed += [(x_t, t, x_0 + 0.1, lag), (x_t, t, x_0, lag + 10)]
    for x, time, start, n in changed:
        other = score(x, time, *condition(score, start, n))
        assert not torch.allclose(eps, other, atol=1e-5, rtol=0)


def test_every_parameter_and_frame_gets_a_gradient(score: Any) -> None:
    x_t, x_0 = frames(score)
    x_t.requires_grad_(True)
    given = condition(score, x_0, torch.arange(1, B + 1))
    score(x_t, torch.linspace(0.1, 0.9, B), *given).square().sum().backward()
    for name, parameter in [("x_t", x_t), *score.named_parameters()]:
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_attributes(score: Any) -> None:
    assert score.noise == NOISE
    assert score.event_shape in ((1,), (2,))
    expected = 1.0 if any(p is EXACT_EQ for p in score.modules()) else 1.7
    assert float(score.scaling.scale) == pytest.approx(expected)


def test_config_and_file_round_trip(score: Any, tmp_path: Path) -> None:
    path = tmp_path / "score.safetensors"
    kind = type(score)
    if kind not in (EquilibriumScore, ITOScore, BoPITOScore) or not list(score.parameters()):
        with pytest.raises(ValueError, match=r"^score"):
            save(score, path)
        assert not path.exists()
        return
    assert kind.from_config(score.config()).config() == score.config()
    save(score, path)
    loaded: Any = load(path)
    x_t, x_0 = frames(score)
    given = condition(score, x_0, torch.arange(1, B + 1))
    t = torch.linspace(0, 1, B)
    assert torch.equal(loaded(x_t, t, *given), score(x_t, t, *given))
    assert loaded.config() == score.config()
    assert loaded.scaling.matches(score.scaling)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_defaults_are_written_out() -> None:
    assert EquilibriumScore((1,)).config() == {
        "event_shape": [1],
        "network": {"width": 128, "depth": 3, "n_frequencies": 8},
        "noise": {"start": VPSchedule().start, "end": VPSchedule().end},
        "centred": False,
    }


@pytest.mark.parametrize("name", ["BoPITOScore (1,)", "BoPITOScore (2,)", "exact BoPITO"])
def test_bopito_is_equilibrium_plus_decaying_dynamics(name: str) -> None:
    score: Any = randomise(SCORES[name]())
    x_t, x_0 = frames(score)
    t = torch.linspace(0.05, 0.95, B)
    for lag in (torch.tensor(3), torch.tensor([1, 5, 10, 20, 40])):
        decay = (LAMBDA_HAT ** lag.double()).float().reshape(-1, 1)
        expected = score.s_eq(x_t, t) + decay * score.s_dyn(x_t, t, x_0, lag)
        torch.testing.assert_close(score(x_t, t, x_0, lag), expected, atol=1e-5, rtol=1e-5)
    assert float(score.decay(torch.tensor(math.inf))) == 0


def test_exact_bopito_is_the_noised_transition_density() -> None:
    """eps = (x_t - alpha E[x | x_t, x_0]) / sigma, the mean by brute force over the grid."""
    i, lag, t = 20, 6, torch.tensor(0.3, dtype=torch.float64)
    grid = torch.from_numpy(OPERATOR.grid)
    density = torch.from_numpy(OPERATOR.transition_density(lag)[i])
    alpha, sigma = NOISE.alpha(t), NOISE.sigma(t)
    x_t = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
    posterior = density * torch.exp(-((x_t - alpha * grid) ** 2) / (2 * sigma**2))
    mean = (posterior * grid).sum(1) / posterior.sum(1)
    expected = (x_t[:, 0] - alpha * mean) / sigma
    score = BoPITOScore(EXACT_EQ, EXACT_DYN, LAMBDA_HAT, LAG_MAX)
    x_0 = grid[i].float().expand(7, 1)
    eps = score(x_t.float(), t.float(), x_0, torch.tensor(lag))[:, 0]
    torch.testing.assert_close(eps.double(), expected, atol=2e-3, rtol=2e-3)
    other = score(x_t.float(), t.float(), x_0, torch.tensor(lag + 20))[:, 0]
    assert float((other.double() - expected).abs().max()) > 0.02


def test_double_precision() -> None:
    """A whole-number lag loses no digits where the frames have 64 bits."""
    score = randomise(bopito((2,))).double()
    x_t, x_0 = (x.double() for x in frames(score))
    t = torch.linspace(0.1, 0.9, B, dtype=torch.float64)
    eps = score(x_t, t, x_0, torch.tensor(33))
    expected = score.s_eq(x_t, t) + LAMBDA_HAT**33 * score.s_dyn(x_t, t, x_0, torch.tensor(33))
    torch.testing.assert_close(eps, expected, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"event_shape": (2,)}, r"same event_shape, got \(1,\) and \(2,\)"),
        ({"noise": VPSchedule(3.0)}, r"same noise, got VPSchedule\(start=3.5.*start=3,"),
        ({"scaling": Scaling([0.3], 1.8)}, "standardise frames in the same way"),
        ({"scaling": Scaling([0.4], 1.7)}, "standardise frames in the same way"),
    ],
)
def test_mismatched_scores_are_refused(changes: dict[str, Any], message: str) -> None:
    event_shape = changes.pop("event_shape", (1,))
    s_eq, s_dyn = network(EquilibriumScore, (1,)), network(DynamicScore, event_shape, **changes)
    with pytest.raises(ValueError, match=message):
        BoPITOScore(s_eq, s_dyn, LAMBDA_HAT, LAG_MAX)


@pytest.mark.parametrize("lambda_hat", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_bad_lambda_hat(lambda_hat: float) -> None:
    with pytest.raises(ValueError, match=rf"lambda_hat must lie in \(0, 1\), got {lambda_hat}"):
        BoPITOScore(EXACT_EQ, EXACT_DYN, lambda_hat, LAG_MAX)


@pytest.mark.parametrize("lag_max", [0, -3, 0.5, 10.5, math.nan, math.inf])
def test_bad_lag_max(lag_max: Any) -> None:
    with pytest.raises(ValueError, match=rf"lag_max must be a whole number .*, got {lag_max}"):
        BoPITOScore(EXACT_EQ, EXACT_DYN, LAMBDA_HAT, lag_max)


def test_scaling_has_one_mean_per_component() -> None:
    assert (
        EquilibriumScore((2,), SIZE, scaling=Scaling(0.5, 2.0)).scaling.mean.tolist() == [0.5] * 2
    )
    with pytest.raises(ValueError, match=r"scaling must have a mean of shape \(\) or \(2,\)"):
        EquilibriumScore((2,), SIZE, scaling=Scaling([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("each", [False, True])
def test_a_large_batch_is_that_of_its_parts(each: bool) -> None:
    """On a CPU 512 frames are worked on at once, whose times and lags are their own or shared."""
    score = randomise(network(ITOScore, (2,)))
    generator = torch.Generator().manual_seed(1)
    x_t, x_0 = torch.randn(2, 1100, 2, generator=generator)
    t, lag = torch.rand(1100, generator=generator), torch.arange(1.0, 1101)
    if not each:
        t, lag = t[0], lag[7]
    with torch.no_grad():
        whole = score(x_t, t, x_0, lag)
        for k in (0, 511, 512, 1023, 1024, 1099):
            own = (t[[k]], lag[[k]]) if each else (t, lag)
            alone = score(x_t[[k]], own[0], x_0[[k]], own[1])
            torch.testing.assert_close(whole[[k]], alone, atol=1e-5, rtol=1e-5)
