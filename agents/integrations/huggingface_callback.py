"""Steer a Hugging Face Trainer from a callback, where its class cannot be replaced. `SteeredTrainer` can do more.

    callback = SteeringCallback({"sequences": 100_000})
    trainer = Trainer(model, args, train_dataset=stream, callbacks=[callback])
    callback.trainer = trainer
    trainer.train()

The callback must know the Trainer only to switch the precision and to log decisions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from trainpilot.agents.integrations.huggingface_data import rows_of
except ImportError as error:
    raise ImportError("steering a Hugging Face Trainer needs accelerate: pip install accelerate") from error

from trainpilot.agents.integrations.huggingface_aligned import aligned_settings, has_length
from trainpilot.agents.integrations.huggingface_fit import Given, Plan, check_args, check_model, ranks_of, scalars
from trainpilot.agents.run_record import DecisionRecord
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.checkpoints import load_checkpoint, save_checkpoint
from trainpilot.llm_runtime.energy import EnergyMeter


class SteeringCallback(TrainerCallback):
    """Steers learning rate, masks and, where that is exact, batch and precision of a plain Trainer.

    * Learning rate: in force for every step, and the Trainer logs what was used. The callback puts its own function
      into the `lr_lambdas` of the Trainer's scheduler; a scheduler without them is refused.
    * Batch: only for data without a length (an endless `IterableDataset`), as a Trainer fixes the steps of an epoch at
      its beginning; else it stays. It takes powers of two of micro-batches, `gradient_accumulation_steps` at the start,
      and changes where the micro-batches done are a multiple of the largest. The budget is rounded down to that.
    * Precision: only if `trainer` is set before `train`.
    * Clipping: the Trainer tells no callback the gradient's norm, so `max_grad_norm` must be 0 and the callback clips
      by `gradient_clip`, 1 unless steering says otherwise.
    * The loss is what the model returns. For GPT-2 and others without a `loss_type` the Trainer divides it by one token
      too many in each sequence; `SteeredTrainer` puts that right.
    * Resuming is refused after a change of batch, as the Trainer would begin at the wrong data.

    Args:
        steering: `SteeringSettings`, or some of its fields.
        meter: Energy meter; by default the best one that the device has.
    """

    def __init__(self, steering: Given = None, *, meter: EnergyMeter | None = None) -> None:
        self.trainer: Trainer | None = None
        self.steering: Steering | None = None
        self._given, self._meter = steering, meter
        self._told: list[DecisionRecord] = []
        self._hooks: list[Any] = []
        self._rows = 0
        self._paused: tuple[dict[str, Any], float] | None = None

    # The beginning and the end ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Put steering into the run, or say why that cannot be exact."""
        self._let_go()
        plan, data = Plan.of(args), kw["train_dataloader"]
        self._unit, self._streams, self._rows = plan.unit, not has_length(data), 0
        settings, grain = aligned_settings(self._given, plan, args, data)
        self._check(args, kw["lr_scheduler"], kw["model"], settings)
        self.steering = Steering(
            kw["model"],
            getattr(kw["optimizer"], "optimizer", kw["optimizer"]),
            settings,
            grain=grain,
            meter=self._meter,
            ranks=ranks_of(args),
            on_decision=self._told.append,
        )
        self.steering.levers.alone = False
        if state.global_step:
            self._resume(args, state, plan)
        args.gradient_accumulation_steps = self.steering.controls.batch_size // self._unit
        self._schedule(kw["lr_scheduler"])
        self._watch(kw["model"], args)

    def _check(self, args: TrainingArguments, scheduler: Any, model: nn.Module, settings: SteeringSettings) -> None:
        check_args(args)
        check_model(model, settings)
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type must be one of linear, cosine, constant, constant_with_warmup and "
                f"warmup_stable_decay with SteeringCallback, got a {type(scheduler).__name__}"
            )
        if self.trainer is not None and not self.trainer._created_lr_scheduler:
            raise ValueError("optimizers must come without a scheduler, got a LambdaLR; pass (optimizer, None)")
        if len(settings.precisions) > 1 and self.trainer is None:
            raise ValueError(
                "precisions must be one, unless the callback knows the Trainer; set callback.trainer = trainer, got "
                + ", ".join(settings.precisions)
            )
        needed = settings.sequences // self._unit
        if self._streams and args.max_steps < needed:
            raise ValueError(
                f"max_steps must be at least {needed}, the budget in micro-batches, for data without a length, got "
                f"{args.max_steps}; steering ends the run"
            )

    def _schedule(self, scheduler: LambdaLR) -> None:
        """Have the Trainer's scheduler ask steering, for every parameter group."""
        steering = self._steered()

        def factor(_step: int) -> float:
            return steering.learning_rate / steering.levers.peak

        scheduler.lr_lambdas = [factor for _ in scheduler.lr_lambdas]

    def _watch(self, model: nn.Module, args: TrainingArguments) -> None:
        """See every forward pass in training, for its loss; probe before it where that is wanted."""

        def before(module: nn.Module, _: Any, inputs: dict[str, Any]) -> None:
            if module.training and self._steered().probe_wanted:
                self._probe(module, inputs)

        def after(module: nn.Module, _: Any, inputs: dict[str, Any], output: Any) -> None:
            if module.training and torch.is_grad_enabled():
                self._note(args, inputs, output)

        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
        if self.trainer is not None:
            self.trainer.compute_loss_context_manager = self._context  # type: ignore[method-assign]

    def _context(self) -> Any:
        steering = self._steered()
        return steering.levers.autocast() if steering.levers.model.training else contextlib.nullcontext()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Give the model back."""
        if self.steering is not None:
            args.gradient_accumulation_steps = self.steering.settings.batch_size // self._unit
        self._let_go()

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.trainer is not None:
            self.trainer.__dict__.pop("compute_loss_context_manager", None)
        if self.steering is not None:
            self.steering.close()

    # A step ----------------------------------------------------------------------------------------------------------

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Refuse a stream that has come to its end."""
        steering = self._steered()
        if self._streams and self._hooks and self._rows and not steering.finished:
            raise ValueError(
                f"train_dataset, a stream, must not end before the budget of {steering.settings.sequences} sequences, "
                f"it did after {steering.sequences}; repeat it, or lower sequences"
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Set the learning rate of the step."""
        steering = self._steered()
        self._go_on()
        self._rows = 0
        steering.begin_step()
        kw["lr_scheduler"]._last_lr = [group["lr"] for group in steering.levers.optimizer.param_groups]

    def _note(self, args: TrainingArguments, inputs: Mapping[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError("model must return its loss from the labels, got none; use SteeredTrainer")
        self._rows += rows_of({name: value for name, value in inputs.items() if value is not None})
        scaled = inputs.get("num_items_in_batch") is not None
        if scaled and args.average_tokens_across_devices:
            loss = loss * args.world_size
        self._steered().note_loss(loss.mean(), 1.0 if scaled else 1 / args.gradient_accumulation_steps)

    def _probe(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        alone = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
        with torch.autocast(self._steered().levers.device.type, enabled=False):
            self._steered().probe(lambda: model(**alone).loss)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Clip the gradient, and keep its norm."""
        steering = self._steered()
        clip = steering.settings.gradient_clip
        self._norm = nn.utils.clip_grad_norm_(steering.levers.parameters(), float("inf") if clip is None else clip)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        """Take the step in; at an interval's end, bring what is decided into force."""
        steering, sequences = self._steered(), self._rows * args.world_size
        if self._streams and sequences != self._unit * args.gradient_accumulation_steps:
            raise ValueError(
                f"train_dataset, a stream, must fill every batch, {self._unit * args.gradient_accumulation_steps} "
                f"sequences, got {sequences}; make it endless, or set dataloader_drop_last"
            )
        steering.end_step(self._norm, sequences)
        args.gradient_accumulation_steps = steering.controls.batch_size // self._unit
        if self._streams:
            left = max(steering.end_sequences - steering.sequences, 0)
            state.max_steps = state.global_step + 1 - (-left // steering.controls.batch_size)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> TrainerControl:
        """Tell of decisions, and end the run where its budget does."""
        steering, wanted = self._steered(), control.should_log
        for record in self._told:
            if self.trainer is not None:
                Trainer.log(self.trainer, scalars(record))
            else:
                state.log_history.append({**scalars(record), "step": state.global_step})
        self._told.clear()
        control.should_log = wanted
        if steering.finished:
            control.should_training_stop = True
        if control.should_evaluate or control.should_save:
            self._paused = steering.readings.state_dict(), steering.readings.clock()
        return control

    def _go_on(self) -> None:
        """Leave evaluating and saving out of the interval's time."""
        if self._paused is not None:
            readings, (kept, began) = self._steered().readings, self._paused
            readings.load_state_dict(kept)
            readings.evaluation_s += readings.clock() - began
            self._paused = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Take the Trainer's own validation loss."""
        loss = (kw.get("metrics") or {}).get("eval_loss")
        if self.steering is not None and loss is not None:
            self.steering.validation_loss = float(loss)

    # Saving and going on ---------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Write the state of steering into the checkpoint."""
        save_checkpoint(_file(args, state), {"steering": self._steered().state_dict()})

    def _resume(self, args: TrainingArguments, state: TrainerState, plan: Plan) -> None:
        steering, path = self._steered(), _file(args, state)
        content = load_checkpoint(path)
        if content is None:
            raise ValueError(f"resume_from_checkpoint must hold steering.pt, found none at {path}")
        steering.load_state_dict(content["steering"])
        at = state.global_step * steering.settings.batch_size
        if self._streams and (steering.sequences, steering.controls.batch_size) != (at, steering.settings.batch_size):
            raise ValueError(
                f"resume_from_checkpoint must be of a run whose batch has not changed, where the Trainer finds its "
                f"data again: it would go on at sequence {at}, not {steering.sequences}; use SteeredTrainer"
            )

    def _steered(self) -> Steering:
        assert self.steering is not None, "made when training begins"
        return self.steering


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    name = "steering.pt" if args.world_size == 1 else f"steering_{args.process_index}.pt"
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / name
