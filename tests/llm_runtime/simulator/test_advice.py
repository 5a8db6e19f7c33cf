"""Simulated runs carry an advice that is off by a drawn factor from their tuned static."""

from __future__ import annotations

import numpy as np
import pytest

from trainpilot.llm_runtime.schedules import neutral_factor
from trainpilot.llm_runtime.simulator.runs import OnePlant, Pool, SimulatedRuns, Start, default_pool


@pytest.fixture(scope="module")
def pool() -> Pool:
    return default_pool(16)


def test_without_error_the_advice_is_the_tuned_static(pool: Pool) -> None:
    runs = SimulatedRuns(64, 3, pool, Start(advice_error=1.0))
    limits, tuned = runs.limits(), runs.references
    at_start = limits.learning_rate_over_law * neutral_factor(tuned.batch, runs.instances.start_batch)

    assert at_start == pytest.approx(runs.start_learning_rate / runs.best_learning_rate)
    assert limits.batch_over_law * tuned.batch == pytest.approx(runs.instances.start_batch)


def test_the_error_is_log_uniform_up_to_the_factor_and_a_run_s_own(pool: Pool) -> None:
    exact, off = (SimulatedRuns(2_000, 3, pool, Start(advice_error=error)).limits() for error in (1.0, 8.0))
    errors = [
        np.log(exact.learning_rate_over_law / off.learning_rate_over_law) / np.log(8),
        np.log(exact.batch_over_law / off.batch_over_law) / np.log(8),
    ]

    for error in errors:
        assert np.abs(error).max() <= 1 + 1e-9
        assert np.quantile(error, [0.1, 0.5, 0.9]) == pytest.approx([-0.8, 0, 0.8], abs=0.06)
    assert abs(np.corrcoef(errors)[0, 1]) < 0.1


def test_a_new_run_has_a_new_error_and_a_single_one_the_same(pool: Pool) -> None:
    runs = SimulatedRuns(3, 5, pool)
    before = runs.limits()
    single = OnePlant(SimulatedRuns(1, 5, pool, first_row=2)).limits()
    runs.begin(np.array([1]))
    after = runs.limits()

    assert (after.batch_over_law != before.batch_over_law).tolist() == [False, True, False]
    again = SimulatedRuns(3, 5, pool)
    again.begin(np.arange(3))
    assert again.limits().learning_rate_over_law[2] == single.learning_rate_over_law
