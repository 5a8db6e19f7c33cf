"""Say what can be measured and controlled on this machine, and what pays. Tries nothing on the network."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from trainpilot.experiments.doctor_report import print_report
from trainpilot.experiments.versions import versions
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, MeterUnavailableError, select_meter
from trainpilot.llm_runtime.files import cache_dir

__all__ = ["diagnose", "print_report"]

PAYS_BELOW = 0.95
"""A setting pays when it takes at most this share of the time without it."""
OPTIONAL = {
    "datasets": ("--text hub:OWNER/NAME", "trainpilot[hub]"),
    "plotext": ("charts in `trainpilot inspect`", "trainpilot[report]"),
    "mo-gymnasium": ("multi-objective wrappers", "trainpilot[mo]"),
    "nvidia-ml-py": ("energy of NVIDIA GPUs", "trainpilot[nvml]"),
    "accelerate": ("Hugging Face Trainer", "accelerate"),
    "lightning": ("Lightning", "lightning"),
}
"""What each optional package is for, and what to install."""

Progress = Callable[[str], None]
Report = dict[str, Any]


def diagnose(progress: Progress | None = None) -> Report:
    """Look at this machine, for about ten seconds, and return plain JSON values.

    Args:
        progress: Called with a line of text before each part; by default one changing line on standard error.
    """
    if progress is None:
        with Console(stderr=True).status("looking at this machine") as status:
            return _diagnose(status.update)
    return _diagnose(progress)


def _diagnose(progress: Progress) -> Report:
    progress("versions and devices")
    from trainpilot.llm_runtime import machine
    from trainpilot.llm_runtime.process import threads_in_use

    report: Report = {
        "versions": versions(),
        "optional": {name: _optional(name, *about) for name, about in OPTIONAL.items()},
        "devices": [asdict(device) for device in machine.devices()],
        "default_device": machine.default_device(),
        "threads": {"cores": os.cpu_count(), "torch": threads_in_use()},
    }
    progress("energy meters, one second")
    report["energy"] = _energy(machine.default_device())
    progress("what pays: short passes of llama-micro")
    report["payoff"] = _payoff()
    report["lacking_precisions"] = dict(machine.lacking_precisions())
    progress("corpora and cache")
    report["corpora"] = {"stdlib": _stdlib(), "hub": _hub()}
    report["cache"] = _cache()
    report["controls"] = _controls(report)
    return report


def _optional(name: str, use: str, install: str) -> Report:
    try:
        return {"version": version(name), "for": use, "way_out": None}
    except PackageNotFoundError:
        return {"version": None, "for": use, "way_out": f'pip install "{install}"'}


# Energy -----------------------------------------------------------------------------------------------------


def _energy(device: str) -> Report:
    """Read every meter that there is over the same second; say of the others what is missing."""
    makers = {"chosen": lambda: select_meter(device), **_meters()}
    opened = {name: _open(make) for name, make in makers.items()}
    before = {name: meter.read() for name, meter in opened.items() if not isinstance(meter, str)}
    time.sleep(1.0)
    report = {name: _reading(meter, before.get(name)) for name, meter in opened.items()}
    for meter in opened.values():
        if not isinstance(meter, str):
            meter.close()
    chosen = report.pop("chosen")
    return {"description": chosen["description"], "source": chosen["source"], "meters": report}


def _meters() -> dict[str, Callable[[], EnergyMeter]]:
    from trainpilot.llm_runtime.energy.host import CpuEstimateMeter, RaplMeter
    from trainpilot.llm_runtime.energy.nvml import NvmlMeter

    return {"nvml": NvmlMeter, "rapl": RaplMeter, "cpu_estimate": CpuEstimateMeter}


def _open(make: Callable[[], EnergyMeter]) -> EnergyMeter | str:
    try:
        return make()
    except MeterUnavailableError as error:
        return str(error)
    except Exception as error:  # whatever a driver or its bindings do wrong, the report goes on
        return f"{type(error).__name__}: {error}"


def _reading(meter: EnergyMeter | str, before: EnergyReading | None) -> Report:
    empty = {"available": False, "source": None, "energy_j": None, "power_w": None}
    if isinstance(meter, str) or before is None:
        return {**empty, "description": str(meter), "way_out": _way_out(str(meter))}
    after = meter.read()
    known = before.energy_j is not None and after.energy_j is not None
    energy_j = after.energy_j - before.energy_j if known else None  # type: ignore[operator]
    seconds = max(after.time_s - before.time_s, 1e-9)
    return {
        "available": energy_j is not None,
        "source": after.source if known else None,
        "energy_j": energy_j,
        "power_w": None if energy_j is None else energy_j / seconds,
        "description": meter.description,
        "way_out": None,
    }


def _way_out(reason: str) -> str:
    hints = {
        "only root may read": "sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj "
        "/sys/class/powercap/intel-rapl*/*/energy_uj (until the next boot)",
        "no RAPL counter": "use a machine that shows them; many virtual machines do not",
        "nvidia-ml-py is not installed": 'pip install "trainpilot[nvml]"',
        "NVML does not start": "needs an NVIDIA GPU and its driver; nvidia-smi must work",
    }
    return next((hint for key, hint in hints.items() if key in reason), "see the reason")


# Payoff, corpora, cache -------------------------------------------------------------------------------------


def _payoff() -> Report:
    from trainpilot.llm_runtime.machine import measure_payoff

    try:
        payoff = measure_payoff()
    except Exception as error:  # a device that fails here is what the report is to say
        return {"error": f"{type(error).__name__}: {error}"}
    return {**asdict(payoff), "precision": dict(payoff.precision)}


def _stdlib() -> Report:
    from trainpilot.llm_runtime.data.text_sources import read_documents

    try:
        documents = read_documents(["stdlib"])
    except ValueError as error:
        return {"available": False, "documents": 0, "bytes": 0, "why_not": str(error)}
    size = sum(len(document.encode()) for document in documents)
    return {"available": True, "documents": len(documents), "bytes": size, "why_not": None}


def _hub() -> Report:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    installed = _optional("datasets", *OPTIONAL["datasets"])
    why_not = "HF_HUB_OFFLINE is set: only what is in the Hub's cache" if offline else None
    if installed["version"] is None:
        why_not = f"the package datasets is not installed: {installed['way_out']}"
    return {"available": why_not is None, "offline": offline, "network_tried": False, "why_not": why_not}


def _cache() -> Report:
    folder = cache_dir()
    size = sum(_size(path) for path in folder.rglob("*")) if folder.is_dir() else 0
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return {
        "folder": str(folder),
        "bytes": size,
        "free_bytes": shutil.disk_usage(existing).free,
        "writable": _writable(existing),
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0  # gone between listing and looking


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# Verdicts ---------------------------------------------------------------------------------------------------


def _controls(report: Mapping[str, Any]) -> dict[str, Report]:
    """Return for each control whether it is available, whether it pays here (`None`: not known), and why."""
    payoff = report["payoff"]
    always = {"available": True, "pays": None, "verdict": "available everywhere; what it pays is the policy's to find"}
    if "error" in payoff:
        unknown = {"available": True, "pays": None, "verdict": f"not measured: {payoff['error']}"}
        return {"learning_rate": always, "batch_size": unknown, "precision": unknown, "pruning": unknown}
    return {
        "learning_rate": always,
        "batch_size": _verdict(payoff["batch"], "four times the batch takes {:.2f} of the time per token"),
        "precision": _precision(payoff["precision"], report["lacking_precisions"]),
        "pruning": _pruning(payoff["width"]),
    }


def _verdict(ratio: float, text: str) -> Report:
    pays = ratio <= PAYS_BELOW
    return {"available": True, "pays": pays, "verdict": f"{'pays' if pays else 'does not pay'}: {text.format(ratio)}"}


def _precision(over_fp32: Mapping[str, float], lacking: Mapping[str, str]) -> Report:
    others = {name: ratio for name, ratio in over_fp32.items() if name != "fp32"}
    parts = [f"{name} takes {ratio:.2f} of the fp32 time" for name, ratio in others.items()]
    parts += [f"no {name} ({reason})" for name, reason in lacking.items()]
    pays = any(ratio <= PAYS_BELOW for ratio in others.values())
    head = "pays" if pays else "does not pay" if others else "not available"
    return {"available": bool(others), "pays": pays, "verdict": f"{head}: {'; '.join(parts)}"}


def _pruning(width: float) -> Report:
    report = _verdict(width, "half of the feed-forward channels removed (--pruning width) take {:.2f} of the time")
    report["verdict"] += "; weight masks (magnitude, evolution) save no time on any device"
    return report
