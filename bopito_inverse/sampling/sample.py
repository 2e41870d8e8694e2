r"""Sampling of trajectories, in memory or streamed to a file that survives a kill.

The frames of all trajectories fill one array (n_trajectories, n_steps + 1, *event). It is made in
*blocks*, a batch of trajectories over a run of steps; block b draws its noise from stream b of the
seed, and starts from the last frames of the block before. A file is thus the same whether its
sampling was interrupted or not.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bopito_inverse.arguments import (
    Device,
    as_count,
    as_device,
    as_frames,
    as_generator,
    as_positive,
)
from bopito_inverse.datasets import Array, Trajectories, write_npz
from bopito_inverse.sampling.rollout import Normal, Rollout, _as_n_int

BATCH_SIZE = {"cpu": 4096, "cuda": 65536}
BLOCK_FRAMES = 500_000


class _Block(NamedTuple):
    stream: int
    rows: slice
    first: int
    last: int


def sample(
    model: nn.Module,
    step: Rollout,
    *,
    starts: Array,
    n_steps: int,
    n_int: float | Tensor | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    frame_time: float = 1.0,
    system: str | None = None,
    batch_size: int | None = None,
    device: Device | str = "auto",
    progress: bool = False,
) -> Trajectories | None:
    """Sample trajectories by repeating a composite step.

    Args:
        model: an `Interpolator`, or a conditional score where all moves are `Propagate`.
        step: the composite step.
        starts: first frames (n_trajectories, *event), in data units.
        n_steps: composite steps per trajectory.
        n_int: interpolation parameter, one number (inf allowed) or one per trajectory; needed
            unless the moves fix it.
        seed: integer.
        out: `.npz` file to write instead of returning the frames. Memory stays bounded, and a
            call that was killed goes on where it stopped when it is made again. A finished file
            is replaced, once its successor is complete.
        frame_time: physical time of one frame of the training data; the frames of the result are
            `step.step_lag` times as far apart.
        system: name of the system, stored in the result.
        batch_size: trajectories per batch (by default 4096 on the CPU, 65536 on CUDA).
        device: `auto`, `cpu` or `cuda`.
        progress: show a progress bar.

    Returns:
        `Trajectories` of `n_steps + 1` frames, the starts first; None where `out` is given.

    Raises:
        ValueError: starts of the wrong shape or not finite, n_int missing or not positive, or
            `out` is the unfinished file of another run.

    >>> import bopito_inverse as bi
    >>> exact = bi.systems.TransferOperator(bi.systems.Prinz(), grid_size=200)
    >>> s_eq = exact.equilibrium_score()
    >>> bopito = bi.models.BoPITOScore(s_eq, exact.dynamic_score(s_eq, 0.99), 0.99, lag_max=50)
    >>> step = Rollout([bi.sampling.Interpolate(), bi.sampling.Propagate(50)], step_lag=100)
    >>> sample(bi.Interpolator(bopito), step, n_int=80, starts=[[0.7], [-0.7]], n_steps=3)
    Trajectories(2 trajectories, 8 frames of shape (1,), frame_time=100, system=None)
    """
    target = as_device(device)
    first = as_frames("starts", starts, model.event_shape)  # type: ignore[arg-type]
    n = _per_trajectory(n_int, len(first), step)
    n_steps = as_count("n_steps", n_steps)
    seed = as_count("seed", seed, 0)
    batch = BATCH_SIZE[target.type] if batch_size is None else as_count("batch_size", batch_size)
    blocks = _blocks(len(first), n_steps, batch)
    interval = as_positive("frame_time", frame_time) * step.step_lag
    model = model.to(target)
    shape = (len(first), n_steps + 1, *first.shape[1:])

    def fill(frames: np.ndarray, block: _Block) -> None:
        normal = Normal(as_generator(seed, target, "sample", block.stream), scaling=model.scaling)
        x_0 = torch.from_numpy(np.array(frames[block.rows, block.first])).to(target)
        count = block.last - block.first
        steps = step.frames(model, x_0, n[block.rows].to(target), count, normal)
        made = torch.stack(list(steps), dim=1)
        frames[block.rows, block.first + 1 : block.last + 1] = made.cpu().numpy()

    with torch.no_grad():
        if out is None:
            frames = np.empty(shape, dtype=np.float32)
            frames[:, 0] = first.numpy()
            for block in _track(blocks, 0, progress):
                fill(frames, block)
            return Trajectories(torch.from_numpy(frames), interval, system)
        settings = {
            "seed": seed,
            "step": step.config(),
            "shape": list(shape),
            "blocks": [batch, len(blocks), target.type],
            "model": _constants(model),
            "inputs": _digest(first, n, *model.state_dict().values()),
        }
        stream = _Stream(Path(out), shape, settings, first)
        for block in _track(blocks, stream.done, progress):
            fill(stream.frames, block)
            stream.commit(block.stream + 1)
        stream.finish(interval, system)
    return None


class _Stream:
    """An unfinished `.npz`: its frames in a memory map and the number of finished blocks."""

    def __init__(self, path: Path, shape: tuple, settings: dict[str, Any], starts: Tensor) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial.npy")
        self.state = path.with_name(path.name + ".partial.json")
        self.settings = settings
        if path.is_dir():
            raise ValueError(f"out must be a file, got the folder {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = self._finished_blocks()
        if self.done is None:
            self.done = 0
            self.frames = np.lib.format.open_memmap(self.partial, "w+", np.float32, shape)
            self.frames[:, 0] = starts.numpy()
            self.commit(0)
        else:
            self.frames = np.lib.format.open_memmap(self.partial, "r+")

    def _finished_blocks(self) -> Any:
        if not (self.state.exists() and self.partial.exists()):
            return None
        try:
            state = json.loads(self.state.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"out: {self.state} is unreadable; delete it to start anew") from error
        if state.get("settings") != json.loads(json.dumps(self.settings)):
            raise ValueError(
                f"out: {self.partial} is the unfinished file of a run with other settings; "
                "finish that run, or delete the file, or choose another name"
            )
        return state["done"]

    def commit(self, done: int) -> None:
        self.frames.flush()
        temporary = self.state.with_suffix(".tmp")
        temporary.write_text(json.dumps({"done": done, "settings": self.settings}))
        os.replace(temporary, self.state)

    def finish(self, frame_time: float, system: str | None) -> None:
        write_npz(
            self.path,
            trajectories=self.frames,
            frame_time=np.float64(frame_time),
            system=np.str_(system or ""),
        )
        self.state.unlink()
        self.partial.unlink()


def _blocks(n_trajectories: int, n_steps: int, batch: int) -> list[_Block]:
    """All blocks, in the order in which they can be made."""
    per_block = max(1, BLOCK_FRAMES // min(batch, n_trajectories))
    spans = [(i, min(i + per_block, n_steps)) for i in range(0, n_steps, per_block)]
    rows = [slice(i, i + batch) for i in range(0, n_trajectories, batch)]
    return [_Block(i, r, *s) for i, (s, r) in enumerate((s, r) for s in spans for r in rows)]


def _track(blocks: list[_Block], done: int, progress: bool) -> Iterator[_Block]:
    if not progress:
        yield from blocks[done:]
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("Sampling", total=len(blocks), completed=done)
        for block in blocks[done:]:
            yield block
            bar.advance(task)


def _per_trajectory(n_int: float | Tensor | None, n: int, step: Rollout) -> Tensor:
    if n_int is None:
        for move in step.moves:
            if move.needs_n_int:
                raise ValueError(f"n_int must be given for {move}, got None")
        n_int = math.inf  # not used
    value = torch.as_tensor(n_int, dtype=torch.float32).detach().cpu()
    if value.shape not in ((), (n,)):
        raise ValueError(f"n_int must be one number or {n}, got shape {tuple(value.shape)}")
    if not (value > 0).all():
        _as_n_int(float(value.flatten()[~(value.flatten() > 0)][0]))
    return value.expand(n)


def _constants(model: nn.Module) -> dict[str, Any]:
    """What a model depends on beside its parameters and buffers."""
    names = ("lambda_hat", "lag_max")
    constants = {name: getattr(model, name, None) for name in names}
    return constants | {"class": type(model).__name__, "noise": model.noise.config()}  # type: ignore[operator, union-attr]


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]
