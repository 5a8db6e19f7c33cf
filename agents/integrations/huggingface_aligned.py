"""Decide only where the accumulation of a plain Hugging Face Trainer can change exactly."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from transformers import TrainingArguments

from trainpilot.agents.bundle import PolicyBundle, policy_path
from trainpilot.agents.integrations.huggingface_fit import Given, Plan, fields_of, settings_for
from trainpilot.agents.steering.limits import BATCH_RANGE
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import DECISIONS


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
        settings = settings_for(wanted, plan, args, loader.dataset)
        return _fixed(replace(settings, gradient_clip=clip), plan), 1
    without_end = replace(plan, max_steps=0)  # there max_steps is no more than a bound
    settings = settings_for(wanted, without_end, args, None)
    return _in_powers_of_two(replace(settings, gradient_clip=clip), plan)


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
