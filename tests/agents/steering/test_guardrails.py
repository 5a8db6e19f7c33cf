"""Guardrails refuse what goes too far, and say when a run must be taken back."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fakes import START, make_limits, make_telemetry

from trainpilot.agents.steering.guardrails import Guardrails, GuardrailSettings, LossLevel, student
from trainpilot.envs.action import KEEP, Action, Situation
from trainpilot.llm_runtime.config import Controls

DOUBLE_RATE: Action = (6, *KEEP[1:])
HALF_RATE: Action = (0, *KEEP[1:])
DOUBLE_BATCH: Action = (3, 2, 0, 0, 0)
HALF_BATCH: Action = (3, 0, 0, 0, 0)
COOL_DOWN: Action = (3, 1, 0, 0, 1)


def situation(scale: float = 1.0, batch_size: int = 8, budget_used: float = 0.5) -> Situation:
    controls = Controls(learning_rate_scale=scale, batch_size=batch_size)
    return Situation(limits=make_limits(), controls=controls, budget_used=budget_used, precision_switches=0)


def quiet(guardrails: Guardrails, losses: list[float], scale: float = 1.0) -> None:
    for loss in losses:
        controls = Controls(learning_rate_scale=scale, batch_size=8)
        assert guardrails.judge(make_telemetry(train_loss=loss, requested=controls)).kind == "go_on"


def refused(guardrails: Guardrails, action: Action, **where: Any) -> list[str]:
    allowed, refusals = guardrails.review(action, situation(**where))
    assert (allowed == action) == (not refusals)
    return refusals


BOLD = GuardrailSettings(cautious=False)


def test_a_rise_is_paid_for_by_a_new_low_of_the_loss() -> None:
    guardrails = Guardrails(BOLD)
    assert not refused(guardrails, DOUBLE_RATE)
    assert refused(guardrails, DOUBLE_RATE, scale=2.0) == [
        "learning_rate x2 refused: more than x2 above where the loss last reached a new low"
    ]
    quiet(guardrails, [2.0], scale=2.0)
    assert not refused(guardrails, DOUBLE_RATE, scale=2.0)


def test_policy_that_always_raises_stops_at_twice_the_last_new_low() -> None:
    guardrails, scale = Guardrails(BOLD), 1.0
    for loss in [3.0] * 20:
        allowed, _ = guardrails.review(DOUBLE_RATE, situation(scale))
        guardrails.note(allowed)
        scale *= 2 if allowed == DOUBLE_RATE else 1
        quiet(guardrails, [loss], scale)
    assert scale == 4  # the first loss, under a scale of 2, is a low; then none


def test_lowering_the_learning_rate_is_never_too_high() -> None:
    assert not refused(Guardrails(), HALF_RATE, scale=32.0)


def test_the_learning_rate_range_counts_scale_and_batch() -> None:
    settings = GuardrailSettings(learning_rate_range=(5e-4, 1.5e-3))
    guardrails = Guardrails(settings, base_learning_rate=1e-3)
    assert refused(guardrails, DOUBLE_RATE) == ["learning_rate x2 refused: learning rate would leave [0.0005, 0.0015]"]
    assert not refused(guardrails, HALF_RATE)
    assert refused(guardrails, HALF_RATE, scale=0.5)
    assert not refused(guardrails, DOUBLE_BATCH)  # x 1.41
    assert refused(guardrails, (4, 2, 0, 0, 0))  # x 1.19 x 1.41
    assert not refused(guardrails, HALF_RATE, scale=4.0)  # outside, but on its way back


def test_the_batch_size_range() -> None:
    guardrails = Guardrails(GuardrailSettings(batch_size_range=(8, 16)))
    assert refused(guardrails, HALF_BATCH) == ["batch_size half refused: batch size would leave [8, 16]"]
    assert not refused(guardrails, DOUBLE_BATCH)
    assert refused(guardrails, DOUBLE_BATCH, batch_size=16)


def test_no_cool_down_before_its_share() -> None:
    guardrails = Guardrails(GuardrailSettings(finish_from=0.6))
    assert refused(guardrails, COOL_DOWN) == ["finish cool down refused: not before 60% of the budget"]
    assert not refused(guardrails, COOL_DOWN, budget_used=0.6)


def test_a_batch_that_swings_is_held() -> None:
    guardrails = Guardrails(GuardrailSettings(max_reversals=3, oscillation_window=8))
    sizes, size = [], 8
    for _ in range(20):
        wish = DOUBLE_BATCH if size == 8 else HALF_BATCH
        allowed, _ = guardrails.review(wish, situation(batch_size=size))
        guardrails.note(allowed)
        size = {DOUBLE_BATCH: 16, HALF_BATCH: 8, KEEP: size}[allowed]
        sizes.append(size)
    assert sizes[:3] == [16, 8, 16]  # up, down, up: two changes of direction; the third is refused
    assert sizes[3:12] == [16] * 9  # refused, and held for eight more
    assert sum(a != b for a, b in pairwise(sizes)) <= 8


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_asks_for_a_rollback(loss: float) -> None:
    guardrails = Guardrails()
    guardrails.snapshot_taken()
    verdict = guardrails.judge(make_telemetry(train_loss=loss, diverged=True))
    assert (verdict.kind, verdict.reason) == ("roll_back", "training loss is not finite")


def test_a_spike_is_many_spreads_and_a_share_of_the_loss() -> None:
    guardrails = Guardrails()  # spread 0.02 / sqrt 4 = 0.01: 4 spreads are 0.04, 5 % of 2 are 0.1
    guardrails.snapshot_taken()
    quiet(guardrails, [2.0] * 5)
    quiet(guardrails, [2.09])
    assert guardrails.judge(make_telemetry(train_loss=2.11)).kind == "roll_back"


def test_losses_that_swing_widen_what_is_no_spike() -> None:
    guardrails = Guardrails()
    guardrails.snapshot_taken()
    quiet(guardrails, [2.0, 2.08, 2.0, 2.08, 2.0])  # swings of 0.08: 4 x 0.886 x 0.08 = 0.284
    quiet(guardrails, [2.28])
    assert guardrails.judge(make_telemetry(train_loss=2.6)).kind == "roll_back"


def test_few_losses_whose_errors_are_not_known_are_taken_with_doubt() -> None:
    level, student_s_t = LossLevel(), student(4, 0.7 * 4)
    for loss in [2.0, 2.08, 2.0]:
        assert level.rise(3.0, 4, 0.05) <= 1, "nothing is known of swings: half of the level is none"
        level.take(loss, 0.0, 1.0)
    assert level.rise(3.5, 4, 0.05) > 1
    for loss in [2.08, 2.0]:
        level.take(loss, 0.0, 1.0)
    assert student_s_t == pytest.approx(18.25, rel=1e-3)  # 4 + 68 / 11.2 + (5120 + 1024 + 12) / 752.6
    rise = 0.7 / (student_s_t * 0.0709)
    assert level.rise(2.7, 4, 0.05) == pytest.approx(rise, rel=1e-3)
    assert student(4, 1e6) == pytest.approx(4, abs=1e-4)


@pytest.mark.parametrize("fall", [0.0, 4.0], ids=["level", "falling"])
def test_noise_alone_is_hardly_ever_a_spike(fall: float) -> None:
    random, alarms = np.random.default_rng(0), 0
    for _ in range(200):
        level = LossLevel()
        for index in range(60):
            loss = 3 + fall * math.exp(-index / 6) + random.normal(0, 0.3)
            alarms += level.rise(loss, 4, 0.05) > 1
            level.take(loss, 0.0, 1.0)
    assert alarms <= 4


def test_without_snapshot_or_rollbacks_left_it_falls_back() -> None:
    nan = make_telemetry(train_loss=math.nan)
    guardrails = Guardrails(GuardrailSettings(max_rollbacks=2))
    assert guardrails.judge(nan).kind == "fall_back"
    guardrails.snapshot_taken()
    for _ in range(2):
        assert guardrails.judge(nan).kind == "roll_back"
        guardrails.rolled_back([KEEP])
    assert guardrails.judge(nan).kind == "fall_back"


def test_snapshots_come_before_risky_changes_and_every_ten_decisions() -> None:
    guardrails = Guardrails()
    assert guardrails.needs_snapshot(KEEP)
    guardrails.snapshot_taken()
    quiet(guardrails, [2.0] * 3)
    for _ in range(8):
        guardrails.note(KEEP)
        assert not guardrails.needs_snapshot(KEEP)
        assert not guardrails.needs_snapshot(HALF_RATE)
    assert guardrails.needs_snapshot(DOUBLE_RATE)
    assert guardrails.needs_snapshot(HALF_BATCH)
    guardrails.note(KEEP)
    assert guardrails.needs_snapshot(KEEP)  # the tenth decision since


def test_no_snapshot_of_a_loss_on_its_way_up() -> None:
    guardrails = Guardrails()
    guardrails.snapshot_taken()
    quiet(guardrails, [2.0] * 5)
    quiet(guardrails, [2.08])  # a spike is 2.1
    assert not guardrails.needs_snapshot(DOUBLE_RATE)


def test_what_led_to_a_rollback_is_held_and_then_let_go() -> None:
    guardrails = Guardrails(GuardrailSettings(hold=2))
    guardrails.rolled_back([DOUBLE_BATCH])
    guardrails.note(KEEP)  # the gentler controls themselves
    for _ in range(2):
        assert refused(guardrails, DOUBLE_BATCH) == ["batch_size double refused: held after a rollback"]
        assert refused(guardrails, DOUBLE_RATE)
        assert not refused(guardrails, HALF_BATCH)
        guardrails.note(KEEP)
    assert not refused(guardrails, DOUBLE_BATCH)


def test_a_rollback_takes_the_past_back_and_leaves_the_scars() -> None:
    guardrails = Guardrails()
    quiet(guardrails, [2.0])
    before = guardrails.past_state()
    quiet(guardrails, [1.5], scale=4.0)
    guardrails.note(DOUBLE_RATE)
    guardrails.load_past_state(before)
    guardrails.rolled_back([DOUBLE_RATE])
    assert guardrails.past.losses.losses == [2.0]
    assert guardrails.past.moves == {"learning_rate": [], "batch_size": []}
    assert guardrails.history.rollbacks == 1


def test_the_state_passes_through_json() -> None:
    one, other = Guardrails(), Guardrails()
    quiet(one, [2.0, 1.9])
    one.note(DOUBLE_RATE)
    one.rolled_back([DOUBLE_RATE])
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    other.note(KEEP)
    assert other.state_dict() != one.state_dict()


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate_range", (1e-3, 1e-4)), ("batch_size_range", (0, 4)), ("max_rise", 0.5), ("finish_from", 1.5),
     ("max_rollbacks", -1), ("spike", math.nan)],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        GuardrailSettings(**{name: value})


def test_a_learning_rate_range_needs_the_base_learning_rate() -> None:
    with pytest.raises(ValueError, match="base_learning_rate"):
        Guardrails(GuardrailSettings(learning_rate_range=(1e-4, 1e-3)))
    assert START.learning_rate_scale == 1
