"""Values against mdtraj, derivatives against finite differences."""

import math
import pickle

import mdtraj
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from bopito_inverse.observables import Angle, Correlation, Dihedral, Distance, feature
from bopito_inverse.observables.features import FEATURES
from bopito_inverse.shipped import shipped_data

DIALANINE = shipped_data("ala2") / "dialanine.pdb"


@pytest.fixture(scope="module")
def one() -> mdtraj.Topology:
    return mdtraj.load_topology(shipped_data("ala2") / "alanine_dipeptide.pdb")


@pytest.fixture(scope="module")
def two() -> mdtraj.Topology:
    return mdtraj.load_topology(DIALANINE)


def random_frames(n: int, n_atoms: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return 0.3 * torch.randn(n, n_atoms, 3, generator=generator)


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference of angles, around the circle."""
    return float(torch.remainder(a - b + math.pi, 2 * math.pi).sub(math.pi).abs().max())


# of one-dimensional systems


def test_features_are_what_their_names_say() -> None:
    x = torch.tensor([[-2.0], [0.0], [0.5]])
    expected = {"x": [-2.0, 0.0, 0.5], "x^2": [4.0, 0.0, 0.25], "x > 0": [0.0, 0.0, 1.0]}
    assert {name: feature(name)(x)[:, 0].tolist() for name in expected} == expected


def test_features_are_observables_of_a_correlation() -> None:
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    for function in FEATURES.values():
        value = Correlation(function, normalization="variance")(x, torch.stack([x, -x]))
        assert abs(float(value[0]) - 1) < 1e-12
    assert float(Correlation(FEATURES["x^2"], normalization="variance")(x, -x[None])) > 1 - 1e-12
    assert float(Correlation(FEATURES["x>0"], normalization="variance")(x, -x[None])) < -1 + 1e-12


# of molecules


def test_values_are_those_of_mdtraj(two: mdtraj.Topology) -> None:
    x = random_frames(400)
    frames = mdtraj.Trajectory(x.numpy(), two)
    for kind, compute in (("phi", mdtraj.compute_phi), ("psi", mdtraj.compute_psi)):
        for number, angle in enumerate(torch.from_numpy(compute(frames)[1]).T, start=1):
            name = f"{kind}{number}"
            assert apart(feature(name, two)(x), angle) < 2e-5
            sine, cosine = feature(f"sin({name})", two)(x), feature(f"cos({name})", two)(x)
            torch.testing.assert_close(sine, angle.sin(), atol=2e-5, rtol=0)
            torch.testing.assert_close(cosine, angle.cos(), atol=2e-5, rtol=0)
            assert torch.equal(feature(f"{name}>0", two)(x), (sine > 0).float())
    distance = torch.from_numpy(mdtraj.compute_distances(frames, [[1, 18]])[:, 0])
    torch.testing.assert_close(feature("distance(1, 18)", two)(x), distance)
    angle = torch.from_numpy(mdtraj.compute_angles(frames, [[1, 0, 4]])[:, 0])
    torch.testing.assert_close(feature("angle(1, 0, 4)", two)(x), angle, atol=2e-5, rtol=0)


def turned(angle: Tensor, zero: float = 0.0) -> Tensor:
    """Four atoms along z; looking along z, the last bond is `angle` clockwise of the first."""
    one, none = torch.ones_like(angle), torch.full_like(angle, zero)
    atoms = [(one, none, none), (none, none, none), (none, none, one)]
    return torch.stack([torch.stack(r) for r in (*atoms, (angle.cos(), angle.sin(), one))])[None]


@pytest.mark.parametrize("degrees", [0, 60, -120, 179.9])
def test_sign_of_a_dihedral(degrees: float) -> None:
    angle = torch.tensor(math.radians(degrees))
    assert float(Dihedral(0, 1, 2, 3)(turned(angle))) == pytest.approx(float(angle))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_trans_is_pi_and_not_minus_pi(zero: float) -> None:
    x = turned(torch.tensor(0.0), zero)
    x[0, 3, 0] = -1
    assert float(Dihedral(0, 1, 2, 3)(x)) == pytest.approx(math.pi)
    assert float(Dihedral(3, 2, 1, 0)(x)) == pytest.approx(math.pi)


def test_derivatives_backward_and_forward() -> None:
    x = random_frames(3, 5).double().requires_grad_()
    functions = (None, "sin", "cos")
    torsions = [Dihedral(3, 1, 4, 0, function) for function in functions]
    for f in (Distance(4, 2), Angle(0, 3, 2), *torsions):
        assert gradcheck(f, x, check_forward_ad=True)
        v = random_frames(4, 5)[:3].double()
        value, change = torch.func.jvp(f, (x.detach(),), (v,))
        (gradient,) = torch.autograd.grad(f(x).sum(), x)
        torch.testing.assert_close(change, (gradient * v).sum((1, 2)))
        assert torch.equal(value, f(x.detach()))


@pytest.mark.parametrize("angle", [0.0, math.pi / 2, math.pi])
def test_derivatives_are_right_where_the_sine_is_zero_or_one(angle: float) -> None:
    expected = {None: 1.0, "sin": math.cos(angle), "cos": -math.sin(angle), ">0": 0.0}
    for function, slope in expected.items():
        f = Dihedral(0, 1, 2, 3, function)  # type: ignore[arg-type]
        at, one = torch.tensor(angle), torch.tensor(1.0)
        _, change = torch.func.jvp(lambda a, f=f: f(turned(a)), (at,), (one,))
        assert float(change) == pytest.approx(slope, abs=1e-6)


def test_unchanged_by_motion_and_mirrored_by_a_mirror(one: mdtraj.Topology) -> None:
    x = random_frames(50, 22).double()
    q, _ = torch.linalg.qr(random_frames(1, 3)[0].double())
    rotation = q * q.det()
    for name in ("phi", "sin(psi)", "distance(0, 18)", "angle(0, 4, 6)"):
        f = feature(name, one)
        torch.testing.assert_close(f(x @ rotation + 5), f(x))
    assert apart(feature("phi", one)(-x), -feature("phi", one)(x)) < 1e-12


def test_names_of_atoms(one: mdtraj.Topology) -> None:
    assert feature("distance(ACE1-CH3, NME3-C)", one) == Distance(0, 18)
    assert feature("angle( 6,ALA2-CA, 10 )", one) == Angle(6, 8, 10)
    phi = "dihedral(ACE1-C, ALA2-N, ALA2-CA, ALA2-C)"
    for form in ("{}", "sin({})", "cos({})", "{}>0"):
        assert feature(form.format(phi), one) == feature(form.format("phi"), one)
    assert feature("phi1", one) == feature("phi", one) == Dihedral(4, 6, 8, 10)


def test_features_go_through_files_and_name_themselves(one: mdtraj.Topology) -> None:
    for name in ("phi", "sin(phi)", "cos(psi)", "phi>0", "distance(1, 18)", "angle(0, 4, 6)"):
        f = feature(name, one)
        assert pickle.loads(pickle.dumps(f)) == f
        assert eval(repr(f)) == f
        label = Correlation(f).name
        assert feature(label) == f
    assert repr(feature("distance(1, 18)")) == "Distance(i=1, j=18)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sin(fi)", r"example \['sin\(psi\)'.*got 'sin\(fi\)'"),
        ("sin(angle(0, 1, 2))", "must be a feature"),
        ("x", "must be a feature of the system.*'phi'"),
        ("phi2", r"has 1 phi, counted from 1, got 'phi2'"),
        ("psi0", r"has 1 psi, counted from 1, got 'psi0'"),
        ("distance(1, 2, 3)", "must hold 2 atoms"),
        ("distance(1,)", "must hold 2 atoms"),
        ("distance(1, 22)", "must hold atoms 0 to 21"),
        ("distance(4, 4)", r"must be distinct, got \(4, 4\)"),
        ("distance(ALA2-CX, 1)", "no atom 'ALA2-CX'.*'ALA2-CA'"),
        ("distance(-1, 1)", "no atom '-1'"),
    ],
)
def test_bad_names_are_refused(one: mdtraj.Topology, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature(name, one)


def test_what_a_name_needs_is_said(two: mdtraj.Topology) -> None:
    with pytest.raises(ValueError, match="must say which of phi1 to phi2, got 'cos"):
        feature("cos(phi)", two)
    with pytest.raises(ValueError, match="topology must be that of a molecule for 'phi'"):
        feature("phi")
    with pytest.raises(ValueError, match="topology must be that of a molecule"):
        feature("distance(ALA1-CA, 2)")
    with pytest.raises(ValueError, match=r"example \['x.*got 'x\^3'"):
        feature("x^3")
    twice = two.join(two)
    with pytest.raises(ValueError, match="'ALA2-CA' is the name of several atoms"):
        feature("distance(ALA2-CA, 1)", twice)


def test_bad_atoms_and_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="j must be a whole number of at least 0, got -1"):
        Distance(0, -1)
    with pytest.raises(ValueError, match="function must be"):
        Dihedral(0, 1, 2, 3, "tan")  # type: ignore[arg-type]
    for shape in ((5, 3), (5, 3, 2), (5, 3, 3)):
        with pytest.raises(ValueError, match=r"more than 3 atoms for distance\(0, 3\)"):
            Distance(0, 3)(torch.zeros(shape))
