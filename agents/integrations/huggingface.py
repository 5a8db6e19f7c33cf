"""Steer the Hugging Face Trainer: exact batches, learning rate, precision, masks, probe, saving and resuming.

    trainer = SteeredTrainer(model, args, train_dataset=data, steering={"precisions": ("fp32", "bf16")})
    trainer.train()

`per_device_train_batch_size` is the micro-batch; how many of them make an optimiser step is steering's to say. It
takes `max_steps`, `num_train_epochs` and `gradient_accumulation_steps` as they hold at the start for the budget in
sequences, and `lr_scheduler_type` and warm-up, where they are not the Trainer's own defaults, for the base schedule:
there `cosine` ends at a tenth of the peak, not at 0, and `warmup_stable_decay` falls over the last fifth. The base
schedule of the policy holds otherwise. For another Trainer, put the mixin in front of it:

    class SteeredSFTTrainer(SteeringMixin, SFTTrainer): ...

End the optimiser steps of a steered Hugging Face Trainer, and log what is decided.

Find out how the model of a Hugging Face Trainer computes its loss, and on which data it can be validated.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator
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
except ImportError as error:
    raise ImportError("steering a Hugging Face Trainer needs accelerate: pip install accelerate") from error

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.integrations.common import first_sequences
from trainpilot.agents.integrations.huggingface_data import MicroBatch, Parts, SampleStream, rows_of
from trainpilot.agents.integrations.huggingface_settings import (
    Given,
    Plan,
    SteeredSchedule,
    check_args,
    check_model,
    check_trainer,
    epoch_sequences,
    ranks_of,
    settings_for,
    steering_file,
    without_end,
)
from trainpilot.agents.logging.run_log import scalars
from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.files import load_checkpoint, save_checkpoint

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


VALIDATION_BATCHES = 8
"""Batches of the evaluation data that the validation loss is measured on."""


def divides_by_items(model: nn.Module, loss: Callable[[Any], torch.Tensor], items: Any) -> bool | None:
    """Return whether a loss is divided by the items it is told; some models take their number and leave it unused.

    Args:
        model: Computes the loss.
        loss: Returns the loss of a micro-batch, given the items of the whole step.
        items: Their number.

    Returns:
        `None` where the loss is 0 or not finite, which says nothing.
    """
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            one, other = float(loss(items)), float(loss(2 * items))
    finally:
        model.train(training)
    return not math.isclose(one, other, rel_tol=1e-4) if one and math.isfinite(one) else None


def shifts_labels(model: Any) -> bool:
    """Return whether the loss leaves out the first label of a sequence: GPT-2's does, and names no loss type."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return known and getattr(base, "loss_function", None) is ForCausalLMLoss


def labelled_batches(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the first batches of the evaluation data, those that have a loss."""
    names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else [None]
    batches, labels = [], trainer.label_names
    with torch.random.fork_rng(devices=[]):
        for batch in islice(trainer.get_eval_dataloader(names[0]), VALIDATION_BATCHES):
            if all(batch.get(name) is not None for name in labels) if labels else trainer.can_return_loss:
                batches.append(dict(batch))
    return batches


@contextlib.contextmanager
def looking(trainer: Any) -> Iterator[None]:
    """Keep what is only looked at out of the figures that a Trainer gathers of itself."""
    kept = copy.deepcopy(getattr(trainer, "_metrics", None))
    try:
        yield
    finally:
        if kept is not None:
            trainer._metrics = kept


class SteeringMixin(Trainer):
    """What makes a Trainer a steered one; put it in front of the Trainer's own class.

    The run ends when its budget of sequences is used up, so that `state.max_steps` is an estimate until then. Epochs
    do not cut a step short: its batch goes on in the next one. Evaluation runs in float32.

    Args:
        model: As for the Trainer.
        args: As for the Trainer; it is copied.
        rest: Further arguments of the Trainer by position.
        steering: `SteeringSettings`, or some of its fields; what is left out comes from the arguments and the data.
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
        steering: Given = None,
        meter: EnergyMeter | None = None,
        **named: Any,
    ) -> None:
        self.steering: Steering | None = None
        self.stream: SampleStream | None = None
        self._given, self._meter = steering, meter
        self.told: list[DecisionRecord] = []
        self._looked: tuple[Any, list[MicroBatch]] = (None, [])
        self._divides = None if getattr(self, "loss_is_scaled_for_ga", None) is None else True  # as the class says
        self.epochs_told = 0
        plan = Plan.of(args) if args is not None else None
        if args is not None:
            check_args(args)
            args = without_end(args)
        super().__init__(model, args, *rest, **named)
        check_trainer(self)
        self._plan = plan or Plan.of(self.args)
        self.args.gradient_accumulation_steps, self.args.max_steps = 1, self._plan.max_steps
        self.settings = settings_for(steering, self._plan, self.args, self.train_dataset)
        check_model(self.model, self.settings)
        self._loss_shifts_labels = self._loss_shifts_labels or shifts_labels(self.model)
        self.callback_handler.callbacks.insert(0, AfterStep(self))  # the others are to see the step as it is then

    # What steers -----------------------------------------------------------------------------------------------------

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """Take the data loader, and tell the loop that there is one long epoch, which steering ends."""
        settings = self.settings
        self.stream = SampleStream(dataloader, args.per_device_train_batch_size)
        self.epoch_sequences = epoch_sequences(dataloader, args) or settings.sequences
        epochs = -(-settings.sequences // self.epoch_sequences)
        steps = -(-settings.sequences // settings.batch_size)
        endless = sys.maxsize
        return epochs, endless, self.epoch_sequences, settings.sequences, settings.batch_size, endless, steps

    def _inner_training_loop(self, *args: Any, **named: Any) -> Any:
        """Train, and let go of model, optimiser and data, whatever happens."""
        try:
            return super()._inner_training_loop(*args, **named)
        finally:
            if self.steering is not None:
                self.steering.close()
            if self.stream is not None:
                self.stream.close()

    def _run_epoch(self, *args: Any, **named: Any) -> None:
        """Train, unless the run that is resumed has come to its end."""
        if self.steered()[0].finished:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **named)  # type: ignore[no-untyped-call]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Make the steering and the scheduler that asks it."""
        assert self.optimizer is not None, "the Trainer makes the optimiser first"
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # before steering copies the optimiser
        self.epochs_told = 0
        self.told.clear()
        self.steering = Steering(
            self.model,
            getattr(self.optimizer, "optimizer", self.optimizer),
            self.settings,
            validate=self._validate if self.eval_dataset is not None else None,
            data=self.stream,
            meter=self._meter,
            ranks=ranks_of(self.args),
            on_decision=self.told.append,
        )
        self.steering.levers.alone = False
        self.lr_scheduler = SteeredSchedule(self.optimizer, self.steering)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _validate(self) -> float:
        """Return the loss on the first batches of the evaluation data, in nats/token."""
        if self._looked[0] is not self.eval_dataset:
            self._looked = self.eval_dataset, labelled_batches(self)
        levers = self.steered()[0].levers
        loss, items = 0.0, 0
        with torch.no_grad(), looking(self), levers.autocast("fp32"):
            for batch in self._looked[1]:
                count = int(self._get_num_items_in_batch([batch], self.args.device) or rows_of(batch))
                loss += count * float(self._mean_loss(self.model, batch))
                items += count
        return loss / items if items else math.nan

    def _mean_loss(self, model: nn.Module, batch: MicroBatch, items: Any = None) -> torch.Tensor:
        loss = self.compute_loss(model, dict(self._prepare_inputs(batch)), num_items_in_batch=items)
        assert isinstance(loss, torch.Tensor), "asked for no outputs"
        return loss

    # A step ----------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of the next optimiser step, as one."""
        steering, stream = self.steered()
        parts = stream.take(-(-steering.begin_step() // self.args.world_size))
        return [parts], self._get_num_items_in_batch(parts, device)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Put the micro-batches of a step through the model; gradients are exchanged with the last."""
        steering, rows, losses = self.steered()[0], inputs.rows, []
        self.rows = rows
        for part in inputs:
            items = self._items(part, num_items_in_batch)
            if steering.probe_wanted:
                few = first_sequences(part, steering.probe_sequences, rows_of(part))
                with looking(self):
                    steering.probe(lambda few=few: self._mean_loss(model, few))  # type: ignore[misc]
            self.current_gradient_accumulation_steps = rows / rows_of(part)
            last = part is inputs[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, items))
            steering.note_loss(losses[-1])
        return torch.stack(losses).sum()

    def _items(self, part: MicroBatch, items: Any) -> Any:
        """Return the items that the loss is to be divided by; `None` where it does not do that, and is weighed."""
        if self._divides is None and items is not None:
            with looking(self):
                self._divides = divides_by_items(self.model, lambda n: self._mean_loss(self.model, part, n), items)
            if self._divides is False:
                self.loss_is_scaled_for_ga = False
        return None if self._divides is False else items

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Return the context of a forward pass: the precision in force in training, float32 elsewhere."""
        stack = contextlib.ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        if self.steering is not None:
            training = self.model.training
            stack.enter_context(self.steering.levers.autocast(None if training else "fp32"))
        return stack

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        return self._norm

    def floating_point_ops(self, inputs: Any) -> int:
        """Return the operations of all micro-batches of a step."""
        parts = inputs if isinstance(inputs, Parts) else [inputs]
        return sum(super(SteeringMixin, self).floating_point_ops(part) for part in parts)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for part in inputs:
            super()._track_num_input_tokens(part)  # type: ignore[no-untyped-call]

    def end_step(self) -> None:
        """Take in the optimiser step that has been made."""
        self.steered()[0].end_step(torch.as_tensor(self._norm), self.rows * self.args.world_size)

    def _maybe_log_save_evaluate(self, *args: Any, **named: Any) -> None:
        """Tell of an epoch that has ended; log; evaluate and save off the clock."""
        steering, handler = self.steered()[0], self.callback_handler
        epochs = steering.sequences // self.epoch_sequences
        ended = epochs > self.epochs_told and not self.control.should_training_stop
        if ended:
            self.epochs_told = epochs
            self.control = handler.on_epoch_end(self.args, self.state, self.control)
        if self.control.should_evaluate or self.control.should_save:
            steering.readings.pause()
        super()._maybe_log_save_evaluate(*args, **named)
        steering.readings.go_on()
        if ended:
            self.control = handler.on_epoch_begin(self.args, self.state, self.control)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """Report the speed by what has been trained on."""
        whole = self.steered()[0].sequences * self.state.max_steps / max(self.state.global_step, 1)
        return super()._finalize_training(trial, whole, start_time)  # type: ignore[no-untyped-call]

    def steered(self) -> tuple[Steering, SampleStream]:
        """Return the steering and the data of a run that has begun."""
        assert self.steering is not None, "made with the scheduler"
        assert self.stream is not None, "made with the data loader"
        return self.steering, self.stream

    # Saving and going on ---------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        steering, stream = self.steered()
        state = {"steering": steering.state_dict(), "data": stream.state_dict(), "epochs": self.epochs_told}
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
        steering.load_state_dict(state["steering"])
        beginning = {"drawn": 0, "rest": None} if self.args.ignore_data_skip else {}
        stream.load_state_dict(state["data"] | beginning)
        self.epochs_told = state["epochs"]
        self.state.max_steps = self.estimated_steps()

    def _init_training_state(self, *args: Any, **named: Any) -> tuple[int, int]:
        """Leave the data's position to the stream, which knows it in sequences."""
        super()._init_training_state(*args, **named)
        return 0, 0

    def estimated_steps(self) -> int:
        """Return the steps at which the run ends if the batch stays."""
        steering, _ = self.steered()
        left = max(steering.end_sequences - steering.sequences, 0)
        return int(self.state.global_step) - (-left // steering.controls.batch_size)


class SteeredTrainer(SteeringMixin):
    """The Hugging Face Trainer under steering; `SteeringMixin` says how."""
