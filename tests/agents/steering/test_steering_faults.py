"""Whatever a policy, a meter or the data does to a steered loop: no run is lost, and the log says what happened."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_runs import LLAMA, case
from steering_loops import Loop, asked

from trainpilot.agents.controller import Policy
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=25_600, batch_size=4, decisions=25, base_learning_rate=3e-3, schedule="wsd")


def loop(config: RunConfig, policy: str | Policy, **settings: Any) -> Loop:
    return Loop(config, policy, rewinds=True, **settings)


def left_alone(config: RunConfig) -> Loop:
    base = loop(config, "none")
    base.train()
    return base


def final_loss(mine: Loop) -> float:
    """Return the loss on text that no step has seen, in nats/token."""
    held_out = torch.from_numpy(np.stack([mine.stream.peek(64)[i] for i in range(64)]))
    with torch.no_grad():
        return float(mine.loss(held_out))


def promised(base: Loop) -> QualityContract:
    """Return a contract against the losses of the base schedule's own run."""
    known = [(r.telemetry.budget_used, r.telemetry.train_loss) for r in base.steering.records]
    return QualityContract(reference=known, from_start=True, max_slowdown=100.0)


def always_raise(observation: np.ndarray, masks: np.ndarray) -> Action:
    return (6, *KEEP[1:])


def not_a_number(observation: np.ndarray, masks: np.ndarray) -> Action:
    return (math.nan,) * len(KEEP)  # type: ignore[return-value]


def raises_errors(observation: np.ndarray, masks: np.ndarray) -> Action:
    raise ZeroDivisionError("policy")


class Flips:
    """Doubles and halves the batch in turn."""

    def __init__(self) -> None:
        self.up = False

    def __call__(self, observation: np.ndarray, masks: np.ndarray) -> Action:
        self.up = not self.up
        return (KEEP[0], 2 if self.up else 0, *KEEP[2:])


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (lambda: always_raise, "learning_rate"),
        (lambda: not_a_number, "policy failed"),
        (lambda: raises_errors, "ZeroDivisionError"),
        (Flips, "changes of direction"),
    ],
    ids=["always raises", "not a number", "raises errors", "flips the batch"],
)
def test_a_bad_policy_loses_no_run(config: RunConfig, policy: Callable[[], Policy], says: str) -> None:
    base = left_alone(config)
    mine = loop(config, policy(), contract=promised(base))
    mine.train()
    assert mine.steering.finished
    assert final_loss(mine) < 1.02 * final_loss(base)
    reasons = [reason for record in mine.steering.records for reason in record.refusals]
    summary = mine.steering.summary()
    assert says in " ".join([*reasons, str(summary["fallen_back"]), *summary["refusals"]])


def test_a_policy_that_fails_every_time_is_left_out_of_the_run(config: RunConfig) -> None:
    mine = loop(config, raises_errors)
    mine.train()
    base = left_alone(config)
    assert asked(mine) == asked(base)
    assert "5 times running" in mine.steering.summary()["fallen_back"]


def test_a_policy_that_exits_ends_no_run(config: RunConfig) -> None:
    def exits(observation: np.ndarray, masks: np.ndarray) -> Action:
        raise SystemExit(3)

    mine = loop(config, exits)
    mine.train(100)
    assert "SystemExit" in mine.steering.summary()["fallen_back"]


def test_a_policy_that_is_interrupted_ends_the_run(config: RunConfig) -> None:
    def interrupted(observation: np.ndarray, masks: np.ndarray) -> Action:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(config, interrupted)


def test_a_contract_from_the_start_needs_data_that_go_back(config: RunConfig) -> None:
    contract = QualityContract(reference=[(0.1, 3.0), (1.0, 2.0)], from_start=True)
    with pytest.raises(ValueError, match=r"contract must be without from_start=True .* got no data; give Steering"):
        Loop(config, lambda *_: KEEP, contract=contract)
    Loop(config, lambda *_: KEEP, contract=contract, mode="advise")  # nothing is taken back
    Loop(config, lambda *_: KEEP, contract=contract, rewinds=True)


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_an_optimizer_without_a_finite_rate_is_refused(rate: float) -> None:
    model = torch.nn.Linear(2, 1)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "lr": rate}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    settings = SteeringSettings(sequences=100, batch_size=2, policy="none")
    with pytest.raises(ValueError, match=r"^optimizer must have finite learning rates, .* got 0\.1, (nan|inf)"):
        Steering(model, optimizer, settings)


def test_a_schedule_is_no_text() -> None:
    with pytest.raises(ValueError, match=r"^base_schedule must be a BaseSchedule, .* got 'wsd'"):
        SteeringSettings(sequences=100, batch_size=2, base_schedule="wsd")  # type: ignore[arg-type]


class DyingMeter(EnergyMeter):
    """Reads a few times, and then knows nothing."""

    description = "a meter that dies"

    def __init__(self, readings: int) -> None:
        self.left = readings

    def read(self) -> EnergyReading:
        self.left -= 1
        known = 100.0 - self.left if self.left > 0 else None
        return EnergyReading(time_s=0.0, energy_j=known, source="measured_counter" if known else None)

    def close(self) -> None:
        """Do nothing."""


def test_a_meter_that_dies_leaves_its_joules_unknown(config: RunConfig) -> None:
    mine = loop(config, "none")
    mine.steering.loop.recorder.stopwatch.meter = DyingMeter(7)
    mine.train()
    told = [record.telemetry.energy_j for record in mine.steering.records]
    assert told[0] is not None
    assert told[-1] is None
    assert mine.steering.summary()["energy_j"] is None
    assert final_loss(mine) == pytest.approx(final_loss(left_alone(config)))


def test_an_interval_of_lost_steps_is_taken_back(config: RunConfig) -> None:
    base = left_alone(config)
    mine = loop(config, lambda *_: KEEP)
    clean, steps = mine.loss, 0

    def spoilt(batch: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return clean(batch) * (math.nan if 97 <= steps < 106 else 1.0)  # nine of an interval's sixteen steps

    mine.loss = spoilt  # type: ignore[method-assign]
    mine.train()
    summary = mine.steering.summary()
    assert len(summary["rollbacks"]) == 1
    assert "not finite" in summary["rollbacks"][0]["reason"]
    mine.loss = clean  # type: ignore[method-assign]
    assert final_loss(mine) < 1.02 * final_loss(base)
