"""Measure the time and the energy of training: settings in alternating order, and a clock that can pause.

`alternate` times several settings in turn, so that they share the noise of the machine. `Stopwatch` measures the
seconds and joules of a run without its pauses.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, EnergySource, energy_between, sum_known
from trainpilot.llm_runtime.json_records import JsonRecord


@dataclass(frozen=True, kw_only=True)
class Cost(JsonRecord):
    """Seconds and joules of something."""

    time_s: float
    energy_j: float | None
    """`None` where nothing measured it."""

    def __add__(self, other: Cost) -> Cost:
        known = self.energy_j is not None and other.energy_j is not None
        energy_j = self.energy_j + other.energy_j if known else None  # type: ignore[operator]
        return Cost(time_s=self.time_s + other.time_s, energy_j=energy_j)

    def __mul__(self, factor: float) -> Cost:
        return Cost(time_s=self.time_s * factor, energy_j=None if self.energy_j is None else self.energy_j * factor)


Key = TypeVar("Key")

MIN_ROUNDS, MAX_ROUNDS = 4, 25
MAX_PASSES = 200
"""Most passes in one visit."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A block of passes of one setting."""

    n_passes: int
    time_s: float
    """By the clock of the passes."""
    metered_s: float
    """Between the meter's two readings, by its own clock."""
    energy_j: float | None
    source: EnergySource | None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a pass of one setting costs."""

    cost: Cost
    """Of one pass."""
    source: EnergySource | None
    """Where its joules come from."""
    spread: float
    """Slowest over fastest visit."""
    rounds: int


def alternate(
    passes: Mapping[Key, Callable[[], object]],
    meter: EnergyMeter,
    *,
    visit_s: float,
    limit_s: float,
    wait: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], None] | None = None,
) -> dict[Key, Timing]:
    """Visit every setting once a round, for about `visit_s`, round after round, and return what a pass costs.

    Args:
        passes: One pass of each setting.
        meter: Energy meter.
        visit_s: Seconds of a visit: long enough for the meter to see it.
        limit_s: No further round begins after so many seconds; there are four at least.
        wait: Waits until the device has done what it was asked.
        clock: Returns the seconds by which passes are timed.
        progress: Called after each round with the share of the work done, in [0, 1].
    """
    start = time.perf_counter()
    bench = _Timer(meter, wait, clock)
    lengths = {key: bench.passes_in(visit_s, run) for key, run in passes.items()}
    visits: dict[Key, list[Visit]] = {key: [] for key in passes}
    for index in range(1, MAX_ROUNDS + 1):
        for key, run in passes.items():
            visits[key].append(bench.visit(run, lengths[key]))
        used = (time.perf_counter() - start) / limit_s
        enough = index >= MIN_ROUNDS and used >= 1
        if progress is not None:
            progress(1.0 if enough else max(index / MAX_ROUNDS, min(used, index / MIN_ROUNDS, 1.0)))
        if enough:
            break
    return {key: summarise(found) for key, found in visits.items()}


def summarise(visits: Sequence[Visit]) -> Timing:
    """Return what a pass costs, from the visits to its setting.

    Seconds are those of the fastest visit: other programs can only make a pass slower. Joules are these seconds times
    the mean power over all visits.
    """
    seconds = [visit.time_s / visit.n_passes for visit in visits]
    power_w = _power(visits)
    return Timing(
        cost=Cost(time_s=min(seconds), energy_j=None if power_w is None else power_w * min(seconds)),
        source=None if power_w is None else visits[-1].source,
        spread=max(seconds) / min(seconds),
        rounds=len(visits),
    )


def median_spread(timings: Mapping[Key, Timing]) -> float:
    """Return the spread of the middle setting."""
    return statistics.median(timing.spread for timing in timings.values())


def _power(visits: Sequence[Visit]) -> float | None:
    """Return the mean power over the visits, in watts; of an estimate, the largest.

    A counter advances in steps that one visit may catch or miss. An estimate has no such steps, but falls while other
    programs keep this one waiting: the largest is that of the visit which waited least.
    """
    if visits[-1].source == "estimated":
        visits = [max(visits, key=lambda visit: (visit.energy_j or 0.0) / max(visit.metered_s, 1e-9))]
    energy_j = sum_known(visit.energy_j for visit in visits)
    metered_s = sum(visit.metered_s for visit in visits)
    return None if energy_j is None or metered_s <= 0 else energy_j / metered_s


def alternating_seconds(
    passes: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    min_rounds: int = 0,
    limit_s: float = math.inf,
    turn_about: bool = False,
    wait: Callable[[], None] = lambda: None,
) -> dict[Key, list[float]]:
    """Run every pass once a round and return the seconds of each, so that what is compared shares its noise.

    Args:
        passes: What is timed, by name.
        rounds: Most rounds that are timed.
        warm_up: Rounds before them, which are not.
        min_rounds: Rounds that are timed whatever the limit.
        limit_s: No further round begins after so many seconds.
        turn_about: Whether every other round runs the passes in the opposite order.
        wait: Waits until the device has done what it was asked.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in passes}
    end = time.perf_counter() + limit_s
    for index in range(warm_up + rounds):
        for name in reversed(list(passes)) if turn_about and index % 2 == 0 else passes:
            wait()
            start = time.perf_counter()
            passes[name]()
            wait()
            if index >= warm_up:
                seconds[name].append(time.perf_counter() - start)
        if index - warm_up + 1 >= max(min_rounds, 1) and time.perf_counter() > end:
            break
    return seconds


class _Timer:
    """Runs the passes of one setting at a time, with an eye on clock and meter."""

    def __init__(self, meter: EnergyMeter, wait: Callable[[], None], clock: Callable[[], float]) -> None:
        self._meter, self._wait, self._clock = meter, wait, clock

    def passes_in(self, visit_s: float, run: Callable[[], object]) -> int:
        """Return how many passes fill a visit; the first pass warms up and does not count."""
        self._timed(run, 1)
        return min(max(math.ceil(visit_s / self._timed(run, 1)), 1), MAX_PASSES)

    def visit(self, run: Callable[[], object], n_passes: int) -> Visit:
        """Run `n_passes` after one that does not count: it fills the caches, and takes the memory that others freed."""
        run()
        self._wait()
        before = self._meter.read()
        time_s = self._timed(run, n_passes)
        after = self._meter.read()
        energy_j, source = energy_between(before, after)
        metered_s = after.time_s - before.time_s
        return Visit(n_passes=n_passes, time_s=time_s, metered_s=metered_s, energy_j=energy_j, source=source)

    def _timed(self, run: Callable[[], object], n_passes: int) -> float:
        self._wait()
        start = self._clock()
        for _ in range(n_passes):
            run()
        self._wait()
        return max(self._clock() - start, 1e-9)


class Stopwatch:
    """Measures the seconds and joules of a run without its pauses.

    Args:
        clock: Returns seconds.
        meter: Energy meter.
    """

    def __init__(self, clock: Callable[[], float], meter: EnergyMeter) -> None:
        self._clock, self.meter = clock, meter
        self._paused_s = 0.0
        self._paused_j: float | None = 0.0
        self._pause: tuple[float, EnergyReading] | None = None

    def read(self) -> tuple[float, EnergyReading]:
        """Return the seconds and the meter's reading; in a pause, those at its beginning."""
        if self._pause is not None:
            return self._pause
        reading = self.meter.read()
        return self._clock() - self._paused_s, replace(reading, energy_j=_minus(reading.energy_j, self._paused_j))

    def seconds(self) -> float:
        """Return the seconds; in a pause, those at its beginning."""
        return self._pause[0] if self._pause is not None else self._clock() - self._paused_s

    def pause(self) -> None:
        """Begin a pause, unless there is one already."""
        if self._pause is None:
            self._pause = self.read()

    def paused_s(self) -> float:
        """Return how long the present pause has lasted, in seconds; 0 outside of one."""
        return 0.0 if self._pause is None else self._clock() - self._paused_s - self._pause[0]

    def resume(self) -> float:
        """End the pause, and return how long it lasted, in seconds; 0 where there was none."""
        if self._pause is None:
            return 0.0
        lasted_s, (_, before) = self.paused_s(), self._pause
        self._pause = None
        gained_j = _minus(self.read()[1].energy_j, before.energy_j)
        self._paused_s += lasted_s
        total_j = self._paused_j
        self._paused_j = None if total_j is None or gained_j is None else total_j + gained_j
        return lasted_s


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
