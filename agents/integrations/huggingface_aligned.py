"""Decide only where the accumulation of a plain Hugging Face Trainer can change exactly, and refuse the rest."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from trainpilot.agents.bundle import PolicyBundle, policy_path
from trainpilot.agents.integrations.huggingface_fit import (
    Given,
    Plan,
    check_args,
    epoch_sequences,
    fields_of,
    settings_for,
)
from trainpilot.agents.steering.limits import BATCH_RANGE
from trainpilot.agents.steering.plan import DECISIONS
from trainpilot.agents.steering.settings import SteeringSettings


def aligned_settings(given: Given, plan: Plan, args: TrainingArguments, loader: Any) -> tuple[SteeringSettings, int]:
    """Return the settings of a run that a plain Trainer makes, and its grain.

    Raises:
        ValueError: what is given cannot be held exactly.
    """
    wanted = fields_of(given)
    clip = wanted.pop("gradient_clip", SteeringSettings.gradient_clip)
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm must be 0 with SteeringCallback, which clips by gradient_clip={clip} itself, "
            f"got {args.max_grad_norm}"
        )
    if has_length(loader):
        most = _drawn(plan, args, loader)
        wanted["sequences"] = asked = wanted.get("sequences") or most
        if asked > most:
            raise ValueError(
                f"sequences must be at most {most}, all that the Trainer draws in its steps, got {asked}; "
                "raise max_steps or num_train_epochs"
            )
        settings = settings_for(wanted, replace(plan, max_steps=0), args, loader.dataset)
        return _fixed(replace(settings, gradient_clip=clip), plan), 1
    # there max_steps is no more than a bound
    settings = settings_for(wanted, replace(plan, max_steps=0), args, None)
    return _in_powers_of_two(replace(settings, gradient_clip=clip), plan)


def _drawn(plan: Plan, args: TrainingArguments, loader: Any) -> int:
    """Return the sequences that a Trainer draws in a run; the last step of an epoch may be short."""
    steps = max(-(-len(loader) // plan.accumulate), 1)
    epochs, rest = divmod(plan.max_steps if plan.max_steps > 0 else math.ceil(plan.epochs * steps), steps)
    epoch = epoch_sequences(loader, args) or len(loader) * plan.unit
    return epochs * epoch + rest * plan.unit * plan.accumulate


def has_length(loader: Any) -> bool:
    """Return whether a data loader knows its length."""
    try:
        len(loader)
    except TypeError:
        return False
    return True


def _fixed(settings: SteeringSettings, plan: Plan) -> SteeringSettings:
    """Return settings under which the batch stays."""
    batch_size = plan.unit * plan.accumulate
    if settings.batch_size != batch_size:
        raise ValueError(
            f"batch_size must be per_device_train_batch_size x gradient_accumulation_steps x processes = {batch_size} "
            f"with SteeringCallback, got {settings.batch_size}"
        )
    if {settings.min_batch_size, settings.max_batch_size} - {None, batch_size}:
        warnings.warn("the batch stays as it is: SteeringCallback changes it for an endless stream only", stacklevel=4)
    return replace(settings, min_batch_size=batch_size, max_batch_size=batch_size)


def _in_powers_of_two(settings: SteeringSettings, plan: Plan) -> tuple[SteeringSettings, int]:
    """Return settings whose batches are powers of two of micro-batches, and the largest of them."""
    start, accumulate = plan.unit * plan.accumulate, plan.accumulate
    if settings.batch_size != start or accumulate & (accumulate - 1):
        raise ValueError(
            "gradient_accumulation_steps must be a power of two and agree with batch_size for SteeringCallback, got "
            f"{accumulate} micro-batches of {plan.unit} and batch_size {settings.batch_size}"
        )
    share = settings.sequences // _decisions(settings)
    most = min(settings.max_batch_size or min(start * BATCH_RANGE, share // 4), share)
    least = settings.min_batch_size or start // BATCH_RANGE
    grain = smallest = start
    while 2 * grain <= most:
        grain *= 2
    while smallest % (2 * plan.unit) == 0 and smallest // 2 >= least:
        smallest //= 2
    sequences = settings.sequences // grain * grain
    return replace(settings, sequences=sequences, min_batch_size=smallest, max_batch_size=grain), grain


def _decisions(settings: SteeringSettings) -> int:
    if settings.decisions or not isinstance(settings.policy, str) or settings.policy == "none":
        return settings.decisions or DECISIONS
    return PolicyBundle.load(policy_path(settings.policy)).decisions


def check_plain(
    trainer: Trainer | None,
    scheduler: Any,
    args: TrainingArguments,
    plan: Plan,
    settings: SteeringSettings,
    *,
    streams: bool,
) -> None:
    """Raise `ValueError` for a Trainer that a callback cannot steer exactly; it need not be known."""
    check_args(args)
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type must be one of linear, cosine, constant, constant_with_warmup and "
            f"warmup_stable_decay with SteeringCallback, got a {type(scheduler).__name__}"
        )
    if trainer is not None and not trainer._created_lr_scheduler:
        raise ValueError("optimizers must come without a scheduler, got a LambdaLR; pass (optimizer, None)")
    if len(settings.precisions) > 1 and trainer is None:
        raise ValueError(
            "precisions must be one, unless the callback knows the Trainer; set callback.trainer = trainer, got "
            + ", ".join(settings.precisions)
        )
    needed = settings.sequences // plan.unit
    if streams and args.max_steps < needed:
        raise ValueError(
            f"max_steps must be at least {needed}, the budget in micro-batches, for data without a length, got "
            f"{args.max_steps}; steering ends the run"
        )
