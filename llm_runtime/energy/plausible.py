"""Check joules against physics: at most the power limit times the seconds, and above zero where power is drawn.

`fault_of` judges what a counter added between two readings. `PlausibleMeter` wraps a meter of anybody's making: what
cannot be true is replaced by power times seconds where the power is known, and is otherwise unknown.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, TypeVar, get_args

from trainpilot.llm_runtime.energy.meter import (
    SOURCES,
    EnergyMeter,
    EnergyReading,
    EnergyScope,
    EnergySource,
)

OVERSHOOT = 1.1
"""A device may draw this multiple of its power limit for a while, as the limit is held on average."""
PEAK = 2.0
"""For an instant it may draw this multiple."""
UPDATE_S = 0.2
"""Most seconds between two updates of a GPU's counter: a reading may include that much of the time before."""
STILL_S = 1.0
"""A counter that stands still for so many seconds while power is drawn is frozen."""
LEAST_SHARE = 0.01
"""A counter that adds less than this share of power times seconds has been frozen for most of the time."""
MOST_W = 1e6
"""No machine that trains in one process draws more than a megawatt."""
NUMBERS = ("time_s", "energy_j", "power_w", "power_limit_w", "utilisation", "memory_used_bytes", "memory_total_bytes")
"""Fields of a reading that are numbers; all but the first two may be left out where they cannot be true."""

Found = TypeVar("Found")


def fault_of(
    step_j: float,
    seconds: float,
    *,
    powers_w: Sequence[float | None] = (),
    limit_w: float | None = None,
    still_s: float = 0.0,
    resolution_s: float = UPDATE_S,
) -> str | None:
    """Return why joules between two readings of a counter cannot be true; `None` where they can.

    Args:
        step_j: Joules that the counter added.
        seconds: Seconds between the readings.
        powers_w: Draw at the two readings.
        limit_w: Power limit.
        still_s: Seconds since the counter last moved.
        resolution_s: Seconds between two updates of the counter.
    """
    if step_j < 0:
        return f"fell by {-step_j:g} J"
    most_w = MOST_W if limit_w is None else limit_w
    if seconds >= 0 and step_j > most_j(seconds, most_w, resolution_s):
        return f"rose by {step_j:g} J in {seconds:g} s at a power limit of {most_w:g} W"
    least_w = min((0.0 if power is None else power for power in powers_w), default=0.0)
    frozen_s = max(STILL_S, 2 * resolution_s)
    if least_w > 0 and step_j == 0 and still_s >= frozen_s:
        return f"stood still for {still_s:g} s at {least_w:g} W"
    if seconds >= frozen_s and step_j < LEAST_SHARE * least_w * seconds:
        return f"rose by no more than {step_j:g} J in {seconds:g} s at {least_w:g} W"
    return None


def power_fault(power_w: float | None, limit_w: float | None) -> str | None:
    """Return why a power cannot be true; `None` where it can."""
    most_w = MOST_W if limit_w is None else PEAK * limit_w
    return f"returned {power_w:g} W, more than {most_w:g} W" if power_w is not None and power_w > most_w else None


def most_j(seconds: float, limit_w: float, resolution_s: float = UPDATE_S) -> float:
    """Return the most joules that can be counted in so many seconds under a power limit."""
    return OVERSHOOT * limit_w * (seconds + resolution_s)


class PlausibleMeter(EnergyMeter):
    """Reads another meter, which may raise or lie, and passes on what can be true. `read` never raises.

    * A reading that fails or is not one is unknown; the next good one includes the joules in between.
    * Joules that fall, stand still while power is drawn, or rise faster than the power limit allows are replaced by
      the power at the two readings times the seconds. From then on the source is `measured_power`.
    * Where the power is not known, the energy is unknown from then on.

    The first fault gives a warning. A meter without faults is passed on as it is.

    Args:
        meter: The meter.
    """

    def __init__(self, meter: EnergyMeter) -> None:
        self.meter = meter
        """The meter that is read."""
        self._last: EnergyReading | None = None
        """The newest reading whose joules are known."""
        self._read_at_s = time.perf_counter()
        self._seconds = self._still_s = 0.0
        """Seconds since the newest reading, and since the joules last rose."""
        self._tells_time = False
        """Whether the meter's time goes on; otherwise the system's clock counts."""
        self._passed_on_j = 0.0
        """Joules that were passed on last."""
        self._weaker = False
        """Whether some of them are power times seconds."""
        self._lost: str | None = None
        self._warned = False

    def _told(self, name: str, default: Found, of: Callable[[Any], Found]) -> Found:
        """Return what the meter says of itself, `of` turned into its type; the default where that fails."""
        try:
            return of(getattr(self.meter, name, default))
        except (Exception, SystemExit):  # a property of somebody else's
            return default

    @property
    def scope(self) -> EnergyScope:
        """Whose joules are counted."""
        return self._told("scope", "process", _scope)

    @property
    def uuids(self) -> Sequence[str]:
        """The devices of a meter of scope `device`."""
        return self._told("uuids", (), lambda names: tuple(map(str, names)))

    @property
    def idle_w(self) -> float:
        """Watts of the machine's idle draw in the joules of one process."""
        return self._told("idle_w", 0.0, _amount)

    @property
    def resolution_s(self) -> float:
        """Seconds that a window must last for the difference of its two readings to be meaningful."""
        return self._told("resolution_s", 0.0, _amount)

    @property
    def description(self) -> str:
        """One line for people: what is measured, and how."""
        described = self._told("description", type(self.meter).__name__, str)
        return f"{described}; energy unknown, {self._lost}" if self._lost else described

    def read(self) -> EnergyReading:
        """Return what the meter says where that can be true."""
        try:
            found = self.meter.read()
            fault = _malformed(found)
        except (Exception, SystemExit) as error:  # a meter may not stop a run
            return self._unknown(f"raised {type(error).__name__}: {error}")
        if fault is not None:
            return self._unknown(fault)
        reading = self._without_odd_values(found)
        if reading.energy_j is None:
            return reading
        step_j = self._step(reading) if self._lost is None else None
        if step_j is None:
            return replace(reading, energy_j=None, source=None)
        self._last = reading
        self._passed_on_j += step_j
        if not self._weaker:
            return reading
        source: EnergySource = "estimated" if reading.source == "estimated" else "measured_power"
        return replace(reading, energy_j=self._passed_on_j, source=source)

    def _step(self, reading: EnergyReading) -> float | None:
        """Return the joules since the newest reading; `None` where they are lost."""
        last = self._last
        if last is None or last.energy_j is None or reading.energy_j is None:
            self._read_at_s = time.perf_counter()
            return reading.energy_j
        fault = self._judge(last, reading, step_j := reading.energy_j - last.energy_j)
        if fault is None:
            return step_j
        by_power_j = _by_power(last, reading, self._seconds)
        if by_power_j is None:
            self._lost = f"as the meter {fault}"
            self._warn(f"{fault}; energy is unknown from now on")
            return None
        self._weaker = True
        self._warn(f"{fault}; power times seconds is taken instead")
        return by_power_j

    def _judge(self, last: EnergyReading, reading: EnergyReading, step_j: float) -> str | None:
        """Return why the joules since the newest reading cannot be true."""
        told_s, own_s = reading.time_s - last.time_s, time.perf_counter() - self._read_at_s
        self._read_at_s += own_s
        if told_s < 0:
            return f"says that time went back from {last.time_s:g} s to {reading.time_s:g} s"
        self._tells_time |= told_s > 0
        self._seconds = told_s or own_s
        self._still_s = 0.0 if step_j > 0 else self._still_s + self._seconds
        limit_w = _limit(last, reading)
        if step_j > 0 and limit_w is None and not self._tells_time:
            return None
        return fault_of(
            step_j,
            self._seconds,
            powers_w=(last.power_w, reading.power_w),
            limit_w=limit_w,
            still_s=self._still_s,
            resolution_s=max(self.resolution_s, UPDATE_S),
        )

    def _without_odd_values(self, reading: EnergyReading) -> EnergyReading:
        """Return a reading without power, limit, utilisation and memory that cannot be true."""
        known = {name: value for name in NUMBERS if (value := getattr(reading, name)) is not None}
        odd = [name for name in NUMBERS[2:] if name in known and not _is_amount(known[name])]
        if odd:
            self._warn(f"returned {odd[0]} {getattr(reading, odd[0])!r}, which is left out")
            without: dict[str, Any] = dict.fromkeys(odd)
            reading = replace(reading, **without)
        others = [name for name, value in known.items() if name not in odd and type(value) not in (int, float)]
        if others:  # NumPy's numbers, which JSON cannot hold
            plain: dict[str, Any] = {name: float(known[name]) for name in others}
            reading = replace(reading, **plain)
        if (fault := power_fault(reading.power_w, reading.power_limit_w)) is not None:
            self._warn(f"{fault}, which is left out")
            reading = replace(reading, power_w=None)
        return reading

    def _unknown(self, fault: str) -> EnergyReading:
        self._warn(f"{fault}; such a reading is unknown")
        return EnergyReading(time_s=time.monotonic(), energy_j=None, source=None)

    def _warn(self, fault: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"energy meter {type(self.meter).__name__} {fault}", RuntimeWarning, stacklevel=4)

    def close(self) -> None:
        """Release what the meter holds. Never raises."""
        try:
            if hasattr(self.meter, "close"):
                self.meter.close()
        except (Exception, SystemExit) as error:  # the run is over, and its results are not to be lost
            self._warn(f"raised {type(error).__name__}: {error}")


def plausible_meter(meter: EnergyMeter) -> PlausibleMeter:
    """Return the meter with its readings checked; one that is already stays as it is."""
    return meter if isinstance(meter, PlausibleMeter) else PlausibleMeter(meter)


def _malformed(found: Any) -> str | None:
    """Return what makes something no reading of joules at all."""
    if not isinstance(found, EnergyReading):
        return f"must return an EnergyReading, got {type(found).__name__}"
    if not isinstance(found.time_s, Real) or not math.isfinite(found.time_s):
        return f"returned the time {found.time_s!r}"
    if found.energy_j is not None and not _is_amount(found.energy_j):
        return f"returned {found.energy_j!r} J"
    if found.source not in SOURCES and not (found.source is None and found.energy_j is None):
        return f"returned the source {found.source!r}, must be one of {', '.join(SOURCES)}"
    return None


def _is_amount(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value) and float(value) >= 0
    except OverflowError:  # a whole number that no float can hold
        return False


def _amount(value: Any) -> float:
    if not _is_amount(value):
        raise ValueError(f"must be a finite number of at least 0, got {value!r}")
    return float(value)


def _scope(value: Any) -> EnergyScope:
    if value not in (scopes := get_args(EnergyScope)):
        raise ValueError(f"must be one of {', '.join(scopes)}, got {value!r}")
    scope: EnergyScope = value
    return scope


def _by_power(before: EnergyReading, after: EnergyReading, seconds: float) -> float | None:
    """Return the mean power at two readings times the seconds between; `None` where that is unknown or too much."""
    if before.power_w is None or after.power_w is None or after.time_s < before.time_s:
        return None
    energy_j = (before.power_w + after.power_w) / 2 * seconds
    return None if fault_of(energy_j, seconds, limit_w=_limit(before, after)) else energy_j


def _limit(before: EnergyReading, after: EnergyReading) -> float | None:
    """Return the higher of the power limits at two readings, as it may be changed in between."""
    return max((each.power_limit_w for each in (before, after) if each.power_limit_w), default=None)


def too_much(
    energy_j: float, seconds: float, before: EnergyReading, after: EnergyReading, resolution_s: float = UPDATE_S
) -> bool:
    """Return whether joules between two readings are more than the power limit allows in so many seconds."""
    limit_w = _limit(before, after)
    return energy_j > most_j(seconds, MOST_W if limit_w is None else limit_w, max(resolution_s, UPDATE_S))
