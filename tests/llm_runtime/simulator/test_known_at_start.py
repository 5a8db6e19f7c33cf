"""What simulated runs know at the start: a law's advice that is off by a drawn factor, and a price list with noise."""

from __future__ import annotations

import numpy as np
import pytest

from trainpilot.llm_runtime.schedules import neutral_factor
from trainpilot.llm_runtime.simulator.records import LimitBatch
from trainpilot.llm_runtime.simulator.runs import (
    POWER_NOISE,
    PRICED_SHARE,
    TIME_NOISE,
    OnePlant,
    Pool,
    SimulatedRuns,
    Start,
    default_pool,
)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return default_pool(16)


def test_without_error_the_advice_is_the_tuned_static(pool: Pool) -> None:
    runs = SimulatedRuns(64, 3, pool, Start(advice_error=1.0))
    limits, tuned = runs.limits(), runs.references
    at_start = limits.learning_rate_over_law * neutral_factor(
        tuned.batch.astype(np.float64), runs.instances.start_batch
    )

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


def test_prices_at_the_start_are_the_hardware_s_with_telemetry_s_noise(pool: Pool) -> None:
    runs = SimulatedRuns(2_000, 3, pool)
    prices, hardware, batch = (
        runs.limits().prices,
        runs.instances.hardware,
        runs.instances.start_batch.astype(np.float64),
    )
    priced = ~np.isnan(prices[:, 0, 0, 1])

    assert priced.mean() == pytest.approx(PRICED_SHARE, abs=0.03)
    for index, place, factor in ((0, 0, 0.5), (0, 2, 2.0), (2, 1, 1.0)):
        size, offered = factor * batch, priced & ~hardware.masked[:, index]
        step_s = hardware.step_s(size, np.full(2_000, index), np.zeros(2_000))
        off_s = np.log(prices[:, 0, index, place] * size / step_s)[offered]
        off_w = np.log(prices[:, 1, index, place] / prices[:, 0, index, place] / hardware.power_w(size))[offered]
        assert off_s.std() == pytest.approx(TIME_NOISE, rel=0.15)
        assert off_w.std() == pytest.approx(POWER_NOISE, rel=0.15)
        assert abs(off_s.mean()) < 0.005
    assert np.isnan(prices[hardware.masked[:, 2], :, 2]).all()


def test_a_single_run_has_the_price_list_of_its_row(pool: Pool) -> None:
    runs = SimulatedRuns(8, 5, pool)
    runs.begin(np.arange(8))  # as the constructor of a single plant does
    for row, prices in enumerate(runs.limits().prices):
        limits = OnePlant(SimulatedRuns(1, 5, pool, first_row=row)).limits()
        assert LimitBatch.of([limits]).prices[0] == pytest.approx(prices, nan_ok=True)
