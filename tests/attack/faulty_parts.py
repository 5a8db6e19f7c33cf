"""Meters, clocks, callbacks, positions of data and policies that fail, each in a way of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from trainpilot.envs.action import KEEP
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading

LIMIT_W, DRAW_W = 300.0, 100.0
"""Power limit and true draw of what the meters measure, in watts."""


class TickingClock:
    """Advances by a tenth of a second at each look."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.1
        return self.now_s


class Meter(EnergyMeter):
    """Measures a steady draw rightly, but for what `lie` makes of a reading.

    Args:
        clock: Clock of the run.
        lie: Returns what is read, from the number of the reading and the true one.
    """

    description = "a meter that fails"

    def __init__(self, clock: TickingClock, lie: Callable[[int, EnergyReading], Any]) -> None:
        self.clock, self.lie, self.readings = clock, lie, 0

    def read(self) -> Any:
        """Return the next reading."""
        self.readings += 1
        true = EnergyReading(
            time_s=self.clock.now_s, energy_j=DRAW_W * self.clock.now_s, source="measured_counter", power_w=DRAW_W,
            power_limit_w=LIMIT_W,
        )  # fmt: skip
        return self.lie(self.readings, true)


def _raise(error: BaseException) -> Any:
    raise error


def _later(change: Callable[[EnergyReading], Any], after: int = 5) -> Callable[[int, EnergyReading], Any]:
    return lambda number, true: true if number <= after else change(true)


def _lies(lie: Callable[[int, EnergyReading], Any]) -> Callable[[TickingClock], Meter]:
    return lambda clock: Meter(clock, lie)


def _energy(value: Any) -> Callable[[EnergyReading], Any]:
    return lambda true: replace(true, energy_j=value)


class Broken:
    """A meter all of whose parts raise."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


class Nonsense(Meter):
    """A meter that measures rightly, and says nothing sensible of itself."""

    scope, uuids, idle_w, resolution_s = "galaxy", 7, "none", math.nan  # type: ignore[assignment]
    description = None  # type: ignore[assignment]


METERS: Mapping[str, Callable[[TickingClock], Any]] = {
    "a meter that raises": _lies(lambda n, true: _raise(RuntimeError("no meter"))),
    "a meter that raises later": _lies(_later(lambda true: _raise(OSError("gone")))),
    "a meter that raises now and then": _lies(lambda n, true: _raise(OSError("busy")) if n % 3 == 0 else true),
    "a meter that exits": _lies(_later(lambda true: _raise(SystemExit(1)))),
    "a meter that returns None": _lies(lambda n, true: None),
    "a meter that returns None later": _lies(_later(lambda true: None)),
    "a meter that returns a text": _lies(lambda n, true: "100 J"),
    "a meter that returns a number": _lies(lambda n, true: true.energy_j),
    "joules as a text": _lies(_later(_energy("100"))),
    "joules of NaN": _lies(_later(_energy(math.nan))),
    "infinite joules": _lies(_later(_energy(math.inf))),
    "negative joules": _lies(_later(_energy(-50.0))),
    "falling joules": _lies(lambda n, true: replace(true, energy_j=1e6 - (true.energy_j or 0.0))),
    "joules that go back once": _lies(
        lambda n, true: replace(true, energy_j=(true.energy_j or 0.0) - (500 if n > 9 else 0))
    ),
    "a frozen counter": _lies(_later(_energy(60.0))),
    "a counter that stops": _lies(lambda n, true: replace(true, energy_j=min(true.energy_j or 0.0, 60.0))),
    "a counter that stops, without a power": _lies(
        lambda n, true: replace(true, energy_j=min(true.energy_j or 0.0, 60.0), power_w=None)
    ),
    "a counter that is always 0": _lies(lambda n, true: replace(true, energy_j=0.0)),
    "a counter that becomes 2^63": _lies(_later(_energy(2.0**63 / 1e3))),
    "joules that jump beyond the power limit": _lies(
        lambda n, true: replace(true, energy_j=(true.energy_j or 0.0) + (1e5 if n > 9 else 0))
    ),
    "joules of a million watts": _lies(lambda n, true: replace(true, energy_j=1e6 * true.time_s)),
    "an unknown source": _lies(lambda n, true: replace(true, source="guessed")),  # type: ignore[arg-type]
    "no source": _lies(lambda n, true: replace(true, source=None)),
    "a power of NaN": _lies(lambda n, true: replace(true, power_w=math.nan)),
    "a negative power": _lies(lambda n, true: replace(true, power_w=-5.0)),
    "a time of NaN": _lies(_later(lambda true: replace(true, time_s=math.nan))),
    "a time that jumps a year": _lies(_later(lambda true: replace(true, time_s=true.time_s + 3e7))),
    "a time in milliseconds": _lies(
        lambda n, true: replace(true, time_s=1e3 * true.time_s, energy_j=1e3 * (true.energy_j or 0.0))
    ),
    "numbers beyond any float": _lies(_later(lambda true: replace(true, energy_j=10**400, power_w=10**400))),
    "a power beyond any float": _lies(_later(lambda true: replace(true, power_w=10**400))),
    "NumPy's numbers": _lies(
        lambda n, true: replace(true, energy_j=np.float32(true.energy_j), power_w=np.float32(DRAW_W))  # type: ignore[arg-type]
    ),
    "a time that goes back": _lies(lambda n, true: replace(true, time_s=-true.time_s)),
    "memory of more than there is": _lies(
        lambda n, true: replace(true, memory_used_bytes=2**50, memory_total_bytes=2**30, utilisation=7.0)
    ),
    "a meter without a single part": lambda clock: Broken(),
    "a meter that knows nothing of itself": lambda clock: Nonsense(clock, lambda n, true: true),
}


def _clock(tell: Callable[[int, float], Any]) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        looks = 0

        def clock() -> Any:
            nonlocal looks
            looks += 1
            return tell(looks, 0.1 * looks)

        return clock

    return make


CLOCKS: Mapping[str, Callable[[], Callable[[], Any]]] = {
    "a clock that goes back an hour": _clock(lambda n, now: now - (3_600 if n > 20 else 0)),
    "a clock that always goes back": _clock(lambda n, now: -now),
    "a clock that trembles": _clock(lambda n, now: now - (5 if n % 7 == 0 else 0)),
    "a clock that jumps a year": _clock(lambda n, now: now + (3e7 if n == 20 else 0)),
    "a clock that stands still": _clock(lambda n, now: 5.0),
    "a clock that stops": _clock(lambda n, now: min(now, 2.0)),
    "a clock of NaN": _clock(lambda n, now: math.nan),
    "a clock of NaN later": _clock(lambda n, now: now if n < 20 else math.nan),
    "a clock of infinity": _clock(lambda n, now: now if n < 20 else math.inf),
    "a clock of NumPy's numbers": _clock(lambda n, now: np.float32(now)),
    "a clock beyond any float": _clock(lambda n, now: now if n < 20 else 10**400),
    "a clock that exits": _clock(lambda n, now: now if n < 20 else _raise(SystemExit(1))),
    "a clock that raises": _clock(lambda n, now: _raise(OSError("no clock"))),
    "a clock that raises later": _clock(lambda n, now: now if n < 20 else _raise(OSError("no clock"))),
    "a clock that tells text": _clock(lambda n, now: str(now)),
    "a clock that tells nothing": _clock(lambda n, now: now if n < 20 else None),
}
OUTCOMES: Mapping[str, Callable[..., Any]] = {
    "raises an error": lambda *_: _raise(RuntimeError("no")),
    "raises a ValueError": lambda *_: _raise(ValueError("no")),
    "raises StopIteration": lambda *_: _raise(StopIteration()),
    "raises MemoryError": lambda *_: _raise(MemoryError()),
    "exits": lambda *_: _raise(SystemExit(1)),
    "returns NaN": lambda *_: math.nan,
    "returns infinity": lambda *_: math.inf,
    "returns a negative number": lambda *_: -3.0,
    "returns nothing": lambda *_: None,
    "returns a text": lambda *_: "good",
    "returns a list": lambda *_: [1.0, 2.0],
    "returns a complex number": lambda *_: 1 + 2j,
    "returns 0": lambda *_: 0.0,
    "returns 1e300": lambda *_: 1e300,
    "returns a number beyond any float": lambda *_: 10**400,
    "takes no argument that it is given": lambda a, b, c: 1.0,
}
_NO_FUNCTION: Any = 7
CALLBACKS: Mapping[str, Callable[..., Any]] = {
    f"{which} {how}": call for which in ("validate", "on_decision") for how, call in OUTCOMES.items()
} | {"validate is no function": _NO_FUNCTION, "on_decision is no function": _NO_FUNCTION}
"""By the argument of `Steering` and what it does."""


class Position:
    """A position of data whose parts fail."""

    def __init__(self, state: Any = None, seen: Any = 0.5) -> None:
        self._state, self._seen = state, seen

    @property
    def epochs_seen(self) -> Any:
        """Return the passes over the data, or raise."""
        return self._seen() if callable(self._seen) else self._seen

    def state_dict(self) -> Any:
        """Return the position, or raise."""
        return self._state() if callable(self._state) else self._state

    def load_state_dict(self, state: Any) -> None:
        """Fail to go to a position."""
        raise RuntimeError("the data do not go back")


POSITIONS: Mapping[str, Callable[[], Any]] = {
    "whose state_dict raises": lambda: Position(state=lambda: _raise(RuntimeError("no state"))),
    "whose load_state_dict raises": lambda: Position(state={}),
    "whose state_dict exits": lambda: Position(state=lambda: _raise(SystemExit(1))),
    "whose state_dict returns nothing": lambda: Position(state=None),
    "whose state cannot be copied": lambda: Position(state=lambda: {"a": (i for i in range(3))}),
    "whose epochs_seen raises": lambda: Position(state={}, seen=lambda: _raise(RuntimeError("no epoch"))),
    "whose epochs_seen exits": lambda: Position(state={}, seen=lambda: _raise(SystemExit(1))),
    "whose epochs_seen is beyond any float": lambda: Position(state={}, seen=10**400),
    "whose epochs_seen is NaN": lambda: Position(state={}, seen=math.nan),
    "whose epochs_seen is negative": lambda: Position(state={}, seen=-5.0),
    "whose epochs_seen is infinite": lambda: Position(state={}, seen=math.inf),
    "whose epochs_seen is a text": lambda: Position(state={}, seen="2"),
}


def _spoils(observation: np.ndarray, masks: np.ndarray) -> Any:
    observation[:], masks[:] = math.nan, False
    return KEEP


POLICIES: Mapping[str, Callable[..., Any]] = {
    "raises an error": lambda *_: _raise(RuntimeError("no")),
    "raises MemoryError": lambda *_: _raise(MemoryError()),
    "exits": lambda *_: _raise(SystemExit(1)),
    "returns nothing": lambda *_: None,
    "returns NaN": lambda *_: (math.nan,) * len(KEEP),
    "returns infinity": lambda *_: (math.inf,) * len(KEEP),
    "returns 1e308": lambda *_: (1e308,) * len(KEEP),
    "returns a text": lambda *_: "keep",
    "returns texts": lambda *_: ("keep",) * len(KEEP),
    "returns too few choices": lambda *_: KEEP[:-1],
    "returns too many choices": lambda *_: (*KEEP, 0),
    "returns negative choices": lambda *_: (-1,) * len(KEEP),
    "returns choices beyond the table": lambda *_: (99,) * len(KEEP),
    "returns fractions": lambda *_: tuple(each + 0.5 for each in KEEP),
    "returns a generator": lambda *_: (each for each in ("x",)),
    "returns a nested list": lambda *_: [[each] for each in KEEP],
    "returns itself": lambda *_: POLICIES,
    "changes what it is shown": _spoils,
    "takes no argument": lambda: KEEP,
}
"""By what they do: policies that never change anything, and so must leave the weights of the base schedule."""
