r"""Replicas of a composite step that begin at frames of the stationary density mu.

Frames x_s with weights w_s stand for mu. R replicas begin at a systematic resample of them: with
one uniform number u, replica r begins at the frame s where the cumulative weight passes
(r + u) / R, so that each frame starts R w_s replicas, give or take one, and replicas of the same
frame are neighbours. Only what is read off the frames is kept, so that memory stays bounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bopito_inverse.arguments import Device, as_count, as_device, as_frames, as_generator
from bopito_inverse.datasets import Array, Frames
from bopito_inverse.sampling.rollout import Normal, Propagate, Rollout
from bopito_inverse.sampling.sample import BATCH_SIZE

Reader = Callable[[Tensor], Tensor]
"""What is kept of frames, (B, *event) -> (B, ...)."""

FEWEST_REPLICAS = 100
FEWEST_STARTS = 20  # effective frames


@dataclass(frozen=True)
class Replicas:
    """Rollouts from frames of mu.

    Attributes:
        model: the model, on `device`.
        n_int: interpolation parameter, ().
        frames: weighted frames of mu, on `device`.
        start: index of the frame at which each replica begins, (R,), sorted, on the CPU.
        seed: integer; each stream of a seed has its own numbers.
        device: where frames are made.
    """

    model: nn.Module
    n_int: Tensor
    frames: Frames
    start: Tensor
    seed: int
    device: torch.device

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        n_int: float,
        starts: Array | Frames,
        n_replicas: int,
        seed: int,
        device: Device | str,
    ) -> "Replicas":
        """Replicas at their starts, all arguments checked."""
        if not n_int > 0:
            raise ValueError(f"n_int must be above zero (inf allowed), got {n_int}")
        target, n = as_device(device), as_count("n_replicas", n_replicas, FEWEST_REPLICAS)
        seed = as_count("seed", seed, 0)
        frames = starts if isinstance(starts, Frames) else Frames(as_frames("starts", starts))
        as_frames("starts", frames.x[:1], model.event_shape)  # type: ignore[arg-type]
        if frames.ess < FEWEST_STARTS:
            raise ValueError(
                f"starts must hold at least {FEWEST_STARTS} effective frames of mu, got "
                f"{frames.ess:.3g}"
            )
        value = torch.tensor(float(n_int), device=target)
        on_cpu = frames.to(torch.device("cpu"))
        start = on_cpu.systematic(n, as_generator(seed, on_cpu.x.device, "starts"))
        return cls(model.to(target), value, frames.to(target), start, seed, target)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def x_0(self) -> Tensor:
        """First frame of each replica, (R, *event)."""
        return self.frames.x[self.start.to(self.device)]

    def read(self, x: Tensor, reader: Reader) -> Tensor:
        """What a reader keeps of frames, on the CPU, (B, ...)."""
        return torch.cat([reader(part).cpu() for part in x.split(BATCH_SIZE[self.device.type])])

    @torch.no_grad()
    def rollout(
        self,
        step: Rollout,
        steps: Sequence[int],
        stream: str,
        reader: Reader,
        x_0: Tensor | None = None,
    ) -> list[Tensor]:
        """What a reader keeps of the frames after each of `steps`, in order, each (R, ...).

        Two calls with the same `stream` draw the same noise. ValueError where frames diverge.
        """
        parts: list[list[Tensor]] = [[] for _ in steps]
        frames = (self.x_0 if x_0 is None else x_0).to(self.model.scaling.scale.dtype)  # type: ignore[union-attr, arg-type]
        for chunk, x in enumerate(frames.split(BATCH_SIZE[self.device.type])):
            normal = Normal(
                as_generator(self.seed, self.device, stream, chunk), scaling=self.model.scaling
            )
            made = step.frames(self.model, x, self.n_int.to(x.dtype), max(steps), normal)
            for k, frame in enumerate(made, 1):
                if not frame.isfinite().all():
                    raise ValueError(f"model must make finite frames, got NaN or inf at step {k}")
                if k in steps:
                    parts[steps.index(k)].append(reader(frame).cpu())
        return [torch.cat(part) for part in parts]

    def one_and_two_draws(self, step: Rollout, lag: int, reader: Reader) -> tuple[Tensor, Tensor]:
        """The frames `lag` after the starts by the trained model in one draw and in two.

        The last draw has the same noise in both, so that most of it leaves their difference.
        """
        half = lag // 2
        first, second, whole = (
            Rollout([Propagate(length)], length, step.solver) for length in (half, lag - half, lag)
        )
        (middle,) = self.rollout(first, [1], "middle", lambda x: x)
        (one,) = self.rollout(whole, [1], "last", reader)
        (two,) = self.rollout(second, [1], "last", reader, middle.to(self.device))
        return one, two
