import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
import torch

from bopito_inverse.datasets import Trajectories
from bopito_inverse.shipped import shipped_data
from bopito_inverse.simulate import fastest_platform, md, molecular_dynamics
from bopito_inverse.systems import AlanineDipeptide, Molecule

DIALANINE = shipped_data("ala2") / "dialanine.pdb"
MOLECULE = AlanineDipeptide(steps_per_frame=20)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(md, "SEGMENT_STEPS", 60)  # three frames


def run(n: int = 3, n_frames: int = 9, molecule: Molecule = MOLECULE, **options: Any) -> Any:
    starts = molecule.positions.expand(n, -1, -1)
    options = {"platform": "Reference", "seed": 1} | options
    return molecular_dynamics(molecule, starts, n_frames, **options)


@pytest.fixture(scope="module")
def whole() -> Trajectories:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(md, "SEGMENT_STEPS", 60)
        return run()


def test_frames_start_at_the_start_and_differ(whole: Trajectories) -> None:
    assert whole.frame_time == pytest.approx(0.04)
    assert whole.system == "alanine dipeptide"
    assert whole.lengths.tolist() == [9, 9, 9]
    bonds = [(i, j) for i, j, *_ in map(MOLECULE.system.getConstraintParameters, range(12))]
    lengths = [MOLECULE.system.getConstraintParameters(k)[2]._value for k in range(12)]
    i, j = np.array(bonds).T
    for frame in (0, 4, 8):
        x = torch.stack([trajectory[frame] for trajectory in whole])
        found = (x[:, i] - x[:, j]).norm(dim=-1)
        assert np.allclose(found, lengths, rtol=3e-5)
    assert torch.allclose(whole[0][0], MOLECULE.positions, atol=1e-4)
    assert torch.equal(whole[0][0], whole[1][0])
    assert not torch.equal(whole[0][1], whole[1][1])
    # noise of one segment is not that of the next
    assert not torch.equal(run(n=1, seed=2).frames, whole[0])


def test_segments_continue_one_another(whole: Trajectories) -> None:
    """Where nothing is random, segments make no difference."""
    free = AlanineDipeptide(steps_per_frame=20)
    free.friction = 1e-12
    ends = [run(n=1, molecule=free).frames]
    md.SEGMENT_STEPS = 10_000  # the fixture puts it back
    ends.append(run(n=1, molecule=free).frames)
    assert torch.allclose(*ends, atol=1e-5)
    assert float((ends[0] - whole[0]).abs().max()) > 1e-3


def test_threads_give_the_same(whole: Trajectories, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        made = run(executor=threads, folder=tmp_path, progress=True)
    assert torch.equal(made.frames, whole.frames)


@pytest.mark.parametrize("segments", [0, 1, 4, 8])
def test_interrupted_runs_go_on(
    segments: int, whole: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    segment = md._segment

    def interrupted(plan: Any, trajectory: int, k: int, before: Any) -> Any:
        if len(made) == segments:
            raise KeyboardInterrupt
        made.append((trajectory, k))
        return segment(plan, trajectory, k, before)

    monkeypatch.setattr(md, "_segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path)
    assert not (tmp_path / "report.json").exists()
    segments = 100
    assert torch.equal(run(folder=tmp_path).frames, whole.frames)
    assert made == [(i, k) for i in range(3) for k in range(3)]  # each once
    files = sorted(path.name for path in tmp_path.iterdir())
    names = [f"trajectory_{i:04d}.trr" for i in range(3)]
    assert files == ["report.json", "settings.json", "topology.pdb", *names]
    segments = 0  # a finished run simulates nothing
    made.clear()
    assert torch.equal(run(folder=tmp_path, platform="auto").frames, whole.frames)


LONG = 1500  # frames: more than a second
KILLED = """
import sys
sys.path.insert(0, {tests!r})
import test_md as t
t.md.SEGMENT_STEPS = 1000
t.run(n=1, n_frames=t.LONG, folder={folder!r}, executor=1)
"""


def test_killed_run_goes_on(tmp_path: Path) -> None:
    """The process that simulates ends with its parent, and another one ends the trajectory."""
    md.SEGMENT_STEPS = 1000
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    state = tmp_path / "partial" / "0000.npz"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.2)
    done = md._State.read(state).done
    time.sleep(0.2)
    assert md._State.read(state).done == done < LONG
    with (tmp_path / "partial" / "0000.f32").open("ab") as file:
        file.write(b"half a frame")
    resumed = run(n=1, n_frames=LONG, folder=tmp_path, executor=1, progress=True)
    assert torch.equal(resumed.frames, run(n=1, n_frames=LONG).frames)
    assert not (tmp_path / "partial").exists()


def test_other_settings_are_refused(whole: Trajectories, tmp_path: Path) -> None:
    run(folder=tmp_path)
    for options, message in (
        ({"seed": 2}, r"seed 1 \(now 2\)"),
        ({"n": 2}, r"n_trajectories 3 \(now 2\)"),
        ({"minimize": True}, "minimize auto"),
        ({"molecule": AlanineDipeptide(310, steps_per_frame=20)}, r"temperature 300.0 \(now 310"),
    ):
        with pytest.raises(ValueError, match=f"other settings: .*{message}"):
            run(folder=tmp_path, **options)
    (tmp_path / "trajectory_0001.trr").unlink()
    with pytest.raises(
        ValueError, match=r"trajectory_0001.trr was not found .* delete report.json"
    ):
        run(folder=tmp_path)
    (tmp_path / "report.json").unlink()
    assert torch.equal(run(folder=tmp_path).frames, whole.frames)


def test_damaged_partial_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk is full")

    for name in ("write_npz", "_save"):
        with monkeypatch.context() as patch:
            patch.setattr(md, name, full)
            with pytest.raises(RuntimeError, match="trajectory 0 failed: disk is full"):
                run(n=1, folder=tmp_path)
    os.truncate(tmp_path / "partial" / "0000.f32", 100)
    with pytest.raises(RuntimeError, match=r"0000\.f32 lacks frames; delete .*0000\.npz"):
        run(n=1, folder=tmp_path)
    settings = (tmp_path / "settings.json").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"simulations without their settings\.json"):
        run(n=1, folder=tmp_path)
    settings.rename(tmp_path / "settings.json")
    (tmp_path / "partial" / "0000.npz").unlink()
    assert len(run(n=1, folder=tmp_path)) == 1


def test_clashing_starts_are_minimised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thermal = run(n=1, n_frames=40)[0]
    noise = 0.02 * torch.randn(22, 3, generator=torch.Generator().manual_seed(0))
    starts = torch.stack([thermal[-1], thermal[-1] + noise])
    made = molecular_dynamics(MOLECULE, starts, 9, tmp_path, platform="Reference")
    report = json.loads((tmp_path / "report.json").read_text())["trajectories"]
    assert [r["minimized"] for r in report] == [False, True]
    assert torch.allclose(made[0][0], starts[0], atol=1e-5)
    energy = MOLECULE.energy(torch.stack([starts[1], made[1][0], made[1][-1]]))
    assert energy[0] > 1000
    assert energy[1] < -120  # -134 is the lowest of this force field
    assert -120 < energy[2] < 0
    monkeypatch.setattr(md, "LARGEST_ENERGY", 1.0)
    with pytest.warns(UserWarning, match="1 of 2 .* were dropped: 1: the potential energy was"):
        hot = molecular_dynamics(MOLECULE, starts, 3, minimize=False, platform="Reference")
    assert len(hot) == 1


def test_dynamics_has_its_temperature(tmp_path: Path) -> None:
    """Equipartition: 51 degrees of freedom, without bonds of hydrogen and the centre of mass."""
    molecule = AlanineDipeptide(friction=20, steps_per_frame=25)  # 0.05 ps apart: uncorrelated
    md.SEGMENT_STEPS = 1000
    run(n=3, n_frames=201, molecule=molecule, folder=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())["trajectories"]
    found = np.array([r["mean_temperature"] for r in report])
    # kinetic energy: relative variance 2 / 51; velocities decay by exp(-2 * 20/ps * 0.05 ps) at
    # least, so that 200 frames count as some 100
    error = 300 * math.sqrt(2 / 51 / (3 * 100))
    assert abs(found.mean() - 300) < 4 * error < 14
    energies = [r["mean_potential_energy"] for r in report]
    assert np.abs(np.array(energies) + 74.2).max() < 15  # 181 ns gave -74.2, standard deviation 12


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_trajectories_that_blow_up_are_dropped(platform: str, tmp_path: Path) -> None:
    wild = Molecule(DIALANINE, time_step=0.02, steps_per_frame=500)
    with pytest.raises(ValueError, match=r"all 2 trajectories blew up .*shorter time_step"):
        run(n=2, n_frames=4, molecule=wild, folder=tmp_path, platform=platform)
    report = json.loads((tmp_path / "report.json").read_text())["trajectories"]
    assert all("dropped" in r for r in report)
    assert not list(tmp_path.glob("trajectory*"))


def test_the_others_are_kept(
    whole: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    velocities = md._Plan.velocities
    wild = {0: math.nan, 1: 1.0, 2: 200.0}
    monkeypatch.setattr(
        md._Plan, "velocities", lambda self, i: wild.get(i, 1.0) * velocities(self, i)
    )
    for _ in range(2):  # simulated, and read back
        with pytest.warns(UserWarning, match="2 of 3 trajectories blew up and were dropped"):
            made = run(folder=tmp_path)
        assert torch.equal(made.frames, whole[1])
    report = json.loads((tmp_path / "report.json").read_text())["trajectories"]
    assert "finite" in report[0]["dropped"] or "NaN" in report[0]["dropped"]
    assert [path.name for path in tmp_path.glob("*.trr")] == ["trajectory_0001.trr"]


@pytest.mark.parametrize(("format", "error"), [("trr", 0.0), ("xtc", 5.1e-4), ("h5", 0.0)])
def test_files_are_read_by_mdtraj(
    format: str, error: float, whole: Trajectories, tmp_path: Path
) -> None:
    if format == "h5" and find_spec("tables") is None:
        with pytest.raises(ValueError, match="'h5' needs the package tables"):
            run(folder=tmp_path, format=format)
        return
    made = run(folder=tmp_path, format=format)
    path = tmp_path / f"trajectory_0002.{format}"
    top = {} if format == "h5" else {"top": str(tmp_path / "topology.pdb")}
    read = mdtraj.load(str(path), **top)
    assert read.topology == MOLECULE.topology
    assert np.abs(read.xyz - whole[2].numpy()).max() <= error
    assert np.allclose(read.time, 0.04 * np.arange(9))
    assert np.array_equal(read.xyz, made[2])


def test_another_molecule() -> None:
    molecule = Molecule(DIALANINE, steps_per_frame=10)
    made = run(n=2, n_frames=3, molecule=molecule, platform="auto")
    assert made.event_shape == (32, 3)
    assert made.system == "dialanine"
    loaded = pickle.loads(pickle.dumps(molecule))
    assert torch.equal(run(n=2, n_frames=3, molecule=loaded).frames, made.frames)


def test_fastest_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest_platform(MOLECULE) in ("Reference", "CPU")
    seconds: list[float | Exception] = [1.0, 0.5, openmm.OpenMMException("no GPU")]
    calls = []

    def timed(context: openmm.Context) -> float:
        calls.append(context.getPlatform().getName())
        value = seconds[(len(calls) - 1) % openmm.Platform.getNumPlatforms()]
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(md, "_seconds_for_steps", timed)
    assert fastest_platform(AlanineDipeptide()) == calls[1]
    seconds.reverse()
    molecule = AlanineDipeptide()
    assert fastest_platform(molecule) == fastest_platform(molecule) == calls[1]
    assert len(calls) == 2 * openmm.Platform.getNumPlatforms()


def test_bad_arguments(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for options, message in (
        ({"minimize": "yes"}, "minimize must be True, False or 'auto', got 'yes'"),
        ({"platform": "Abacus"}, "platform must be one of .*Reference.*, got 'Abacus'"),
        ({"format": "pdb"}, "format must be one of trr, xtc, h5, got 'pdb'"),
        ({"n_frames": 1}, "n_frames must be a whole number of at least 2, got 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"folder": tmp_path / "file"}, "folder must be a folder, got the file"),
        ({"executor": 0}, "executor must be a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    with pytest.raises(ValueError, match=r"starts must hold frames of shape \(22, 3\)"):
        molecular_dynamics(MOLECULE, torch.zeros(1, 21, 3), 3)
    shutil.rmtree(tmp_path)
