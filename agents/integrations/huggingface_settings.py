"""Derive steering settings from the arguments of a Hugging Face Trainer, and refuse what cannot be steered exactly."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.integrations.common import Accumulation, GivenSettings, merge_settings, settings_fields
from trainpilot.agents.steering.settings import ResolvedSettings, SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.agents.steering.torch_schedules import schedule_of
from trainpilot.llm_runtime.schedules import FactorOf, ScheduleName

_SCHEDULES: dict[str, ScheduleName] = {
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
"""The Trainer's schedules that have a name here, if they have no options. All others are taken as they are."""
_FROM_LOSSES = ("reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True, kw_only=True)
class RequestedRun(Accumulation):
    """Batches and length of a run, as the user wrote them into the Trainer's arguments."""

    max_steps: int
    """Optimiser steps; 0 or less where the epochs count."""
    epochs: float
    """Passes over the data."""

    @classmethod
    def of(cls, args: TrainingArguments) -> RequestedRun:
        """Read it from the arguments."""
        return cls(
            micro_batch_size=args.per_device_train_batch_size,
            world_size=args.world_size,
            accumulate=args.gradient_accumulation_steps,
            max_steps=args.max_steps,
            epochs=args.num_train_epochs,
        )


def check_args(args: TrainingArguments) -> None:
    """Raise `ValueError` for arguments that steering would silently ignore, or that make exact steering impossible."""
    if args.fp16:
        raise ValueError("fp16 must be off under steering, which has no loss scaler, got True; take bf16=True")
    if args.bf16:
        raise ValueError(
            "bf16 must be off, as the Trainer has fixed it for good, got True; give steering precisions=('bf16',), or "
            "use SteeredTrainer or SteeringMixin, which take bf16=True"
        )
    for name, instead in (
        ("torch_compile", "a change of batch or precision would compile anew for half a minute"),
        ("deepspeed", "use DistributedDataParallel, or your own loop with FSDP2"),
        ("fsdp", "use DistributedDataParallel, or your own loop with FSDP2"),
        ("auto_find_batch_size", "set per_device_train_batch_size, the micro-batch"),
        ("enable_jit_checkpoint", "it would save in the midst of a step; save by save_steps"),
    ):
        if getattr(args, name, None):
            raise ValueError(f"{name} must be off under steering, got {getattr(args, name)!r}; {instead}")
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError("train_sampling_strategy must be another, as it fixes the batch, got 'batch_rebalance'")


def check_trainer(trainer: Trainer) -> None:
    """Raise `ValueError` for a Trainer that was set up in a way that cannot be steered."""
    check_args(trainer.args)
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"a process must have one GPU, got {trainer.args.n_gpu}; use torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    if trainer.accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision of the Accelerator must be 'no', got {trainer.accelerator.mixed_precision!r}; "
            "offer it to steering by precisions=('fp32', 'bf16')"
        )


def check_model(model: nn.Module, settings: SteeringSettings) -> None:
    """Raise `ValueError` for a model to which the controls cannot be applied."""
    odd = {p.dtype for p in model.parameters() if p.requires_grad and p.is_floating_point()} - {torch.float32}
    if odd:
        raise ValueError(
            f"trainable weights must be float32, got {', '.join(sorted(map(str, odd)))}; load the model with "
            "dtype=torch.float32, bf16 then comes from autocast"
        )
    if settings.pruning != "none" and hasattr(model, "peft_config"):
        raise ValueError(
            f"pruning must be 'none' under PEFT, whose adapters are added to the weights, got {settings.pruning!r}"
        )


def in_bf16(given: GivenSettings) -> dict[str, Any]:
    """Return the given fields for arguments with `bf16=True`: the run starts in bf16, and stays in it by default.

    Raises:
        ValueError: the precisions that are given begin with another one.
    """
    wanted = settings_fields(given)
    precisions = tuple(wanted.get("precisions", ("fp32",)))
    if precisions == ("fp32",):  # the default
        precisions = ("bf16",)
    if precisions[:1] != ("bf16",):
        raise ValueError(
            f"precisions must begin with bf16 where the Trainer's arguments have bf16=True, got "
            f"{', '.join(precisions)}; put bf16 first, or leave bf16=True out"
        )
    return wanted | {"precisions": precisions}


def settings_for(
    given: GivenSettings,
    requested: RequestedRun,
    args: TrainingArguments,
    dataset: Any,
    scheduler: LRScheduler | None = None,
) -> SteeringSettings:
    """Return the settings of a run: the given ones, and the rest from the arguments and the data.

    Args:
        given: Settings, or some of their fields.
        requested: Batches and length of the run.
        args: The Trainer's arguments.
        dataset: The training data.
        scheduler: One that came with the optimiser; it takes the place of `lr_scheduler_type`.

    Raises:
        ValueError: what is given contradicts the arguments, or the end of the run is not known.
    """
    wanted = merge_settings(
        given,
        requested,
        batch_rule="per_device_train_batch_size x gradient_accumulation_steps x processes",
        clip=float(args.max_grad_norm) if args.max_grad_norm else None,
        clip_rule="the Trainer's max_grad_norm",
    )
    batch_size = wanted["batch_size"]
    wanted["sequences"] = _sequences(wanted.get("sequences"), batch_size, requested, args, dataset)
    if wanted.get("base_schedule") is None:
        wanted["base_schedule"] = _base_schedule(args, math.ceil(wanted["sequences"] / batch_size), scheduler)
    elif scheduler is not None:
        name = type(scheduler).__name__
        warnings.warn(f"base schedule: the base_schedule that is given, not the {name} of the optimiser", stacklevel=3)
    if "sequence_length" not in wanted:
        wanted["sequence_length"] = _length(dataset)
    settings = SteeringSettings(**wanted)
    if args.process_index == 0:
        _tell_schedule(settings)
    return settings


def _tell_schedule(settings: SteeringSettings) -> None:
    """Say it where the schedule is another one than the arguments may have meant."""
    base = ResolvedSettings.of(settings).base
    if settings.base_schedule is None and isinstance(base, BaseSchedule):
        warnings.warn(
            f"base schedule: {base.schedule} with {base.warmup_share:.0%} warm-up, steering's own, as "
            "lr_scheduler_type and the warm-up are at the Trainer's defaults; for linear without warm-up give "
            "steering={'base_schedule': BaseSchedule(schedule='linear', warmup_share=0)}",
            stacklevel=4,
        )


def _sequences(
    given: int | None, batch_size: int, requested: RequestedRun, args: TrainingArguments, dataset: Any
) -> int:
    if requested.max_steps > 0:
        asked = requested.max_steps * batch_size
        if given not in (None, asked):
            raise ValueError(
                f"sequences of steering must be max_steps x batch = {asked}, got {given}; leave one of the two out"
            )
        return asked
    if given is not None:
        return given
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "sequences, the budget, must be given for a train_dataset without a length, got None; "
            "set steering={'sequences': ...}, or max_steps"
        )
    whole = len(dataset) // requested.unit * requested.unit
    return round(requested.epochs * (whole if args.dataloader_drop_last else len(dataset)))


def _base_schedule(
    args: TrainingArguments, steps: int, scheduler: LRScheduler | None
) -> BaseSchedule | FactorOf | None:
    """Return the schedule that the arguments name; `None`, the policy's own, with the Trainer's defaults."""
    if scheduler is not None:
        return schedule_of(scheduler, steps)
    name, warmup = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)), args.get_warmup_steps(steps)
    if name == "linear" and not warmup:
        return None
    if name in _SCHEDULES and not args.lr_scheduler_kwargs:
        return BaseSchedule(schedule=_SCHEDULES[name], warmup_share=min(warmup / steps, 0.99))
    if name in _FROM_LOSSES:
        raise ValueError(
            f"lr_scheduler_type must follow from the number of steps under steering, got {name!r}, which follows from "
            "losses; take another, or give steering a base_schedule"
        )
    options: Any = args.lr_scheduler_kwargs or {}
    try:
        scheduler = get_scheduler(
            name,
            torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(options),
        )
    except TypeError as error:
        raise ValueError(
            f"lr_scheduler_kwargs must be options of lr_scheduler_type {name!r}, got {options}: {error}"
        ) from error
    return schedule_of(scheduler, steps)


MEASURED_ROWS = 64
"""Rows whose lengths are an estimate for all."""


def _length(dataset: Any) -> int:
    """Return the mean tokens of rows that lie evenly over the data; 1 where reading them would use up data."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset)):
        return 1
    count = min(len(dataset), MEASURED_ROWS)
    with torch.random.fork_rng(devices=[]):  # reading a row may draw random numbers
        rows = [dataset[index * len(dataset) // count] for index in range(count)]
    lengths = [len(row["input_ids"]) for row in rows if isinstance(row, Mapping) and "input_ids" in row]
    return max(round(sum(lengths) / len(lengths)), 1) if lengths else 1


def without_end(args: TrainingArguments) -> TrainingArguments:
    """Return the arguments of a loop that steering ends, and that gets all micro-batches of a step as one item.

    The precision is steering's, so the Accelerator must not fix it.
    """
    args = copy.copy(args)
    if args.bf16:
        args.bf16, args.mixed_precision = False, "no"
    args.gradient_accumulation_steps = 1
    args.max_steps = args.max_steps if args.max_steps > 0 else sys.maxsize  # data without a length need one
    return args


def epoch_sequences(loader: Any, args: TrainingArguments) -> int | None:
    """Return the sequences of an epoch over all processes, where the data have a length."""
    try:
        batches, sequences = len(loader), len(loader.dataset)
    except TypeError:
        return None
    unit = args.per_device_train_batch_size * args.world_size
    short = args.world_size == 1 and (batches - 1) * unit < sequences < batches * unit
    return sequences if short else batches * unit  # several processes fill the last batch up


def drawn(requested: RequestedRun, args: TrainingArguments, loader: Any) -> int:
    """Return the sequences that a Trainer trains on; the last step of an epoch may be short."""
    steps = max(-(-len(loader) // requested.accumulate), 1)
    epochs, rest = divmod(
        requested.max_steps if requested.max_steps > 0 else math.ceil(requested.epochs * steps), steps
    )
    epoch = epoch_sequences(loader, args) or len(loader) * requested.unit
    return epochs * epoch + rest * requested.batch_size


def has_length(loader: Any) -> bool:
    """Return whether a data loader knows its length."""
    try:
        len(loader)
    except TypeError:
        return False
    return True


class SteeredSchedule(LRScheduler):
    """Learning-rate scheduler that takes its rates from `Steering`, so that the Trainer logs the rates in use."""

    def __init__(self, optimizer: torch.optim.Optimizer, steering: Steering) -> None:
        self.steering = steering
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rates of the next step, group by group, in the ratios that they had at the start."""
        rate, peak = self.steering.learning_rate, self.steering.peak_learning_rate
        return [rate * (float(base) / peak) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values only; the learning rate itself is part of the state of `Steering`."""
        return {name: value for name, value in super().state_dict().items() if name != "steering"}


def steering_file(args: TrainingArguments, folder: str | Path) -> Path:
    """Return the file in a checkpoint that holds the steering state of this process."""
    return Path(folder) / ("steering.pt" if args.world_size == 1 else f"steering_{args.process_index}.pt")
