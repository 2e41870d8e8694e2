import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bopito_inverse.noise import Scaling, VPSchedule, per_replica

SCHEDULES = [VPSchedule(), VPSchedule(start=2.5, end=-4.0), VPSchedule(start=6.0, end=-7.0)]


@pytest.mark.parametrize("noise", SCHEDULES, ids=repr)
def test_variance_is_preserved_and_ratio_is_linear(noise: VPSchedule) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = noise.alpha(t), noise.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), atol=1e-14, rtol=0)
    torch.testing.assert_close((alpha / sigma).log(), noise.log_ratio(t), atol=1e-10, rtol=0)
    torch.testing.assert_close(noise.log_ratio(t).diff().diff(), torch.zeros(99).double())
    assert float(noise.log_ratio(t[0])) == noise.start
    assert float(noise.log_ratio(t[-1])) == pytest.approx(noise.end)


@pytest.mark.parametrize("noise", SCHEDULES, ids=repr)
def test_time_inverts_the_signal_amplitude(noise: VPSchedule) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(noise.time(noise.alpha(t)), t, atol=1e-11, rtol=0)
    torch.testing.assert_close(noise.time(noise.alpha(t.float())), t.float(), atol=5e-4, rtol=0)
    alpha = torch.linspace(0.1, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(noise.alpha(noise.time(alpha)), alpha)
    assert torch.equal(noise.time(alpha[7]), noise.time(alpha)[7])


def test_no_signal_is_left_at_the_end() -> None:
    assert VPSchedule().end <= -4
    assert float(VPSchedule().alpha(torch.tensor(1.0))) < math.exp(-4)


@pytest.mark.parametrize("end", [-3.9, 0.0, math.nan, -math.inf])
def test_signal_at_the_end_is_refused(end: float) -> None:
    with pytest.raises(ValueError, match=rf"end must be at most -4 .*got {end}"):
        VPSchedule(end=end)


@pytest.mark.parametrize("start", [0.0, -1.0, math.nan, math.inf])
def test_bad_start_is_refused(start: float) -> None:
    with pytest.raises(ValueError, match=rf"start must be a positive number, got {start}"):
        VPSchedule(start=start)


def test_equal_schedules_are_those_with_equal_arguments() -> None:
    noise = VPSchedule(3.0, -5.0)
    assert noise == VPSchedule(**noise.config())
    assert noise != VPSchedule(3.0, -4.5)


@settings(max_examples=50, deadline=None)
@given(
    mean=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=2),
    scale=st.floats(0.01, 100),
    x=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=2),
)
def test_scaling_round_trip(mean: list[float], scale: float, x: list[float]) -> None:
    scaling, frames = Scaling(mean, scale), torch.tensor([x])
    y = scaling.standardise(frames)
    expected = (frames.double() - torch.tensor(mean).double()) / torch.tensor(scale).double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(scaling.restore(y), frames, rtol=1e-5, atol=1e-4)


def test_scaling_matches_only_itself() -> None:
    scaling = Scaling([1.0, 2.0], 3.0)
    assert scaling.matches(Scaling([1.0, 2.0], 3.0))
    assert not scaling.matches(Scaling([1.0, 2.1], 3.0))
    assert not scaling.matches(Scaling([1.0, 2.0], 3.1))
    with pytest.raises(ValueError, match="scale must be a positive number, got 0"):
        Scaling(0.0, 0.0)


def test_per_replica_multiplies_each_replica_by_its_own_value() -> None:
    x = torch.ones(3, 2, 4)
    value = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal((per_replica(value, x) * x)[:, 1, 2], value)
    assert torch.equal(per_replica(value[1], x) * x, 2 * x)
