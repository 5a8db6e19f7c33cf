"""AMD GPUs, as `zeus.device.gpu.amd` has them: millijoules and milliwatts, and errors for what is not supported."""

from __future__ import annotations

from typing import Any

from zeus import reported

print("what a library prints is no answer")


class AMDGPU:
    """One GPU."""

    def __init__(self, index: int) -> None:
        self.gpu_index = self.handle = index

    def get_name(self) -> str:
        return "Fake MI300X"


class AMDGPUs:
    """All GPUs."""

    def __init__(self) -> None:
        self.gpus = [AMDGPU(index) for index in range(len(reported()["gpus"]))]

    def __len__(self) -> int:
        return len(self.gpus)

    def _get(self, index: int, name: str) -> Any:
        value = reported()["gpus"][index].get(name)
        if value is None:
            raise RuntimeError(f"{name} is not supported")
        return value

    def supports_get_total_energy_consumption(self, index: int) -> bool:
        return bool(self._get(index, "trusted"))

    def get_total_energy_consumption(self, index: int) -> int:
        return int(self._get(index, "energy"))

    def get_instant_power_usage(self, index: int) -> int:
        return int(self._get(index, "instant"))

    def get_average_power_usage(self, index: int) -> int:
        return int(self._get(index, "average"))

    def get_power_management_limit(self, index: int) -> int:
        return int(self._get(index, "limit"))


def amdsmi_is_available() -> bool:
    return reported()["gpus"] is not None
