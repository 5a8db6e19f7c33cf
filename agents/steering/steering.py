"""Steer a training loop that belongs to somebody else: what it tells becomes telemetry, what is decided holds in it.

    steering = Steering(model, optimizer, SteeringSettings(sequences=100_000, batch_size=32))
    while not steering.finished:
        with steering.step() as step:
            for batch in micro_batches(step.batch_size):
                step.backward(lambda: loss_of(model, batch), sequences=len(batch))

The adapters of frameworks do the same by `begin_step`, `note_loss`, `end_step`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainpilot.agents.controller import Controller
from trainpilot.agents.run_record import DecisionRecord
from trainpilot.agents.steering import saved
from trainpilot.agents.steering.described import facts_of, summary_of
from trainpilot.agents.steering.domain import check_domain
from trainpilot.agents.steering.fine_tuning import comes_trained, within_reach
from trainpilot.agents.steering.guarded import GuardedController
from trainpilot.agents.steering.guarded_decision import GuardedDecision
from trainpilot.agents.steering.guardrails import UNGUARDED, Guardrails, GuardrailSettings, is_lost
from trainpilot.agents.steering.limits import control_limits
from trainpilot.agents.steering.plan import Plan
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.energy.meter import EnergyMeter, select_meter
from trainpilot.llm_runtime.loop import Levers, Readings, Snapshots, Stateful, looking
from trainpilot.llm_runtime.process_group import Content, OneProcess, Ranks
from trainpilot.llm_runtime.schedules import neutral_factor
from trainpilot.llm_runtime.telemetry import Telemetry

if TYPE_CHECKING:
    from trainpilot.agents.steering.step import Step

MASK_UPDATES = 5
"""Masks are raised this often along an interval."""
VALIDATE_EVERY = 10
"""Decisions from one validation to the next."""


class Steering:
    """A policy, its guardrails and its meters in somebody else's training loop.

    Args:
        model: What is trained.
        optimizer: Steps it, at the peak learning rate of the base schedule and without a scheduler of its own. Batches
            change under Adam and AdamW only.
        settings: Budget, start, policy and bounds.
        validate: Returns the validation loss in nats/token. Called every tenth decision; leave it out if it is dear.
        data: The data's position, taken back with the model when a change of controls goes wrong. Without it the
            data goes on.
        meter: Energy meter; by default the best one that the device has.
        clock: Returns seconds; replaced in tests.
        ranks: The processes that train the model together.
        on_decision: Called with the record of each interval and the decision before it, to log them.
        grain: Decide and end only after a multiple of so many sequences.

    Raises:
        ValueError: something cannot be used; the message says what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        settings: SteeringSettings,
        *,
        validate: Callable[[], float] | None = None,
        data: Stateful | None = None,
        meter: EnergyMeter | None = None,
        clock: Callable[[], float] = time.perf_counter,
        ranks: Ranks | None = None,
        on_decision: Callable[[DecisionRecord], None] | None = None,
        grain: int = 1,
    ) -> None:
        self.settings = settings
        self.ranks = ranks if ranks is not None else OneProcess()
        plan = Plan.of(settings)
        self.course = plan.course(settings, grain)
        start = Controls(batch_size=settings.batch_size, precision=settings.precisions[0])
        self.levers = Levers(model, optimizer, start, settings.pruning)
        self.snapshots = Snapshots(self.levers, self.course, data)
        self.validate, self.on_decision = validate, on_decision
        self.levers.switches_matmul = "tf32" in settings.precisions
        meter = meter if meter is not None else select_meter(str(self.levers.device))
        self.readings = Readings(
            self.levers,
            meter,
            clock,
            self.ranks,
            sequences=settings.sequences,
            sequence_length=settings.sequence_length,
            gradient_clip=settings.gradient_clip,
            probe=settings.probe,
        )
        preference = Preference.parse(settings.preference)
        limits = control_limits(settings, self.levers, plan.decisions, self.ranks.world_size)
        controller = Controller(plan.policy, limits, preference)
        self.fine_tuning = comes_trained(model) if settings.fine_tuning is None else settings.fine_tuning
        guardrails = Guardrails(self.bounds(), base_learning_rate=self.levers.peak)
        self.controller = GuardedController(controller, guardrails, settings.contract)
        self.validation_loss: float | None = None
        self._step_open = False
        self.domain_warnings: list[str] = []
        """Where the run is unlike those that the policy was trained on."""
        if plan.bundle is not None:
            self.domain_warnings = check_domain(plan.bundle, facts_of(self, plan.base), require=settings.strict_domain)
        if self.domain_warnings and self.ranks.is_first:
            message = "policy outside of what it was trained on: " + "; ".join(self.domain_warnings)
            warnings.warn(message, stacklevel=2)
        self._take(self._agreed(lambda: self.controller.decide(None)))
        self.levers.claim()

    def bounds(self) -> GuardrailSettings:
        """Return what the policy may not do: what the settings say, and less with a model that comes trained."""
        if self.settings.policy == "none":
            return UNGUARDED
        bounds = self.settings.guardrails
        return within_reach(bounds, self.levers.peak) if self.fine_tuning else bounds

    # Where the run stands --------------------------------------------------------------------------------------------

    @property
    def controls(self) -> Controls:
        """Controls in force."""
        return self.levers.controls

    @property
    def records(self) -> list[DecisionRecord]:
        """What was decided and measured, interval by interval."""
        return self.controller.records

    @property
    def sequences(self) -> int:
        """Sequences trained on."""
        return self.course.sequences

    @property
    def tokens(self) -> int:
        """Tokens trained on, by the nominal length of a sequence."""
        return self.course.tokens

    @property
    def end_sequences(self) -> int:
        """Sequences at which the run ends: the budget, or the end of the cool-down."""
        return self.course.end

    @property
    def finished(self) -> bool:
        """Whether the budget is used up or the cool-down complete."""
        return self.course.finished

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step: base schedule x scale x the batch's neutral factor."""
        controls = self.controls
        neutral = neutral_factor(controls.batch_size, self.settings.batch_size)
        return self.levers.peak * controls.learning_rate_scale * self.course.factor(controls.batch_size) * neutral

    # A step ----------------------------------------------------------------------------------------------------------

    def step(self) -> Step:
        """Return the next optimiser step, for a `with`."""
        from trainpilot.agents.steering.step import Step

        return Step(self)

    def begin_step(self) -> int:
        """Set the learning rate of the next optimiser step, and return its batch in sequences.

        Raises:
            ValueError: the run has finished, a step is still open, or something else writes the learning rate.
        """
        if self.finished:
            raise ValueError("step needs a run that has not finished; end the loop at steering.finished")
        if self._step_open:
            raise ValueError("step needs the step before to be over; one `with steering.step()` at a time")
        self.ranks.settle(self.levers.model)
        batch_size = min(self.controls.batch_size, self.end_sequences - self.sequences)
        self.readings.begin_step(batch_size, last=self.sequences + batch_size >= self.course.target)
        self.readings.keep_weights(next_is_last=self.sequences + 2 * batch_size >= self.course.target)
        self.levers.set_learning_rate(self.learning_rate)
        self._prune()
        self._step_open = True
        return batch_size

    def note_loss(self, loss: torch.Tensor, share: float = 1.0) -> None:
        """Take in the loss of a micro-batch, a scalar in nats/token, and its share of the step's sequences."""
        self.readings.note_loss(loss, share)

    @property
    def probe_wanted(self) -> bool:
        """Whether `probe` is to be called before this step's first backward pass."""
        return self.readings.probe_wanted

    @property
    def probe_sequences(self) -> int:
        """Sequences that are enough for `probe`, in this process: few, so that it costs little."""
        return self.readings.probe_sequences

    def probe(self, loss: Callable[[], torch.Tensor]) -> None:
        """Probe the curvature on sequences that have not been trained on; `loss` returns their mean loss."""
        self.readings.probe(loss)

    def end_step(self, gradient_norm: torch.Tensor, sequences: int) -> None:
        """Take in an optimiser step that has been made; at an interval's end, decide.

        Args:
            gradient_norm: Norm of its gradient before clipping, a scalar.
            sequences: What it was trained on, in all processes together.
        """
        self._step_open = False
        self.levers.after_step()
        self.course.sequences += sequences
        self.readings.end_step(gradient_norm, sequences)
        if self.sequences >= self.course.target:
            self._prune(done=1.0)
            self._end_interval()

    def drop_step(self) -> None:
        """Forget a step that was begun and not made."""
        self._step_open = False
        self.readings.drop_step()

    def _prune(self, done: float | None = None) -> None:
        began, until = self.readings.start_sequences, self.course.target
        if done is None:
            done = (self.sequences - began) / max(until - began, 1)
        due = min(int(done * MASK_UPDATES) + 1, MASK_UPDATES)
        if due > self.readings.mask_updates:
            self.readings.mask_updates = due
            self.levers.prune_towards(self.readings.start_sparsity, self.controls.sparsity, due / MASK_UPDATES)

    # An interval -----------------------------------------------------------------------------------------------------

    def _end_interval(self) -> None:
        telemetry = self.readings.telemetry(
            decision=self.course.decision,
            budget_used=self.sequences / self.settings.sequences,
            tokens=self.tokens,
            validation_loss=self.validation_loss,
            finishing=self.course.cooldown is not None,
            finished=self.finished,
        )
        telemetry = self.ranks.of_first(telemetry)
        self.course.decision += 1
        record = self.controller.record(telemetry)
        try:
            self._go_on_from(telemetry)
        finally:
            if self.on_decision is not None and self.ranks.is_first:
                self.on_decision(record)

    def _go_on_from(self, telemetry: Telemetry) -> None:
        """Decide what comes after an interval; a run whose weights are lost is taken back even at its end."""
        if telemetry.finished and not (is_lost(telemetry) and self.snapshots.there):
            self._validate()
            return
        decision = self._agreed(lambda: self.controller.decide(telemetry))
        if decision.roll_back:
            self._roll_back()
            return
        try:
            if self.course.decision % VALIDATE_EVERY == 0 and not is_lost(telemetry):
                self._validate()
        finally:
            if not telemetry.finished:
                self._take(decision)

    def _agreed(self, ask: Callable[[], Content]) -> Content:
        """Return what the first process's controller answers; the others' go where it then stands, unasked."""
        if self.ranks.world_size == 1:
            return ask()
        told = (ask(), self.controller.news()) if self.ranks.is_first else None
        answer, news = self.ranks.of_first(told)  # type: ignore[misc]
        if not self.ranks.is_first:
            self.controller.hear(news)
        return answer

    def _validate(self) -> None:
        if self.validate is None:
            return
        start = self.readings.clock()
        with looking(self.levers.model):
            loss = float(self.validate())
        loss = float(self.ranks.mean(torch.tensor(loss, dtype=torch.float64)))
        self.validation_loss = loss if math.isfinite(loss) else None
        self.readings.evaluation_s += self.readings.clock() - start

    def _take(self, decision: GuardedDecision) -> None:
        """Bring a decision into force; before a risky one, keep the state to go back to. The interval pays for it."""
        self.readings.begin_interval(self.sequences)
        if decision.snapshot:
            self.snapshots.take()
            self.controller.snapshotted()
        self._apply(decision.controls)

    def _apply(self, controls: Controls) -> None:
        start = self.readings.clock()
        self.levers.apply(controls)
        if controls.finish:
            self.course.cool_down(controls.batch_size)
        self.readings.switch_s = self.readings.clock() - start

    def _roll_back(self) -> None:
        self.snapshots.go_back()
        self.readings.begin_interval(self.sequences)
        self._apply(self._agreed(self.controller.rolled_back))

    # Saving and going on ---------------------------------------------------------------------------------------------

    def state_dict(self, *, within_step: bool = False) -> dict[str, Any]:
        """Return what, beside model, optimiser and data, decides how the run goes on; `torch.save` can write it.

        Args:
            within_step: Allow it while a step is open, whose gradients are then lost to the run that goes on.

        Raises:
            ValueError: a step is open.
        """
        if self._step_open and not within_step:
            raise ValueError("state_dict needs the step to be over; save between two steps")
        return saved.state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called; load model and optimiser before.

        Raises:
            ValueError: the state is of a run with other settings.
        """
        saved.go_on(self, state)
        self._step_open = False

    def summary(self) -> dict[str, Any]:
        """Return what was steered and what it came to, as plain JSON values."""
        return summary_of(self)

    def close(self) -> None:
        """Let go of model and optimiser, as they were but for their training; another controller may take them."""
        self.snapshots.drop()
        self.readings.let_go()
        self.levers.release()
