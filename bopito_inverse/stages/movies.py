"""Trajectories that one can look at, in mdtraj, VMD or PyMOL."""

from pathlib import Path

import torch
from torch import Tensor

from bopito_inverse.datasets import Trajectories
from bopito_inverse.systems import Molecule

N_MOVIES = 10
FILE = "trajectory.xtc"


def write_movies(folder: Path, trajectories: Trajectories, molecule: Molecule) -> None:
    """Write the first trajectories as `.xtc`, with `topology.pdb` beside them.

    Sampled frames have any orientation: each is put on the frame before it.
    """
    some = [smooth(trajectories[i]) for i in range(min(N_MOVIES, len(trajectories)))]
    movies = Trajectories(some, trajectories.frame_time, trajectories.system)
    movies.write(folder / FILE, molecule.topology)


def smooth(frames: Tensor) -> Tensor:
    """Frames (n_frames, n_atoms, 3), each moved and turned onto the one before.

    The rotation is the best one by Kabsch (Acta Cryst. A32, 922, 1976), from the singular value
    decomposition of the correlation of both frames.
    """
    centre = frames[:1].double().mean(1, keepdim=True)
    x = frames.double() - frames.double().mean(1, keepdim=True)
    u, _, v = torch.linalg.svd(x[1:].mT @ x[:-1])
    mirrored = torch.linalg.det(u @ v) < 0
    u[mirrored, :, 2] *= -1
    turn, turned = torch.eye(3, dtype=x.dtype), [x[0]]
    for frame, rotation in zip(x[1:], u @ v, strict=True):
        turn = rotation @ turn
        turned.append(frame @ turn)
    return (torch.stack(turned) + centre).to(frames.dtype)
