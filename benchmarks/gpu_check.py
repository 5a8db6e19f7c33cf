"""Check trainpilot on an NVIDIA GPU in one command: doctor, raw meter readings, demo, overhead.

Writes `results/gpu_doctor.json`, `results/gpu_readings.csv` (a recording that `RecordedMeter` plays back),
`results/gpu_demo.json` and `results/gpu_overhead.json`. Without a GPU it says so and ends with exit code 2.

    python benchmarks/gpu_check.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from _common import RESULTS

from trainpilot.llm_runtime.energy import EnergyMeter, EnergyReading, select_meter
from trainpilot.llm_runtime.energy_recorded import write_recording
from trainpilot.llm_runtime.files import write_json

READ_EVERY_S = 0.05


def main() -> None:
    """Run every check in turn; the first that fails ends the command."""
    if not torch.cuda.is_available():
        print("gpu-check: needs an NVIDIA GPU that torch can see, found none", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cuda")
    command = [sys.executable, "-m", "trainpilot.experiments.cli", "doctor", "--json"]
    doctor = subprocess.run(command, check=True, capture_output=True, text=True)
    write_json(RESULTS / "gpu_doctor.json", json.loads(doctor.stdout))
    print("doctor: written")
    torch.zeros(1, device=device)
    readings = record(select_meter("cuda"), device)
    write_recording(RESULTS / "gpu_readings.csv", readings)
    energies = [r.energy_j for r in readings if r.energy_j is not None]
    print(f"meter: {len(readings)} readings, {energies[-1] - energies[0]:.1f} J" if energies else "meter: no joules")
    _benchmark("demo.py", "--out", "runs/gpu-demo", "--name", "gpu_demo")
    _benchmark("overhead.py", "--tokens", "4000000", "--name", "gpu_overhead")


def _benchmark(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *arguments], check=True)


def record(meter: EnergyMeter, device: torch.device) -> list[EnergyReading]:
    """Return raw readings over five seconds idle, five of matrix products and five idle again."""
    readings: list[EnergyReading] = []
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    for busy in (False, True, False):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            if busy:
                for _ in range(20):
                    matrix @ matrix
                torch.cuda.synchronize()
            else:
                time.sleep(READ_EVERY_S)
            readings.append(meter.read())
    return readings


if __name__ == "__main__":
    main()
