"""The average of steered runs, worked out by hand, and its replay within another run's limits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from fakes import START, make_limits
from heuristic_runs import batches, scales, steer

from trainpilot.agents.heuristics import (
    ControlledRun,
    OpenLoop,
    RandomPolicy,
    SchedulePoint,
    average_schedule,
    schedule_from_json,
    schedule_to_json,
)
from trainpilot.llm_runtime.config import Controls


def test_average_of_two_runs_worked_out_by_hand() -> None:
    first = [
        Controls(batch_size=8, learning_rate_scale=1.0, precision="fp32"),
        Controls(batch_size=16, learning_rate_scale=4.0, precision="bf16", sparsity=0.1),
        Controls(batch_size=32, learning_rate_scale=4.0, precision="bf16", sparsity=0.3, finish=True),
    ]
    second = [
        Controls(batch_size=2, learning_rate_scale=1.0, precision="fp32"),
        Controls(batch_size=2, learning_rate_scale=1.0, precision="fp32", sparsity=0.2),
        Controls(batch_size=2, learning_rate_scale=0.25, precision="bf16", sparsity=0.2),
        Controls(batch_size=1, learning_rate_scale=0.25, precision="bf16", sparsity=0.3),
    ]
    runs = [ControlledRun(start_batch_size=8, controls=first), ControlledRun(start_batch_size=2, controls=second)]

    schedule = average_schedule(runs, decisions=4)

    assert [point.share for point in schedule] == [0.0, 0.25, 0.5, 0.75]
    # Roots of 1 x 1, 4 x 1, 4 x 1/4, and once more 4 x 1/4: the first run counts on with its last controls.
    assert [point.learning_rate_scale for point in schedule] == pytest.approx([1, 2, 1, 1])
    # Roots of 1 x 1, 2 x 1, 4 x 1, 4 x 1/2.
    assert [point.batch_factor for point in schedule] == pytest.approx([1, math.sqrt(2), 2, math.sqrt(2)])
    assert [point.sparsity for point in schedule] == pytest.approx([0, 0.15, 0.25, 0.3])
    # One of each in the second decision: the more exact one.
    assert [point.precision for point in schedule] == ["fp32", "fp32", "bf16", "bf16"]
    assert [point.finish for point in schedule] == [False, False, True, True]


def test_cool_down_begins_when_half_of_the_runs_have_begun_theirs() -> None:
    def run(finish_at: int) -> ControlledRun:
        controls = [Controls(batch_size=8, finish=index >= finish_at) for index in range(min(finish_at + 2, 10))]
        return ControlledRun(start_batch_size=8, controls=controls)

    for finish_at, expected in (((2, 4, 7), 4), ((2, 4, 7, 9), 4), ((2, 99, 99), None)):
        finishes = [point.finish for point in average_schedule([run(at) for at in finish_at], decisions=10)]
        assert (finishes.index(True) if True in finishes else None) == expected
        assert finishes == sorted(finishes)


def test_the_average_of_one_run_replays_that_run() -> None:
    limits = make_limits(decisions=30, masked_precisions={})
    for seed in range(5):
        decided = steer(RandomPolicy(limits, seed), 30)
        schedule = average_schedule([ControlledRun(start_batch_size=8, controls=decided)], decisions=30)
        again = steer(OpenLoop.from_json(json.loads(json.dumps(schedule_to_json(schedule))), limits), 30)
        assert batches(again) == batches(decided)
        assert scales(again) == pytest.approx(scales(decided))
        for name in ("precision", "finish"):
            assert [getattr(c, name) for c in again] == [getattr(c, name) for c in decided]
        assert [c.sparsity for c in again] == pytest.approx([c.sparsity for c in decided])


def test_schedule_goes_to_json_and_back() -> None:
    schedule = (SchedulePoint(share=0.0), SchedulePoint(share=0.5, batch_factor=2.0, precision="bf16", finish=True))
    record = json.loads(json.dumps(schedule_to_json(schedule)))
    assert schedule_from_json(record) == schedule
    assert OpenLoop.from_json(record, make_limits()).to_json() == record


def test_open_loop_clips_what_this_run_cannot_do() -> None:
    wild = {"share": 0.0, "learning_rate_scale": 1e3, "batch_factor": 100.0, "sparsity": 0.99, "precision": "bf16"}
    limits = make_limits(masked_precisions={"bf16": "a test"}, max_batch_size=20)
    assert steer(OpenLoop.from_json([wild | {"finish": True}], limits), 10) == [
        Controls(batch_size=16, learning_rate_scale=64.0, sparsity=0.9, finish=decision >= 2) for decision in range(10)
    ]
    dense = make_limits(pruning="none", start=Controls(batch_size=6), min_batch_size=1)
    low = wild | {"learning_rate_scale": 1e-3, "batch_factor": 0.01}
    # Six sequences can be halved once.
    expected = Controls(batch_size=3, learning_rate_scale=1 / 64, precision="bf16")
    assert steer(OpenLoop.from_json([low], dense), 1) == [expected]


@pytest.mark.parametrize(("factor", "size"), [(0.6, 4), (0.8, 8), (2**0.5, 8), (1.42, 16), (2.8, 16), (2.9, 32)])
def test_open_loop_takes_the_batch_nearest_in_ratio(factor: float, size: int) -> None:
    assert batches(steer(OpenLoop([SchedulePoint(share=0.0, batch_factor=factor)], make_limits()), 1)) == [size]


@pytest.mark.parametrize("decisions", [5, 10, 20])
def test_open_loop_fits_runs_with_another_number_of_decisions(decisions: int) -> None:
    # Ten points, the scale of each its own number.
    schedule = [SchedulePoint(share=i / 10, learning_rate_scale=i + 1) for i in range(10)]
    decided = steer(OpenLoop(schedule, make_limits(decisions=decisions)), decisions)
    # An interval takes the last point before its middle. The middles of five are points themselves: not before.
    expected = {5: [1, 3, 5, 7, 9], 10: list(range(1, 11)), 20: [i // 2 + 1 for i in range(20)]}
    assert scales(decided) == expected[decisions]


def test_open_loop_never_unprunes_and_never_takes_a_cool_down_back() -> None:
    schedule = [
        SchedulePoint(share=0.0),
        SchedulePoint(share=0.3, sparsity=0.4, finish=True),
        SchedulePoint(share=0.6, sparsity=0.1),
    ]
    decided = steer(OpenLoop(schedule, make_limits()), 10)
    assert [c.sparsity for c in decided] == [0.0] * 3 + [0.4] * 7
    assert [c.finish for c in decided] == [False] * 3 + [True] * 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OpenLoop([], make_limits()), "schedule must begin at share 0"),
        (lambda: OpenLoop([SchedulePoint(share=0.1)], make_limits()), "schedule must begin at share 0"),
        (lambda: schedule_from_json([{"share": 0.0, "speed": 1}]), "schedule points must have share"),
        (lambda: schedule_from_json([{"share": 0.0, "batch_factor": "2"}]), "batch_factor must be a positive number"),
        (lambda: schedule_from_json([{"share": 0.0, "precision": "int1"}]), "precision must be one of"),
        (lambda: schedule_from_json([{"share": 1.0}]), "share must be in"),
        (lambda: schedule_from_json([{"share": 0.0, "finish": 1}]), "finish must be true or false"),
        (lambda: average_schedule([], 10), "runs must be at least one"),
        (lambda: average_schedule([ControlledRun(start_batch_size=8, controls=[START] * 3)], 2), "got intervals"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
