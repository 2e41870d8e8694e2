"""The shipped data of alanine dipeptide are what their README says."""

from pathlib import Path

import numpy as np
import pytest
import torch

import bopito_inverse as bi
from bopito_inverse import stages
from bopito_inverse.config import Config
from bopito_inverse.datasets import read_npz
from bopito_inverse.shipped import shipped_data
from bopito_inverse.stages.dihedrals import Dihedrals

DATA = shipped_data("ala2")
MOLECULE = bi.systems.AlanineDipeptide()


def on_the_right(phi: torch.Tensor) -> torch.Tensor:
    return (phi > 0) & (phi < 2.2)


def phi_of(x: torch.Tensor) -> torch.Tensor:
    return bi.observables.feature("phi", MOLECULE.topology)(x)


def test_size() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir() if path.is_file()) < 60e6


def test_no_biased_trajectory_crosses() -> None:
    biased = bi.datasets.Trajectories.read(DATA / "biased.npz")
    right = torch.stack([on_the_right(phi_of(x)) for x in biased])
    assert right.shape == (283, 201)
    assert (right == right[:, :1]).all()
    assert 0.4 < right[:, 0].float().mean() < 0.6


def test_reference_has_at_each_time_the_share_of_the_windows() -> None:
    windows = bi.simulate.BiasedSamples.read(DATA / "umbrella.npz")
    weights = bi.simulate.mbar_weights(windows)
    share = float(weights[on_the_right(phi_of(windows.frames_flat))].sum())
    reference = Dihedrals.read(DATA / "reference.npz", ("phi", "psi"))
    assert reference.weights is not None
    phi = torch.stack(reference.trajectories)[..., 0]
    w = torch.stack(reference.weights)
    assert phi.shape[1] == 5001
    right = (w * on_the_right(phi)).sum(0) / w.sum(0)
    assert right.numpy() == pytest.approx(share, abs=1e-4)
    kept = bi.datasets.Frames.read(DATA / "frames.npz")
    assert float(kept.weights[on_the_right(phi_of(kept.x))].sum()) == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize("name", ["sin(phi)", "cos(phi)"])
def test_the_experiment_is_the_correlation_of_the_reference(name: str) -> None:
    """Up to the noise of the plain estimator, which frames of the left side that cross dominate."""
    measured = bi.observables.Experiment.read(
        DATA / "experiment.csv", DATA / "experiment_covariance.npz"
    ).select(name)
    arrays = read_npz(DATA / "reference.npz", ("phi", "weights"))
    phi = torch.from_numpy(arrays["phi"]).float()
    wave = {"sin(phi)": torch.sin, "cos(phi)": torch.cos}[name]
    obs = bi.observables.Correlation(lambda x: x, normalization="static")
    value, error = obs.from_trajectories(
        list(wave(phi)[..., None]), measured.lags.astype(int), weights=arrays["weights"]
    )
    assert measured.lags.tolist() == [1000, 2000, 3000]
    assert (np.abs(measured.values - value.numpy()) < 3 * error.numpy()).all()
    assert (np.diff(measured.values) < 0).all()
    assert (measured.values > 2 * measured.sigma).all()


@pytest.mark.parametrize(
    ("name", "ready"), [("run.toml", ["fit"]), ("dialanine.toml", ["simulate"])]
)
def test_run_files(name: str, ready: list[str], tmp_path: Path) -> None:
    rows = stages.inspect(Config.read(DATA / name, "cpu", tmp_path))
    assert [what for what, _, found in rows if found == "ready to start"] == ready
