import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bopito_inverse import Interpolator
from bopito_inverse.datasets import Trajectories
from bopito_inverse.models import BoPITOScore, DynamicScore, EquilibriumScore
from bopito_inverse.sampling import DPMSolver, Interpolate, Propagate, Renoise, Rollout, sample
from bopito_inverse.systems import Prinz, TransferOperator

sample_module = sys.modules["bopito_inverse.sampling.sample"]
STEP = Rollout([Interpolate(), Propagate(15)], step_lag=30, solver=DPMSolver(3))


def small_model(dim: int = 1, lambda_hat: float = 0.97) -> Interpolator:
    """An untrained model, its output layers not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = {"width": 8, "depth": 1, "n_frequencies": 2}
        s_eq, s_dyn = EquilibriumScore((dim,), network), DynamicScore((dim,), network)
        for score in (s_eq, s_dyn):
            torch.nn.init.normal_(score.network.out.weight, std=0.3)
    return Interpolator(BoPITOScore(s_eq, s_dyn, lambda_hat, 20))


def run(**changes: object) -> Trajectories | None:
    """Seven trajectories of twelve steps, in blocks of at most 3 trajectories and 2 steps."""
    starts = np.linspace(-1, 1, 7)[:, None]
    settings = {"starts": starts, "n_steps": 12, "n_int": 40.0, "seed": 3, "batch_size": 3}
    settings |= {"device": "cpu", "frame_time": 0.1, "system": "toy"} | changes
    model = settings.pop("model", None) or small_model()
    step = settings.pop("step", STEP)
    return sample(model, step, **settings)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "BLOCK_FRAMES", 6)


def frames_of(trajectories: Trajectories | None) -> Tensor:
    assert trajectories is not None
    return torch.stack(list(trajectories))


def test_sampled_trajectories_are_those_of_the_rollout() -> None:
    """With exact scores: right correlation of each step, starts first, lags in data units."""
    exact = TransferOperator(Prinz(), grid_size=200)
    s_eq = exact.equilibrium_score()
    model = Interpolator(BoPITOScore(s_eq, exact.dynamic_score(s_eq, 0.99), 0.99, 50))
    starts = exact.sample(4000, torch.Generator().manual_seed(1))
    made = sample(
        model,
        Rollout([Propagate(50)], 50, DPMSolver(12)),
        starts=starts,
        n_steps=2,
        frame_time=Prinz().frame_time,
        device="cpu",
    )
    x = frames_of(made)[:, :, 0].double()
    assert made is not None
    assert made.frame_time == pytest.approx(50 * Prinz().frame_time)
    assert torch.equal(x[:, 0], starts[:, 0].double())
    for k, lag in ((1, 50.0), (2, 100.0)):
        product = x[:, 0] * x[:, k]
        error = float(product.std()) / math.sqrt(len(x))
        assert abs(float(product.mean()) - exact.correlation(exact.grid, lags=lag)) < 4 * error


def test_streamed_and_in_memory_are_identical(tmp_path: Path) -> None:
    in_memory = run()
    out = tmp_path / "new" / "frames.npz"
    assert run(out=out) is None
    streamed = Trajectories.read(out)
    assert torch.equal(frames_of(streamed), frames_of(in_memory))
    assert frames_of(streamed).shape == (7, 13, 1)
    assert streamed.frame_time == pytest.approx(3.0)
    assert streamed.system == "toy"
    assert [path.name for path in out.parent.iterdir()] == ["frames.npz"]


def test_what_the_frames_depend_on() -> None:
    frames = frames_of(run())
    assert torch.equal(frames, frames_of(run()))
    assert not torch.equal(frames, frames_of(run(seed=4)))
    assert not torch.equal(frames, frames_of(run(n_int=60.0)))
    noise = frames[:, 1:] - frames[:, :-1]
    assert noise.unique().numel() == noise.numel()  # no block repeats the noise of another
    each = frames_of(run(n_int=torch.tensor([40.0, 40, 40, 60, 60, 60, math.inf])))
    assert torch.equal(each[:3], frames[:3])
    assert torch.equal(each[3:6], frames_of(run(n_int=60.0))[3:6])
    assert torch.equal(each[6:], frames_of(run(n_int=math.inf))[6:])


def test_n_int_is_needed_only_where_it_is_used() -> None:
    for move in (Interpolate(), Renoise(), Propagate(share=0.5)):
        with pytest.raises(ValueError, match=f"^n_int must be given for {re.escape(repr(move))},"):
            run(n_int=None, step=Rollout([Propagate(5), move], 30))
    fixed = Rollout([Interpolate(40.0), Propagate(15)], 30, DPMSolver(3))
    assert torch.equal(frames_of(run(step=fixed, n_int=None)), frames_of(run()))


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import test_sample as t
t.sample_module.BLOCK_FRAMES = 6
commit = t.sample_module._Stream.commit
def slow(self, done):
    commit(self, done)
    print(done, flush=True)
    time.sleep(0.02)
t.sample_module._Stream.commit = slow
t.run(out={out!r})
"""


@pytest.mark.parametrize("blocks", [1, 7, 13])
def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "frames.npz"
    script = KILLED.format(tests=str(Path(__file__).parent), out=str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if int(line) == blocks:
                process.send_signal(signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    done = json.loads((tmp_path / "frames.npz.partial.json").read_text())["done"]
    assert blocks <= done < 18
    made: list[int] = []
    commit = sample_module._Stream.commit
    monkeypatch.setattr(
        sample_module._Stream,
        "commit",
        lambda self, done: (made.append(done), commit(self, done)),
    )
    run(out=out)
    assert made == list(range(done + 1, 19))  # 3 batches of 6 pairs of steps, each once
    assert torch.equal(frames_of(Trajectories.read(out)), frames_of(run()))
    assert [path.name for path in tmp_path.iterdir()] == ["frames.npz"]


def interrupt(out: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> dict[str, bytes]:
    """Run until the fifth block is half made; the files that are left."""
    commit = sample_module._Stream.commit

    def stop(self: object, done: int) -> None:
        if done == 5:
            raise KeyboardInterrupt
        commit(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(sample_module._Stream, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            run(out=out, **changes)
    return {path.name: path.read_bytes() for path in out.parent.iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"n_int": 41.0},
        {"n_steps": 13},
        {"batch_size": 4},
        {"starts": np.linspace(-1, 1.001, 7)[:, None]},
        {"step": Rollout([Interpolate(), Propagate(14)], step_lag=30, solver=DPMSolver(3))},
        {"step": Rollout([Interpolate(), Propagate(15)], step_lag=30, solver=DPMSolver(4))},
        {"model": small_model(lambda_hat=0.98)},
    ],
    ids=lambda change: " ".join(change),
)
def test_an_unfinished_file_of_other_settings_is_refused_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict
) -> None:
    out = tmp_path / "frames.npz"
    before = interrupt(out, monkeypatch)
    with pytest.raises(ValueError, match=r"frames\.npz\.partial\.npy is the unfinished file of"):
        run(out=out, **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(out=out)
    assert torch.equal(frames_of(Trajectories.read(out)), frames_of(run()))


def test_other_weights_are_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path / "frames.npz", monkeypatch)
    model = small_model()
    with torch.no_grad():
        model.bopito.s_dyn.network.out.bias += 1e-3  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="unfinished file"):
        run(out=tmp_path / "frames.npz", model=model)


def test_exact_scores_of_another_system_are_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exact(barrier: float | None) -> Interpolator:
        s_eq = TransferOperator(Prinz(), grid_size=50).equilibrium_score()
        biased = TransferOperator(Prinz(), barrier=barrier, grid_size=50)
        return Interpolator(BoPITOScore(s_eq, biased.dynamic_score(s_eq, 0.99), 0.99, 50))

    interrupt(tmp_path / "frames.npz", monkeypatch, model=exact(0.0))
    with pytest.raises(ValueError, match="unfinished file"):
        run(out=tmp_path / "frames.npz", model=exact(0.3))


def test_a_finished_file_is_replaced_only_by_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "frames.npz"
    run(out=out)
    finished = out.read_bytes()
    assert interrupt(out, monkeypatch, seed=4)["frames.npz"] == finished
    run(out=out, seed=4)
    assert torch.equal(frames_of(Trajectories.read(out)), frames_of(run(seed=4)))


def test_a_damaged_state_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "frames.npz"
    interrupt(out, monkeypatch)
    (tmp_path / "frames.npz.partial.json").write_text('{"done": 3, "sett')
    with pytest.raises(ValueError, match=r"^out: .*partial\.json is unreadable"):
        run(out=out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": [[0.1], [math.nan]]}, "starts must be finite, .* the first at frame 1"),
        ({"starts": [[math.inf]]}, "starts must be finite"),
        ({"starts": np.zeros((3, 2))}, r"starts must hold frames of shape \(1,\), got \(2,\)"),
        ({"starts": [0.1, 0.2]}, "starts must have shape"),
        ({"starts": np.zeros((0, 1))}, "starts must hold at least one frame"),
        ({"n_int": 0.0}, "n_int must be above zero"),
        ({"n_int": -3.0}, "n_int must be above zero .* got -3"),
        ({"n_int": math.nan}, "n_int must be above zero .* got nan"),
        ({"n_int": torch.tensor([1.0, 2, 3, math.nan, 5, 6, 7])}, "n_int must be above zero"),
        ({"n_int": torch.ones(3)}, r"n_int must be one number or 7, got shape \(3,\)"),
        ({"n_steps": 0}, "n_steps must be a whole number of at least 1, got 0"),
        ({"n_steps": 2.5}, "n_steps must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"frame_time": 0.0}, "frame_time must be a positive number"),
        ({"device": "tpu"}, "device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict, message: str
) -> None:
    for out in (None, tmp_path / "new" / "frames.npz"):
        with pytest.raises(ValueError, match=f"^{message}"):
            run(out=out, **change)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_as_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^out must be a file, got the folder"):
        run(out=tmp_path)


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', but torch sees no CUDA device"):
        run(device="cuda")


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert torch.equal(frames_of(run(progress=True)), frames_of(run()))
    assert "Sampling" in capsys.readouterr().out


@pytest.mark.gpu
def test_sampling_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise on both devices gives the same trajectories."""
    random = torch.randn

    def on_cpu(*shape: int, generator: torch.Generator, device: torch.device, **kind: object):
        seed = torch.Generator().manual_seed(generator.initial_seed())
        count = draws.setdefault(generator.initial_seed(), 0)
        draws[generator.initial_seed()] += 1
        made = [random(*shape, generator=seed, **kind) for _ in range(count + 1)]
        return made[-1].to(device)

    draws: dict[int, int] = {}
    monkeypatch.setattr(torch, "randn", on_cpu)
    cpu = frames_of(run(device="cpu"))
    draws.clear()
    cuda = frames_of(run(device="cuda"))
    torch.testing.assert_close(cuda, cpu, atol=1e-3, rtol=1e-3)
    draws.clear()
    assert torch.equal(cuda, frames_of(run(device="auto")))
