"""Turn an action (one choice per control) into the controls of the next interval. One table holds every choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainpilot.llm_runtime.config import PRECISIONS, Controls
from trainpilot.llm_runtime.simulator.records import ControlBatch, Ints

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

Action = tuple[int, ...]
Choices = Sequence[int] | np.ndarray
"""One number per field, as a policy or a space gives them."""


def decode(action: Choices, present: Controls) -> Controls:
    """Return the controls that follow from `action` while `present` holds.

    Raises:
        ValueError: `action` has not one valid choice per field.
    """
    check_action(action)
    return decode_batch(np.array([action], dtype=np.int64), ControlBatch.of([present])).row(0)


def decode_batch(actions: Ints, present: ControlBatch) -> ControlBatch:
    """Return the same for many runs; `actions` has shape (n_runs, number of fields).

    Raises:
        ValueError: an action has not one valid choice per field.
    """
    check_actions(actions)
    learning_rate, batch, precision, pruning, finish = actions.T
    batch_size = (present.batch_size * np.array(BATCH_FACTORS)[batch]).astype(np.int64)
    return ControlBatch(
        learning_rate_scale=present.learning_rate_scale * np.array(LEARNING_RATE_FACTORS)[learning_rate],
        batch_size=np.maximum(batch_size, 1),
        precision=np.where(precision == 0, present.precision, precision - 1),
        sparsity=np.minimum(present.sparsity + SPARSITY_STEP * pruning, 0.99),
        finish=present.finish | (finish == 1),
    )


def check_actions(actions: Ints) -> None:
    """Raise `ValueError` unless every row of `actions` has one valid choice per field."""
    shape_fits = actions.ndim == 2 and actions.shape[1] == len(ACTION_FIELDS)
    if shape_fits and ((actions >= 0) & (actions < N_CHOICES)).all():
        return
    for action in np.atleast_2d(actions):
        check_action(action)


def check_action(action: Choices) -> None:
    """Raise `ValueError` unless `action` has one valid choice per field."""
    if len(action) != len(ACTION_FIELDS):
        raise ValueError(f"action must have {len(ACTION_FIELDS)} components, got {len(action)}")
    for field, choice in zip(ACTION_FIELDS, action, strict=True):
        if not 0 <= int(choice) < len(field.choices):
            raise ValueError(f"action {field.name} must be in [0, {len(field.choices)}), got {choice}")
