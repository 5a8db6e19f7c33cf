"""Measure energy: `select_meter` returns the best meter that this machine has for a device.

To add a meter, write its class in a file of this folder and list it in `CANDIDATES`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trainpilot.llm_runtime.energy.meter import (
    EnergyMeter,
    EnergyReading,
    MeterUnavailableError,
    NoMeter,
    RecordedMeter,
    WrongMachineError,
)
from trainpilot.llm_runtime.energy.plausible import plausible_meter
from trainpilot.llm_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from trainpilot.llm_runtime.energy.host import CpuEstimateMeter, RaplMeter
    from trainpilot.llm_runtime.energy.nvml import NvmlMeter
    from trainpilot.llm_runtime.energy.zeus import ZeusMeter

__all__ = [
    "CANDIDATES",
    "CpuEstimateMeter",
    "EnergyMeter",
    "EnergyReading",
    "MeterCandidate",
    "MeterUnavailableError",
    "NoMeter",
    "NvmlMeter",
    "RaplMeter",
    "RecordedMeter",
    "ZeusMeter",
    "select_meter",
]

_NAMES = {"host": ["CpuEstimateMeter", "RaplMeter"], "nvml": ["NvmlMeter"], "zeus": ["ZeusMeter"]}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _NAMES)


Clock = Callable[[], float]


class OpenMeter(Protocol):
    """Makes a meter."""

    def __call__(self, device: str | None = None, *, why: str = "", clock: Clock | None = None) -> EnergyMeter:
        """Return a meter that has started to count.

        Args:
            device: A torch device name; by default all devices of the kind.
            why: Why no better meter is used, for the description of an estimate.
            clock: Returns the seconds over which an estimate counts the idle draw; by default wall seconds.

        Raises:
            MeterUnavailableError: this machine does not have the meter; `WrongMachineError` where it cannot have it.
        """


@dataclass(frozen=True)
class MeterCandidate:
    """One kind of meter that `select_meter` may choose."""

    name: str
    """Name in reports."""
    device_type: str
    """Kind of device that it measures, as torch names it: `cpu`, `cuda` (also an AMD GPU), `mps`."""
    open: OpenMeter


def _open_nvml(device: str | None = None, *, why: str = "", clock: Clock | None = None) -> EnergyMeter:
    from trainpilot.llm_runtime.energy.nvml import NvmlMeter, current_index

    if device is None:
        return NvmlMeter()
    index = device.partition(":")[2]
    return NvmlMeter([int(index) if index else current_index()])


def _open_rapl(device: str | None = None, *, why: str = "", clock: Clock | None = None) -> EnergyMeter:
    from trainpilot.llm_runtime.energy.host import RaplMeter

    return RaplMeter()


def _open_cpu_estimate(device: str | None = None, *, why: str = "", clock: Clock | None = None) -> EnergyMeter:
    from trainpilot.llm_runtime.energy.host import CpuEstimateMeter

    return CpuEstimateMeter(why=why, clock=clock or time.monotonic)


def _open_zeus_gpu(device: str | None = None, *, why: str = "", clock: Clock | None = None) -> EnergyMeter:
    from trainpilot.llm_runtime.energy.nvml import current_index
    from trainpilot.llm_runtime.energy.zeus import ZeusMeter, hardware_for

    hardware = hardware_for("cuda")
    if device is None or hardware == "soc":
        return plausible_meter(ZeusMeter(hardware))
    index = device.partition(":")[2]
    return plausible_meter(ZeusMeter(hardware, [int(index) if index else current_index()]))


def _open_zeus_soc(device: str | None = None, *, why: str = "", clock: Clock | None = None) -> EnergyMeter:
    from trainpilot.llm_runtime.energy.zeus import ZeusMeter, hardware_for

    return plausible_meter(ZeusMeter(hardware_for("cpu")))


CANDIDATES = (
    MeterCandidate("zeus_gpu", "cuda", _open_zeus_gpu),  # first, as NVML opens on a Jetson and reads nothing there
    MeterCandidate("nvml", "cuda", _open_nvml),
    MeterCandidate("zeus_soc", "mps", _open_zeus_soc),
    MeterCandidate("zeus_soc", "cpu", _open_zeus_soc),
    MeterCandidate("rapl", "cpu", _open_rapl),
    MeterCandidate("cpu_estimate", "cpu", _open_cpu_estimate),
)
"""The meters, those of one kind of device from the best to the worst. A new meter is added here."""


def select_meter(device: str, *, clock: Clock | None = None) -> EnergyMeter:
    """Return the best available meter for a torch device name. Never raises: where nothing measures, a `NoMeter`.

    Call it after the model is on the device: only then is it known which physical GPU `cuda:0` is.

    Args:
        device: `cpu`, `cuda` (the current GPU), `cuda:1`, `mps` and so on, as torch names them.
        clock: Returns the seconds over which an estimate counts the idle draw; by default wall seconds.
    """
    reasons: list[str] = []
    for candidate in CANDIDATES:
        if candidate.device_type != device.partition(":")[0]:
            continue
        try:
            return candidate.open(device, why="; ".join(reasons), clock=clock)
        except WrongMachineError:
            continue
        except MeterUnavailableError as error:
            reasons.append(str(error))
        except Exception as error:  # whatever a driver or its bindings do wrong, the run continues
            return NoMeter(str(error) or type(error).__name__)
    return NoMeter("; ".join(reasons) or f"no meter reads the device {device!r}")
