"""Carry out one live run of a calibration, keep all that was measured, and write it as a file of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from trainpilot.envs.action import BATCH_FACTORS, LEARNING_RATE_FACTORS, LEARNING_RATE_SCALE_RANGE
from trainpilot.experiments.calibrate.design import PRUNED_SHARE, Setting, planned
from trainpilot.llm_runtime.config import ControlLimits, Controls
from trainpilot.llm_runtime.drive import EVALUATE_EVERY_IN_CALIBRATION, drive
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergySource, energy_between
from trainpilot.llm_runtime.files import write_json
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.simulator.fitting import CalibrationRun
from trainpilot.llm_runtime.telemetry import Telemetry

WIDE_PROBE_SEQUENCES = 16
"""Sequences of the second curvature probe: the telemetry's own, on one or two, is mostly noise."""
RATE_CHANGES, BATCH_CHANGES = 0.35, 0.12
"""How often a random walk changes its learning rate and its batch."""
WALK_SEED = 100


@dataclass(frozen=True, kw_only=True)
class RunFile(JsonRecord):
    """A run with what it cost."""

    key: str
    """Digest of its setting, text and model: a file with another key is of another run."""
    time_s: float
    """Seconds of the run, probes and evaluations included."""
    energy_j: float | None
    """Its joules; of a meter shared with runs beside it, its part."""
    energy_source: EnergySource | None
    run: CalibrationRun

    def write(self, path: Path) -> None:
        """Write the file whole."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> RunFile | None:
        """Return what `write` wrote; `None` where there is no such file or it is damaged."""
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None


def run_key(setting: Setting, content: str) -> str:
    """Return the digest of a run: of all that decides what it measures, and of its text and model by `content`."""
    steered = {name: getattr(setting, name) for name in ("walk", "plan", "prune")}
    decisive = {"config": asdict(setting.config), **steered, "content": content}
    return blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=8).hexdigest()


def carry_out(setting: Setting, key: str, *, jobs: int = 1, meter: EnergyMeter | None = None) -> RunFile:
    """Run a setting to its end.

    Args:
        setting: The run.
        key: Its digest.
        jobs: Runs side by side. A meter of the whole device sees them all: each gets an equal part.
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
        energy_j=None if used is None else used / shared,
        energy_source=source,
        run=record,
    )


def _measure(run: LiveRun, setting: Setting) -> CalibrationRun:
    config, controls_of = setting.config, pilot(setting, run.base_limits())
    telemetry: list[Telemetry] = []
    wide: list[tuple[float, float] | None] = []
    validation = [(0, run.evaluate())]

    def decide(_: Telemetry | None) -> Controls:
        return controls_of(len(telemetry))

    for interval in drive(run, decide, config.decisions, evaluate_every=EVALUATE_EVERY_IN_CALIBRATION):
        telemetry.append(interval.telemetry)
        probe = run.trainer.probe(run.stream.peek(WIDE_PROBE_SEQUENCES))
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


def pilot(setting: Setting, limits: ControlLimits) -> Callable[[int], Controls]:
    """Return what gives the controls of each interval, called with its number in rising order."""
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
    """Change learning rate and batch now and then, by the same factors as a policy does, within its limits."""
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
