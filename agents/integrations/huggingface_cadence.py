"""Log, evaluate and save a Hugging Face Trainer as often as its user meant: counted in sequences, not in steps.

`eval_steps=10` at a batch of 8 means every 80 sequences. When steering halves the batch, a step holds half as many, and
by steps everything would come twice as often: evaluations would cost twice as much, an early stop would have half the
patience, and the checkpoints that are kept would cover half the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from trainpilot.agents.steering.steering import Steering


class Cadence:
    """Says what is due after a step: whatever interval in steps at the starting batch the step has completed.

    Args:
        steering: Steering of the run.
        step_sequences: Sequences of the step that was made last, of all processes.
    """

    def __init__(self, steering: Steering, step_sequences: int) -> None:
        batch_size, after = steering.settings.batch_size, steering.sequences
        whole = -(-after // batch_size) * batch_size if steering.finished else after  # the last step may be short
        self._before, self._after, self._batch_size = after - step_sequences, whole, batch_size

    @property
    def steps(self) -> float:
        """Steps so far at the starting batch."""
        return self._after / self._batch_size

    def due(self, every: float) -> bool:
        """Return whether the step has completed an interval of so many steps at the starting batch; 1 is every step."""
        if every == 1:
            return True
        length = every * self._batch_size
        return length > 0 and self._after // length > self._before // length


KINDS = (("logging", "should_log"), ("eval", "should_evaluate"), ("save", "should_save"))
"""Kinds of intervals in the arguments, each with the flag that its callbacks set."""


def by_steps(args: TrainingArguments, kind: str) -> bool:
    """Return whether a kind of interval is counted in steps, and not in epochs."""
    strategy = getattr(args, f"{kind}_strategy")
    return str(getattr(strategy, "value", strategy)) == "steps"


def step_interval(args: TrainingArguments, state: TrainerState, kind: str) -> float:
    """Return an interval in steps at the starting batch; 0 where it is not counted in steps, or must wait."""
    return float(getattr(state, f"{kind}_steps") or 0) if by_steps(args, kind) else 0.0


class SequenceFlow(DefaultFlowCallback):
    """Takes the place of the Trainer's own flow of logging, evaluating and saving.

    Args:
        cadence: Returns the cadence of the step that was made last.
    """

    def __init__(self, cadence: Callable[[], Cadence]) -> None:
        self._cadence = cadence

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Set what is due, and at the end of the run what the Trainer itself would set there."""
        cadence, ended = self._cadence(), state.global_step >= state.max_steps
        for kind, flag in KINDS:
            due = cadence.due(step_interval(args, state, kind)) or (
                ended and kind != "logging" and by_steps(args, kind)
            )
            if due and (kind != "eval" or args.eval_delay <= cadence.steps):
                setattr(control, flag, True)
        if args.logging_first_step and state.global_step == 1:
            control.should_log = True
        if ended:
            control.should_training_stop = True
        return control


def correct(cadence: Cadence, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
    """Turn what the Trainer's own flow has set for this step into what is due, where its callback cannot be replaced.

    The first step that is logged on request, and the end of a run, stay as the Trainer has set them.
    """
    if state.global_step >= state.max_steps:
        return
    for kind, flag in KINDS:
        every = step_interval(args, state, kind)
        wait = (kind == "eval" and args.eval_delay > cadence.steps) or (
            kind == "logging" and args.logging_first_step and state.global_step == 1
        )
        if not every or wait:
            continue
        if cadence.due(every):
            setattr(control, flag, True)
        elif state.global_step % every == 0:
            setattr(control, flag, False)
