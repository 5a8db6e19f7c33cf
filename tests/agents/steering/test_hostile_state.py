"""A state from a stranger is refused as a whole: whatever is wrong with it, nothing has changed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from decision_records import decision_record
from fakes import make_limits
from torch import nn

from trainpilot.agents.bundle import PolicyBundle, policy_path
from trainpilot.agents.controller import Controller, keep
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.agents.steering.guarded_controller import GuardedController
from trainpilot.agents.steering.guardrails import Guardrails
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import KEEP
from trainpilot.envs.decision import N_STACK, DecisionState, Preference
from trainpilot.envs.observation import ObservationTable
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.energy.meter import NoMeter

BAD: tuple[Any, ...] = ("x", None, -1, math.nan, 10**400, [], {"a": "b"})
DELETED = object()


def steered(steps: int = 0) -> Steering:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    settings = SteeringSettings(
        sequences=160, batch_size=4, sequence_length=1, decisions=10, policy=lambda *_: (4, 1, 0, 0, 0),
        contract=QualityContract(evidence_share=0.2), preference="quality=1",
    )  # fmt: skip
    steering = Steering(model, torch.optim.AdamW(model.parameters(), lr=1e-2), settings, meter=NoMeter("a test"))
    for _ in range(steps):
        one_step(steering)
    return steering


def one_step(steering: Steering) -> None:
    with steering.step() as step:
        rows = torch.linspace(-1, 1, 4 * step.batch_size).view(-1, 4)
        step.backward(lambda batch: (steering.loop.model(batch) - batch[:, :1]).square().mean(), batch=rows)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every part of a state, and of the first in each list."""
    if path:
        yield path
    if isinstance(content, dict):
        for name, value in content.items():
            yield from places(value, (*path, name))
    elif isinstance(content, list | tuple) and content:
        yield from places(content[0], (*path, 0))


def changed(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return a state that differs in one place."""
    state = copy.deepcopy(state)
    inner: Any = state
    for name in path[:-1]:
        if isinstance(inner[name], tuple):
            inner[name] = list(inner[name])
        inner = inner[name]
    if value is DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return state


def standing(steering: Steering) -> str:
    """Return what a steered run depends on; its readings hold the clock."""
    state = steering.state_dict()
    own = {name: state[name] for name in ("course", "controls", "levers", "controller", "fine_tuning", "spoilt")}
    guardrails = steering.controller.guardrails
    return json.dumps([own, steering.learning_rate, guardrails.base_learning_rate, steering.validation_loss])


def test_a_state_with_one_thing_wrong_changes_nothing() -> None:
    state = steered(17).state_dict()
    other, refused = steered(3), 0
    before = standing(other)
    for path in list(places(state)):
        for value in (DELETED, *BAD):
            if path[:2] == ("controller", "records") and (value != "x" or "observation" in path[:-1]):
                continue  # a text in place of each of a record's values is enough
            if (message := refusal(other, changed(state, path, value))) is not None:
                refused += 1
                assert message.isprintable(), (path, value)
                assert standing(other) == before, (path, value)
            else:
                assert 0 <= other.learning_rate < math.inf, (path, value)
                other = steered(3)
    assert refused > 400


def refusal(steering: Steering, state: Any) -> str | None:
    """Return why a state is refused; `None` where it is loaded."""
    try:
        steering.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("course", "sequences"), -1e9),
        (("course", "sequences"), -1),
        (("course", "decision"), "4"),
        (("controls", "batch_size"), "4"),
        (("readings", "interval", "losses"), ["1.5"]),
        (("controller", "contract", "past", "rows", 0, "loss"), 1e308),
        (("levers", "peak"), -1.0),
        (("levers", "peak"), math.nan),
        (("levers", "set"), [1.0, 2.0]),
        (("controls", "batch_size"), -4),
        (("controls", "sparsity"), 0.5),
        (("readings", "before"), [torch.zeros(3)]),
        (("readings", "before"), [torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1)]),
        (("controller", "seen"), [0, 0]),
        (("controller", "seen"), [99]),
        (("controller", "decision", "controls", "learning_rate_scale"), 1e9),
        (("controller", "records", 0, "requested"), [9, 1, 0, 0, 0]),
        (("controller", "records", 0, "telemetry", "precision"), "fp8"),
        (("controller", "records", 0, "telemetry", "tokens"), -5),
        (("controller", "guardrails", "past", "moves"), {"learning_rate": [1]}),
        (("controller", "guardrails", "past", "moves", "learning_rate"), [1] * 9),
        (("controller", "guardrails", "scars", "rollbacks"), -3),
        (("settings", "sequences"), 5),
    ],
)
def test_what_once_trained_on_or_crashed_is_refused(path: tuple[Any, ...], value: Any) -> None:
    state = changed(steered(17).state_dict(), path, value)
    assert refusal(steered(), state)


@pytest.mark.parametrize("state", [None, [], 5, "x", {}, {"settings": {}}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    assert refusal(steered(), state)
    with pytest.raises(ValueError, match=r"state must be|levers fields missing"):
        Steering.saved_peaks(state)


def test_the_true_state_still_loads_and_trains_on() -> None:
    first, second = steered(17), steered()
    second.loop.model.load_state_dict(first.loop.model.state_dict())
    second.loop.optimizer.load_state_dict(copy.deepcopy(first.loop.optimizer.state_dict()))
    second.load_state_dict(first.state_dict())
    assert json.loads(standing(second))[0]["levers"] == json.loads(standing(first))[0]["levers"]
    for _ in range(6):
        one_step(first)
        one_step(second)
    assert torch.equal(first.loop.model.weight, second.loop.model.weight)  # type: ignore[arg-type]
    assert first.learning_rate == second.learning_rate


def test_repeated_intervals_leave_the_same_state_as_one_by_one() -> None:
    bundle = PolicyBundle.load(policy_path("default"))
    random = np.random.default_rng(0)
    for n_intervals in (1, N_STACK - 1, N_STACK, 40):
        limits = replace(make_limits(), decisions=50)
        slow, fast = (DecisionState(limits, Preference(), bundle.fields, 0.25) for _ in range(2))
        past = []
        for index in range(n_intervals):
            action = (int(random.integers(2, 6)), 1, 0, 0, 0)
            slow.apply(action)
            held = replace(slow.controls, precision="bf16") if index == 20 else slow.controls
            slow.hold(held)
            loss = 5.0 + float(random.normal()) / (1 + index)
            base = decision_record(index % 4).telemetry
            telemetry = replace(base, decision=index, train_loss=loss, tokens=1000 * (index + 1), requested=held)
            slow.observe(telemetry)
            past.append((action, telemetry))
        fast.repeat(past)
        assert np.array_equal(slow.observation(), fast.observation())
        assert np.array_equal(slow.action_masks(), fast.action_masks())
        assert slow.fields() == fast.fields()
        assert (slow.controls, slow.precision_switches, slow.last_action) == (
            fast.controls, fast.precision_switches, fast.last_action,
        )  # fmt: skip
        one_more = (KEEP, replace(past[-1][1], train_loss=1.0))
        for state in (slow, fast):
            state.repeat([one_more])
        assert np.array_equal(slow.observation(), fast.observation())


def test_loading_computes_only_observations_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took 5 ms for each record; now two thousand of them take less than a second."""
    limits = make_limits(decisions=200)
    guarded = GuardedController(Controller(keep, limits, Preference()), Guardrails())
    controls = Controls(batch_size=limits.start.batch_size)
    for index in range(200):
        guarded.decide(guarded.records[-1].telemetry if guarded.records else None)
        guarded.record(replace(decision_record(index % 4).telemetry, decision=index, requested=controls))
    state, calls, encode = guarded.state_dict(), [], ObservationTable.encode

    def counted(self: ObservationTable, view: Any) -> Any:
        calls.append(view)
        return encode(self, view)

    again = GuardedController(Controller(keep, limits, Preference()), Guardrails())
    monkeypatch.setattr(ObservationTable, "encode", counted)
    again.load_state_dict(state)
    assert len(calls) == N_STACK + 1
    assert np.array_equal(again.controller.state.observation(), guarded.controller.state.observation())


def test_a_state_without_the_decision_in_force_is_refused() -> None:
    message = refusal(steered(3), changed(steered(17).state_dict(), ("controller", "decision"), None))
    assert message is not None
    assert "decision must be held while its interval is not recorded" in message


@pytest.mark.parametrize("scale", [1e308, 65.0])
def test_a_learning_rate_scale_that_nobody_can_have_set_is_refused(scale: float) -> None:
    other = steered(3)
    message = refusal(other, changed(steered(17).state_dict(), ("controls", "learning_rate_scale"), scale))
    assert message is not None
    assert f"learning_rate_scale must be at most 64, got {scale:g}" in message


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        (("controls", "learning_rate_scale"), DELETED, "controls must hold learning_rate_scale"),
        (("controller", "decision", "controls", "sparsity"), DELETED, "controls must hold sparsity"),
        (("controller", "fallen_back"), ["a reason", None], "fallen_back must be a reason and a decision, or neither"),
    ],
)
def test_a_state_that_would_train_on_differently_is_refused(path: tuple[Any, ...], value: Any, rule: str) -> None:
    message = refusal(steered(3), changed(steered(17).state_dict(), path, value))
    assert message is not None
    assert rule in message


def test_more_records_than_a_run_can_have_are_refused_unread() -> None:
    state = steered(17).state_dict()
    many = changed(state, ("controller", "records"), [{}] * 20_000)
    assert "must be at most 100 for 10 decisions, got 20000" in (refusal(steered(3), many) or "")
