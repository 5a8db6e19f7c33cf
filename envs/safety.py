"""Say which choices are forbidden now, and why. The limits stand here, outside the policy."""

from __future__ import annotations

from dataclasses import dataclass

from trainpilot.envs.action import (
    ACTION_FIELDS,
    BATCH_FACTORS,
    LEARNING_RATE_FACTORS,
    SPARSITY_STEP,
    Action,
    Choices,
    check_action,
)
from trainpilot.llm_runtime.controls import PRECISIONS, Controls
from trainpilot.llm_runtime.plant import ControlLimits

LEARNING_RATE_SCALE_RANGE = (2.0**-6, 2.0**6)
"""Bounds on the learning-rate scale. The widest start worth meeting is 30 times off."""
MAX_PRECISION_SWITCHES = 2
PRUNING_WINDOW = (0.2, 0.8)
"""Pruning only within this share of the budget: late enough to know, early enough to heal (Jin et al. 2025)."""
MAX_SPARSITY = 0.9
FINISH_FROM = 0.2
"""No cool-down before this share of the budget."""

Reasons = tuple[tuple[str | None, ...], ...]
"""For every field and choice, why it is masked, or `None` where it is allowed."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the safety layer looks at."""

    limits: ControlLimits
    controls: Controls
    """Controls in force."""
    budget_used: float
    """Share of the budget, in [0, 1]."""
    precision_switches: int
    """Switches made so far."""


def mask_reasons(situation: Situation) -> Reasons:
    """Return why each choice is masked. The choice that changes nothing is always allowed."""
    checks = (_learning_rate, _batch, _precision, _pruning, _finish)
    return tuple(
        tuple(None if choice == field.keep else check(situation, choice) for choice in range(len(field.choices)))
        for field, check in zip(ACTION_FIELDS, checks, strict=True)
    )


def allow(action: Choices, reasons: Reasons) -> tuple[Action, list[str]]:
    """Replace every masked choice by the one that changes nothing; return the action and the reasons by name.

    Raises:
        ValueError: `action` has not one valid choice per field.
    """
    check_action(action)
    allowed, refusals = [], []
    for field, choice, why in zip(ACTION_FIELDS, action, reasons, strict=True):
        reason = why[int(choice)]
        allowed.append(field.keep if reason else int(choice))
        if reason:
            refusals.append(f"{field.name} {field.choices[int(choice)]}: {reason}")
    return tuple(allowed), refusals


def _learning_rate(situation: Situation, choice: int) -> str | None:
    low, high = LEARNING_RATE_SCALE_RANGE
    scale = situation.controls.learning_rate_scale * LEARNING_RATE_FACTORS[choice]
    return None if low <= scale <= high else f"scale {scale:.3g} outside [{low:.3g}, {high:g}]"


def _batch(situation: Situation, choice: int) -> str | None:
    limits, present = situation.limits, situation.controls.batch_size
    size = present * BATCH_FACTORS[choice]
    if size != int(size):
        return f"{present} sequences cannot be halved"
    if limits.min_batch_size <= size <= limits.max_batch_size:
        return None
    return f"{size:g} sequences outside [{limits.min_batch_size}, {limits.max_batch_size}]"


def _precision(situation: Situation, choice: int) -> str | None:
    precision = PRECISIONS[choice - 1]
    if precision == situation.controls.precision:
        return "already in force"
    if situation.precision_switches >= MAX_PRECISION_SWITCHES:
        return f"at most {MAX_PRECISION_SWITCHES} switches per run"
    return situation.limits.masked_precisions.get(precision)


def _pruning(situation: Situation, choice: int) -> str | None:
    low, high = PRUNING_WINDOW
    if situation.limits.pruning == "none":
        return "this run does not prune"
    if not low <= situation.budget_used <= high:
        return f"only between {low:.0%} and {high:.0%} of the budget"
    if situation.controls.sparsity + SPARSITY_STEP > MAX_SPARSITY + 1e-9:  # steps of 0.05 do not add up exactly
        return f"at most {MAX_SPARSITY:.0%}"
    return None


def _finish(situation: Situation, choice: int) -> str | None:
    if situation.controls.finish:
        return "the cool-down has begun"
    if situation.budget_used < FINISH_FROM:
        return f"not before {FINISH_FROM:.0%} of the budget"
    return None
