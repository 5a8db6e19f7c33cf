"""Measure the joules of NVIDIA GPUs through NVML: by their energy counter, or by integrating their power.

CUDA and NVML number GPUs differently. NVML sees all of them, as a rule in the order of their PCI addresses;
CUDA sees those in `CUDA_VISIBLE_DEVICES`, the fastest first unless `CUDA_DEVICE_ORDER=PCI_BUS_ID`. A GPU is
therefore found by the UUID that torch reports once CUDA is initialised, else by `CUDA_VISIBLE_DEVICES` among the
GPUs sorted by PCI address. CUDA's index is never passed to NVML.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from trainpilot.llm_runtime.clock import trusted_clock
from trainpilot.llm_runtime.energy.meter import (
    EnergyMeter,
    EnergyReading,
    EnergyScope,
    EnergySource,
    MeterUnavailableError,
    sum_known,
)
from trainpilot.llm_runtime.energy.plausible import fault_of, power_fault
from trainpilot.llm_runtime.process import Ticker


def ask(nvml: Any, function: str, *arguments: Any) -> Any:
    """Call one NVML function; return `None` if the driver or the bindings do not support it."""
    try:
        return getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


class NvmlGpu:
    """One GPU or MIG slice as NVML sees it. A value that NVML does not report is `None`."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self._instant_power = True
        self.name: str = self._ask("nvmlDeviceGetName") or "unnamed GPU"
        self.uuid: str = self._ask("nvmlDeviceGetUUID") or "unknown UUID"
        self.mig_slice = self.uuid.startswith("MIG-")
        self.mig = False
        self.look_for_mig()

    def look_for_mig(self) -> None:
        """Note whether the GPU is split by MIG now: that may be switched on at any time."""
        self.mig = self.mig_slice or (self._ask("nvmlDeviceGetMigMode") or [0])[0] == 1

    def _ask(self, function: str, *arguments: Any) -> Any:
        return ask(self._nvml, function, self._handle, *arguments)

    @property
    def pci_address(self) -> tuple[int, int, int]:
        """Domain, bus and device number; CUDA's order under `CUDA_DEVICE_ORDER=PCI_BUS_ID`."""
        pci = self._ask("nvmlDeviceGetPciInfo")
        return (0, 0, 0) if pci is None else (pci.domain, pci.bus, pci.device)

    def counter_j(self) -> float | None:
        """Joules since the driver was loaded, from the energy counter that Volta and newer GPUs keep."""
        millijoules = None if self.mig else self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def power_w(self) -> float | None:
        """Watts at this instant, or else the driver's running average. No GPU draws 0 W, so 0 is unknown."""
        if self.mig:
            return None
        milliwatts = self._instant_milliwatts() or self._ask("nvmlDeviceGetPowerUsage")
        return milliwatts / 1000 if milliwatts else None

    def _instant_milliwatts(self) -> int | None:
        field = getattr(self._nvml, "NVML_FI_DEV_POWER_INSTANT", None)
        if field is None or not self._instant_power:
            return None
        scope = getattr(self._nvml, "NVML_POWER_SCOPE_GPU", 0)
        values = self._ask("nvmlDeviceGetFieldValues", [(field, scope)])
        milliwatts = values[0].value.uiVal if values is not None and values[0].nvmlReturn == 0 else 0
        self._instant_power = milliwatts > 0  # once unsupported, it is not read again
        return milliwatts or None

    def power_limit_w(self) -> float | None:
        """Enforced power limit in watts."""
        milliwatts = None if self.mig else self._ask("nvmlDeviceGetEnforcedPowerLimit")
        return milliwatts / 1000 if milliwatts else None

    def utilisation(self) -> float | None:
        """Share of the last sample period in which a kernel ran, in [0, 1]."""
        rates = None if self.mig else self._ask("nvmlDeviceGetUtilizationRates")
        return None if rates is None else rates.gpu / 100

    def memory_bytes(self) -> tuple[int, int] | None:
        """Bytes in use and in total; of a MIG slice only when it is named by its own UUID."""
        if self.mig and not self.mig_slice:
            return None
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else (int(memory.used), int(memory.total))


def choose_gpus(nvml: Any, wanted: Sequence[int | str] | None = None) -> list[NvmlGpu]:
    """Return the GPUs that are visible to this process, or the wanted ones among them.

    Args:
        nvml: The initialised `pynvml` module.
        wanted: Indices as in `cuda:1`, or UUIDs (a unique beginning is enough); `None` for all of them.

    Raises:
        MeterUnavailableError: None is visible, one is not found, or CUDA's order cannot be known.
    """
    present = _present(nvml)
    visible = _reported_by_torch(nvml, present)
    if visible is None:
        _check_order(present, wanted)
        visible = _named_in_environment(nvml, present)
    chosen = visible if wanted is None else [_pick(visible, item) for item in wanted]
    if not chosen:
        raise MeterUnavailableError("no NVIDIA GPU is visible to this process")
    return chosen


def current_index() -> int:
    """Return the index of the GPU that plain `cuda` means."""
    torch = _torch_with_cuda()
    return int(torch.cuda.current_device()) if torch else 0


def _present(nvml: Any) -> list[NvmlGpu]:
    count = ask(nvml, "nvmlDeviceGetCount") or 0
    handles = [ask(nvml, "nvmlDeviceGetHandleByIndex", index) for index in range(count)]
    gpus = [NvmlGpu(nvml, handle) for handle in handles if handle is not None]
    return sorted(gpus, key=lambda gpu: gpu.pci_address)


def _torch_with_cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def _reported_by_torch(nvml: Any, present: list[NvmlGpu]) -> list[NvmlGpu] | None:
    torch = _torch_with_cuda()
    if torch is None:
        return None
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if not all(hasattr(item, "uuid") for item in properties):
        return None
    return [_by_bare_uuid(nvml, present, str(item.uuid)) for item in properties]


def _by_bare_uuid(nvml: Any, present: list[NvmlGpu], uuid: str) -> NvmlGpu:
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-").lower()
    for gpu in present:
        if gpu.uuid.lower() == f"gpu-{bare}":
            return gpu
    return _mig_slice(nvml, f"MIG-{bare}")


def _mig_slice(nvml: Any, uuid: str) -> NvmlGpu:
    handle = ask(nvml, "nvmlDeviceGetHandleByUUID", uuid)
    if handle is None:
        raise MeterUnavailableError(f"NVML finds no device {uuid}")
    return NvmlGpu(nvml, handle)


def _environment_entries() -> list[str] | None:
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if text is None else [entry.strip() for entry in text.split(",")]


def _named_in_environment(nvml: Any, present: list[NvmlGpu]) -> list[NvmlGpu]:
    """Apply CUDA's rules: the list ends at the first entry that names no GPU, and a repeated GPU makes it empty."""
    entries = _environment_entries()
    if entries is None:
        return present
    visible: list[NvmlGpu] = []
    for entry in entries:
        gpu = _mig_slice(nvml, entry) if entry.startswith("MIG-") else _match(present, entry)
        if gpu is None:
            break
        if gpu in visible:
            return []
        visible.append(gpu)
    return visible


def _match(gpus: list[NvmlGpu], entry: str) -> NvmlGpu | None:
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    matches = [gpu for gpu in gpus if entry and gpu.uuid.lower().startswith(entry.lower())]
    return matches[0] if len(matches) == 1 else None


def _pick(visible: list[NvmlGpu], item: int | str) -> NvmlGpu:
    gpu = _match(visible, str(item))
    if gpu is None:
        raise MeterUnavailableError(f"GPU {item!r} is not among the {len(visible)} visible to this process")
    return gpu


def _check_order(present: list[NvmlGpu], wanted: Sequence[int | str] | None) -> None:
    """Raise where an index is ambiguous because the GPUs differ and CUDA sorts them by speed."""
    entries = _environment_entries()
    by_index = wanted if entries is None else entries
    indexed = [item for item in by_index or () if str(item).isdecimal()]
    models = {gpu.name for gpu in present}
    by_speed = len(models) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    if by_speed and indexed and len(set(indexed)) < len(present):
        raise MeterUnavailableError(
            f"which GPU has index {indexed[0]} is unknown: the GPUs differ and CUDA sorts them by speed; "
            "make the meter after CUDA is initialised, or set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )


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


MOST_GPU_W = 3_000.0
"""No GPU draws more, where its power limit is not known."""


class GpuEnergy:
    """The joules of one GPU since this object was made.

    The source is the best that the GPU offers, and can only get worse: energy counter, integrated power, unknown.
    After a change from counter to power the joules continue from the sum so far; unknown energy stays unknown. The
    counter is given up too where it stands still while power is drawn, or rises faster than the power limit allows.
    """

    def __init__(self, gpu: NvmlGpu, now_s: float) -> None:
        self.gpu = gpu
        self.power_w = gpu.power_w()
        self.lost: str | None = None
        """Why the joules became unknown during the measurement."""
        self.weaker: str | None = None
        """Why the counter is no longer believed."""
        self._time_s = self._moved_s = now_s
        self._limit_w = gpu.power_limit_w() or MOST_GPU_W
        self._odd_power: str | None = None
        self.power_w = self._believed(self.power_w)
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
        self.gpu.look_for_mig()
        before_w, self._limit_w = self._limit_w, self.gpu.power_limit_w() or MOST_GPU_W
        limit_w = max(before_w, self._limit_w)  # it may have been changed in between
        power_w = self._believed(self.gpu.power_w())
        if self.gpu.mig and self.source is not None:
            self._lose(_MIG)
        if self.source == "measured_counter":
            self._follow_counter(power_w, now_s, limit_w)
        if self.source == "measured_power":
            self._integrate(power_w, now_s, limit_w)
        self.power_w, self._time_s = power_w, now_s

    def _believed(self, power_w: float | None) -> float | None:
        """Return a power that can be true; else `None`."""
        self._odd_power = power_fault(power_w, self._limit_w)
        return None if self._odd_power else power_w

    def _follow_counter(self, power_w: float | None, now_s: float, limit_w: float) -> None:
        before, now = self._counter_j, self.gpu.counter_j()
        if now is None:
            self.source = "measured_power"
            return
        if before is None or self.energy_j is None or now < before:
            self._lose(f"its energy counter fell from {before} J to {now} J")
            return
        if now > before:
            self._moved_s = now_s
        fault = fault_of(
            now - before,
            now_s - self._time_s,
            powers_w=(self.power_w, power_w),
            limit_w=limit_w,
            still_s=now_s - self._moved_s,
        )
        if fault is None:
            self.energy_j += now - before
            self._counter_j = now
        elif self.power_w is None or power_w is None:
            self._lose(f"its energy counter {fault}")
        else:
            self.source, self.weaker = "measured_power", f"its energy counter {fault}"

    def _integrate(self, power_w: float | None, now_s: float, limit_w: float) -> None:
        if power_w is None or self.power_w is None or self.energy_j is None:
            self._lose(f"its power {self._odd_power}" if self._odd_power else "it stopped answering")
            return
        seconds = now_s - self._time_s
        step_j = (power_w + self.power_w) / 2 * seconds
        if fault := fault_of(step_j, seconds, limit_w=limit_w):
            self._lose(f"its integrated power {fault}")
        else:
            self.energy_j += step_j

    def _lose(self, reason: str) -> None:
        self.energy_j, self.source, self.lost = None, None, reason


class NvmlMeter(EnergyMeter):
    """Measures joules, watts and memory of the GPUs that this process sees, as sums over the GPUs.

    The energy counter (Volta and newer) advances about every 100 ms: a window of T seconds is off by up to
    about 0.1/T of itself, and one below 100 ms may read 0 J. Without a counter, a daemon thread samples the
    power and the trapezoid rule integrates it. Either way the whole board is measured, other programs on it
    included. Kernels that are still queued when `read` is called fall into the next window: synchronise first.

    A counter that stands still while power is drawn, or rises faster than the power limit allows, is replaced by the
    integrated power, with one warning. If a GPU stops answering, reports an impossible power, is split by MIG, or its
    counter runs backwards, the sum's energy is `None` from then on, with one warning. MIG slices have no energy of
    their own, so theirs is `None` from the start.
    """

    scope: EnergyScope = "device"

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
            sample_s: Seconds between two samples of power, used only if there is no energy counter.
            clock: Returns seconds, and never runs backwards.

        Raises:
            MeterUnavailableError: There is no NVML, no visible GPU, or an index is ambiguous.
        """
        self._nvml = load_nvml()
        self._sample_s, self._clock = sample_s, trusted_clock(clock)
        self._lock = threading.Lock()
        self._sampler: Ticker | None = None
        self._closed = False
        self._warned: set[str] = set()
        try:
            self._gpus = [GpuEnergy(gpu, self._clock()) for gpu in choose_gpus(self._nvml, gpus)]
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

    @property
    def resolution_s(self) -> float:
        """Seconds of a meaningful window: the counter advances every 0.1 s, the power may be a mean over 1 s."""
        source = _weakest([gpu.source for gpu in self._gpus])
        return 0.0 if source is None else 0.5 if source == "measured_counter" else 1.0

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
        for name, means in (("weaker", "the integral of the power"), ("lost", "unknown")):
            found = [(gpu.gpu, why) for gpu in self._gpus if (why := getattr(gpu, name))]
            if found and name not in self._warned:
                self._warned.add(name)
                reasons = "; ".join(f"{gpu.name} ({gpu.uuid}): {why}" for gpu, why in found)
                warnings.warn(f"energy is {means} from now on; {reasons}", RuntimeWarning, stacklevel=3)

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
