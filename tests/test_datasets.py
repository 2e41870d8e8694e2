import sys
from importlib.util import find_spec
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from bopito_inverse.datasets import Frames, LaggedPairs, Trajectories, read_npz
from bopito_inverse.shipped import shipped_data

STRUCTURE = shipped_data("ala2") / "alanine_dipeptide.pdb"
FORMATS = [".trr", ".xtc", ".dcd", *([".h5"] if find_spec("tables") else [])]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelled(lengths: list[int]) -> Trajectories:
    """Frames that say which trajectory and which time they are."""
    parts = [np.stack([np.full(n, i), np.arange(n)], 1) for i, n in enumerate(lengths)]
    return Trajectories(parts, frame_time=1.0)


def test_ragged_and_dense_trajectories_give_back_what_was_put_in() -> None:
    parts = [torch.randn(n, 2, 3, generator=generator(n)) for n in (4, 2, 7)]
    ragged = Trajectories(parts, frame_time=0.5, system="s")
    assert ragged.lengths.tolist() == [4, 2, 7]
    assert all(torch.equal(a, b) for a, b in zip(ragged, parts, strict=True))
    assert torch.equal(ragged[-1], parts[-1])
    with pytest.raises(IndexError):
        ragged[3]
    dense = torch.randn(5, 4, 1, generator=generator())
    both = Trajectories(dense, 1.0), Trajectories(list(dense), 1.0)
    assert torch.equal(both[0].frames, both[1].frames)
    assert torch.equal(both[0].lengths, both[1].lengths)


@pytest.mark.parametrize(
    ("trajectories", "message"),
    [
        ([], "at least one trajectory"),
        ([np.zeros((3, 1)), np.zeros((0, 1))], r"trajectories\[1\].*none"),
        ([np.zeros((3, 1)), np.zeros((1, 1))], r"trajectories\[1\].*at least 2 frames, got 1"),
        ([np.zeros((3, 1)), np.zeros((3, 2))], r"trajectories\[1\].*\(1,\), got \(2,\)"),
        ([np.zeros(3)], r"trajectories\[0\] must have shape"),
        ([np.zeros((3, 1)), [[0.0], [np.nan], [1.0]]], r"trajectories\[1\].*first at frame 1"),
        (np.zeros((3, 1, 1)), "at least 2 frames each, got 1"),
        (np.where(np.arange(12).reshape(3, 4, 1) == 6, np.inf, 0), r"trajectories\[1\].*frame 2"),
    ],
)
def test_bad_trajectories_are_refused_by_name(trajectories: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trajectories(trajectories, frame_time=1.0)


@pytest.mark.parametrize("frame_time", [0.0, -1.0, np.nan])
def test_frame_time_must_be_positive(frame_time: float) -> None:
    with pytest.raises(ValueError, match="frame_time must be a positive number"):
        Trajectories(np.zeros((2, 3, 1)), frame_time)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 5, 2]])
def test_trajectories_survive_a_file(tmp_path, lengths: list[int]) -> None:
    path = tmp_path / "trajectories.npz"
    before = labelled(lengths)
    before.system = "Prinz"
    before.write(path)
    after = Trajectories.read(path)
    assert torch.equal(before.frames, after.frames)
    assert torch.equal(before.lengths, after.lengths)
    assert (after.frame_time, after.system) == (1.0, "Prinz")
    assert [p.name for p in tmp_path.iterdir()] == ["trajectories.npz"]
    assert read_npz(path, ())["trajectories"].ndim == (3 if lengths == [4, 4, 4] else 2)


def test_bad_files_are_refused_by_name_and_left_alone(tmp_path) -> None:
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    labelled([300, 200]).write(good)
    content = good.read_bytes()
    for wrong in (content[:-50], content[:100], b"", b"not an archive"):
        bad.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"bad\.npz is no readable"):
            Trajectories.read(bad)
        assert bad.read_bytes() == wrong
    np.savez(bad, trajectories=np.zeros((2, 3, 1)))
    with pytest.raises(ValueError, match=r"bad\.npz has no array 'frame_time'"):
        Trajectories.read(bad)
    np.savez(bad, trajectories=np.array([None, 1], dtype=object), frame_time=1.0)
    with pytest.raises(ValueError, match=r"bad\.npz is no readable"):
        Trajectories.read(bad)
    np.savez(bad, trajectories=np.full((2, 3, 1), np.nan), frame_time=1.0)
    with pytest.raises(ValueError, match=r"bad\.npz: trajectories\[0\] must be finite"):
        Trajectories.read(bad)
    np.savez(bad, trajectories=np.zeros((6, 1)), lengths=[3, 4], frame_time=1.0)
    with pytest.raises(ValueError, match=r"bad\.npz: lengths must sum to the 6 frames, got 7"):
        Trajectories.read(bad)
    with pytest.raises(FileNotFoundError, match="missing"):
        Trajectories.read(tmp_path / "missing.npz")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "trajectories.npz"
    labelled([3, 4]).write(path)
    content = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        labelled([5, 6]).write(path)
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


# molecules


@pytest.fixture(scope="module")
def topology() -> mdtraj.Topology:
    return mdtraj.load_topology(STRUCTURE)


def molecular(*lengths: int, frame_time: float = 0.5) -> Trajectories:
    """Frames far from the origin, which no superposition would leave there."""
    parts = [3 + 0.3 * torch.randn(n, 22, 3, generator=generator(n)) for n in lengths]
    return Trajectories(parts, frame_time)


@pytest.mark.parametrize("suffix", FORMATS)
def test_molecules_survive_files_that_mdtraj_reads(
    tmp_path: Path, topology: mdtraj.Topology, suffix: str
) -> None:
    before = molecular(4, 2, 7)
    before.write(tmp_path / f"trajectory{suffix}", topology)
    names = [f"trajectory_{i:04d}{suffix}" for i in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["topology.pdb", *names]
    after = Trajectories.read(tmp_path, frame_time=0.5 if suffix == ".dcd" else None)
    atol = {".xtc": 6e-4, ".dcd": 1e-6}.get(suffix, 0)
    torch.testing.assert_close(after.frames, before.frames, atol=atol, rtol=0)
    assert (after.frames.dtype, after.frame_time) == (torch.float32, 0.5)
    assert after.lengths.tolist() == [4, 2, 7]
    beside = mdtraj.load(tmp_path / "topology.pdb")
    assert beside.topology == topology
    np.testing.assert_allclose(beside.xyz[0], before.frames[0], atol=6e-5)
    alone = mdtraj.load(tmp_path / names[2], **({} if suffix == ".h5" else {"top": beside}))
    np.testing.assert_allclose(alone.xyz, before[2], atol=atol)
    if suffix != ".dcd":
        np.testing.assert_allclose(alone.time, 0.5 * np.arange(7))


def test_one_trajectory_is_one_file_and_its_topology_may_be_elsewhere(
    tmp_path: Path, topology: mdtraj.Topology
) -> None:
    before = molecular(5, frame_time=0.1)
    before.write(tmp_path / "run.trr", STRUCTURE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.trr", "topology.pdb"]
    (tmp_path / "topology.pdb").unlink()
    for known in (topology, STRUCTURE, str(STRUCTURE)):
        after = Trajectories.read(tmp_path / "run.trr", known)
        assert torch.equal(after.frames, before.frames)
        assert after.frame_time == 0.1  # the file holds single precision
    with pytest.raises(ValueError, match=r"topology must be given for .*run\.trr"):
        Trajectories.read(tmp_path / "run.trr")
    assert Trajectories.read(tmp_path / "run.trr", topology, frame_time=2).frame_time == 2


def test_a_pdb_of_several_models_needs_a_frame_time(
    tmp_path: Path, topology: mdtraj.Topology
) -> None:
    path, frames = tmp_path / "models.pdb", molecular(3).frames
    mdtraj.Trajectory(frames.numpy(), topology).save(str(path))
    after = Trajectories.read(path, frame_time=10)
    torch.testing.assert_close(after.frames, frames, atol=6e-5, rtol=0)
    with pytest.raises(ValueError, match=r"frame_time must be given for .*models\.pdb"):
        Trajectories.read(path)


def test_folders_are_read_in_order_and_only_their_trajectories(
    tmp_path: Path, topology: mdtraj.Topology
) -> None:
    for number in ("0009", "0010", "9999", "10000"):
        frames = np.full((2, 22, 3), int(number), np.float32)
        mdtraj.Trajectory(frames, topology, [0, 1]).save(str(tmp_path / f"trajectory_{number}.trr"))
    for other in ("notes_0000.trr", "trajectory_0000.log", ".trajectory_0001.1.partial.trr"):
        (tmp_path / other).write_bytes(b"something else")
    read = Trajectories.read(tmp_path, topology)
    assert [int(part[0, 0, 0]) for part in read] == [9, 10, 9999, 10000]


def test_molecular_files_that_mislead_are_refused(
    tmp_path: Path, topology: mdtraj.Topology
) -> None:
    path = tmp_path / "trajectory_0000.trr"

    def save(time: list[float], frames: np.ndarray | None = None, name: Path = path) -> None:
        xyz = molecular(max(len(time), 2)).frames.numpy()[: len(time)]
        mdtraj.Trajectory(xyz if frames is None else frames, topology, time).save(str(name))

    for time in ([0, 1, 2, 4], [0, 1, 1, 2], [3, 2, 1, 0], [0, 0, 0, 0]):
        save(time)
        with pytest.raises(ValueError, match=r"_0000\.trr must hold evenly spaced frames"):
            Trajectories.read(path, topology)
        assert Trajectories.read(path, topology, frame_time=1).frame_time == 1
    save([0])
    with pytest.raises(ValueError, match=r"_0000\.trr must hold at least 2 frames, got 1"):
        Trajectories.read(path, topology)
    save([0, 1], np.where(np.arange(132).reshape(2, 22, 3) == 70, np.nan, 0))
    with pytest.raises(ValueError, match=r"_0000\.trr: frames must be finite.* at frame 1"):
        Trajectories.read(path, topology)
    save([0, 1])
    save([0, 2], name=tmp_path / "trajectory_0001.trr")
    with pytest.raises(ValueError, match=r"got 1 ps in .*0000\.trr and 2 ps in .*0001\.trr"):
        Trajectories.read(tmp_path, topology)
    save([0, 1], name=tmp_path / "trajectory_0001.xtc")
    with pytest.raises(ValueError, match=r"trajectory_\* of one format.*trajectory_0001\.xtc"):
        Trajectories.read(tmp_path, topology)


def test_molecular_files_that_cannot_be_read_are_named(
    tmp_path: Path, topology: mdtraj.Topology
) -> None:
    path = tmp_path / "run.trr"
    with pytest.raises(FileNotFoundError, match=r"no trajectory .*run\.trr"):
        Trajectories.read(path, topology)
    with pytest.raises(ValueError, match=r"must hold files trajectory_\* of one format.*got \[\]"):
        Trajectories.read(tmp_path, topology)
    molecular(9).write(path, topology)
    content = path.read_bytes()
    for wrong in (content[: len(content) // 2], b"not a trajectory", b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"run\.trr cannot be read by mdtraj"):
            Trajectories.read(path, topology)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.trr cannot be read by mdtraj"):
        Trajectories.read(path, topology.subset(range(5)))
    with pytest.raises(ValueError, match=r"topology .*run\.trr cannot be read"):
        Trajectories.read(path, path)
    foreign = path.rename(tmp_path / "run.foo")
    with pytest.raises(ValueError, match=r"run\.foo cannot be read by mdtraj"):
        Trajectories.read(foreign, topology)


def test_molecules_are_not_written_to_mislead(tmp_path: Path, topology: mdtraj.Topology) -> None:
    with pytest.raises(ValueError, match=r"must end in \.npz or one of .*got .*run\.foo"):
        molecular(3).write(tmp_path / "run.foo", topology)
    with pytest.raises(ValueError, match="topology must be given"):
        molecular(3).write(tmp_path / "run.xtc")
    with pytest.raises(ValueError, match=r"of shape \(22, 3\), got one of 5 atoms"):
        molecular(3).write(tmp_path / "run.xtc", topology.subset(range(5)))
    assert not list(tmp_path.iterdir())
    molecular(3, 4, 5).write(tmp_path / "run.xtc", topology)
    with pytest.raises(ValueError, match=r"holds other trajectories.*run_0002\.xtc"):
        molecular(3, 4).write(tmp_path / "run.xtc", topology)
    molecular(6, 7, 8).write(tmp_path / "run.xtc", topology)
    assert len(mdtraj.load(tmp_path / "run_0000.xtc", top=topology)) == 6


def test_without_pytables_it_is_said_what_h5_needs(
    tmp_path: Path, topology: mdtraj.Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.h5").write_bytes(b"something")
    monkeypatch.setitem(sys.modules, "tables", None)
    for use in (
        lambda: molecular(3).write(tmp_path / "run.h5", topology),
        lambda: Trajectories.read(tmp_path / "run.h5"),
    ):
        with pytest.raises(ValueError, match="h5 needs the package tables: `pip"):
            use()
    assert (tmp_path / "run.h5").read_bytes() == b"something"


def test_a_failed_write_of_a_molecule_keeps_the_old_files(
    tmp_path: Path, topology: mdtraj.Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.trr"
    molecular(3).write(path, topology)
    content = path.read_bytes()

    def fail(self: mdtraj.Trajectory, name: str) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(mdtraj.Trajectory, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        molecular(5).write(path, topology)
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 2


# weighted frames


def test_weighted_frames_are_sampled_by_weight() -> None:
    frames = Frames(torch.arange(5.0)[:, None], weights=[0, 1, 2, 0, 5])
    drawn = frames.sample(80_000, generator())
    counts = np.bincount(drawn[:, 0].long().numpy(), minlength=5)
    assert counts[[0, 3]].tolist() == [0, 0]
    assert chisquare(counts[[1, 2, 4]], 10_000 * np.array([1, 2, 5])).pvalue > 1e-4
    assert chisquare(counts[[1, 2, 4]], np.full(3, 80_000 / 3)).pvalue < 1e-4
    assert torch.equal(drawn, frames.sample(80_000, generator()))


def test_moments_and_effective_sample_size() -> None:
    x = torch.randn(500, 2, generator=generator()) * torch.tensor([1.0, 3.0])
    w = torch.rand(500, generator=generator(1))
    frames = Frames(x, w)
    mean = np.average(x, axis=0, weights=w)
    assert np.allclose(frames.mean(), mean, atol=1e-6)
    assert np.allclose(frames.std() ** 2, np.cov(x.T, aweights=w, ddof=0).diagonal(), rtol=1e-5)
    assert float(frames.weights.sum()) == pytest.approx(1)
    assert frames.ess == pytest.approx(float(w.sum() ** 2 / (w**2).sum()))
    assert Frames(x).ess == pytest.approx(500)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"must have shape \(3,\), got \(1,\)"),
        ([1.0, -1.0, 1.0], "not negative, got -1.0 at frame 1"),
        ([1.0, 1.0, np.nan], "got nan at frame 2"),
        ([0.0, 0.0, 0.0], "positive sum"),
    ],
)
def test_bad_weights_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Frames(np.zeros((3, 1)), weights)


def test_frames_survive_a_file(tmp_path) -> None:
    before = Frames(torch.randn(6, 2, generator=generator()), torch.arange(6))
    before.write(tmp_path / "f.npz")
    after = Frames.read(tmp_path / "f.npz")
    assert torch.equal(before.x, after.x)
    assert torch.allclose(before.weights, after.weights, rtol=1e-15)
    np.savez(tmp_path / "f.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match=r"f\.npz has no array 'frames'"):
        Frames.read(tmp_path / "f.npz")


def pair_probabilities(lengths: list[int], lag_max: int, sampling: str) -> dict[tuple, float]:
    """(trajectory, time, lag) -> probability, by enumeration."""
    lags = np.arange(1, lag_max + 1)
    p_lag = np.log((lags + 1) / lags) if sampling == "log_uniform" else np.ones(lag_max)
    expected = {}
    for lag, p in zip(lags, p_lag / p_lag.sum(), strict=True):
        pairs = [(i, s, int(lag)) for i, n in enumerate(lengths) for s in range(n - lag)]
        expected |= dict.fromkeys(pairs, p / len(pairs))
    return expected


@pytest.mark.parametrize("lengths", [[3, 7, 2, 5, 7], [7, 7, 7]])
@pytest.mark.parametrize("sampling", ["uniform", "log_uniform"])
def test_every_valid_pair_has_its_probability(sampling: str, lengths: list[int]) -> None:
    lag_max, n = 6, 200_000
    x_0, x_lag, lag = LaggedPairs(labelled(lengths), lag_max, sampling).sample(n, generator())
    assert lag.dtype == torch.int64
    assert torch.equal(x_0[:, 0], x_lag[:, 0]), "a pair crosses trajectories"
    assert torch.equal(x_lag[:, 1] - x_0[:, 1], lag.float())
    expected = pair_probabilities(lengths, lag_max, sampling)
    drawn, counts = np.unique(
        torch.stack([x_0[:, 0].long(), x_0[:, 1].long(), lag], 1).numpy(),
        axis=0,
        return_counts=True,
    )
    assert {tuple(key) for key in drawn.tolist()} == set(expected)
    frequency = n * np.array([expected[tuple(key)] for key in drawn.tolist()])
    assert chisquare(counts, frequency).pvalue > 1e-4
    other = pair_probabilities(
        lengths, lag_max, "uniform" if sampling != "uniform" else "log_uniform"
    )
    wrong = n * np.array([other[tuple(key)] for key in drawn.tolist()])
    assert chisquare(counts, wrong).pvalue < 1e-4


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_pairs_never_cross_trajectories(lengths: list[int], fraction: float, seed: int) -> None:
    lag_max = 1 + int(fraction * (max(lengths) - 2))
    pairs = LaggedPairs(labelled(lengths), lag_max)
    x_0, x_lag, lag = pairs.sample(500, generator(seed))
    assert torch.equal(x_0[:, 0], x_lag[:, 0])
    assert torch.equal(x_lag[:, 1] - x_0[:, 1], lag.float())
    assert 1 <= int(lag.min()) <= int(lag.max()) <= lag_max


def test_last_and_first_pair_of_a_lag_can_be_drawn() -> None:
    pairs = LaggedPairs(labelled([5, 3]), 4)
    lag = torch.tensor([2, 2, 4, 4])
    u = torch.tensor([0.0, 1 - 2**-53, 0.0, 1 - 2**-53], dtype=torch.float64)
    assert pairs._draw_position(u, lag).tolist() == [0, 5, 0, 0]


def test_bad_lags_are_refused() -> None:
    trajectories = labelled([3, 6])
    with pytest.raises(ValueError, match=r"below the longest trajectory \(6 frames\), got 6"):
        LaggedPairs(trajectories, 6)
    with pytest.raises(ValueError, match="lag_max must be a whole number"):
        LaggedPairs(trajectories, 0)
    with pytest.raises(ValueError, match="sampling must be one of"):
        LaggedPairs(trajectories, 2, "log")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_batches_stay_on_the_device() -> None:
    cuda = torch.Generator("cuda").manual_seed(0)
    pairs = LaggedPairs(labelled([3, 6]).to("cuda"), 4)
    assert all(part.is_cuda for part in pairs.sample(100, cuda))
    assert Frames(np.zeros((4, 1))).to("cuda").sample(10, cuda).is_cuda
