"""How far off a fit is: numbers worked out by hand on a bowl, and runs that diverged counted apart."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from fake_physics import FittedPhysics
from fakes import make_telemetry

from trainpilot.experiments.calibrate.calibration import BestRate, best_rates, fit_error, rank_correlation
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.simulator.evidence import CalibrationRun

CONFIG = RunConfig(tokens=10_000, batch_size=1, sequence_length=8, decisions=2)
BOWL = FittedPhysics(best=1e-2, floor=2.0)


def run(rate: float, final: float, *, batch: int = 1, train: float = 3.0, **changes: Any) -> CalibrationRun:
    last = make_telemetry(decision=1, train_loss=train, finished=True, diverged=math.isnan(final))
    return CalibrationRun(
        config=replace(CONFIG, base_learning_rate=rate, batch_size=batch),
        telemetry=(make_telemetry(train_loss=train), last),
        validation=((0, 5.0), (2, final)),
        wide_probe=(None, (-0.1, 0.05)),
        n_parameters=100,
        role=changes.get("role", "fit"),
    )


def test_errors_are_means_over_the_runs_that_ended() -> None:
    # predicted: 2 at the best rate, 3 a decade off; one more along the run
    runs = [run(1e-2, 2.25, train=3.5), run(1e-1, 2.25, train=3.75), run(1.0, math.nan)]
    error = fit_error(BOWL, runs)

    assert (error.n_runs, error.n_diverged) == (3, 1)
    assert error.final_loss == pytest.approx((0.25 + 0.75) / 2)
    assert error.final_loss_worst == pytest.approx(0.75)
    assert error.trajectory == pytest.approx((0.5 + 0.25) / 2)
    assert error.final_loss_range == 0.0


def test_nothing_is_known_where_every_run_diverged() -> None:
    error = fit_error(BOWL, [run(1.0, math.nan)])

    assert (error.n_runs, error.n_diverged) == (1, 1)
    assert error.final_loss is error.final_loss_worst is error.trajectory is error.final_loss_range is None


def test_rank_correlation_of_one_is_the_same_order_and_divergence_is_worst() -> None:
    same = [run(1e-2, 2.0), run(1e-1, 2.5), run(1.0, math.nan)]

    assert rank_correlation(BOWL, same) == pytest.approx(1.0)
    assert rank_correlation(BOWL, [run(1e-2, 9.0), run(1e-1, 2.5), run(1.0, 2.0)]) == pytest.approx(-1.0)
    assert rank_correlation(BOWL, [run(1e-2, 2.0), run(1e-1, 2.0)]) is None


def test_the_best_rate_lies_between_the_rates_of_the_grid() -> None:
    bowl = FittedPhysics(best=2e-2)
    grid = [run(rate, loss) for rate, loss in ((1e-3, 2.5), (1e-2, 2.2), (1e-1, 2.1))]

    [best] = best_rates(bowl, grid)
    assert best.fitted == pytest.approx(2e-2)  # a parabola finds the bowl's middle, also between uneven rates
    assert best.measured == 1e-1
    assert not best.at_edge
    uneven = [run(rate, 2.0) for rate in (4e-3, 1e-2, 3e-1)]
    assert best_rates(bowl, uneven)[0].fitted == pytest.approx(2e-2)


def test_a_best_rate_on_the_edge_says_so() -> None:
    grid = [run(rate, 2.5, batch=batch) for batch in (4, 1) for rate in (1e-1, 1.0)]

    assert best_rates(BOWL, grid) == tuple(
        BestRate(batch_size=batch, fitted=1e-1, measured=1e-1, at_edge=True) for batch in (1, 4)
    )


def test_a_grid_on_which_everything_diverges_has_no_best_rate() -> None:
    nothing = FittedPhysics(floor=math.nan)
    grid = [run(rate, math.nan) for rate in (1e-1, 1.0)]

    assert best_rates(nothing, grid) == (BestRate(batch_size=1, fitted=None, measured=None, at_edge=False),)
    assert rank_correlation(nothing, grid) is None


def test_a_calibration_run_survives_json_with_what_is_not_finite() -> None:
    lost = replace(run(1.0, math.nan, train=math.nan), wide_probe=(None, (math.nan, math.inf)))
    again = CalibrationRun.from_json(json.loads(json.dumps(lost.to_json(), allow_nan=False)))

    assert again.config == lost.config
    assert again.wide_probe == (None, None)
    assert again.diverged
    assert math.isnan(again.final_loss)
    assert math.isnan(again.telemetry[1].train_loss)
    whole = run(1e-2, 2.0)
    assert CalibrationRun.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    assert whole.final_loss == 2.0


def test_a_calibration_run_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="role must be one of fit, held-out, got 'test'"):
        run(1.0, 2.0, role="test")
    with pytest.raises(ValueError, match=r"wide_probe must have one entry for each of the 2 intervals .* got 0"):
        replace(run(1.0, 2.0), wide_probe=())
    record = {**run(1.0, 2.0).to_json(), "colour": "red"}
    del record["role"]
    with pytest.raises(ValueError, match="fields missing or unknown: colour, role"):
        CalibrationRun.from_json(record)
