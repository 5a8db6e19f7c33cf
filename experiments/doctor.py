"""Check this machine for trainpilot (`trainpilot doctor`): devices, energy meters, text, and which controls pay off.

Whether a control saves time is found by short timed passes of a small model. Nothing accesses the network.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainpilot.experiments.run_store import versions
from trainpilot.llm_runtime import energy
from trainpilot.llm_runtime.config import PRECISIONS, Precision, RunConfig
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, MeterUnavailableError, energy_between
from trainpilot.llm_runtime.files import cache_dir
from trainpilot.llm_runtime.live_run import Trainer, resolve_device
from trainpilot.llm_runtime.models import load_model
from trainpilot.llm_runtime.precision import PAYS_BELOW, lacking, synchronise
from trainpilot.llm_runtime.timing import alternating_seconds

BUSY = 1.5
"""A machine is reported as busy if the slowest pass takes at least this many times as long as the fastest."""


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print a report of `diagnose`."""
    rows: list[tuple[str, str]] = [
        ("versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())),
        *(("device", _device(device, report["default_device"])) for device in report["devices"]),
        ("threads", f"{report['threads']['torch']} in use by torch, {report['threads']['cores']} cores"),
        ("energy", report["energy"]["description"]),
        *((f"  {name}", _meter(meter)) for name, meter in report["energy"]["meters"].items()),
        ("corpus stdlib", _corpus(report["corpora"]["stdlib"])),
        ("corpus hub", report["corpora"]["hub"]["why_not"] or "datasets is installed; the network was not tried"),
        ("cache", _cache_line(report["cache"])),
        *((f"optional {name}", _package(about)) for name, about in report["optional"].items()),
    ]
    table = _table("This machine", rows)
    console.print(table)
    console.print(_table("Controls", [(name, about["verdict"]) for name, about in report["controls"].items()]))
    console.print(f"\n[dim]{escape(_measured(report['payoff']))}[/dim]")


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def _device(device: Mapping[str, Any], default: str) -> str:
    parts = [f"{device['kind']}: {device['name']}"]
    if device["memory_bytes"] is not None:
        parts.append(f"{device['memory_bytes'] / 2**30:.1f} GiB")
    if device["compute_capability"] is not None:
        parts.append(f"compute capability {device['compute_capability']}")
    return ", ".join(parts) + (" (default)" if device["kind"].partition(":")[0] == default else "")


def _meter(meter: Mapping[str, Any]) -> str:
    if meter["available"]:
        return f"{meter['power_w']:.1f} W over one second at rest, {meter['source']}"
    way_out = f"; way out: {meter['way_out']}" if meter["way_out"] else ""
    return f"not available: {meter['description']}{way_out}"


def _corpus(stdlib: Mapping[str, Any]) -> str:
    if not stdlib["available"]:
        return str(stdlib["why_not"])
    return f"{stdlib['bytes'] / 1e6:.1f} MB of Python source in {stdlib['documents']:,} files"


def _cache_line(cache: Mapping[str, Any]) -> str:
    state = "" if cache["writable"] else "; cannot be written: set TRAINPILOT_CACHE to another folder"
    return f"{cache['folder']}, {cache['bytes'] / 1e6:.1f} MB, {cache['free_bytes'] / 1e9:.1f} GB free on disk{state}"


def _package(about: Mapping[str, Any]) -> str:
    state = about["version"] or f"not installed: {about['way_out']}"
    return f"{state}, for {about['for']}"


def _measured(payoff: Mapping[str, Any]) -> str:
    if "error" in payoff:
        return "Nothing was timed."
    text = (
        f"Timed on {payoff['model']}, batch {payoff['batch_size']}, {payoff['rounds']} rounds: a rough estimate. "
        "Each run measures the precisions again on its own model."
    )
    if payoff["spread"] > BUSY:
        text += (
            f" This machine is busy: the slowest pass took {payoff['spread']:.1f} times as long as the fastest; "
            "repeat the check when it is idle."
        )
    return text


__all__ = ["diagnose", "print_report"]

OPTIONAL = {
    "datasets": ("--text hub:OWNER/NAME", "trainpilot[hub]"),
    "plotext": ("charts in `trainpilot inspect`", "trainpilot[report]"),
    "mo-gymnasium": ("multi-objective wrappers", "trainpilot[mo]"),
    "nvidia-ml-py": ("energy of NVIDIA GPUs", "trainpilot[nvml]"),
    "zeus": ("energy of AMD GPUs, Apple silicon and Jetsons", "trainpilot[zeus]"),
    "accelerate": ("Hugging Face Trainer", "accelerate"),
    "lightning": ("Lightning", "lightning"),
    "ray": ("`--on ray` of compare, calibrate and train-agent", "trainpilot[ray]"),
    "submitit": ("`--on slurm` of compare and calibrate", "trainpilot[slurm]"),
}
"""By optional package: what it is used for, and what to install."""

Progress = Callable[[str], None]
Report = dict[str, Any]


def diagnose(progress: Progress | None = None) -> Report:
    """Check this machine, which takes about ten seconds, and return the report as plain JSON values.

    Args:
        progress: Called with a line of text before each part; by default, shows it as a status line on standard error.
    """
    if progress is None:
        with Console(stderr=True).status("checking this machine") as status:
            return _diagnose(status.update)
    return _diagnose(progress)


def _diagnose(progress: Progress) -> Report:
    progress("versions and devices")
    from trainpilot.llm_runtime.process import threads_in_use

    report: Report = {
        "versions": versions(),
        "optional": {name: _optional(name, *about) for name, about in OPTIONAL.items()},
        "devices": [asdict(device) for device in devices()],
        "default_device": default_device(),
        "threads": {"cores": os.cpu_count(), "torch": threads_in_use()},
    }
    progress("energy meters, one second")
    report["energy"] = _energy(default_device())
    progress("which controls save time: short passes of llama-micro")
    report["payoff"] = _payoff()
    report["lacking_precisions"] = dict(lacking_precisions())
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
    """Read all available meters over the same second; for the others, report what is missing."""
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
    return {candidate.name: candidate.open for candidate in energy.CANDIDATES}


def _open(make: Callable[[], EnergyMeter]) -> EnergyMeter | str:
    try:
        return make()
    except MeterUnavailableError as error:
        return str(error)
    except Exception as error:  # a failure of a driver or its bindings must not end the report
        return f"{type(error).__name__}: {error}"


def _reading(meter: EnergyMeter | str, before: EnergyReading | None) -> Report:
    empty = {"available": False, "source": None, "energy_j": None, "power_w": None}
    if isinstance(meter, str) or before is None:
        return {**empty, "description": str(meter), "way_out": _way_out(str(meter))}
    after = meter.read()
    energy_j, source = energy_between(before, after)
    seconds = max(after.time_s - before.time_s, 1e-9)
    return {
        "available": energy_j is not None,
        "source": source,
        "energy_j": energy_j,
        "power_w": None if energy_j is None else energy_j / seconds,
        "description": meter.description,
        "way_out": None,
    }


def _way_out(reason: str) -> str:
    hints = {
        "only root may read": "sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj "
        "/sys/class/powercap/intel-rapl*/*/energy_uj (until the next boot)",
        "no RAPL counter": "use a machine that exposes them; many virtual machines do not",
        "nvidia-ml-py is not installed": 'pip install "trainpilot[nvml]"',
        "Zeus is not installed": 'pip install "trainpilot[zeus]", or TRAINPILOT_ZEUS_PYTHON=PYTHON-WITH-ZEUS',
        "NVML does not start": "needs an NVIDIA GPU and its driver; nvidia-smi must work",
    }
    return next((hint for key, hint in hints.items() if key in reason), "see the reason")


# Payoff, corpora, cache -------------------------------------------------------------------------------------


def _payoff() -> Report:
    try:
        payoff = measure_payoff()
    except Exception as error:  # a device that fails here belongs in the report
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
    why_not = "HF_HUB_OFFLINE is set: only texts in the Hub's cache can be used" if offline else None
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
        return 0  # deleted since the folder was listed


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# Verdicts ---------------------------------------------------------------------------------------------------


def _controls(report: Mapping[str, Any]) -> dict[str, Report]:
    """Return for each control whether it is available, whether it saves time here (`None` if unknown), and why."""
    payoff = report["payoff"]
    always = {"available": True, "pays": None, "verdict": "available everywhere; its benefit depends on the policy"}
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


MAX_ROUNDS = 7
LARGER_BATCH = 4
"""Ratio of the two batch sizes that are timed."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that torch can compute on."""

    name: str
    kind: str
    """Torch's name for it: `cpu`, `cuda:0`, `mps`."""
    memory_bytes: int | None
    compute_capability: str | None
    """Compute capability of an NVIDIA GPU, for example 9.0."""


def devices() -> list[Device]:
    """Return the devices available to torch, the host processor last."""
    found = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory()
        found.append(Device(name="Apple GPU", kind="mps", memory_bytes=memory, compute_capability=None))
    return [*found, _host()]


def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        name=properties.name,
        kind=f"cuda:{index}",
        memory_bytes=properties.total_memory,
        compute_capability=f"{properties.major}.{properties.minor}",
    )


def _host() -> Device:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        memory = None  # not a POSIX system
    capability = torch.backends.cpu.get_cpu_capability()
    return Device(name=f"host processor ({capability})", kind="cpu", memory_bytes=memory, compute_capability=None)


def default_device() -> str:
    """Return the device that `auto` selects here: `cuda` or `cpu`."""
    return resolve_device("auto").type


def lacking_precisions() -> Mapping[Precision, str]:
    """Return the precisions that the default device does not support, each with the reason."""
    return lacking(resolve_device("auto"))


@dataclass(frozen=True, kw_only=True)
class Payoff:
    """Measured time ratios of the controls; below 1 saves time."""

    model: str
    batch_size: int
    """Sequences per pass, except for the setting with the larger batch."""
    rounds: int
    """Timed passes per setting; the fastest is used, since other programs can only slow a pass down."""
    precision: Mapping[Precision, float]
    """Time of a pass relative to fp32, for each precision that the device supports."""
    batch: float
    """Time per token at four times the batch size, relative to the batch size itself."""
    width: float
    """Time of a pass with half of the feed-forward channels removed, relative to the full model."""
    spread: float
    """Time of the slowest fp32 pass over that of the fastest: well above 1 if other programs use the machine."""


def measure_payoff(model: str = "llama-micro", batch_size: int = 4, limit_s: float = 3.0) -> Payoff:
    """Time forward and backward passes of a preset on random tokens, on the default device, in alternating order.

    Args:
        model: Name of a preset.
        batch_size: Sequences per pass.
        limit_s: Seconds after which no further round begins; there are at least three rounds.
    """
    device = resolve_device("auto")
    config = RunConfig(model=model, batch_size=batch_size)
    full, narrow = _trainer(config, device), _trainer(replace(config, pruning="width"), device)
    narrow.apply(replace(config.start(), sparsity=0.5))
    batch, large = _random_tokens(config, 1), _random_tokens(config, LARGER_BATCH)
    missing = lacking(device)
    passes: dict[str, Callable[[], None]] = {
        name: partial(full.rehearse, batch, name) for name in PRECISIONS if name not in missing
    }
    passes["large"] = lambda: full.rehearse(large, "fp32")
    passes["narrow"] = lambda: narrow.rehearse(batch, "fp32")
    times = alternating_seconds(
        passes, rounds=MAX_ROUNDS, min_rounds=3, limit_s=limit_s, wait=partial(synchronise, device)
    )
    over_fp32 = {name: min(values) / min(times["fp32"]) for name, values in times.items()}
    return Payoff(
        model=model,
        batch_size=batch_size,
        rounds=len(times["fp32"]),
        precision={name: over_fp32[name] for name in PRECISIONS if name in over_fp32},
        batch=over_fp32["large"] / LARGER_BATCH,
        width=over_fp32["narrow"],
        spread=max(times["fp32"]) / min(times["fp32"]),
    )


def _trainer(config: RunConfig, device: torch.device) -> Trainer:
    return Trainer(load_model(config.model, config.seed).model, config, device)


def _random_tokens(config: RunConfig, factor: int) -> np.ndarray:
    shape = (factor * config.batch_size, config.sequence_length + 1)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.int64)
