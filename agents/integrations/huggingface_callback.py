"""Steer the Trainers of TRL, Axolotl and others whose class you cannot replace; `SteeredTrainer` can do more elsewhere.

    callback = SteeringCallback({"sequences": 100_000})
    trainer = Trainer(model, args, train_dataset=stream, callbacks=[callback])
    callback.trainer = trainer
    trainer.train()

The callback needs the Trainer only to switch the precision and to log decisions. It changes the batch size only where
the accumulation of a plain Trainer can change exactly, and refuses the rest.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("steering a Hugging Face Trainer needs accelerate: pip install accelerate") from error

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.integrations.common import GivenSettings, ranks_of, settings_fields
from trainpilot.agents.integrations.huggingface import divides_by_items, log_decisions, log_off_screen
from trainpilot.agents.integrations.huggingface_cadence import Cadence, correct
from trainpilot.agents.integrations.huggingface_data import rows_of
from trainpilot.agents.integrations.huggingface_settings import (
    RequestedRun,
    check_args,
    check_model,
    drawn,
    epoch_sequences,
    has_length,
    settings_for,
    steering_file,
)
from trainpilot.agents.steering.loader_batches import first_sequences
from trainpilot.agents.steering.settings import ResolvedSettings, SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.config import batch_limits
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.files import load_checkpoint, save_checkpoint


class SteeringCallback(TrainerCallback):
    """For Trainers whose class you cannot replace: steers learning rate, masks and, where exact, batch and precision.

    * Learning rate: it holds in every step, and the Trainer logs the rate in use. The callback puts its own function
      into the `lr_lambdas` of the Trainer's scheduler; a scheduler without them is refused.
    * Batch: it changes only for data without a length (an endless `IterableDataset`), because a Trainer fixes the steps
      of an epoch at its beginning. A batch is a power of two of micro-batches, `gradient_accumulation_steps` at the
      start, and changes where the micro-batches done are a multiple of the largest. The budget is rounded down to that.
    * Precision: it changes only if `trainer` is set before `train`.
    * Clipping: a Trainer passes the gradient's norm to no callback, so `max_grad_norm` must be 0, and the callback
      clips to `gradient_clip`, by default 1. The Trainer then measures the norm once more, unless `trainer` is set.
    * Loss: it is the one that the model returns. Where several micro-batches make a step, the model must use
      `num_items_in_batch` or not accept it. For GPT-2 and others without a `loss_type` the Trainer divides the loss by
      one token too many in each sequence; `SteeredTrainer` corrects that.
    * Logging, evaluating and saving: `logging_steps` and the like count steps at the starting batch.
    * Exceptions: the Trainer stays as it is then; the next `train` begins with the Trainer's original settings.
    * Resuming: it is refused after a change of batch, because the Trainer would resume at the wrong data.

    Args:
        steering: `SteeringSettings`, or some of its fields.
        meter: Energy meter; by default the best one that the device has.
    """

    def __init__(self, steering: GivenSettings = None, *, meter: EnergyMeter | None = None) -> None:
        self.trainer: Trainer | None = None
        self.steering: Steering | None = None
        self._given, self._meter = steering, meter
        self._unlogged: list[DecisionRecord] = []
        self._undo = contextlib.ExitStack()
        self._rows = 0
        self._losses: list[tuple[torch.Tensor, bool]] = []
        self._norm: torch.Tensor | None = None
        self._divides: bool | None = None

    # The beginning and the end ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Take control of the run, or raise if that cannot be exact."""
        self._undo.close()
        requested, data = RequestedRun.of(args), kw["train_dataloader"]
        self._unit, self._streams, self._rows = requested.unit, not has_length(data), 0
        self._unlogged.clear()
        settings, grain = aligned_settings(self._given, requested, args, data)
        check_model(kw["model"], settings)
        check_plain(self.trainer, kw["lr_scheduler"], args, requested, settings, streams=self._streams)
        self.steering = Steering(
            kw["model"],
            kw["optimizer"],
            settings,
            grain=grain,
            meter=self._meter,
            ranks=ranks_of(args.world_size),
            on_decision=self._unlogged.append,
        )
        self.steering.expect_external_scheduler()
        self._undo.callback(self.steering.close)
        self._undo.callback(setattr, args, "gradient_accumulation_steps", requested.accumulate)
        if state.global_step:
            self._resume(args, state)
        args.gradient_accumulation_steps = self.steering.controls.batch_size // self._unit
        self._schedule(kw["lr_scheduler"])
        self._watch(kw["model"], args)

    def _schedule(self, scheduler: LambdaLR) -> None:
        """Make the Trainer's scheduler take the learning rate of every parameter group from steering."""
        steering = self._steered()

        def factor(_step: int) -> float:
            return steering.learning_rate / steering.peak_learning_rate

        self._undo.callback(setattr, scheduler, "lr_lambdas", scheduler.lr_lambdas)
        scheduler.lr_lambdas = [factor for _ in scheduler.lr_lambdas]

    def _watch(self, model: nn.Module, args: TrainingArguments) -> None:
        """Hook into the forward passes of training, to read their losses and to probe before them where that is due."""

        def before(module: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
            if module.training:
                self._check_loss(module, inputs, args)
                if self._steered().probe_wanted:
                    self._probe(module, inputs)

        def after(module: nn.Module, _: Any, inputs: dict[str, Any], output: Any) -> None:
            if module.training and torch.is_grad_enabled():
                self._note(args, inputs, output)

        self._undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._undo.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        if self.trainer is not None:
            self._undo.callback(self.trainer.__dict__.pop, "compute_loss_context_manager", None)
            self.trainer.compute_loss_context_manager = partial(  # type: ignore[method-assign]
                self._context, model, self.trainer.compute_loss_context_manager
            )
            if getattr(type(self.trainer), "_get_grad_norm", None) is Trainer._get_grad_norm:
                self._undo.callback(self.trainer.__dict__.pop, "_get_grad_norm", None)
                self.trainer._get_grad_norm = self._clip  # type: ignore[method-assign]

    def _context(self, model: nn.Module, original: Callable[[], Any]) -> contextlib.ExitStack:
        """Return the Trainer's own context of a forward pass, with the controls' precision in training."""
        stack = contextlib.ExitStack()
        stack.enter_context(original())
        if model.training:
            stack.enter_context(self._steered().autocast())
        return stack

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Give model, optimiser and arguments back."""
        self._undo.close()

    # A step ----------------------------------------------------------------------------------------------------------

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Raise if a stream has ended before the budget."""
        steering = self._steered()
        if self._streams and self._rows and not steering.finished:
            raise ValueError(
                f"train_dataset, a stream, must not end before the budget of {steering.settings.sequences} sequences, "
                f"it did after {steering.sequences}; repeat it, or lower sequences"
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Set the learning rate of the step."""
        steering = self._steered()
        steering.resume()
        self._rows, self._losses, self._norm = 0, [], None
        steering.begin_step()
        kw["lr_scheduler"]._last_lr = [group["lr"] for group in kw["optimizer"].param_groups]

    def _check_loss(self, model: nn.Module, inputs: Mapping[str, Any], args: TrainingArguments) -> None:
        """Raise for a model whose losses the Trainer would add up over the micro-batches instead of averaging."""
        several, items = self._streams or args.gradient_accumulation_steps > 1, inputs.get("num_items_in_batch")
        if self._divides is not None or items is None or not (several or args.world_size > 1):
            return
        self._divides = divides_by_items(model, lambda n: _loss_of(model(**{**inputs, "num_items_in_batch": n})), items)
        if self._divides is False:
            raise ValueError(
                f"model must use num_items_in_batch where several micro-batches make a step, {type(model).__name__} "
                "accepts it and does not; set model.accepts_loss_kwargs = False before making the Trainer, or use "
                "SteeredTrainer"
            )

    def _note(self, args: TrainingArguments, inputs: Mapping[str, Any], output: Any) -> None:
        loss = _loss_of(output)
        self._rows += _rows_of(inputs)
        scaled = inputs.get("num_items_in_batch") is not None
        if scaled and args.average_tokens_across_devices:
            loss = loss * args.world_size
        self._losses.append((loss.detach().mean(), scaled))

    def _probe(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        steering, alone = self._steered(), {name: v for name, v in inputs.items() if name != "num_items_in_batch"}
        few = first_sequences(alone, steering.probe_sequences, _rows_of(alone))
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            steering.probe(lambda: _loss_of(model(**few)))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Clip the gradient, unless the Trainer's own call has done so before."""
        if self._norm is None:
            self._clip()

    def _clip(self, _model: nn.Module | None = None, grad_norm: Any = None) -> torch.Tensor:
        """Clip the gradient; keep and return its norm before."""
        self._norm = self._steered().clip_gradients()
        self._steered().drop_lost_gradients(self._norm)
        return self._norm

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Record the step; at an interval's end, apply the decision."""
        steering, sequences = self._steered(), self._rows * args.world_size
        if self._streams and sequences != self._unit * args.gradient_accumulation_steps:
            raise ValueError(
                f"train_dataset, a stream, must fill every batch, {self._unit * args.gradient_accumulation_steps} "
                f"sequences, got {sequences}; make it endless, or set dataloader_drop_last"
            )
        for loss, scaled in self._losses:
            steering.note_loss(loss, 1.0 if scaled else 1 / len(self._losses))
        assert self._norm is not None, "clipped before the step"
        steering.end_step(self._norm, sequences)
        args.gradient_accumulation_steps = steering.controls.batch_size // self._unit
        if self._streams:
            left = max(steering.end_sequences - steering.sequences, 0)
            state.max_steps = state.global_step + 1 - (-left // steering.controls.batch_size)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> TrainerControl:
        """Log decisions, and end the run at the end of its budget."""

        def write(values: dict[str, float]) -> None:
            if self.trainer is not None:
                log_off_screen(self.trainer, values)
            else:
                state.log_history.append({**values, "step": state.global_step})

        if self._streams:
            correct(Cadence(self._steered(), self._rows * args.world_size), args, state, control)
        log_decisions(self._unlogged, write, control)
        if self._steered().finished:
            control.should_training_stop = True
        self._pause(control)
        return control

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Stop the clock for evaluating and saving at the end of an epoch."""
        self._pause(control)

    def _pause(self, control: TrainerControl) -> None:
        """Stop the clock for evaluating and saving; the next step starts it again."""
        if control.should_evaluate or control.should_save:
            self._steered().pause()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Record the Trainer's own validation loss."""
        loss = (kw.get("metrics") or {}).get("eval_loss")
        if self.steering is not None and loss is not None:
            self.steering.validation_loss = float(loss)

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Write the steering state into the checkpoint."""
        save_checkpoint(_file(args, state), {"steering": self._steered().state_dict()})

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        steering, path = self._steered(), _file(args, state)
        content = load_checkpoint(path)
        if content is None:
            raise ValueError(f"resume_from_checkpoint must hold steering.pt, found none at {path}")
        steering.load_state_dict(content.get("steering", {}))
        at = state.global_step * steering.settings.batch_size
        if self._streams and (steering.sequences, steering.controls.batch_size) != (at, steering.settings.batch_size):
            raise ValueError(
                f"resume_from_checkpoint must be of a run whose batch has not changed, where the Trainer finds its "
                f"data again: it would go on at sequence {at}, not {steering.sequences}; use SteeredTrainer"
            )
        if steering.finished and state.global_step < state.max_steps:
            raise ValueError(
                f"resume_from_checkpoint must be of a run that steering has not ended, it did at step "
                f"{state.global_step}, where the Trainer would go on to {state.max_steps}; use SteeredTrainer"
            )

    def _steered(self) -> Steering:
        assert self.steering is not None, "on_train_begin makes it"
        return self.steering


def aligned_settings(
    given: GivenSettings, requested: RequestedRun, args: TrainingArguments, loader: Any
) -> tuple[SteeringSettings, int]:
    """Return the settings of a run of a plain Trainer, and its grain: decisions and the end fall on its multiples.

    Raises:
        ValueError: the given settings cannot be followed exactly.
    """
    wanted = settings_fields(given)
    if wanted.get("budget") is not None:
        raise ValueError(
            f"budget must be in sequences with SteeringCallback, whose Trainer counts steps, got {wanted['budget']}; "
            "use SteeredTrainer"
        )
    clip = wanted.pop("gradient_clip", SteeringSettings.gradient_clip)
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm must be 0 with SteeringCallback, which clips itself, by gradient_clip={clip} of its "
            f"settings, got {args.max_grad_norm}; give TrainingArguments max_grad_norm=0"
        )
    if has_length(loader):
        most = drawn(requested, args, loader)
        wanted["epoch_sequences"] = wanted.get("epoch_sequences") or epoch_sequences(loader, args)
        wanted["sequences"] = asked = wanted.get("sequences") or most
        if asked > most:
            raise ValueError(
                f"sequences must be at most {most}, all that the Trainer draws in its steps, got {asked}; "
                "raise max_steps or num_train_epochs"
            )
        settings = settings_for(wanted, replace(requested, max_steps=0), args, loader.dataset)
        return _fixed(replace(settings, gradient_clip=clip), requested), 1
    # for data without a length max_steps is only an upper bound
    settings = settings_for(wanted, replace(requested, max_steps=0), args, None)
    return _in_powers_of_two(replace(settings, gradient_clip=clip), requested)


def _fixed(settings: SteeringSettings, requested: RequestedRun) -> SteeringSettings:
    """Return settings under which the batch size stays."""
    batch_size = requested.batch_size
    if settings.batch_size != batch_size:
        raise ValueError(
            f"batch_size must be per_device_train_batch_size x gradient_accumulation_steps x processes = {batch_size} "
            f"with SteeringCallback, got {settings.batch_size}"
        )
    if {settings.min_batch_size, settings.max_batch_size} - {None, batch_size}:
        warnings.warn("the batch stays as it is: SteeringCallback changes it for an endless stream only", stacklevel=4)
    return replace(settings, min_batch_size=batch_size, max_batch_size=batch_size)


def _in_powers_of_two(settings: SteeringSettings, requested: RequestedRun) -> tuple[SteeringSettings, int]:
    """Return settings whose batches are powers of two of micro-batches, and the largest of them."""
    start, accumulate = requested.batch_size, requested.accumulate
    if settings.batch_size != start or accumulate & (accumulate - 1):
        raise ValueError(
            "gradient_accumulation_steps must be a power of two and agree with batch_size for SteeringCallback, got "
            f"{accumulate} micro-batches of {requested.unit} and batch_size {settings.batch_size}"
        )
    share = settings.known_sequences() // ResolvedSettings.of(settings).decisions
    smallest_offered, largest_offered = batch_limits(start, share)
    most = min(settings.max_batch_size or largest_offered, share)
    least = settings.min_batch_size or smallest_offered
    grain = smallest = start
    while 2 * grain <= most:
        grain *= 2
    while smallest % (2 * requested.unit) == 0 and smallest // 2 >= least:
        smallest //= 2
    sequences = settings.known_sequences() // grain * grain
    return replace(settings, sequences=sequences, min_batch_size=smallest, max_batch_size=grain), grain


def check_plain(
    trainer: Trainer | None,
    scheduler: Any,
    args: TrainingArguments,
    requested: RequestedRun,
    settings: SteeringSettings,
    *,
    streams: bool,
) -> None:
    """Raise `ValueError` for a Trainer that a callback cannot steer exactly; `trainer` is None if unknown."""
    check_args(args)
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            "lr_scheduler_type must follow from the number of steps with SteeringCallback, got a "
            f"{type(scheduler).__name__}; take linear or cosine, for instance"
        )
    if trainer is not None and not trainer._created_lr_scheduler:
        raise ValueError("optimizers must come without a scheduler, got a LambdaLR; pass (optimizer, None)")
    if len(settings.precisions) > 1 and trainer is None:
        raise ValueError(
            "precisions must be one, unless the callback knows the Trainer; set callback.trainer = trainer, got "
            + ", ".join(settings.precisions)
        )
    needed = settings.known_sequences() // requested.unit
    if streams and args.max_steps < needed:
        raise ValueError(
            f"max_steps must be at least {needed}, the budget in micro-batches, for data without a length, got "
            f"{args.max_steps}; steering ends the run"
        )


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    return steering_file(args, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def _rows_of(inputs: Mapping[str, Any]) -> int:
    return rows_of({name: value for name, value in inputs.items() if value is not None})


def _loss_of(output: Any) -> torch.Tensor:
    loss: torch.Tensor | None = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError("model must return its loss from the labels, got none; use SteeredTrainer")
    return loss
