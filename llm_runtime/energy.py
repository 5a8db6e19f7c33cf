"""Say what an energy meter is, and choose the best one that this machine has.

The meters themselves live in `energy_nvml` (NVIDIA GPUs), `energy_host` (RAPL, and an estimate for other
CPUs) and `energy_recorded` (a recording played back).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

EnergySource = Literal["measured_counter", "measured_power", "estimated"]


class MeterUnavailableError(RuntimeError):
    """A meter cannot be made here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class EnergyReading:
    """One look at a meter. What cannot be known is `None`, never 0."""

    time_s: float
    """When, on the meter's clock, in seconds."""
    energy_j: float | None
    """Joules since the meter was made."""
    source: EnergySource | None
    """Where `energy_j` comes from; `None` when it is unknown."""
    power_w: float | None = None
    """Draw at this moment, in watts."""
    power_limit_w: float | None = None
    """Enforced power limit, in watts."""
    utilisation: float | None = None
    """Share of the device in use, in [0, 1]."""
    memory_used_bytes: int | None = None
    """Memory in use on the device, in bytes."""
    memory_total_bytes: int | None = None
    """Memory of the device, in bytes."""


class EnergyMeter(Protocol):
    """Reads joules. `read` never raises: a meter may not stop a run."""

    @property
    def description(self) -> str:
        """One line for people: what is measured, and how."""

    def read(self) -> EnergyReading:
        """Return the joules so far and what else the device tells."""

    def close(self) -> None:
        """Release the device library."""


def sum_known(values: Iterable[float | None]) -> float | None:
    """Return the sum, or `None` where one part is unknown."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


class NoMeter:
    """Knows nothing: every reading is `None`, and the description says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @property
    def description(self) -> str:
        """One line for people: why the energy is unknown."""
        return f"energy unknown: {self._reason}"

    def read(self) -> EnergyReading:
        """Return the time and nothing else."""
        return EnergyReading(time_s=time.monotonic(), energy_j=None, source=None)

    def close(self) -> None:
        """Do nothing."""


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
        from trainpilot.llm_runtime.energy_nvml import NvmlMeter
        from trainpilot.llm_runtime.nvml_gpus import current_index

        return NvmlMeter([int(index) if index else current_index()])
    if kind == "cpu":
        return _host_meter()
    raise MeterUnavailableError(f"no meter reads the device {device!r}")


def _host_meter() -> EnergyMeter:
    from trainpilot.llm_runtime.energy_host import CpuEstimateMeter, RaplMeter

    try:
        return RaplMeter()
    except MeterUnavailableError as error:
        return CpuEstimateMeter(why=str(error))
