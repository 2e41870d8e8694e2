"""The training loop, by Lightning: optimiser, moving average, log, progress, resume after a kill."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from bopito_inverse.arguments import as_generator

if TYPE_CHECKING:
    from bopito_inverse.models.train import TrainingConfig

LOG_EVERY = 50
Loss = Callable[[nn.Module, torch.Generator], Tensor]


class _Training(pl.LightningModule):
    """A score, its moving average, and a loss that draws its own batches on the device."""

    def __init__(self, score: nn.Module, loss: Loss, config: "TrainingConfig", seed: int) -> None:
        super().__init__()
        self.score = score
        self.average = AveragedModel(score, multi_avg_fn=_exponential(config.ema_decay))
        self.loss = loss
        self.config = config
        self.seed = seed

    def training_step(self, batch: Any, index: int) -> Tensor:
        generator = as_generator(self.seed, self.device, self.global_step)
        loss = self.loss(self.score, generator)
        if self.global_step % LOG_EVERY == 0:
            self.log("loss", loss.detach(), prog_bar=True)
        return loss

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
        return DataLoader(range(self.config.steps), batch_size=None)  # type: ignore[arg-type]


def optimise(
    score: nn.Module,
    loss: Loss,
    config: "TrainingConfig",
    seed: int,
    device: torch.device,
    folder: str | Path | None,
    progress: bool,
) -> Any:
    """The moving average of `score` after `config.steps` steps, on the CPU, frozen."""
    s_eq = getattr(score, "s_eq", None)
    if s_eq is not None:
        s_eq.requires_grad_(False)
    training = _Training(score, loss, config, seed)
    keeper = _keeper(config, folder)
    last = None if keeper is None else Path(folder or "") / "last.ckpt"
    with _quiet():
        trainer = pl.Trainer(
            max_steps=config.steps,
            max_epochs=-1,
            accelerator="cpu" if device.type == "cpu" else "cuda",
            devices=1 if device.index is None else [device.index],
            gradient_clip_val=config.gradient_clip,
            callbacks=[c for c in (keeper, _bar(progress)) if c is not None],
            logger=CSVLogger(folder, name="", version="") if folder is not None else False,
            log_every_n_steps=LOG_EVERY,
            enable_progress_bar=progress,
            enable_checkpointing=keeper is not None,
            enable_model_summary=False,
        )
        resume = str(last) if last is not None and last.exists() else None
        trainer.fit(training, ckpt_path=resume)
    return training.average.module.cpu().eval().requires_grad_(False)


def _keeper(config: "TrainingConfig", folder: str | Path | None) -> ModelCheckpoint | None:
    if folder is None:
        return None
    return ModelCheckpoint(
        dirpath=folder,
        filename="last",
        every_n_train_steps=config.checkpoint_every,
        save_top_k=1,
        enable_version_counter=False,
    )


def _bar(progress: bool) -> RichProgressBar | None:
    return RichProgressBar(refresh_rate=10, leave=True) if progress else None


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
