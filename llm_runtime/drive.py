"""Train a run to its end under a controller: decide, train an interval, evaluate, and give it to the caller.

This is the one loop that every controlled run goes through: environments, reference runs, `replay`, `compare`,
`calibrate` and the benchmarks. What differs between them is a parameter of `drive`; weighing and recording an interval
are left to the body of the caller's `for` statement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.schedules import EVALUATE_EVERY, validation_due
from trainpilot.llm_runtime.simulator.records import Bools, TelemetryBatch
from trainpilot.llm_runtime.telemetry import Plant, Telemetry

Decide = Callable[[Telemetry | None], Controls | None]
"""Takes the last interval's telemetry, `None` before the first; returns the next controls, or `None` to end the run."""


class RunController(Protocol):
    """Anything that controls a run: a policy, with or without guardrails, or a heuristic."""

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the controls of the next interval, or `None` to end the run now.

        Args:
            telemetry: The last interval's, `None` before the first.
        """


@dataclass(frozen=True)
class DrivenInterval:
    """One interval of a driven run."""

    telemetry: Telemetry
    """What was measured while it was trained."""
    validation_loss: float | None
    """Validation loss at its end, in nats/token; `None` where no evaluation was due."""

    @property
    def loss(self) -> float:
        """The loss that counts now, in nats/token: validation at the end of a run, training before."""
        if self.telemetry.finished and self.validation_loss is not None:
            return self.validation_loss
        return self.telemetry.train_loss


def drive(
    plant: Plant,
    decide: Decide,
    decisions: int,
    *,
    last: Telemetry | None = None,
    can_roll_back: Callable[[], bool] = lambda: False,
    evaluate: Callable[[], float] | None = None,
    evaluate_every: int = EVALUATE_EVERY,
    validation_at_once: bool = False,
) -> Iterator[DrivenInterval]:
    """Train a run to its end, and yield every interval once it has been trained and evaluated.

    The run ends when it has finished, when it has diverged and cannot be rolled back, or when `decide` returns `None`.
    A `decide` that rolls back restores the plant before it returns; intervals are then yielded again from there on.

    Args:
        plant: The run.
        decide: Returns the controls of the next interval.
        decisions: Intervals that the whole budget is divided into.
        last: Telemetry of the last interval of a run that is resumed.
        can_roll_back: Returns whether `decide` can restore a run whose last interval diverged.
        evaluate: Measures the validation loss; by default `plant.evaluate`.
        evaluate_every: Decisions between two evaluations. The last interval always has one, a diverged one never.
        validation_at_once: Whether `decide` receives an evaluation right after it, in the telemetry of the same
            interval. By default it arrives with the next interval, as in the training of policies.
    """
    evaluate = evaluate or plant.evaluate
    while last is None or (can_roll_back() if last.diverged else not last.finished):
        controls = decide(last)
        if controls is None:
            return
        telemetry = plant.advance(controls, 1 / decisions)
        validation_loss = evaluate() if evaluation_due(telemetry, evaluate_every) else None
        yield DrivenInterval(telemetry, validation_loss)
        at_once = validation_at_once and validation_loss is not None
        last = replace(telemetry, validation_loss=validation_loss) if at_once else telemetry


def evaluation_due(telemetry: Telemetry | TelemetryBatch, every: int = EVALUATE_EVERY) -> Bools:
    """Return whether the validation loss is measured after an interval: once in `every` decisions and at the run's end.

    A diverged run is not evaluated. For a batch of runs the answer has one entry per run.
    """
    due: Bools = np.logical_and(
        validation_due(np.asarray(telemetry.decision) + 1, every) | telemetry.finished,
        np.logical_not(telemetry.diverged),
    )
    return due
