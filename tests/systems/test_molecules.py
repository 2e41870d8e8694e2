import pickle
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from openmm import app
from scipy.spatial.transform import Rotation

from bopito_inverse.shipped import shipped_data
from bopito_inverse.systems import AlanineDipeptide, Molecule
from bopito_inverse.systems.molecules import _atom_types

DIALANINE = shipped_data("ala2") / "dialanine.pdb"
ALANINE = shipped_data("ala2") / "alanine_dipeptide.pdb"


@pytest.fixture(scope="module")
def alanine() -> AlanineDipeptide:
    return AlanineDipeptide()


def types(molecule: Molecule) -> dict[str, int]:
    atoms = zip(molecule.topology.atoms, molecule.atom_types.tolist(), strict=True)
    return {str(atom): kind for atom, kind in atoms}


def test_atom_types_follow_the_bonded_graph(alanine: AlanineDipeptide) -> None:
    kind = types(alanine)
    groups: dict[int, set[str]] = {}
    for name, number in kind.items():
        groups.setdefault(number, set()).add(name)
    methyls = [{name for name in kind if name.startswith(start)} for start in ("ALA2-HB", "ACE1-H")]
    methyls.append({name for name in kind if name.startswith("NME3-H")} - {"NME3-H"})
    assert sorted(map(len, groups.values())) == [1] * 13 + [3] * 3
    assert all(methyl in groups.values() for methyl in methyls)
    assert sorted(groups) == list(range(16))


def test_atom_types_of_another_molecule() -> None:
    kind = types(Molecule(DIALANINE))
    heavy = [name for name in kind if "-H" not in name]
    assert len(heavy) == 15
    assert len({kind[name] for name in heavy}) == 15  # two residues, and yet none are equal


def test_atom_types_tell_the_hands_of_a_pair_apart() -> None:
    """Isobutanol, (CH3)2-CH-CH2-OH: the methyls and the hydrogens of CH2 are pairs."""
    elements = "CCCCOHHHHHHHHHH"
    bonds = [(0, 2), (1, 2), (2, 3), (3, 4), (4, 14), (2, 11), (3, 12), (3, 13)]
    bonds += [(0, i) for i in (5, 6, 7)] + [(1, i) for i in (8, 9, 10)]
    topology = mdtraj.Topology()
    residue = topology.add_residue("IBU", topology.add_chain())
    for element in elements:
        topology.add_atom(element, mdtraj.element.get_by_symbol(element), residue)
    x = np.random.default_rng(0).normal(size=(15, 3))
    kind = _atom_types(topology, np.array(bonds), x)
    groups = [{i for i in range(15) if kind[i] == k} for k in set(kind)]
    assert len(groups) == 11
    assert {5, 6, 7} in groups
    assert {8, 9, 10} in groups
    turned = Rotation.from_euler("xyz", [1, 2, 3]).apply(x)
    assert np.array_equal(_atom_types(topology, np.array(bonds), turned), kind)
    mirrored = _atom_types(topology, np.array(bonds), -x)
    order = [1, 0, 2, 3, 4, 8, 9, 10, 5, 6, 7, 11, 13, 12, 14]
    assert np.array_equal(mirrored, kind[order])


def test_energy_and_force_are_those_of_openmm(alanine: AlanineDipeptide) -> None:
    pdb = app.PDBFile(str(ALANINE))
    system = app.ForceField("amber99sbildn.xml", "amber99_obc.xml").createSystem(
        pdb.topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds
    )
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    noise = 0.003 * torch.randn(3, 22, 3, generator=torch.Generator().manual_seed(0))
    x = alanine.positions + noise
    energy, force = alanine.energy(x), alanine.force(x)
    for frame, u, f in zip(x.double().numpy(), energy, force, strict=True):
        context.setPositions(frame)
        state = context.getState(getEnergy=True, getForces=True)
        assert float(u) == pytest.approx(state.getPotentialEnergy()._value, abs=1e-6)
        assert np.allclose(f, state.getForces(asNumpy=True)._value, rtol=1e-5, atol=1e-3)


def test_force_is_the_slope_of_the_energy(alanine: AlanineDipeptide) -> None:
    x = alanine.positions.double()
    direction = torch.randn(22, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = torch.stack([x + 1e-3 * direction, x - 1e-3 * direction]).float()
    moved = (ends[0] - ends[1]).double()
    slope = float(alanine.energy(ends).diff())
    middle = alanine.force(ends.mean(0)[None])[0].double()
    assert slope == pytest.approx(float((middle * moved).sum()), rel=5e-3)


def test_kinds_of_molecules(tmp_path: Path) -> None:
    vacuum = Molecule(ALANINE, "amber99sbildn.xml", constraints=None, time_step=0.001)
    assert vacuum.force_field == ("amber99sbildn.xml",)
    assert vacuum.name == "alanine_dipeptide"
    assert vacuum.system.getNumConstraints() == 0
    assert vacuum.frame_time == pytest.approx(0.5)
    assert vacuum.kT == pytest.approx(2.494339, rel=1e-6)
    everything = Molecule(ALANINE, constraints="allbonds")
    assert everything.system.getNumConstraints() == 21
    loaded = mdtraj.load(str(DIALANINE))
    assert Molecule(loaded).name == "molecule"
    assert Molecule(loaded).event_shape == (32, 3)
    assert repr(Molecule(loaded, name="two")) == (
        "Molecule('two', 32 atoms, 300 K, amber99sbildn.xml + amber99_obc.xml)"
    )


def test_molecules_are_picklable(alanine: AlanineDipeptide) -> None:
    energy = alanine.energy(alanine.positions[None])  # there is a context now
    copy = pickle.loads(pickle.dumps(alanine))
    assert torch.equal(copy.energy(copy.positions[None]), energy)
    assert copy.topology == alanine.topology


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_thermostat_follows_its_seed(alanine: AlanineDipeptide, platform: str) -> None:
    def end(seed: int) -> Any:
        context = alanine.context(platform, seed=seed)
        context.setVelocities(np.zeros((22, 3)))
        context.getIntegrator().step(200)
        return context.getState(getPositions=True).getPositions(asNumpy=True)._value

    assert np.array_equal(end(3), end(3))
    assert not np.array_equal(end(3), end(4))


# mdtraj leaves files open that it cannot read
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_bad_molecules_are_refused(alanine: AlanineDipeptide, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"structure: there is no file .*missing\.pdb"):
        Molecule(tmp_path / "missing.pdb")
    for name in ("text.pdb", "text.gro", "text.unknown"):
        (tmp_path / name).write_text("no molecule\n")
        with pytest.raises(ValueError, match=rf"structure .*{name} cannot be read by mdtraj"):
            Molecule(tmp_path / name)
    unknown = tmp_path / "unknown.pdb"
    unknown.write_text(ALANINE.read_text().replace("ALA", "XYZ"))
    with pytest.raises(ValueError, match=r"no parameters for this structure: .*XYZ.* Name another"):
        Molecule(unknown)
    bald = tmp_path / "bald.pdb"
    loaded = mdtraj.load(str(ALANINE))
    loaded.atom_slice(loaded.topology.select("element != H")).save(str(bald))
    with pytest.raises(ValueError, match=r"no parameters .*ACE.* complete the structure \(hydro"):
        Molecule(bald)
    with pytest.raises(ValueError, match=r"charmm36\.xml has no parameters for this structure"):
        Molecule(ALANINE, ["charmm36.xml"])
    for field in ("amber1066.xml", str(ALANINE)):
        with pytest.raises(ValueError, match="force_field must name files that OpenMM reads, got"):
            Molecule(ALANINE, [field])
    with pytest.raises(ValueError, match=r"constraints must be one of .*got 'angles'"):
        Molecule(ALANINE, constraints="angles")  # type: ignore[arg-type]
    for name in ("temperature", "friction", "time_step"):
        with pytest.raises(ValueError, match=f"{name} must be a positive number, got 0"):
            Molecule(ALANINE, **{name: 0})
    with pytest.raises(ValueError, match=r"platform must be one of .*Reference.*, got 'Abacus'"):
        alanine.context("Abacus")
    with pytest.raises(ValueError, match=r"x must hold frames of shape \(22, 3\), got \(21, 3\)"):
        alanine.energy(torch.zeros(1, 21, 3))


def test_frames_of_another_unit_or_order_are_refused(alanine: AlanineDipeptide) -> None:
    x = alanine.positions.expand(5, -1, -1)
    assert torch.equal(alanine.as_frames("x", x), x)
    with pytest.raises(ValueError, match=r"x must be in nm.* ACE1-\S+ to \S+ has .* length of 1\."):
        alanine.as_frames("x", 10 * x)
    with pytest.raises(ValueError, match="with the atoms in the order of 'alanine dipeptide'"):
        alanine.as_frames("x", x.flip(1))
    noisy = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    alanine.as_frames("x", noisy[:1])  # as a generative model makes them
