"""Learning that a run withholds from itself is counted against a reference, and bounded by what was agreed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fakes import TOY_CASE, ToyPlant, make_telemetry

from trainpilot.agents.controller import Controller, Policy, keep
from trainpilot.agents.steering.contract import ContractWatch, QualityContract
from trainpilot.agents.steering.guarded_controller import TOO_SLOW, GuardedController, RollbackController
from trainpilot.agents.steering.guardrails import Guardrails, GuardrailSettings
from trainpilot.agents.steering.saved_state import SavedContract
from trainpilot.agents.steering.withheld import ReferenceFall, at_speed, relative_speed
from trainpilot.envs.action import KEEP
from trainpilot.envs.decision import Preference

N = 50
LINE = tuple((i / N, 4 - i / N) for i in range(1, N + 1))
"""A reference that falls by 1 nat/token over its budget, so by 0.02 in an interval."""
START = replace(TOY_CASE.start(), batch_size=16)


def watch(speeds: Sequence[float], extra: float = 0.0, agreed: float = 0.01) -> ContractWatch:
    """Return what a contract knows after intervals at these speeds, `extra` nats above the reference."""
    found = ContractWatch(QualityContract(reference=LINE, max_loss_increase=agreed))
    for index, speed in enumerate(speeds):
        share = (index + 1) / N
        found.observe(
            make_telemetry(decision=index, budget_used=share, train_loss=4 - share + extra, train_loss_std=0.001),
            speed=speed,
        )
    return found


def test_speed_falls_with_the_fourth_root_of_the_batch() -> None:
    assert relative_speed(START, START) == 1
    assert relative_speed(replace(START, learning_rate_scale=0.5, batch_size=1), START) == pytest.approx(1.0)
    assert relative_speed(replace(START, batch_size=256), START) == pytest.approx(0.5)


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 1), (16, 16), (64, 16)])
def test_controls_at_a_speed_have_it_and_no_larger_batch(batch_size: int, expected: int) -> None:
    found = at_speed(0.75, replace(START, batch_size=batch_size), START)
    assert found.batch_size == expected
    assert relative_speed(found, START) == pytest.approx(0.75)


def test_a_straight_fall_is_read_from_the_reference() -> None:
    fall = ReferenceFall.of(LINE)
    assert fall.rate == pytest.approx(1.0)
    assert fall.end == pytest.approx(3.05)  # the mean of its last tenth
    assert fall.left(0.2, 3.8) == pytest.approx(0.5)  # the later half
    assert fall.left(0.75, 3.25) == pytest.approx(0.25)
    assert ReferenceFall.of([(0.5, 2.0), (1.0, 3.0)]).rate == 0  # one that rises gives nothing to miss


def test_withheld_learning_is_counted_in_nats() -> None:
    assert watch([1.0] * 12).withheld() == 0
    assert watch([1.0] * 10 + [0.5, 0.25, 2.0]).withheld() == pytest.approx(0.01 + 0.015)


def test_no_more_is_withheld_than_agreed() -> None:
    before = watch([1.0] * 12)
    assert before.least_speed(0.5, 1.0, 1.0) == 0.5  # costs 0.01
    assert before.least_speed(0.4, 1.0, 1.0) == 1.0  # costs 0.012
    after = watch([1.0] * 12 + [0.5])
    assert after.least_speed(0.9, 1.0, 1.0) == 1.0
    assert after.least_speed(0.5, 0.5, 1.0) == 0.75  # brought up by half at a time
    assert watch([1.0] * 12 + [0.5], agreed=0.1).least_speed(0.5, 0.5, 1.0) == 0.5


def test_a_loss_that_is_much_lower_pays_for_a_low_rate() -> None:
    # half of the speed may hide half of what the reference gains in its later half, 0.25 nats
    assert watch([1.0] * 12 + [0.5] * 3, extra=-0.2).least_speed(0.5, 0.5, 1.0) == 0.75
    assert watch([1.0] * 12 + [0.5] * 3, extra=-0.3).least_speed(0.5, 0.5, 1.0) == 0.5


def test_a_policy_that_begins_low_looks_for_its_rate_from_below() -> None:
    early = watch([0.5] * 5)
    assert early.least_speed(0.3, 0.5, 0.5) == 0.3
    assert early.least_speed(0.2, 0.5, 0.5) == 0.25
    assert watch([0.5] * 10).least_speed(0.3, 0.5, 0.5) == 0.75  # a fifth of the budget is used


def test_late_in_the_budget_the_speed_does_not_rise_above_the_reference() -> None:
    assert watch([1.0] * 34).most_speed(1.0) == math.inf
    assert watch([1.0] * 35).most_speed(0.5) == 1.0
    assert watch([1.0] * 35).most_speed(2.0) == 2.0


def test_without_a_reference_nothing_is_held() -> None:
    found = ContractWatch(QualityContract())
    for index in range(N):
        found.observe(make_telemetry(decision=index, budget_used=(index + 1) / N), speed=0.1)
    assert found.least_speed(0.01, 0.1, 1.0) == 0.01
    assert found.most_speed(1.0) == math.inf
    assert found.withheld() == 0


def test_losses_that_swing_together_hide_no_difference() -> None:
    swings = [(share, loss + (0.2 if index % 2 else -0.2)) for index, (share, loss) in enumerate(LINE)]
    found = ContractWatch(QualityContract(reference=swings))
    broken = []
    for index, (share, loss) in enumerate(swings):
        above = (0.03 if index % 2 else 0.025) if index >= 10 else 0.0
        told = make_telemetry(decision=index, budget_used=share, train_loss=loss + above, train_loss_std=0.4, steps=4)
        broken.append(found.observe(told))  # standard errors of 0.2 nats, seven times the difference
    assert any("nats above" in reason for reason in broken if reason)


def test_a_last_interval_that_is_high_by_chance_lets_no_run_end_early() -> None:
    swings = [(share, loss + (0.2 if index % 2 else -0.2)) for index, (share, loss) in enumerate(LINE)]
    found = ContractWatch(QualityContract(reference=swings))
    for index in range(40):  # up to 3.2, as the reference's last interval, the true end of which is 3
        found.observe(make_telemetry(decision=index, budget_used=(index + 1) / N, train_loss=4 - (index + 1) / N))
    assert found.refuses_finish() is not None
    assert ReferenceFall.of(swings).swing == pytest.approx(0.4 / math.sqrt(2), rel=0.02)
    assert ReferenceFall.of(LINE).swing == pytest.approx(0.02 / math.sqrt(2))


def test_a_state_from_before_has_no_speeds_and_loads() -> None:
    state = json.loads(json.dumps(watch([0.5] * 3).state_dict()))
    for row in state["past"]["rows"]:
        del row["speed"]
    found = ContractWatch(QualityContract(reference=LINE))
    found.load_state_dict(SavedContract.from_json(state).to_json())
    assert found.withheld() == 0
    assert len(found.past_state()["rows"]) == 3


def steered(policy: Policy, reference: Sequence[tuple[float, float]] | None) -> GuardedController:
    """Return the controller of a toy run of twenty intervals."""
    plant = ToyPlant()
    contract = QualityContract(reference=reference) if reference else None
    bounds = Guardrails(GuardrailSettings(cautious=False))
    guarded = GuardedController(Controller(policy, plant.limits(), Preference()), bounds, contract)
    run, telemetry = RollbackController(guarded, plant), None
    while telemetry is None or not telemetry.finished:
        telemetry = plant.advance(run.decide(telemetry), 1 / TOY_CASE.decisions)
        guarded.record(telemetry)
    return guarded


def test_a_policy_that_lowers_the_rate_is_held_and_not_ended() -> None:
    base = steered(keep, None)
    reference = [(each.telemetry.budget_used, each.telemetry.train_loss) for each in base.records]
    actions = iter([KEEP] * 8 + [(2, *KEEP[1:])] * 20)  # a sixth lower at each decision
    run = steered(lambda observation, masks: next(actions), reference)
    # the toy falls by 0.52 nats per budget: an interval at 0.84 costs 0.0042, and 0.01 is agreed
    scales = [record.telemetry.requested.learning_rate_scale for record in run.records]
    assert scales == pytest.approx([1.0] * 8 + [0.84, 1.0, 0.84] + [1.0] * 9)
    assert run.summary()["refusals"][TOO_SLOW] == 10
    assert run.fallen_back is None
    assert run.watch is not None
    assert run.watch.withheld() == pytest.approx(2 * 0.16 * 0.05 * 0.5237, rel=1e-3)
