"""Meters, clocks, validations and logs of the user's own: what fails or lies ends no run and is never recorded."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import SetClock
from live_runs import LLAMA, case
from torch import nn

from trainpilot.agents.controller import keep
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, NoMeter
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.telemetry import Telemetry

LIMIT_W = 700.0


class Counter(EnergyMeter):
    """Counts 300 W on the run's clock until a number of readings, and then says what a test wants."""

    description = "a test's counter"

    def __init__(self, clock: SetClock, then: Callable[[EnergyReading], Any], powered: bool = False) -> None:
        self.clock, self.then, self.left, self.powered = clock, then, 5, powered

    def read(self) -> EnergyReading:
        self.left -= 1
        told: dict[str, Any] = {"power_w": 300.0, "power_limit_w": LIMIT_W} if self.powered else {}
        now_s = self.clock.now_s
        true = EnergyReading(time_s=now_s, energy_j=300 * now_s, source="measured_counter", **told)
        return true if self.left > 0 else self.then(true)  # type: ignore[no-any-return]


def trained(
    *, meter: EnergyMeter | None = None, clock: Any = None, real: SetClock | None = None, **options: Any
) -> list[Telemetry]:
    """Train two weights for ten intervals of four steps of one second, and return what was recorded."""
    real = real or SetClock()
    model = nn.Linear(2, 1, bias=False)
    settings = SteeringSettings(sequences=160, batch_size=4, decisions=10, policy=keep, probe=False)
    steering = Steering(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), settings, meter=meter or NoMeter("a test"),
        clock=clock or real, **options,
    )  # fmt: skip
    while not steering.finished:
        with steering.step() as step:
            real.now_s += 1.0
            step.backward(lambda: model(torch.ones(step.batch_size, 2)).square().mean())
    records = [record.telemetry for record in steering.records]
    assert len(records) == 10
    json.dumps([record.to_json() for record in steering.records], allow_nan=False)
    json.dumps(steering.summary(), allow_nan=False)
    return records


def changed(reading: EnergyReading, **values: Any) -> EnergyReading:
    return EnergyReading(**{**vars(reading), **values})


def explodes(_: EnergyReading) -> Any:
    raise RuntimeError("unplugged")


FAULTS: dict[str, Callable[[EnergyReading], Any]] = {
    "raises": explodes,
    "nothing": lambda _: None,
    "text": lambda _: "300 J",
    "not a number": lambda true: changed(true, energy_j=math.nan),
    "infinite": lambda true: changed(true, energy_j=math.inf),
    "negative": lambda true: changed(true, energy_j=-50.0),
    "falls": lambda true: changed(true, energy_j=1e6 - 300 * true.time_s),
    "jumps": lambda true: changed(true, energy_j=true.energy_j + 1e15),  # type: ignore[operator]
    "time goes back": lambda true: changed(true, time_s=-true.time_s),
    "time is no number": lambda true: changed(true, time_s=math.nan),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_meter_that_fails_or_lies_leaves_its_joules_unknown(fault: str) -> None:
    clock = SetClock()
    with pytest.warns(RuntimeWarning, match="energy meter Counter") as caught:
        records = trained(meter=Counter(clock, FAULTS[fault]), real=clock)
    assert len(caught) == 1
    assert records[0].energy_j == 300 * records[0].time_s
    assert records[0].energy_source == "measured_counter"
    assert {(each.energy_j, each.energy_source) for each in records[3:]} == {(None, None)}


@pytest.mark.parametrize(
    "fault",
    [
        lambda true: changed(true, energy_j=1200.0),
        lambda true: changed(true, energy_j=1e6 - 300 * true.time_s),
        lambda true: changed(true, energy_j=10_000 * true.time_s),
        lambda true: changed(true, energy_j=float(2**63)),
    ],
    ids=["stands still", "falls", "rises too fast", "largest"],
)
def test_where_the_power_is_known_joules_stay_between_zero_and_the_limit(fault: Any) -> None:
    clock = SetClock()
    with pytest.warns(RuntimeWarning, match="power times seconds is taken instead") as caught:
        records = trained(meter=Counter(clock, fault, powered=True), real=clock)
    assert len(caught) == 1
    for each in records:
        assert each.energy_j is not None
        assert 0 < each.energy_j <= LIMIT_W * max(each.time_s, 1.0)
    assert records[-1].energy_source == "measured_power"
    assert records[-1].energy_j == pytest.approx(300 * records[-1].time_s)


def test_a_counter_that_stands_still_counts_no_zero_joules() -> None:
    clock = SetClock()
    records = trained(meter=Counter(clock, lambda true: changed(true, energy_j=1200.0)), real=clock)
    assert records[0].energy_j == 300 * records[0].time_s
    assert {(each.energy_j, each.energy_source, each.power_w) for each in records[3:]} == {(None, None, None)}


@pytest.mark.parametrize(
    "fault",
    [
        lambda true: changed(true, time_s=true.time_s + (3e7 if true.time_s > 13 else 0)),
        lambda true: changed(true, time_s=1e3 * true.time_s, energy_j=1e3 * true.energy_j),
    ],
    ids=["a year on", "milliseconds"],
)
def test_more_joules_than_the_power_limit_allows_are_unknown(fault: Any) -> None:
    clock = SetClock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = trained(meter=Counter(clock, fault, powered=True), real=clock)
    assert None in [each.energy_j for each in records]
    assert all(each.energy_j is None or each.energy_j <= LIMIT_W * each.time_s for each in records)


def test_a_good_meter_and_a_good_clock_give_no_warning() -> None:
    clock = SetClock()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = trained(meter=Counter(clock, lambda true: true, powered=True), real=clock)
    assert [each.energy_j for each in records[1:]] == [1200.0] * 9


class Faulty(SetClock):
    """A clock that is right for fifteen seconds of training."""

    def __init__(self, then: Callable[[float], Any]) -> None:
        super().__init__()
        self.then = then

    def __call__(self) -> float:
        return self.now_s if self.now_s < 15 else self.then(self.now_s)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "then",
    [
        lambda now_s: now_s - 3600,
        lambda now_s: math.nan,
        lambda now_s: -math.inf,
        lambda now_s: None,
        lambda now_s: "noon",
        lambda now_s: 1 / 0,
    ],
    ids=["goes back", "not a number", "infinite", "nothing", "text", "raises"],
)
def test_a_clock_that_fails_or_lies_gives_no_wrong_seconds(then: Callable[[float], Any]) -> None:
    clock = Faulty(then)
    with pytest.warns(RuntimeWarning, match="from now on seconds are the system's") as caught:
        records = trained(clock=clock, real=clock)
    assert len(caught) == 1
    assert [each.time_s for each in records[1:3]] == [4.0, 4.0]
    assert all(0 <= each.time_s < 60 for each in records)


@pytest.mark.parametrize("budget", ["40s", "12kJ"])
def test_a_measured_budget_goes_on_with_a_clock_or_a_meter_that_fails(budget: str) -> None:
    clock = Faulty(lambda now_s: math.nan) if budget == "40s" else SetClock()
    meter = NoMeter("a test") if budget == "40s" else Counter(clock, explodes)
    model = nn.Linear(2, 1, bias=False)
    settings = SteeringSettings(budget=budget, batch_size=4, decisions=10, policy=keep, probe=False)
    steering = Steering(model, torch.optim.AdamW(model.parameters(), lr=1e-2), settings, meter=meter, clock=clock)

    def sixty_steps() -> None:
        for _ in range(60):
            if not steering.finished:
                with steering.step() as step:
                    clock.now_s += 1.0
                    step.backward(lambda: model(torch.ones(step.batch_size, 2)).square().mean())

    with pytest.warns(RuntimeWarning, match="clock must return|energy meter Counter raised") as caught:
        sixty_steps()
    assert len(caught) == 1
    assert all(record.telemetry.time_s >= 0 for record in steering.records)
    assert math.isfinite(steering.summary()["budget_used"])
    assert steering.finished is (budget == "12kJ")  # joules are extrapolated; the system's seconds have hardly begun


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (explodes, "validate raised TypeError"),
        (lambda: 1 / 0, "validate raised ZeroDivisionError"),
        (lambda: None, "validate raised TypeError"),
        (lambda: "low", "validate raised ValueError"),
        (lambda: math.nan, "validate must return a loss of at least 0 nats/token, got nan"),
        (lambda: math.inf, "got inf"),
        (lambda: -1.0, "got -1.0"),
    ],
    ids=["wrong arguments", "raises", "nothing", "text", "not a number", "infinite", "negative"],
)
def test_a_validation_that_fails_or_lies_is_unknown(result: Any, says: str) -> None:
    with pytest.warns(RuntimeWarning, match=says) as caught:
        records = trained(validate=result)
    assert len(caught) == 1
    assert {each.validation_loss for each in records} == {None}


@pytest.mark.parametrize("error", [OSError("disk full"), SystemExit("disk full")], ids=["error", "exit"])
def test_a_log_that_fails_costs_its_entries_and_not_the_run(error: BaseException) -> None:
    seen = []

    def fails(record: Any) -> None:
        seen.append(record)
        raise error

    with pytest.warns(RuntimeWarning, match=f"on_decision raised {type(error).__name__}: disk full") as caught:
        trained(on_decision=fails)
    assert len(caught) == 1
    assert len(seen) == 10


class Position:
    """A position of data that knows no more than how often they have been seen, if it does."""

    def __init__(self, seen: Callable[[], Any]) -> None:
        self.seen = seen

    @property
    def epochs_seen(self) -> Any:
        return self.seen()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Stay where the data are."""


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        (lambda: 1 / 0, "raised ZeroDivisionError"),
        (lambda: sys.exit(1), "raised SystemExit"),
        (lambda: math.nan, "must be at least 0, got nan"),
        (lambda: math.inf, "must be at least 0, got inf"),
        (lambda: -5.0, "must be at least 0, got -5.0"),
        (lambda: "2", "raised TypeError"),
        (lambda: 10**400, "raised OverflowError"),
    ],
    ids=["raises", "exits", "not a number", "infinite", "negative", "text", "huge"],
)
def test_epochs_that_cannot_be_are_unknown(seen: Any, says: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"data.epochs_seen {says}") as caught:
        records = trained(data=Position(seen))
    assert len(caught) == 1
    assert {each.epochs_seen for each in records} == {None}


def test_a_person_can_still_end_a_run() -> None:
    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    for name in ("validate", "on_decision", "clock"):
        given: dict[str, Any] = {name: interrupted}
        with pytest.raises(KeyboardInterrupt):
            trained(**given)


def test_a_clock_that_stands_still_breaks_no_contract() -> None:
    model = nn.Linear(2, 1, bias=False)
    contract = QualityContract(reference=((0.0, 9.0), (1.0, 9.0)), reference_s_per_token=1.0)
    settings = SteeringSettings(sequences=160, batch_size=4, policy=keep, decisions=10, contract=contract, probe=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steering = Steering(model, optimizer, settings, meter=NoMeter("a test"), clock=lambda: 0.0)
    while not steering.finished:
        with steering.step() as step:
            step.backward(lambda: model(torch.ones(step.batch_size, 2)).square().mean())
    assert steering.summary()["contract"]["slowdown"] is None


def test_a_live_run_survives_its_meter_and_its_clock(tmp_path: Path) -> None:
    clock = SetClock()
    run = LiveRun(case(tmp_path, LLAMA), meter=Counter(clock, explodes), clock=Faulty(lambda _: math.nan), probe=False)
    run.clock._clock.now_s = 20.0  # type: ignore[attr-defined]
    with pytest.warns(RuntimeWarning) as caught:
        told = [run.advance(run.config.start(), 0.1) for _ in range(4)]
    assert len(caught) == 2
    assert told[-1].energy_j is None
    assert all(0 <= each.time_s < 60 for each in told)
