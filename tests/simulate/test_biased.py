import mdtraj
import numpy as np
import pytest
import torch

from bopito_inverse.simulate import BiasedSamples, tempering, umbrella
from bopito_inverse.simulate.biased import dihedral_angles
from bopito_inverse.systems import OrnsteinUhlenbeck


def system() -> OrnsteinUhlenbeck:
    return OrnsteinUhlenbeck(stiffness=1.0, kT=2.0, time_step=2e-3, steps_per_frame=100)


def test_samples_survive_a_file(tmp_path) -> None:
    path = tmp_path / "biased.npz"
    before = umbrella(system(), [-1.0, 1.0], 3.0, n_frames=6, n_walkers=3, burn_in=0)
    before.write(path)
    after = BiasedSamples.read(path)
    assert torch.equal(before.frames, after.frames)
    assert torch.equal(before.reduced_bias, after.reduced_bias)
    assert (after.kT, after.n_walkers, after.system) == (2.0, 3, "OrnsteinUhlenbeck")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"biased\.npz is no readable"):
        BiasedSamples.read(path)
    np.savez(path, frames=np.zeros((2, 3, 1)), kT=1.0)
    with pytest.raises(ValueError, match=r"biased\.npz has no array 'reduced_bias'"):
        BiasedSamples.read(path)
    np.savez(path, frames=np.zeros((2, 3, 1)), kT=1.0, reduced_bias=np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"biased\.npz: reduced_bias must have shape \(2, 6\)"):
        BiasedSamples.read(path)


def test_harmonic_windows_are_stored_without_the_matrix_of_biases(tmp_path) -> None:
    path = tmp_path / "umbrella.npz"
    before = umbrella(system(), np.linspace(-2, 2, 20), 3.0, n_frames=100, burn_in=0)
    before.write(path)
    assert path.stat().st_size < 3 * before.frames.numel() * 4 < before.reduced_bias.numel()
    with np.load(path) as arrays:
        assert "reduced_bias" not in arrays
        content = dict(arrays)
    after = BiasedSamples.read(path)
    assert torch.equal(before.reduced_bias, after.reduced_bias)
    assert torch.equal(before.centers, after.centers)
    np.savez(path, **{k: v for k, v in content.items() if k != "stiffness"})
    with pytest.raises(ValueError, match=r"umbrella\.npz has no array 'stiffness'"):
        BiasedSamples.read(path)
    np.savez(path, **(content | {"centers": np.zeros(3)}))
    with pytest.raises(
        ValueError, match=r"umbrella\.npz: centers must hold finite numbers of shape \(20,\)"
    ):
        BiasedSamples.read(path)


def test_other_biases_survive_a_file_as_a_matrix(tmp_path) -> None:
    path = tmp_path / "biased.npz"
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(2, 5, 3, generator=generator)
    bias = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    BiasedSamples(frames, bias, kT=2.5, system="mine").write(path)
    after = BiasedSamples.read(path)
    assert torch.equal(after.reduced_bias, bias)
    assert after.centers is None


def test_bad_samples_are_refused() -> None:
    frames, bias = torch.zeros(2, 6, 1), torch.zeros(2, 12)
    with pytest.raises(ValueError, match="frames must have shape"):
        BiasedSamples(frames[0], bias)
    with pytest.raises(ValueError, match=r"frames\[1\] must be finite.*frame 3"):
        BiasedSamples(
            frames.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(1e99)), bias
        )
    with pytest.raises(ValueError, match=r"reduced_bias must be finite, got nan at \[0, 0\]"):
        BiasedSamples(frames, bias * float("nan"))
    with pytest.raises(ValueError, match="n_walkers must divide the 6 frames of a window, got 4"):
        BiasedSamples(frames, bias, n_walkers=4)
    with pytest.raises(ValueError, match="kT must be a positive number"):
        BiasedSamples(frames, bias, kT=0.0)


def test_temperatures_are_stored_with_one_energy_a_frame(tmp_path) -> None:
    path = tmp_path / "tempering.npz"
    before = tempering(system(), [2.0, 2.5, 3.0, 4.0], n_frames=40, burn_in=0)
    before.write(path)
    with np.load(path) as arrays:
        assert "reduced_bias" not in arrays
        assert arrays["energies"].shape == (160,)
    after = BiasedSamples.read(path)
    assert torch.equal(before.reduced_bias, after.reduced_bias)
    assert torch.equal(before.frames, after.frames)


def frames_of_five_atoms(n_windows: int, n_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n_windows, n_frames, 5, 3, generator=generator)


def test_dihedral_angles_are_those_of_mdtraj() -> None:
    frames, atoms = frames_of_five_atoms(1, 500)[0], [[0, 1, 2, 3], [4, 2, 0, 1]]
    trajectory = mdtraj.Trajectory(frames.numpy(), None)
    difference = dihedral_angles(frames, torch.tensor(atoms)).numpy()
    difference -= mdtraj.compute_dihedrals(trajectory, atoms, opt=False)
    assert np.abs(np.sin(difference / 2)).max() < 1e-5


def test_torsional_windows_survive_a_file(tmp_path) -> None:
    path = tmp_path / "torsional.npz"
    frames, atoms = frames_of_five_atoms(2, 6), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    c, k = torch.tensor([[0.5, -3.0], [1.0, 2.0]]), torch.tensor([[10.0, 0.0], [3.0, 4.0]])
    before = BiasedSamples.torsional(frames, atoms, c, k, kT=2.5, n_walkers=3, system="mine")
    theta = dihedral_angles(before.frames_flat, atoms)
    expected = (k[:, None] * (1 - torch.cos(theta - c[:, None]))).sum(-1) / 2.5
    assert torch.allclose(before.reduced_bias, expected, atol=1e-12)
    before.write(path)
    after = BiasedSamples.read(path)
    assert torch.equal(before.reduced_bias, after.reduced_bias)
    assert torch.equal(after.form["dihedrals"], atoms)
    assert (after.kT, after.n_walkers, after.system) == (2.5, 3, "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": torch.zeros(2, 6, 3)}, r"\(n_windows, n_frames, n_atoms, 3\), got \(2, 6, 3\)"),
        ({"dihedrals": torch.tensor([0, 1, 2, 3])}, "indices of four atoms each"),
        ({"dihedrals": torch.rand(1, 4)}, "indices of four atoms each.*float32"),
        ({"dihedrals": torch.tensor([[0, 1, 2, 5]])}, r"four different atoms of 5, got \[\[0, 1,"),
        ({"dihedrals": torch.tensor([[0, 1, 2, 1]])}, "four different atoms of 5"),
        ({"centers": torch.zeros(2)}, r"centers must hold finite numbers of shape \(2, 1\)"),
        ({"stiffness": torch.full((2, 1), torch.inf)}, "stiffness must hold finite numbers"),
    ],
)
def test_bad_torsional_windows_are_refused(change: dict, message: str) -> None:
    arguments = {
        "frames": frames_of_five_atoms(2, 6),
        "dihedrals": torch.tensor([[0, 1, 2, 3]]),
        "centers": torch.zeros(2, 1),
        "stiffness": torch.ones(2, 1),
    }
    with pytest.raises(ValueError, match=message):
        BiasedSamples.torsional(**(arguments | change))
