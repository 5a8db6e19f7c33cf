"""Actions: the table of choices, what each does to the controls, and the rules that mask choices.

An action is one choice per field of `ACTION_FIELDS`. `RULES` holds every limit on the choices, outside the policy:
`action_masks` evaluates them for many runs, `mask_reasons` says in words why a choice of one run is masked.
`allow_batch` checks actions and replaces masked choices, and `decode_batch` turns the result into controls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainpilot.llm_runtime.config import LEARNING_RATE_SCALE_RANGE, PRECISIONS, ControlLimits, Controls
from trainpilot.llm_runtime.simulator.records import Bools, ControlBatch, Floats, Ints, LimitBatch

SPARSITY_STEP = 0.05
"""One pruning step, as a share of the prunable weights or channels."""


@dataclass(frozen=True)
class ActionField:
    """One component of the `MultiDiscrete` action."""

    name: str
    choices: tuple[str, ...]
    meaning: str
    keep: int
    """Index of the choice that changes nothing."""


LEARNING_RATE_FACTORS = (0.5, 0.71, 0.84, 1.0, 1.19, 1.41, 2.0)
"""Quarter and half octaves, so that any two opposite choices cancel within 1 %."""
BATCH_FACTORS = (0.5, 1.0, 2.0)
_RATES, _BATCHES = np.array(LEARNING_RATE_FACTORS), np.array(BATCH_FACTORS)

ACTION_FIELDS: tuple[ActionField, ...] = (
    ActionField(
        "learning_rate",
        tuple(f"x{factor:g}" for factor in LEARNING_RATE_FACTORS),
        "factor on the present learning-rate scale; the base schedule goes on underneath",
        keep=3,
    ),
    ActionField(
        "batch_size",
        ("half", "keep", "double"),
        "factor on the batch, made neutral for Adam: learning rate x sqrt(factor), beta2's half-life kept in tokens",
        keep=1,
    ),
    ActionField("precision", ("keep", *PRECISIONS), "number format of the matrix products", keep=0),
    ActionField("pruning", ("keep", "+5 %"), "one more step of sparsity or of removed channels", keep=0),
    ActionField("finish", ("go on", "cool down"), "linear fall to zero over a fifth of the tokens so far", keep=0),
)
"""Frozen surface: a bundle stores these names and choices and refuses to load when they differ."""

KEEP: tuple[int, ...] = tuple(field.keep for field in ACTION_FIELDS)
"""The action that changes nothing. A policy that always returns it is the base schedule."""

N_CHOICES: tuple[int, ...] = tuple(len(field.choices) for field in ACTION_FIELDS)
"""Choices of each field."""
_N_CHOICES = np.array(N_CHOICES)

Action = tuple[int, ...]
Choices = Sequence[int] | np.ndarray
"""One number per field, as a policy or a space gives them."""


def decode_batch(actions: Ints, present: ControlBatch) -> ControlBatch:
    """Return the controls that result from valid actions, given the controls in force.

    Args:
        actions: One valid choice per field, as `allow_batch` returns them, shape (n_runs, number of fields).
        present: Controls in force.
    """
    learning_rate, batch, precision, pruning, finish = actions.T
    batch_size = (present.batch_size * _BATCHES[batch]).astype(np.int64)
    return ControlBatch(
        learning_rate_scale=present.learning_rate_scale * _RATES[learning_rate],
        batch_size=np.maximum(batch_size, 1),
        precision=np.where(precision == 0, present.precision, precision - 1),
        sparsity=np.minimum(present.sparsity + SPARSITY_STEP * pruning, 0.99),
        finish=present.finish | (finish == 1),
    )


def check_actions(actions: Ints) -> None:
    """Raise `ValueError` unless every row of `actions` has one valid choice per field.

    `allow` and `allow_batch` check; what they return is valid and not checked again.
    """
    if actions.ndim != 2 or actions.shape[1] != len(ACTION_FIELDS):
        got = actions.shape[1] if actions.ndim == 2 else f"an array of shape {actions.shape}"
        raise ValueError(f"action must have {len(ACTION_FIELDS)} components, got {got}")
    valid = (actions >= 0) & (actions < _N_CHOICES)
    if not valid.all():
        row, index = np.argwhere(~valid)[0]
        field = ACTION_FIELDS[index]
        raise ValueError(f"action {field.name} must be in [0, {len(field.choices)}), got {actions[row, index]}")


def check_action(action: Choices) -> None:
    """Raise `ValueError` unless `action` has one valid choice per field."""
    check_actions(np.asarray(action)[None])


MAX_PRECISION_SWITCHES = 2
PRUNING_WINDOW = (0.2, 0.8)
"""Shares of the budget between which pruning is allowed: after the weights have formed, and early enough to recover
(Jin et al. 2025)."""
MAX_SPARSITY = 0.9
FINISH_FROM = 0.2
"""No cool-down before this share of the budget."""

Reasons = tuple[tuple[str | None, ...], ...]
"""For every field and choice, why it is masked, or `None` where it is allowed."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """State of one run on which the mask rules depend."""

    limits: ControlLimits
    controls: Controls
    """Controls in force."""
    budget_used: float
    """Share of the budget, in [0, 1]."""
    precision_switches: int
    """Switches made so far."""
    may_finish: bool = True
    """Whether a cool-down may be begun before the budget's end."""


@dataclass(frozen=True, kw_only=True)
class SituationBatch:
    """State of many runs on which the mask rules depend: arrays with one row per run."""

    limits: LimitBatch
    controls: ControlBatch
    budget_used: Floats
    precision_switches: Ints
    may_finish: Bools

    @classmethod
    def of(cls, situations: Sequence[Situation]) -> SituationBatch:
        """Return the situations of several runs as arrays."""
        return cls(
            limits=LimitBatch.of([each.limits for each in situations]),
            controls=ControlBatch.of([each.controls for each in situations]),
            budget_used=np.array([each.budget_used for each in situations], dtype=np.float64),
            precision_switches=np.array([each.precision_switches for each in situations], dtype=np.int64),
            may_finish=np.array([each.may_finish for each in situations], dtype=np.bool_),
        )


@dataclass(frozen=True)
class Rule:
    """One limit on one action field."""

    field: str
    when: str
    """When it masks a choice, for the documentation."""
    masked: Callable[[SituationBatch], Bools]
    """Returns the masked choices, shape (choices, n_runs), or (n_runs,) for all but the one that changes nothing."""
    reason: Callable[[Situation, int], str]
    """Returns the reason for masking a choice of one run."""


def action_masks(situation: SituationBatch) -> Bools:
    """Return which choices are allowed, field after field, shape (n_runs, sum of choices)."""
    masked = np.zeros((sum(N_CHOICES), len(situation.budget_used)), dtype=np.bool_)
    for rule in RULES:
        masked[_COLUMNS[rule.field]] |= rule.masked(situation)
    masked[FIRST_CHOICES + _KEEP] = False
    return np.ascontiguousarray(~masked.T)


def allow_batch(actions: Ints, masks: Bools) -> Ints:
    """Replace every masked choice by the one that changes nothing, in actions of shape (n_runs, number of fields).

    Raises:
        ValueError: an action does not have one valid choice per field.
    """
    check_actions(actions)
    allowed = masks[np.arange(len(actions))[:, None], FIRST_CHOICES + actions]
    return np.where(allowed, actions, _KEEP)


def mask_reasons(situation: Situation, batch: SituationBatch | None = None) -> Reasons:
    """Return why each choice is masked. The choice that changes nothing is always allowed.

    Args:
        situation: State of the run.
        batch: The same as a batch of one run, where there is one already.
    """
    reasons: list[list[str | None]] = [[None] * n for n in N_CHOICES]
    batch = batch or SituationBatch.of([situation])
    for rule in RULES:
        index, masked = _NAMES.index(rule.field), rule.masked(batch).ravel().tolist()
        for choice, is_masked in enumerate(masked if len(masked) > 1 else masked * N_CHOICES[index]):
            if is_masked and choice != KEEP[index] and reasons[index][choice] is None:
                reasons[index][choice] = rule.reason(situation, choice)
    return tuple(map(tuple, reasons))


def allow(action: Choices, reasons: Reasons) -> tuple[Action, list[str]]:
    """Apply `allow_batch` to one run, and return the names of the replaced choices with their reasons, too.

    Raises:
        ValueError: `action` does not have one valid choice per field.
    """
    masks = np.array([[reason is None for why in reasons for reason in why]])
    (allowed,) = allow_batch(np.asarray(action)[None], masks)
    refusals = [
        f"{field.name} {field.choices[int(choice)]}: {why[int(choice)]}"
        for field, choice, why in zip(ACTION_FIELDS, action, reasons, strict=True)
        if why[int(choice)]
    ]
    return tuple(allowed.tolist()), refusals


def _scales(situation: SituationBatch) -> Floats:
    scales: Floats = _RATES[:, None] * situation.controls.learning_rate_scale
    return scales


def _scale_leaves_its_range(situation: SituationBatch) -> Bools:
    low, high = LEARNING_RATE_SCALE_RANGE
    scales = _scales(situation)
    return ~((low <= scales) & (scales <= high))


def _scale_reason(situation: Situation, choice: int) -> str:
    low, high = LEARNING_RATE_SCALE_RANGE
    scale = situation.controls.learning_rate_scale * LEARNING_RATE_FACTORS[choice]
    return f"scale {scale:.3g} outside [{low:.3g}, {high:g}]"


def _batch_sizes(situation: SituationBatch) -> Floats:
    sizes: Floats = _BATCHES[:, None] * situation.controls.batch_size
    return sizes


def _batch_is_no_whole_number(situation: SituationBatch) -> Bools:
    sizes = _batch_sizes(situation)
    return np.asarray(sizes != np.floor(sizes))


def _batch_leaves_its_limits(situation: SituationBatch) -> Bools:
    sizes, limits = _batch_sizes(situation), situation.limits
    return (sizes < limits.min_batch_size) | (sizes > limits.max_batch_size)


def _batch_reason(situation: Situation, choice: int) -> str:
    limits, size = situation.limits, situation.controls.batch_size * BATCH_FACTORS[choice]
    return f"{size:g} sequences outside [{limits.min_batch_size}, {limits.max_batch_size}]"


def _precision_is_in_force(situation: SituationBatch) -> Bools:
    return np.asarray(np.arange(-1, len(PRECISIONS))[:, None] == situation.controls.precision)


def _precision_is_not_offered(situation: SituationBatch) -> Bools:
    masked = situation.limits.masked_precisions
    return np.concatenate([np.zeros((1, len(masked)), dtype=np.bool_), masked.T])


def _is_outside_the_pruning_window(situation: SituationBatch) -> Bools:
    low, high = PRUNING_WINDOW
    return ~((low <= situation.budget_used) & (situation.budget_used <= high))


def _sparsity_is_at_its_most(situation: SituationBatch) -> Bools:
    # steps of 0.05 do not add up exactly
    return np.asarray(situation.controls.sparsity + SPARSITY_STEP > MAX_SPARSITY + 1e-9)


def _says(text: str) -> Callable[[Situation, int], str]:
    return lambda situation, choice: text


RULES: tuple[Rule, ...] = (
    Rule("learning_rate", f"the scale would leave [1/{1 / LEARNING_RATE_SCALE_RANGE[0]:g}, "
         f"{LEARNING_RATE_SCALE_RANGE[1]:g}]", _scale_leaves_its_range, _scale_reason),
    Rule("batch_size", "the batch is odd and cannot be halved", _batch_is_no_whole_number,
         lambda s, choice: f"{s.controls.batch_size} sequences cannot be halved"),
    Rule("batch_size", "it would exceed the run's limits", _batch_leaves_its_limits, _batch_reason),
    Rule("precision", "it is already in force", _precision_is_in_force, _says("already in force")),
    Rule("precision", f"{MAX_PRECISION_SWITCHES} switches were made",
         lambda s: s.precision_switches >= MAX_PRECISION_SWITCHES,
         _says(f"at most {MAX_PRECISION_SWITCHES} switches per run")),
    Rule("precision", "the device does not support it; it was measured not to save time there",
         _precision_is_not_offered, lambda s, choice: s.limits.masked_precisions[PRECISIONS[choice - 1]]),
    Rule("pruning", "the case does not prune", lambda s: ~s.limits.prunes, _says("this run does not prune")),
    Rule("pruning", f"outside {PRUNING_WINDOW[0]:.0%} to {PRUNING_WINDOW[1]:.0%} of the budget",
         _is_outside_the_pruning_window,
         _says(f"only between {PRUNING_WINDOW[0]:.0%} and {PRUNING_WINDOW[1]:.0%} of the budget")),
    Rule("pruning", f"the sparsity would exceed {MAX_SPARSITY:.0%}", _sparsity_is_at_its_most,
         _says(f"at most {MAX_SPARSITY:.0%}")),
    Rule("finish", "`finish=False`", lambda s: ~s.may_finish, _says("left out of this environment (finish=False)")),
    Rule("finish", "the cool-down has begun", lambda s: s.controls.finish, _says("the cool-down has begun")),
    Rule("finish", f"before {FINISH_FROM:.0%} of the budget", lambda s: s.budget_used < FINISH_FROM,
         _says(f"not before {FINISH_FROM:.0%} of the budget")),
)  # fmt: skip
"""All mask rules; if several mask a choice, the reason of the first is reported."""

_NAMES = tuple(field.name for field in ACTION_FIELDS)
_KEEP: Ints = np.array(KEEP)
FIRST_CHOICES = np.cumsum([0, *N_CHOICES[:-1]])
"""Column of each field's first choice in arrays over all choices, such as the masks."""
_COLUMNS = {name: slice(first, first + n) for name, first, n in zip(_NAMES, FIRST_CHOICES, N_CHOICES, strict=True)}


def split_choices(values: np.ndarray) -> list[np.ndarray]:
    """Split values of all choices, shape (..., sum of choices), into one array per action field."""
    return np.split(values, FIRST_CHOICES[1:], axis=-1)
