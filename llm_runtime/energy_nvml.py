"""Measure the joules of NVIDIA GPUs through NVML: by their energy counter, or by integrating their power."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from trainpilot.llm_runtime.energy import EnergyReading, EnergySource, MeterUnavailableError, sum_known
from trainpilot.llm_runtime.nvml_gpus import NvmlGpu, ask, choose_gpus
from trainpilot.llm_runtime.ticker import Ticker

_MIG = "it is split by MIG, and NVML has no energy or power per slice"
_NEITHER = "it reports neither an energy counter nor power"


def load_nvml() -> Any:
    """Return the initialised `pynvml` module; every call needs one `nvmlShutdown`.

    Raises:
        MeterUnavailableError: The bindings or the driver are missing, or the driver refuses.
    """
    try:
        import pynvml
    except ImportError as error:
        raise MeterUnavailableError(f"the package nvidia-ml-py is not installed ({error})") from error
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, AttributeError) as error:
        raise MeterUnavailableError(f"NVML does not start: {error}") from error
    return pynvml


class GpuEnergy:
    """The joules of one GPU since this object was made.

    It starts with the best source and only ever falls: energy counter, integrated power, unknown. A fall from
    counter to power goes on from the joules so far; what is unknown once stays unknown.
    """

    def __init__(self, gpu: NvmlGpu, now_s: float) -> None:
        self.gpu = gpu
        self.power_w = gpu.power_w()
        self.lost: str | None = None
        """Why the joules became unknown along the way."""
        self._time_s = now_s
        self._counter_j = gpu.counter_j()
        self.source: EnergySource | None = self._best_source()
        self.energy_j: float | None = None if self.source is None else 0.0

    def _best_source(self) -> EnergySource | None:
        if self._counter_j is not None:
            return "measured_counter"
        return None if self.power_w is None else "measured_power"

    @property
    def description(self) -> str:
        """One clause for people: which GPU, and how it is measured."""
        reason = self.lost or (_MIG if self.gpu.mig else _NEITHER)
        how = {"measured_counter": "energy counter", "measured_power": "power integrated over time"}
        return f"{self.gpu.name} ({self.gpu.uuid}): {how.get(self.source or '', f'energy unknown, {reason}')}"

    def update(self, now_s: float) -> None:
        """Add the joules since the last update."""
        power_w = self.gpu.power_w()
        if self.source == "measured_counter":
            self._follow_counter()
        if self.source == "measured_power":
            self._integrate(power_w, now_s)
        self.power_w, self._time_s = power_w, now_s

    def _follow_counter(self) -> None:
        before, now = self._counter_j, self.gpu.counter_j()
        if now is None:
            self.source = "measured_power"
        elif before is None or self.energy_j is None or now < before:
            self._lose(f"its energy counter fell from {before} J to {now} J")
        else:
            self.energy_j += now - before
            self._counter_j = now

    def _integrate(self, power_w: float | None, now_s: float) -> None:
        if power_w is None or self.power_w is None or self.energy_j is None:
            self._lose("it stopped answering")
        else:
            self.energy_j += (power_w + self.power_w) / 2 * (now_s - self._time_s)

    def _lose(self, reason: str) -> None:
        self.energy_j, self.source, self.lost = None, None, reason


class NvmlMeter:
    """Joules, watts and memory of the GPUs that this process sees, added up.

    The energy counter (Volta and newer) advances about every 100 ms: a window of T seconds is off by up to
    about 0.1/T of itself, and one below 100 ms may read 0 J. Without a counter, a daemon thread samples the
    power and the trapezoid rule adds it up. Either way the whole board is measured, other programs on it
    included, and kernels still queued when `read` is called fall into the next window: synchronise first.

    A GPU that stops answering, or whose counter runs backwards, makes the energy of the sum `None` from then
    on, with one warning. MIG slices have no energy of their own, so theirs is `None` from the start.
    """

    def __init__(
        self,
        gpus: Sequence[int | str] | None = None,
        *,
        sample_s: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Find the GPUs and start counting.

        Args:
            gpus: Indices as in `cuda:1` or UUIDs, among those that this process sees; `None` for all of them.
            sample_s: Seconds between two samples of power, used only where there is no energy counter.
            clock: Seconds, never running backwards.

        Raises:
            MeterUnavailableError: There is no NVML, no visible GPU, or no way to tell which one is meant.
        """
        self._nvml = load_nvml()
        self._sample_s, self._clock = sample_s, clock
        self._lock = threading.Lock()
        self._sampler: Ticker | None = None
        self._closed = False
        self._warned = False
        try:
            self._gpus = [GpuEnergy(gpu, clock()) for gpu in choose_gpus(self._nvml, gpus)]
            self._sample_where_needed()
        except BaseException:
            ask(self._nvml, "nvmlShutdown")
            raise

    @property
    def description(self) -> str:
        """One line for people: each GPU, and how it is measured."""
        return "NVML: " + "; ".join(gpu.description for gpu in self._gpus)

    @property
    def uuids(self) -> list[str]:
        """The UUIDs of the GPUs that are measured."""
        return [gpu.gpu.uuid for gpu in self._gpus]

    def read(self) -> EnergyReading:
        """Return the sums over the GPUs; a sum of which one part is unknown is `None`."""
        with self._lock:
            now_s = self._clock()
            if self._closed:
                return EnergyReading(time_s=now_s, energy_j=None, source=None)
            for gpu in self._gpus:
                gpu.update(now_s)
            reading = self._reading(now_s)
            self._sample_where_needed()
        self._warn_once()
        return reading

    def _reading(self, now_s: float) -> EnergyReading:
        shares = [gpu.gpu.utilisation() for gpu in self._gpus]
        memory = [gpu.gpu.memory_bytes() or (None, None) for gpu in self._gpus]
        busy = sum_known(shares)
        used, total = (sum_known(item[part] for item in memory) for part in (0, 1))
        return EnergyReading(
            time_s=now_s,
            energy_j=sum_known(gpu.energy_j for gpu in self._gpus),
            source=_weakest([gpu.source for gpu in self._gpus]),
            power_w=sum_known(gpu.power_w for gpu in self._gpus),
            power_limit_w=sum_known(gpu.gpu.power_limit_w() for gpu in self._gpus),
            utilisation=None if busy is None else busy / len(shares),
            memory_used_bytes=None if used is None else int(used),
            memory_total_bytes=None if total is None else int(total),
        )

    def _sample_where_needed(self) -> None:
        if self._sampler is None and any(gpu.source == "measured_power" for gpu in self._gpus):
            self._sampler = Ticker(self._sample, self._sample_s)

    def _sample(self) -> None:
        with self._lock:
            for gpu in self._gpus:
                if gpu.source == "measured_power" and not self._closed:
                    gpu.update(self._clock())

    def _warn_once(self) -> None:
        lost = [f"{gpu.gpu.name} ({gpu.gpu.uuid}): {gpu.lost}" for gpu in self._gpus if gpu.lost]
        if lost and not self._warned:
            self._warned = True
            warnings.warn(f"energy is unknown from now on; {'; '.join(lost)}", RuntimeWarning, stacklevel=3)

    def close(self) -> None:
        """Stop sampling and release NVML; later readings are empty."""
        if self._closed:
            return
        self._closed = True
        if self._sampler is not None:
            self._sampler.stop()
        with self._lock:
            ask(self._nvml, "nvmlShutdown")


def _weakest(sources: list[EnergySource | None]) -> EnergySource | None:
    if None in sources:
        return None
    return "measured_power" if "measured_power" in sources else "measured_counter"
