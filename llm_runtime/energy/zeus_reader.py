"""Read energy with Zeus in a process of its own: each line that comes in is answered by one line of JSON.

`zeus.py` starts it with the interpreter that has Zeus. It imports nothing of trainpilot, as that may be missing there.

python zeus_reader.py amd [INDEX ...]    AMD GPUs by their HIP indices, as torch numbers them; by default all
python zeus_reader.py soc                Apple silicon or a Jetson as a whole

The first line of output says what is measured, or `{"error": ...}`. Energy counts from then on.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

SAMPLE_S = 0.1
"""Seconds between two samples of power where it is integrated."""
APPLE_PARTS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")
"""Counters of Apple silicon that do not contain one another."""


class AmdGpu:
    """One AMD GPU: its energy counter where Zeus trusts it, or else its power, integrated."""

    def __init__(self, gpus: Any, index: int) -> None:
        self._gpus, self._index = gpus, index
        gpu = gpus.gpus[index]
        self.name = f"{gpu.get_name()} (HIP {gpu.gpu_index})"
        self.uuid = _uuid(gpu)
        self.power_w = self._power()
        self._time_s = time.monotonic()
        self._start_mj = None
        if gpus.supports_get_total_energy_consumption(index):
            self._start_mj = gpus.get_total_energy_consumption(index)
        elif self.power_w is None:
            raise RuntimeError(f"{self.name} reports neither a counter that Zeus trusts nor its power")
        self.source = "measured_power" if self._start_mj is None else "measured_counter"
        self.energy_j = 0.0

    def _power(self) -> float | None:
        for ask in (self._gpus.get_instant_power_usage, self._gpus.get_average_power_usage):
            try:
                milliwatts = ask(self._index)
            except Exception:  # Zeus's error for what a GPU does not support
                continue
            if milliwatts > 0:
                return float(milliwatts) / 1000
        return None

    def limit_w(self) -> float | None:
        """Return the power limit in watts."""
        try:
            return float(self._gpus.get_power_management_limit(self._index)) / 1000 or None
        except Exception:
            return None

    def update(self) -> None:
        """Add the joules since the last update."""
        before_w, before_s = self.power_w, self._time_s
        self.power_w, self._time_s = self._power(), time.monotonic()
        if self._start_mj is not None:
            self.energy_j = (self._gpus.get_total_energy_consumption(self._index) - self._start_mj) / 1000
        elif before_w is None or self.power_w is None:
            raise RuntimeError(f"{self.name} no longer reports its power")
        else:
            self.energy_j += (before_w + self.power_w) / 2 * (self._time_s - before_s)


class AmdGpus:
    """The sum over some AMD GPUs, or all."""

    def __init__(self, indices: list[int]) -> None:
        from zeus.device.gpu.amd import AMDGPUs, amdsmi_is_available

        if not amdsmi_is_available():  # its errors otherwise say nothing
            raise RuntimeError("the package amdsmi does not start: it needs ROCm, and a version that fits it")
        gpus = AMDGPUs()
        self._gpus = [AmdGpu(gpus, index) for index in indices or range(len(gpus))]
        if not self._gpus:
            raise RuntimeError("no AMD GPU is visible")
        sources = {gpu.source for gpu in self._gpus}
        self._source = "measured_power" if "measured_power" in sources else "measured_counter"
        self.sample_s = SAMPLE_S if "measured_power" in sources else None

    def about(self) -> dict[str, Any]:
        """Return what is measured."""
        how = {"measured_counter": "energy counter", "measured_power": "power integrated over time"}
        return {
            "what": "; ".join(f"{gpu.name}: {how[gpu.source]}" for gpu in self._gpus),
            "scope": "device",
            "uuids": [gpu.uuid for gpu in self._gpus],
            "resolution_s": 0.5 if self._source == "measured_counter" else 1.0,
        }

    def read(self) -> dict[str, Any]:
        """Return the joules so far, and the power and its limit now."""
        self.sample()
        return {
            "energy_j": sum(gpu.energy_j for gpu in self._gpus),
            "source": self._source,
            "power_w": _sum_known([gpu.power_w for gpu in self._gpus]),
            "power_limit_w": _sum_known([gpu.limit_w() for gpu in self._gpus]),
        }

    def sample(self) -> None:
        """Add the joules since the last sample."""
        for gpu in self._gpus:
            gpu.update()


class Soc:
    """A whole chip with processor and GPU: Apple silicon or a Jetson."""

    sample_s = None

    def __init__(self) -> None:
        from zeus.device.soc import get_soc

        self._soc = get_soc()
        start = self._soc.get_total_energy_consumption()
        if type(start).__name__ == "AppleSiliconMeasurement":
            self._parts = [part for part in APPLE_PARTS if getattr(start, part) is not None]
            # What the counters hold is a model of the chip's: powermetrics(1) calls its figures estimated
            self._what, self._source = "Apple silicon's energy model", "estimated"
        else:
            total = start.total_energy_mj is not None
            parts = ("total_energy_mj",) if total else ("cpu_energy_mj", "gpu_energy_mj")
            self._parts = [part for part in parts if getattr(start, part) is not None]
            self._what, self._source = "Jetson's power sensor, integrated", "measured_power"
        if not self._parts:
            raise RuntimeError("the chip has none of the sensors that Zeus reads")
        self._start_mj = self._millijoules(start)

    def _millijoules(self, found: Any) -> float:
        return float(sum(getattr(found, part) for part in self._parts))

    def about(self) -> dict[str, Any]:
        """Return what is measured."""
        named = " + ".join(part.split("_mj")[0].replace("_energy", "").replace("_total", "") for part in self._parts)
        return {"what": f"{self._what}: {named}", "scope": "machine", "uuids": [], "resolution_s": 1.0}

    def read(self) -> dict[str, Any]:
        """Return the joules so far."""
        found_mj = self._millijoules(self._soc.get_total_energy_consumption())
        return {"energy_j": (found_mj - self._start_mj) / 1000, "source": self._source}

    def sample(self) -> None:
        """Do nothing: the counters go on by themselves."""


def _uuid(gpu: Any) -> str:
    """Return a name of a GPU that is the same in every process, also of other machines."""
    try:
        import amdsmi

        return f"AMD-{amdsmi.amdsmi_get_gpu_device_uuid(gpu.handle)}"
    except Exception:
        return f"AMD-{os.uname().nodename}-{gpu.gpu_index}"


def _sum_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def answer(meter: Any, say: Any) -> None:
    """Answer each line of standard input, and take samples in between, until the input ends."""
    say(meter.about())
    while True:
        asked, _, _ = select.select([0], [], [], meter.sample_s)
        if not asked:
            meter.sample()
        elif not os.read(0, 1024):
            return
        else:
            say(meter.read())


def main() -> None:
    """Open what the arguments name, and answer. An error is the last line."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]  # zeus.py beside this is not Zeus

    def say(found: dict[str, Any]) -> None:
        output.write(json.dumps(found) + "\n")
        output.flush()

    try:
        kind, *indices = sys.argv[1:]
        answer(AmdGpus([int(index) for index in indices]) if kind == "amd" else Soc(), say)
    except BrokenPipeError:  # whoever asked is gone
        return
    except Exception as error:
        say({"error": str(error) or type(error).__name__})


if __name__ == "__main__":
    main()
