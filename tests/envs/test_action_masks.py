"""Every rule that masks a choice, with its reason, on both sides of its border."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import make_limits, make_telemetry

from trainpilot.envs.action import (
    ACTION_FIELDS,
    KEEP,
    N_CHOICES,
    RULES,
    Reasons,
    Situation,
    SituationBatch,
    action_masks,
    allow,
    allow_batch,
    decode_batch,
    mask_reasons,
)
from trainpilot.envs.decision import DecisionState, Preference
from trainpilot.llm_runtime.config import PRECISIONS, PRUNINGS, ControlLimits, Controls
from trainpilot.llm_runtime.simulator.records import ControlBatch

NAMES = [field.name for field in ACTION_FIELDS]


def reasons(
    *, limits: ControlLimits | None = None, budget_used: float = 0.5, precision_switches: int = 0, **controls: Any
) -> dict[str, tuple[str | None, ...]]:
    """Return the reasons by field name, in the middle of a run that may do everything."""
    situation = Situation(
        limits=limits or make_limits(),
        controls=Controls(**{"batch_size": 8} | controls),
        budget_used=budget_used,
        precision_switches=precision_switches,
    )
    return dict(zip(NAMES, mask_reasons(situation), strict=True))


def test_in_the_middle_of_a_run_only_the_present_precision_is_masked() -> None:
    masked = {
        (name, choice): reason
        for name, why in reasons().items()
        for choice, reason in enumerate(why)
        if reason is not None
    }

    assert masked == {("precision", 1): "already in force"}


def test_keep_is_allowed_even_where_all_else_is_masked() -> None:
    limits = make_limits(
        min_batch_size=8,
        max_batch_size=8,
        masked_precisions={name: "lacking" for name in ("tf32", "bf16", "fp16")},
        pruning="none",
    )
    masked = reasons(limits=limits, budget_used=0.0)

    for field in ACTION_FIELDS:
        assert masked[field.name][field.keep] is None
    assert [sum(reason is None for reason in masked[name]) for name in NAMES] == [7, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("scale", "allowed"),
    [
        (1.0, [0, 1, 2, 3, 4, 5, 6]),
        (32.0, [0, 1, 2, 3, 4, 5, 6]),  # 2 x 32 = 64 is the border
        (33.0, [0, 1, 2, 3, 4, 5]),
        (64.0, [0, 1, 2, 3]),
        (1 / 32, [0, 1, 2, 3, 4, 5, 6]),  # 1/64 is the border
        (1 / 33, [1, 2, 3, 4, 5, 6]),
        (1 / 64, [3, 4, 5, 6]),
    ],
)
def test_the_learning_rate_scale_stays_within_64(scale: float, allowed: list[int]) -> None:
    masked = reasons(learning_rate_scale=scale)["learning_rate"]

    assert [choice for choice, reason in enumerate(masked) if reason is None] == allowed


def test_the_learning_rate_reason_names_the_scale_and_the_bounds() -> None:
    assert reasons(learning_rate_scale=64.0)["learning_rate"][6] == "scale 128 outside [0.0156, 64]"
    assert reasons(learning_rate_scale=1 / 64)["learning_rate"][0] == "scale 0.00781 outside [0.0156, 64]"


@pytest.mark.parametrize(
    ("batch_size", "half", "double"),
    [
        (8, None, None),
        (16, None, None),  # doubled: 32, the border
        (32, None, "64 sequences outside [2, 32]"),
        (4, None, None),  # halved: 2, the border
        (2, "1 sequences outside [2, 32]", None),
        (5, "5 sequences cannot be halved", None),
    ],
)
def test_the_batch_stays_within_its_limits(batch_size: int, half: str | None, double: str | None) -> None:
    masked = reasons(limits=make_limits(min_batch_size=2), batch_size=batch_size)["batch_size"]

    assert masked == (half, None, double)


def test_what_the_device_cannot_do_is_masked_with_its_reason() -> None:
    limits = make_limits(masked_precisions={"tf32": "needs a GPU", "fp16": "measured slower"})

    assert reasons(limits=limits)["precision"] == (None, "already in force", "needs a GPU", None, "measured slower")


def test_precision_is_switched_twice_at_most() -> None:
    once = reasons(precision="bf16", precision_switches=1)["precision"]
    twice = reasons(precision_switches=2)["precision"]

    assert once == (None, None, None, "already in force", None)
    assert twice == (None, "already in force", *["at most 2 switches per run"] * 3)


@pytest.mark.parametrize(
    ("budget_used", "reason"),
    [
        (0.0, "only between 20% and 80% of the budget"),
        (0.199, "only between 20% and 80% of the budget"),
        (10 / 50, None),
        (0.5, None),
        (40 / 50, None),
        (0.801, "only between 20% and 80% of the budget"),
    ],
)
def test_pruning_has_its_window(budget_used: float, reason: str | None) -> None:
    assert reasons(budget_used=budget_used)["pruning"] == (None, reason)


def test_a_run_that_does_not_prune_says_so() -> None:
    assert reasons(limits=make_limits(pruning="none"))["pruning"] == (None, "this run does not prune")


def test_pruning_goes_in_eighteen_steps_to_90_percent_and_no_further() -> None:
    controls, steps, pruned = Controls(batch_size=8), 0, np.array([[3, 1, 0, 1, 0]])
    while reasons(sparsity=controls.sparsity)["pruning"][1] is None:
        controls, steps = decode_batch(pruned, ControlBatch.of([controls])).row(0), steps + 1

    assert steps == 18
    assert controls.sparsity == pytest.approx(0.9)
    assert reasons(sparsity=controls.sparsity)["pruning"] == (None, "at most 90%")


@pytest.mark.parametrize(
    ("budget_used", "reason"),
    [(0.0, "not before 20% of the budget"), (0.199, "not before 20% of the budget"), (10 / 50, None), (0.99, None)],
)
def test_no_cool_down_before_a_fifth_of_the_budget(budget_used: float, reason: str | None) -> None:
    assert reasons(budget_used=budget_used)["finish"] == (None, reason)


def test_a_cool_down_begins_once() -> None:
    assert reasons(finish=True)["finish"] == (None, "the cool-down has begun")


def all_reasons(**masked: int) -> Reasons:
    """Return reasons that mask the named choices with "because"."""
    return tuple(
        tuple("because" if masked.get(field.name) == choice else None for choice in range(len(field.choices)))
        for field in ACTION_FIELDS
    )


def test_masked_choice_becomes_keep_and_the_refusal_says_why() -> None:
    allowed, refusals = allow((6, 2, 3, 1, 1), all_reasons(batch_size=2, pruning=1))

    assert allowed == (6, 1, 3, 0, 1)
    assert refusals == ["batch_size double: because", "pruning +5 %: because"]


def test_an_allowed_action_passes_unchanged() -> None:
    assert allow((6, 2, 3, 1, 1), all_reasons(batch_size=0)) == ((6, 2, 3, 1, 1), [])
    assert allow(KEEP, all_reasons()) == (KEEP, [])


@pytest.mark.parametrize("bad", [(3, 1, 0, 0), (7, 1, 0, 0, 0), (3, 1, 0, 0, -1)])
def test_what_is_no_action_is_refused_not_masked(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="action"):
        allow(bad, all_reasons(finish=1))


def test_the_masks_follow_the_run() -> None:
    state = DecisionState(make_limits(), Preference())
    assert state.mask_reasons()[3] == (None, "only between 20% and 80% of the budget")
    state.observe(make_telemetry(budget_used=0.3))
    assert state.mask_reasons()[3] == (None, None)

    for precision in (3, 1):  # to bf16 and back
        assert state.decide((3, 1, precision, 0, 0)).refusals == []
    assert state.precision_switches == 2
    decision = state.decide((3, 1, 3, 0, 0))
    assert decision.refusals == ["precision bf16: at most 2 switches per run"]
    assert (decision.controls.precision, state.precision_switches) == ("fp32", 2)
    state.observe(make_telemetry())
    assert state.fields()["precision_switches"] == 1.0


def random_situation(random: np.random.Generator) -> Situation:
    """Draw a situation in which every rule has something to say now and then."""
    limits = make_limits(
        min_batch_size=int(random.choice([1, 2, 8])),
        max_batch_size=int(random.choice([8, 16, 64])),
        masked_precisions={name: f"no {name}" for name in PRECISIONS if random.random() < 0.3},
        pruning=str(random.choice(PRUNINGS)),
    )
    controls = Controls(
        learning_rate_scale=float(2 ** random.uniform(-6, 6)),
        batch_size=int(random.integers(1, 65)),
        precision=PRECISIONS[random.integers(len(PRECISIONS))],
        sparsity=float(random.choice([0.0, 0.5, 0.85, 0.9])),
        finish=bool(random.random() < 0.3),
    )
    budget_used = float(random.choice([0.0, 0.2, 0.5, 0.8, 1.0, np.nan]))
    switches = int(random.integers(4))
    return Situation(
        limits=limits,
        controls=controls,
        budget_used=budget_used,
        precision_switches=switches,
        may_finish=random.random() < 0.9,
    )


def test_the_masks_of_many_runs_are_the_reasons_of_each() -> None:
    random = np.random.default_rng(0)
    situations = [random_situation(random) for _ in range(500)]
    masks = action_masks(SituationBatch.of(situations))
    expected = [[reason is None for why in mask_reasons(each) for reason in why] for each in situations]

    assert masks.shape == (500, sum(N_CHOICES))
    assert masks.tolist() == expected
    assert all(mask.any() and not mask.all() for mask in np.split(masks[:, 10:], [5, 7], axis=1))


def test_every_rule_masks_something_and_says_why() -> None:
    random = np.random.default_rng(1)
    situations = [random_situation(random) for _ in range(200)]
    told = {reason for each in situations for why in mask_reasons(each) for reason in why if reason}

    assert all(rule.masked(SituationBatch.of(situations)).any() for rule in RULES)
    assert {"no bf16", "at most 2 switches per run", "the cool-down has begun", "at most 90%"} <= told


def test_masked_choices_of_many_runs_become_keep() -> None:
    random = np.random.default_rng(2)
    situations = [random_situation(random) for _ in range(200)]
    actions = np.stack([random.integers(n, size=200) for n in N_CHOICES], axis=1)
    allowed = allow_batch(actions, action_masks(SituationBatch.of(situations)))

    alone = [allow(action, mask_reasons(each))[0] for action, each in zip(actions, situations, strict=True)]
    assert [tuple(row) for row in allowed.tolist()] == alone
    with pytest.raises(ValueError, match=r"action batch_size must be in \[0, 3\), got 3"):
        allow_batch(np.array([[3, 1, 0, 0, 0], [3, 3, 0, 0, 0]]), np.ones((2, 19), dtype=np.bool_))
