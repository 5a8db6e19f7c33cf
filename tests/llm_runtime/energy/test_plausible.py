"""Readings of a meter that raises or lies are unknown or replaced by the power, and good ones are passed on."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, energy_between
from trainpilot.llm_runtime.energy.plausible import PlausibleMeter, fault_of, most_j, plausible_meter


def reading(time_s: float, energy_j: Any, **values: Any) -> EnergyReading:
    usual: dict[str, Any] = {"source": "measured_counter", "power_w": None, "power_limit_w": None}
    return EnergyReading(time_s=time_s, energy_j=energy_j, **usual | values)


def powered(time_s: float, energy_j: Any) -> EnergyReading:
    return reading(time_s, energy_j, power_w=300.0, power_limit_w=700.0)


class Played(EnergyMeter):
    """Plays what it is given back; an exception is raised."""

    scope, resolution_s, idle_w = "machine", 0.25, 3.0
    description = "what a test plays"

    def __init__(self, *found: Any) -> None:
        self.left = list(found)

    def read(self) -> EnergyReading:
        found = self.left.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found  # type: ignore[no-any-return]


def all_of(*found: Any) -> list[EnergyReading]:
    meter = PlausibleMeter(Played(*found))
    return [meter.read() for _ in found]


def test_good_readings_are_passed_on_as_they_are() -> None:
    found = [
        reading(0.0, None, source=None), powered(1.0, 5.0), powered(2.0, 305.0), powered(2.01, 305.0),
        powered(3.0, 1005.0), powered(3.0, 1005.0), reading(3.0, 1105.0, source="estimated"),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = all_of(*found)
    assert all(one is other for one, other in zip(told, found, strict=True))


def test_it_is_the_meter_but_for_its_readings() -> None:
    meter = PlausibleMeter(Played())
    assert (meter.scope, meter.resolution_s, meter.idle_w, meter.uuids) == ("machine", 0.25, 3.0, ())
    assert meter.description == "what a test plays"
    assert plausible_meter(meter) is meter
    meter.close()


def test_a_meter_with_nothing_but_readings_will_do() -> None:
    class Bare:
        def read(self) -> EnergyReading:
            return powered(0.0, 1.0)

    meter = PlausibleMeter(Bare())  # type: ignore[arg-type]
    assert (meter.scope, meter.description) == ("process", "Bare")
    assert meter.read().energy_j == 1.0
    meter.close()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (RuntimeError("unplugged"), "raised RuntimeError: unplugged"),
        (None, "must return an EnergyReading, got NoneType"),
        ("12 J", "must return an EnergyReading, got str"),
        (reading(1.0, math.nan), "returned nan J"),
        (reading(1.0, math.inf), "returned inf J"),
        (reading(1.0, -5.0), "returned -5.0 J"),
        (reading(1.0, "5"), "returned '5' J"),
        (reading(math.nan, 5.0), "returned the time nan"),
        (reading(1.0, 5.0, source="guessed"), "returned the source 'guessed'"),
        (reading(1.0, 5.0, source=None), "returned the source None"),
        (SystemExit(1), "raised SystemExit: 1"),
        (reading(10**400, 5.0), "raised OverflowError"),
        (reading(1.0, 10**400), "returned 1"),
    ],
)
def test_a_reading_that_is_none_is_unknown_and_the_next_one_counts(bad: Any, says: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"energy meter Played {says}") as caught:
        first, unknown, again, last = all_of(reading(0.0, 10.0), bad, bad, reading(3.0, 40.0))
    assert len(caught) == 1
    assert (unknown.energy_j, unknown.source) == (again.energy_j, again.source) == (None, None)
    assert energy_between(first, last) == (30.0, "measured_counter")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (powered(10.0, 99.0), "fell by 1 J"),
        (powered(10.0, 100.0), "stood still for 10 s at 300 W"),
        (powered(10.0, 120.0), "rose by no more than 20 J in 10 s at 300 W"),
        (powered(10.0, 100 + 8_000.0), "rose by 8000 J in 10 s at a power limit of 700 W"),
        (powered(10.0, float(2**64)), "rose by 1.84467e.19 J"),
    ],
)
def test_joules_that_cannot_be_are_replaced_by_the_power(bad: EnergyReading, says: str) -> None:
    after = replace(bad, time_s=11.0, energy_j=bad.energy_j + 250.0)  # type: ignore[operator]
    with pytest.warns(RuntimeWarning, match=says) as caught:
        first, told, later = all_of(powered(0.0, 100.0), bad, after)
    assert len(caught) == 1
    assert energy_between(first, told) == (10 * 300.0, "measured_power")
    if bad.energy_j != 2**64:  # there floats are 4,096 J apart
        assert energy_between(told, later)[0] == pytest.approx(250.0)
    assert later.source == "measured_power"


@pytest.mark.parametrize("bad", [reading(10.0, 99.0), reading(-1.0, 101.0), reading(10.0, 2e7)])
def test_where_the_power_is_not_known_the_energy_is_unknown_from_then_on(bad: EnergyReading) -> None:
    meter = PlausibleMeter(Played(reading(0.0, 100.0), bad, reading(20.0, 200.0)))
    with pytest.warns(RuntimeWarning, match="unknown from now on") as caught:
        told = [meter.read() for _ in range(3)]
    assert len(caught) == 1
    assert [each.energy_j for each in told] == [100.0, None, None]
    assert [each.source for each in told] == ["measured_counter", None, None]
    assert "energy unknown, as the meter" in meter.description


def test_a_weaker_source_stays_what_it_is() -> None:
    estimates = [replace(powered(t, e), source="estimated") for t, e in ((0.0, 100.0), (10.0, 99.0))]
    with pytest.warns(RuntimeWarning, match="fell"):
        _, told = all_of(*estimates)
    assert (told.energy_j, told.source) == (3100.0, "estimated")


@pytest.mark.parametrize("power_w", [math.nan, -1.0, 4_294_967.295, 10**400])
def test_a_power_that_cannot_be_is_left_out(power_w: float) -> None:
    with pytest.warns(RuntimeWarning, match="left out"):
        first, told = all_of(powered(0.0, 1.0), replace(powered(1.0, 301.0), power_w=power_w))
    assert told.power_w is None
    assert energy_between(first, told) == (300.0, "measured_counter")


class Nonsense:
    """A meter that says nothing sensible of itself."""

    scope, uuids, idle_w, resolution_s = "galaxy", 7, "none", math.nan

    @property
    def description(self) -> str:
        raise RuntimeError("no words")

    def read(self) -> EnergyReading:
        return powered(0.0, 1.0)

    def close(self) -> None:
        raise OSError("stuck")


def test_what_a_meter_says_of_itself_is_checked_too() -> None:
    meter = PlausibleMeter(Nonsense())  # type: ignore[arg-type]
    assert (meter.scope, meter.uuids, meter.idle_w, meter.resolution_s) == ("process", (), 0.0, 0.0)
    assert meter.description == "Nonsense"
    assert [meter.read().energy_j for _ in range(2)] == [1.0, 1.0]
    with pytest.warns(RuntimeWarning, match="energy meter Nonsense raised OSError: stuck"):
        meter.close()


def test_readings_hold_plain_numbers() -> None:
    odd = reading(np.float64(1.0), np.float32(2.5), power_w=Fraction(3, 2), memory_used_bytes=np.int64(4))
    (told,) = all_of(odd)
    values = (told.time_s, told.energy_j, told.power_w, told.memory_used_bytes)
    assert values == (1.0, 2.5, 1.5, 4)
    assert {type(each) for each in values} == {float}


def test_a_meter_without_a_clock_is_judged_by_the_systems() -> None:
    with pytest.warns(RuntimeWarning, match="rose by 1e.06 J in .* s at a power limit of 700 W"):
        first, told = all_of(powered(0.0, 1.0), powered(0.0, 1e6 + 1))
    energy_j, source = energy_between(first, told)
    assert 0 <= (energy_j or 0.0) < 60 * 300
    assert source == "measured_power"


def test_bounds_by_hand() -> None:
    assert most_j(10.0, 700.0) == pytest.approx(1.1 * 700 * 10.2)
    assert fault_of(7_800.0, 10.0, limit_w=700.0) is None
    assert fault_of(7_900.0, 10.0, limit_w=700.0) is not None
    assert fault_of(0.0, 10.0, powers_w=(300.0, 300.0), still_s=0.9) is not None  # less than a hundredth
    assert fault_of(0.0, 0.9, powers_w=(300.0, 300.0), still_s=0.9) is None
    assert fault_of(0.0, 0.9, powers_w=(300.0, 300.0), still_s=1.1) is not None
    assert fault_of(0.0, 10.0, powers_w=(300.0, None), still_s=10.0) is None
    assert fault_of(31.0, 10.0, powers_w=(300.0, 500.0)) is None
    assert fault_of(29.0, 10.0, powers_w=(300.0, 500.0)) is not None
