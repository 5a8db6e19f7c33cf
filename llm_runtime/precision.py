"""Switch matrix products to another number format, and measure which formats a device has and which save time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch

from trainpilot.llm_runtime.config import PRECISIONS, Precision
from trainpilot.llm_runtime.files import cache_dir, digest, write_json
from trainpilot.llm_runtime.timing import alternating_seconds

PAYS_BELOW = 0.95
"""A setting pays when its step takes at most this share of the time without it, a precision of the fp32 step's."""

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def lacking(device: torch.device) -> dict[Precision, str]:
    """Return the precisions that `device` cannot do, each with the reason."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return {}
        return {
            "tf32": "needs an NVIDIA GPU of compute capability 8.0",
            "bf16": "needs compute capability 8.0",
        }
    reasons: dict[Precision, str] = {"tf32": f"tf32 is an NVIDIA GPU format; this is {device.type}"}
    if device.type == "cpu":
        reasons["fp16"] = "on a cpu fp16 is slower than fp32 and needs loss scaling"
    elif device.type == "mps":
        reasons["fp16"] = "not tried on mps; bf16 has the same speed and needs no loss scaling"
        if not _macos_has_bf16():
            reasons["bf16"] = "needs macOS 14"
    else:
        reasons["bf16"] = reasons["fp16"] = f"not tried on {device.type}"
    return reasons


def _macos_has_bf16() -> bool:
    try:
        return torch.backends.mps.is_macos_or_newer(14, 0)
    except RuntimeError:  # no torch for Apple silicon
        return False


def double_device(device: torch.device) -> torch.device:
    """Return the device itself, or the CPU where the device has no float64, as Apple's GPU."""
    return torch.device("cpu") if device.type == "mps" else device


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a forward pass runs in `precision`; weights stay in float32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    dtype = _AUTOCAST_DTYPES.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def name_of(dtype: torch.dtype, device: torch.device) -> str:
    """Return the precision that a matrix product with output of `dtype` ran in."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if dtype in names:
        return names[dtype]
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() == "high"
    return "tf32" if tf32 else "fp32"


def masked_precisions(device: torch.device, step: Callable[[Precision], None], model_key: str) -> dict[Precision, str]:
    """Return the precisions that should not be offered, each with the reason: not available, or measured as too slow.

    Args:
        device: Where the model lives.
        step: Runs one forward and backward pass in the given precision.
        model_key: Names model, batch and sequence length; the measurement is cached under it and the device's name.
    """
    reasons = lacking(device)
    seconds = cached_step_seconds(device, step, model_key, [p for p in PRECISIONS if p not in reasons])
    for precision, value in seconds.items():
        ratio = value / seconds["fp32"]
        if precision != "fp32" and ratio > PAYS_BELOW:
            reasons[precision] = f"measured here: {ratio:.2f} of the fp32 step time"
    return reasons


def cached_step_seconds(
    device: torch.device, step: Callable[[Precision], None], model_key: str, precisions: list[Precision]
) -> Mapping[Precision, float]:
    """Return seconds per step for each precision, measured once per device and model."""
    label = measured_on(device, model_key)
    kept = kept_step_seconds(device, model_key)
    if set(kept) == set(precisions):
        return kept
    seconds = measure_step_seconds(device, step, precisions)
    with suppress(OSError):  # a cache that cannot be written only costs time
        write_json(_kept_in(label), {"measured": label, "seconds": seconds})
    return seconds


def kept_step_seconds(device: torch.device, model_key: str) -> Mapping[Precision, float]:
    """Return what `cached_step_seconds` has measured before; nothing where it has not, or the file is damaged."""
    try:
        text = _kept_in(measured_on(device, model_key)).read_text(encoding="utf-8")
        seconds: dict[Precision, float] = json.loads(text)["seconds"]
        return seconds if all(value > 0 for value in seconds.values()) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _kept_in(label: str) -> Path:
    return cache_dir() / "precision" / f"{digest(label, 10)}.json"


def measure_step_seconds(
    device: torch.device, step: Callable[[Precision], None], precisions: list[Precision], rounds: int = 5
) -> dict[Precision, float]:
    """Return the median seconds per step for each precision, measured in alternating order after one warm-up each."""
    passes = {precision: partial(step, precision) for precision in precisions}
    seconds = alternating_seconds(passes, rounds=rounds, wait=partial(synchronise, device))
    return {precision: statistics.median(values) for precision, values in seconds.items()}


def measured_on(device: torch.device, what: str) -> str:
    """Return a label of a measurement: what decides the seconds of a step."""
    return f"{device_name(device)}|{torch.__version__}|{torch.get_num_threads()}|{what}"


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """Return the device's product name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
