"""Evidence keeps what was measured: controls and losses by interval, of curves and of several records joined."""

from __future__ import annotations

import numpy as np
import pytest

from trainpilot.llm_runtime.simulator.evidence import MAX_POINTS, Evidence, LossCurve, of_curves


def curve(last: int = 5_000, warm: int = 100) -> LossCurve:
    """Return a constant rate of 2e-3 that falls linearly to zero over the last fifth."""
    step = np.arange(warm, last + 1, 10, dtype=np.float64)
    rate = 2e-3 * np.minimum(1.0, (last - step) / (0.2 * last))
    return LossCurve(step=step, learning_rate=rate, loss=6.0 - 0.5 * np.log10(step), batch=32.0, warmup_steps=warm)


def test_a_curve_keeps_its_steps_its_path_and_its_last_loss() -> None:
    evidence = of_curves([curve()])

    assert evidence.steps.sum() == pytest.approx(5_000)
    path = 2e-3 * (100 / 2 + 3_900 + 1_000 / 2)  # warm-up, plateau, cool-down
    assert (evidence.steps * evidence.learning_rate).sum() == pytest.approx(path, rel=2e-3)
    assert evidence.final[0] == pytest.approx(6.0 - 0.5 * np.log10(5_000))
    assert evidence.batch[0, 0] == 32.0
    assert len(evidence.steps[0]) < 2 * MAX_POINTS


def test_a_curve_that_begins_late_has_intervals_before_its_first_point() -> None:
    late = LossCurve(
        step=np.array([4_000.0, 4_500.0, 5_000.0]),
        learning_rate=np.array([1e-3, 1e-3, 0.0]),
        loss=np.array([3.0, 2.9, 2.8]),
        batch=8.0,
        warmup_steps=100.0,
    )
    evidence = of_curves([late])
    ends = np.cumsum(evidence.steps[0])

    assert (evidence.learning_rate[0, ends <= 100.0] < 1e-3).all()
    assert evidence.learning_rate[0, (ends > 101.0) & (ends <= 4_000.0)] == pytest.approx(1e-3)
    assert np.isnan(evidence.losses[0, 1:][ends < 3_999.0]).all()
    assert np.isfinite(evidence.losses).sum() == 3


def test_joined_evidence_keeps_its_runs_and_separates_their_cells() -> None:
    short, long = of_curves([curve(1_000), curve(2_000)]), of_curves([curve(5_000)], model=1)
    both = Evidence.joined([short, long])

    assert len(both) == 3
    assert both.cell.tolist() == [0, 1, 2]
    assert both.model.tolist() == [0, 0, 1]
    assert both.steps.sum(axis=1) == pytest.approx([1_000, 2_000, 5_000])
    assert both.losses.shape[1] == both.tolerance.shape[1] == both.steps.shape[1] + 1
    assert both.final == pytest.approx([*short.final, *long.final])


def test_the_best_of_a_cell_leaves_out_bounds_and_unknown_losses() -> None:
    evidence = of_curves([curve(1_000), curve(2_000), curve(5_000)])
    evidence.cell[:] = 0
    evidence.bound[2] = True

    assert evidence.best_of_cell() == pytest.approx([evidence.final[1]] * 3)
