"""Telemetry goes through JSON and back, and its derived numbers are right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from live_runs import advance, case, live_run

from trainpilot.llm_runtime.telemetry import Telemetry


@pytest.fixture
def telemetry(tmp_path: Path) -> Telemetry:
    return advance(live_run(case(tmp_path), probe=True))


def test_round_trip_through_json(telemetry: Telemetry) -> None:
    text = json.dumps(telemetry.to_json(), allow_nan=False)
    assert Telemetry.from_json(json.loads(text)) == telemetry


def test_what_is_not_finite_is_null(telemetry: Telemetry) -> None:
    broken = replace(telemetry, train_loss=math.nan, gradient_norm=math.inf, noise_scale=math.nan, diverged=True)

    record = json.loads(json.dumps(broken.to_json(), allow_nan=False))

    assert (record["train_loss"], record["gradient_norm"], record["noise_scale"]) == (None, None, None)
    again = Telemetry.from_json(record)
    assert math.isnan(again.train_loss)
    assert math.isnan(again.gradient_norm)
    assert again.noise_scale is None
    assert again.diverged


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_loss_std", 1e308),
        ("train_loss", -1e300),
        ("validation_loss", math.inf),
        ("gradient_norm", math.nan),
        ("energy_j", -1.0),
        ("time_s", -1e-9),
        ("power_w", "12.5"),
    ],
)
def test_a_number_that_nothing_measures_is_refused(telemetry: Telemetry, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"telemetry: {name} must be a"):
        Telemetry.from_json(telemetry.to_json() | {name: value})


def test_what_no_float32_holds_is_written_as_null(telemetry: Telemetry) -> None:
    record = replace(telemetry, train_loss_std=3.4e38, noise_scale=1e39, epochs_seen=-1.0).to_json()
    assert (record["train_loss_std"], record["noise_scale"], record["epochs_seen"]) == (3.4e38, None, None)
    assert Telemetry.from_json(record).train_loss_std == 3.4e38


def test_missing_and_unknown_fields_are_named(telemetry: Telemetry) -> None:
    record = telemetry.to_json() | {"colour": "blue"}
    del record["train_loss"]
    with pytest.raises(ValueError, match=r"^telemetry fields missing or unknown: colour, train_loss$"):
        Telemetry.from_json(record)


def test_derived_numbers(telemetry: Telemetry) -> None:
    known = replace(telemetry, interval_tokens=300, time_s=1.5, energy_j=6.0)
    assert known.tokens_per_s == 200
    assert known.energy_per_token_j == 0.02
    assert replace(known, energy_j=None).energy_per_token_j is None
    assert math.isfinite(replace(known, time_s=0.0).tokens_per_s)


def test_fields_of_one_interval(telemetry: Telemetry) -> None:
    assert telemetry.decision == 0
    assert (telemetry.tokens, telemetry.interval_tokens, telemetry.steps) == (320, 320, 10)
    assert telemetry.budget_used == 0.1
    assert telemetry.train_loss <= telemetry.train_loss_max
    assert telemetry.train_loss_std > 0
    assert telemetry.validation_loss is None
    assert 0 <= telemetry.clipped_share <= 1
    assert telemetry.memory_share is None or 0 < telemetry.memory_share <= 1
    assert (telemetry.energy_j, telemetry.energy_source, telemetry.power_w) == (None, None, None)
    assert (telemetry.finishing, telemetry.finished, telemetry.diverged) == (False, False, False)
