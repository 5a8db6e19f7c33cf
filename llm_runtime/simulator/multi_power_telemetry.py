"""Give what one interval under the Multi-Power Law looks like from outside: plausible signs, time and energy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.schedules import sequences_probed
from trainpilot.llm_runtime.simulator.multi_power_cases import SEQUENCE_LENGTH, CaseBatch
from trainpilot.llm_runtime.simulator.multi_power_law import Floats
from trainpilot.llm_runtime.simulator.records import Bools, ControlBatch, Ints, TelemetryBatch

SWITCH_S = 1e-3
"""A change of precision takes this many seconds."""


@dataclass(kw_only=True)
class Interval:
    """What one interval takes and comes to; arrays of shape (n_runs,)."""

    taken: Floats
    """Sequences; 0 for a run that has ended."""
    batch: Floats
    precision: Ints
    rate: Floats
    """Mean learning rate in the law's unit, at the starting batch."""
    last_rate: Floats
    """The same of the last step."""
    critical_batch: Floats
    switched: Bools
    """Precision was changed at its beginning."""
    probed: Bools
    """Whether it ends with a curvature probe."""
    loss: Floats = field(default_factory=lambda: np.zeros(0))
    """Loss in its middle, in nats/token."""

    @classmethod
    def usual(cls, cases: CaseBatch, decisions: int) -> Interval:
        """Return an interval at the starting controls; its learning rates are left open."""
        nothing = np.zeros(len(cases.batch_size))
        return cls(
            taken=cases.n_sequences / decisions, batch=cases.batch_size.astype(np.float64),
            precision=np.zeros(len(nothing), dtype=np.int64), rate=nothing, last_rate=nothing, critical_batch=nothing,
            switched=np.zeros(len(nothing), dtype=np.bool_), probed=np.zeros(len(nothing), dtype=np.bool_),
        )  # fmt: skip

    @property
    def steps(self) -> Floats:
        """Optimiser steps; 0 for a run that has ended."""
        steps: Floats = np.ceil(self.taken / self.batch)
        return steps

    def probe_s(self, cases: CaseBatch) -> Floats:
        """Return the seconds of the probe: three forward passes, about as long as a step on as many sequences."""
        probed = np.where(self.probed & (self.taken > 0), sequences_probed(self.taken), 0.0)
        return probed * SEQUENCE_LENGTH / throughput(cases, self.batch, self.precision)

    def time_s(self, cases: CaseBatch) -> Floats:
        """Return the seconds of the interval, probe and switching included."""
        trained = self.taken * SEQUENCE_LENGTH / throughput(cases, self.batch, self.precision)
        return trained + self.probe_s(cases) + SWITCH_S * self.switched

    def power_w(self, cases: CaseBatch) -> Floats:
        """Return the mean draw: it rises with how much of the machine the batch keeps busy."""
        return cases.idle_w + (cases.busy_w - cases.idle_w) * self.batch / (self.batch + cases.half_batch)


def throughput(cases: CaseBatch, batch: Floats | Ints, precision: Floats | Ints) -> Floats:
    """Return tokens per second: it saturates with the batch as B / (B + B_half)."""
    speed = np.where(np.asarray(precision) == PRECISIONS.index("bf16"), cases.bf16_speed, 1.0)
    rate: Floats = cases.tokens_per_s * speed * batch / (batch + cases.half_batch)
    return rate


def interval_telemetry(
    cases: CaseBatch,
    interval: Interval,
    controls: ControlBatch,
    best_learning_rate: Floats,
    *,
    random: np.random.Generator,
    noise: float,
) -> TelemetryBatch:
    """Return what is measured on an interval; where the run stands is left open.

    Args:
        cases: What the runs are.
        interval: What the interval took.
        controls: What was asked for.
        best_learning_rate: Of each run.
        random: Where chance comes from.
        noise: Factor on it.
    """
    n = len(interval.taken)

    def chance(scale: float) -> Floats:
        return noise * scale * random.standard_normal(n)

    def probe(shown: Floats) -> Floats:
        return np.where(interval.probed, shown, np.nan)

    steps, batch = interval.steps, interval.batch
    std = cases.loss_spread / np.sqrt(batch)
    train_loss = interval.loss + std / np.sqrt(np.maximum(steps, 1.0)) * chance(1.0)
    seen_std = np.where(steps > 2, std * np.exp(chance(1.0) / np.sqrt(2 * np.maximum(steps, 1.0))), 0.0)
    learning_rate = interval.last_rate * cases.unit * np.sqrt(controls.batch_size / cases.batch_size)
    height = interval.last_rate / cases.law.edge
    small = 1e-2 * np.minimum(height, 1.0) * np.exp(chance(0.1))  # slope along an update without curvature
    gradient_norm = cases.gradient_norm * np.sqrt(1.0 + interval.critical_batch / batch) * np.exp(chance(0.05))
    time_s = interval.time_s(cases) * np.exp(chance(0.02))
    power_w = interval.power_w(cases)
    switch_s: Floats = np.where(interval.switched, SWITCH_S, 0.0)
    unset, off = np.full(n, np.nan), np.zeros(n, dtype=np.bool_)
    return TelemetryBatch(
        decision=np.zeros(n, dtype=np.int64),
        budget_used=unset,
        tokens=unset,
        interval_tokens=interval.taken * SEQUENCE_LENGTH,
        steps=steps,
        epochs_seen=unset,
        train_loss=train_loss,
        train_loss_std=seen_std,
        train_loss_max=train_loss + seen_std * np.sqrt(2 * np.log1p(steps)),
        validation_loss=unset,
        gradient_norm=gradient_norm,
        clipped_share=1.0 / (1.0 + gradient_norm**-6.0),
        noise_scale=interval.critical_batch * cases.noise_bias * np.exp(chance(0.3)),
        relative_update=probe(cases.relative_update * learning_rate / best_learning_rate * np.exp(chance(0.05))),
        probe_linear=probe(small * (chance(0.2) - 1.0 / (1.0 + height**2))),
        probe_quadratic=probe(small * cases.curvature * height * np.exp(chance(0.3))),
        learning_rate=learning_rate,
        batch_size=batch,
        micro_batch_size=batch,
        precision=controls.precision.copy(),
        sparsity=np.zeros(n),
        finishing=off,
        finished=off,
        diverged=off,
        time_s=time_s,
        probe_time_s=interval.probe_s(cases),
        switch_time_s=switch_s,
        evaluation_time_s=unset,
        energy_j=time_s * power_w,
        power_w=power_w,
        memory_share=np.minimum(cases.base_memory_share + cases.batch_memory_share * batch / cases.batch_size, 0.95),
    )
