"""Attach a trainpilot controller to a training loop that you own.

    steering = Steering(model, optimizer, SteeringSettings(sequences=100_000, batch_size=32))
    while not steering.finished:
        with steering.step() as step:
            for batch in data.take(step.batch_size):       # data = batches(loader)
                step.backward(loss_of, batch=batch)

Losses and gradient norms of the steps become telemetry. At the end of each interval the controller decides, and the
chosen controls are applied to the optimizer, the masks, the precision and the size of the next batches. The adapters of
frameworks make the steps themselves, between `begin_step` and `end_step`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainpilot.agents.controller import Controller, DecisionRecord
from trainpilot.agents.steering.advice import AdvisingController
from trainpilot.agents.steering.domain import RunFacts, check_domain
from trainpilot.agents.steering.guarded_controller import POLICY_FAILED, GuardedController, GuardedDecision
from trainpilot.agents.steering.guardrails import UNGUARDED, Guardrails, GuardrailSettings, is_lost
from trainpilot.agents.steering.loader_batches import first_sequences, sequences_in
from trainpilot.agents.steering.loop_checks import RowWatch, check_repeatable
from trainpilot.agents.steering.model_checks import (
    check_alone,
    check_parallel,
    is_pretrained,
    looks_trained,
    near_learning_rate,
    own_optimizer,
    rounded_weights,
)
from trainpilot.agents.steering.paired import Pairing
from trainpilot.agents.steering.saved_state import SavedSteering
from trainpilot.agents.steering.settings import (
    ResolvedSettings,
    SteeringSettings,
    control_limits,
    name_of,
    with_law,
)
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.config import ControlLimits, Controls, Precision
from trainpilot.llm_runtime.energy.meter import EnergyMeter, sum_known
from trainpilot.llm_runtime.loop import ControlledLoop, eval_mode, unchanged
from trainpilot.llm_runtime.plain_values import printable, shown
from trainpilot.llm_runtime.process_group import Content, OneProcess, ProcessGroup
from trainpilot.llm_runtime.rollback import RollbackCopy, Stateful
from trainpilot.llm_runtime.saved_loop import SavedLevers
from trainpilot.llm_runtime.schedules import validation_due
from trainpilot.llm_runtime.telemetry import Telemetry

MUST_STAY = (
    "sequences", "sequences_done", "budget", "batch_size", "sequence_length", "preference", "decisions",
    "gradient_clip", "pruning",
)  # fmt: skip
"""Settings that must be the same where a run goes on from a saved state."""
EARLIER = {"sequences_done": 0}
"""Values of those that states of earlier versions do not hold."""
WATCHED, WATCHED_PART = 6, 5
"""Decisions that change nothing where a run is under way: six are what a forecast of its losses needs, and no more than
a fifth of those that are left."""


class Steering:
    """Steers a training loop: a policy within guardrails, the measurement of the loop, and rollbacks.

    Args:
        model: The model in training.
        optimizer: Steps the model, at the peak learning rate of the base schedule and without a scheduler of its own.
            The batch size changes under Adam, AdamW and Muon only. One that Accelerate has prepared is taken out of
            its wrapper. Several, such as Muon for the matrices and AdamW for the rest, are stepped together: one
            learning-rate scale for all.
        settings: Budget, start, policy and bounds.
        validate: Returns the validation loss in nats/token. Called every tenth decision; leave it out if it is
            expensive.
        data: Position of the data, restored with the model when a change of controls goes wrong, and after the shadows
            of a paired contract. Without it the data go on. Its `epochs_seen`, if it has that, tells the policy how
            often the data have been seen.
        meter: Energy meter; by default the best one that the device has.
        clock: Returns seconds; replaced in tests.
        ranks: The processes that train the model together; by default this one alone.
        on_decision: Called with the record of each interval and the decision before it, to log them.
        grain: Decide and end only after a multiple of this number of sequences.

    Raises:
        ValueError: an argument cannot be used; the message says what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        settings: SteeringSettings,
        *,
        validate: Callable[[], float] | None = None,
        data: Stateful | None = None,
        meter: EnergyMeter | None = None,
        clock: Callable[[], float] = time.perf_counter,
        ranks: ProcessGroup | None = None,
        on_decision: Callable[[DecisionRecord], None] | None = None,
        grain: int = 1,
    ) -> None:
        optimizer = own_optimizer(optimizer)
        if not isinstance(settings, SteeringSettings):
            raise ValueError(f"settings must be SteeringSettings, got {type(settings).__name__}")
        self.settings = settings
        self.advises = settings.mode == "advise"
        _check_data(data, settings)
        check_parallel(model)
        if ranks is None:
            check_alone(model)
        self.ranks: ProcessGroup = ranks if ranks is not None else OneProcess()
        self.validate, self.on_decision = validate, on_decision
        resolved = ResolvedSettings.of(settings)
        used = settings.precisions[:1] if self.advises else settings.precisions
        self.loop = ControlledLoop(
            model,
            optimizer,
            resolved.progress(settings, grain),
            Controls(batch_size=settings.batch_size, precision=settings.precisions[0]),
            pruning=settings.pruning,
            meter=meter,
            clock=clock,
            ranks=self.ranks,
            gradient_clip=settings.gradient_clip,
            sets_matmul_precision="tf32" in used,
            probes=settings.probe,
        )
        self.progress = self.loop.progress
        self.rollback_copy, self._data = RollbackCopy(self.loop, data, self._warn_of_data), data
        preference = Preference.parse(settings.preference)
        self.fine_tuning = is_pretrained(model) if settings.fine_tuning is None else settings.fine_tuning
        limits = control_limits(settings, self.loop, resolved.decisions)
        limits = self._with_law(limits, self.loop.peak, fine_tuning=self.fine_tuning)
        done = 0.0 if settings.sequences is None else settings.sequences_done / settings.sequences
        controller = Controller(resolved.policy, limits, preference, begun_at=done)
        bounds = self._bounds(self.loop.peak, fine_tuning=self.fine_tuning)
        guardrails = Guardrails(bounds, base_learning_rate=self.loop.peak)
        kind = AdvisingController if self.advises else GuardedController
        watches = min(WATCHED, max(self.progress.decisions // WATCHED_PART, 1)) if done else 0
        self.controller = kind(
            controller, guardrails, settings.contract, rewinds=lambda: self.rollback_copy.rewinds, watches=watches
        )
        watch = None if self.advises else self.controller.watch
        self.pairing = Pairing.of(watch, self.loop, data, self._warn_of_data)
        self.validation_loss: float | None = None
        """Latest validation loss, in nats/token."""
        self._step_open = False
        self._warned: set[str] = set()
        self.domain_warnings: list[str] = []
        """How the run differs from those that the policy was trained on."""
        if resolved.bundle is not None:
            facts = self._facts(resolved)
            self.domain_warnings = check_domain(resolved.bundle, facts, require=settings.strict_domain)
        self._warn_at_start(resolved)
        self._checks_loss = True
        self._rows: RowWatch | None = None
        decision = self._broadcast(lambda: self.controller.decide(None))
        self._warn(decision)
        self._apply(decision)
        self.loop.attach()

    def _warn_at_start(self, resolved: ResolvedSettings) -> None:
        """Warn of what may be other than the user means, and is allowed."""
        if self.domain_warnings and self.ranks.is_first:
            message = "policy outside of what it was trained on: " + "; ".join(self.domain_warnings)
            warnings.warn(message, stacklevel=3)
        if resolved.decisions < resolved.usual_decisions:
            self._warn_once(
                "decisions",
                f"decisions: {resolved.decisions} instead of {resolved.usual_decisions}, as the budget has no more "
                f"steps at batch_size {self.settings.batch_size}; a smaller batch_size gives more",
                stacklevel=4,
            )
        if rounded := rounded_weights(self.loop.optimizer):
            self._warn_once("weights", rounded, stacklevel=4)

    def _with_law(self, limits: ControlLimits, peak: float, *, fine_tuning: bool) -> ControlLimits:
        return with_law(limits, self.settings, self.loop, peak=peak, fine_tuning=fine_tuning)

    def _bounds(self, peak: float, *, fine_tuning: bool) -> GuardrailSettings:
        """Return the bounds of the policy: those of the settings, and tighter ones for a pretrained model."""
        if self.settings.policy == "none":
            return UNGUARDED
        bounds = self.settings.guardrails
        return near_learning_rate(bounds, peak) if fine_tuning else bounds

    def _facts(self, resolved: ResolvedSettings) -> RunFacts:
        """Return the facts of the run that are compared with the policy's training."""
        settings, loop = self.settings, self.loop
        return RunFacts(
            n_parameters=sum(p.numel() for p in loop.model.parameters()),
            budget_tokens=None if settings.sequences is None else settings.sequences * settings.sequence_length,
            sequences=settings.sequences,
            batch_size=settings.batch_size,
            sequence_length=settings.sequence_length,
            optimizer=loop.optimizer_name,
            decisions=resolved.decisions,
            device_type=loop.device.type,
            base_schedule=resolved.base,
            fine_tuning=self.fine_tuning,
        )

    # The state of the run: what loops, adapters and logs read, so that the parts behind stay internal ----------------

    @property
    def controls(self) -> Controls:
        """Controls in force."""
        return self.loop.controls

    @property
    def records(self) -> list[DecisionRecord]:
        """Decisions and measurements, interval by interval."""
        return self.controller.records

    @property
    def sequences(self) -> int:
        """Sequences trained on."""
        return self.progress.sequences

    @property
    def end_sequences(self) -> int:
        """Sequences at which the run ends: the budget, or the end of the cool-down; else an estimate."""
        return self.progress.end

    @property
    def finished(self) -> bool:
        """Whether the budget is used up or the cool-down complete."""
        return self.progress.finished

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step: base schedule x scale x the batch's neutral factor."""
        return self.loop.learning_rate()

    @property
    def peak_learning_rate(self) -> float:
        """Peak of the base schedule: the highest learning rate among the optimizer's groups at the start."""
        return self.loop.peak

    # A step ----------------------------------------------------------------------------------------------------------

    def step(self) -> Step:
        """Return the next optimizer step, for a `with` block."""
        return Step(self)

    def begin_step(self) -> int:
        """Set the learning rate of the next optimizer step, and return its batch size in sequences.

        Raises:
            ValueError: the run has finished, a step is still open, or something else writes the learning rate.
        """
        if self.finished:
            raise ValueError("step needs a run that has not finished; end the loop at steering.finished")
        if self._step_open:
            raise ValueError("step needs the step before to be over; one `with steering.step()` at a time")
        batch_size = self.loop.begin_step()
        self._step_open = True
        return batch_size

    def note_loss(self, loss: torch.Tensor, share: float = 1.0) -> None:
        """Record the loss of a micro-batch, a scalar in nats/token, and its share of the step's sequences."""
        self.loop.recorder.note_loss(loss, share)

    @property
    def probe_wanted(self) -> bool:
        """Whether `probe` is to be called before this step's first backward pass."""
        return self.loop.probe_wanted

    @property
    def probe_sequences(self) -> int:
        """Number of sequences that are enough for `probe` in this process: few, so that it costs little."""
        return self.loop.probe_sequences

    def probe(self, loss: Callable[[], torch.Tensor], *, check: bool = False) -> None:
        """Probe the curvature on sequences that have not been trained on; `loss` returns their mean loss.

        Args:
            loss: Called three times.
            check: Call it once more in the first probe.

        Raises:
            ValueError: it is to be checked, and returns another value for the same weights.
        """
        checked, self._checks_loss = self._checks_loss and check, self._checks_loss and not check
        with self._aside():
            self.loop.probe(loss, first=check_repeatable if checked else None)

    def watch_rows(self) -> RowWatch:
        """Return a watch that notes what the model reads from here on, until it is asked to `check` that."""
        if self._rows is None:
            self._rows = RowWatch(self.loop.model)
        self._rows.begin()
        return self._rows

    def end_step(self, gradient_norm: torch.Tensor, sequences: int) -> None:
        """Record an optimizer step that has been made; at the end of an interval, decide.

        Args:
            gradient_norm: Norm of its gradient before clipping, a scalar.
            sequences: Sequences it was trained on, in all processes together.
        """
        self._step_open = False
        self.loop.end_step(gradient_norm, sequences)
        if self.progress.interval_over:
            self.loop.raise_masks(1.0)
            self._end_interval()

    def drop_step(self) -> None:
        """Forget a step that was begun and not made."""
        self._step_open = False
        self.loop.drop_step()

    # For adapters of frameworks --------------------------------------------------------------------------------------

    def expect_external_scheduler(self) -> None:
        """Accept that a scheduler writes the learning rate too: one that takes it from `learning_rate`.

        Raises:
            ValueError: the contract is paired, and the framework's own counts would not go back with a trial.
        """
        if self.pairing is not None:
            raise ValueError(
                "contract must be without paired where a framework makes the loop, got a paired one; "
                "steer a plain loop, or give a reference"
            )
        self.loop.exclusive_learning_rate = False

    def apply_learning_rate(self) -> None:
        """Write the next step's learning rate into the optimizer now, before `begin_step` does, so that it is logged.

        Raises:
            ValueError: something else has written the learning rate.
        """
        self.loop.set_learning_rate(self.learning_rate)

    def autocast(self, precision: Precision | None = None) -> AbstractContextManager[object]:
        """Return the context of a forward pass in `precision`; by default in the precision of the present controls.

        If the loop has opened `torch.autocast` itself and offers no other precision than fp32, its autocast holds.

        Raises:
            ValueError: the loop's own autocast and the precisions in the settings contradict each other.
        """
        device = self.loop.device.type
        if precision is None and torch.is_autocast_enabled(device):
            own = torch.get_autocast_dtype(device)
            if own == torch.float16:
                raise ValueError(
                    "torch.autocast must not be float16 under steering, whose backward pass has no loss scaler; "
                    "take torch.bfloat16, or leave autocast out"
                )
            if self.settings.precisions == ("fp32",):
                return nullcontext()
            if self.settings.precisions != ("bf16",):
                raise ValueError(
                    f"torch.autocast must be left out where steering chooses among precisions, got {own} around a step "
                    f"and precisions {', '.join(self.settings.precisions)}; steering opens autocast itself"
                )
        return self.loop.autocast(precision)

    def clip_gradients(self) -> torch.Tensor:
        """Clip the gradients to `settings.gradient_clip` in place, and return their total norm before."""
        clip = self.settings.gradient_clip
        return nn.utils.clip_grad_norm_(self.loop.parameters(), float("inf") if clip is None else clip)

    def drop_lost_gradients(self, gradient_norm: torch.Tensor) -> None:
        """Make the coming optimizer step do nothing where the gradient is not finite; call it right before the step.

        Such a step would ruin the weights. It counts in the budget, and its loss is left out of the interval's. On a
        GPU nothing waits for the norm: a fused optimizer skips the step on the device, and another one makes it with a
        gradient of zero, along its momentum alone. All processes decide alike, as they have the same norm. Under
        advice nothing is changed.

        Args:
            gradient_norm: Norm of the gradient of all processes, a scalar.
        """
        if not self.advises:
            self.loop.drop_lost_gradients(gradient_norm)

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of all parameters that the optimizer steps by `factor`, in place."""
        for parameter in self.loop.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def gradient_norm(self) -> torch.Tensor:
        """Return the total norm of the gradients of all parameters that the optimizer steps."""
        return nn.utils.get_total_norm([p.grad for p in self.loop.parameters() if p.grad is not None])

    def pause(self) -> None:
        """Stop the clock and the energy meter: evaluating and saving are no cost of the interval."""
        self.loop.pause()

    def resume(self) -> None:
        """Start the clock and the energy meter again after `pause`; does nothing where they run."""
        self.loop.resume()

    @staticmethod
    def saved_peaks(state: Mapping[str, Any]) -> list[float]:
        """Return the peak learning rate of each parameter group, from a state that `state_dict` returned."""
        levers = SavedLevers.of(state)
        return [levers.peak * ratio for ratio in levers.ratios]

    @staticmethod
    def saved_learning_rates(state: Mapping[str, Any]) -> list[float]:
        """Return the learning rate that was set last in each parameter group, from a state of `state_dict`."""
        return SavedLevers.of(state).set

    @staticmethod
    def saved_batch_factor(state: Mapping[str, Any]) -> float:
        """Return the batch size over the one at the start, from a state of `state_dict`."""
        return float(state["controls"]["batch_size"] / state["settings"]["batch_size"])

    # An interval -----------------------------------------------------------------------------------------------------

    def _end_interval(self) -> None:
        telemetry = self.loop.end_interval(validation_loss=self.validation_loss, epochs_seen=self._epochs_seen())
        if self.pairing is not None and self.pairing.shadowing:
            self._go_on_with_shadow(self.pairing, telemetry)
            return
        if telemetry.decision == 0:
            self._look_at_first_loss(telemetry)
        records = [self.controller.record(telemetry)]
        try:
            if self.pairing is not None and self.pairing.ends(telemetry):
                records += self._end_trial(self.pairing)
            self._decide(records[-1].telemetry)
        finally:
            if self.on_decision is not None and self.ranks.is_first:
                for record in records:
                    self._log(self.on_decision, record)

    def _go_on_with_shadow(self, pairing: Pairing, telemetry: Telemetry) -> None:
        """Record an interval of a trial's shadow; after the last one, go back and do what the policy has decided."""
        if pairing.goes_on(telemetry):
            self._begin_interval(pairing.base_controls())
        else:
            self._begin_interval(self.controller.controls, self._copy if pairing.snapshot else None)

    def _end_trial(self, pairing: Pairing) -> list[DecisionRecord]:
        """End a trial; return the records of the shadow's intervals where the run goes on from its end."""
        if pairing.passed(self.records):
            return []
        self.rollback_copy.drop()
        return self.controller.take_over(pairing.point, pairing.take_shadow())

    def _look_at_first_loss(self, telemetry: Telemetry) -> None:
        """Keep the learning rate near the user's where the first loss shows that the model comes trained."""
        if self.settings.fine_tuning is not None or self.fine_tuning or telemetry.diverged:
            return
        if looks_trained(self.loop.model, float(self.loop.recorder.steps[0].loss)):
            self.fine_tuning = True
            self.controller.guardrails.settings = self._bounds(self.loop.peak, fine_tuning=True)

    def _log(self, on_decision: Callable[[DecisionRecord], None], record: DecisionRecord) -> None:
        try:
            on_decision(record)
        except (Exception, SystemExit) as error:  # a log may not stop a run
            self._warn_once(
                "on_decision",
                f"on_decision raised {type(error).__name__}: {error}; the run goes on without this entry",
                RuntimeWarning,
            )

    def _epochs_seen(self) -> float | None:
        """Return the passes over the data: by the settings, or as the data say."""
        if self.settings.epoch_sequences is not None:
            return self.sequences / self.settings.epoch_sequences
        try:
            seen = getattr(self._data, "epochs_seen", None)
            if seen is None or (math.isfinite(seen) and seen >= 0):
                return None if seen is None else float(seen)
            fault = f"must be at least 0, got {seen}"
        except (Exception, SystemExit) as error:  # the position of the data may not cost the run
            fault = f"raised {type(error).__name__}: {error}"
        self._warn_of_data(f"data.epochs_seen {fault}; the passes over the data are unknown")
        return None

    def _decide(self, telemetry: Telemetry) -> None:
        """Decide after an interval, and apply the decision. A run whose weights are lost is taken back even at its end.

        Before some decisions, and at the end of the run, the model is validated.
        """
        if telemetry.finished and not (is_lost(telemetry) and self.rollback_copy.exists):
            self._validate()
            return
        decision = self._broadcast(lambda: self.controller.decide(telemetry))
        self._warn(decision)
        if decision.roll_back:
            if self.pairing is not None:
                self.pairing.abandon()
            self.rollback_copy.restore()
            self._begin_interval(self._broadcast(self.controller.rolled_back))
            return
        try:
            if validation_due(self.progress.decision) and not is_lost(telemetry):
                self._validate()
        finally:
            if not telemetry.finished:
                self._apply(decision)

    def _warn(self, decision: GuardedDecision) -> None:
        """Warn once where the policy fails, and once where the run is left to its base schedule."""
        failed = next((reason for reason in decision.reasons if reason.startswith(POLICY_FAILED)), None)
        if failed is not None:
            self._warn_once("policy", f"{failed}; nothing changes in this interval")
        if self.controller.fallen_back is not None:
            self._warn_once(
                "fallen back",
                f"steering has ended at decision {self.controller.fallen_back_at}, the run goes on under its base "
                f"schedule: {self.controller.fallen_back}",
            )

    def _warn_of_data(self, message: str) -> None:
        self._warn_once("data", message, RuntimeWarning)

    def _warn_once(
        self, subject: str, message: str, category: type[Warning] = UserWarning, *, stacklevel: int = 3
    ) -> None:
        if self.ranks.is_first and subject not in self._warned:
            warnings.warn(printable(message), category, stacklevel=stacklevel)
        self._warned.add(subject)

    def _broadcast(self, call: Callable[[], Content]) -> Content:
        """Return what `call` returns in rank 0, and bring the other processes' controllers to its state."""
        if self.ranks.world_size == 1:
            with self._aside():
                return call()
        with self._aside():
            mine = (call(), self.controller.broadcast_state()) if self.ranks.is_first else None
        answer, state = self.ranks.broadcast(mine)  # type: ignore[misc]
        if not self.ranks.is_first:
            self.controller.load_broadcast(state)
        return answer

    def _aside(self) -> AbstractContextManager[None]:
        """Return the context of policy, probe and validation: where the policy only advises, they leave no trace."""
        return unchanged(self.loop.model, self.loop.device) if self.advises else nullcontext()

    def _validate(self) -> None:
        if self.validate is None:
            return
        with self.loop.evaluation():
            with self._aside(), eval_mode(self.loop.model):
                loss = self._validated(self.validate)
            loss = float(self.ranks.all_reduce_mean(torch.tensor(loss, dtype=torch.float64)))
            self.validation_loss = loss if math.isfinite(loss) else None

    def _validated(self, validate: Callable[[], float]) -> float:
        """Return the loss that the user's function gives; NaN where it fails or that cannot be one."""
        try:
            loss = float(validate())
        except (Exception, SystemExit) as error:  # a look at the loss may not cost the run
            fault = f"validate raised {type(error).__name__}: {error}; the validation loss is unknown"
            self._warn_once("validate", fault, RuntimeWarning)
            return math.nan
        if not (math.isfinite(loss) and loss >= 0):
            fault = f"validate must return a loss of at least 0 nats/token, got {loss}; it is unknown"
            self._warn_once("validate", fault, RuntimeWarning)
            return math.nan
        return loss

    def _apply(self, decision: GuardedDecision) -> None:
        """Begin an interval under a decision's controls, or their trial. Before a risky decision, copy the run."""
        pairing = self.pairing
        if pairing is not None and pairing.is_due(decision.controls):
            point = self.controller.before_decision()
            begin = partial(pairing.begin, point, snapshot=decision.snapshot, n_records=len(self.records))
            self._begin_interval(pairing.base_controls(), begin)
            return
        self._begin_interval(decision.controls, self._copy if decision.snapshot else None)

    def _copy(self) -> None:
        self.rollback_copy.take()
        self.controller.snapshotted()

    def _begin_interval(self, controls: Controls, before_apply: Callable[[], None] | None = None) -> None:
        # What happens between the constructor and the first step is no cost of the run.
        self.loop.begin_interval(
            controls, at_first_step=self.sequences == self.settings.sequences_done, before_apply=before_apply
        )

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def state_dict(self, *, within_step: bool = False) -> dict[str, Any]:
        """Return the state that, with model, optimizer and data, makes a resumed run identical.

        `torch.save` can write it.

        Args:
            within_step: Allow it while a step is open, whose gradients are then lost to the run that goes on.

        Raises:
            ValueError: a step is open.
        """
        if self._step_open and not within_step:
            raise ValueError("state_dict needs the step to be over; save between two steps")
        return {
            "settings": self._saved_settings(),
            "mode": self.settings.mode,
            "process": [self.ranks.rank, self.ranks.world_size],
            "fine_tuning": self.fine_tuning,
            "spoilt": list(self.rollback_copy.rolled_back),
            "validation_loss": self.validation_loss,
            **self.loop.state_dict(),
            "controller": self.controller.state_dict(),
            **({} if self.pairing is None else {"trial": self.pairing.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called; load model and optimizer before.

        Raises:
            ValueError: the run was set up in another way, another process saved its part of a sharded model, or the
                state is damaged or none; nothing has changed then.
        """
        saved = SavedSteering.of(state)
        self._check_settings(saved.settings)
        if self.advises and saved.mode == "steer":  # version 0.2 did not write it
            raise ValueError(
                "mode must be 'steer' for a state that was saved while the policy steered, got 'advise'; "
                "only a run under advice may change its mode"
            )
        process = (self.ranks.rank, self.ranks.world_size)
        if self.loop.sharded and saved.process != process:
            raise ValueError(
                f"state of a sharded model must be loaded by the process that saved it, {saved.process[0]} of "
                f"{saved.process[1]}, got process {process[0]} of {process[1]}; save one file per process"
            )
        if self.pairing is not None:
            self.pairing.check_state(saved.trial)
        elif saved.trial is not None:
            raise ValueError("contract must have paired, as when the state was saved, in the middle of a trial")
        # Each process has its own losses of an interval: with another one's state it is measured anew.
        same = not any(self.ranks.all_gather(saved.process != process))
        self.loop.check_state(state, same_interval=same)
        peak, fine_tuning = float(state["levers"]["peak"]), saved.fine_tuning  # by now any model looks pretrained
        limits = self._with_law(self.controller.controller.state.limits, peak, fine_tuning=fine_tuning)
        self.controller.load_state_dict(saved.controller, limits=limits)  # either raises or loads, as a whole
        self.loop.load_state_dict(state, same_interval=same)
        self.validation_loss, self.fine_tuning = saved.validation_loss, fine_tuning
        guardrails = self.controller.guardrails
        guardrails.settings, guardrails.base_learning_rate = self._bounds(peak, fine_tuning=fine_tuning), peak
        self._step_open = False
        self.rollback_copy.rolled_back = list(saved.spoilt)
        self.rollback_copy.drop()
        if self.pairing is not None:
            self.pairing.load_state_dict(saved.trial)
        if self.finished:
            return
        if self.pairing is not None and self.pairing.shadowing:
            self.pairing.snapshot = self.controller.snapshotted_here()  # taken when the run has gone back
        elif self.controller.snapshotted_here():
            self.rollback_copy.take()

    def _saved_settings(self) -> dict[str, Any]:
        """Return the settings that must be the same where a run goes on, as plain JSON values."""
        settings = {name: getattr(self.settings, name) for name in MUST_STAY}
        schedule = self.progress.schedule.described()
        return settings | {"policy": name_of(self.settings.policy), "base_schedule": schedule}

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        for name, value in self._saved_settings().items():
            if saved.get(name, EARLIER.get(name)) != value:
                raise ValueError(
                    f"{name} must be what it was when the state was saved, {shown(saved.get(name))}, got {value!r}"
                )

    def summary(self) -> dict[str, Any]:
        """Return what was steered, what it cost and what the guardrails did, as plain JSON values."""
        intervals = [record.telemetry for record in self.records]
        shadow_s, shadow_j = (0.0, 0.0) if self.pairing is None else self.pairing.watch.unrecorded
        return {
            "policy": name_of(self.settings.policy),
            "mode": self.settings.mode,
            "preference": self.settings.preference,
            "decisions": len(intervals),
            "sequences": self.sequences,
            "tokens": self.progress.tokens,
            "budget": self.settings.budget,
            "budget_used": self.progress.used,
            "time_s": sum(each.time_s for each in intervals) + shadow_s,
            "energy_j": sum_known([*(each.energy_j for each in intervals), shadow_j]),
            "skipped_steps": self.loop.recorder.skipped_steps,
            "energy_source": intervals[-1].energy_source if intervals else None,
            "validation_loss": self.validation_loss,
            "domain_warnings": list(self.domain_warnings),
            **self.controller.summary(),
        }

    def close(self) -> None:
        """Release model and optimizer, unchanged but for their training; another controller may take them."""
        self.rollback_copy.drop()
        if self.pairing is not None:
            self.pairing.drop()
        if self._rows is not None:
            self._rows.close()
        self.loop.detach()


class Step:
    """One optimizer step, for a `with` block: gradients are added up inside, and the step is made at its end.

    An exception inside drops the step: the weights stay as they were, and the loop may try again. In several processes
    it cannot: the others have gone on.

    Args:
        steering: The steering of the loop.
    """

    def __init__(self, steering: Steering) -> None:
        self._steering = steering
        self._done = 0
        self.batch_size = 0
        """Sequences that this process trains on in this step."""
        self.learning_rate = 0.0
        """Learning rate of this step."""

    def __enter__(self) -> Step:
        steering = self._steering
        self.batch_size = -(-steering.begin_step() // steering.ranks.world_size)
        self.learning_rate = steering.loop.current_learning_rate()
        steering.loop.optimizer.zero_grad(set_to_none=True)
        return self

    def backward(
        self,
        loss: Callable[..., torch.Tensor],
        sequences: int | None = None,
        *,
        batch: Any = None,
        probe_loss: Callable[[int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Add the gradient of a micro-batch, and return its loss.

        Args:
            loss: Computes the micro-batch's mean loss in nats/token, a scalar, from `batch` if that is given; called
                under the precision in force, and now and then three times more for the curvature probe, so it must not
                draw new data.
            sequences: Sequences of the micro-batch; by default those of `batch`, or else the whole of the step's.
            batch: The micro-batch: a tensor with a row for each sequence, or dictionaries, tuples and lists of such
                tensors. `loss` is called with it, and the curvature probe with its first sequences.
            probe_loss: Computes the mean loss of the given number of sequences, the first of the micro-batch. The
                curvature probe then takes no more than it needs; without it and `batch`, the whole micro-batch.

        Raises:
            ValueError: the step would get more sequences than its batch, or the model got others than those; or `loss`
                draws new data.
        """
        steering, said = self._steering, sequences is not None or batch is not None
        if sequences is None:
            sequences = self.batch_size if batch is None else sequences_in(batch)
        if sequences < 1 or self._done + sequences > self.batch_size:
            raise ValueError(
                f"sequences must add up to the step's batch_size {self.batch_size}, got {sequences} after "
                f"{self._done}; take as many as step.batch_size says"
            )
        self._done += sequences
        if steering.probe_wanted:
            probed = _probed(loss, batch, sequences, steering.probe_sequences, probe_loss)
            steering.probe(probed, check=probe_loss is None)
        share = sequences / self.batch_size
        steering.ranks.set_requires_gradient_sync(steering.loop.model, self._done == self.batch_size)
        watch = None if said else steering.watch_rows()
        with steering.autocast():
            value = loss() if batch is None else loss(batch)
        if watch is not None:
            watch.check(sequences)
        torch.autograd.backward(value * share)
        steering.note_loss(value, share)
        return value.detach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        steering = self._steering
        if kind is not None:
            self._drop()
            return
        if self._done != self.batch_size:
            self._drop()
            raise ValueError(
                f"sequences must add up to the step's batch_size {self.batch_size}, got {self._done}; "
                "call step.backward for every micro-batch"
            )
        try:
            norm = steering.clip_gradients()
            steering.drop_lost_gradients(norm)
            steering.loop.optimizer.step()
        except BaseException:
            self._drop()
            raise
        steering.loop.optimizer.zero_grad(set_to_none=True)
        steering.end_step(norm, self._done * steering.ranks.world_size)

    def _drop(self) -> None:
        steering = self._steering
        steering.loop.optimizer.zero_grad(set_to_none=True)
        if steering.ranks.world_size > 1:
            steering.ranks.set_requires_gradient_sync(steering.loop.model, True)
        steering.drop_step()


def _probed(
    loss: Callable[..., torch.Tensor],
    batch: Any,
    sequences: int,
    wanted: int,
    probe_loss: Callable[[int], torch.Tensor] | None,
) -> Callable[[], torch.Tensor]:
    """Return the loss of the first `wanted` of a micro-batch's sequences, or of all where it cannot be divided."""
    count = min(wanted, sequences)
    if probe_loss is not None:
        return partial(probe_loss, count)
    return loss if batch is None else partial(loss, first_sequences(batch, count, sequences))


def _check_data(data: object, settings: SteeringSettings) -> None:
    """Raise `ValueError` for data that cannot go back, where that is needed or asked for."""
    if settings.contract is not None and settings.contract.from_start and data is None and settings.mode != "advise":
        raise ValueError(
            "contract must be without from_start=True where the data cannot go back to the start, got no data; "
            "give Steering(data=...), an object with state_dict and load_state_dict, or leave from_start out"
        )
    if data is not None and not (hasattr(data, "state_dict") and hasattr(data, "load_state_dict")):
        raise ValueError(
            f"data must have state_dict and load_state_dict, got {type(data).__name__}; wrap a data loader in "
            "batches(loader), or leave data out"
        )
