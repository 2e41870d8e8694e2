from pathlib import Path

import numpy as np
import pytest
import torch

from bopito_inverse import models
from bopito_inverse.config import Config, SystemSection
from bopito_inverse.datasets import Frames, Trajectories
from bopito_inverse.stages import Job, needed, reweight, simulate, train
from bopito_inverse.stages.comparison import bins, total_variation
from bopito_inverse.stages.folder import sha256
from bopito_inverse.stages.inputs import read_experiment
from bopito_inverse.stages.seeds import PURPOSES, seed_for
from bopito_inverse.systems import OrnsteinUhlenbeck, TransferOperator


def read(tmp_path: Path, text: str) -> Config:
    (tmp_path / "run.toml").write_text('[system]\nname = "Prinz"\n' + text)
    return Config.read(tmp_path / "run.toml")


def test_total_variation_of_exact_draws_is_that_of_counting() -> None:
    exact = TransferOperator(OrnsteinUhlenbeck())
    edges = bins(exact)
    x = exact.sample(20_000, torch.Generator().manual_seed(0))
    width = np.diff(edges[1:-1])
    assert (len(edges), bool(np.allclose(width, width[0]))) == (101, True)
    centre = (edges[1:-2] + edges[2:-1]) / 2
    p = np.exp(-(centre**2) / 2) / np.sqrt(2 * np.pi) * width
    expected = np.sqrt(2 * p * (1 - p) / np.pi / len(x)).sum() / 2  # E|h - p| of a binomial
    assert abs(total_variation(exact, edges, x) / expected - 1) < 0.3  # sd of the ratio is 0.08


def test_total_variation_of_a_shifted_density() -> None:
    exact = TransferOperator(OrnsteinUhlenbeck())
    x = 1 + exact.sample(200_000, torch.Generator().manual_seed(1))
    shifted = 0.3829  # 2 Phi(1/2) - 1, of N(1, 1) from N(0, 1)
    assert abs(total_variation(exact, bins(exact), x) - shifted) < 0.01
    assert total_variation(exact, bins(exact), torch.full((10, 1), 50.0)) > 0.999


def test_no_two_purposes_share_random_numbers(tmp_path: Path) -> None:
    seeds = set()
    for seed in range(3):
        config = read(tmp_path, "").model_copy(update={"seed": seed})
        seeds |= {seed_for(config, purpose) for purpose in PURPOSES} | {seed}
    assert len(seeds) == 3 * (1 + len(PURPOSES))


@pytest.mark.parametrize(
    ("data", "verbs"),
    [
        ("", ["simulate", "reweight", "train", "sample"]),
        ('trajectories = "a"\numbrella = "b"', ["reweight", "train", "sample"]),
        ('trajectories = "a"\nframes = "b"', ["train", "sample"]),
        ('umbrella = "b"', ["simulate", "reweight", "train", "sample"]),
        ('checkpoint = "a"', ["simulate", "reweight", "sample"]),
        ('checkpoint = "a"\nframes = "b"', ["sample"]),
    ],
)
def test_a_run_leaves_out_what_data_provides(tmp_path: Path, data: str, verbs: list[str]) -> None:
    assert needed(read(tmp_path, f"[data]\n{data}\n")) == verbs
    measured = f'[data]\n{data}\n[experiment]\nfile = "x.csv"\n'
    assert needed(read(tmp_path, measured)) == [*verbs[:-1], "fit", "sample"]


@pytest.mark.parametrize("forces", [True, False])
def test_s_eq_learns_from_forces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forces: bool
) -> None:
    x = torch.linspace(-1, 1, 20)[:, None]
    Frames(x).write(tmp_path / "frames.npz")
    Trajectories([x, x], 0.05).write(tmp_path / "trajectories.npz")
    config = read(
        tmp_path,
        f"""[train]
lag_max = 5
lambda_hat = 0.9
forces = {str(forces).lower()}
[data]
trajectories = "trajectories.npz"
frames = "frames.npz"
""",
    ).model_copy(update={"output": tmp_path, "system": SystemSection(name="OrnsteinUhlenbeck")})

    class Asked(Exception):
        pass

    def ask(frames: Frames, **options: object) -> None:
        raise Asked(options["forces"])

    monkeypatch.setattr(models, "train_equilibrium", ask)
    with pytest.raises(Asked) as asked:
        train(config)
    if forces:  # -dU/dx of x^2 / 2
        torch.testing.assert_close(asked.value.args[0], -x, atol=1e-4, rtol=0)
    else:
        assert asked.value.args[0] is None


def test_tempering_gives_the_equilibrium(tmp_path: Path) -> None:
    text = """[simulate]
n_trajectories = 2
n_frames = 2
starts = [-1, 1]
[simulate.tempering]
low = 1.0
high = 2.25
n_windows = 3
n_frames = 2000
"""
    config = read(tmp_path, text).model_copy(
        update={"output": tmp_path, "system": SystemSection(name="OrnsteinUhlenbeck")}
    )
    for verb in (simulate, reweight):
        verb(config)
    assert np.allclose(config.section("simulate.tempering").ladder, [1, 1.5, 2.25])
    assert (tmp_path / "simulate" / "tempering.npz").exists()
    frames = Frames.read(tmp_path / "reweight" / "frames.npz")
    assert abs(float(frames.std()) - 1) < 0.1  # the pool alone has 1.2


def test_two_sources_of_the_equilibrium_are_refused(tmp_path: Path) -> None:
    window = "low = 1\nhigh = 2\nn_windows = 2\nn_frames = 20\n"
    text = "[simulate]\nn_trajectories = 2\nn_frames = 2\nstarts = [-1, 1]\n[simulate.tempering]\n"
    text += f"{window}[simulate.umbrella]\n{window}stiffness = 5\n"
    with pytest.raises(ValueError, match=r"simulate: take either \[umbrella\] or \[tempering\]"):
        read(tmp_path, text)


def test_several_observables_are_fitted_together(tmp_path: Path) -> None:
    (tmp_path / "measured.csv").write_text(
        "observable,lag,value,sigma\nx,10,0.5,0.1\nx>0,10,0.4,0.1\nx^2,10,0.3,0.1\n"
    )
    text = '[observable]\na = ["x", "x>0"]\n[experiment]\nfile = "measured.csv"\n'
    config = read(tmp_path, f"{text}[step]\nstep_lag = 10\n")
    measured, fitted = read_experiment(config)
    assert measured.observables == ("x", "x>0")
    assert fitted.tolist() == [True, True]
    observables = config.observable.build()
    assert list(observables) == ["x", "x>0"]
    x = torch.tensor([[-1.0], [2.0]])
    assert observables["x>0"].b(x).tolist() == [[0.0], [1.0]]
    with pytest.raises(ValueError, match=r"observable must be one of .*, got 'x\*x'"):
        read_experiment(
            read(tmp_path, text.replace('["x", "x>0"]', '"x"\nb = "x"') + "[step]\nstep_lag = 10\n")
        )


def test_a_folder_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    before = sha256(tmp_path)
    (tmp_path / "b").write_text("two")
    two = sha256(tmp_path)
    (tmp_path / "b").rename(tmp_path / "c")
    assert len({before, two, sha256(tmp_path)}) == 3
    (tmp_path / "c").unlink()
    assert sha256(tmp_path) == before


def test_a_job_that_failed_is_made_again(tmp_path: Path) -> None:
    job = Job("train", tmp_path / "train", {"seed": 1, "train": {"lag_max": 5}})

    def fail(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("killed")

    def succeed(folder: Path) -> None:
        (folder / "whole.txt").write_text("whole")

    said: list[str] = []
    assert job.state() == "new"
    with pytest.raises(RuntimeError, match="killed"):
        job.run(fail, said.append)
    assert job.state() == "unfinished"
    job.run(succeed, said.append)
    assert job.state() == "done"
    job.run(fail, said.append)
    assert [line.split()[1] for line in said] == ["writing", "resuming", "already"]
    other = Job("train", tmp_path / "train", {"seed": 2, "train": {"lag_max": 5}})
    with pytest.raises(ValueError, match=r"another configuration: seed was 1, now 2\. Choose"):
        other.run(fail)
    assert (tmp_path / "train" / "whole.txt").read_text() == "whole"
