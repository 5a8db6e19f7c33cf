"""Write benchmark results as JSON, with the command, package versions and machine."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trainpilot.experiments.run_store import versions
from trainpilot.llm_runtime.files import write_json
from trainpilot.llm_runtime.precision import device_name

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> dict[str, Any]:
    """Return the properties of the machine that the figures depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device_name(device),
        "system": platform.platform(terse=True),
    }


def write_result(name: str, result: dict[str, Any], device: torch.device, command: str | None = None) -> Path:
    """Write `results/NAME.json` and return its path. The command is by default this benchmark's."""
    path = RESULTS / f"{name}.json"
    own = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_portable, sys.argv[1:])])
    header = {
        "command": command or own,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(device),
        "versions": versions(),
    }
    write_json(path, {**header, **result})
    return path


def _portable(argument: str) -> str:
    """Return an argument, or the last part of a path that only this machine has."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
