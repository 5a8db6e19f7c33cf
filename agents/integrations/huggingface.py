"""Steer the Hugging Face Trainer: exact batch sizes, learning rate, precision, masks, probe, saving and resuming.

    trainer = SteeredTrainer(model, args, train_dataset=data, steering={"precisions": ("fp32", "bf16")})
    trainer.train()

`per_device_train_batch_size` is the micro-batch; steering decides how many of them make an optimiser step. The budget
in sequences comes from `max_steps`, `num_train_epochs` and `gradient_accumulation_steps` as they are at the start. The
base schedule is the scheduler that comes with the optimiser, or else `lr_scheduler_type` with its options and warm-up;
`warmup_stable_decay` without options falls over the last fifth. With the Trainer's defaults, linear without warm-up,
the base schedule of the policy holds. For another Trainer, put the mixin in front of its class:

    class SteeredSFTTrainer(SteeringMixin, SFTTrainer): ...
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

try:
    from transformers import (
        PrinterCallback,
        ProgressCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.trainer_callback import DefaultFlowCallback
except ImportError as error:
    raise ImportError("steering a Hugging Face Trainer needs accelerate: pip install accelerate") from error

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.integrations.common import GivenSettings, ranks_of, settings_fields
from trainpilot.agents.integrations.huggingface_cadence import Cadence, SequenceFlow
from trainpilot.agents.integrations.huggingface_data import MicroBatch, MicroBatches, SampleStream, rows_of
from trainpilot.agents.integrations.huggingface_settings import (
    RequestedRun,
    SteeredSchedule,
    check_args,
    check_model,
    check_trainer,
    drawn,
    epoch_sequences,
    has_length,
    in_bf16,
    settings_for,
    steering_file,
    without_end,
)
from trainpilot.agents.logging.run_log import scalars
from trainpilot.agents.steering.loader_batches import first_sequences
from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.files import load_checkpoint, save_checkpoint
from trainpilot.llm_runtime.loop import eval_mode


class SteeringMixin(Trainer):
    """Makes a Trainer a steered one; put it in front of the Trainer's own class.

    The run ends when its budget of sequences is used up; until then `state.max_steps` is an estimate. Under a budget in
    seconds or joules the steps or epochs of the arguments are only an estimate too. An epoch's end
    does not cut a step short: the step takes the rest of its batch from the next epoch. Evaluation runs in float32.
    With `bf16=True` the training is in bf16, unless `precisions` offer more.

    `logging_steps`, `eval_steps` and `save_steps` count steps at the starting batch, so that they come after as many
    sequences whatever the batch.
    Under the mode `advise` steps, epochs, losses and the end of the run are those of the plain Trainer.

    Args:
        model: As for the Trainer.
        args: As for the Trainer; they are copied.
        rest: Further arguments of the Trainer by position.
        steering: `SteeringSettings`, or some of its fields; the arguments and the data give the others.
        meter: Energy meter; by default the best one that the device has.
        named: Further arguments of the Trainer.

    Raises:
        ValueError: something cannot be steered exactly; the message says what to do.
    """

    model: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        steering: GivenSettings = None,
        meter: EnergyMeter | None = None,
        **named: Any,
    ) -> None:
        self.steering: Steering | None = None
        self.stream: SampleStream | None = None
        self._given, self._meter = steering, meter
        self.unlogged: list[DecisionRecord] = []
        self._validation: tuple[Any, list[MicroBatch]] = (None, [])
        self._divides = None if getattr(self, "loss_is_scaled_for_ga", None) is None else True  # as the class says
        self.epochs_ended = 0
        requested = RequestedRun.of(args) if args is not None else None
        if args is not None:
            steering = in_bf16(steering) if args.bf16 else steering
            args = without_end(args)
            check_args(args)
        super().__init__(model, args, *rest, **named)
        check_trainer(self)
        self._requested = requested or RequestedRun.of(self.args)
        self.args.gradient_accumulation_steps, self.args.max_steps = 1, self._requested.max_steps
        self.settings = settings_for(
            steering, self._requested, self.args, self.train_dataset, scheduler=self.lr_scheduler
        )
        check_model(self.model, self.settings)
        if not self.advises:  # else even the Trainer's own loss stays as it is
            self._loss_shifts_labels = self._loss_shifts_labels or shifts_labels(self.model)
        # Before the other callbacks, which then see the state after the step.
        callbacks = self.callback_handler.callbacks
        callbacks[:] = [self._own_flow() if type(each) is DefaultFlowCallback else each for each in callbacks]
        callbacks.insert(0, StepEnd(self))

    def _own_flow(self) -> SequenceFlow:
        return SequenceFlow(lambda: Cadence(self.steered()[0], self.rows * self.args.world_size))

    # What steers -----------------------------------------------------------------------------------------------------

    @property
    def advises(self) -> bool:
        """Whether the policy only advises. Steps, losses and the end of the run are then those of the plain Trainer."""
        return self.settings.mode == "advise"

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """Take over the data loader, and announce one endless epoch to the loop; steering ends it."""
        if self.advises and settings_fields(self._given).get("sequences") is None and has_length(dataloader):
            self.settings = replace(self.settings, sequences=drawn(self._requested, args, dataloader))
        sequences, batch_size = self.settings.known_sequences(), self.settings.batch_size
        self.stream = SampleStream(dataloader, args.per_device_train_batch_size)
        self.epoch_sequences = epoch_sequences(dataloader, args) or sequences
        epochs, steps = -(-sequences // self.epoch_sequences), -(-sequences // batch_size)
        endless = sys.maxsize
        return epochs, endless, self.epoch_sequences, sequences, batch_size, endless, steps

    def _inner_training_loop(self, *args: Any, **named: Any) -> Any:
        """Train, and release model, optimiser and data afterwards, also after an error."""
        try:
            return super()._inner_training_loop(*args, **named)
        finally:
            if self.steering is not None:
                self.steering.close()
            if self.stream is not None:
                self.stream.close()

    def _run_epoch(self, *args: Any, **named: Any) -> None:
        """Train, unless the resumed run has ended already."""
        if self.steered()[0].finished:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **named)  # type: ignore[no-untyped-call]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Make the steering, and the scheduler that takes its learning rates from it."""
        assert self.optimizer is not None, "the Trainer makes the optimiser first"
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # before steering copies the optimiser
        self.epochs_ended = 0
        self.unlogged.clear()
        self.steering = Steering(
            self.model,
            self.optimizer,
            self.settings,
            validate=self._validate if self.eval_dataset is not None else None,
            data=self.stream,
            meter=self._meter,
            ranks=ranks_of(self.args.world_size),
            on_decision=self.unlogged.append,
        )
        self.steering.expect_external_scheduler()
        self.lr_scheduler = SteeredSchedule(self.optimizer, self.steering)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _validate(self) -> float:
        """Return the loss on the first batches of the evaluation data, in nats/token."""
        if self._validation[0] is not self.eval_dataset:
            self._validation = self.eval_dataset, labelled_batches(self)
        loss, items = 0.0, 0
        with torch.no_grad(), metrics_kept(self), self.steered()[0].autocast("fp32"):
            for batch in self._validation[1]:
                count = int(self._get_num_items_in_batch([batch], self.args.device) or rows_of(batch))
                loss += count * float(self._mean_loss(self.model, batch))
                items += count
        return loss / items if items else math.nan

    def _mean_loss(self, model: nn.Module, batch: MicroBatch, items: Any = None) -> torch.Tensor:
        loss = self.compute_loss(model, dict(self._prepare_inputs(batch)), num_items_in_batch=items)
        assert isinstance(loss, torch.Tensor), "compute_loss returns outputs only on request"
        return loss

    # A step ----------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of the next optimiser step as a single item, and their number of loss items."""
        steering, stream = self.steered()
        batches = stream.take(-(-steering.begin_step() // self.args.world_size), within_epoch=self.advises)
        return [batches], self._get_num_items_in_batch(batches, device)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Accumulate the gradients of a step's micro-batches; processes exchange them in the last backward pass."""
        steering, rows, losses = self.steered()[0], inputs.rows, []
        self.rows = rows
        for batch in inputs:
            items = self._loss_items(batch, num_items_in_batch)
            if steering.probe_wanted:
                few = first_sequences(batch, steering.probe_sequences, rows_of(batch))
                with metrics_kept(self):
                    steering.probe(lambda few=few: self._mean_loss(model, few))  # type: ignore[misc]
            self.current_gradient_accumulation_steps = len(inputs) if self.advises else rows / rows_of(batch)
            last = batch is inputs[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch, items))
            steering.note_loss(losses[-1])
        return torch.stack(losses).sum()

    def _loss_items(self, batch: MicroBatch, items: Any) -> Any:
        """Return the number of items for the loss; `None` if the model ignores it, then the Trainer weighs the loss."""
        if self._divides is None and items is not None and not self.advises:
            with metrics_kept(self):
                self._divides = divides_by_items(self.model, lambda n: self._mean_loss(self.model, batch, n), items)
            if self._divides is False:
                self.loss_is_scaled_for_ga = False
        return None if self._divides is False else items

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Return the context of a forward pass: the controls' precision in training, float32 elsewhere."""
        stack = contextlib.ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        if self.steering is not None:
            stack.enter_context(self.steering.autocast(None if self.model.training else "fp32"))
        return stack

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        return self._norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Return the operations of all micro-batches of a step."""
        batches = inputs if isinstance(inputs, MicroBatches) else [inputs]
        return sum(super(SteeringMixin, self).floating_point_ops(batch) for batch in batches)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for batch in inputs:
            super()._track_num_input_tokens(batch)  # type: ignore[no-untyped-call]

    def drop_lost_gradients(self) -> None:
        """Make the coming optimiser step do nothing where the gradient is not finite."""
        self.steered()[0].drop_lost_gradients(torch.as_tensor(self._norm))

    def end_step(self) -> None:
        """Record the optimiser step that was made; at an interval's end, decide."""
        self.steered()[0].end_step(torch.as_tensor(self._norm), self.rows * self.args.world_size)

    def _maybe_log_save_evaluate(self, *args: Any, **named: Any) -> None:
        """Announce the end of an epoch to the callbacks, log, and evaluate and save with the clock stopped."""
        steering, handler = self.steered()[0], self.callback_handler
        epochs = steering.sequences // self.epoch_sequences
        ended = epochs > self.epochs_ended and not self.control.should_training_stop
        if ended:
            self.epochs_ended = epochs
            self.control = handler.on_epoch_end(self.args, self.state, self.control)
        if self.control.should_evaluate or self.control.should_save:
            steering.pause()
        super()._maybe_log_save_evaluate(*args, **named)
        steering.resume()
        if ended:
            self.control = handler.on_epoch_begin(self.args, self.state, self.control)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """Report the training speed from the sequences that were trained on."""
        whole = self.steered()[0].sequences * self.state.max_steps / max(self.state.global_step, 1)
        return super()._finalize_training(trial, whole, start_time)  # type: ignore[no-untyped-call]

    def steered(self) -> tuple[Steering, SampleStream]:
        """Return the steering and the data stream of a run that has begun."""
        assert self.steering is not None, "create_scheduler makes it"
        assert self.stream is not None, "set_initial_training_values makes it"
        return self.steering, self.stream

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        steering, stream = self.steered()
        state = {"steering": steering.state_dict(), "data": stream.state_dict(), "epochs": self.epochs_ended}
        save_checkpoint(steering_file(self.args, output_dir), state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        steering, stream = self.steered()
        path = steering_file(self.args, checkpoint)
        if (state := load_checkpoint(path)) is None:
            raise ValueError(
                f"resume_from_checkpoint must hold {path.name}, got {checkpoint} without it; it comes from a run that "
                "was not steered, or had another number of processes, or save_only_model"
            )
        if missing := {"steering", "data", "epochs"} - state.keys():
            raise ValueError(f"resume_from_checkpoint must hold a whole {path.name}, got one without {min(missing)}")
        steering.load_state_dict(state["steering"])
        beginning = {"drawn": 0, "rest": None} if self.args.ignore_data_skip else {}
        stream.load_state_dict(state["data"] | beginning)
        self.epochs_ended = state["epochs"]
        self.state.max_steps = self.estimated_steps()

    def _init_training_state(self, *args: Any, **named: Any) -> tuple[int, int]:
        """Start the loop at batch 0: the stream has moved to its position, which it counts in sequences."""
        super()._init_training_state(*args, **named)
        return 0, 0

    def estimated_steps(self) -> int:
        """Return the step at which the run ends if the batch size stays."""
        steering, _ = self.steered()
        left = max(steering.end_sequences - steering.sequences, 0)
        return int(self.state.global_step) - (-left // steering.controls.batch_size)


class SteeredTrainer(SteeringMixin):
    """The Hugging Face Trainer under steering; see `SteeringMixin`."""


class StepEnd(TrainerCallback):
    """Ends the optimiser steps of a steered Trainer, and logs its decisions.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: SteeringMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep a gradient that is not finite from the weights."""
        self.trainer.drop_lost_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """End the step before the scheduler reads the next learning rate."""
        self.trainer.end_step()
        state.max_steps = self.trainer.estimated_steps() + 1  # the Trainer counts this step after this call
        for each in self.trainer.callback_handler.callbacks:
            if isinstance(each, ProgressCallback) and each.training_bar is not None:
                each.training_bar.total = state.max_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Log decisions, and stop where the budget ends."""
        steering = self.trainer.steered()[0]
        state.epoch = steering.sequences / self.trainer.epoch_sequences
        log_decisions(self.trainer.unlogged, partial(log_off_screen, self.trainer), control)
        if steering.finished:
            control.should_training_stop = True
        return control


PRINTING = (PrinterCallback, ProgressCallback)
"""Callbacks that write what is logged to the screen."""


def log_off_screen(trainer: Trainer, values: dict[str, float]) -> None:
    """Log as the Trainer does, but not to the screen, where fifty decisions would bury the Trainer's own lines."""
    handler = trainer.callback_handler
    everyone = handler.callbacks
    handler.callbacks = [each for each in everyone if not isinstance(each, PRINTING)]
    try:
        Trainer.log(trainer, values)
    finally:
        handler.callbacks = everyone


def log_decisions(
    records: list[DecisionRecord], write: Callable[[dict[str, float]], None], control: TrainerControl
) -> None:
    """Write the decisions with `write`, and empty the list; the Trainer still logs its own values at this step."""
    should_log = control.should_log
    for record in records:
        write(scalars(record))
    records.clear()
    control.should_log = should_log


def divides_by_items(model: nn.Module, loss: Callable[[Any], torch.Tensor], items: Any) -> bool | None:
    """Return whether a model divides its loss by the number of items it gets; some accept the number and ignore it.

    Args:
        model: Computes the loss.
        loss: Returns the loss of a micro-batch, given the number of items of the whole step.
        items: That number.

    Returns:
        `None` if the loss is 0 or not finite, which decides nothing.
    """
    device = next(model.parameters()).device.type
    with eval_mode(model), torch.no_grad(), torch.autocast(device, enabled=False):
        one, other = float(loss(items)), float(loss(2 * items))
    return not math.isclose(one, other, rel_tol=1e-4) if one and math.isfinite(one) else None


def shifts_labels(model: Any) -> bool:
    """Return whether the loss leaves out the first label of each sequence: GPT-2's does, and has no loss type."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return known and getattr(base, "loss_function", None) is ForCausalLMLoss


VALIDATION_BATCHES = 8
"""Batches of the evaluation data on which the validation loss is measured."""


def labelled_batches(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the first batches of the evaluation data, without those that have no loss."""
    names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else [None]
    batches, labels = [], trainer.label_names
    with torch.random.fork_rng(devices=[]):
        for batch in islice(trainer.get_eval_dataloader(names[0]), VALIDATION_BATCHES):
            if all(batch.get(name) is not None for name in labels) if labels else trainer.can_return_loss:
                batches.append(dict(batch))
    return batches


@contextlib.contextmanager
def metrics_kept(trainer: Any) -> Iterator[None]:
    """Restore the training metrics that a Trainer gathers, as TRL's do, after forward passes that are not training."""
    kept = copy.deepcopy(getattr(trainer, "_metrics", None))
    try:
        yield
    finally:
        if kept is not None:
            trainer._metrics = kept
