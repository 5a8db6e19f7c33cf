"""Carry out one live run of a calibration, and write everything that was measured to a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from trainpilot.envs.action import BATCH_FACTORS, LEARNING_RATE_FACTORS
from trainpilot.experiments.calibrate.design import PRUNED_SHARE, CalibrationSetting, planned
from trainpilot.llm_runtime.config import LEARNING_RATE_SCALE_RANGE, ControlLimits, Controls
from trainpilot.llm_runtime.drive import drive
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergySource, energy_between
from trainpilot.llm_runtime.files import digest
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.simulator.evidence import CalibrationRun
from trainpilot.llm_runtime.telemetry import Telemetry

EVALUATE_EVERY = 5
"""Decisions between two evaluations of the validation loss: half as many as usual, as the fit needs a finer curve."""
WIDE_PROBE_SEQUENCES = 16
"""Sequences of a second curvature probe; that in the telemetry takes one or two, which is mostly noise."""
RATE_CHANGES, BATCH_CHANGES = 0.35, 0.12
"""Probabilities per decision that a random walk changes its learning rate and its batch."""
WALK_SEED = 100


@dataclass(frozen=True, kw_only=True)
class RunFile(JsonRecord):
    """A calibration run and its cost."""

    key: str
    """Digest of its setting, text and model, by which the file of another run is recognised."""
    time_s: float
    """Seconds of the run, probes and evaluations included."""
    energy_j: float | None
    """Joules of the run; if parallel runs share the meter, an equal part of the joules measured."""
    energy_source: EnergySource | None
    run: CalibrationRun


def run_key(setting: CalibrationSetting, content: str) -> str:
    """Return the digest of everything that determines a run's result; `content` is the digest of text and model."""
    steered = {name: getattr(setting, name) for name in ("walk", "plan", "prune")}
    decisive = {"config": setting.config.settings(), **steered, "content": content}
    return digest(decisive)


def carry_out(
    setting: CalibrationSetting, key: str, *, jobs: int | None = 1, meter: EnergyMeter | None = None
) -> RunFile:
    """Train the run of a setting to its end, and return it with its cost.

    Args:
        setting: Configuration and controls of the run.
        key: Digest of the run, from `run_key`.
        jobs: Number of parallel runs, among which the joules of a meter of the whole device are divided equally; `None`
            if it is unknown, and so are the joules then.
        meter: Energy meter; by default the best one that the device has.

    Raises:
        ValueError: a setting cannot be used.
    """
    run = LiveRun(setting.config, meter=meter)
    before, start = run.meter.read(), run.clock()
    record = _measure(run, setting)
    used, source = energy_between(before, run.meter.read())
    shared = jobs if source != "estimated" else 1  # the estimate sees its own process alone
    return RunFile(
        key=key,
        time_s=run.clock() - start,
        energy_j=None if used is None or shared is None else used / shared,
        energy_source=source,
        run=record,
    )


def _measure(run: LiveRun, setting: CalibrationSetting) -> CalibrationRun:
    config, next_controls = setting.config, pilot(setting, run.base_limits())
    telemetry: list[Telemetry] = []
    wide: list[tuple[float, float] | None] = []
    validation = [(0, run.evaluate())]

    def decide(_: Telemetry | None) -> Controls:
        return next_controls(len(telemetry))

    for interval in drive(run, decide, config.decisions, evaluate_every=EVALUATE_EVERY):
        telemetry.append(interval.telemetry)
        probe = run.trainer.probe_on(run.stream.peek(WIDE_PROBE_SEQUENCES))
        wide.append(None if probe is None else (probe.linear, probe.quadratic))
        if interval.validation_loss is not None:
            validation.append((len(telemetry), interval.validation_loss))
    return CalibrationRun(
        config=config,
        telemetry=tuple(telemetry),
        validation=tuple(validation),
        wide_probe=tuple(wide),
        n_parameters=run.loaded.n_parameters,
        role=setting.role,
    )


def pilot(setting: CalibrationSetting, limits: ControlLimits) -> Callable[[int], Controls]:
    """Return a function from an interval's number, counted from 0 in order, to its controls."""
    generator = np.random.default_rng(WALK_SEED + (setting.walk or 0))
    controls = setting.config.start()

    def decide(decision: int) -> Controls:
        nonlocal controls
        if setting.walk is not None:
            controls = _wander(controls, limits, generator)
        if setting.plan is not None:
            controls = planned(setting.plan, decision, setting.config, limits)
        if setting.prune and decision >= setting.config.decisions // 2:
            controls = replace(controls, sparsity=PRUNED_SHARE)
        return controls

    return decide


def _wander(controls: Controls, limits: ControlLimits, generator: np.random.Generator) -> Controls:
    """Return controls whose learning rate and batch may have changed, by a factor that a policy could choose."""
    low, high = LEARNING_RATE_SCALE_RANGE
    rate, batch = 1.0, 1.0
    if generator.random() < RATE_CHANGES:
        rate = float(generator.choice([factor for factor in LEARNING_RATE_FACTORS if factor != 1.0]))
    if generator.random() < BATCH_CHANGES:
        batch = float(generator.choice([factor for factor in BATCH_FACTORS if factor != 1.0]))
    size = int(controls.batch_size * batch)
    return replace(
        controls,
        learning_rate_scale=float(np.clip(controls.learning_rate_scale * rate, low, high)),
        batch_size=size if limits.min_batch_size <= size <= limits.max_batch_size else controls.batch_size,
    )
