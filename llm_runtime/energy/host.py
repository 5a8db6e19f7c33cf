"""Measure the joules of the host's processors by RAPL, or estimate them where RAPL cannot be read."""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from trainpilot.llm_runtime.clock import trusted_clock
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, EnergyScope, MeterUnavailableError
from trainpilot.llm_runtime.process import Ticker, available_cores

FULL_LOAD_W_PER_THREAD = 4.0
"""Watts of a busy hardware thread: CodeCarbon's `DEFAULT_POWER_PER_CORE` for unknown CPUs, a rough guess."""
IDLE_W_PER_THREAD = 0.74
"""Watts of an idle hardware thread: Cloud Carbon Footprint's average minimum per virtual CPU, for AWS."""
WATTS_PER_BUSY_CORE = FULL_LOAD_W_PER_THREAD - IDLE_W_PER_THREAD
"""Watts that a busy hardware thread adds to its idle draw."""

_JITTER_UJ = 1_000_000


class RaplMeter(EnergyMeter):
    """Measures the joules of all processor packages, and of the memory if it has a counter of its own.

    Linux shows the RAPL counters of Intel and AMD processors under `/sys/class/powercap`. Each `intel-rapl:N`
    named `package-*` is counted once. Of its sub-zones only `dram` is added, because a package's counter
    leaves memory out; `core` and `uncore` are already in it. The zone `psys` is left out because it contains the
    packages. All programs on these processors are measured; disks, fans and power supplies are not.

    A counter wraps around at `max_energy_range_uj`, after a few minutes under full load on some processors,
    so a daemon thread also reads it every `poll_s` seconds. If a counter is reset or vanishes, the energy is
    `None` from then on, with one warning.
    """

    scope: EnergyScope = "machine"
    resolution_s = 0.01  # the counters advance about every millisecond

    def __init__(
        self,
        root: Path = Path("/sys/class/powercap"),
        *,
        poll_s: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Find the counters and start counting.

        Args:
            root: The folder of the powercap zones.
            poll_s: Seconds between two reads of the thread; less than half the shortest time to wrap around.
            clock: Returns seconds, and never runs backwards.

        Raises:
            MeterUnavailableError: There are no counters, or they may not be read.
        """
        self._clock = trusted_clock(clock)
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._warned = False
        self._zones = _open_zones(root)
        self._ticker = Ticker(self._update, poll_s)

    @property
    def description(self) -> str:
        """One line for people: which counters are read."""
        if self._lost:
            return f"RAPL: energy unknown, {self._lost}"
        return "RAPL energy counters: " + ", ".join(zone.name for zone in self._zones)

    def read(self) -> EnergyReading:
        """Return the joules of all zones; RAPL reports nothing else."""
        self._update()
        if self._lost:
            self._warn_once()
            return EnergyReading(time_s=self._clock(), energy_j=None, source=None)
        energy_j = sum(zone.energy_uj for zone in self._zones) / 1e6
        return EnergyReading(time_s=self._clock(), energy_j=energy_j, source="measured_counter")

    def _update(self) -> None:
        with self._lock:
            try:
                for zone in self._zones:
                    zone.update()
            except (OSError, ValueError) as error:
                self._lost = self._lost or str(error)

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"energy is unknown from now on; RAPL: {self._lost}", RuntimeWarning, stacklevel=3)

    def close(self) -> None:
        """Stop the thread."""
        self._ticker.stop()


class _RaplZone:
    """One RAPL counter and the microjoules since it was opened."""

    def __init__(self, folder: Path) -> None:
        self.name = _name(folder)
        self.energy_uj = 0
        self._file = folder / "energy_uj"
        self._range_uj = int((folder / "max_energy_range_uj").read_text(encoding="ascii"))
        self._last_uj = self._now_uj()

    def _now_uj(self) -> int:
        return int(self._file.read_text(encoding="ascii"))

    def update(self) -> None:
        """Add the joules since the last update. Raises `ValueError` if the counter was reset."""
        now_uj = self._now_uj()
        step_uj = now_uj - self._last_uj
        if -_JITTER_UJ < step_uj < 0:
            return  # readings in quick succession may step back a little; the next one includes the difference
        if step_uj < 0:
            step_uj += self._range_uj
            if not 0 <= step_uj <= self._range_uj // 2:
                raise ValueError(f"the counter of {self.name} fell from {self._last_uj} uJ to {now_uj} uJ")
        self.energy_uj += step_uj
        self._last_uj = now_uj


def _open_zones(root: Path) -> list[_RaplZone]:
    packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if _is_package(zone)]
    parts = [zone for package in packages for zone in sorted(package.glob("intel-rapl:*"))]
    memory = [zone for zone in parts if _name(zone) == "dram"]
    if not packages:
        raise MeterUnavailableError(f"no RAPL counter under {root}")
    try:
        return [_RaplZone(folder) for folder in packages + memory]
    except PermissionError as error:
        raise MeterUnavailableError(
            f"only root may read {error.filename or root}; an administrator can allow it (chmod a+r)"
        ) from error
    except (OSError, ValueError) as error:
        raise MeterUnavailableError(f"the RAPL counters under {root} cannot be read: {error}") from error


def _is_package(folder: Path) -> bool:
    return re.fullmatch(r"intel-rapl:\d+", folder.name) is not None and _name(folder).startswith("package")


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


class CpuEstimateMeter(EnergyMeter):
    """Estimates joules by a model, for machines that cannot measure them; the source of each reading is `estimated`.

        E = idle_w * wall seconds + watts_per_busy_core * CPU seconds of this process

    All threads of this process count; its child processes and other programs do not. The defaults give 0.74 W
    to each hardware thread that this process may use and 4 W to one that is fully busy; the true values can differ
    by a factor of two or more either way. Use it to compare runs on one machine, not to compare machines.
    """

    def __init__(
        self,
        *,
        idle_w: float | None = None,
        watts_per_busy_core: float = WATTS_PER_BUSY_CORE,
        why: str = "",
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        """Start counting.

        Args:
            idle_w: Watts of the idle draw; by default `IDLE_W_PER_THREAD` per thread that this process may use.
            watts_per_busy_core: Watts that one busy hardware thread adds.
            why: Why no better meter is used, for the description.
            clock: Wall seconds.
            cpu_clock: CPU seconds used so far.
        """
        self._idle_w = IDLE_W_PER_THREAD * available_cores() if idle_w is None else idle_w
        self._watts_per_busy_core = watts_per_busy_core
        self._why = why
        self._clock, self._cpu_clock = trusted_clock(clock), cpu_clock
        self._start_s, self._cpu_start_s = self._clock(), cpu_clock()

    @property
    def idle_w(self) -> float:
        """Watts of the idle draw, which every process on the same threads counts."""
        return self._idle_w

    @property
    def description(self) -> str:
        """One line for people: the model and its constants."""
        model = f"{self._idle_w:.2f} W idle + {self._watts_per_busy_core:.2f} W per busy hardware thread"
        return f"CPU energy estimated, not measured: {model}" + (f" ({self._why})" if self._why else "")

    def read(self) -> EnergyReading:
        """Return the estimated joules so far."""
        now_s = self._clock()
        idle_j = self._idle_w * (now_s - self._start_s)
        busy_j = self._watts_per_busy_core * (self._cpu_clock() - self._cpu_start_s)
        return EnergyReading(time_s=now_s, energy_j=idle_j + busy_j, source="estimated")
