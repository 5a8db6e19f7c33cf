"""A plain loop under a budget in seconds or joules ends with it, is resumed with what was left, and refuses clearly."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import PassClock, SetClock, SetMeter
from live_runs import LLAMA, case
from steering_loops import Loop
from torch import nn

from trainpilot.agents.controller import keep
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import NoMeter


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=6_400, batch_size=4, decisions=10)


class Clocked:
    """A loop over a model of two weights whose steps take as many seconds, and joules, as a test says."""

    def __init__(self, **settings: Any) -> None:
        self.clock, self.meter = SetClock(), SetMeter()
        self.model = nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        options: dict[str, Any] = {"budget": "100s", "batch_size": 4, "policy": keep, "decisions": 10, "probe": False}
        self.steering = Steering(
            self.model, optimizer, SteeringSettings(**options | settings), meter=self.meter, clock=self.clock
        )
        self.rates: list[float] = []

    def step(self, cost: float = 1.0) -> None:
        with self.steering.step() as step:
            step.backward(lambda: self.model(torch.ones(step.batch_size, 2)).square().mean())
            self.rates.append(step.learning_rate)
            self.clock.now_s += cost
            self.meter.energy_j = (self.meter.energy_j or 0.0) + 2 * cost

    def train(self, cost: float = 1.0, steps: int = 10**6) -> int:
        done = 0
        while not self.steering.finished and done < steps:
            self.step(cost)
            done += 1
        return done


@pytest.mark.parametrize(("budget", "steps"), [("100s", 100), ("100J", 50), ("0.1kJ", 50)])
def test_steps_of_a_second_and_two_joules(budget: str, steps: int) -> None:
    loop = Clocked(budget=budget)
    assert loop.train() == steps
    records = [record.telemetry for record in loop.steering.records]
    assert [each.budget_used for each in records] == pytest.approx([k / 10 for k in range(1, 11)], abs=0.011)
    assert sum(each.time_s for each in records) == pytest.approx(steps)
    # Linear after a warm-up of 2 %: the last step begins when all but its own share is used.
    assert loop.rates[-1] == pytest.approx(1e-2 / steps / 0.98, rel=1e-3)
    assert max(loop.rates) == pytest.approx(1e-2, rel=0.02)
    assert loop.steering.summary()["budget_used"] == pytest.approx(1.0)


def test_what_comes_before_the_first_step_is_free() -> None:
    loop = Clocked()
    loop.clock.now_s += 1_000.0
    loop.train(steps=20)
    loop.clock.now_s += 30.0
    assert loop.train() == 50


def test_validation_counts_and_leaves_room_for_the_last() -> None:
    loop = Clocked(decisions=20)

    def validate() -> float:
        loop.clock.now_s += 5.0
        return 1.0

    loop.steering.validate = validate
    begun_s = loop.clock.now_s
    loop.train(0.5)
    assert len(loop.steering.records) == 20
    assert loop.clock.now_s - begun_s == pytest.approx(100.0, abs=1.0)  # validated after 10 and after 20 decisions


def test_a_saved_loop_goes_on_with_what_was_left() -> None:
    loop = Clocked()
    loop.train(steps=37)
    file = io.BytesIO()
    state: dict[str, Any] = {"model": loop.model, "optimizer": loop.steering.loop.optimizer, "steering": loop.steering}
    torch.save({name: part.state_dict() for name, part in state.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    again = Clocked()
    again.clock.now_s = 1e6
    again.model.load_state_dict(saved["model"])
    again.steering.loop.optimizer.load_state_dict(saved["optimizer"])
    again.steering.load_state_dict(saved["steering"])
    again.clock.now_s += 500.0
    assert again.train() == 63
    assert [record.telemetry.decision for record in again.steering.records] == list(range(10))
    assert again.rates[-1] == pytest.approx(1e-2 / 98, rel=1e-3)


def test_a_loop_in_seconds_ends_with_them(config: RunConfig) -> None:
    with PassClock() as clock:
        loop = Loop(config, keep, sequences=None, budget="2s", clock=clock)
        loop.train()
    assert clock.now_s == pytest.approx(2.0, abs=0.01)
    assert loop.rates[-1] < 0.02 * config.base_learning_rate


def test_by_the_system_s_clock_a_loop_takes_its_seconds(config: RunConfig) -> None:
    loop = Loop(config, keep, sequences=None, budget="0.5s")
    start_s = time.perf_counter()
    loop.train()
    assert time.perf_counter() - start_s > 0.4  # a busy machine may take longer
    assert loop.steering.finished


def test_the_largest_batch_follows_the_estimate_if_there_is_one() -> None:
    limits = [Clocked(sequences=n).steering.controller.controller.state.limits for n in (None, 1_600, 80)]
    largest = [each.max_batch_size for each in limits]
    assert largest == [64, 40, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": None}, "sequences, the budget, must be given, got None; or give a budget such as '600s' or '50kJ'"),
        ({"budget": "0s"}, "budget must be above 0, got 0s"),
        ({"budget": "soon"}, "budget must be tokens such as 1M, seconds such as 600s"),
        ({"budget": "1M"}, "budget must be in seconds or joules, got '1M'; give sequences instead"),
        ({"sequences": 0}, "sequences must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_budgets_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        Clocked(**settings)
    assert str(raised.value).startswith(message)


def test_joules_without_a_meter_are_refused(config: RunConfig) -> None:
    model = nn.Linear(2, 1)
    settings = SteeringSettings(budget="5kJ", batch_size=4, policy=keep)
    with pytest.raises(ValueError, match=r"^budget in joules needs a meter .*; give a budget in seconds or tokens$"):
        Steering(model, torch.optim.AdamW(model.parameters()), settings, meter=NoMeter("a test"))


def test_a_run_is_not_resumed_under_another_budget() -> None:
    loop = Clocked()
    loop.train(steps=5)
    message = r"^budget must be what it was when the state was saved, '100s', got '200s'$"
    with pytest.raises(ValueError, match=message):
        Clocked(budget="200s").steering.load_state_dict(loop.steering.state_dict())
