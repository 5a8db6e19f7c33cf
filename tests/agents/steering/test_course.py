"""The rules against slow damage, on courses of the loss that are written down by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from fakes import make_limits, make_telemetry

from trainpilot.agents.steering.course import BEND, ENDING, LATE, LATER, LEAST, MOST, PROBED, STALL, TRIAL, Course
from trainpilot.agents.steering.guardrails import Guardrails
from trainpilot.envs.action import KEEP, Action, Situation
from trainpilot.llm_runtime.config import Controls

DOUBLE: Action = (6, *KEEP[1:])
HALF: Action = (0, *KEEP[1:])


def followed(losses: list[float], scales: list[float] | None = None, *, bend: float | None = None) -> Course:
    """Return the course of a run of 50 decisions, with a new low wherever the loss is the lowest."""
    course, used = Course(start_scale=1.0), 0.0
    for index, loss in enumerate(losses):
        used = (index + 1) / 50
        scale = scales[index] if scales is not None else 1.0
        low = loss <= min(losses[: index + 1])
        course.take(
            loss=loss, error=0.01, tokens=100.0 * (index + 0.5), scale=scale, rate=1.0, used=used, new_low=low,
            excess=(loss - min(losses[: index + 1])) / 0.01, bend=bend,
        )  # fmt: skip
    return course


def power_law(count: int) -> list[float]:
    return [1 + 2 * (index + 0.5) ** -0.5 for index in range(count)]


def test_a_rate_beyond_half_as_much_again_waits_for_the_first_probes() -> None:
    assert Course(start_scale=1.0).too_high(MOST, 8, 8) is None
    assert Course(start_scale=1.0).too_high(2.0, 8, 8) == f"more than x{MOST:g} in the first {PROBED} decisions"
    assert followed(power_law(PROBED)).too_high(2.0, 8, 8) is None  # a run without probes knows no more


def test_a_rate_whose_curvature_would_cost_too_much_is_refused() -> None:
    course = followed(power_law(PROBED), bend=BEND / 100)  # at a peak of 1, scale 2 and batch 8: 32 times that
    assert course.too_high(2.0, 8, 8) is None
    assert course.too_high(4.0, 8, 8) is not None
    assert course.too_high(4.0, 2, 8) is None  # half as much in the mean of both batches


def test_the_rate_stays_above_half_while_the_loss_reaches_new_lows() -> None:
    assert followed(power_law(8)).least() == LEAST
    stalled = followed([*power_law(8), *[1.9] * STALL], [1.0] * 8 + [0.5] * STALL)
    assert stalled.least() == LEAST * 0.5
    late = Course(start_scale=1.0, used=LATE)
    assert late.least() == LEAST * LATER
    assert Course(start_scale=0.25).least() == LEAST / 16


def test_a_change_that_falls_behind_the_forecast_is_taken_back() -> None:
    base = power_law(20)
    behind = followed([*base, *[base[-1] + 0.3] * TRIAL], [1.0] * 20 + [2.0] * TRIAL)
    behind.trusted, behind.trusted_until, behind.risen = 1.0, 20, 0
    found = behind.correction(2.0)
    assert found is not None
    assert found[0] == pytest.approx(1.0)
    assert "fallen behind the forecast" in found[1]
    ahead = followed(power_law(20 + TRIAL), [1.0] * 20 + [2.0] * TRIAL)
    ahead.trusted, ahead.trusted_until = 1.0, 20
    assert ahead.correction(2.0) is None


def test_a_loss_that_rises_under_a_higher_rate_brings_it_back() -> None:
    rises = followed([3.0, 2.5, 2.4, 2.9, 3.0, 3.1], [2.0, 4.0, 8.0, 8.0, 8.0, 8.0])
    assert rises.correction(8.0) == (2.0, "the loss has risen under a higher learning rate")
    assert followed([3.0, 2.5, 2.4, 2.9, 3.0, 3.1]).correction(1.0) is None  # that is the base schedule's own doing


def test_an_early_end_waits_until_the_loss_has_stopped_to_fall() -> None:
    assert followed(power_law(30)).may_learn()
    assert not followed([2.0] * 30).may_learn()
    assert followed([2.0] * 12).may_learn()  # too few to tell
    late = followed(power_law(30))
    late.used = ENDING
    assert not late.may_learn()


def where(scale: float) -> Situation:
    controls = Controls(learning_rate_scale=scale, batch_size=8)
    return Situation(limits=make_limits(), controls=controls, budget_used=0.1, precision_switches=0)


def test_guardrails_refuse_what_the_course_speaks_against() -> None:
    guardrails = Guardrails()
    allowed, refusals = guardrails.review(DOUBLE, where(1.0))
    assert allowed == KEEP
    assert "in the first" in refusals[0]
    assert guardrails.review(HALF, where(1.0))[0] == HALF
    assert "new lows" in guardrails.review(HALF, where(0.5))[1][0]


def test_a_rate_is_not_raised_again_above_where_it_fell_behind() -> None:
    guardrails = Guardrails()
    guardrails.past.course = followed(power_law(PROBED))
    guardrails.corrected(4.0, 1.0)
    assert "above which the loss fell behind" in guardrails.review(DOUBLE, where(1.0))[1][0]


def state_of(guardrails: Guardrails) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(guardrails.state_dict()))
    return state


def test_a_run_of_an_earlier_version_keeps_its_rules() -> None:
    old = state_of(Guardrails())
    del old["past"]["course"], old["scars"]["ceiling"], old["scars"]["corrections"]
    guardrails = Guardrails()
    guardrails.load_state_dict(old)
    assert guardrails.past.course is None
    assert guardrails.review(DOUBLE, where(1.0))[0] == DOUBLE
    again = Guardrails()
    again.load_state_dict(state_of(guardrails))
    assert again.past.course is None


def test_the_course_goes_on_from_a_file() -> None:
    guardrails = Guardrails()
    guardrails.review(KEEP, where(1.0))
    for index, loss in enumerate(power_law(12)):
        guardrails.judge(make_telemetry(train_loss=loss, budget_used=(index + 1) / 50, probe_quadratic=1e-3))
    again = Guardrails()
    again.load_state_dict(state_of(guardrails))
    assert again.past.course == guardrails.past.course
    assert again.past.course is not None
    assert len(again.past.course.losses) == 12
    assert math.isfinite(sum(again.past.course.bends))
