"""End the optimiser steps of a steered Hugging Face Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainpilot.agents.integrations.huggingface_fit import scalars

if TYPE_CHECKING:
    from trainpilot.agents.integrations.huggingface import SteeringMixin


class AfterStep(TrainerCallback):
    """Ends the steps of a steered Trainer, and tells of its decisions and epochs.

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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Log decisions, tell of the end of an epoch, and stop where the budget ends."""
        trainer = self.trainer
        steering, sequences = trainer.steered()[0], trainer.epoch_sequences
        before = (steering.sequences - trainer.rows * args.world_size) // sequences
        state.epoch = steering.sequences / sequences
        self._tell(control)
        if steering.finished:
            control.should_training_stop = True
        elif steering.sequences // sequences > before:
            handler = trainer.callback_handler
            control = handler.on_epoch_end(args, state, control)
            control = handler.on_epoch_begin(args, state, control)
        return control

    def _tell(self, control: TrainerControl) -> None:
        """Log the decisions; a log of its own must not take the place of the Trainer's."""
        wanted = control.should_log
        for record in self.trainer.told:
            Trainer.log(self.trainer, scalars(record))
        self.trainer.told.clear()
        control.should_log = wanted
