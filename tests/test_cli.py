import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from bopito_inverse import models
from bopito_inverse.cli import app
from bopito_inverse.inference.posterior import read_netcdf

VERBS = ("simulate", "reweight", "train", "fit", "sample")
TINY = """
device = "cpu"
output = "{output}"
[system]
name = "OrnsteinUhlenbeck"
[simulate]
n_trajectories = 100
n_frames = 31
starts = [-2, 2]
[simulate.umbrella]
low = -3
high = 3
n_windows = 9
stiffness = 4
n_frames = 400
[train]
lag_max = 20
lambda_hat = 0.95
equilibrium = {{ steps = 30, batch_size = 128, network = {{ width = 8, depth = 1 }} }}
dynamic = {{ steps = 30, batch_size = 128, network = {{ width = 8, depth = 1 }} }}
[step]
step_lag = 20
relax = [20]
evaluations = 4
[experiment]
file = "measured.csv"
[fit]
n_replicas = 64
[sample]
n_trajectories = 50
n_steps = 10
"""
MEASURED = "observable,lag,value,sigma\nx,20,0.37,0.05\nx,40,0.14,0.05\nx,60,0.05,0.05\n"


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def project(folder: Path, *changes: tuple[str, str]) -> Path:
    """A run file with its measurement; `changes` replace parts of the run file."""
    folder.mkdir(parents=True, exist_ok=True)
    text = TINY.format(output=folder / "results")
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "measured.csv").write_text(MEASURED)
    (folder / "run.toml").write_text(text)
    return folder / "run.toml"


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in files
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("run")
    code, out, err = invoke("run", project(folder))
    assert (code, err) == (0, "")
    assert "Posterior" in out
    assert "Against the exact transfer operator" in out
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the whole run that may be changed."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    project(folder)
    return folder


def test_help_teaches() -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    order = [out.index(f"│ {verb} ") for verb in ("demo", "check", *VERBS, "run")]
    assert order == sorted(order)
    assert "simulate -> reweight -> train -> fit -> sample" in out
    for verb in VERBS:
        code, out, _ = invoke(verb, "--help")
        assert code == 0
        for word in ("Reads", "Writes", f"{verb}/", f"bopito-inverse {verb} run.toml", "--device"):
            assert word in out, f"{verb}: {word}"


def test_a_run_writes_what_it_promises(finished: Path) -> None:
    results = finished / "results"
    for file in (
        "simulate/biased.npz",
        "simulate/umbrella.npz",
        "reweight/frames.npz",
        "reweight/reweighting.json",
        "train/equilibrium.safetensors",
        "train/bopito.safetensors",
        "fit/posterior.nc",
        "fit/correlation.png",
        "fit/posterior.pdf",
        "sample/trajectories.npz",
        "sample/transition.pdf",
    ):
        assert (results / file).stat().st_size > 0, file
    summary = json.loads((results / "fit" / "summary.json").read_text())
    for name in ("n_int", "weight", "timescale"):
        assert summary[name].keys() == {"mean", "sd", "median", "hdi_94"}
    constants = {k: summary[k] for k in ("lag_max", "lambda_hat", "step_lag", "n_replicas", "seed")}
    expected = {"lag_max": 20, "lambda_hat": 0.95, "step_lag": 20, "n_replicas": 64, "seed": 0}
    assert constants == expected
    draws = read_netcdf(results / "fit" / "posterior.nc").posterior["n_int"].values
    assert np.isclose(draws.mean(), summary["n_int"]["mean"], equal_nan=True)
    report = json.loads((results / "sample" / "comparison.json").read_text())
    assert abs(report["exact_timescale"] - 20) < 0.1  # of the Ornstein-Uhlenbeck process
    assert report["n_int"] == summary["n_int"]["mean"]
    assert report["total_variation"]["noise_floor"] > 0
    assert report["correlations"]["x"]["exact"][0] == pytest.approx(np.exp(-1), abs=2e-3)


def test_manifests_say_what_made_the_files(finished: Path) -> None:
    for verb in VERBS:
        folder = finished / "results" / verb
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["verb"] == verb
        assert manifest["config"]["system"] == {"name": "OrnsteinUhlenbeck"}
        assert manifest["versions"].keys() == {"bopito_inverse", "torch", "numpy"}
        assert manifest["finished"] >= manifest["started"]
        files = {name: value[0] for name, value in snapshot(folder).items()}
        assert manifest["outputs"] == {k: v for k, v in files.items() if k != "manifest.json"}
        for entry in manifest["inputs"].values():
            content = Path(entry["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]


def test_a_finished_run_is_left_alone(finished: Path) -> None:
    before = snapshot(finished)
    code, out, err = invoke("run", finished / "run.toml")
    assert (code, err) == (0, "")
    assert [f"{verb}: already done" in out for verb in VERBS] == [True] * 5
    assert snapshot(finished) == before
    code, out, _ = invoke("sample", finished / "run.toml", "--quiet")
    assert (code, out) == (0, "")


def test_check_reads_everything_and_changes_nothing(finished: Path, tmp_path: Path) -> None:
    before = snapshot(finished)
    code, out, _ = invoke("check", finished / "run.toml")
    assert code == 0
    words = " ".join(out.split())
    for found in ("100 of 31 frames", "9 windows of 400", "BoPITOScore", "x: 3 points", "done"):
        assert found in words
    assert snapshot(finished) == before
    run_file = project(tmp_path / "new")
    code, out, _ = invoke("check", run_file)
    assert code == 0
    assert "ready to start" in " ".join(out.split())
    assert not (tmp_path / "new" / "results").exists()


def refused(words: list[str], *arguments: str | Path) -> None:
    """The command is refused with one line that holds all words, and no file changes."""
    folder = Path(arguments[1]).parent
    before = snapshot(folder)
    code, _, err = invoke(*arguments)
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert snapshot(folder) == before


def test_another_configuration_is_refused_by_key(copy: Path) -> None:
    run_file = project(copy, ("lag_max = 20", "lag_max = 15"))
    refused(["train holds", "train.lag_max was 20, now 15", "--output"], "train", run_file)
    run_file = project(copy, ("n_steps = 10", "n_steps = 11"))
    refused(["sample holds", "sample.n_steps was 10, now 11"], "run", run_file)
    run_file = project(copy, ("low = -3", "low = -4"))
    refused(["simulate holds", "simulate.umbrella.low was -3.0, now -4.0"], "check", run_file)
    run_file = project(copy, ('device = "cpu"', "seed = 1"))
    refused(["simulate holds", "seed was 0, now 1"], "run", run_file)


def test_other_inputs_are_refused_by_name(copy: Path) -> None:
    (copy / "measured.csv").write_text(MEASURED.replace("0.37", "0.38"))
    refused(["fit holds", "input experiment", "measured.csv"], "fit", copy / "run.toml")


def test_lost_and_foreign_files_are_refused(copy: Path) -> None:
    (copy / "results" / "fit" / "posterior.nc").unlink()
    refused(["fit has lost posterior.nc"], "fit", copy / "run.toml")
    (copy / "results" / "fit" / "manifest.json").unlink()
    refused(["fit holds files but no manifest.json"], "fit", copy / "run.toml")
    (copy / "results" / "fit" / "manifest.json").write_text("{")
    refused(["manifest.json is unreadable"], "fit", copy / "run.toml")


def test_missing_inputs_name_the_verb_that_makes_them(tmp_path: Path) -> None:
    run_file = project(tmp_path)
    for verb, needed, maker in (
        ("reweight", "umbrella.npz", "simulate"),
        ("train", "biased.npz", "simulate"),
        ("fit", "bopito.safetensors", "train"),
    ):
        refused([needed, f"`bopito-inverse {maker} {run_file}` makes it"], verb, run_file)
    (tmp_path / "measured.csv").unlink()
    refused(["experiment.file: there is no file", "measured.csv"], "check", run_file)
    refused(["no.toml: there is no such run file"], "fit", tmp_path / "no.toml")
    with run_file.open("a") as file:
        file.write('[data]\nframes = "none.npz"\n')
    refused(["data.frames: there is no file", "none.npz"], "check", run_file)


def test_unknown_keys_are_refused_with_the_nearest(copy: Path) -> None:
    project(copy, ("lag_max", "lag_maxx"))
    words = ["run.toml", "unknown key train.lag_maxx; did you mean train.lag_max?"]
    for verb in ("check", "train", "run"):
        refused(words, verb, copy / "run.toml")


FRAME_TIME = 0.05


def write_trajectories(path: Path, frames: np.ndarray, system: str = "", **more: float) -> None:
    values = {"frame_time": FRAME_TIME} | more
    np.savez(path, trajectories=frames, system=system, **values)


def nan_frames(path: Path) -> None:
    frames = np.random.default_rng(0).normal(size=(10, 31, 1))
    frames[4, 7] = np.nan
    write_trajectories(path, frames)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nan_frames, ["trajectories[4]", "NaN", "frame 7"]),
        (lambda p: write_trajectories(p, np.ones((5, 31, 2))), ["shape (1,)", "got (2,)"]),
        (lambda p: write_trajectories(p, np.ones((0, 31, 1))), ["at least one trajectory"]),
        (lambda p: write_trajectories(p, np.ones((5, 1, 1))), ["at least 2 frames each, got 1"]),
        (
            lambda p: write_trajectories(p, np.ones((5, 20, 1))),
            ["run.toml", "lag_max must be below the longest trajectory (20 frames), got 20"],
        ),
        (
            lambda p: write_trajectories(p, np.ones((5, 31, 1)), "Prinz"),
            ["is of the system 'Prinz'", "'OrnsteinUhlenbeck'"],
        ),
        (
            lambda p: write_trajectories(p, np.ones((5, 31, 1)), frame_time=1.0),
            ["frame_time must be that of OrnsteinUhlenbeck (0.05), got 1"],
        ),
        (lambda p: p.write_bytes(b"PK\x03\x04"), ["no readable .npz file"]),
    ],
)
def test_bad_trajectories_are_refused(
    copy: Path, make: Callable[[Path], None], words: list[str]
) -> None:
    make(copy / "mine.npz")
    with (copy / "run.toml").open("a") as file:
        file.write('[data]\ntrajectories = "mine.npz"\n')
    for verb in ("check", "train"):
        refused(["mine.npz", *words], verb, copy / "run.toml")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"frames": np.ones((5, 2))}, ["shape (1,)", "got (2,)"]),
        ({"frames": np.full((5, 1), np.inf)}, ["infinite", "frame 0"]),
        ({"frames": np.ones((5, 1)), "weights": -np.ones(5)}, ["not negative", "frame 0"]),
        ({"frames": np.ones((5, 1)), "system": "Prinz"}, ["is of the system 'Prinz'"]),
        ({"x": np.ones((5, 1))}, ["no array 'frames'"]),
    ],
)
def test_bad_frames_are_refused(copy: Path, arrays: dict, words: list[str]) -> None:
    np.savez(copy / "mine.npz", **arrays)
    with (copy / "run.toml").open("a") as file:
        file.write('[data]\nframes = "mine.npz"\n')
    for verb in ("check", "train", "fit", "sample"):
        refused(["mine.npz", *words], verb, copy / "run.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MEASURED.replace("40,0.14,0.05", "40,0.14,-0.05"), ["line 3, column sigma", "'-0.05'"]),
        (MEASURED.replace("x,40", "x,20"), ["line 3, column lag", "duplicate lag"]),
        (MEASURED.replace("x,60", "x,30"), ["line 4, column lag", "must increase"]),
        (MEASURED.replace("x,60", "x,70"), ["multiples of the step of 20 frames", "[70]"]),
        (MEASURED.replace("sigma", "error"), ["line 1", "missing: 'sigma'"]),
        (MEASURED.replace("0.37", "nan"), ["line 2, column value", "'nan'"]),
        (MEASURED.replace("x,", "y,"), ["observable must be one of ['y'], got 'x'"]),
    ],
)
def test_bad_experiments_are_refused(copy: Path, text: str, words: list[str]) -> None:
    (copy / "measured.csv").write_text(text)
    for verb in ("check", "fit"):
        refused(["measured.csv", *words], verb, copy / "run.toml")


def test_held_out_lags_must_exist(copy: Path) -> None:
    run_file = project(copy, ('"measured.csv"', '"measured.csv"\nfit_lags = [20, 80]'))
    refused(["experiment.fit_lags", "measured.csv", "got 80"], "fit", run_file)


def truncated(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:-50])


def foreign(path: Path, good: Path) -> None:
    save_file({"weight": np.ones(3)}, path)


def not_safetensors(path: Path, good: Path) -> None:
    path.write_bytes(b"not a checkpoint at all")


def other_system(path: Path, good: Path) -> None:
    models.save(models.load(good), path, system="DoubleWell")


def other_arguments(path: Path, good: Path) -> None:
    training = {"system": {"kT": 2.0}}
    models.save(models.load(good), path, system="OrnsteinUhlenbeck", training=training)


def one_score(path: Path, good: Path) -> None:
    models.save(models.EquilibriumScore((1,)), path)


def two_dimensions(path: Path, good: Path) -> None:
    parts = models.EquilibriumScore((2,)), models.DynamicScore((2,))
    models.save(models.BoPITOScore(*parts, lambda_hat=0.9, lag_max=20), path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, ["no readable safetensors file, it may be truncated"]),
        (not_safetensors, ["no readable safetensors file"]),
        (foreign, ["safetensors file of another program"]),
        (other_system, ["was trained on 'DoubleWell', not on 'OrnsteinUhlenbeck'"]),
        (other_arguments, ["with {'kT': 2.0}, not with its default arguments"]),
        (one_score, ["must hold a BoPITOScore, got EquilibriumScore"]),
        (two_dimensions, ["shape (1,)", "got (2,)"]),
    ],
)
def test_bad_checkpoints_are_refused(
    copy: Path, make: Callable[[Path, Path], None], words: list[str]
) -> None:
    make(copy / "mine.safetensors", copy / "results" / "train" / "bopito.safetensors")
    with (copy / "run.toml").open("a") as file:
        file.write('[data]\ncheckpoint = "mine.safetensors"\n')
    for verb in ("check", "fit", "sample"):
        refused(["mine.safetensors", *words], verb, copy / "run.toml")


def test_relaxation_beyond_the_model_is_refused(copy: Path) -> None:
    words = ["run.toml: step.relax must hold lags of at most lag_max of the model (20), got 21"]
    for verb in ("check", "fit", "sample"):
        refused(words, verb, project(copy, ("relax = [20]", "relax = [21]")))


def test_poor_overlap_is_refused_and_reported(tmp_path: Path) -> None:
    run_file = project(tmp_path, ("n_windows = 9", "n_windows = 2"), ("ness = 4", "ness = 40"))
    assert invoke("simulate", run_file)[0] == 0
    code, _, err = invoke("reweight", run_file)
    assert code == 2
    assert "umbrella.npz are unreliable: the overlap of neighbouring windows 0 and 1" in err
    folder = tmp_path / "results" / "reweight"
    assert json.loads((folder / "reweighting.json").read_text())["status"] in err
    assert not (folder / "frames.npz").exists()


def start(*arguments: str | Path) -> subprocess.Popen:
    code = (  # a job in the background of a script ignores SIGINT, and so do its children
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from bopito_inverse.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before it could be killed: {process.stderr}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


LONG = ("dynamic = { steps = 30,", "dynamic = { steps = 600, checkpoint_every = 20,")


def same_scores(a: Path, b: Path) -> bool:
    left, right = (models.load(path).state_dict() for path in (a, b))
    return left.keys() == right.keys() and all(bool((left[k] == right[k]).all()) for k in left)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_training_resumes_after_a_kill(finished: Path, tmp_path: Path, kill: int) -> None:
    paths = []
    for name in ("killed", "whole"):
        for verb in ("simulate", "reweight"):
            shutil.copytree(finished / "results" / verb, tmp_path / name / "results" / verb)
        project(tmp_path / name, LONG)
        paths.append(tmp_path / name / "results" / "train" / "bopito.safetensors")
    process = start("train", tmp_path / "killed" / "run.toml", "--quiet")
    wait_for(process, (paths[0].parent / "dynamic" / "last.ckpt").exists)
    process.send_signal(kill)
    _, err = process.communicate()
    assert process.returncode == (-9 if kill == signal.SIGKILL else 130)
    assert ("run the same command again to resume" in err) == (kill == signal.SIGINT)
    assert not paths[0].exists()
    other = project(tmp_path / "killed", LONG, ("lag_max = 20", "lag_max = 10"))
    refused(["train.lag_max was 20, now 10"], "train", other)
    code, out, _ = invoke("train", project(tmp_path / "killed", LONG))
    assert code == 0
    assert "resuming in" in out
    assert invoke("train", tmp_path / "whole" / "run.toml")[0] == 0
    assert same_scores(*paths)


def test_sampling_resumes_after_a_kill(copy: Path) -> None:
    many = ("n_trajectories = 50\nn_steps = 10", "n_trajectories = 20000\nn_steps = 20\nn_int = 30")
    folder = copy / "results" / "sample"
    shutil.rmtree(folder)
    process = start("sample", project(copy, many), "--quiet")
    state = folder / "trajectories.npz.partial.json"
    wait_for(process, lambda: state.exists() and json.loads(state.read_text())["done"] > 0)
    process.kill()
    process.communicate()
    assert json.loads(state.read_text())["done"] < 5  # batches of 4096 trajectories
    code, out, _ = invoke("sample", copy / "run.toml")
    assert code == 0
    assert "resuming in" in out
    killed = (folder / "trajectories.npz").read_bytes()
    assert not state.exists()
    shutil.rmtree(folder)
    assert invoke("sample", copy / "run.toml")[0] == 0
    assert (folder / "trajectories.npz").read_bytes() == killed
