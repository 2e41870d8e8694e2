"""Trajectories that one can look at, in mdtraj, VMD or PyMOL."""

from pathlib import Path

import numpy as np

from bopito_inverse.datasets import Trajectories
from bopito_inverse.systems import Molecule

N_MOVIES = 10
FILE = "trajectory.xtc"


def write_movies(folder: Path, trajectories: Trajectories, molecule: Molecule) -> None:
    """Write the first trajectories as `.xtc`, with `topology.pdb` beside them.

    Sampled frames have any orientation: each is put on the frame before it.
    """
    some = [
        smooth(trajectories[i].numpy(), molecule) for i in range(min(N_MOVIES, len(trajectories)))
    ]
    movies = Trajectories(some, trajectories.frame_time, trajectories.system)
    movies.write(folder / FILE, molecule.topology)


def smooth(frames: np.ndarray, molecule: Molecule) -> np.ndarray:
    """Frames (n_frames, n_atoms, 3), each moved and turned onto the one before."""
    import mdtraj

    movie = mdtraj.Trajectory(frames.copy(), molecule.topology)
    for i in range(1, len(frames)):
        moved = movie.slice([i], copy=False).superpose(movie, frame=i - 1)
        movie.xyz[i] = moved.xyz[0]
    return movie.xyz
