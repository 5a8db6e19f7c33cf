"""Grams and device-hours, worked out by hand."""

from __future__ import annotations

import pytest

from trainpilot.experiments.carbon import (
    DEFAULT_GRID_INTENSITY_G_PER_KWH,
    DEFAULT_GRID_INTENSITY_SOURCE,
    device_hours,
    grams_co2e,
)


def test_a_kilowatt_hour_at_the_world_average() -> None:
    assert grams_co2e(3_600_000) == DEFAULT_GRID_INTENSITY_G_PER_KWH == 475
    assert "International Energy Agency" in DEFAULT_GRID_INTENSITY_SOURCE


def test_a_stated_grid() -> None:
    # 1800 kJ are half a kilowatt-hour; at 56 g/kWh that is 28 g.
    assert grams_co2e(1_800_000, 56.0) == pytest.approx(28.0)
    assert grams_co2e(1_800_000, 0.0) == 0.0


def test_unknown_energy_has_unknown_carbon() -> None:
    assert grams_co2e(None) is None


@pytest.mark.parametrize("intensity", [-1.0, float("nan")])
def test_an_impossible_grid_is_refused(intensity: float) -> None:
    with pytest.raises(ValueError, match="intensity_g_per_kwh must be >= 0"):
        grams_co2e(1.0, intensity)


def test_device_hours() -> None:
    assert device_hours(5400) == 1.5
    assert device_hours(1800, 8) == 4.0
    with pytest.raises(ValueError, match="n_devices must be at least 1, got 0"):
        device_hours(1.0, 0)
