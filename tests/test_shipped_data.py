"""The shipped data are what their README says, and the demo does what the README promises."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import bopito_inverse as bi
from bopito_inverse import stages
from bopito_inverse.config import Config
from bopito_inverse.sampling import DPMSolver
from bopito_inverse.shipped import shipped_data
from bopito_inverse.systems import Prinz, TransferOperator

DATA = shipped_data()
EXACT = TransferOperator(Prinz())


def ks_distance(x: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance of a sample to the exact stationary density."""
    x = np.sort(x.double().numpy().ravel())
    cdf = np.cumsum(EXACT.stationary) * EXACT.spacing
    exact = np.interp(x, EXACT.grid + EXACT.spacing / 2, cdf)
    rank = np.arange(len(x) + 1) / len(x)
    return float(max(np.abs(exact - rank[:-1]).max(), np.abs(exact - rank[1:]).max()))


def test_hashes_and_size() -> None:
    lines = (DATA / "SHA256SUMS").read_text().split("\n")
    listed = dict(reversed(line.split()) for line in lines if line)
    assert {"biased.npz", "umbrella.npz", "bopito.safetensors", "experiment.csv"} <= set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 10e6


def test_biased_trajectories_are_short_and_never_cross() -> None:
    trajectories = bi.datasets.Trajectories.read(DATA / "biased.npz")
    x = trajectories.frames.reshape(len(trajectories), -1)
    assert x.shape == (4000, 100)
    assert ((x > 0) == (x[:, :1] > 0)).all()
    assert ks_distance(x[:, 0]) > 0.05  # off-equilibrium


def test_experiment_is_the_exact_correlation_with_noise() -> None:
    exp = bi.observables.Experiment.read(DATA / "experiment.csv")
    exact = EXACT.correlation(lambda x: x, lags=exp.lags, normalization="variance")
    z = (exp.values - exact) / exp.sigma
    assert exp.lags.tolist() == list(range(100, 1001, 100))
    assert (exp.sigma == 0.02).all()
    assert 0.4 < np.sqrt((z**2).mean()) < 1.6


def test_equilibrium_score_from_umbrella_windows() -> None:
    """KS <= 0.02 with 50,000 samples (Monte Carlo floor about 0.004)."""
    score = bi.models.load(DATA / "equilibrium.safetensors", system="Prinz")
    noise = torch.randn(50_000, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [DPMSolver(20)(score, score.noise, z, torch.randn_like) for z in noise.split(4096)]
    assert ks_distance(score.scaling.restore(torch.cat(parts))) <= 0.02


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """With half of the replicas and trajectories, to save time."""
    config = Config.read(DATA / "demo.toml", "cpu", tmp_path)
    fewer = {
        "fit": config.section("fit").model_copy(update={"n_replicas": 4096}),
        "sample": config.section("sample").model_copy(update={"n_trajectories": 1000}),
    }
    config = config.model_copy(update=fewer)
    stages.fit(config)
    stages.sample(config)
    summary = json.loads((tmp_path / "fit" / "summary.json").read_text())
    comparison = json.loads((tmp_path / "sample" / "comparison.json").read_text())
    assert summary["status"] == "ok"
    low, high = summary["timescale"]["hdi_94"]
    assert low < EXACT.timescales[0] < high
    assert summary["timescale"]["mean"] == pytest.approx(EXACT.timescales[0], rel=0.1)
    assert comparison["total_variation"]["corrected"] <= 0.03
    held_out = comparison["correlations"]["x>0"]["mean_abs_error"]
    assert held_out["corrected"] < 0.03 < 0.3 < held_out["uncorrected"]
