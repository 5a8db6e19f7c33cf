"""Find the GPUs that this process computes on in NVML, and ask each of them what it can tell.

CUDA and NVML number GPUs differently. NVML sees all of them, as a rule in the order of their PCI addresses;
CUDA sees those in `CUDA_VISIBLE_DEVICES`, the fastest first unless `CUDA_DEVICE_ORDER=PCI_BUS_ID`. So a GPU
is found by the UUID that torch reports once CUDA is initialised, else by `CUDA_VISIBLE_DEVICES` among the
GPUs sorted by PCI address, and never by handing CUDA's index to NVML.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from trainpilot.llm_runtime.energy import MeterUnavailableError


def ask(nvml: Any, function: str, *arguments: Any) -> Any:
    """Call one NVML function; return `None` where the driver or the bindings do not know the answer."""
    try:
        return getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


class NvmlGpu:
    """One GPU or MIG slice as NVML sees it. Every answer is `None` where it is unknown."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self._instant_power = True
        self.name: str = self._ask("nvmlDeviceGetName") or "unnamed GPU"
        self.uuid: str = self._ask("nvmlDeviceGetUUID") or "unknown UUID"
        self.mig_slice = self.uuid.startswith("MIG-")
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
        self._instant_power = milliwatts > 0  # once unsupported, never asked again
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
    """Return the GPUs that this process sees, or those of them that are wanted.

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
    """Follow CUDA's rules: the list ends at the first entry that names nothing; a repeated GPU voids it."""
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
    """Refuse to guess which GPU an index means when the models differ and CUDA sorts them by speed."""
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
