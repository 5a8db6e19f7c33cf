"""Sweeps become evidence with their own schedules, and borrow or bound what they did not try."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from trainpilot.llm_runtime.simulator.sweeps import (
    LEAST_STEPS,
    LOST,
    PROMISE,
    SCHEDULE_DIFFERENCES,
    FinalLoss,
    borrowed_schedules,
    bounds_outside,
    by_cell,
    cells,
    edges,
    of_final_losses,
    rate_at,
    without_lost,
)

N = 100_000_000
RUN = FinalLoss(
    n_parameters=N, steps=1_000, learning_rate=1e-3, batch=64, final_loss=3.0, schedule="linear", warmup_steps=200,
    end_learning_rate=1e-4,
)  # fmt: skip
GRID = [
    replace(
        RUN,
        learning_rate=rate,
        batch=batch,
        steps=round(128_000 / batch),
        schedule="cosine",
        end_learning_rate=0.0,
        final_loss=3.0 + 0.01 * math.log(rate / 1e-3) ** 2 + 0.01 * math.log(batch / 64) ** 2,
    )
    for rate, batch in product((3e-4, 1e-3, 3e-3), (32, 64, 100))
]


def test_learning_rates_of_every_schedule_by_hand() -> None:
    at = np.array([0.0, 100.0, 200.0, 600.0, 1_000.0])

    assert rate_at(RUN, at) == pytest.approx([0.0, 5e-4, 1e-3, 5.5e-4, 1e-4])
    assert rate_at(replace(RUN, schedule="cosine"), at)[3:] == pytest.approx([5.5e-4, 1e-4])
    assert rate_at(replace(RUN, schedule="constant"), at)[2:] == pytest.approx([1e-3, 1e-3, 1e-3])
    wsd = replace(RUN, schedule="wsd", end_learning_rate=0.0)
    assert rate_at(wsd, np.array([200.0, 840.0, 920.0, 1_000.0])) == pytest.approx([1e-3, 1e-3, 5e-4, 0.0])


def test_a_warm_up_longer_than_half_of_the_run_is_cut() -> None:
    short = replace(RUN, steps=300)
    assert rate_at(short, np.array([150.0, 300.0])) == pytest.approx([1e-3, 1e-4])


def test_a_run_s_intervals_add_up_to_its_steps() -> None:
    evidence = of_final_losses([RUN, replace(RUN, steps=77)], [N])

    assert evidence.steps.sum(axis=1) == pytest.approx([1_000, 77])
    assert evidence.final.tolist() == [3.0, 3.0]
    mean = (evidence.steps * evidence.learning_rate).sum(axis=1)[0] / 1_000
    assert mean == pytest.approx(0.2 * 5e-4 + 0.8 * 5.5e-4, rel=1e-3)


def test_runs_of_one_budget_are_a_cell_though_batches_do_not_divide_it() -> None:
    assert [len(cell) for cell in by_cell(GRID)] == [9]
    longer = [replace(run, steps=4 * run.steps) for run in GRID]
    other = [replace(RUN, schedule="constant", steps=2_000)]
    assert len(set(cells([*GRID, *longer, *other]))) == 3


def test_runs_far_above_the_best_of_their_cell_are_lost() -> None:
    lost, unknown = replace(GRID[0], final_loss=3.1 + LOST), replace(GRID[1], final_loss=math.nan)
    assert without_lost([lost, unknown, *GRID[2:]]) == GRID[2:]


def test_other_schedules_are_borrowed_only_where_they_were_not_tried() -> None:
    borrowed = borrowed_schedules(GRID, [N])
    assert len(borrowed) == len(SCHEDULE_DIFFERENCES) - 1
    expected = sorted(3.0 + d for name, (d, _) in SCHEDULE_DIFFERENCES.items() if name != "cosine")
    assert sorted(borrowed.final) == pytest.approx(expected)

    with_constant = borrowed_schedules([*GRID, replace(GRID[4], schedule="constant", final_loss=3.25)], [N])
    of_cosine = with_constant.final < 3.04
    assert len(with_constant) == 3 + 3  # neither of the two cells borrows the other's schedule
    assert of_cosine.any()


def test_bounds_lie_outside_of_the_sweep_just_below_its_best() -> None:
    bounds = bounds_outside(GRID, [N])
    settings = {(run.learning_rate, run.batch) for run in GRID}
    peaks = bounds.learning_rate.max(axis=1)

    assert bounds.bound.all()
    assert bounds.final == pytest.approx(3.0 - PROMISE)
    assert bounds.steps.sum(axis=1).min() >= LEAST_STEPS
    assert not any(
        math.isclose(peak, rate, rel_tol=0.02) and batch == tried
        for peak, batch in zip(peaks, bounds.batch[:, 0], strict=True)
        for rate, tried in settings
    )
    assert bounds.batch.min() < 32
    assert bounds.batch.max() > 100
    assert peaks.max() > 3e-3


def test_the_edge_divides_lost_runs_from_the_others() -> None:
    lost = [
        replace(run, learning_rate=9e-3, final_loss=loss) for run, loss in zip(GRID, (7.0, 7.4, math.nan), strict=False)
    ]
    slow = [replace(GRID[0], learning_rate=1e-5, final_loss=4.0)]  # has learnt too little
    found = edges([*GRID, *lost, *slow])

    assert list(found) == [N]
    assert found[N].learning_rate == pytest.approx(math.sqrt(3e-3 * 9e-3))
    assert found[N].excess == pytest.approx(4.2)
    assert edges([*GRID, *slow]) == {}
