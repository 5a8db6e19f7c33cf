"""Each table of controls has all of them: who adds one and forgets a table learns it here."""

from __future__ import annotations

from dataclasses import fields, replace

from fakes import make_telemetry

from trainpilot.agents.logging.tags import NAMES
from trainpilot.agents.steering.guardrails import MOVED
from trainpilot.envs.action import ACTION_FIELDS, RULES
from trainpilot.experiments.report.controls import CONTROLS
from trainpilot.experiments.results import IntervalResult
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.simulator.records import ControlBatch
from trainpilot.llm_runtime.telemetry import READ_BACK, Telemetry


def names(record: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(record))


def test_every_action_is_ruled_and_shown() -> None:
    actions = {field.name for field in ACTION_FIELDS}
    assert {rule.field for rule in RULES} == actions
    assert {name for control in CONTROLS for name in control.fields} == actions


def test_every_control_is_read_back_stored_and_logged() -> None:
    assert len(READ_BACK) == len(ACTION_FIELDS)
    assert set(READ_BACK) <= set(names(Telemetry)) & set(names(IntervalResult)) & set(NAMES["controls_effective"])
    assert set(NAMES["controls_requested"]) == set(NAMES["advice"]) == set(names(Controls)) == set(names(ControlBatch))


def test_only_what_goes_both_ways_can_oscillate() -> None:
    assert MOVED == ("learning_rate", "batch_size")


def test_a_sentence_is_about_what_moved() -> None:
    first = make_telemetry()
    still = replace(first, requested=Controls(batch_size=8), sparsity=0.0)
    moved = replace(first, requested=Controls(batch_size=16, learning_rate_scale=2.0), sparsity=0.25)

    assert not any(control.told([still, still]) for control in CONTROLS)
    assert [told for control in CONTROLS if (told := control.told([still, moved]))] == [
        "learning rate at 1.00 to 2.00 times the base schedule",
        "batch between 8 and 16 sequences, 16 at the end",
        "sparsity up to 25\N{NO-BREAK SPACE}%",
    ]
