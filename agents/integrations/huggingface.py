"""Steer the Hugging Face Trainer: exact batches, learning rate, precision, masks, probe, saving and resuming.

    trainer = SteeredTrainer(model, args, train_dataset=data, steering={"precisions": ("fp32", "bf16")})
    trainer.train()

`per_device_train_batch_size` is the micro-batch; how many of them make an optimiser step is steering's to say. It
takes `max_steps`, `num_train_epochs` and `gradient_accumulation_steps` as they hold at the start for the budget in
sequences, and `lr_scheduler_type` and warm-up, where they are not the Trainer's own defaults, for the base schedule.
The base schedule of the policy holds otherwise. For another Trainer, put the mixin in front of it:

    class SteeredSFTTrainer(SteeringMixin, SFTTrainer): ...
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from transformers import Trainer, TrainingArguments
    from transformers.loss.loss_utils import ForCausalLMLoss

    from trainpilot.agents.integrations.huggingface_data import MicroBatch, Parts, SampleStream, rows_of
except ImportError as error:
    raise ImportError(
        "steering a Hugging Face Trainer needs transformers and accelerate: pip install accelerate"
    ) from error

from trainpilot.agents.integrations.huggingface_fit import (
    Given,
    Plan,
    SteeredSchedule,
    check_args,
    check_model,
    check_trainer,
    epoch_sequences,
    ranks_of,
    settings_for,
    without_end,
)
from trainpilot.agents.integrations.huggingface_steps import AfterStep
from trainpilot.agents.run_record import DecisionRecord
from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.checkpoints import load_checkpoint, save_checkpoint
from trainpilot.llm_runtime.energy import EnergyMeter
from trainpilot.llm_runtime.precision import autocast

VALIDATION_BATCHES = 8
"""Batches of the evaluation data that the validation loss is measured on."""


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
        self._looked: list[MicroBatch] | None = None
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
        if getattr(self.model, "loss_function", None) is ForCausalLMLoss:
            self._loss_shifts_labels = True  # GPT-2 says nothing of its loss, and the first label would be counted
        self.add_callback(AfterStep(self))

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

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Make the steering and the scheduler that asks it."""
        if self.steering is not None:
            self.steering.close()
        assert self.optimizer is not None, "the Trainer makes the optimiser first"
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
        if self._looked is None:
            self._looked = self._first_batches()
        self.model.eval()
        loss, items = 0.0, 0
        with torch.no_grad(), self._looking(), autocast("fp32", self.args.device):
            for batch in self._looked:
                count = int(self._get_num_items_in_batch([batch], self.args.device) or rows_of(batch))
                loss += count * float(self._mean_loss(self.model, batch))
                items += count
        return loss / max(items, 1)

    def _first_batches(self) -> list[MicroBatch]:
        names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else [None]
        batches = []
        with torch.random.fork_rng(devices=[]):
            for batch in self.get_eval_dataloader(names[0]):
                batches.append(dict(batch))
                if len(batches) == VALIDATION_BATCHES:
                    break
        return batches

    def _mean_loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        loss = self.compute_loss(model, dict(self._prepare_inputs(batch)))
        assert isinstance(loss, torch.Tensor), "asked for no outputs"
        return loss

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Keep what is only looked at out of the figures that a Trainer gathers of itself."""
        kept = copy.deepcopy(getattr(self, "_metrics", None))
        try:
            yield
        finally:
            if kept is not None:
                self._metrics = kept

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
            if steering.probe_wanted:
                with self._looking():
                    steering.probe(lambda part=part: self._mean_loss(model, part))  # type: ignore[misc]
            self.current_gradient_accumulation_steps = rows / rows_of(part)
            last = part is inputs[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
            steering.note_loss(losses[-1])
        return torch.stack(losses).sum()

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Return the context of a forward pass: the precision in force in training, float32 elsewhere."""
        stack = contextlib.ExitStack()
        if self.steering is not None:
            training = self.model.training
            stack.enter_context(self.steering.levers.autocast() if training else autocast("fp32", self.args.device))
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
        """Log, evaluate and save off the clock."""
        readings = self.steered()[0].readings
        if not (self.control.should_evaluate or self.control.should_save):
            super()._maybe_log_save_evaluate(*args, **named)
            return
        began, state = readings.clock(), readings.state_dict()
        super()._maybe_log_save_evaluate(*args, **named)
        readings.load_state_dict(state)
        readings.evaluation_s += readings.clock() - began

    def steered(self) -> tuple[Steering, SampleStream]:
        """Return the steering and the data of a run that has begun."""
        assert self.steering is not None, "made with the scheduler"
        assert self.stream is not None, "made with the data loader"
        return self.steering, self.stream

    # Saving and going on ---------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        steering, stream = self.steered()
        save_checkpoint(self._file(output_dir), {"steering": steering.state_dict(), "data": stream.state_dict()})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        steering, stream = self.steered()
        path = self._file(checkpoint)
        if (state := load_checkpoint(path)) is None:
            raise ValueError(
                f"resume_from_checkpoint must hold {path.name}, got {checkpoint} without it; it comes from a run that "
                "was not steered, or had another number of processes, or save_only_model"
            )
        steering.load_state_dict(state["steering"])
        stream.load_state_dict(state["data"])
        self.state.max_steps = self.estimated_steps()

    def _file(self, folder: str) -> Path:
        world, rank = self.args.world_size, self.args.process_index
        return Path(folder) / ("steering.pt" if world == 1 else f"steering_{rank}.pt")

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
