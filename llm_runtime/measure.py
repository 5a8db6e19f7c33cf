"""Turn what an interval left behind (losses, gradient norms, meter readings) into the numbers of its telemetry."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainpilot.llm_runtime.energy import EnergyReading, EnergySource
from trainpilot.llm_runtime.noise_scale import noise_scale_from_moments

MOMENT_EVERY = 10
"""Adam's first moment, whose memory is about ten steps, is looked at once in as many steps."""


@dataclass(frozen=True)
class LossStatistics:
    """Loss of an interval, in nats/token."""

    mean: float
    std: float
    """Standard deviation around a straight line, so that progress does not count as noise."""
    maximum: float
    finite: bool


def loss_statistics(losses: Sequence[float]) -> LossStatistics:
    """Return mean, spread around the trend and maximum of per-step losses."""
    values = np.asarray(losses, dtype=np.float64)
    if not np.isfinite(values).all():
        return LossStatistics(float("nan"), float("nan"), float("nan"), finite=False)
    std = 0.0
    if len(values) > 2:
        steps = np.arange(len(values))
        residuals = values - np.polyval(np.polyfit(steps, values, 1), steps)
        std = float(np.sqrt((residuals**2).sum() / (len(values) - 2)))
    return LossStatistics(float(values.mean()), std, float(values.max()), finite=True)


def energy_between(before: EnergyReading, after: EnergyReading) -> tuple[float | None, EnergySource | None]:
    """Return joules between two readings and their source; both `None` when either is unknown.

    The source is that of `after`: a meter only ever changes to a weaker one.
    """
    if before.energy_j is None or after.energy_j is None:
        return None, None
    return after.energy_j - before.energy_j, after.source


def mean_finite(values: Sequence[float]) -> float:
    """Return the mean of the finite values, NaN if there are none: float16 skips a step whose gradient overflowed."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def interval_noise_scale(
    gradient_norms: Sequence[float],
    moment_norms: Sequence[float],
    batch_size: float,
    *,
    gradient_clip: float,
    beta1: float,
) -> float | None:
    """Return the gradient noise scale in sequences from the norms of gradients and of Adam's first moment."""
    seen = [min(norm, gradient_clip) ** 2 for norm in gradient_norms if norm != math.inf]
    moments = [norm**2 for norm in moment_norms]
    if not (seen and moments and math.isfinite(sum(seen) + sum(moments))):
        return None
    gradient, moment = sum(seen) / len(seen), sum(moments) / len(moments)
    return noise_scale_from_moments(gradient, moment, beta1, batch_size)


def memory_share(device: torch.device) -> float | None:
    """Return peak memory in use over the device's memory; for a CPU, this process's resident memory over the RAM."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and sys.platform == "linux":
        import resource  # not there on Windows

        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / total
    return None
