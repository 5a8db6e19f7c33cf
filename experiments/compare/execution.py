"""One run of a comparison in progress: its training under a controller, its evaluations and their costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller
from trainpilot.agents.heuristics import HEURISTICS, EarlyStop
from trainpilot.agents.steering.guarded_controller import GuardedController, RollbackController
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.envs.decision import Preference
from trainpilot.envs.reference import device_label
from trainpilot.experiments.results import IntervalResult, RunResult, RunSpec, SteeringSpec
from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.drive import DrivenInterval, RunController, drive
from trainpilot.llm_runtime.energy.meter import EnergyMeter, energy_between
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.telemetry import READ_BACK, Telemetry


def make_controller(steering: SteeringSpec, run: LiveRun) -> RunController:
    """Return the controller of `run`.

    Raises:
        ValueError: the kind is unknown, a setting cannot be used, or the policy's file cannot be read.
    """
    if steering.kind == "policy":
        return _policy(steering.settings, run)
    if steering.kind not in HEURISTICS:
        raise ValueError(f"steering must be one of {', '.join([*HEURISTICS, 'policy'])}, got {steering.kind!r}")
    return HEURISTICS[steering.kind].of_run(run, **steering.settings)


def _policy(settings: Mapping[str, Any], run: LiveRun) -> RunController:
    """Return a bundle's policy within guardrails, as in `replay`; unguarded if the settings have no guardrails."""
    bundle = PolicyBundle.load(Path(settings["path"]))
    limits, preference = run.limits(), Preference.parse(settings["preference"])
    if "guardrails" not in settings:
        return Controller.of_bundle(bundle, limits, preference)
    bounds = GuardrailSettings(**settings["guardrails"])
    return RollbackController(GuardedController.of_bundle(bundle, limits, preference, bounds), run)


@dataclass(frozen=True)
class Evaluation:
    """A measured validation loss, with the cost of measuring it."""

    loss: float
    """Validation loss in nats/token."""
    time_s: float
    energy_j: float | None
    sequences: int


class Execution:
    """One run in progress."""

    def __init__(self, spec: RunSpec, key: str, energy_shared: bool, meter: EnergyMeter | None) -> None:
        self.spec, self.key, self.energy_shared = spec, key, energy_shared
        self.meter = meter
        self.run = self.new_run(spec.phases()[0].config)
        self.controller: RunController = make_controller(spec.steering, self.run)
        self.evaluation: Evaluation | None = None
        """The last one."""
        self.last: Telemetry | None = None
        self.tokens = 0
        self.intervals: list[IntervalResult] = []
        self.standing: list[int] = []
        """Places in `intervals` of those that were not rolled back, by decision."""

    def new_run(self, config: RunConfig) -> LiveRun:
        """Return a run that has not begun."""
        return LiveRun(config, meter=self.meter, probe=self.spec.steering.probe)

    def result(self) -> RunResult:
        """Train to the end, and return what came out."""
        initial = self.run.evaluate()
        for _ in self.train():
            pass
        return self.ended(initial)

    def ended(self, initial: float) -> RunResult:
        """Return the result of the run as it stands, with the loss before its first step."""
        stopped_early = self.last is None or not (self.last.finished or self.last.diverged)
        if stopped_early:
            self._evaluate_the_end()
        if isinstance(self.controller, EarlyStop):
            self.controller.restore_best()
        run = self.run
        diverged = self.last is None or self.last.diverged or not finite(run.validation_loss)
        validation, test = (None, None) if diverged else self.losses()
        return RunResult(
            key=self.key,
            spec=self.spec,
            n_parameters=run.loaded.n_parameters,
            initial_validation_loss=initial if finite(initial) else None,
            final_validation_loss=validation if finite(validation) else None,
            final_test_loss=test if finite(test) else None,
            diverged=diverged,
            stopped_early=stopped_early,
            failure=None,
            energy_source=self.last.energy_source if self.last is not None else None,
            energy_shared=self.energy_shared,
            device=device_label(self.spec.config),
            intervals=tuple(self.intervals),
            guardrails=self.controller.guarded.summary() if isinstance(self.controller, RollbackController) else None,
        )

    def losses(self) -> tuple[float | None, float | None]:
        """Return the final validation loss and the test loss of a run that has not diverged, in nats/token."""
        return self.run.validation_loss, self.run.test()

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the controls of the next interval, or `None` to end the run."""
        return self.controller.decide(telemetry)

    def train(self, last: Telemetry | None = None) -> Iterator[DrivenInterval]:
        """Record each interval and yield it; a run that goes on begins after the `last` one that was trained."""
        controller, steering = self.controller, self.spec.steering
        self.last = last
        intervals = drive(
            self.run,
            self.decide,
            self.run.config.decisions,
            last=last,
            can_roll_back=lambda: isinstance(controller, RollbackController) and controller.can_roll_back,
            evaluate=self._evaluate,
            evaluate_every=steering.evaluate_every,
            validation_at_once=steering.kind != "policy",  # a policy was trained to get it one interval later
        )
        for interval in intervals:
            self.last = interval.telemetry
            self.tokens += self.last.interval_tokens
            self._mark_rolled_back(self.last.decision)
            self.standing.append(len(self.intervals))
            evaluation = self.evaluation if interval.validation_loss is not None else None
            self.intervals.append(self.interval_result(self.last, evaluation))
            yield interval

    def _mark_rolled_back(self, decision: int) -> None:
        """Mark the earlier intervals from `decision` on, as that decision has just been trained again."""
        for place in self.standing[decision:]:
            self.intervals[place] = replace(self.intervals[place], rolled_back=True)
        del self.standing[decision:]

    def _evaluate(self) -> float:
        """Return the validation loss, and record the cost of measuring it."""
        run = self.run
        before, start = run.meter.read(), run.clock()
        loss = run.evaluate()
        time_s, after = run.clock() - start, run.meter.read()
        energy_j, _ = energy_between(before, after)
        self.evaluation = Evaluation(loss, time_s, energy_j, run.evaluation_sequences)
        return loss

    def _evaluate_the_end(self) -> None:
        """Measure the final loss of a run that its controller stopped, unless it has just been measured."""
        if self.last is not None and self.intervals[-1].validation_loss is None:
            self._evaluate()
            self.intervals[-1] = self.interval_result(self.last, self.evaluation)

    def interval_result(self, telemetry: Telemetry, evaluation: Evaluation | None) -> IntervalResult:
        """Return what is kept of an interval."""
        return IntervalResult(
            tokens=self.tokens,
            steps=telemetry.steps,
            train_loss=telemetry.train_loss if math.isfinite(telemetry.train_loss) else None,
            validation_loss=evaluation.loss if evaluation is not None and math.isfinite(evaluation.loss) else None,
            learning_rate_scale=telemetry.requested.learning_rate_scale,
            **{name: getattr(telemetry, name) for name in READ_BACK},
            probe_sequences=self.run.sequences_probed,
            evaluation_sequences=evaluation.sequences if evaluation is not None else 0,
            time_s=telemetry.time_s,
            probe_time_s=telemetry.probe_time_s,
            switch_time_s=telemetry.switch_time_s,
            evaluation_time_s=evaluation.time_s if evaluation is not None else 0.0,
            energy_j=telemetry.energy_j,
            evaluation_energy_j=evaluation.energy_j if evaluation is not None else 0.0,
        )


def finite(value: float | None) -> TypeGuard[float]:
    """Return whether a number is known and finite."""
    return value is not None and math.isfinite(value)
