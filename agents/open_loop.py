"""Replay the average controls of several steered runs on another run, blind: does feedback matter?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean, geometric_mean
from typing import Any

from trainpilot.envs.action import FINISH_FROM, LEARNING_RATE_SCALE_RANGE, MAX_SPARSITY
from trainpilot.llm_runtime.config import PRECISIONS, ControlLimits, Controls, Precision
from trainpilot.llm_runtime.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class SchedulePoint:
    """Controls that hold from one share of the budget on, in ratios that mean the same on every run."""

    share: float
    """Share of the budget at which they begin to hold, in [0, 1)."""
    learning_rate_scale: float = 1.0
    """Factor on the base schedule at the starting batch size."""
    batch_factor: float = 1.0
    """Batch over starting batch."""
    sparsity: float = 0.0
    """Share of zero weights or of removed channels, in [0, 1)."""
    precision: Precision | None = None
    """Number format of the matrix products; `None` is the run's own."""
    finish: bool = False
    """Cool down now."""

    def __post_init__(self) -> None:
        for name in ("share", "sparsity"):
            if not (_is_number(value := getattr(self, name)) and 0 <= value < 1):
                raise ValueError(f"schedule {name} must be in [0, 1), got {value!r}")
        for name in ("learning_rate_scale", "batch_factor"):
            if not (_is_number(value := getattr(self, name)) and value > 0):
                raise ValueError(f"schedule {name} must be a positive number, got {value!r}")
        if self.precision not in (None, *PRECISIONS):
            raise ValueError(f"schedule precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not isinstance(self.finish, bool):
            raise ValueError(f"schedule finish must be true or false, got {self.finish!r}")


@dataclass(frozen=True, kw_only=True)
class SteeredRun:
    """What a closed loop asked for along one run that ended by itself."""

    start_batch_size: int
    """Starting batch, in sequences."""
    controls: Sequence[Controls]
    """Controls of every interval, as requested; fewer than the run's decisions where it finished early."""


def average_schedule(runs: Sequence[SteeredRun], decisions: int) -> tuple[SchedulePoint, ...]:
    """Return what the runs did on average, decision by decision.

    Geometric means of the learning-rate scale and of the batch over its start, the mean sparsity, and the most
    frequent precision, of equally frequent ones the more exact. The cool-down begins when at least half of the
    runs have begun theirs. A run that has ended goes on counting with its last controls.

    Args:
        runs: Steered runs.
        decisions: Decisions in the whole of each run.

    Raises:
        ValueError: there is no run, or one has no interval or more than `decisions`.
    """
    lengths = [len(run.controls) for run in runs]
    if not lengths or min(lengths) < 1 or max(lengths) > decisions:
        raise ValueError(f"runs must be at least one, each of 1 to {decisions} intervals, got intervals {lengths}")
    return tuple(_average(runs, index, index / decisions) for index in range(max(lengths)))


def _average(runs: Sequence[SteeredRun], index: int, share: float) -> SchedulePoint:
    present = [run.controls[min(index, len(run.controls) - 1)] for run in runs]
    batches = [controls.batch_size / run.start_batch_size for controls, run in zip(present, runs, strict=True)]
    precisions = [controls.precision for controls in present]
    most_frequent = max(PRECISIONS, key=precisions.count)  # the first of equals
    return SchedulePoint(
        share=share,
        learning_rate_scale=geometric_mean([controls.learning_rate_scale for controls in present]),
        batch_factor=geometric_mean(batches),
        sparsity=fmean(controls.sparsity for controls in present),
        precision=most_frequent,
        finish=2 * sum(controls.finish for controls in present) >= len(present),
    )


def schedule_to_json(schedule: Sequence[SchedulePoint]) -> list[dict[str, Any]]:
    """Return plain JSON values."""
    return [asdict(point) for point in schedule]


def schedule_from_json(record: Sequence[Mapping[str, Any]]) -> tuple[SchedulePoint, ...]:
    """Rebuild from `schedule_to_json`. Raises `ValueError` for an unknown field or a value outside its range."""
    names = [field.name for field in fields(SchedulePoint)]
    for point in record:
        if not isinstance(point, Mapping) or "share" not in point or set(point) - set(names):
            raise ValueError(f"schedule points must have share, and may have {', '.join(names[1:])}, got {point!r}")
    return tuple(SchedulePoint(**point) for point in record)


class OpenLoop:
    """Replay a schedule without looking at the run, within the limits of a policy.

    An interval gets the last point that begins before its middle, so that a schedule fits a run with another number
    of decisions. The learning-rate scale is clipped, the batch becomes the nearest power-of-two multiple of the
    starting batch that the run can do, a precision that it cannot do becomes its starting one, and a run that does
    not prune stays dense. Sparsity never falls, and a cool-down once begun goes on.

    Args:
        schedule: Points in order of their share, the first at 0.
        limits: What the run can do.
    """

    def __init__(self, schedule: Sequence[SchedulePoint], limits: ControlLimits) -> None:
        shares = [point.share for point in schedule]
        if not shares or shares[0] != 0 or shares != sorted(set(shares)):
            raise ValueError(f"schedule must begin at share 0 and rise, got shares {shares[:5]}")
        self.schedule = tuple(schedule)
        self.limits = limits

    @classmethod
    def from_json(cls, record: Sequence[Mapping[str, Any]], limits: ControlLimits) -> OpenLoop:
        """Return the replay of a schedule in JSON. Raises `ValueError` where it is none."""
        return cls(schedule_from_json(record), limits)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the schedule, before any limits, as plain JSON values."""
        return schedule_to_json(self.schedule)

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the schedule's controls for the next interval; of `telemetry` only the number of decisions counts."""
        interval = telemetry.decision + 1 if telemetry is not None else 0
        middle = (interval + 0.5) / self.limits.decisions
        begun = [point for point in self.schedule if point.share < middle - 1e-9]
        point = begun[-1]
        low, high = LEARNING_RATE_SCALE_RANGE
        return Controls(
            learning_rate_scale=min(max(point.learning_rate_scale, low), high),
            batch_size=self._nearest_batch(point.batch_factor),
            precision=self._usable_precision(point.precision),
            sparsity=self._sparsity(begun),
            finish=interval / self.limits.decisions >= FINISH_FROM and any(earlier.finish for earlier in begun),
        )

    def _nearest_batch(self, factor: float) -> int:
        """Return the allowed batch with the smallest ratio to `factor` times the start; of two the smaller."""
        wanted = math.log2(factor * self.limits.start.batch_size)
        # Rounded, as two runs that differ by a doubling average to a tie.
        return min(_allowed_batches(self.limits), key=lambda size: round(abs(math.log2(size) - wanted), 9))

    def _usable_precision(self, precision: Precision | None) -> Precision:
        if precision is None or precision in self.limits.masked_precisions:
            return self.limits.start.precision
        return precision

    def _sparsity(self, begun: Sequence[SchedulePoint]) -> float:
        if self.limits.pruning == "none":
            return 0.0
        return min(max(point.sparsity for point in begun), MAX_SPARSITY)


def _allowed_batches(limits: ControlLimits) -> list[int]:
    """Return the batches that halving and doubling can reach from the start, smallest first."""
    sizes = [limits.start.batch_size * 2.0**power for power in range(-16, 17)]
    return [int(size) for size in sizes if size.is_integer() and limits.min_batch_size <= size <= limits.max_batch_size]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
