r"""Samples of several biased ensembles that together cover the equilibrium.

Window k samples `p_k(x) ~ exp(-(U(x) + b_k(x)) / kT)`. The matrix of reduced biases
`b_k(x_n) / kT` of every frame in every window is all that MBAR needs to give each frame its weight
at kT, see `reweight`. Biases of three forms are stored by what they are made of, and the matrix is
computed when a file is read:

    harmonic     b_k(x) = stiffness_k / 2 (x - c_k)^2
    torsional    b_k(x) = sum_d stiffness_kd (1 - cos(theta_d(x) - c_kd))     theta_d: dihedrals
    thermal      b_k(x) / kT = U(x) (1 / kT_k - 1 / kT)

A torsional bias is periodic, and harmonic with its stiffness near its centre.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bopito_inverse.arguments import as_count, as_frames, as_positive
from bopito_inverse.datasets import read_npz, write_npz


@dataclass(eq=False)
class BiasedSamples:
    """Equal numbers of frames from biased windows, of any origin.

    Args:
        frames: `(n_windows, n_frames, *event)`; where a window was sampled by several walkers, the
            frames of one walker follow those of another.
        reduced_bias: `b_k(x_n) / kT`, float64, `(n_windows, n_windows * n_frames)`; the column of
            frame i of window k is `k * n_frames + i`.
        kT: thermal energy, in the unit of the biases.
        n_walkers: walkers in each window.
        system: name of the system that was simulated.

    Attributes:
        form: what the biases are made of (see `harmonic`, `torsional`, `thermal`), arrays by name;
            empty where they are of another form.

    Raises:
        ValueError: shapes that do not fit together, non-finite values, n_walkers that does not
            divide n_frames.
    """

    frames: Tensor
    reduced_bias: Tensor
    kT: float = 1.0
    n_walkers: int = 1
    system: str | None = None
    form: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.frames = torch.as_tensor(self.frames, dtype=torch.float32)
        if self.frames.ndim < 3 or self.frames.shape[0] < 1 or self.frames.shape[1] < 1:
            raise ValueError(
                "frames must have shape (n_windows, n_frames, *event), got "
                f"{tuple(self.frames.shape)}"
            )
        for k, window in enumerate(self.frames):
            as_frames(f"frames[{k}]", window, device=window.device)
        self.reduced_bias = _as_bias(self.reduced_bias, self.n_windows, self.frames_flat)
        self.kT = as_positive("kT", self.kT)
        self.n_walkers = as_count("n_walkers", self.n_walkers)
        if self.n_frames % self.n_walkers:
            raise ValueError(
                f"n_walkers must divide the {self.n_frames} frames of a window, got "
                f"{self.n_walkers}"
            )

    @property
    def n_windows(self) -> int:
        """Number of biased windows."""
        return self.frames.shape[0]

    @property
    def n_frames(self) -> int:
        """Frames in each window."""
        return self.frames.shape[1]

    @property
    def frames_flat(self) -> Tensor:
        """All frames in a row, `(n_windows * n_frames, *event)`: what MBAR weights belong to."""
        return self.frames.flatten(0, 1)

    @property
    def centers(self) -> Tensor | None:
        """Centres of harmonic `(n_windows,)` or torsional `(n_windows, n_dihedrals)` windows."""
        return self.form.get("centers")

    @property
    def stiffness(self) -> Tensor | None:
        """Stiffnesses, shaped like the centres."""
        return self.form.get("stiffness")

    @classmethod
    def harmonic(
        cls,
        frames: Tensor,
        centers: Tensor,
        stiffness: Tensor,
        kT: float = 1.0,
        n_walkers: int = 1,
        system: str | None = None,
    ) -> "BiasedSamples":
        """Samples of harmonic windows, with their reduced biases.

        Args:
            frames: frames of one component, `(n_windows, n_frames, 1)`.
            centers, stiffness: of each window, `(n_windows,)`.
            kT, n_walkers, system: as in the constructor.
        """
        frames = torch.as_tensor(frames, dtype=torch.float32)
        if frames.ndim != 3 or frames.shape[2] != 1:
            raise ValueError(
                f"frames must have shape (n_windows, n_frames, 1), got {tuple(frames.shape)}"
            )
        c = _finite("centers", centers, frames.shape[:1], frames.device)
        k = _finite("stiffness", stiffness, frames.shape[:1], frames.device)
        x = frames.double().flatten()
        bias = 0.5 * k[:, None] * (x - c[:, None]).square() / as_positive("kT", kT)
        samples = cls(frames, bias, kT, n_walkers, system)
        samples.form = {"centers": c, "stiffness": k}
        return samples

    @classmethod
    def torsional(
        cls,
        frames: Tensor,
        dihedrals: Tensor,
        centers: Tensor,
        stiffness: Tensor,
        kT: float = 1.0,
        n_walkers: int = 1,
        system: str | None = None,
    ) -> "BiasedSamples":
        """Samples of windows along dihedrals of a molecule, with their reduced biases.

        Args:
            frames: `(n_windows, n_frames, n_atoms, 3)`.
            dihedrals: indices of four atoms each, `(n_dihedrals, 4)`.
            centers, stiffness: in rad and in energy (per rad^2), `(n_windows, n_dihedrals)`.
            kT, n_walkers, system: as in the constructor.
        """
        frames = torch.as_tensor(frames, dtype=torch.float32)
        if frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(
                "frames must have shape (n_windows, n_frames, n_atoms, 3), got "
                f"{tuple(frames.shape)}"
            )
        atoms = torch.as_tensor(dihedrals, device=frames.device)
        theta = dihedral_angles(frames.flatten(0, 1), atoms)
        shape = torch.Size([len(frames), len(atoms)])
        c = _finite("centers", centers, shape, frames.device)
        k = _finite("stiffness", stiffness, shape, frames.device)
        in_phase = (k * c.cos()) @ theta.cos().T + (k * c.sin()) @ theta.sin().T
        bias = (k.sum(1, keepdim=True) - in_phase) / as_positive("kT", kT)
        samples = cls(frames, bias, kT, n_walkers, system)
        samples.form = {"dihedrals": atoms, "centers": c, "stiffness": k}
        return samples

    @classmethod
    def thermal(
        cls,
        frames: Tensor,
        ladder: Tensor,
        energies: Tensor,
        kT: float = 1.0,
        n_walkers: int = 1,
        system: str | None = None,
    ) -> "BiasedSamples":
        """Samples at several temperatures, with their reduced biases.

        Args:
            frames: `(n_windows, n_frames, *event)`.
            ladder: thermal energy of each window, `(n_windows,)`.
            energies: potential energy of each frame, `(n_windows * n_frames,)`, above any level
                that is near the lowest.
            kT, n_walkers, system: as in the constructor.
        """
        frames = torch.as_tensor(frames, dtype=torch.float32)
        n_total = torch.Size([frames.shape[:2].numel()])
        heat = _finite("ladder", ladder, frames.shape[:1], frames.device)
        u = _finite("energies", energies, n_total, frames.device)
        bias = (1 / heat - 1 / as_positive("kT", kT))[:, None] * u
        samples = cls(frames, bias, kT, n_walkers, system)
        samples.form = {"ladder": heat, "energies": u}
        return samples

    def write(self, path: str | os.PathLike) -> None:
        """Write `.npz` with one array per field, complete or not at all.

        Biases of a known form are stored as what they are made of, others as `reduced_bias`.
        """
        bias = self.form or {"reduced_bias": self.reduced_bias}
        write_npz(
            path,
            frames=self.frames.cpu().numpy(),
            **{name: value.cpu().numpy() for name, value in bias.items()},
            kT=np.float64(self.kT),
            n_walkers=np.int64(self.n_walkers),
            system=np.str_(self.system or ""),
        )

    @classmethod
    def read(cls, path: str | os.PathLike) -> "BiasedSamples":
        """Read what `write` wrote (`n_walkers` and `system` may be missing).

        Raises:
            ValueError: the file is truncated, foreign, lacks a key or holds bad values.
        """
        arrays = read_npz(path, ("frames", "kT"))
        forms: dict[str, tuple[Callable[..., BiasedSamples], tuple[str, ...]]] = {
            "dihedrals": (cls.torsional, ("dihedrals", "centers", "stiffness")),
            "centers": (cls.harmonic, ("centers", "stiffness")),
            "ladder": (cls.thermal, ("ladder", "energies")),
            "frames": (cls, ("reduced_bias",)),
        }
        make, names = next(form for key, form in forms.items() if key in arrays)
        _require(path, arrays, names)
        try:
            return make(
                *(torch.from_numpy(arrays[name]) for name in ("frames", *names)),
                kT=float(arrays["kT"].item()),
                n_walkers=int(arrays["n_walkers"].item()) if "n_walkers" in arrays else 1,
                system=(str(arrays["system"]) or None) if "system" in arrays else None,
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


def dihedral_angles(frames: Tensor, dihedrals: Tensor) -> Tensor:
    """Angles in (-pi, pi] of frames (n, n_atoms, 3), float64, (n, n_dihedrals); IUPAC's sign."""
    atoms = torch.as_tensor(dihedrals, device=frames.device)
    n_atoms = frames.shape[1]
    whole = not (atoms.is_floating_point() or atoms.is_complex() or atoms.dtype == torch.bool)
    if not (whole and atoms.ndim == 2 and atoms.shape[1] == 4 and len(atoms) > 0):
        raise ValueError(
            "dihedrals must hold the indices of four atoms each, (n_dihedrals, 4), got "
            f"{atoms.dtype} of shape {tuple(atoms.shape)}"
        )
    if atoms.min() < 0 or atoms.max() >= n_atoms or (atoms.sort(1).values.diff() == 0).any():
        raise ValueError(
            f"dihedrals must name four different atoms of {n_atoms}, got {atoms.tolist()}"
        )
    a, b, c, d = frames.double()[:, atoms].unbind(2)
    first, axis, last = b - a, c - b, d - c
    normal, other = torch.linalg.cross(first, axis), torch.linalg.cross(axis, last)
    sine = axis.norm(dim=-1) * (first * other).sum(-1)
    return torch.atan2(sine, (normal * other).sum(-1))


def _finite(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=device)
    if value.shape != shape or not torch.isfinite(value).all():
        raise ValueError(
            f"{name} must hold finite numbers of shape {tuple(shape)}, got shape "
            f"{tuple(value.shape)}"
        )
    return value


def _require(path: str | os.PathLike, arrays: dict[str, np.ndarray], names: Sequence[str]) -> None:
    for name in names:
        if name not in arrays:
            raise ValueError(f"{path} has no array {name!r}, only {sorted(arrays)}")


def _as_bias(bias: Tensor, n_windows: int, frames: Tensor) -> Tensor:
    bias = torch.as_tensor(bias, dtype=torch.float64, device=frames.device)
    expected = (n_windows, len(frames))
    if bias.shape != expected:
        raise ValueError(f"reduced_bias must have shape {expected}, got {tuple(bias.shape)}")
    if not torch.isfinite(bias).all():
        k, n = (~torch.isfinite(bias)).nonzero()[0].tolist()
        raise ValueError(f"reduced_bias must be finite, got {float(bias[k, n])} at [{k}, {n}]")
    return bias
