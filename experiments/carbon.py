"""Turn joules into grams of CO2 equivalent, and seconds into device-hours."""

from __future__ import annotations

JOULES_PER_KWH = 3.6e6

DEFAULT_GRID_INTENSITY_G_PER_KWH = 475.0
"""Grams of CO2 per kilowatt-hour of electricity, see `DEFAULT_GRID_INTENSITY_SOURCE`."""
DEFAULT_GRID_INTENSITY_SOURCE = (
    "world average of 2018, International Energy Agency, Global Energy & CO2 Status Report (2019)"
)
"""Where the default comes from. National grids differ from it by up to a factor of ten: state your own."""


def grams_co2e(energy_j: float | None, intensity_g_per_kwh: float = DEFAULT_GRID_INTENSITY_G_PER_KWH) -> float | None:
    """Return the grams of CO2 equivalent of making this electricity; unknown energy stays `None`.

    What the devices took to build, and what cooling and power supplies add, is not in it.

    Args:
        energy_j: Joules at the device.
        intensity_g_per_kwh: Grams of CO2 equivalent per kilowatt-hour of the grid.
    """
    if not intensity_g_per_kwh >= 0:
        raise ValueError(f"intensity_g_per_kwh must be >= 0, got {intensity_g_per_kwh}")
    return None if energy_j is None else energy_j / JOULES_PER_KWH * intensity_g_per_kwh


def device_hours(time_s: float, n_devices: int = 1) -> float:
    """Return the hours that `n_devices` devices were held for `time_s` seconds, added up over the devices."""
    if n_devices < 1:
        raise ValueError(f"n_devices must be at least 1, got {n_devices}")
    return time_s * n_devices / 3600
