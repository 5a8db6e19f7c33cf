"""What is kept of a run's telemetry: the newest intervals, the best so far, and summaries of the whole run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from fakes import make_telemetry

from trainpilot.envs.history import WINDOW, RunHistory
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.simulator.records import ControlBatch, TelemetryBatch


def seen(history: RunHistory, *runs: dict[str, Any]) -> None:
    """Take in one interval of each run, with what shall differ."""
    history.observe(TelemetryBatch.of([make_telemetry(**changes) for changes in runs]))


def test_nothing_is_known_before_the_first_interval() -> None:
    history = RunHistory(2)

    assert history.started.tolist() == [False, False]
    for values in (
        history.newest("train_loss"),
        history.before("steps"),
        history.oldest("tokens"),
        history.best("power_w"),
    ):
        assert np.isnan(values).all()


def test_the_newest_and_the_one_before_are_kept_of_everything() -> None:
    history = RunHistory(1)
    seen(history, {"train_loss": 3.0, "steps": 5})
    seen(history, {"train_loss": 2.0, "steps": 7, "noise_scale": None})

    assert (history.newest("train_loss")[0], history.before("train_loss")[0]) == (2.0, 3.0)
    assert (history.newest("steps")[0], history.before("steps")[0]) == (7, 5)
    assert np.isnan(history.newest("noise_scale")[0])


def test_what_the_probe_told_holds_until_it_looks_again() -> None:
    history = RunHistory(2)
    told = []
    for curvature in (None, 0.5, None, None, 0.7):
        seen(history, {"probe_quadratic": curvature}, {"probe_quadratic": None})
        told.append(history.newest("probe_quadratic").tolist())
    assert [one for one, _ in told] == pytest.approx([np.nan, 0.5, 0.5, 0.5, 0.7], nan_ok=True)
    assert np.isnan([other for _, other in told]).all()
    history.reset(np.array([0]))
    seen(history, {"probe_quadratic": None}, {"probe_quadratic": 0.1})
    assert history.newest("probe_quadratic").tolist() == pytest.approx([np.nan, 0.1], nan_ok=True)  # a new run


def test_the_oldest_is_six_intervals_back_or_the_first() -> None:
    history = RunHistory(1)
    oldest = []
    for loss in range(10, 0, -1):
        seen(history, {"train_loss": float(loss)})
        oldest.append(float(history.oldest("train_loss")[0]))

    assert oldest == [10.0] * WINDOW + [9.0, 8.0, 7.0]


def test_the_best_leaves_out_what_is_unknown_or_not_above_zero() -> None:
    history = RunHistory(1)
    best = []
    for watts, joules in ((None, None), (50.0, 200.0), (0.0, -1.0), (80.0, 100.0), (None, 300.0)):
        seen(history, {"power_w": watts, "energy_j": joules})
        best.append((float(history.best("power_w")[0]), float(history.best("energy_per_token_j")[0])))

    assert best[0] == pytest.approx((np.nan, np.nan), nan_ok=True)
    # 1,000 tokens an interval
    assert best[1:] == [(50.0, 0.2), (50.0, 0.2), (80.0, 0.1), (80.0, 0.1)]
    assert history.best("tokens_per_s")[0] == 500.0


def test_a_validation_loss_goes_with_the_training_loss_before_it() -> None:
    history = RunHistory(2)
    told: list[list[Any]] = []
    for first, second in ((2.5, None), (2.5, None), (None, 2.2), (2.4, 2.2)):
        seen(history, *({"validation_loss": v, "train_loss": 3.0 - 0.1 * len(told)} for v in (first, second)))
        told.append([history.validation_loss.tolist(), history.train_loss_before_validation.tolist()])

    assert told[1] == [pytest.approx([2.5, np.nan], nan_ok=True), pytest.approx([np.nan, np.nan], nan_ok=True)]
    assert told[2] == [[2.5, 2.2], pytest.approx([np.nan, 2.9], nan_ok=True)]  # the first was measured before training
    assert told[3] == [[2.4, 2.2], [pytest.approx(2.8), 2.9]]


def test_a_run_that_begins_anew_knows_nothing_and_the_others_everything() -> None:
    history = RunHistory(3)
    for loss in (3.0, 2.0):
        seen(history, *({"train_loss": loss + row, "validation_loss": loss, "learning_rate": loss} for row in range(3)))
    history.reset(np.array([1]))

    assert history.started.tolist() == [True, False, True]
    assert history.newest("train_loss").tolist() == pytest.approx([2.0, np.nan, 4.0], nan_ok=True)
    seen(history, *({"train_loss": 9.0, "learning_rate": 1.0}, {"train_loss": 9.0, "learning_rate": 1.0}, {}))
    assert history.oldest("train_loss").tolist() == [3.0, 9.0, 5.0]
    assert history.best("learning_rate").tolist() == [3.0, 1.0, 3.0]
    assert history.validation_loss.tolist() == pytest.approx([2.0, np.nan, 2.0], nan_ok=True)
    assert history.intervals.tolist() == [3, 1, 3]


# Summaries of the whole run -----------------------------------------------------------------------------------------


def steered(history: RunHistory, *losses: float, scale: float = 1.0, batch: int = 8, **changes: Any) -> None:
    """Take in intervals of one run under these controls, each of 1,000 tokens and a tenth of the budget."""
    for loss in losses:
        done = int(history.intervals[0]) + 1
        changed = {"train_loss": loss, "tokens": 1_000 * done, "budget_used": done / 10} | changes
        controls = Controls(batch_size=batch, learning_rate_scale=scale)
        history.observe(TelemetryBatch.of([make_telemetry(**changed)]), ControlBatch.of([controls]))


def test_the_best_loss_and_when_it_was() -> None:
    history = RunHistory(1)
    steered(history, 3.0, 2.0, 2.5, math.nan, 2.0)

    assert (history.summary.best_loss[0], history.summary.best_at[0]) == (2.0, 0.2)


def test_a_spike_is_far_above_this_interval_and_the_one_before() -> None:
    history = RunHistory(1)
    counts = []
    # Spread 0.02: a spike begins 0.1 above the larger of the two means.
    for loss, highest in ((4.0, 9.0), (2.0, 4.05), (2.0, 2.09), (2.0, 2.11), (2.0, math.inf), (2.0, math.nan)):
        steered(history, loss, train_loss_max=highest)
        counts.append(int(history.summary.spikes[0]))

    assert counts == [0, 0, 0, 1, 2, 2]  # the first has none before it, the second falls


def test_the_slope_of_the_run_fades_over_a_quarter_of_the_budget() -> None:
    history = RunHistory(1)
    steered(history, 4.0)
    assert np.isnan(history.summary.slope[0])
    steered(history, 2.0, 2.0)

    # ln 2 over ln 2 a tenth of the budget ago, nothing over ln 1.5 now
    kept = math.exp(-0.1 / 0.25)
    expected = kept * math.log(2) / (kept * math.log(2) + math.log(1.5))
    assert history.summary.slope[0] == pytest.approx(expected)


def test_a_power_law_has_its_exponent_as_slope_everywhere() -> None:
    history = RunHistory(1)
    for interval in range(1, 9):
        steered(history, 5 * interval**-0.2, scale=2.0 if interval > 4 else 1.0)

    found = [history.summary.slope, *(history.summary.slope_at(name) for name in ("highest_rate", "lowest_rate"))]
    assert np.array(found)[:, 0] == pytest.approx(0.2)


def test_extremes_of_the_controls_and_the_slope_there() -> None:
    history, e_folds = RunHistory(1), [math.log((i + 1) / i) for i in range(1, 9)]
    steered(history, 4.0, 3.0)
    steered(history, 2.5, scale=4.0, batch=16)
    steered(history, 2.4, scale=4.03, batch=4)  # as good as the same scale
    steered(history, 2.2, scale=0.5)
    summary = history.summary

    extremes = [summary.extreme(name)[0] for name in ("highest_rate", "lowest_rate", "largest_batch", "smallest_batch")]
    assert extremes == [2.0, -1.0, 4.0, 2.0]
    slopes = [summary.slope_at(name)[0] for name in ("highest_rate", "lowest_rate", "largest_batch", "smallest_batch")]
    expected = [
        math.log(3.0 / 2.4) / (e_folds[1] + e_folds[2]),
        math.log(2.4 / 2.2) / e_folds[3],
        math.log(3.0 / 2.5) / e_folds[1],
        math.log(2.5 / 2.4) / e_folds[2],
    ]
    assert slopes == pytest.approx(expected)


def test_what_has_no_slope_does_not_spoil_the_summary() -> None:
    history = RunHistory(1)
    steered(history, 4.0, 2.0, math.nan, math.inf, 0.0, 1.0)

    assert history.summary.slope[0] == pytest.approx(1.0)  # from 4 to 2 over ln 2; the rest is unknown
    assert history.summary.slope_at("highest_rate")[0] == pytest.approx(1.0)
    assert history.summary.best_loss[0] == 1.0


def test_a_new_run_has_no_past() -> None:
    history = RunHistory(1)
    steered(history, 4.0, 2.0, scale=8.0, train_loss_max=9.0)
    history.reset(np.array([0]))
    assert np.isnan(history.summary.best_loss[0])
    assert np.isnan(history.summary.slope_at("highest_rate")[0])
    steered(history, 3.0)

    assert (history.summary.best_loss[0], history.summary.spikes[0]) == (3.0, 0.0)
    assert history.summary.extreme("highest_rate")[0] == 0.0
