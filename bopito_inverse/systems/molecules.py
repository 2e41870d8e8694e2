r"""Molecules: OpenMM systems made of a structure and force-field files.

Frames are positions (n_atoms, 3) in nm, with no periodic boundaries; times are in ps, energies in
kJ/mol. Dynamics is Langevin's in the middle scheme (Zhang et al., J. Phys. Chem. A 123, 6056, 2019)
at `temperature`, with the bonds of hydrogen constrained unless said otherwise.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from bopito_inverse.arguments import as_count, as_frames, as_positive
from bopito_inverse.shipped import shipped_data

if TYPE_CHECKING:
    import mdtraj
    import openmm

GAS_CONSTANT = 0.00831446261815324  # kJ / (mol K)
MAX_STRETCH = 1.5  # of a bond, by its median over frames
PROPERTIES = {"CPU": {"Threads": "1", "DeterministicForces": "true"}}  # more: not reproducible
CONSTRAINTS = {"hbonds": "HBonds", "allbonds": "AllBonds", None: None}


class Molecule:
    """One molecule in vacuum or implicit solvent.

    Args:
        structure: a file that mdtraj reads with its topology (PDB, h5, ...), or an mdtraj
            trajectory; its first frame is where simulations start. Hydrogens must be there.
        force_field: OpenMM force-field files, by the names that OpenMM ships or by path. An
            implicit solvent is one of them (`amber99_obc.xml`), else the molecule is in vacuum.
        temperature: K.
        friction: of the thermostat, 1/ps.
        time_step: ps.
        steps_per_frame: integrator steps between recorded frames.
        constraints: `"hbonds"`, `"allbonds"` or None.
        name: written into files, so that a model is not used on another system; by default the
            name of the file.

    Attributes:
        topology: mdtraj topology.
        positions: (n_atoms, 3), nm, float32.
        kT: kJ/mol.
        bonds: (n_bonds, 2), indices of atoms.
        atom_types: (n_atoms,), whole numbers from zero; atoms that neither the bonded graph nor the
            handedness of the structure tells apart (the hydrogens of a methyl group, but not those
            of a methylene group) have one type.

    Raises:
        FileNotFoundError: there is no such structure.
        ValueError: a structure that mdtraj cannot read, or a residue that the force field does not
            know; the message says which and what to do.

    >>> molecule = AlanineDipeptide()
    >>> molecule
    Molecule('alanine dipeptide', 22 atoms, 300 K, amber99sbildn.xml + amber99_obc.xml)
    >>> molecule.energy(molecule.positions[None]).shape
    torch.Size([1])
    """

    def __init__(
        self,
        structure: "str | Path | mdtraj.Trajectory",
        force_field: Sequence[str] = ("amber99sbildn.xml", "amber99_obc.xml"),
        temperature: float = 300.0,
        friction: float = 1.0,
        time_step: float = 0.002,
        steps_per_frame: int = 500,
        constraints: Literal["hbonds", "allbonds"] | None = "hbonds",
        name: str | None = None,
    ) -> None:
        first = _read(structure)
        self.topology = first.topology
        self.positions = torch.from_numpy(np.array(first.xyz[0], dtype=np.float32))
        self.force_field = (force_field,) if isinstance(force_field, str) else tuple(force_field)
        self.temperature = as_positive("temperature", temperature)
        self.friction = as_positive("friction", friction)
        self.time_step = as_positive("time_step", time_step)
        self.steps_per_frame = as_count("steps_per_frame", steps_per_frame)
        if constraints not in CONSTRAINTS:
            raise ValueError(f"constraints must be one of {list(CONSTRAINTS)}, got {constraints!r}")
        self.constraints = constraints
        self.kT = GAS_CONSTANT * self.temperature
        self.name = name or ("molecule" if hasattr(structure, "xyz") else Path(structure).stem)
        self.event_shape = tuple(self.positions.shape)
        bonds = [[a.index, b.index] for a, b in self.topology.bonds]
        self.bonds = np.array(bonds, dtype=int).reshape(-1, 2)
        self.atom_types = _atom_types(self.topology, self.bonds, self.positions.double().numpy())
        self.system = _parametrise(self.topology, self.force_field, CONSTRAINTS[constraints])
        self._context: Any = None

    def __repr__(self) -> str:
        return (
            f"Molecule({self.name!r}, {self.topology.n_atoms} atoms, {self.temperature:g} K, "
            f"{' + '.join(self.force_field)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the OpenMM context, which cannot be sent to other processes."""
        return self.__dict__ | {"_context": None}

    @property
    def frame_time(self) -> float:
        """Time between frames, ps."""
        return self.time_step * self.steps_per_frame

    def context(
        self,
        platform: str = "Reference",
        seed: int = 0,
        temperature: float | None = None,
        system: "openmm.System | None" = None,
    ) -> "openmm.Context":
        """An OpenMM context with a Langevin integrator, at `positions`.

        Args:
            platform: as OpenMM names them.
            seed: of the thermostat, a non-negative integer.
            temperature: K; by default the molecule's.
            system: a changed copy of `self.system`, for example with a bias.

        Raises:
            ValueError: a platform that this OpenMM does not have.
        """
        import openmm

        integrator = openmm.LangevinMiddleIntegrator(
            temperature or self.temperature, self.friction, self.time_step
        )
        integrator.setRandomNumberSeed(1 + seed % (2**31 - 2))  # zero would be a random one
        properties = PROPERTIES.get(platform, {})
        context = openmm.Context(system or self.system, integrator, _platform(platform), properties)
        context.setPositions(self.positions.double().numpy())
        return context

    def energy(self, x: Tensor | np.ndarray) -> Tensor:
        """Potential energy of frames (B, n_atoms, 3), (B,), kJ/mol, float64, on the CPU."""
        return self._evaluate(x, forces=False)[0]

    def force(self, x: Tensor | np.ndarray) -> Tensor:
        """-dU/dx of frames (B, n_atoms, 3), kJ/(mol nm), float32, on the CPU.

        Forces along constrained bonds are not in it: OpenMM leaves the terms of these bonds out.
        """
        return self._evaluate(x, forces=True)[1]

    def as_frames(self, name: str, x: Tensor | np.ndarray | Sequence[Any]) -> Tensor:
        """Frames (n, n_atoms, 3) of this molecule, nm, on the CPU; `name` appears in errors.

        Raises:
            ValueError: another shape, NaN or infinite positions, or a fifth of the bonds nowhere
                near as long as in the structure: another unit, or atoms in another order.
        """
        frames = as_frames(name, x, self.event_shape)
        some = frames[:: max(1, len(frames) // 100)]
        usual = _bond_lengths(some, self.bonds).median(0).values
        ratio = usual / _bond_lengths(self.positions[None], self.bonds)[0]
        off = ratio.log().abs()
        if len(off) and off.quantile(0.8) > math.log(MAX_STRETCH):
            worst = int(off.argmax())
            a, b = (self.topology.atom(int(i)) for i in self.bonds[worst])
            raise ValueError(
                f"{name} must be in nm, with the atoms in the order of {self.name!r}: the bond "
                f"{a} to {b} has a length of {usual[worst]:.3g}, and in the structure of "
                f"{usual[worst] / ratio[worst]:.3g} nm"
            )
        return frames

    def _evaluate(self, x: Tensor | np.ndarray, forces: bool) -> tuple[Tensor, Tensor]:
        frames = as_frames("x", x, self.event_shape)
        if self._context is None:
            self._context = self.context()
        energies, gradients = [], torch.zeros_like(frames)
        for i, frame in enumerate(frames.double().numpy()):
            self._context.setPositions(frame)
            state = self._context.getState(getEnergy=True, getForces=forces)
            energies.append(state.getPotentialEnergy()._value)
            if forces:
                gradients[i] = torch.from_numpy(state.getForces(asNumpy=True)._value)
        return torch.tensor(energies, dtype=torch.float64), gradients


class AlanineDipeptide(Molecule):
    """Capped alanine, ACE-ALA-NME, 22 atoms: amber99sbildn with OBC implicit solvent, 300 K.

    Time step 2 fs, hydrogen bonds constrained, friction 1/ps; a frame is 1 ps.
    """

    def __init__(
        self, temperature: float = 300.0, friction: float = 1.0, steps_per_frame: int = 500
    ) -> None:
        super().__init__(
            shipped_data("ala2") / "alanine_dipeptide.pdb",
            temperature=temperature,
            friction=friction,
            steps_per_frame=steps_per_frame,
            name="alanine dipeptide",
        )


def _read(structure: Any) -> Any:
    """An mdtraj trajectory."""
    import mdtraj

    if isinstance(structure, mdtraj.Trajectory):
        return structure
    path = Path(structure)
    if not path.is_file():
        raise FileNotFoundError(f"structure: there is no file {path}")
    try:
        return mdtraj.load(str(path))
    except Exception as error:  # each reader of mdtraj has errors of its own
        raise ValueError(f"structure {path} cannot be read by mdtraj: {error}") from error


def _parametrise(topology: Any, force_field: tuple[str, ...], constraints: str | None) -> Any:
    """An OpenMM system without cutoff, or an error that says what the force field lacks."""
    from openmm import app

    try:
        field = app.ForceField(*force_field)
    except Exception as error:  # a bare one where a file is no XML
        raise ValueError(
            f"force_field must name files that OpenMM reads, got {list(force_field)}: {error}"
        ) from error
    kind = None if constraints is None else getattr(app, constraints)
    try:
        return field.createSystem(
            topology.to_openmm(), nonbondedMethod=app.NoCutoff, constraints=kind
        )
    except Exception as error:  # a bare one from the scripts of some force fields
        raise ValueError(
            f"the force field {' + '.join(force_field)} has no parameters for this structure: "
            f"{error} Name another force field, or complete the structure (hydrogens, caps, "
            "terminal atoms) with PDBFixer or `openmm.app.Modeller`"
        ) from error


def _bond_lengths(x: Tensor, bonds: np.ndarray) -> Tensor:
    """Of frames (n, n_atoms, 3), (n, n_bonds)."""
    a, b = torch.from_numpy(bonds).T
    return (x[:, a] - x[:, b]).norm(dim=2)


def _platform(name: str) -> Any:
    import openmm

    known = [
        openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())
    ]
    if name not in known:
        raise ValueError(f"platform must be one of {', '.join(known)}, got {name!r}")
    return openmm.Platform.getPlatformByName(name)


def _atom_types(topology: Any, bonds: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Kinds of atoms by the bonded graph and by the handedness of positions x (n_atoms, 3)."""
    neighbours: list[list[int]] = [[] for _ in x]
    for a, b in bonds:
        neighbours[a].append(b)
        neighbours[b].append(a)
    colours = _refined([atom.element.atomic_number for atom in topology.atoms], neighbours)
    while (split := _refined(_handed(colours, neighbours, x), neighbours)) != colours:
        colours = split
    return np.array(colours)


def _refined(colours: list[int], neighbours: list[list[int]]) -> list[int]:
    """Colours told apart by those of neighbours until nothing changes, numbered from zero."""
    while True:
        seen = [
            (colour, tuple(sorted(colours[j] for j in own)))
            for colour, own in zip(colours, neighbours, strict=True)
        ]
        number = {kind: i for i, kind in enumerate(sorted(set(seen)))}
        refined = [number[kind] for kind in seen]
        if len(number) == len(set(colours)):
            return refined
        colours = refined


def _handed(colours: list[int], neighbours: list[list[int]], x: np.ndarray) -> list[int]:
    """Two colours for a pair of one colour, at an atom with two other neighbours of two more.

    Seen from one of the pair the other three neighbours go round to the right, from the other one
    to the left, and that stays so: no dynamics exchanges the hydrogens of a methylene group, as it
    does those of a methyl group.
    """
    made = [2 * colour for colour in colours]
    for centre, own in enumerate(neighbours):
        if len(own) != 4 or len({colours[j] for j in own}) != 3:
            continue
        single = sorted(
            (j for j in own if sum(colours[k] == colours[j] for k in own) == 1),
            key=lambda j: colours[j],
        )
        i, j = set(own) - set(single)
        to = x[single] - x[centre]
        made[i if np.linalg.det([x[i] - x[j], *to]) > 0 else j] += 1
    return made
