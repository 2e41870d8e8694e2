r"""Features: functions of a frame, by name, for the observables of a run file.

Those of a one-dimensional system map frames `(B, 1)` to one number each, `(B, 1)`:

    x      the position
    x^2    its square
    x>0    one where the position is above zero, else zero: which side of a barrier at zero

Those of a molecule map positions `(B, n_atoms, 3)` in nm to `(B,)`. They do not change when the
molecule is moved or turned, and follow autograd and forward mode:

    phi, psi                 backbone dihedral, rad; `phi2` is the second one of the chain
    distance(i, j)           nm
    angle(i, j, k)           at atom j, rad, in [0, pi]
    dihedral(i, j, k, l)     about the bond of j and k, rad, in (-pi, pi]
    sin(phi), cos(phi)       of any dihedral
    phi>0                    one where sin(phi) > 0, else zero, of any dihedral

Atoms are counted from 0 or named as mdtraj names them, `distance(ACE1-CH3, NME3-C)`. With bonds
`b_1 = r_j - r_i`, `b_2 = r_k - r_j`, `b_3 = r_l - r_k`, the dihedral angle is

    atan2(|b_2| b_1 . (b_2 x b_3), (b_1 x b_2) . (b_2 x b_3)),

zero in cis and of the sign of IUPAC (Pure Appl. Chem. 40, 291, 1974): looking along `b_2`, positive
where `b_3` is turned clockwise from `b_1`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from bopito_inverse.arguments import as_count
from bopito_inverse.observables.correlations import Observable

if TYPE_CHECKING:
    import mdtraj


def position(x: Tensor) -> Tensor:
    """The position x."""
    return x


def square(x: Tensor) -> Tensor:
    """The squared position x^2."""
    return x.square()


def above_zero(x: Tensor) -> Tensor:
    """One where x > 0, else zero; its derivative vanishes."""
    return (x > 0).to(x.dtype)


FEATURES: dict[str, Observable] = {"x": position, "x^2": square, "x>0": above_zero}


@dataclass(frozen=True)
class Distance:
    """Distance of atoms i and j, nm.

    >>> Distance(0, 1)(torch.tensor([[[0.0, 0.0, 0.0], [0.3, 0.0, 0.4]]]))
    tensor([0.5000])
    """

    i: int
    j: int

    def __post_init__(self) -> None:
        _check_atoms(self.i, self.j)

    @property
    def __name__(self) -> str:
        return f"distance({self.i}, {self.j})"

    def __call__(self, x: Tensor) -> Tensor:
        """Values (B,) at frames (B, n_atoms, 3)."""
        r_i, r_j = _positions(self.__name__, x, self.i, self.j)
        return torch.linalg.vector_norm(r_j - r_i, dim=-1)


@dataclass(frozen=True)
class Angle:
    """Angle i-j-k at atom j, rad, in [0, pi]."""

    i: int
    j: int
    k: int

    def __post_init__(self) -> None:
        _check_atoms(self.i, self.j, self.k)

    @property
    def __name__(self) -> str:
        return f"angle({self.i}, {self.j}, {self.k})"

    def __call__(self, x: Tensor) -> Tensor:
        """Values (B,) at frames (B, n_atoms, 3)."""
        r_i, r_j, r_k = _positions(self.__name__, x, self.i, self.j, self.k)
        u, v = r_i - r_j, r_k - r_j
        sine = torch.linalg.vector_norm(torch.linalg.cross(u, v), dim=-1)
        return torch.atan2(sine, (u * v).sum(-1))


@dataclass(frozen=True)
class Dihedral:
    """Dihedral angle i-j-k-l, rad, in (-pi, pi], or a function of it.

    `function` is None for the angle itself, which jumps at pi, `"sin"` or `"cos"` for its sine or
    cosine, and `">0"` for one where the sine is positive, else zero.
    """

    i: int
    j: int
    k: int
    l: int  # noqa: E741
    function: Literal["sin", "cos", ">0"] | None = None

    def __post_init__(self) -> None:
        _check_atoms(self.i, self.j, self.k, self.l)
        if self.function not in (None, "sin", "cos", ">0"):
            raise ValueError(f"function must be None, 'sin', 'cos' or '>0', got {self.function!r}")

    @property
    def __name__(self) -> str:
        name = f"dihedral({self.i}, {self.j}, {self.k}, {self.l})"
        if self.function == ">0":
            return f"{name}>0"
        return name if self.function is None else f"{self.function}({name})"

    def __call__(self, x: Tensor) -> Tensor:
        """Values (B,) at frames (B, n_atoms, 3)."""
        r_i, r_j, r_k, r_l = _positions(self.__name__, x, self.i, self.j, self.k, self.l)
        b_1, b_2, b_3 = r_j - r_i, r_k - r_j, r_l - r_k
        normal = torch.linalg.cross(b_2, b_3)
        sine = torch.linalg.vector_norm(b_2, dim=-1) * (b_1 * normal).sum(-1)
        cosine = (torch.linalg.cross(b_1, b_2) * normal).sum(-1)
        if self.function is None:
            return torch.atan2(sine, cosine)
        if self.function == ">0":
            return above_zero(sine)
        return (sine if self.function == "sin" else cosine) / torch.hypot(sine, cosine)


def feature(name: str, topology: "mdtraj.Topology | None" = None) -> Observable:
    """The feature of that name, as in the table at the top of this file; spaces do not matter.

    Args:
        name: of the feature.
        topology: mdtraj topology of the molecule. None for a one-dimensional system; then only
            `phi`, `psi` and names of atoms cannot be used.

    Raises:
        ValueError: an unknown name (the message says which ones are near), atoms that the molecule
            does not have, or one of several dihedrals (`phi` where there are `phi1` and `phi2`).

    >>> feature("sin(dihedral(4, 6, 8, 10))")
    Dihedral(i=4, j=6, k=8, l=10, function='sin')
    """
    text = name.replace(" ", "")
    if topology is None and text in FEATURES:
        return FEATURES[text]
    inner, function = _split(text)
    if found := re.fullmatch(r"(phi|psi)(\d*)", inner):
        return Dihedral(*_backbone(name, found[1], found[2], topology), function)
    if found := re.fullmatch(r"dihedral\(([^()]*)\)", inner):
        i, j, k, l = _atoms(name, found[1], 4, topology)  # noqa: E741
        return Dihedral(i, j, k, l, function)
    if function is None and (found := re.fullmatch(r"distance\(([^()]*)\)", inner)):
        return Distance(*_atoms(name, found[1], 2, topology))
    if function is None and (found := re.fullmatch(r"angle\(([^()]*)\)", inner)):
        return Angle(*_atoms(name, found[1], 3, topology))
    known = _known(topology)
    near = get_close_matches(name, known, n=3, cutoff=0.5) or known
    raise ValueError(f"name must be a feature of the system, for example {near}, got {name!r}")


def _split(text: str) -> tuple[str, Literal["sin", "cos", ">0"] | None]:
    """`sin(phi)` into `phi` and `sin`."""
    if text.endswith(")") and text.startswith("sin("):
        return text[4:-1], "sin"
    if text.endswith(")") and text.startswith("cos("):
        return text[4:-1], "cos"
    return (text[:-2], ">0") if text.endswith(">0") else (text, None)


def _backbone(
    name: str, kind: str, number: str, topology: "mdtraj.Topology | None"
) -> tuple[int, int, int, int]:
    """Atoms of phi or psi; the number may be left out where there is only one."""
    found = _indices(kind, _required(name, topology))
    if not number and len(found) > 1:
        raise ValueError(f"name must say which of {kind}1 to {kind}{len(found)}, got {name!r}")
    n = int(number or 1)
    if not 1 <= n <= len(found):
        raise ValueError(f"the molecule has {len(found)} {kind}, counted from 1, got {name!r}")
    i, j, k, l = found[n - 1]  # noqa: E741
    return i, j, k, l


def _indices(kind: str, topology: "mdtraj.Topology") -> list[list[int]]:
    """Atoms of every phi or psi, in the order of `mdtraj.compute_phi`."""
    from mdtraj.geometry import indices_phi, indices_psi

    return (indices_phi if kind == "phi" else indices_psi)(topology).tolist()


def _atoms(name: str, text: str, n: int, topology: "mdtraj.Topology | None") -> Sequence[int]:
    """Indices of `n` atoms, from `1,18` or `ACE1-CH3,NME3-C`."""
    words = text.split(",")
    if len(words) != n or not all(words):
        raise ValueError(f"name must hold {n} atoms, got {name!r}")
    return [_atom(name, word, topology) for word in words]


def _atom(name: str, word: str, topology: "mdtraj.Topology | None") -> int:
    if word.isdecimal():
        index = int(word)
        if topology is not None and index >= topology.n_atoms:
            raise ValueError(f"name must hold atoms 0 to {topology.n_atoms - 1}, got {name!r}")
        return index
    names = [str(atom) for atom in _required(name, topology).atoms]
    if names.count(word) > 1:
        raise ValueError(f"{word!r} is the name of several atoms, give their numbers in {name!r}")
    if word not in names:
        near = get_close_matches(word, names)
        raise ValueError(f"there is no atom {word!r} for {name!r}, but {near or names}")
    return names.index(word)


def _required(name: str, topology: "mdtraj.Topology | None") -> "mdtraj.Topology":
    if topology is None:
        raise ValueError(f"topology must be that of a molecule for {name!r}, got None")
    return topology


def _known(topology: "mdtraj.Topology | None") -> list[str]:
    """Names for error messages."""
    by_atoms = ["distance(i, j)", "angle(i, j, k)", "dihedral(i, j, k, l)"]
    if topology is None:
        return [*FEATURES, *by_atoms]
    counts = {kind: len(_indices(kind, topology)) for kind in ("phi", "psi")}
    backbone = [
        f"{kind}{number if count > 1 else ''}"
        for kind, count in counts.items()
        for number in range(1, count + 1)
    ]
    forms = ("{}", "sin({})", "cos({})", "{}>0")
    return [form.format(angle) for angle in backbone for form in forms] + by_atoms


def _check_atoms(*atoms: int) -> None:
    """Refuse atoms that are no distinct whole numbers from zero."""
    for letter, atom in zip("ijkl", atoms, strict=False):
        as_count(letter, atom, minimum=0)
    if len(set(atoms)) < len(atoms):
        raise ValueError(f"atoms must be distinct, got {atoms}")


def _positions(name: str, x: Tensor, *atoms: int) -> list[Tensor]:
    """Positions (B, 3) of each atom."""
    if x.ndim != 3 or x.shape[2] != 3 or x.shape[1] <= max(atoms):
        raise ValueError(
            f"x must hold frames (B, n_atoms, 3) with more than {max(atoms)} atoms for {name}, "
            f"got shape {tuple(x.shape)}"
        )
    return [x[:, atom] for atom in atoms]
