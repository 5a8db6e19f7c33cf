"""Collect what happens between two decisions, and turn it into the interval's share of the telemetry.

Estimate the gradient noise scale without a second pass: from Adam's buffers.

Turn what an interval left behind (losses, gradient norms, meter readings) into the numbers of its telemetry.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.energy.meter import EnergyReading, energy_between
from trainpilot.llm_runtime.probe import ProbeResult


def noise_scale_from_moments(
    gradient_norm_squared: float, moment_norm_squared: float, beta1: float, batch_size: float
) -> float | None:
    """Return the gradient noise scale tr(Sigma)/|G|^2 in sequences, or `None` where the estimate has no meaning.

    With m the exponential mean of gradients g of batch B, in a stationary stretch

        E|m|^2 = |G|^2 + (1 - b)/(1 + b) tr(Sigma)/B    and    E|g|^2 = |G|^2 + tr(Sigma)/B

    hence tr(Sigma)/B = (|g|^2 - |m|^2) (1 + b)/(2 b) and |G|^2 = |m|^2 - (1 - b)/(1 + b) tr(Sigma)/B.
    The noise scale itself: McCandlish et al. 2018, "An empirical model of large-batch training". Where the signal is
    lost in the noise the value saturates at some hundred batches; it is a trend, not a set-point.

    Args:
        gradient_norm_squared: Mean of |g|^2 over the last steps, of the gradients that Adam saw.
        moment_norm_squared: |m|^2 after the last of these steps, bias-corrected.
        beta1: Adam's first-moment decay, in (0, 1).
        batch_size: Sequences per step.
    """
    if not 0 < beta1 < 1 or moment_norm_squared <= 0:
        return None
    noise = (gradient_norm_squared - moment_norm_squared) * (1 + beta1) / (2 * beta1)
    signal = moment_norm_squared - (1 - beta1) / (1 + beta1) * noise
    if noise <= 0:
        return 0.0
    return noise / max(signal, 1e-2 * moment_norm_squared) * batch_size


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


pass


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step, still on the device so that nothing waits for it."""

    loss: torch.Tensor
    """Mean training loss of the batch, a scalar in nats/token."""
    gradient_norm: torch.Tensor
    """Euclidean norm of the gradient before clipping, a scalar."""


@dataclass
class Interval:
    """What is collected while an interval runs."""

    controls: Controls
    """Controls that were asked for."""
    start_s: float
    """When it began, on the run's clock, in seconds."""
    reading: EnergyReading
    """The meter when it began."""
    start_sequences: int
    """Sequences trained on when it began."""
    start_sparsity: float
    """Sparsity when it began."""
    mask_updates: int = 0
    """How often the masks have been raised in it."""
    switch_s: float = 0.0
    """Seconds spent on changing controls."""
    probe_s: float = 0.0
    """Seconds spent on the curvature probe."""
    steps: list[StepRecord] = field(default_factory=list)
    moment_norms: list[torch.Tensor] = field(default_factory=list)
    probe: ProbeResult | None = None

    def note_step(self, record: StepRecord, optimizer: Optimizer) -> None:
        """Take in one optimiser step; now and then look at Adam's first moment, for the gradient noise scale."""
        self.steps.append(record)
        if len(self.steps) % MOMENT_EVERY == 0:
            self.note_moment(optimizer)

    def note_moment(self, optimizer: Optimizer) -> None:
        """Keep the present norm of Adam's first moment."""
        norm = adam.first_moment_norm(optimizer)
        if norm is not None:
            self.moment_norms.append(norm)

    def losses_and_gradients(self, batch_size: float, *, gradient_clip: float, beta1: float) -> dict[str, Any]:
        """Return the telemetry fields of loss, gradient and probe. Waits for the device.

        Args:
            batch_size: Mean sequences per step.
            gradient_clip: Largest norm of the gradient; infinite where nobody clips.
            beta1: Adam's first-moment decay.
        """
        moments = torch.stack(self.moment_norms).tolist() if self.moment_norms else []
        losses = torch.stack([record.loss for record in self.steps]).tolist()
        norms = torch.stack([record.gradient_norm for record in self.steps]).tolist()
        statistics = loss_statistics(losses)
        return {
            "train_loss": statistics.mean,
            "train_loss_std": statistics.std,
            "train_loss_max": statistics.maximum,
            "diverged": not statistics.finite,
            "gradient_norm": mean_finite(norms),
            "clipped_share": sum(norm > gradient_clip for norm in norms) / len(norms),
            "noise_scale": interval_noise_scale(norms, moments, batch_size, gradient_clip=gradient_clip, beta1=beta1),
            "relative_update": self.probe.relative_update if self.probe else None,
            "probe_linear": self.probe.linear if self.probe else None,
            "probe_quadratic": self.probe.quadratic if self.probe else None,
        }

    def cost(self, end_s: float, reading: EnergyReading) -> dict[str, Any]:
        """Return the telemetry fields of time and energy, from the clock and the meter at the end."""
        time_s = end_s - self.start_s
        energy_j, source = energy_between(self.reading, reading)
        return {
            "time_s": time_s,
            "probe_time_s": self.probe_s,
            "switch_time_s": self.switch_s,
            "energy_j": energy_j,
            "energy_source": source,
            "power_w": energy_j / time_s if energy_j is not None and time_s > 0 else reading.power_w,
        }
