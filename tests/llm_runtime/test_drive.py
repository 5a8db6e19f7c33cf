"""The loop that every controlled run goes through: what it decides on, when it evaluates, and when it ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from fakes import ToyPlant, make_telemetry

from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.drive import drive
from trainpilot.llm_runtime.schedules import EVALUATE_EVERY
from trainpilot.llm_runtime.telemetry import Snapshot, Telemetry

CONTROLS = Controls(batch_size=8, precision="fp32")


class Recorded(ToyPlant):
    """Answers with telemetry that was made before, and counts its evaluations."""

    def __init__(self, telemetry: Iterable[Telemetry]) -> None:
        super().__init__()
        self.coming = list(telemetry)
        self.shares: list[float] = []
        self.evaluations = 0

    def advance(self, controls: Controls, share: float) -> Telemetry:
        self.shares.append(share)
        return self.coming.pop(0)

    def evaluate(self) -> float:
        self.evaluations += 1
        return 1.25

    def restore(self, snapshot: Snapshot) -> None:
        raise AssertionError("the loop leaves rollbacks to its controller")


def keep(telemetry: Telemetry | None) -> Controls:
    return CONTROLS


@pytest.mark.parametrize(
    ("telemetry", "loss", "evaluations"),
    [
        (make_telemetry(decision=3), 2.0, 0),
        (make_telemetry(decision=EVALUATE_EVERY - 1), 2.0, 1),
        (make_telemetry(decision=4, finished=True), 1.25, 1),
        (make_telemetry(decision=EVALUATE_EVERY - 1, diverged=True), 2.0, 0),
        (make_telemetry(decision=4, finished=True, diverged=True), 2.0, 0),
    ],
)
def test_the_validation_loss_counts_at_the_end(telemetry: Telemetry, loss: float, evaluations: int) -> None:
    plant = Recorded([telemetry])
    interval = next(drive(plant, keep, 50))

    assert interval.loss == loss
    assert plant.evaluations == evaluations
    assert interval.validation_loss == (1.25 if evaluations else None)
    assert plant.shares == [1 / 50]


def test_a_run_ends_when_it_has_finished_diverged_or_is_stopped() -> None:
    def stop_at_two(telemetry: Telemetry | None) -> Controls | None:
        return None if telemetry is not None and telemetry.decision == 1 else CONTROLS

    going = [make_telemetry(decision=decision) for decision in range(5)]
    finished, diverged = replace(going[3], finished=True), replace(going[2], diverged=True)

    assert len(list(drive(Recorded([*going[:3], finished, going[4]]), keep, 5))) == 4
    assert len(list(drive(Recorded([*going[:2], diverged, going[3]]), keep, 5))) == 3
    assert len(list(drive(Recorded(going), stop_at_two, 5))) == 2
    assert list(drive(Recorded(going), keep, 5, last=finished)) == []
    assert list(drive(Recorded(going), keep, 5, last=diverged)) == []


def test_a_run_that_diverged_goes_on_as_long_as_it_can_be_rolled_back() -> None:
    diverged = make_telemetry(decision=1, diverged=True)
    coming = [make_telemetry(decision=0), diverged, make_telemetry(decision=0), diverged, make_telemetry(decision=0)]
    rollbacks = [True, False]
    intervals = list(drive(Recorded(coming), keep, 5, can_roll_back=lambda: rollbacks.pop(0)))

    assert [interval.telemetry for interval in intervals] == coming[:4]


@pytest.mark.parametrize("at_once", [False, True])
def test_an_evaluation_arrives_at_once_or_with_the_next_interval(at_once: bool) -> None:
    seen: list[float | None] = []

    def decide(telemetry: Telemetry | None) -> Controls:
        if telemetry is not None:
            seen.append(telemetry.validation_loss)
        return CONTROLS

    coming = [make_telemetry(decision=decision, validation_loss=3.0) for decision in range(3)]
    list(drive(Recorded([*coming, replace(coming[2], decision=3, finished=True)]), decide, 4,
               evaluate_every=2, validation_at_once=at_once))  # fmt: skip

    assert seen == [3.0, 1.25 if at_once else 3.0, 3.0]


def test_the_caller_may_measure_evaluations_itself() -> None:
    plant = Recorded([make_telemetry(decision=0, finished=True)])
    [interval] = drive(plant, keep, 1, evaluate=lambda: 0.5)

    assert interval.loss == 0.5
    assert plant.evaluations == 0
