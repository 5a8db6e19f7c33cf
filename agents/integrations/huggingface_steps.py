"""End the optimiser steps of a steered Hugging Face Trainer, and log what is decided."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trainpilot.agents.integrations.scalars import scalars
from trainpilot.agents.run_record import DecisionRecord

if TYPE_CHECKING:
    from trainpilot.agents.integrations.huggingface import SteeringMixin


ON_SCREEN = (PrinterCallback, ProgressCallback)


class AfterStep(TrainerCallback):
    """Ends the steps of a steered Trainer, and tells of its decisions.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: SteeringMixin) -> None:
        self.trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """End the step before the scheduler asks for the next learning rate."""
        self.trainer.end_step()
        state.max_steps = self.trainer.estimated_steps() + 1  # this step is counted after this call
        for each in self.trainer.callback_handler.callbacks:
            if isinstance(each, ProgressCallback) and each.training_bar is not None:
                each.training_bar.total = state.max_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Log decisions, and stop where the budget ends."""
        steering = self.trainer.steered()[0]
        state.epoch = steering.sequences / self.trainer.epoch_sequences
        tell(self.trainer.told, partial(log, self.trainer), control)
        if steering.finished:
            control.should_training_stop = True
        return control


def log(trainer: Trainer, values: dict[str, float]) -> None:
    """Log as a Trainer does, but for the screen: fifty decisions would bury its own lines there."""
    handler = trainer.callback_handler
    everyone = handler.callbacks
    handler.callbacks = [each for each in everyone if not isinstance(each, ON_SCREEN)]
    try:
        Trainer.log(trainer, values)
    finally:
        handler.callbacks = everyone


def tell(told: list[DecisionRecord], write: Callable[[dict[str, float]], None], control: TrainerControl) -> None:
    """Log decisions; that must not take the place of the Trainer's own log."""
    wanted = control.should_log
    for record in told:
        write(scalars(record))
    told.clear()
    control.should_log = wanted
