"""Simulate the sensors of runs: noisy measurements of loss, gradient and probe, as arrays with one row per run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trainpilot.llm_runtime.schedules import sequences_probed
from trainpilot.llm_runtime.simulator.physics import MOMENTUM_NOISE, RATE_UNIT, Moments, Physics, PhysicsState, edge
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Rows

CHANNELS = 12
"""Random numbers per run and interval."""
TEXT_SPREAD = 1.5
"""Factor on the spread of an interval's loss, since neighbouring sequences come from the same documents."""
ALARM_FROM = 0.2
"""Precursors of the edge begin at this share of it."""
SPIKE = 0.15
"""Height of the largest spike of an interval at the edge, in nats/token."""


@dataclass(kw_only=True)
class Sensors(Rows):
    """Constants of the sensors of each run; arrays of shape (n_runs,). Typical values are means over live runs."""

    loss_spread: Floats
    """Standard deviation of one sequence's loss, in nats/token."""
    validation_gap: Floats
    """Validation loss minus training loss, in nats/token, since the texts differ."""
    noise_scale: Floats
    """Gradient noise over signal power at the start, in sequences, as estimated from Adam's buffers."""
    gradient_norm: Floats
    """Norm of the gradient at the start."""
    curvature: Floats
    """Curvature term of the probe divided by the loss, at a relative update of 1 %."""
    curvature_memory: Floats
    """Strength of the curvature's adaptation to past updates: 0 for none, 2 for full (the edge of stability)."""
    probe_spread: Floats
    """Standard deviation of the probe's logarithm on one sequence."""
    alarm: Floats
    """Strength of the precursors: how much loss spread, gradient norm and curvature have risen at the edge, as a share
    of their values."""


@dataclass(frozen=True, kw_only=True)
class SimulatedInterval:
    """Steps, batch, losses and rates of one interval of each run; arrays of shape (n_runs,)."""

    steps: Floats
    """Optimiser steps."""
    batch: Floats
    """Sequences per step."""
    last_rate: Floats
    """Learning rate of the last step."""
    mean_loss: Floats
    """Expected training loss, mean over the interval."""
    loss_fall: Floats
    """Fall of the expected loss over the interval."""
    probed: Bools
    """Whether it ends with a curvature probe."""


def read_sensors(
    sensors: Sensors,
    physics: Physics,
    state: PhysicsState,
    moments: Moments,
    interval: SimulatedInterval,
    *,
    memory: Floats,
    random: Floats,
) -> dict[str, Floats]:
    """Return the telemetry's fields of loss, gradient and probe.

    Args:
        sensors: Constants of the sensors.
        physics: Parameters of the runs.
        state: State of the runs.
        moments: Gradient powers of the interval.
        interval: Steps, batch and losses of the interval.
        memory: Mean logarithm of past relative updates; changed in place.
        random: Standard normal numbers of shape (n_runs, CHANNELS).
    """
    steps, batch = np.maximum(interval.steps, 1.0), interval.batch
    alarm = _alarm(sensors, physics, state, interval, random[:, 11])
    sensors = _alarmed(sensors, 1.0 + alarm)
    spread = sensors.loss_spread / np.sqrt(batch)
    mean = interval.mean_loss + TEXT_SPREAD * spread / np.sqrt(steps) * random[:, 0]
    measured = spread * np.exp(0.7 / np.sqrt(2 * steps) * random[:, 1])
    update = _relative_update(physics, state, moments, interval, random[:, 2])
    linear, quadratic = _probe(sensors, interval, update, memory, random)
    largest = measured * np.sqrt(2 * np.log(np.maximum(steps, 1.5))) * np.exp(0.2 * random[:, 3])
    return {
        "train_loss": mean,
        "train_loss_std": np.where(steps > 2, measured, 0.0),
        "train_loss_max": mean + largest + SPIKE * alarm,
        **_gradients(sensors, state, moments, interval, random),
        "relative_update": np.where(interval.probed, update, np.nan),
        "probe_linear": linear,
        "probe_quadratic": quadratic,
    }


def _alarm(
    sensors: Sensors, physics: Physics, state: PhysicsState, interval: SimulatedInterval, random: Floats
) -> Floats:
    """Return how much the edge is felt: 0 below `ALARM_FROM` of it, about `sensors.alarm` at it, and noisy."""
    near = interval.last_rate / RATE_UNIT / edge(physics, interval.batch, state.steps)
    felt = np.clip(1.0 - np.log(np.maximum(near, 1e-12)) / np.log(ALARM_FROM), 0.0, 2.0)
    alarm: Floats = sensors.alarm * felt**2 * np.exp(0.5 * random)
    return alarm


def _alarmed(sensors: Sensors, lifted: Floats) -> Sensors:
    """Return the sensors of runs near their edge: spread of the loss, gradient norm and curvature are lifted."""
    return replace(
        sensors,
        loss_spread=sensors.loss_spread * lifted,
        gradient_norm=sensors.gradient_norm * lifted,
        curvature=sensors.curvature * lifted,
    )


def _relative_update(
    physics: Physics, state: PhysicsState, moments: Moments, interval: SimulatedInterval, random: Floats
) -> Floats:
    size = physics.values["update"] * np.sqrt(moments.momentum_power / state.growth)
    update: Floats = size * interval.last_rate / RATE_UNIT * np.exp(0.12 * random)
    return update


def _gradients(
    sensors: Sensors, state: PhysicsState, moments: Moments, interval: SimulatedInterval, random: Floats
) -> dict[str, Floats]:
    ratio = sensors.noise_scale / (interval.batch * moments.signal_power)  # noise over signal power of one gradient
    seen, averaged = 1.0 + ratio, (1.0 + MOMENTUM_NOISE * ratio) * np.exp(0.15 * random[:, 4] - 0.12)
    noise = np.maximum(seen - averaged, 0.0) / (1.0 - MOMENTUM_NOISE)
    signal = averaged - MOMENTUM_NOISE * noise
    norm = sensors.gradient_norm * np.sqrt(moments.signal_power * seen / state.growth) * np.exp(0.2 * random[:, 5])
    return {
        "noise_scale": noise / np.maximum(signal, 1e-2 * averaged) * interval.batch,
        "gradient_norm": norm,
        "clipped_share": 1.0 / (1.0 + norm**-4.0),
    }


def _probe(
    sensors: Sensors, interval: SimulatedInterval, update: Floats, memory: Floats, random: Floats
) -> tuple[Floats, Floats]:
    log_update = np.log(np.maximum(update, 1e-9) / 0.01)
    memory += (log_update - memory) / 8.0
    sequences = sequences_probed(interval.steps * interval.batch)
    luck = sensors.probe_spread * random[:, 6] / sequences**0.5
    size = np.exp(2.0 * log_update - sensors.curvature_memory * memory + luck)
    quadratic = sensors.curvature * interval.mean_loss * size
    quadratic = np.where(random[:, 7] < -1.9, -0.3 * quadratic, quadratic)
    blur = np.exp(0.87 * np.log(np.maximum(update, 1e-9)) - 0.7) / np.sqrt(sequences)
    linear = -interval.loss_fall / np.maximum(interval.steps, 1.0) + quadratic + blur * random[:, 8]
    return np.where(interval.probed, linear, np.nan), np.where(interval.probed, quadratic, np.nan)
