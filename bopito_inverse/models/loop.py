"""The training loop, by Lightning: optimiser, moving average, log, progress, resume after a kill.

A folder keeps the run: `settings.json` says which run it is, `metrics.csv` has its loss and
`last.ckpt` its state. Called again with the same settings, a run that was killed goes on from there
to the same parameters, bit for bit, as one that was not, and a finished run is not repeated.
"""

import json
import logging
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from bopito_inverse.arguments import as_generator
from bopito_inverse.models.painn import PaiNN

if TYPE_CHECKING:
    from bopito_inverse.models.train import TrainingConfig

LOG_EVERY = 50
VALIDATION_BATCHES = 4
TITLES = {"EquilibriumScore": "s_eq", "BoPITOScore": "BoPITO", "ITOScore": "ITO"}
Loss = Callable[[nn.Module, torch.Generator], Tensor]


class _Training(pl.LightningModule):
    """A score, its moving average, and losses that draw their own batches on the device.

    The first loss is what is trained on; the second, if there is one, is that of held-out data.
    """

    def __init__(
        self, score: nn.Module, losses: Sequence[Loss], config: "TrainingConfig", seed: int
    ) -> None:
        super().__init__()
        self.score = score
        self.average = AveragedModel(score, multi_avg_fn=_exponential(config.ema_decay))
        self.loss, *rest = losses
        self.validation = rest[0] if rest else None
        self.config = config
        self.seed = seed

    def training_step(self, batch: Any, index: int) -> Tensor:
        generator = as_generator(self.seed, self.device, "training", self.global_step)
        return self.loss(self.score, generator)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Loss of the moving average on held-out data, always with the same random numbers."""
        assert self.validation is not None
        generators = (
            as_generator(self.seed, self.device, "validation", i) for i in range(VALIDATION_BATCHES)
        )
        losses = [self.validation(self.average.module, generator) for generator in generators]
        return float(torch.stack(losses).mean())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average.update_parameters(self.score)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        config = self.config
        parameters = [p for p in self.score.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=0.0)

        def rate(step: int) -> float:
            warm = min(1.0, (step + 1) / (config.warmup + 1))
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        own = torch.Generator()  # otherwise the loader draws from the global one
        return DataLoader(range(self.config.steps), batch_size=None, generator=own)  # type: ignore[arg-type]


class _Keeper(pl.Callback):
    """Keeps the state every so many steps and at the end."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps or trainer.should_stop:
            trainer.save_checkpoint(self.path)


class _Guard(pl.Callback):
    """Ends a run whose loss is no longer finite, before the state of it is kept."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        step = trainer.global_step
        looks = step % LOG_EVERY == 0 or step % self.every == 0 or step == trainer.max_steps
        if looks and not math.isfinite(float(outputs["loss"])):
            raise ValueError(
                f"the loss is {float(outputs['loss'])} after {step} steps; lower learning_rate, "
                f"got {module.config.learning_rate:g}"  # type: ignore[union-attr]
            )


class _LossLog(pl.Callback):
    """Appends `step,loss` to a CSV file; a resumed run repeats no row and loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = -1

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if not complete:
            self.path.write_bytes(b"step,loss\n")
        elif complete != content:  # a kill may leave half a row
            os.truncate(self.path, len(complete))
        rows = complete.splitlines()[1:]
        self.last = int(rows[-1].split(b",")[0]) if rows else -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        step = trainer.global_step - 1
        if step % LOG_EVERY == 0 and step > self.last:
            with self.path.open("a") as file:
                file.write(f"{step},{float(outputs['loss']):.6g}\n")


class _Validation(pl.Callback):
    """Tries the moving average on held-out data, keeps the best and says when to stop."""

    def __init__(self, path: Path | None, every: int, patience: int | None) -> None:
        self.path = path
        self.every = every
        self.patience = patience
        self.history: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"history": self.history, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.history, self.best = [tuple(row) for row in state["history"]], state["best"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any
    ) -> None:
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        loss = module.validation_loss()  # type: ignore[operator]
        if not self.history or loss < min(loss for _, loss in self.history):
            average = module.average.module.state_dict()  # type: ignore[union-attr, operator]
            self.best = {key: value.detach().cpu().clone() for key, value in average.items()}
        self.history.append((step, loss))
        if self.path is not None:
            rows = "".join(f"{step},{loss:.6g}\n" for step, loss in self.history)
            self.path.write_text("step,loss\n" + rows)
        trainer.should_stop = self._is_over()

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """A run that was over is not trained on."""
        trainer.should_stop = self._is_over()

    def _is_over(self) -> bool:
        losses = [loss for _, loss in self.history]
        if self.patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.patience


class _Bar(pl.Callback):
    """Steps, times and the loss, which leaves the device only once in `LOG_EVERY` steps."""

    def __init__(self, title: str) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(
            TextColumn("{task.description}"), *columns, TextColumn("{task.fields[loss]}")
        )
        self.title = title
        self.task = TaskID(0)

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.task = self.progress.add_task(
            self.title, total=trainer.max_steps, completed=trainer.global_step, loss=""
        )
        self.progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        step = trainer.global_step
        shown = {"loss": f"loss {float(outputs['loss']):.4f}"} if step % LOG_EVERY == 1 else {}
        self.progress.update(self.task, completed=step, **shown)  # type: ignore[arg-type]

    def on_exception(self, *args: Any) -> None:
        self.progress.stop()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self.progress.stop()


class _StateIO(TorchCheckpointIO):
    """Writes the state complete or not at all, and reads it with nothing unpickled but tensors."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any
    ) -> None:  # type: ignore[override]
        partial = Path(f"{path}.partial")
        torch.save(checkpoint, partial)
        os.replace(partial, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is no readable state of a training run: {error}") from error


def optimise(
    score: nn.Module,
    losses: Sequence[Loss],
    config: "TrainingConfig",
    seed: int,
    device: torch.device,
    folder: Path | None,
    progress: bool,
    settings: dict[str, Any],
) -> Any:
    """The moving average of `score` after `config.steps` steps, on the CPU, frozen.

    With `patience` it is the one that was best on held-out data.

    Raises:
        ValueError: `folder` holds a run with other `settings`, the loss became infinite or NaN, or
            there is no compiler for `compile`.
    """
    callbacks: list[pl.Callback] = [_Guard(config.checkpoint_every)]
    state = None
    validation = None
    if len(losses) > 1:
        path = None if folder is None else folder / "validation.csv"
        validation = _Validation(path, config.validate_every, config.patience)
        callbacks.append(validation)  # before the state is kept
    if folder is not None:
        _claim(folder, settings)
        state = folder / "last.ckpt"
        callbacks += [_LossLog(folder / "metrics.csv"), _Keeper(state, config.checkpoint_every)]
    if progress:
        callbacks.append(_Bar(f"Training {TITLES.get(type(score).__name__, 'score')}"))
    training = _Training(score, losses, config, seed)
    if config.compile:
        for network in [part for part in score.modules() if isinstance(part, PaiNN)]:
            network.compile_layers()
    with _quiet():
        trainer = pl.Trainer(
            max_steps=config.steps,
            max_epochs=-1,
            accelerator="cpu" if device.type == "cpu" else "cuda",
            devices=1 if device.index is None else [device.index],
            gradient_clip_val=config.gradient_clip,
            precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",
            callbacks=callbacks,
            plugins=[_StateIO()],
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(training, ckpt_path=state if state is not None and state.exists() else None)
        except BackendCompilerFailed as error:
            what = str(error).splitlines()[0]
            raise ValueError(f"compile must be false where torch.compile fails: {what}") from error
    made = training.average.module.cpu().eval().requires_grad_(False)
    if validation is not None and config.patience is not None:
        made.load_state_dict(validation.best)
    return made


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of this run into `folder`, or refuse where another run's are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.exists():
        if (folder / "last.ckpt").exists():
            raise ValueError(f"folder {folder} holds the state of a run without its settings.json")
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(partial, path)
        return
    before, now = _flat(json.loads(path.read_text())), _flat(json.loads(json.dumps(settings)))
    changed = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    if changed:
        what = ", ".join(f"{k} {before.get(k)} (now {now.get(k)})" for k in sorted(changed))
        raise ValueError(
            f"folder {folder} holds a training run with other settings: {what}; "
            "choose another folder, or delete this one"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _exponential(decay: float) -> Callable:
    """Moving average whose memory grows with the steps taken, up to 1 / (1 - decay)."""

    @torch.no_grad()
    def update(average: list[Tensor], current: list[Tensor], n_averaged: Tensor) -> None:
        step = n_averaged.to(average[0].dtype)
        weight = torch.maximum(torch.ones_like(step) - decay, 10 / (step + 10))
        for a, c in zip(average, current, strict=True):
            a.lerp_(c, weight.to(a.device))

    return update


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advice (devices, workers, tips) from the terminal."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
