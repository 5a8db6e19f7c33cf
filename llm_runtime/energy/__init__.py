"""Measure energy: `select_meter` returns the best meter that this machine has for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainpilot.llm_runtime.energy.meter import (
    EnergyMeter,
    EnergyReading,
    MeterUnavailableError,
    NoMeter,
    RecordedMeter,
)
from trainpilot.llm_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from trainpilot.llm_runtime.energy.host import CpuEstimateMeter, RaplMeter
    from trainpilot.llm_runtime.energy.nvml import NvmlMeter

__all__ = [
    "CpuEstimateMeter",
    "EnergyMeter",
    "EnergyReading",
    "MeterUnavailableError",
    "NoMeter",
    "NvmlMeter",
    "RaplMeter",
    "RecordedMeter",
    "select_meter",
]

_NAMES = {"host": ["CpuEstimateMeter", "RaplMeter"], "nvml": ["NvmlMeter"]}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _NAMES)


def select_meter(device: str) -> EnergyMeter:
    """Return the best meter for a torch device name. Never raises: what cannot be measured gets a `NoMeter`.

    Make it after the model is on the device: only then does CUDA tell which physical GPU `cuda:0` is.

    Args:
        device: `cpu`, `cuda` (the current GPU), `cuda:1`, `mps` and so on, as torch names them.
    """
    try:
        return _meter_for(device)
    except Exception as error:  # whatever a driver or its bindings do wrong, the run goes on
        return NoMeter(str(error) or type(error).__name__)


def _meter_for(device: str) -> EnergyMeter:
    kind, _, index = device.partition(":")
    if kind == "cuda":
        from trainpilot.llm_runtime.energy.nvml import NvmlMeter, current_index

        return NvmlMeter([int(index) if index else current_index()])
    if kind == "cpu":
        return _host_meter()
    raise MeterUnavailableError(f"no meter reads the device {device!r}")


def _host_meter() -> EnergyMeter:
    from trainpilot.llm_runtime.energy.host import CpuEstimateMeter, RaplMeter

    try:
        return RaplMeter()
    except MeterUnavailableError as error:
        return CpuEstimateMeter(why=str(error))
