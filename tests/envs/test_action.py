"""What each choice does to the controls in force, in numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import make_limits

from trainpilot.envs.action import (
    ACTION_FIELDS,
    KEEP,
    LEARNING_RATE_FACTORS,
    N_CHOICES,
    check_action,
    check_actions,
    decode_batch,
)
from trainpilot.envs.decision import DecisionState, Preference
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.simulator.records import ControlBatch

PRESENT = Controls(learning_rate_scale=2.0, batch_size=6, precision="bf16", sparsity=0.1)


def action(**choices: int) -> tuple[int, ...]:
    """Return the action that keeps all but what is named."""
    assert set(choices) <= {field.name for field in ACTION_FIELDS}
    return tuple(choices.get(field.name, field.keep) for field in ACTION_FIELDS)


def decode(action: Sequence[int] | np.ndarray, present: Controls) -> Controls:
    """Return what one action does to the controls of one run."""
    return decode_batch(np.array([action]), ControlBatch.of([present])).row(0)


def test_keep_changes_nothing() -> None:
    assert KEEP == (3, 1, 0, 0, 0)
    assert decode(KEEP, PRESENT) == PRESENT


@pytest.mark.parametrize(
    ("choices", "changed"),
    [
        ({"learning_rate": 0}, {"learning_rate_scale": 1.0}),
        ({"learning_rate": 1}, {"learning_rate_scale": 1.42}),
        ({"learning_rate": 2}, {"learning_rate_scale": 1.68}),
        ({"learning_rate": 3}, {"learning_rate_scale": 2.0}),
        ({"learning_rate": 4}, {"learning_rate_scale": 2.38}),
        ({"learning_rate": 5}, {"learning_rate_scale": 2.82}),
        ({"learning_rate": 6}, {"learning_rate_scale": 4.0}),
        ({"batch_size": 0}, {"batch_size": 3}),
        ({"batch_size": 1}, {"batch_size": 6}),
        ({"batch_size": 2}, {"batch_size": 12}),
        ({"precision": 0}, {"precision": "bf16"}),
        ({"precision": 1}, {"precision": "fp32"}),
        ({"precision": 2}, {"precision": "tf32"}),
        ({"precision": 3}, {"precision": "bf16"}),
        ({"precision": 4}, {"precision": "fp16"}),
        ({"pruning": 0}, {"sparsity": 0.1}),
        ({"pruning": 1}, {"sparsity": pytest.approx(0.15)}),
        ({"finish": 0}, {"finish": False}),
        ({"finish": 1}, {"finish": True}),
        ({"learning_rate": 6, "batch_size": 0}, {"learning_rate_scale": 4.0, "batch_size": 3}),
    ],
)
def test_each_choice_changes_its_own_control(choices: dict[str, int], changed: dict[str, Any]) -> None:
    controls = decode(action(**choices), PRESENT)

    for name, value in changed.items():
        assert getattr(controls, name) == value
    assert replace(controls, **{name: getattr(PRESENT, name) for name in changed}) == PRESENT


def test_every_choice_of_the_table_can_be_decoded() -> None:
    for field in ACTION_FIELDS:
        for choice in range(len(field.choices)):
            decode(action(**{field.name: choice}), PRESENT)


def test_opposite_learning_rates_cancel_within_one_percent() -> None:
    for down, up in zip(LEARNING_RATE_FACTORS, reversed(LEARNING_RATE_FACTORS), strict=True):
        assert down * up == pytest.approx(1.0, rel=0.01)


def test_half_and_double_cancel() -> None:
    doubled = decode(action(batch_size=2), PRESENT)

    assert decode(action(batch_size=0), doubled) == PRESENT


def test_the_batch_never_falls_below_one_and_sparsity_never_reaches_one() -> None:
    assert decode(action(batch_size=0), Controls(batch_size=1)).batch_size == 1
    assert decode(action(pruning=1), Controls(batch_size=1, sparsity=0.97)).sparsity == 0.99


def test_a_cool_down_cannot_be_taken_back() -> None:
    assert decode(KEEP, Controls(batch_size=8, finish=True)).finish


def test_an_action_may_be_an_array() -> None:
    assert decode(np.array([6, 1, 0, 0, 0]), PRESENT).learning_rate_scale == 4.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((3, 1, 0, 0), "action must have 5 components, got 4"),
        ((3, 1, 0, 0, 0, 0), "action must have 5 components, got 6"),
        ((7, 1, 0, 0, 0), r"action learning_rate must be in \[0, 7\), got 7"),
        ((-1, 1, 0, 0, 0), r"action learning_rate must be in \[0, 7\), got -1"),
        ((3, 3, 0, 0, 0), r"action batch_size must be in \[0, 3\), got 3"),
        ((3, 1, 5, 0, 0), r"action precision must be in \[0, 5\), got 5"),
        ((3, 1, 0, 2, 0), r"action pruning must be in \[0, 2\), got 2"),
        ((3, 1, 0, 0, 2), r"action finish must be in \[0, 2\), got 2"),
    ],
)
def test_what_is_no_action_is_refused_by_name(bad: Sequence[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_action(bad)
    with pytest.raises(ValueError, match=message):
        DecisionState(make_limits(), Preference()).decide(bad)
    with pytest.raises(ValueError, match=message):
        check_actions(np.array([bad, bad]))


def test_many_actions_are_decoded_like_each_alone() -> None:
    random = np.random.default_rng(0)
    actions = np.stack([random.integers(n, size=100) for n in N_CHOICES], axis=1)
    present = [
        Controls(batch_size=int(size), sparsity=0.97 if size > 30 else 0.1) for size in random.integers(1, 65, 100)
    ]
    decoded = decode_batch(actions, ControlBatch.of(present))

    assert [decoded.row(i) for i in range(100)] == [decode(*pair) for pair in zip(actions, present, strict=True)]
