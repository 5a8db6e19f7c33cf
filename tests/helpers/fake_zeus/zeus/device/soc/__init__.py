"""Whole chips, as `zeus.device.soc` has them, in millijoules."""

from __future__ import annotations

from typing import Any

from zeus import reported

PARTS = {
    "apple": ("cpu_total_mj", "efficiency_cores_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj"),
    "jetson": ("cpu_energy_mj", "gpu_energy_mj", "total_energy_mj"),
}


class AppleSiliconMeasurement:
    """What Apple silicon has used so far."""


class JetsonMeasurement:
    """What a Jetson has used so far."""


class Soc:
    """One chip."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def get_total_energy_consumption(self) -> Any:
        found: Any = AppleSiliconMeasurement() if self.kind == "apple" else JetsonMeasurement()
        for part in PARTS[self.kind]:
            setattr(found, part, reported()[self.kind].get(part))
        return found


def get_soc() -> Soc:
    for kind in PARTS:
        if kind in reported():
            return Soc(kind)
    raise RuntimeError("No observable SoC was found on the current machine.")
