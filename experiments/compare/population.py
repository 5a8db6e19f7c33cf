"""Train one member of a population from milestone to milestone, and turn the stretches of all members into one result.

Which member copies which, and what it then changes, is decided elsewhere: `population_ray` leaves it to Ray Tune.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainpilot.experiments.compare.cases import BATCH_GRID, LEARNING_RATE_GRID, LEARNING_RATE_STEP, rounded
from trainpilot.experiments.compare.execution import Execution
from trainpilot.experiments.compare.search import WORST_LOSS
from trainpilot.experiments.results import IntervalResult, RunResult, RunSpec, SteeringSpec
from trainpilot.llm_runtime.config import LEARNING_RATE_SCALE_RANGE, Controls, RunConfig, batch_limits
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.telemetry import Telemetry

SCALES = (LEARNING_RATE_STEP ** LEARNING_RATE_GRID[0], LEARNING_RATE_STEP ** LEARNING_RATE_GRID[-1])
"""Lowest and highest factor on the case's learning rate that members begin with: those that the searches try."""


def batches_of(config: RunConfig) -> list[int]:
    """Return the batch sizes that members may have, ascending: those of the searches, as far as the run allows."""
    if config.optimizer != "adamw":  # only AdamW can take another batch
        return [config.batch_size]
    smallest, largest = batch_limits(config.batch_size, config.n_sequences() // config.decisions)
    wanted = [config.batch_size * factor for factor in (BATCH_GRID[0] / 2, *BATCH_GRID)]
    return [int(size) for size in wanted if size == int(size) and smallest <= size <= largest]


def allowed(changed: dict[str, Any]) -> dict[str, Any]:
    """Return what a member has changed, with its factor on the learning rate within the range of the control."""
    low, high = LEARNING_RATE_SCALE_RANGE
    return changed | {"learning_rate_scale": rounded(min(max(changed["learning_rate_scale"], low), high))}


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What one member trained between two milestones."""

    number: int
    """Of the stretch in the run, from 0."""
    member: int
    lineage: tuple[int, ...]
    """The member of each stretch so far that led to the weights at the end of this one, which comes last."""
    intervals: tuple[IntervalResult, ...]
    """Their tokens count from the beginning of the stretch."""
    loss: float | None
    """Validation loss at its end in nats/token; `None` if the member has diverged."""
    result: RunResult | None
    """The member's result, after its last stretch."""

    @property
    def score(self) -> float:
        """What members are ranked by, the lower the better, in nats/token."""
        return WORST_LOSS if self.loss is None else min(self.loss, WORST_LOSS)


class Member:
    """One run of a population. It is the controller of its own run: learning rate and batch are set from outside.

    Args:
        spec: The population's run, which all members begin as.
        key: Name of the run's file.
        energy_shared: Whether other runs share the energy meter and the cores.
        meter: Energy meter; by default the best one that the device has.
    """

    def __init__(self, spec: RunSpec, key: str, *, energy_shared: bool, meter: EnergyMeter | None = None) -> None:
        self.spec = spec
        milestones, decisions = int(spec.steering.settings["milestones"]), spec.config.decisions
        every = math.ceil(decisions / milestones)
        self.n_stretches = math.ceil(decisions / every)
        alone = replace(spec, steering=SteeringSpec(evaluate_every=every))
        self.execution = Execution(alone, key, energy_shared, meter)
        self.execution.controller = self
        self.controls = self.execution.run.config.start()
        self.initial_loss = self.execution.run.evaluate()
        self.last: Telemetry | None = None
        self.lineage: tuple[int, ...] = ()
        self._beginning = self.state()

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the controls of the stretch."""
        return self.controls

    def train(self, member: int, learning_rate_scale: float, batch_size: int) -> Stretch:
        """Train up to the next milestone, or to the run's end after the last one. A run that has ended stays as it is.

        Args:
            member: Number of this member.
            learning_rate_scale: Factor on the base schedule.
            batch_size: Sequences per optimizer step.
        """
        execution, number = self.execution, len(self.lineage)
        is_last = number + 1 == self.n_stretches
        self.controls = replace(self.controls, learning_rate_scale=learning_rate_scale, batch_size=batch_size)
        self.lineage = (*self.lineage, member)
        execution.tokens, execution.intervals, execution.standing = 0, [], []
        for interval in execution.train(self.last):
            if interval.validation_loss is not None and not is_last:
                break
        self.last = execution.last
        result = execution.ended(self.initial_loss) if is_last else None
        return Stretch(
            number=number,
            member=member,
            lineage=self.lineage,
            intervals=tuple(execution.intervals),
            loss=self._loss(),
            result=result,
        )

    def _loss(self) -> float | None:
        loss = self.execution.run.validation_loss
        if loss is None or not math.isfinite(loss) or (self.last is not None and self.last.diverged):
            return None
        return loss

    def state(self) -> dict[str, Any]:
        """Return a copy of all that training depends on: weights, optimizer, place in the data, random numbers."""
        return {"run": self.execution.run.snapshot(), "last": self.last, "lineage": self.lineage}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned, of this member or of another."""
        self.execution.run.restore(state["run"])
        self.last, self.lineage = state["last"], state["lineage"]

    def restart(self) -> None:
        """Go back to before the first step."""
        self.restore(self._beginning)


def population_result(spec: RunSpec, stretches: Sequence[Stretch]) -> RunResult:
    """Return the result of a population: that of its best member, at the cost of all.

    Of each stretch the intervals that the best one does not come from are first, marked as rolled back: at the end of
    those that remain all members have been counted up to the same milestone.

    Args:
        spec: The population's run.
        stretches: All stretches of all members, in any order.
    """
    ended = sorted((each for each in stretches if each.result is not None), key=lambda each: (each.score, each.member))
    best = ended[0]
    assert best.result is not None
    intervals: list[IntervalResult] = []
    tokens = 0
    for each in sorted(stretches, key=lambda each: (each.number, _remains(each, best), each.member)):
        intervals += [
            replace(interval, tokens=tokens + interval.tokens, rolled_back=not _remains(each, best))
            for interval in each.intervals
        ]
        tokens = intervals[-1].tokens if intervals else 0
    return replace(best.result, spec=spec, intervals=tuple(intervals))


def _remains(stretch: Stretch, best: Stretch) -> bool:
    """Return whether the best member's weights come from a stretch."""
    return best.lineage[stretch.number] == stretch.member
