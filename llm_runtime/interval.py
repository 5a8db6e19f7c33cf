"""Collect what happens between two decisions, and turn it into the interval's share of the telemetry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime.controls import Controls
from trainpilot.llm_runtime.energy import EnergyReading
from trainpilot.llm_runtime.measure import (
    MOMENT_EVERY,
    energy_between,
    interval_noise_scale,
    loss_statistics,
    mean_finite,
)
from trainpilot.llm_runtime.probe import ProbeResult

pass
from dataclasses import dataclass


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
