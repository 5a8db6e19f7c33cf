"""Fit a tiny module under Lightning in one of two processes, and return what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from trainpilot.agents.integrations.lightning import LightningSteering
from trainpilot.llm_runtime.energy.meter import EnergyReading, RecordedMeter

BATCHES = 24
"""Of each process, in an epoch."""
SIZES = ([2] * BATCHES, [2, 1] * (BATCHES // 2))
"""Sequences in the batches of each process."""
STEP = 2
"""Batches of each process in a step; three steps are an interval."""
SAVED_AT = 8
"""Batches after which a fit is saved, in the midst of an interval."""
JOULES = (10.0, 30.0)
"""What the meter of each process counts between two readings."""


class Mean(pl.LightningModule):
    """The gradient of its weight is the mean of what a step was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.gradients: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight * batch).mean()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        assert self.weight.grad is not None
        self.gradients.append(float(self.weight.grad))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Numbers:
    """Batches of given sizes: 1, 2, 3 and so on in the first process, 101, 102 and so on in the second."""

    batch_size = 2

    def __init__(self, rank: int, sizes: Sequence[int]) -> None:
        self.numbers, self.at = torch.arange(1.0 + 100 * rank, 1.0 + 100 * rank + sum(sizes)).split(list(sizes)), 0
        self.sampler = range(sum(sizes))

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < len(self.numbers):
            self.at += 1
            yield self.numbers[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Saves(pl.Callback):
    """Writes a checkpoint at the end of one batch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if args[-1] == SAVED_AT - 1:
            trainer.save_checkpoint(self.path)


def _fit(rank: int, sizes: Sequence[int], *callbacks: pl.Callback, ckpt: Path | None = None) -> dict[str, Any]:
    module = Mean()
    readings = [EnergyReading(time_s=0.0, energy_j=i * JOULES[rank], source="measured_counter") for i in range(99)]
    settings = {"policy": "none", "decisions": 4, "probe": False}
    steering = LightningSteering(settings, meter=RecordedMeter(readings))
    trainer = pl.Trainer(
        callbacks=[*callbacks, steering],
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        accumulate_grad_batches=STEP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Numbers(rank, sizes), ckpt_path=ckpt)
    assert steering.steering is not None
    return {
        "weight": float(module.weight.detach()),
        "gradients": module.gradients,
        "budget": steering.steering.end_sequences,
        "summary": steering.steering.summary(),
        "told": [
            (told.steps, told.train_loss, told.energy_j)
            for told in (record.telemetry for record in steering.steering.records)
        ],
    }


def uneven(rank: int, folder: Path) -> dict[str, Any]:
    """Fit on batches that are not the same in both processes."""
    return _fit(rank, SIZES[rank])


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """Fit on batches that are, and again from a checkpoint of the first process."""
    path = folder / "two.ckpt"
    whole = _fit(rank, SIZES[0], Saves(path))
    return {"whole": whole, "late": _fit(rank, SIZES[0], ckpt=path)}
