"""Say what an energy meter is, and choose the best one that this machine has.

The meters themselves live in `energy_nvml` (NVIDIA GPUs), `energy_host` (RAPL, and an estimate for other CPUs) and
`energy_recorded` (a recording played back).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

EnergySource = Literal["measured_counter", "measured_power", "estimated"]


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
