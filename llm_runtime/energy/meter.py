"""Read joules through one protocol, `EnergyMeter`, and record readings to a file that can be played back.

The meters of devices are in `nvml.py` (NVIDIA GPUs), `host.py` (RAPL counters, and an estimate for other CPUs) and
`zeus.py` (AMD GPUs, Apple silicon, Jetsons); `select_meter` of this package picks the best one for a device.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from trainpilot.llm_runtime.files import whole_file

EnergySource = Literal["measured_counter", "measured_power", "estimated"]
SOURCES: tuple[EnergySource, ...] = get_args(EnergySource)
EnergyScope = Literal["process", "device", "machine"]
"""Whose joules a meter counts: only this process's, those of whole devices, or those of the whole machine."""


class MeterUnavailableError(RuntimeError):
    """A meter cannot be made on this machine; the message gives the reason."""


class WrongMachineError(MeterUnavailableError):
    """A meter is for hardware that this machine does not have, so it is no reason why something is not measured."""


@dataclass(frozen=True, kw_only=True)
class EnergyReading:
    """One reading of a meter. What cannot be known is `None`, never 0."""

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
    """Reads joules. `read` never raises: a meter may not stop a run.

    The meters derive from this class, so that they need to state only what differs from its defaults.
    """

    @property
    def scope(self) -> EnergyScope:
        """Whose joules are counted; processes that read the same device or machine all count the same joules."""
        return "process"

    @property
    def uuids(self) -> Sequence[str]:
        """The devices of a meter of scope `device`, by names that are the same in every process."""
        return ()

    @property
    def idle_w(self) -> float:
        """Watts of the machine's idle draw in the joules of one process; every other process counts them too."""
        return 0.0

    @property
    def resolution_s(self) -> float:
        """Seconds that a window must last for the difference of its two readings to be meaningful."""
        return 0.0

    @property
    def description(self) -> str:
        """One line for people: what is measured, and how."""

    def read(self) -> EnergyReading:
        """Return the joules so far, and what else the device reports."""

    def close(self) -> None:
        """Release what the meter holds, such as threads and device libraries."""
        return None


def sum_known(values: Iterable[float | None]) -> float | None:
    """Return the sum, or `None` where one part is unknown."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


class NoMeter(EnergyMeter):
    """Stands in where nothing can be measured: every reading is `None`, and the description gives the reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @property
    def description(self) -> str:
        """One line for people: why the energy is unknown."""
        return f"energy unknown: {self._reason}"

    def read(self) -> EnergyReading:
        """Return the time and nothing else."""
        return EnergyReading(time_s=time.monotonic(), energy_j=None, source=None)


_COLUMNS = [field.name for field in fields(EnergyReading)]
_WHOLE_NUMBERS = {field.name for field in fields(EnergyReading) if field.type == "int | None"}


def write_recording(path: Path, readings: Sequence[EnergyReading]) -> None:
    """Write one line per reading, one column per field; an unknown value is an empty cell."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(reading) for reading in readings)


def read_recording(path: Path) -> list[EnergyReading]:
    """Return the readings that `write_recording` wrote.

    Raises:
        ValueError: A column is missing or unknown, or a cell is not what its column holds.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if odd := set(_COLUMNS) ^ set(rows.fieldnames or ()):
            raise ValueError(f"{path}: columns missing or unknown: {', '.join(sorted(odd))}")
        return [_parse(row, f"{path}, line {rows.line_num}") for row in rows]


def _parse(row: dict[str, Any], where: str) -> EnergyReading:
    if None in row or None in row.values():
        raise ValueError(f"{where}: expected {len(_COLUMNS)} cells")
    if not row["time_s"]:
        raise ValueError(f"{where}: time_s is empty")
    return EnergyReading(**{name: _value(name, cell, where) for name, cell in row.items()})


def _value(name: str, cell: str, where: str) -> Any:
    if cell == "":
        return None
    if name == "source":
        if cell not in SOURCES:
            raise ValueError(f"{where}: source must be one of {', '.join(SOURCES)}, got {cell!r}")
        return cell
    try:
        number = int(cell) if name in _WHOLE_NUMBERS else float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: {name} must be a finite number, got {cell!r}")
    return number


class RecordedMeter(EnergyMeter):
    """Plays readings back: each `read` returns the next one, and after the end always the last one."""

    def __init__(self, recording: Path | Sequence[EnergyReading]) -> None:
        """Take the readings to play, or the CSV file with them. Raises `ValueError` if there are none."""
        self._name = recording.name if isinstance(recording, Path) else "a list"
        self._readings = read_recording(recording) if isinstance(recording, Path) else list(recording)
        if not self._readings:
            raise ValueError("a recording needs at least 1 reading, got 0")
        self._next = 0

    @property
    def description(self) -> str:
        """One line for people: what is played back."""
        return f"{len(self._readings)} recorded readings from {self._name}"

    def read(self) -> EnergyReading:
        """Return the next reading."""
        reading = self._readings[min(self._next, len(self._readings) - 1)]
        self._next += 1
        return reading


def energy_between(before: EnergyReading, after: EnergyReading) -> tuple[float | None, EnergySource | None]:
    """Return joules between two readings and their source; both `None` when either is unknown.

    The source is that of `after`: a meter only ever changes to a weaker one.
    """
    if before.energy_j is None or after.energy_j is None:
        return None, None
    return after.energy_j - before.energy_j, after.source
