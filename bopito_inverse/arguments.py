"""Arguments: what a caller passes, turned into what the code computes with, or refused by name."""

import math
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Device = Literal["auto", "cpu", "cuda"]
Seed = int | torch.Generator


def as_device(device: str | torch.device) -> torch.device:
    """The torch device for `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:K`."""
    if isinstance(device, torch.device):
        return device
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not device.startswith("cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {device!r}, but torch sees no CUDA device; use 'auto' or 'cpu'"
        )
    return torch.device(device)


def as_generator(seed: Seed, device: torch.device, *stream: str | int) -> torch.Generator:
    """A generator on `device` from an integer seed; a generator is passed through.

    `stream` selects one of many independent streams of a seed, by what it is for and by number:
    chunk 7 of a run draws the same numbers whether or not the run was interrupted before it, and
    two users of one seed share none.
    """
    if isinstance(seed, torch.Generator):
        if seed.device.type != device.type:
            raise ValueError(f"seed is a generator on {seed.device}, expected one on {device}")
        return seed
    if seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed}")
    key = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in stream]
    state = np.random.SeedSequence(int(seed), spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))


def as_frames(
    name: str,
    value: Tensor | np.ndarray | Sequence[float],
    event_shape: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A finite float32 tensor of frames, shape `(n_frames, *event)`; `name` appears in errors."""
    x = torch.as_tensor(value, dtype=torch.float32, device=device)
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (n_frames, *event), got {tuple(x.shape)}")
    if event_shape is not None and tuple(x.shape[1:]) != tuple(event_shape):
        raise ValueError(
            f"{name} must hold frames of shape {tuple(event_shape)}, got {tuple(x.shape[1:])}"
        )
    if len(x) == 0:
        raise ValueError(f"{name} must hold at least one frame, got none")
    finite = torch.isfinite(x).flatten(1).all(1)
    if not finite.all():
        bad = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"{name} must be finite, got NaN or infinite values in {int((~finite).sum())} of "
            f"{len(x)} frames, the first at frame {bad}"
        )
    return x


def as_positive(name: str, value: float) -> float:
    """A finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}")
    return float(value)


def as_count(name: str, value: int, minimum: int = 1) -> int:
    """A whole number of at least `minimum`."""
    if not math.isfinite(value) or value != int(value) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value}")
    return int(value)
