import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bopito_inverse.datasets import Frames, Trajectories
from bopito_inverse.models import (
    NetworkConfig,
    TrainingConfig,
    loop,
    train_bopito,
    train_equilibrium,
    train_ito,
)
from bopito_inverse.models import train as train_module
from bopito_inverse.models.scores import DynamicScore
from bopito_inverse.noise import VPSchedule

SMALL = NetworkConfig(width=32, depth=2, n_frequencies=4)
TINY = TrainingConfig(
    steps=130,
    batch_size=64,
    warmup=10,
    checkpoint_every=40,
    network=NetworkConfig(width=8, depth=1, n_frequencies=2),
)
DECAY = 0.9  # of the Ornstein-Uhlenbeck process, per frame


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def ornstein_uhlenbeck(n: int, length: int, dim: int = 1) -> Trajectories:
    """Exact recursion x' = DECAY x + sqrt(1 - DECAY^2) noise, started in equilibrium N(0, 1)."""
    noise = torch.randn(length, n, dim, generator=generator(1))
    frames = [noise[0]]
    for kick in noise[1:]:
        frames.append(DECAY * frames[-1] + math.sqrt(1 - DECAY**2) * kick)
    return Trajectories(torch.stack(frames, dim=1), frame_time=1.0)


def gaussian_eps(score: Any, y: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """Closed form for x ~ N(mean, std^2): sigma (x_t - alpha m) / (alpha^2 s^2 + sigma^2)."""
    alpha, sigma = score.noise.alpha(t), score.noise.sigma(t)
    m = (mean - score.scaling.mean) / score.scaling.scale
    s = std / score.scaling.scale
    return sigma * (y - alpha * m) / (alpha**2 * s**2 + sigma**2)


def rms_velocity_error(score: Any, mean: float, std: float) -> float:
    """Error of eps / alpha, what the loss measures, over the noised density and all t."""
    y = torch.randn(4000, 1, generator=generator(5))
    t = torch.linspace(0.05, 0.95, 4000)[:, None]
    alpha, sigma = score.noise.alpha(t), score.noise.sigma(t)
    x = (mean + std * torch.randn(4000, 1, generator=generator(6)) - score.scaling.mean) / (
        score.scaling.scale
    )
    x_t = alpha * x + sigma * y
    error = (score(x_t, t[:, 0]) - gaussian_eps(score, x_t, t, mean, std)) / alpha
    return float(error.square().mean().sqrt())


def moments(score: Any, condition: tuple[Tensor, ...], n: int) -> tuple[Tensor, Tensor]:
    """Mean m and variance s^2 of the modelled density given each of `n` starts, in data units.

    eps of a noised Gaussian is sigma (y - alpha m) / (alpha^2 s^2 + sigma^2): a line, fitted in y.
    """
    t = torch.tensor(0.45)
    alpha, sigma = score.noise.alpha(t), score.noise.sigma(t)
    u = torch.linspace(-1, 1, 41)
    means, variances = [], []
    for i in range(n):
        given = tuple(c[i].expand(41, 1) if c.ndim > 1 else c for c in condition)
        y = (u[:, None] + given[0]) * alpha
        eps = score(y, t, *given)[:, 0]
        slope, offset = np.polyfit(y[:, 0].numpy(), eps.numpy(), 1)
        means.append(-offset / slope / float(alpha))
        variances.append((float(sigma) / slope - float(sigma) ** 2) / float(alpha) ** 2)
    scale = float(score.scaling.scale)
    mean = torch.tensor(means).float() * scale + float(score.scaling.mean)
    return mean, torch.tensor(variances).float() * scale**2


def test_equilibrium_score_of_a_gaussian() -> None:
    x = 3 + 0.5 * torch.randn(20_000, 1, generator=generator())
    config = TrainingConfig(steps=400, batch_size=512, warmup=20, ema_decay=0.99, network=SMALL)
    score = train_equilibrium(x, config=config, device="cpu")
    assert float(score.scaling.mean[0]) == pytest.approx(3, abs=0.02)
    assert float(score.scaling.scale) == pytest.approx(0.5, rel=0.02)
    assert rms_velocity_error(score, 3.0, 0.5) < 0.08
    assert rms_velocity_error(score, 3.1, 0.5) > 0.08  # the tolerance tells a shift of 0.2 sd


def test_weights_decide_the_density() -> None:
    low, high = torch.randn(2, 10_000, 1, generator=generator())
    x = torch.cat([low - 2, high + 2])
    weights = torch.cat([torch.full((10_000,), 1e-6), torch.ones(10_000)])
    config = TrainingConfig(steps=300, batch_size=512, warmup=20, ema_decay=0.99, network=SMALL)
    weighted = train_equilibrium(x, weights, config, device="cpu")
    unweighted = train_equilibrium(x, None, config, device="cpu")
    assert rms_velocity_error(weighted, 2.0, 1.0) < 0.1
    assert rms_velocity_error(unweighted, 2.0, 1.0) > 0.3


@pytest.fixture(scope="module")
def equilibrium() -> Any:
    x = ornstein_uhlenbeck(200, 100).frames
    config = TrainingConfig(steps=400, batch_size=512, warmup=20, ema_decay=0.99, network=SMALL)
    return train_equilibrium(x, config=config, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BoPITO", "ITO"])
def test_transition_density_of_ornstein_uhlenbeck(kind: str, equilibrium: Any) -> None:
    """Conditional mean x_0 DECAY^N and variance 1 - DECAY^2N, read from the score.

    The tolerance is what a short training gives; from lag to lag the outer means differ by 0.5.
    """
    trajectories = ornstein_uhlenbeck(2000, 60)
    config = TrainingConfig(steps=1000, batch_size=1024, warmup=20, ema_decay=0.99, network=SMALL)
    score: Any
    if kind == "ITO":
        score = train_ito(trajectories, 30, config, device="cpu")
    else:
        before = {k: v.clone() for k, v in equilibrium.state_dict().items()}
        score = train_bopito(trajectories, equilibrium, 30, 0.9, config, device="cpu")
        assert all(torch.equal(v, before[k]) for k, v in score.s_eq.state_dict().items())
        assert all(torch.equal(v, before[k]) for k, v in equilibrium.state_dict().items())
    x_0 = torch.tensor([[-1.5], [-0.5], [0.5], [1.5]])
    standard = score.scaling.standardise(x_0)
    for lag in (3, 10, 30):
        mean, variance = moments(score, (standard, torch.tensor(lag)), 4)
        torch.testing.assert_close(mean, DECAY**lag * x_0[:, 0], atol=0.15, rtol=0)
        expected = torch.full((4,), 1 - DECAY ** (2 * lag))
        torch.testing.assert_close(variance, expected, atol=0.15, rtol=0)


def test_bopito_leaves_the_equilibrium_score_alone(equilibrium: Any) -> None:
    before = {k: v.clone() for k, v in equilibrium.state_dict().items()}
    equilibrium.requires_grad_(True)
    score = train_bopito(ornstein_uhlenbeck(20, 20), equilibrium, 10, 0.9, TINY, device="cpu")
    assert score.s_eq is not equilibrium
    assert all(p.requires_grad for p in equilibrium.parameters())
    for other in (score.s_eq, equilibrium):
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    assert not any(p.requires_grad for p in score.parameters())
    assert any(bool(p.abs().max() > 0) for p in score.s_dyn.network.out.parameters())


def test_a_dynamic_score_is_trained_on(tmp_path: Path, equilibrium: Any) -> None:
    trajectories = ornstein_uhlenbeck(20, 20)
    first = train_bopito(trajectories, equilibrium, 10, 0.9, TINY, device="cpu")
    before = {k: v.clone() for k, v in first.s_dyn.state_dict().items()}

    def go_on(s_dyn: Any, folder: Path | None = None, **other: Any) -> Any:
        config = TINY.model_copy(update={"steps": 1, "learning_rate": 1e-6, **other})
        return train_bopito(
            trajectories, equilibrium, 10, 0.9, config, 0, folder, "cpu", s_dyn=s_dyn
        )

    second = go_on(first.s_dyn, tmp_path)
    for k, v in second.s_dyn.state_dict().items():
        torch.testing.assert_close(v, before[k], atol=1e-5, rtol=0)
    assert not same(first.s_dyn, second.s_dyn)
    assert all(torch.equal(v, before[k]) for k, v in first.s_dyn.state_dict().items())
    assert not any(p.requires_grad for p in [*first.parameters(), *second.parameters()])
    with pytest.raises(ValueError, match="s_dyn "):
        go_on(None, tmp_path)
    other = DynamicScore((1,), noise=VPSchedule(3.0), scaling=equilibrium.scaling)
    with pytest.raises(ValueError, match="s_eq and s_dyn must have the same noise"):
        go_on(other)


def test_focus_moves_a_share_of_the_noise_levels() -> None:
    noise = VPSchedule(5.0)
    t = train_module._focused((torch.arange(10_000) + 0.5) / 10_000, noise, 0.6)
    ratio = noise.log_ratio(t)
    inside = (ratio > -1.25) & (ratio < 0.5)
    assert float(inside.float().mean()) == pytest.approx(0.6 + 0.4 * 1.75 / 9, abs=1e-3)
    assert float((ratio >= 0.5).float().mean()) == pytest.approx(0.4 * 4.5 / 9, abs=1e-3)
    assert 0 < t.min() < 1e-3 < 0.999 < t.max() < 1


def test_focus_does_not_change_the_minimum() -> None:
    config = TrainingConfig(
        steps=400, batch_size=512, warmup=20, ema_decay=0.99, noise_focus=0.7, network=SMALL
    )
    x = 0.5 + 0.2 * torch.randn(5000, 1, generator=generator())
    score = train_equilibrium(x, config=config, device="cpu")
    assert rms_velocity_error(score, float(x.mean()), float(x.std())) < 0.1


def test_moving_average_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(500, 1, generator=generator())
    made: list[Any] = []
    original = loop._Training

    def watch(*args: Any) -> Any:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(loop, "_Training", watch)
    score = train_equilibrium(x, config=TINY, device="cpu")
    assert same(score, made[0].average.module)
    assert not same(score, made[0].score)
    no_memory = TINY.model_copy(update={"ema_decay": 0.0, "steps": 8})
    last = train_equilibrium(x, config=no_memory, device="cpu")
    assert same(last, made[1].score)  # in the first steps the average has no memory yet


def test_moving_average_is_a_weighted_mean_of_the_past() -> None:
    update = loop._exponential(0.99)
    values, average = [1.0, 5.0, -3.0], torch.zeros(1)
    for step, value in enumerate(values, start=2000):
        update([average], [torch.tensor([value])], torch.tensor(step))
    expected = 0.01 * (1.0 * 0.99**2 + 5.0 * 0.99 - 3.0)
    assert float(average) == pytest.approx(expected, rel=1e-5)


def test_seed_decides_and_global_state_is_untouched() -> None:
    x = torch.randn(500, 1, generator=generator())
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    first = train_equilibrium(x, config=TINY, seed=4, device="cpu")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
    torch.manual_seed(99)
    assert same(train_equilibrium(x, config=TINY, seed=4, device="cpu"), first)
    assert not same(train_equilibrium(x, config=TINY, seed=5, device="cpu"), first)


def test_two_dimensional_events() -> None:
    score = train_ito(ornstein_uhlenbeck(20, 20, dim=2), 5, TINY, device="cpu")
    assert score.event_shape == (2,)
    assert score.scaling.mean.shape == (2,)


# --- a run that is interrupted


class Interrupted(Exception):
    pass


def train(folder: Path | None, seed: int = 0, config: TrainingConfig = TINY) -> Any:
    return train_ito(ornstein_uhlenbeck(20, 20), 5, config, seed, folder, device="cpu")


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop._Training.training_step

    def training_step(self: Any, *args: Any) -> Tensor:
        if self.global_step == step:
            raise Interrupted
        return original(self, *args)

    monkeypatch.setattr(loop._Training, "training_step", training_step)


@pytest.mark.parametrize("step", [20, 55, 115])
def test_interrupted_run_ends_like_an_uninterrupted_one(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole")
    assert same(whole, train(None))
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupted):
            train(tmp_path / "cut")
    logged = rows(tmp_path / "cut")
    assert (tmp_path / "cut" / "last.ckpt").exists() == (step > TINY.checkpoint_every)
    with (tmp_path / "cut" / "metrics.csv").open("a") as file:
        file.write("1")  # half a row, as a kill may leave it
    assert same(train(tmp_path / "cut"), whole)
    assert rows(tmp_path / "cut")[: len(logged)] == logged
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [row.split(",")[0] for row in rows(tmp_path / "cut")] == ["step", "0", "50", "100"]


def test_resume_does_not_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(100, patch)
        with pytest.raises(Interrupted):
            train(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(79, patch)  # never reached: the state of step 80 is there
        train(tmp_path)


def test_finished_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, logged = train(tmp_path), rows(tmp_path)
    monkeypatch.setattr(loop._Training, "optimizer_step", None)
    assert same(train(tmp_path), whole)
    assert rows(tmp_path) == logged


KILLED = """
import torch
from test_train import TINY, train
from pathlib import Path
torch.set_num_threads(1)
train(Path({folder!r}), config=TINY.model_copy(update={{"steps": 600}}))
"""


@pytest.mark.slow
def test_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    config, folder = TINY.model_copy(update={"steps": 600}), tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(folder=str(folder))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    deadline = time.monotonic() + 120
    while not (folder / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    logged = rows(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert same(train(folder, config=config), train(None, config=config))
    finally:
        torch.set_num_threads(threads)
    assert rows(folder)[: len(logged) - 1] == logged[:-1]
    assert len(rows(folder)) == 1 + 600 // loop.LOG_EVERY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: train(f, seed=1), r"seed 0 \(now 1\)"),
        (
            lambda f: train(f, config=TINY.model_copy(update={"steps": 300})),
            r"training.steps 130 \(now 300\)",
        ),
        (
            lambda f: train(f, config=TINY.model_copy(update={"network": SMALL})),
            r"training.network.width 8 \(now 32\)",
        ),
        (
            lambda f: train_ito(ornstein_uhlenbeck(20, 20), 6, TINY, 0, f, "cpu"),
            r"lag_max 5 \(now 6\)",
        ),
        (lambda f: train_ito(ornstein_uhlenbeck(21, 20), 5, TINY, 0, f, "cpu"), "data "),
        (
            lambda f: train_equilibrium(torch.randn(9, 1), None, TINY, 0, f, "cpu"),
            r"score ITOScore \(now EquilibriumScore\)",
        ),
    ],
)
def test_folder_of_another_run_is_refused(
    change: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    train(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"folder {tmp_path} holds a .*{message}"):
        change(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_other_equilibrium_score_or_decay_is_refused(tmp_path: Path, equilibrium: Any) -> None:
    trajectories = ornstein_uhlenbeck(20, 20)
    train_bopito(trajectories, equilibrium, 5, 0.9, TINY, 0, tmp_path, "cpu")
    with pytest.raises(ValueError, match=r"lambda_hat 0.9 \(now 0.8\)"):
        train_bopito(trajectories, equilibrium, 5, 0.8, TINY, 0, tmp_path, "cpu")
    other = train_equilibrium(trajectories.frames, config=TINY, device="cpu")
    with pytest.raises(ValueError, match="s_eq "):
        train_bopito(trajectories, other, 5, 0.9, TINY, 0, tmp_path, "cpu")


def test_unreadable_state_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    state = tmp_path / "last.ckpt"
    state.write_bytes(state.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"last.ckpt is no readable state"):
        train(tmp_path)
    state.write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "run") + b"'\ntR.")
    with pytest.raises(ValueError, match=r"last.ckpt is no readable state"):
        train(tmp_path)
    assert not (tmp_path / "run").exists()
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"without its settings.json"):
        train(tmp_path)


def test_loss_log_falls(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"steps": 600, "network": SMALL, "batch_size": 512})
    two_wells = 0.05 * torch.randn(2000, 1, generator=generator()) + torch.tensor(
        [[-1.0], [1.0]] * 1000
    )
    train_equilibrium(two_wells, None, config, 0, tmp_path, "cpu")
    table = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True)
    assert table["step"].tolist() == list(range(0, 600, 50))
    assert table["loss"][-4:].mean() < 0.7 * table["loss"][0]


def test_terminal(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    train(tmp_path)
    assert capfd.readouterr() == ("", "")
    train_ito(ornstein_uhlenbeck(20, 20), 5, TINY, device="cpu", progress=True)
    out, err = capfd.readouterr()
    assert "Training ITO" in out
    assert "130/130" in out
    assert "Epoch" not in out
    assert err == ""


# --- bad input


def test_bad_frames() -> None:
    x = torch.randn(10, 1)
    x[3] = math.nan
    with pytest.raises(ValueError, match=r"frames must be finite.*first at frame 3"):
        train_equilibrium(x, config=TINY)
    with pytest.raises(ValueError, match=r"frames must have shape \(n_frames, \*event\), got"):
        train_equilibrium(x[:, 0], config=TINY)
    with pytest.raises(ValueError, match="frames must differ from each other"):
        train_equilibrium(torch.ones(10, 1), config=TINY)
    with pytest.raises(ValueError, match=r"weights must have shape \(10,\), got \(9,\)"):
        train_equilibrium(torch.randn(10, 1), torch.ones(9), TINY)
    with pytest.raises(ValueError, match="weights must be None where frames are already weighted"):
        train_equilibrium(Frames(torch.randn(10, 1)), torch.ones(10), TINY)


def test_bad_pairs(equilibrium: Any) -> None:
    trajectories = ornstein_uhlenbeck(3, 20)
    with pytest.raises(ValueError, match=r"lag_max must be below the longest .*20 frames.*got 20"):
        train_bopito(trajectories, equilibrium, 20, 0.9, TINY)
    with pytest.raises(ValueError, match=r"lag_max must be below the longest .*20 frames.*got 20"):
        train_ito(trajectories, 20, TINY)
    with pytest.raises(ValueError, match=r"lag_max must be a whole number .*got 0"):
        train_ito(trajectories, 0, TINY)
    with pytest.raises(ValueError, match=r"lambda_hat must lie in \(0, 1\), got 1.0"):
        train_bopito(trajectories, equilibrium, 5, 1.0, TINY)
    with pytest.raises(ValueError, match=r"trajectories must hold frames of shape \(1,\), .*\(2,"):
        train_bopito(ornstein_uhlenbeck(3, 20, dim=2), equilibrium, 5, 0.9, TINY)


def test_unknown_option_and_device() -> None:
    with pytest.raises(ValueError, match="learningrate"):
        TrainingConfig(learningrate=1e-3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda', got 'tpu'"):
        train_equilibrium(torch.randn(10, 1), config=TINY, device="tpu")


def test_forces_make_few_frames_enough() -> None:
    """30 frames of N(0, 1): the score of denoising follows the frames, with forces it is right."""
    x = torch.randn(30, 1, generator=generator(5))
    config = TrainingConfig(steps=400, batch_size=512, network=SMALL)
    t = torch.linspace(0.02, 0.5, 20)
    y = torch.linspace(-1.5, 1.5, 20)[:, None]
    errors = []
    for forces in (None, -x):
        score = train_equilibrium(x, config=config, forces=forces)
        truth = torch.stack([gaussian_eps(score, y, at, 0.0, 1.0) for at in t])
        with torch.no_grad():
            made = torch.stack([score(y, at) for at in t])
        errors.append(float((made - truth).square().mean().sqrt()))
    assert errors[1] < 0.02 < errors[0] / 2


def test_forces_do_not_change_the_minimum() -> None:
    """Both targets have the same mean given x_t: with many frames they give the same score."""
    x = 0.5 * torch.randn(50_000, 2, generator=generator(5))
    config = TrainingConfig(steps=300, batch_size=1024, network=SMALL)
    y, t = torch.randn(200, 2, generator=generator(6)), torch.linspace(0.1, 0.9, 200)
    made = [train_equilibrium(x, config=config, forces=f)(y, t) for f in (None, -x / 0.25)]
    torch.testing.assert_close(*made, atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("forces", "message"),
    [
        (torch.zeros(9, 1), r"forces must be as many as frames \(10\), got 9"),
        (torch.zeros(10, 2), r"forces must hold frames of shape \(1,\)"),
        (torch.full((10, 1), torch.nan), "forces must be finite"),
    ],
)
def test_forces_that_do_not_fit(forces: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_equilibrium(torch.randn(10, 1, generator=generator()), config=TINY, forces=forces)


def test_a_folder_knows_the_forces(tmp_path: Path) -> None:
    x = torch.randn(10, 1, generator=generator())
    train_equilibrium(x, config=TINY, forces=-x, folder=tmp_path)
    with pytest.raises(ValueError, match="other settings: data"):
        train_equilibrium(x, config=TINY, forces=-2 * x, folder=tmp_path)
