"""Budgets as people write them, and the gauge that counts their seconds and joules."""

from __future__ import annotations

import re

import pytest
from fakes import SetClock, SetMeter

from trainpilot.llm_runtime.budget import Budget, Currency, Gauge
from trainpilot.llm_runtime.energy.meter import NoMeter

GOOD: list[tuple[str, float, Currency]] = [
    ("600s", 600, "time_s"),
    ("0.5s", 0.5, "time_s"),
    ("10min", 600, "time_s"),
    ("2h", 7_200, "time_s"),
    ("1.5h", 5_400, "time_s"),
    ("50kJ", 50_000, "energy_j"),
    ("1.5MJ", 1_500_000, "energy_j"),
    ("120J", 120, "energy_j"),
    ("0.1kWh", 360_000, "energy_j"),
    ("1000000", 1_000_000, "tokens"),
    ("1M", 1_000_000, "tokens"),
    ("1.1k", 1_100, "tokens"),
    ("2B", 2_000_000_000, "tokens"),
    ("2.5e6tokens", 2_500_000, "tokens"),
    ("3M tokens", 3_000_000, "tokens"),
    (" 5 min ", 300, "time_s"),
]


@pytest.mark.parametrize(("text", "amount", "currency"), GOOD)
def test_a_budget_is_read(text: str, amount: float, currency: Currency) -> None:
    budget = Budget.parse(text)
    assert budget.amount == pytest.approx(amount, rel=1e-12)
    assert budget.currency == currency
    assert Budget.parse(str(budget)) == budget


FORM = "budget must be tokens such as 1M, seconds such as 600s, 10min or 2h, or joules such as 50kJ, got {!r}"


@pytest.mark.parametrize("text", ["", "s", "ten minutes", "-5s", "600 seconds", "5stokens", "1,000", "1e", "nan", "3W"])
def test_what_is_no_budget_is_one_clear_line(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(FORM.format(text))}$"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0s", "budget must be above 0, got 0s"),
        ("0", "budget must be above 0, got 0 tokens"),
        ("1e999J", "budget must be above 0, got infJ"),
        ("1.5", "budget must be a whole number of tokens, got 1.5 tokens"),
    ],
)
def test_an_amount_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Budget.parse(text)


def test_a_share_of_a_budget() -> None:
    assert str(Budget.parse("10s") * 0.25) == "2.5s"


# The gauge ---------------------------------------------------------------------------------------------------------


def test_seconds_count_between_resume_and_suspend() -> None:
    clock, meter = SetClock(), SetMeter()
    gauge = Gauge("time_s", clock, meter)
    clock.now_s = 100.0
    assert gauge.read() == 0.0
    gauge.resume()
    clock.now_s = 103.0
    gauge.resume()  # it runs already
    assert gauge.read() == 3.0
    gauge.suspend()
    clock.now_s = 1_000.0
    assert gauge.read() == 3.0
    gauge.resume()
    clock.now_s = 1_002.0
    assert gauge.read() == 5.0
    assert meter.readings == 0, "seconds need no meter"


def test_joules_count_likewise() -> None:
    clock, meter = SetClock(), SetMeter(50.0)
    gauge = Gauge("energy_j", clock, meter)
    gauge.resume()
    meter.energy_j = 80.0
    assert gauge.read() == 30.0
    gauge.suspend()
    meter.energy_j = 500.0
    gauge.resume()
    meter.energy_j = 507.0
    assert gauge.read() == 37.0


def test_joules_are_extrapolated_where_the_meter_fails() -> None:
    clock, meter = SetClock(), SetMeter()
    gauge = Gauge("energy_j", clock, meter)
    gauge.resume()
    clock.now_s, meter.energy_j = 2.0, 40.0
    assert gauge.read() == 40.0
    clock.now_s, meter.energy_j = 5.0, None
    assert gauge.read() == 100.0  # three more seconds at 20 W


def test_joules_without_a_meter_are_refused_with_the_way_out() -> None:
    message = (
        "budget in joules needs a meter that counts them, got none (energy unknown: no counter here); "
        "give a budget in seconds or tokens"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Gauge("energy_j", SetClock(), NoMeter("no counter here"))
    Gauge("time_s", SetClock(), NoMeter("no counter here"))


def test_all_processes_are_added_up() -> None:
    clock, meter = SetClock(), SetMeter()

    def total(time_s: float, energy_j: float | None) -> tuple[float, float | None]:
        return max(time_s, 7.0), None if energy_j is None else energy_j + 100.0

    seconds, joules = (Gauge(name, clock, meter, total=total) for name in ("time_s", "energy_j"))  # type: ignore[arg-type]
    seconds.resume()
    joules.resume()
    clock.now_s, meter.energy_j = 5.0, 11.0
    assert (seconds.read(), joules.read()) == (7.0, 111.0)
