"""Enhanced sampling of molecules, against a molecule whose torsion is free or a single cosine.

Bonds and angles do not change when one side of a molecule turns about a bond, so that without any
other force the dihedral is uniform, and von Mises distributed in a window k (1 - cos(theta - c)).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openmm
import pytest
import torch
from scipy.special import i0, i1

from bopito_inverse.shipped import shipped_data
from bopito_inverse.simulate import (
    free_energy_profile,
    mbar,
    replica_exchange,
    umbrella_dihedrals,
)
from bopito_inverse.simulate.biased import BiasedSamples, dihedral_angles
from bopito_inverse.simulate.enhanced_md import _exchange, _set_biases, _with_biases
from bopito_inverse.systems.molecules import AlanineDipeptide, Molecule

PHI, PSI = [4, 6, 8, 10], [6, 8, 10, 16]
DIALANINE = shipped_data("ala2") / "dialanine.pdb"


def rotor(barrier: float = 0.0) -> Molecule:
    """Bonds and angles of alanine dipeptide, and barrier (1 - cos phi), frames of 0.2 ps."""
    molecule = AlanineDipeptide(steps_per_frame=100)
    for i in reversed(range(molecule.system.getNumForces())):
        if molecule.system.getForce(i).getName() not in ("HarmonicBondForce", "HarmonicAngleForce"):
            molecule.system.removeForce(i)
    if barrier:
        torsion = openmm.CustomTorsionForce(f"{barrier} * (1 - cos(theta))")
        torsion.addTorsion(*PHI, [])
        molecule.system.addForce(torsion)
    return molecule


def angles(biased: BiasedSamples) -> torch.Tensor:
    """phi, (n_windows, n_walkers, frames of a walker)."""
    phi = dihedral_angles(biased.frames_flat, torch.tensor([PHI]))
    return phi.view(biased.n_windows, biased.n_walkers, -1)


def test_windows_of_a_free_dihedral_are_von_mises_and_its_free_energy_is_flat() -> None:
    centers, k = np.array([0.0, 2.0, 4.0]), np.array([4.0, 8.0, 8.0])
    molecule = rotor()
    biased = umbrella_dihedrals(molecule, "phi", centers, k, n_frames=300, burn_in=15)
    concentration = k / molecule.kT
    off = (angles(biased) - torch.tensor(centers)[:, None, None]).numpy()
    for series, mean in ((np.cos(off), i1(concentration) / i0(concentration)), (np.sin(off), 0.0)):
        walkers = series.mean(2)
        assert np.abs((walkers.mean(1) - mean) / walkers.std(1) * 9**0.5).max() < 4.5
    result = mbar(biased)
    assert result.status == "ok"
    exact = concentration - np.log(i0(concentration))
    z = (result.free_energies.numpy() - exact) / result.free_energy_errors.numpy()
    assert np.abs(z).max() < 4
    edges = np.linspace(0, 2 * np.pi, 9)
    profile = free_energy_profile(biased, angles(biased).flatten(), edges, period=2 * np.pi)
    assert np.abs((profile.free_energy - np.log(2 * np.pi)) / profile.error).max() < 4
    assert profile.error.max() < 0.3


def test_replica_exchange_samples_each_temperature_and_weights_give_that_of_the_molecule() -> None:
    molecule = rotor(barrier=6.0)
    temperatures = np.array([300.0, 400.0, 550.0])
    biased = replica_exchange(molecule, temperatures, n_frames=480, n_walkers=6, burn_in=30)
    concentration = 6.0 / molecule.kT * 300 / temperatures
    walkers = angles(biased).cos().mean(2).numpy()
    z = (walkers.mean(1) - i1(concentration) / i0(concentration)) / walkers.std(1)
    assert np.abs(z * 5**0.5).max() < 4.5
    assert np.diff(walkers.mean(1)).max() < 0
    result = mbar(biased)
    assert result.status == "ok"
    weighted = float((result.weights * angles(biased).cos().flatten()).sum())
    exact = i1(concentration[0]) / i0(concentration[0])
    assert weighted == pytest.approx(exact, abs=0.06)
    energies = molecule.energy(biased.frames_flat)
    assert torch.allclose(biased.form["energies"], energies - energies.min(), atol=0.05)


def test_exchanged_frames_take_velocities_scaled_to_the_new_temperature() -> None:
    molecule = rotor(barrier=6.0)
    temperatures = torch.tensor([300.0, 600.0], dtype=torch.float64)
    contexts = [molecule.context(temperature=float(t)) for t in temperatures]
    contexts[0].getIntegrator().step(2000)  # higher in energy than the minimum: always exchanged
    openmm.LocalEnergyMinimizer.minimize(contexts[1])
    contexts[1].setVelocitiesToTemperature(600, 1)
    before = [c.getState(getPositions=True, getVelocities=True, getEnergy=True) for c in contexts]
    u = _exchange(contexts, temperatures, 0, torch.Generator().manual_seed(0))
    after = [c.getState(getPositions=True, getVelocities=True) for c in contexts]
    for k in (0, 1):
        old, new = before[1 - k], after[k]
        assert np.array_equal(new.getPositions(True)._value, old.getPositions(True)._value)
        scale = (temperatures[k] / temperatures[1 - k]).sqrt().item()
        assert np.allclose(new.getVelocities(True)._value, old.getVelocities(True)._value * scale)
        assert u[k] == old.getPotentialEnergy()._value


def test_reduced_bias_is_the_energy_that_openmm_adds() -> None:
    molecule = AlanineDipeptide()
    atoms, c, k = (
        torch.tensor([PHI, PSI]),
        torch.tensor([[1.0, 2.0], [0.3, -1.0]]),
        torch.tensor([[30.0, 10.0], [0.0, 20.0]]),
    )
    generator = torch.Generator().manual_seed(0)
    frames = molecule.positions + 0.01 * torch.randn(2, 5, 22, 3, generator=generator)
    biased = BiasedSamples.torsional(frames, atoms, c, k, molecule.kT)
    context = molecule.context(system=_with_biases(molecule.system, atoms))
    unbiased = molecule.energy(biased.frames_flat)
    for row, center, stiffness in zip(biased.reduced_bias, c, k, strict=True):
        _set_biases(context, center, stiffness)
        for frame, energy, bias in zip(biased.frames_flat.double(), unbiased, row, strict=True):
            context.setPositions(frame.numpy())
            total = context.getState(getEnergy=True).getPotentialEnergy()._value
            assert (total - float(energy)) / molecule.kT == pytest.approx(float(bias), abs=1e-6)


def test_windows_of_a_second_molecule_are_reached_and_kept_in_a_folder(tmp_path) -> None:
    molecule = Molecule(DIALANINE, steps_per_frame=50)
    atoms = [[4, 6, 8, 10]]
    options = {"n_frames": 4, "n_walkers": 2, "burn_in": 20, "folder": tmp_path / "windows"}
    centers = [-2.0, 1.0]
    first = umbrella_dihedrals(molecule, atoms, centers, 100.0, **options)
    phi = dihedral_angles(first.frames_flat, torch.tensor(atoms)).view(2, 4)
    assert float((phi - torch.tensor(centers)[:, None]).abs().max()) < 0.7
    files = sorted((tmp_path / "windows").glob("window_*.npz"))
    assert len(files) == 2
    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    with ThreadPoolExecutor(1) as executor:  # what is shared is pickled
        again = umbrella_dihedrals(
            molecule, atoms, centers, 100.0, **options, executor=executor, progress=True
        )
    assert torch.equal(again.frames, first.frames)
    assert torch.equal(again.reduced_bias, first.reduced_bias)
    assert files[0].stat().st_mtime_ns == kept
    files[1].write_bytes(files[1].read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"window 1 failed: .*window_001\.npz is no readable"):
        umbrella_dihedrals(molecule, atoms, centers, 100.0, **options)
    for change, name in (
        ({"stiffness": 99.0}, r"stiffness \[\[100.0\], \[100.0\]\], got \[\[99.0\], \[99.0\]\]"),
        ({"seed": 1}, "seed 0, got 1"),
        ({"starts": molecule.positions.repeat(2, 1, 1) + 0.1}, "starts '"),
        ({"molecule": Molecule(DIALANINE, ("amber14-all.xml",), steps_per_frame=50)}, "system '"),
    ):
        arguments = {"molecule": molecule, "dihedrals": atoms, "centers": centers}
        with pytest.raises(ValueError, match=f"windows was made with {name}.*take another folder"):
            umbrella_dihedrals(**(arguments | {"stiffness": 100.0} | options | change))


def test_a_centre_that_is_not_reached_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"window 1 failed: .*did not reach the centre \[2\.5\]"):
        umbrella_dihedrals(rotor(), "phi", [-1.4, 2.5], 10.0, 2, n_walkers=1, burn_in=0)


def test_stiffness_zero_leaves_a_dihedral_alone() -> None:
    options = {"n_frames": 3, "n_walkers": 1, "burn_in": 1, "seed": 3}
    here, there = (
        umbrella_dihedrals(rotor(), ["phi", "psi"], [[-1.4, c]], [[5.0, 0.0]], **options)
        for c in (0.5, 2.5)
    )
    assert torch.equal(here.frames, there.frames)
    assert torch.equal(here.reduced_bias, there.reduced_bias)


def test_ladders_are_resumed_and_seeded(tmp_path) -> None:
    options = {"temperatures": [300.0, 400.0], "n_frames": 6, "n_walkers": 2, "burn_in": 1}
    first = replica_exchange(rotor(), folder=tmp_path, **options)
    (tmp_path / "ladder_000.npz").unlink()
    again = replica_exchange(rotor(), folder=tmp_path, **options)
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.reduced_bias, again.reduced_bias)
    ladders = first.frames.unflatten(1, (2, 3))
    assert not torch.equal(ladders[:, 0], ladders[:, 1])
    third = replica_exchange(rotor(), **(options | {"n_frames": 2, "stride": 3}))
    assert torch.equal(third.frames, ladders[:, :, 2])
    with pytest.raises(ValueError, match=r"temperatures \[300.0, 400.0\], got \[300.0, 410.0\]"):
        replica_exchange(rotor(), folder=tmp_path, **(options | {"temperatures": [300.0, 410.0]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dihedrals": "omega"}, "dihedrals must be 'phi', 'psi' or indices of atoms, got 'omega'"),
        ({"dihedrals": [[0, 1, 2]]}, "indices of four atoms each"),
        ({"dihedrals": []}, "indices of four atoms each"),
        ({"centers": [[0.0, 1.0]]}, r"of shape \(n_windows, 1\), got shape \(1, 2\)"),
        ({"centers": [0.0, np.nan]}, "centers must be finite"),
        ({"centers": [0.0, 60.0]}, "centers must be in radians, .* got 60"),
        ({"stiffness": [1.0, 2.0, 3.0]}, r"one for each of the centres \(2, 1\)"),
        ({"stiffness": -1.0}, "stiffness must not be negative"),
        ({"n_frames": 7}, r"n_frames must be a multiple of n_walkers \(2\), got 7"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        (
            {"starts": AlanineDipeptide().positions.expand(3, -1, -1)},
            "one frame for each of 2 walkers, got 3",
        ),
        ({"starts": torch.zeros(2, 21, 3)}, r"starts must hold frames of shape \(22, 3\)"),
    ],
)
def test_bad_windows_are_refused(change: dict, message: str) -> None:
    arguments = {"dihedrals": "phi", "centers": [0.0, 1.0], "stiffness": 3.0}
    with pytest.raises(ValueError, match=message):
        umbrella_dihedrals(rotor(), **(arguments | {"n_frames": 6, "n_walkers": 2} | change))


@pytest.mark.parametrize(("name", "has"), [("phi", 2), ("psi3", 2), ("phi0", 2)])
def test_a_name_of_no_or_of_several_dihedrals_is_refused(name: str, has: int) -> None:
    words = rf"{name!r} must be the name of one .* it has {has}, .* say {name[:3]}1 for the first"
    with pytest.raises(ValueError, match=words):
        umbrella_dihedrals(Molecule(DIALANINE), name, [0.0], 3.0, 2, n_walkers=2)


def test_dihedrals_of_a_chain_have_numbers() -> None:
    molecule = Molecule(DIALANINE, steps_per_frame=1)
    made = umbrella_dihedrals(
        molecule, ["phi1", "psi2"], [[0.0, 0.0]], 0.0, 2, n_walkers=2, burn_in=0
    )
    assert made.form["dihedrals"].tolist() == [[4, 6, 8, 10], [16, 18, 20, 26]]
