"""End the optimiser steps of a steered Hugging Face Trainer, and log what is decided."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainpilot.agents.run_record import DecisionRecord
from trainpilot.agents.tags import TAGS
from trainpilot.llm_runtime.controls import PRECISIONS

if TYPE_CHECKING:
    from trainpilot.agents.integrations.huggingface import SteeringMixin


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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Log decisions, and stop where the budget ends."""
        steering = self.trainer.steered()[0]
        state.epoch = steering.sequences / self.trainer.epoch_sequences
        tell(self.trainer.told, partial(Trainer.log, self.trainer), control)
        if steering.finished:
            control.should_training_stop = True
        return control


def tell(told: list[DecisionRecord], log: Callable[[dict[str, float]], None], control: TrainerControl) -> None:
    """Log decisions; that must not take the place of the Trainer's own log."""
    wanted = control.should_log
    for record in told:
        log(scalars(record))
    told.clear()
    control.should_log = wanted


def scalars(record: DecisionRecord) -> dict[str, float]:
    """Return what a Trainer logs of a decision, under the names of the table in `docs/metrics.md`."""
    told, asked = record.telemetry, record.telemetry.requested
    values: dict[str, float | None] = {
        "loss/train": told.train_loss,
        "loss/validation": told.validation_loss,
        "controls_requested/learning_rate_scale": asked.learning_rate_scale,
        "controls_requested/batch_size": asked.batch_size,
        "controls_requested/precision": PRECISIONS.index(asked.precision),
        "controls_requested/sparsity": asked.sparsity,
        "controls_effective/learning_rate": told.learning_rate,
        "controls_effective/batch_size": told.batch_size,
        "controls_effective/sparsity": told.sparsity,
        "controls_effective/finishing": told.finishing,
        "gradient/norm": told.gradient_norm,
        "gradient/noise_scale": told.noise_scale,
        "energy/interval": told.energy_j,
        "energy/power": told.power_w,
        "speed/interval": told.time_s,
        "speed/tokens_per_s": told.tokens_per_s,
        "run/budget_used": told.budget_used,
        "run/decision": told.decision,
    }
    known = {TAGS[name].name: float(value) for name, value in values.items() if value is not None}
    return {name: value for name, value in known.items() if math.isfinite(value)}
