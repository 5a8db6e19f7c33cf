"""A clock and an energy meter that can be made to stand still, for what is no cost of the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trainpilot.llm_runtime.energy import EnergyMeter, EnergyReading


class Stopwatch:
    """Seconds and joules of a run, without its pauses.

    Args:
        clock: Returns seconds.
        meter: Energy meter.
    """

    def __init__(self, clock: Callable[[], float], meter: EnergyMeter) -> None:
        self._clock, self.meter = clock, meter
        self._left_out_s = 0.0
        self._left_out_j: float | None = 0.0
        self._paused: tuple[float, EnergyReading] | None = None

    def read(self) -> tuple[float, EnergyReading]:
        """Return seconds, and the meter's reading; while paused, those at which the pause began."""
        if self._paused is not None:
            return self._paused
        reading = self.meter.read()
        return self._clock() - self._left_out_s, replace(reading, energy_j=_minus(reading.energy_j, self._left_out_j))

    def seconds(self) -> float:
        """Return seconds."""
        return self._paused[0] if self._paused is not None else self._clock() - self._left_out_s

    def pause(self) -> None:
        """Stand still, unless it does already."""
        if self._paused is None:
            self._paused = self.read()

    def paused_s(self) -> float:
        """Return how long the pause has lasted, in seconds; 0 outside of one."""
        return 0.0 if self._paused is None else self._clock() - self._left_out_s - self._paused[0]

    def go_on(self) -> float:
        """End the pause, and return how long it lasted, in seconds; 0 where there was none."""
        if self._paused is None:
            return 0.0
        lasted_s, (_, before) = self.paused_s(), self._paused
        self._paused = None
        gained_j = _minus(self.read()[1].energy_j, before.energy_j)
        self._left_out_s += lasted_s
        left_out_j = self._left_out_j
        self._left_out_j = None if left_out_j is None or gained_j is None else left_out_j + gained_j
        return lasted_s


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
