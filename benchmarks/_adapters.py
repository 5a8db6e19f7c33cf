"""Run the same small training in every supported framework, with and without steering."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from trainpilot.agents.bundle import PolicyBundle, policy_path
from trainpilot.agents.integrations.common import present_ranks
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import ACTION_FIELDS, KEEP, LEARNING_RATE_FACTORS, Action
from trainpilot.llm_runtime.data.batches import BatchStream
from trainpilot.llm_runtime.data.corpus import ByteTokenizer, load_corpus
from trainpilot.llm_runtime.models import load_model

Tick = Callable[[], None]
"""Called after every optimiser step."""

INTERVAL, MICRO_BATCHES = 10, 2
"""Optimiser steps per interval; micro-batches per step."""
BATCH, LENGTH, LEARNING_RATE = 16, 128, 1e-3
RATE = [field.name for field in ACTION_FIELDS].index("learning_rate")
UP, DOWN = (LEARNING_RATE_FACTORS.index(factor) for factor in (1.19, 0.84))


class Asked:
    """Evaluates the shipped policy but ignores its choice, so that the speed of equal work can be compared.

    The learning rate is raised by one notch and lowered again every eight decisions, so that snapshots are taken as
    often as under a policy that acts.
    """

    def __init__(self) -> None:
        self.bundle, self.asked = PolicyBundle.load(policy_path("default")), 0
        self.fields = self.bundle.fields

    def __call__(self, observation: np.ndarray, masks: np.ndarray) -> Action:
        """Return an action that leaves the work per step unchanged."""
        self.bundle.act(observation, masks)
        choice = {0: UP, 4: DOWN}.get(self.asked % 8, KEEP[RATE])
        self.asked += 1
        return (*KEEP[:RATE], choice, *KEEP[RATE + 1 :])


class Rows(IterableDataset[torch.Tensor]):
    """An endless stream of sequences, in the same order with and without steering."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        while True:
            row = torch.from_numpy(self.stream.take(1))[0, :-1]
            yield {"input_ids": row, "labels": row}


class Training:
    """A small Llama model with its text and optimiser."""

    def __init__(self, model: str, steps: int, rank: int = 0) -> None:
        self.steps = steps
        self.model: nn.Module = load_model(model, 0).model.train()
        self.stream = BatchStream(load_corpus(("python-docs",), ByteTokenizer()).train, LENGTH, rank)

    def settings(self) -> SteeringSettings:
        """Return the settings of the steered side."""
        return SteeringSettings(
            sequences=self.steps * BATCH,
            batch_size=BATCH,
            sequence_length=LENGTH,
            policy=Asked(),
            decisions=self.steps // INTERVAL,
        )

    def optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return a new optimiser."""
        return torch.optim.AdamW((model or self.model).parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def loss(self, model: nn.Module, sequences: int) -> Callable[..., torch.Tensor]:
        """Return a function that computes the loss of the next sequences, or of the first few of them."""
        batch = torch.from_numpy(self.stream.take(sequences))

        def loss(count: int = sequences) -> torch.Tensor:
            logits = model(input_ids=batch[:count, :-1], use_cache=False).logits
            return F.cross_entropy(logits.float().flatten(0, 1), batch[:count, 1:].flatten())

        return loss


def _loop(training: Training, model: nn.Module, processes: int, tick: Tick) -> None:
    """Train in an ordinary PyTorch loop with a linear schedule."""
    optimizer = training.optimizer(model)
    micro = BATCH // MICRO_BATCHES // processes
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / training.steps)
        for part in range(MICRO_BATCHES):
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = part == MICRO_BATCHES - 1
            (training.loss(model, micro)() / MICRO_BATCHES).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick()


def _steered_loop(training: Training, model: nn.Module, processes: int, tick: Tick) -> None:
    steering = Steering(model, training.optimizer(model), training.settings(), ranks=present_ranks())
    micro = BATCH // MICRO_BATCHES // processes
    while not steering.finished:
        with steering.step() as step:
            for _ in range(MICRO_BATCHES):
                loss = training.loss(model, micro)
                step.backward(loss, sequences=micro, probe_loss=loss)
        tick()


def plain_loop(training: Training, steered: bool, tick: Tick, folder: Path) -> None:
    """Train in a plain PyTorch loop."""
    (_steered_loop if steered else _loop)(training, training.model, 1, tick)


def ddp(training: Training, steered: bool, tick: Tick, folder: Path) -> None:
    """Train in the same loop with DistributedDataParallel in two processes, of which this is one."""
    model = DistributedDataParallel(training.model)
    (_steered_loop if steered else _loop)(training, model, dist.get_world_size(), tick)


def _trainer(training: Training, folder: Path, make: Callable[..., Any], tick: Tick, **more: Any) -> Any:
    from transformers import TrainerCallback, TrainingArguments

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            tick()

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES,
        learning_rate=LEARNING_RATE,
        adam_beta2=0.95,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": training.steps, "max_grad_norm": 1.0, **more},
    )
    trainer = make(model=training.model, args=arguments, train_dataset=Rows(training.stream))
    trainer.add_callback(Ticks())
    return trainer


def trainer(training: Training, steered: bool, tick: Tick, folder: Path) -> None:
    """Train with the Hugging Face Trainer; steered, with `SteeredTrainer`."""
    from transformers import Trainer

    from trainpilot.agents.integrations.huggingface import SteeredTrainer

    def make(**named: Any) -> Any:
        return SteeredTrainer(steering=training.settings(), **named) if steered else Trainer(**named)

    _trainer(training, folder, make, tick).train()


def trainer_callback(training: Training, steered: bool, tick: Tick, folder: Path) -> None:
    """Train with the Hugging Face Trainer; steered, with `SteeringCallback`."""
    from transformers import Trainer

    from trainpilot.agents.integrations.huggingface_callback import SteeringCallback

    if not steered:
        return trainer(training, False, tick, folder)
    callback = SteeringCallback(training.settings())

    def make(**named: Any) -> Any:
        return Trainer(callbacks=[callback], **named)

    made = _trainer(training, folder, make, tick, max_grad_norm=0.0, max_steps=10 * training.steps)
    callback.trainer = made
    made.train()


def lightning(training: Training, steered: bool, tick: Tick, folder: Path) -> None:
    """Train with Lightning's Trainer; steered, with `LightningSteering`."""
    import lightning.pytorch as pl

    from trainpilot.agents.integrations.lightning import LightningSteering

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = training.model

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch, use_cache=False).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return training.optimizer(self)

        def on_train_batch_end(self, _outputs: Any, _batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % MICRO_BATCHES == 0:
                tick()

    fit = pl.Trainer(
        max_steps=training.steps,
        accumulate_grad_batches=MICRO_BATCHES,
        gradient_clip_val=1.0,
        callbacks=[LightningSteering(training.settings())] if steered else [],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    fit.fit(Module(), DataLoader(Rows(training.stream), batch_size=BATCH // MICRO_BATCHES))


def meet(rank: int, processes: int, port: int) -> None:
    """Initialise the process group of the processes that train one model."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=processes, timeout=timedelta(minutes=10))


FORMS: dict[str, Callable[[Training, bool, Tick, Path], None]] = {
    "plain loop": plain_loop,
    "Trainer": trainer,
    "Trainer, callback": trainer_callback,
    "Lightning": lightning,
    "DDP, two processes": ddp,
}
