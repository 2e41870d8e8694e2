import json
import math
import shutil
import sys
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from typer.testing import CliRunner

from bopito_inverse import models
from bopito_inverse.cli import app
from bopito_inverse.config import Config
from bopito_inverse.datasets import Frames, Trajectories
from bopito_inverse.observables import Correlation, feature
from bopito_inverse.shipped import shipped_data
from bopito_inverse.stages.dihedrals import (
    Dihedrals,
    backbone,
    histogram,
    jensen_shannon,
)
from bopito_inverse.stages.inputs import read_reference, read_trajectories, read_umbrella
from bopito_inverse.stages.movies import smooth
from bopito_inverse.stages.simulation import dihedral_atoms
from bopito_inverse.systems import AlanineDipeptide

DIALANINE = shipped_data("ala2") / "dialanine.pdb"
VERBS = ("simulate", "reweight", "train", "fit", "sample")
TINY = """
device = "cpu"
output = "{output}"
[system]
name = "AlanineDipeptide"
steps_per_frame = 50
[simulate]
n_trajectories = 3
n_frames = 8
format = "xtc"
workers = 1
[simulate.umbrella]
dihedral = "phi"
low = -180
high = 180
n_windows = 9
stiffness = 15
n_frames = 24
n_walkers = 2
burn_in = 8
[train]
lag_max = 4
lambda_hat = 0.9
equilibrium.network = {{ width = 8, depth = 1 }}
equilibrium.steps = 20
equilibrium.batch_size = 32
equilibrium.noise_start = 5
dynamic = {{ steps = 20, batch_size = 32, network = {{ width = 8, depth = 1 }} }}
[step]
step_lag = 4
evaluations = 2
[observable]
a = ["sin(phi)", "cos(phi)"]
[experiment]
file = "measured.csv"
fit_lags = [4]
[fit]
n_replicas = 32
[sample]
n_trajectories = 12
n_steps = 3
[data]
reference = "reference.npz"
"""
MEASURED = """observable,lag,value,sigma
sin(phi),4,0.7,0.1
sin(phi),8,0.5,0.1
psi,4,0.5,0.1
cos(phi),4,0.6,0.1
cos(phi),8,0.4,0.1
"""


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def project(folder: Path, *changes: tuple[str, str]) -> Path:
    """A run file with what it reads; `changes` replace parts of it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = TINY.format(output=folder / "results")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "measured.csv").write_text(MEASURED)
    rng = np.random.default_rng(0)
    angles = {name: rng.uniform(-math.pi, math.pi, (2, 400)).cumsum(1) for name in ("phi", "psi")}
    wrapped = {name: np.angle(np.exp(0.1j * x)) for name, x in angles.items()}
    np.savez(folder / "reference.npz", frame_time=0.2, **wrapped)
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("molecule")
    code, out, err = invoke("run", project(folder))
    assert (code, err) == (0, "")
    for words in ("Posterior", "against the reference", "share of 0 < phi < 120", "ramachandran"):
        assert words in out
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the whole run that may be changed."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    project(folder)
    return folder


def refused(words: list[str], *arguments: str | Path) -> None:
    """The command is refused with one line that holds all words."""
    code, _, err = invoke(*arguments)
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_run_writes_what_other_programs_read(finished: Path) -> None:
    results, molecule = finished / "results", AlanineDipeptide(steps_per_frame=50)
    biased = results / "simulate" / "biased"
    simulated = mdtraj.load(biased / "trajectory_0002.xtc", top=biased / "topology.pdb")
    assert simulated.n_frames == 8
    assert np.allclose(np.diff(simulated.time), 0.1)
    assert bool((molecule.energy(simulated.xyz) < 0).all())  # bonds are intact
    sampled = Trajectories.read(results / "sample" / "trajectories.npz")
    assert (len(sampled), sampled.system) == (12, "alanine dipeptide")
    assert sampled.frame_time == pytest.approx(0.4)
    movies = sorted((results / "sample").glob("*.xtc"))
    assert len(movies) == 10
    movie = mdtraj.load(movies[3], top=results / "sample" / "topology.pdb")
    phi = feature("phi", molecule.topology)
    turned = phi(torch.from_numpy(movie.xyz)) - phi(sampled[3])
    assert bool((turned.sin().abs() < 0.05).all())  # xtc rounds to 0.001 nm
    assert not (results / "simulate" / "umbrella.parts").exists()


def test_a_run_reports_what_it_was_compared_with(finished: Path) -> None:
    results = finished / "results"
    manifest = json.loads((results / "sample" / "manifest.json").read_text())
    assert "reference" in manifest["inputs"]
    assert manifest["config"]["system"] == {"name": "AlanineDipeptide", "steps_per_frame": 50}
    report = json.loads((results / "sample" / "comparison.json").read_text())
    with np.load(finished / "reference.npz") as file:
        phi, psi = file["phi"], file["psi"]
    low, high = np.histogram(phi, [0, math.radians(120), math.pi])[0][0], phi.size
    shares = report["share_of_positive_phi"]
    assert shares["interval_degrees"] == [0, 120]
    assert shares["phi"]["reference"] == pytest.approx(low / high)
    # lags of 4 frames of 0.1 ps are 2 of the reference
    wave = torch.from_numpy(np.sin(psi.astype(np.float32)))[..., None]
    obs = Correlation(lambda x: x, normalization="variance")
    expected = obs.from_trajectories(wave, [2, 4, 6])[0]
    blocks = obs.from_trajectories(wave.reshape(20, 40, 1), [2, 4, 6])[0]
    assert report["lags"] == [4, 8, 12]
    found = report["correlations"]["sin(psi)"]
    assert found["reference"] == pytest.approx(blocks.tolist(), abs=1e-5)
    assert found["reference"] == pytest.approx(expected.tolist(), abs=0.05)
    assert found["compared_lags"] == [4, 8, 12]
    assert report["correlations"]["sin(phi)"]["compared_lags"] == [8, 12]  # 4 was fitted
    limits = [(-math.pi, math.pi)] * 2
    whole = [
        np.histogram2d(a.ravel(), b.ravel(), 40, limits)[0] for a, b in zip(phi, psi, strict=True)
    ]
    divergence = jensenshannon(*(x.ravel() for x in whole)) ** 2
    assert report["jensen_shannon"]["phi, psi"]["reference_halves"] == pytest.approx(divergence)
    floor, n = report["jensen_shannon"]["phi, psi"]["corrected_noise_floor"], 36
    share = np.histogram2d(phi.ravel(), psi.ravel(), 40, limits)[0].ravel() / phi.size
    draws = np.random.default_rng(1).multinomial(n, share, size=200) / n
    floors = [jensenshannon(draw, share) ** 2 for draw in draws]
    assert abs(floor - np.mean(floors)) < 4 * np.std(floors)
    torsions = report["ramachandran"]["phi, psi"]
    start = np.radians(torsions["start_degrees"])
    off = np.angle(np.exp(1j * (np.stack([phi, psi]) - start[:, None, None])))
    near = (np.abs(off) <= math.radians(30)).all(0)
    assert torsions["lags"] == [4, 12]
    assert torsions["frames"]["MD"] == [near[:, :-2].sum(), near[:, :-6].sum()]
    frames = Frames.read(results / "reweight" / "frames.npz")
    energy = AlanineDipeptide().energy(frames.x).numpy()
    order = energy.argsort()
    middle = np.interp(0.5, frames.weights.numpy()[order].cumsum(), energy[order])
    assert abs(report["energy"]["equilibrium_frames"]["median"] - middle) < 5  # of 200 draws


def test_check_and_a_finished_run_change_nothing(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    code, out, _ = invoke("check", finished / "run.toml")
    words = " ".join(out.split())
    assert code == 0
    for found in ("3 of 8 frames", "9 windows of 24", "sin(phi), cos(phi): 4 points", "800 frames"):
        assert found in words
    code, out, err = invoke("run", finished / "run.toml")
    assert (code, err) == (0, "")
    assert [f"{verb}: already done" in out for verb in VERBS] == [True] * 5
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_workers_do_not_matter_but_the_rest_does(copy: Path) -> None:
    code, out, _ = invoke("simulate", project(copy, ("workers = 1", "workers = 2")))
    assert (code, "already done" in out) == (0, True)
    run_file = project(copy, ("steps_per_frame = 50", "steps_per_frame = 50\ntemperature = 310"))
    refused(["system.temperature was 'not set', now 310.0"], "simulate", run_file)
    biased = copy / "results" / "simulate" / "biased"
    shutil.copy(biased / "trajectory_0000.xtc", biased / "trajectory_0001.xtc")
    refused(["train holds", "input trajectories", "biased"], "train", project(copy))


def test_a_model_of_another_molecule_is_refused(copy: Path) -> None:
    path = copy / "results" / "train" / "bopito.safetensors"
    model = models.load(path)
    network = model.s_eq.network
    network.bonds = network.bonds[1:]
    models.save(model, copy / "other.safetensors", system="alanine dipeptide")
    data = ("[data]", '[data]\ncheckpoint = "other.safetensors"')
    for verb in ("check", "fit", "sample"):
        refused(["other.safetensors", "other atoms or bonds"], verb, project(copy, data))


def test_a_reference_that_does_not_fit_is_refused(copy: Path) -> None:
    good = dict(np.load(copy / "reference.npz"))
    for arrays, words in (
        ({"phi": np.degrees(good["phi"])}, ["phi must hold angles in rad"]),
        ({"psi": good["psi"][:, :-1]}, ["psi must have the shape (n_trajectories, n_frames)"]),
        ({"frame_time": 0.3}, ["must divide a step of 4 frames of 0.1 ps, got 0.3 ps"]),
    ):
        np.savez(copy / "reference.npz", **(good | arrays))
        for verb in ("check", "fit", "sample"):
            refused(["reference.npz", *words], verb, copy / "run.toml")
    (copy / "reference.npz").unlink()
    refused(["data.reference: there is no file"], "sample", copy / "run.toml")


def test_lags_that_a_short_reference_cannot_know_are_left_out(copy: Path) -> None:
    good = dict(np.load(copy / "reference.npz"))
    short = {name: good[name].reshape(-1, 8)[:100] for name in ("phi", "psi")}
    for length, known in ((8, [4, 8, 12]), (7, [4, 8])):  # a lag of 12 is 6 frames
        np.savez(
            copy / "reference.npz", frame_time=0.2, **{k: x[:, :length] for k, x in short.items()}
        )
        shutil.rmtree(copy / "results" / "sample")
        code, out, err = invoke("sample", copy / "run.toml")
        assert (code, err, "nan" in out) == (0, "", False)
        report = json.loads((copy / "results" / "sample" / "comparison.json").read_text())
        for name in ("sin(phi)", "sin(psi)"):
            part = report["correlations"][name]
            left = [lag for lag in known if name == "sin(psi)" or lag > 4]
            assert part["compared_lags"] == left
            of = [report["lags"].index(lag) for lag in left]
            off = [part["corrected"][i] - part["reference"][i] for i in of]
            assert part["mean_abs_error"]["corrected"] == pytest.approx(np.abs(off).mean())
        torsions = report["ramachandran"]["phi, psi"]
        assert torsions["lags"] == [4, known[-1]]
        assert set(torsions["frames"]) == {"uncorrected", "corrected", "MD"}


MINE = '[system]\nname = "Molecule"\nstructure = "my.pdb"\n'
WINDOWS = "low = 0\nhigh = 90\nn_windows = 2\nstiffness = 9\nn_frames = 20\n"


def read(folder: Path, text: str) -> Path:
    shutil.copy(DIALANINE, folder / "my.pdb")
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def test_a_molecule_of_ones_own(tmp_path: Path) -> None:
    text = MINE + 'constraints = "none"\nlabel = "two alanines"\n[simulate.umbrella]\n' + WINDOWS
    config = Config.read(read(tmp_path, text + 'dihedral = "phi2"\n'))
    molecule = config.system.build()
    assert molecule is config.system.build()
    assert (molecule.name, molecule.constraints) == ("two alanines", None)
    phi = mdtraj.compute_phi(mdtraj.load(DIALANINE))[0]
    assert dihedral_atoms(config) == tuple(phi[1])
    assert backbone(molecule.topology) == [("phi1", "psi1"), ("phi2", "psi2")]
    assert np.allclose(config.section("simulate.umbrella").centers, [0, math.pi / 2])


def test_windows_go_evenly_round_a_whole_circle(tmp_path: Path) -> None:
    config = Config.read(project(tmp_path))
    assert np.allclose(np.diff(np.degrees(config.section("simulate.umbrella").centers)), 40)
    assert config.section("simulate.umbrella").centers[0] == -math.pi


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINE.replace("my.pdb", "no.pdb"), ["system.structure: there is no file", "no.pdb"]),
        (MINE.replace("my.pdb", "run.toml"), ["system: structure", "cannot be read by mdtraj"]),
        (MINE + 'force_field = ["tip3p.xml"]', ["system: the force field tip3p.xml has no para"]),
        (MINE + "steps_per_frame = 0", ["system: steps_per_frame must be"]),
        (MINE + 'constraints = "all"', ["system.constraints must be 'hbonds', 'allbonds' or"]),
        (MINE + "kT = 1", ["system: Molecule takes structure, force_field", "got kT"]),
        ('[system]\nname = "Molecule"', ["system: Molecule needs a structure"]),
        (MINE + "[simulate]\nn_trajectories = 2", ["n_trajectories and n_frames go together"]),
        (
            MINE + "[simulate]\nn_trajectories = 2\nn_frames = 2\nbarrier = 0",
            ["the key simulate.barrier is for one-dimensional systems, not for Molecule"],
        ),
        (
            MINE + "[simulate.umbrella]\n" + WINDOWS + 'dihedral = "sin(phi1)"',
            ["simulate.umbrella.dihedral must be a dihedral", "got 'sin(phi1)'"],
        ),
        (
            MINE + "[simulate.umbrella]\n" + WINDOWS + 'dihedral = "phi"',
            ["simulate.umbrella.dihedral must say which of phi1 to phi2"],
        ),
        (
            MINE + '[observable]\na = "sin(phi3)"',
            ["observable.a", "the molecule has 2 phi", "got 'sin(phi3)'"],
        ),
        (MINE + '[observable]\na = "sin(pi1)"', ["observable.a must be a feature", "sin(phi1)"]),
        (MINE + '[observable]\na = ["phi1", "phi1"]', ["observable.a must hold different names"]),
        (MINE + '[observable]\na = ["phi1", "psi1"]\nb = "phi2"', ["b and name go with a single"]),
        (MINE + "[data]\nreferense = 'x'", ["did you mean data.reference?"]),
        (
            MINE + "[train]\nlag_max = 2\nlambda_hat = 0.9\nforces = true",
            ["train.forces must be false for a molecule with constraints"],
        ),
    ],
)
def test_bad_run_files_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    refused(words, "check", read(tmp_path, text))


def test_check_says_what_a_part_of_a_run_file_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    frames = AlanineDipeptide().positions.repeat(1, 5, 1, 1)
    topology = AlanineDipeptide().topology
    for file in ("mine.dcd", "mine.xtc"):
        Trajectories(frames, 1.0).write(tmp_path / file, topology)
    ours = '[system]\nname = "AlanineDipeptide"\n'
    run_file = read(tmp_path, ours)
    code, out, _ = invoke("check", run_file)
    words = " ".join(out.split())
    assert code == 0
    for found in (
        "not yet, needs [simulate] n_trajectories and n_frames",
        "not yet, needs [simulate.umbrella] or [simulate.tempering]",
        "not yet, needs [train]",
        "needs the section [simulate]",
        "needs the section [step]",
    ):
        assert found in words
    refused(
        ["[simulate.umbrella] or", "[data] umbrella a file, must be given"], "reweight", run_file
    )
    for file, told in (("mine.dcd", True), ("mine.xtc", False)):
        data = f'[data]\ntrajectories = "{file}"\nreference = "{file}"\n'
        code, out, _ = invoke("check", read(tmp_path, ours + data))
        assert " ".join(out.split()).count("the format holds no times") == 2 * told


def test_keys_of_molecules_are_refused_elsewhere(tmp_path: Path) -> None:
    run_file = read(tmp_path, '[system]\nname = "Prinz"\n[data]\nreference = "r.npz"')
    refused(["the key data.reference is for molecules, not for Prinz"], "check", run_file)


def test_starts_are_drawn_by_weight(tmp_path: Path) -> None:
    molecule = AlanineDipeptide(steps_per_frame=2)
    x = molecule.positions[None] + torch.tensor([0.0, 1.0])[:, None, None]
    Frames(x, [0, 1]).write(tmp_path / "starts.npz")
    text = """output = "{}"
[system]
name = "AlanineDipeptide"
steps_per_frame = 2
[simulate]
n_trajectories = 2
n_frames = 2
starts = "starts.npz"
workers = 1
"""
    run_file = read(tmp_path, text.format(tmp_path / "out"))
    assert invoke("simulate", run_file)[0] == 0
    config = Config.read(run_file)
    made = read_trajectories(config)
    assert made.frame_time == pytest.approx(0.004)
    assert torch.stack([frames[0].mean() for frames in made]).min() > 0.9
    Frames(x).write(tmp_path / "starts.npz")
    refused(["input starts", "is not the file that was used"], "simulate", run_file)


def test_tempering_is_weighed_to_the_temperature_of_the_molecule(tmp_path: Path) -> None:
    text = """output = "{}"
[system]
name = "AlanineDipeptide"
steps_per_frame = 5
[simulate]
workers = 1
[simulate.tempering]
low = 300
high = 432
n_windows = 3
n_frames = 100
burn_in = 2
"""
    run_file = read(tmp_path, text.format(tmp_path / "out"))
    config = Config.read(run_file)
    assert np.allclose(config.section("simulate.tempering").ladder, [300, 360, 432])
    assert invoke("simulate", run_file)[0] == 0
    assert not (tmp_path / "out" / "simulate" / "biased").exists()
    made = read_umbrella(config)
    hot = made.form["energies"].view(3, 100).mean(1)
    assert bool((hot.diff() > 0).all())
    kelvin = made.form["ladder"] / made.kT * 300
    assert kelvin.tolist() == pytest.approx([300, 360, 432])


@pytest.mark.parametrize("name", ["mine.dcd", "mine.xtc", "mine.npz", "many"])
def test_trajectories_of_other_programs_are_read(tmp_path: Path, name: str) -> None:
    molecule = AlanineDipeptide()
    x = molecule.positions + 0.01 * torch.randn(3, 5, 22, 3)
    path = tmp_path / name
    if name == "many":
        path.mkdir()
        Trajectories(x, 1.0).write(path / "trajectory.xtc", molecule.topology)
    else:
        Trajectories(x[:1], 1.0).write(path, molecule.topology)
    text = f'[system]\nname = "AlanineDipeptide"\n[data]\ntrajectories = "{name}"\n'
    text += f'reference = "{name}"\n'
    config = Config.read(read(tmp_path, text))
    found = read_trajectories(config)
    assert (len(found), found.frame_time) == (3 if name == "many" else 1, 1.0)
    reference = read_reference(config)
    for i, (angles, frames) in enumerate(zip(reference.trajectories, found, strict=True)):
        whole = mdtraj.Trajectory(frames.numpy(), molecule.topology)
        expected = [f(whole)[1][:, 0] for f in (mdtraj.compute_phi, mdtraj.compute_psi)]
        assert np.allclose(angles.T, expected, atol=1e-4), i


def test_trajectories_at_another_time_step_are_refused(tmp_path: Path) -> None:
    molecule = AlanineDipeptide()
    Trajectories(molecule.positions.repeat(1, 5, 1, 1), 2.0).write(
        tmp_path / "mine.xtc", molecule.topology
    )
    text = '[system]\nname = "AlanineDipeptide"\n[data]\ntrajectories = "mine.xtc"\n'
    words = ["mine.xtc: frame_time must be that of alanine dipeptide (1), got 2"]
    refused(words, "check", read(tmp_path, text))
    Trajectories(torch.zeros(1, 5, 21, 3), 1.0).write(tmp_path / "mine.npz")
    words = ["mine.npz must hold frames of shape (22, 3), as alanine dipeptide has, got (21, 3)"]
    refused(words, "check", read(tmp_path, text.replace("xtc", "npz")))
    Trajectories(10 * molecule.positions.repeat(1, 5, 1, 1), 1.0).write(tmp_path / "mine.npz")
    words = ["mine.npz: frames must be in nm", "has a length of 1", "in the structure of 0.1"]
    refused(words, "check", read(tmp_path, text.replace("xtc", "npz")))


def test_a_format_whose_package_is_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tables", None)
    (tmp_path / "mine.h5").write_bytes(b"something")
    text = '[system]\nname = "AlanineDipeptide"\n[data]\ntrajectories = "mine.h5"\n'
    refused(["mine.h5 needs the package tables"], "check", read(tmp_path, text))


def test_a_movie_is_smooth() -> None:
    molecule, rng = AlanineDipeptide(), np.random.default_rng(1)
    shape = molecule.positions.numpy() + rng.normal(0, 0.001, (6, 22, 3)).astype(np.float32)
    turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in shape]
    turns = [q * np.sign(np.linalg.det(q)) for q in turns]
    frames = np.stack([x @ q + rng.normal(0, 1, 3) for x, q in zip(shape, turns, strict=True)])
    movie = smooth(torch.from_numpy(frames.astype(np.float32))).numpy()
    assert np.allclose(movie[0], frames[0], atol=1e-6)
    assert np.abs(np.diff(movie, axis=0)).max() < 0.01
    own, before = (np.linalg.norm(x[:, :1] - x, axis=2) for x in (movie, frames))
    assert np.allclose(own, before, atol=1e-5)  # the shapes are kept, mirror images are not made
    phi = feature("phi", molecule.topology)
    turned = phi(torch.from_numpy(movie)) - phi(torch.from_numpy(frames).float())
    assert bool((turned.abs() < 1e-3).all())


def test_shares_have_the_error_of_their_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):  # each trajectory stays where it is: twenty independent frames
        angle = 6 * torch.rand(20, 1, 1, generator=generator) - 3
        made = Dihedrals(("phi",), list(angle.expand(20, 50, 1)), 1.0)
        found.append(made.shares("phi", np.array([0.0, 1.5])))
    share, error = (np.array(part)[:, 0] for part in zip(*found, strict=True))
    assert share.mean() == pytest.approx(0.25, abs=0.02)
    assert error.mean() == pytest.approx(share.std(), rel=0.15)


def test_weights_of_a_reference_count_in_all_that_is_compared(tmp_path: Path) -> None:
    phi = np.where(np.arange(40)[:, None] % 2 == 0, 1.0, -1.0) * np.ones((40, 12))
    weights = np.where(phi[:, 0] > 0, 0.1, 0.9)
    np.savez(tmp_path / "md.npz", phi=phi, psi=0 * phi, frame_time=1.0, weights=weights)
    made = Dihedrals.read(tmp_path / "md.npz", ("phi", "psi"))
    for part in (made, made.later(), made.blocks(80), *made.halves()):
        assert part.shares("phi", np.array([0.0, 3.0]))[0] == pytest.approx(0.1)
        assert part.share(2, "phi").tolist() == pytest.approx([0.9, 0.1])
    obs = Correlation(lambda angles: angles[:, 0], normalization="raw")
    obs_connected = Correlation(lambda angles: angles[:, 0], normalization="connected")
    assert made.correlation(obs, np.array([2]))[0] == pytest.approx(1.0)
    assert made.correlation(obs_connected, np.array([2]))[0] == pytest.approx(4 * 0.1 * 0.9)
    every = np.broadcast_to(weights[:, None], phi.shape) * np.linspace(0.5, 1.5, 12)
    np.savez(tmp_path / "md.npz", phi=phi, psi=0 * phi, frame_time=1.0, weights=every)
    made = Dihedrals.read(tmp_path / "md.npz", ("phi", "psi"))
    for part in (made, made.later(), made.blocks(80), *made.halves()):
        assert part.shares("phi", np.array([0.0, 3.0]))[0] == pytest.approx(0.1)
        assert part.share(2, "phi").tolist() == pytest.approx([0.9, 0.1])
    np.savez(tmp_path / "md.npz", phi=phi, psi=phi, frame_time=1.0, weights=weights[1:])
    with pytest.raises(ValueError, match="weights must be zero or more, one for each of 40"):
        Dihedrals.read(tmp_path / "md.npz", ("phi", "psi"))


def test_divergence_of_shifted_samples() -> None:
    angles = torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0)) * math.pi
    p, q = histogram(angles - math.pi, 60), histogram(angles - math.pi / 2, 60)
    assert jensen_shannon(p, q) == pytest.approx(math.log(2) / 2, abs=2e-3)  # half in common
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q) ** 2)
