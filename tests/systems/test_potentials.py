from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bopito_inverse.systems import DoubleWell, OrnsteinUhlenbeck, Potential1D, Prinz, TripleWell


def prinz_force(x: Tensor) -> Tensor:
    wells = -160 * 0.8 * x * torch.exp(-80 * x**2)
    wells += -160 * 0.2 * (x - 0.5) * torch.exp(-80 * (x - 0.5) ** 2)
    wells += -80 * 0.5 * (x + 0.5) * torch.exp(-40 * (x + 0.5) ** 2)
    return -4 * (8 * x**7 + wells)


def triple_well_force(x: Tensor) -> Tensor:
    periodic = 3 * torch.pi * torch.sin(2 * torch.pi * x)
    return -(periodic + 0.4 + 32 / 1.3 * (x / 1.3) ** 15)


SYSTEMS: dict[str, tuple[Potential1D, Callable[[Tensor], Tensor]]] = {
    "prinz": (Prinz(), prinz_force),
    "double": (DoubleWell(a=3, b=0.7), lambda x: -(12 * x * (x**2 - 1) + 0.7)),
    "triple": (TripleWell(height=3, tilt=0.4), triple_well_force),
    "ornstein": (OrnsteinUhlenbeck(stiffness=2.5), lambda x: -2.5 * x),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_force_is_minus_the_derivative(name: str) -> None:
    system, force = SYSTEMS[name]
    x = torch.linspace(*system.bounds, 3001, dtype=torch.float64)[1:-1]
    exact = force(x)
    error = (system.force(x.float()) - exact).abs()
    assert float((error / (1 + exact.abs())).max()) < 1e-3
    wrong = (system.force(x.float()) - force(x + 0.01)).abs()
    assert float((wrong / (1 + exact.abs())).max()) > 1e-3


@pytest.mark.parametrize("name", SYSTEMS)
def test_force_continues_linearly_outside_the_bounds(name: str) -> None:
    system, force = SYSTEMS[name]
    step = (system.bounds[1] - system.bounds[0]) / 10
    for edge, outward in zip(system.bounds, (-step, step), strict=True):
        x = edge + outward * torch.arange(4, dtype=torch.float64)
        at_edge = torch.tensor(edge, dtype=torch.float64, requires_grad=True)
        value = force(at_edge)
        (slope,) = torch.autograd.grad(value, at_edge)
        expected = value.detach() + slope * (x - edge)
        torch.testing.assert_close(system.force(x.float()).double(), expected, rtol=3e-3, atol=1e-3)


def test_barriers_and_wells_lie_where_they_are_said_to() -> None:
    system = TripleWell(height=5, tilt=0.0)
    x = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    assert np.allclose(system.energy(x), [0.03, 5, 0, 5, 0.03], atol=0.01)
    assert np.allclose(DoubleWell(a=4, b=0.5).energy(np.array([-1.0, 0, 1])), [-0.5, 4, 0.5])


@pytest.mark.parametrize(
    "energy",
    [
        lambda x: 2 * np.exp(-(x**2)) + x**2,
        lambda x: 2 * torch.exp(-(x**2)) + x**2,
        lambda x: 2 * x.square().neg().exp() + x.square(),
        lambda x: torch.nn.Parameter(torch.tensor(2.0)) * (-x.square()).exp() + x.square(),
        lambda x: 2 * 2.718281828459045 ** (-(x**2)) + x**2,
    ],
    ids=["numpy", "torch function", "torch method", "torch parameter", "operators"],
)
def test_energies_of_any_library(energy: Callable) -> None:
    system = Potential1D(energy, bounds=(-4, 4))
    x = torch.linspace(-4, 4, 101)
    exact = 4 * x * torch.exp(-(x**2)) - 2 * x
    torch.testing.assert_close(system.force(x), exact, rtol=1e-4, atol=1e-4)
    assert system.energy(np.array([0.5])) == pytest.approx(2 * np.exp(-0.25) + 0.25)


def test_units() -> None:
    system = Potential1D(np.square, (-3, 3), kT=2, friction=4, time_step=0.01, steps_per_frame=7)
    assert system.frame_time == pytest.approx(0.07)
    assert system.diffusion == pytest.approx(0.5)
    assert Prinz().frame_time == pytest.approx(5e-3)


def quadratic(**arguments: object) -> Potential1D:
    return Potential1D(**({"energy": np.square, "bounds": (-3, 3)} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [quadratic, DoubleWell, TripleWell, OrnsteinUhlenbeck])
@pytest.mark.parametrize("name", ["kT", "friction", "time_step"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_numbers_are_refused_by_name(make: Callable, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be a positive number, got {value}"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (quadratic, "steps_per_frame", 0),
        (quadratic, "steps_per_frame", 2.5),
        (quadratic, "bounds", (1.0, -1.0)),
        (quadratic, "bounds", (-1.0, float("inf"))),
        (quadratic, "bounds", (float("nan"), 1.0)),
        (quadratic, "bounds", (-1.0, 0.0, 1.0)),
        (DoubleWell, "a", -1.0),
        (OrnsteinUhlenbeck, "stiffness", 0.0),
        (quadratic, "energy", lambda x: np.where(x > 1, np.nan, x)),
        (quadratic, "energy", lambda x: np.where(x > 1, np.inf, x)),
        (quadratic, "energy", lambda x: 1.0),
        (quadratic, "energy", lambda x: x[:5]),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Callable, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must "):
        make(**{name: value})


@pytest.mark.gpu
def test_force_on_cuda() -> None:
    system = Prinz()
    x = torch.linspace(-1.5, 1.5, 1001)
    torch.testing.assert_close(system.force(x.cuda()).cpu(), system.force(x))
