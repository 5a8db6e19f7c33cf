"""Carry out one run: a live run under its steering, with everything that it uses counted.

Turn the steering that a run's spec names into the thing that decides during the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller
from trainpilot.agents.heuristics import (
    GradualPruning,
    KeepBase,
    NoiseScaleBatch,
    OpenLoop,
    RandomPolicy,
    ReduceOnPlateau,
    Seesaw,
    Steerer,
)
from trainpilot.agents.rollback import RollbackController, guarded_controller
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.envs.decision import Preference
from trainpilot.envs.reference import device_label
from trainpilot.experiments.compare.results import IntervalResult, RunResult, RunSpec, Steering
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.telemetry import Telemetry

Settings = Mapping[str, Any]
Maker = Callable[[Settings, "LiveRun"], Steerer]


def make_steerer(steering: Steering, run: LiveRun) -> Steerer:
    """Return what sets the controls of `run`.

    Raises:
        ValueError: the kind is unknown, or its policy file cannot be used.
    """
    if steering.kind not in MAKERS:
        raise ValueError(f"steering must be one of {', '.join(MAKERS)}, got {steering.kind!r}")
    return MAKERS[steering.kind](steering.settings, run)


def _policy(settings: Settings, run: LiveRun) -> Steerer:
    """Return a bundle's policy within guardrails, as in `replay`; a bare one where the settings name none."""
    bundle = PolicyBundle.load(Path(settings["path"]))
    limits, preference = run.limits(), Preference.parse(settings["preference"])
    if "guardrails" not in settings:
        return Controller.of_bundle(bundle, limits, preference)
    bounds = GuardrailSettings(**settings["guardrails"])
    return RollbackController(guarded_controller(bundle, limits, preference, bounds), run)


MAKERS: Mapping[str, Maker] = {
    "keep": lambda settings, run: KeepBase(run.base_limits()),
    "plateau": lambda settings, run: ReduceOnPlateau(run.base_limits(), **settings),
    "noise-batch": lambda settings, run: NoiseScaleBatch(run.base_limits(), **settings),
    "seesaw": lambda settings, run: Seesaw(run.base_limits(), run.config, **settings),
    "gradual-pruning": lambda settings, run: GradualPruning(run.base_limits(), **settings),
    "random": lambda settings, run: RandomPolicy(run.limits(), run.config.seed),
    "policy": _policy,
    "open-loop": lambda settings, run: OpenLoop.from_json(settings["schedule"], run.base_limits()),
}


@dataclass(frozen=True)
class Reading:
    """One look at the validation loss, and what it cost."""

    loss: float
    """In nats/token."""
    time_s: float
    energy_j: float | None
    sequences: int


def execute(spec: RunSpec, key: str, *, energy_shared: bool = False, meter: EnergyMeter | None = None) -> RunResult:
    """Run `spec` to its end and return what came out. Never raises for what goes wrong inside the run.

    Args:
        spec: The run.
        key: Its name.
        energy_shared: Whether other runs run beside it on the same meter and the same cores.
        meter: Energy meter; by default the best one that the device has.
    """
    try:
        return _Execution(spec, key, energy_shared, meter).result()
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        return failed(spec, key, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def failed(spec: RunSpec, key: str, reason: str) -> RunResult:
    """Return the result of a run that did not end by itself."""
    return RunResult(
        key=key,
        spec=spec,
        n_parameters=0,
        initial_validation_loss=None,
        final_validation_loss=None,
        final_test_loss=None,
        diverged=False,
        stopped_early=False,
        failure=reason,
        energy_source=None,
        energy_shared=False,
        device="",
        intervals=(),
    )


class _Execution:
    """One run in progress."""

    def __init__(self, spec: RunSpec, key: str, energy_shared: bool, meter: EnergyMeter | None) -> None:
        self.spec, self.key, self.energy_shared = spec, key, energy_shared
        self.run = LiveRun(spec.config, meter=meter, probe=spec.steering.probe)
        self.steerer: Steerer = make_steerer(spec.steering, self.run)
        self.intervals: list[IntervalResult] = []
        self.tokens = 0
        self.standing: list[int] = []
        """Places in `intervals` of those that were not rolled back: one for each decision of the run as it stands."""
        self.last: Telemetry | None = None
        self.stopped_early = False

    def result(self) -> RunResult:
        run = self.run
        initial = run.evaluate()
        self._train()
        diverged = self.last is None or self.last.diverged or not _finite(run.validation_loss)
        test = None if diverged else run.test()
        return RunResult(
            key=self.key,
            spec=self.spec,
            n_parameters=run.loaded.n_parameters,
            initial_validation_loss=initial if _finite(initial) else None,
            final_validation_loss=None if diverged else run.validation_loss,
            final_test_loss=test if _finite(test) else None,
            diverged=diverged,
            stopped_early=self.stopped_early,
            failure=None,
            energy_source=self.last.energy_source if self.last is not None else None,
            energy_shared=self.energy_shared,
            device=device_label(self.spec.config),
            intervals=tuple(self.intervals),
            guardrails=self.steerer.controller.summary() if isinstance(self.steerer, RollbackController) else None,
        )

    def _train(self) -> None:
        share = 1 / self.spec.config.decisions
        while not self._over():
            controls = self.steerer.decide(self.last)
            if controls is None:
                self.stopped_early = True
                self._look_once_more()
                return
            telemetry = self.run.advance(controls, share)
            self._mark_rolled_back(telemetry.decision)
            self.tokens += telemetry.interval_tokens
            self.standing.append(len(self.intervals))
            self.intervals.append(self._keep(telemetry, self._look(telemetry)))
            self.last = self._as_seen(telemetry)

    def _over(self) -> bool:
        if self.last is None:
            return False
        if self.last.diverged and isinstance(self.steerer, RollbackController):
            return not self.steerer.can_roll_back
        return self.last.finished or self.last.diverged

    def _mark_rolled_back(self, decision: int) -> None:
        """Mark the intervals from `decision` on, which the run has just trained anew."""
        for place in self.standing[decision:]:
            self.intervals[place] = replace(self.intervals[place], rolled_back=True)
        del self.standing[decision:]

    def _as_seen(self, telemetry: Telemetry) -> Telemetry:
        """Give a heuristic its reading at once; a policy gets it one interval later, as when it was trained."""
        if self.spec.steering.kind == "policy":
            return telemetry
        return replace(telemetry, validation_loss=self.run.validation_loss)

    def _look(self, telemetry: Telemetry) -> Reading | None:
        due = telemetry.finished or (telemetry.decision + 1) % self.spec.steering.evaluate_every == 0
        return self._read() if due and not telemetry.diverged else None

    def _read(self) -> Reading:
        run = self.run
        before, start = run.meter.read(), run.clock()
        loss = run.evaluate()
        time_s, after = run.clock() - start, run.meter.read()
        known = before.energy_j is not None and after.energy_j is not None
        energy_j = after.energy_j - before.energy_j if known else None  # type: ignore[operator]
        return Reading(loss, time_s, energy_j, run.evaluation_sequences)

    def _look_once_more(self) -> None:
        """Measure the loss that a run stopped early ends with, unless its last interval has been looked at."""
        if self.last is not None and self.intervals[-1].validation_loss is None:
            self.intervals[-1] = self._keep(self.last, self._read())

    def _keep(self, telemetry: Telemetry, reading: Reading | None) -> IntervalResult:
        return IntervalResult(
            tokens=self.tokens,
            steps=telemetry.steps,
            train_loss=telemetry.train_loss if math.isfinite(telemetry.train_loss) else None,
            validation_loss=reading.loss if reading is not None and math.isfinite(reading.loss) else None,
            learning_rate=telemetry.learning_rate,
            learning_rate_scale=telemetry.requested.learning_rate_scale,
            finishing=telemetry.finishing,
            batch_size=telemetry.batch_size,
            precision=telemetry.precision,
            sparsity=telemetry.sparsity,
            probe_sequences=self.run.sequences_probed,
            evaluation_sequences=reading.sequences if reading is not None else 0,
            time_s=telemetry.time_s,
            probe_time_s=telemetry.probe_time_s,
            switch_time_s=telemetry.switch_time_s,
            evaluation_time_s=reading.time_s if reading is not None else 0.0,
            energy_j=telemetry.energy_j,
            evaluation_energy_j=reading.energy_j if reading is not None else 0.0,
        )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
