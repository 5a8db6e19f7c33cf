"""Steer a training loop that belongs to somebody else: what it tells becomes telemetry, what is decided holds in it.

    steering = Steering(model, optimizer, SteeringSettings(sequences=100_000, batch_size=32))
    while not steering.finished:
        with steering.step() as step:
            for batch in micro_batches(step.batch_size):
                step.backward(lambda: loss_of(model, batch), sequences=len(batch))

The adapters of frameworks do the same by `begin_step`, `note_loss`, `end_step`.

Make one optimiser step of a plain PyTorch loop under steering.

Save a steered run, and go on with it where it is set up as it was.

Describe a steered run: what is known of it before it starts, and what it came to.

Tell whether a model comes trained: then a learning rate far above the user's undoes what it knows.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.controller import Controller, DecisionRecord
from trainpilot.agents.steering.domain import RunFacts, check_domain
from trainpilot.agents.steering.guarded_controller import GuardedController, GuardedDecision
from trainpilot.agents.steering.guardrails import UNGUARDED, Guardrails, GuardrailSettings, is_lost
from trainpilot.agents.steering.settings import Plan, SteeringSettings, control_limits, name_of
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.config import Controls, Precision
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter, sum_known
from trainpilot.llm_runtime.loop import Levers, Readings, Snapshots, Stateful, looking
from trainpilot.llm_runtime.process_group import Content, OneProcess, Ranks
from trainpilot.llm_runtime.schedules import MASK_UPDATES, learning_rate, mask_updates_due, validation_due
from trainpilot.llm_runtime.telemetry import Telemetry


class Step:
    """One optimiser step, for a `with`: gradients are gathered inside, and the step is made at its end.

    An exception inside drops the step: the weights stay as they were, and the loop may try again. One of several
    processes cannot: the others have gone on.

    Args:
        steering: What steers the loop.
    """

    def __init__(self, steering: Steering) -> None:
        self._steering = steering
        self._done = 0
        self.batch_size = 0
        """Sequences that this process is to train on in this step."""
        self.learning_rate = 0.0
        """Learning rate of this step."""

    def __enter__(self) -> Step:
        steering = self._steering
        self.batch_size = -(-steering.begin_step() // steering.ranks.world_size)
        self.learning_rate = steering.levers.learning_rate()
        steering.levers.optimizer.zero_grad(set_to_none=True)
        return self

    def backward(
        self,
        loss: Callable[[], torch.Tensor],
        sequences: int | None = None,
        *,
        probe_loss: Callable[[int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Add the gradient of a micro-batch, and return its loss.

        Args:
            loss: Computes the micro-batch's mean loss in nats/token, a scalar; called under the precision in force,
                and now and then three times more for the curvature probe.
            sequences: Sequences of the micro-batch; by default the whole of the step's.
            probe_loss: Computes the mean loss of the micro-batch's first so many sequences. The curvature probe then
                takes no more than it needs; without it, the whole micro-batch.

        Raises:
            ValueError: the step would get more sequences than its batch.
        """
        steering, sequences = self._steering, self.batch_size if sequences is None else sequences
        if sequences < 1 or self._done + sequences > self.batch_size:
            raise ValueError(
                f"sequences must add up to the step's batch_size {self.batch_size}, got {sequences} after "
                f"{self._done}; take as many as step.batch_size says"
            )
        self._done += sequences
        if steering.probe_wanted:
            count = min(steering.probe_sequences, sequences)
            steering.probe(loss if probe_loss is None else lambda: probe_loss(count))
        share = sequences / self.batch_size
        steering.ranks.synchronise_gradients(steering.levers.model, self._done == self.batch_size)
        with steering.levers.autocast():
            value = loss()
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
        clip = steering.settings.gradient_clip
        parameters = steering.levers.parameters()
        try:
            norm = nn.utils.clip_grad_norm_(parameters, float("inf") if clip is None else clip)
            steering.levers.optimizer.step()
        except BaseException:
            self._drop()
            raise
        steering.levers.optimizer.zero_grad(set_to_none=True)
        steering.end_step(norm, self._done * steering.ranks.world_size)

    def _drop(self) -> None:
        steering = self._steering
        steering.levers.optimizer.zero_grad(set_to_none=True)
        if steering.ranks.world_size > 1:
            steering.ranks.synchronise_gradients(steering.levers.model, True)
        steering.drop_step()


_SAME = ("sequences", "batch_size", "sequence_length", "preference", "decisions", "gradient_clip", "pruning")


def state_of(steering: Steering) -> dict[str, Any]:
    """Return what, beside model, optimiser and data, decides how the run goes on."""
    return {
        "settings": _compared(steering),
        "process": [steering.ranks.rank, steering.ranks.world_size],
        "course": steering.progress.state_dict(),
        "fine_tuning": steering.fine_tuning,
        "spoilt": list(steering.snapshots.spoilt),
        "validation_loss": steering.validation_loss,
        "controls": asdict(steering.controls),
        "levers": steering.levers.state_dict(),
        "readings": steering.readings.state_dict(),
        "controller": steering.controller.state_dict(),
    }


def go_on(steering: Steering, state: Mapping[str, Any]) -> None:
    """Put a steering where `state_of` was called; what a rollback would go back to is copied anew.

    Raises:
        ValueError: the run was set up in another way, or another process saved its part of a sharded model.
    """
    _check_same(state["settings"], _compared(steering))
    here = [steering.ranks.rank, steering.ranks.world_size]
    if steering.levers.sharded:
        _check_process(state["process"], here)
    steering.progress.load_state_dict(state["course"])
    steering.validation_loss = state["validation_loss"]
    steering.levers.load_state_dict(state["levers"], Controls(**state["controls"]))
    steering.fine_tuning = state["fine_tuning"]  # a model from scratch has been trained too by now
    guardrails = steering.controller.guardrails
    guardrails.settings, guardrails.base_learning_rate = steering.bounds(), steering.levers.peak
    steering.controller.load_state_dict(state["controller"])
    if any(steering.ranks.gathered(state["process"] != here)):
        steering.readings.begin_anew(steering.sequences, steering.progress.decision)  # each process has its own losses
    else:
        steering.readings.load_state_dict(state["readings"])
    steering.snapshots.spoilt = list(state["spoilt"])
    steering.snapshots.drop()
    if not steering.finished and steering.controller.snapshotted_here():
        steering.snapshots.take()


def _compared(steering: Steering) -> dict[str, Any]:
    """Return what must not have changed where a run goes on, as plain JSON values."""
    settings = steering.settings
    same = {name: getattr(settings, name) for name in _SAME}
    return same | {"policy": name_of(settings.policy), "base_schedule": asdict(steering.progress.schedule)}


def _check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(f"{name} must be what it was when the state was saved, {saved.get(name)!r}, got {value!r}")


def _check_process(saved: list[int], here: list[int]) -> None:
    if saved != here:
        raise ValueError(
            f"state of a sharded model must be loaded by the process that saved it, {saved[0]} of {saved[1]}, "
            f"got process {here[0]} of {here[1]}; save one file per process"
        )


def facts_of(steering: Steering, base: BaseSchedule) -> RunFacts:
    """Return what a policy's training is compared with."""
    settings, levers, progress = steering.settings, steering.levers, steering.progress
    return RunFacts(
        n_parameters=sum(p.numel() for p in levers.model.parameters()),
        budget_tokens=progress.schedule.budget_tokens,
        sequences=settings.sequences,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        optimizer=type(levers.optimizer).__name__,
        decisions=progress.decisions,
        device_type=levers.device.type,
        base_schedule=base,
        fine_tuning=steering.fine_tuning,
    )


def summary_of(steering: Steering) -> dict[str, Any]:
    """Return what was steered and what it came to, as plain JSON values."""
    settings, told = steering.settings, [record.telemetry for record in steering.records]
    return {
        "policy": name_of(settings.policy),
        "preference": settings.preference,
        "decisions": len(told),
        "sequences": steering.sequences,
        "tokens": steering.tokens,
        "time_s": sum(each.time_s for each in told),
        "energy_j": sum_known(each.energy_j for each in told),
        "energy_source": told[-1].energy_source if told else None,
        "validation_loss": steering.validation_loss,
        "domain_warnings": list(steering.domain_warnings),
        **steering.controller.summary(),
    }


RISE = 2.0
"""Largest factor above the user's learning rate on a model that comes trained."""
FALL = 1e-3
"""Smallest: a learning rate that is too low loses time and nothing else."""


def comes_trained(model: nn.Module) -> bool:
    """Return whether a model says where it was loaded from, and its weights are not as models are made.

    The name alone would not do: `from_config` of somebody's config has it too, with random weights. Gains of
    normalisation layers are one in every new transformer, and in no trained one.
    """
    named = any(getattr(module, "name_or_path", None) for module in model.modules())
    return named and any(not _is_new(gain) for gain in _gains(model))


def _gains(model: nn.Module) -> list[torch.Tensor]:
    names = ("norm", "ln_", "layernorm")
    return [
        parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.endswith("weight") and any(part in name.lower() for part in names)
    ]


def _is_new(gain: torch.Tensor) -> bool:
    own = gain.to_local() if hasattr(gain, "to_local") else gain
    return bool((own == 1).all()) or bool((own == 0).all())  # some count from zero: 1 + gain


def within_reach(bounds: GuardrailSettings, learning_rate: float) -> GuardrailSettings:
    """Return bounds that keep the learning rate near the user's, unless they say themselves what it may be."""
    if bounds.learning_rate_range is not None:
        return bounds
    return replace(bounds, learning_rate_range=(FALL * learning_rate, RISE * learning_rate))


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
        self.progress = plan.progress(settings, grain)
        start = Controls(batch_size=settings.batch_size, precision=settings.precisions[0])
        self.levers = Levers(model, optimizer, start, settings.pruning)
        self.snapshots = Snapshots(self.levers, self.progress, data)
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
        return self.progress.sequences

    @property
    def tokens(self) -> int:
        """Tokens trained on, by the nominal length of a sequence."""
        return self.progress.tokens

    @property
    def end_sequences(self) -> int:
        """Sequences at which the run ends: the budget, or the end of the cool-down."""
        return self.progress.end

    @property
    def finished(self) -> bool:
        """Whether the budget is used up or the cool-down complete."""
        return self.progress.finished

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step: base schedule x scale x the batch's neutral factor."""
        controls = self.controls
        factor, start = self.progress.factor(controls.batch_size), self.settings.batch_size
        return learning_rate(self.levers.peak, controls.learning_rate_scale, factor, controls.batch_size, start)

    # A step ----------------------------------------------------------------------------------------------------------

    def step(self) -> Step:
        """Return the next optimiser step, for a `with`."""
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
        self.readings.begin_step(batch_size, last=self.sequences + batch_size >= self.progress.interval_end)
        self.readings.keep_weights(next_is_last=self.sequences + 2 * batch_size >= self.progress.interval_end)
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
        self.progress.sequences += sequences
        self.readings.end_step(gradient_norm, sequences)
        if self.sequences >= self.progress.interval_end:
            self._prune(done=1.0)
            self._end_interval()

    def drop_step(self) -> None:
        """Forget a step that was begun and not made."""
        self._step_open = False
        self.readings.drop_step()

    def _prune(self, done: float | None = None) -> None:
        began, until = self.readings.start_sequences, self.progress.interval_end
        if done is None:
            done = (self.sequences - began) / max(until - began, 1)
        due = mask_updates_due(done)
        if due > self.readings.mask_updates:
            self.readings.mask_updates = due
            self.levers.prune_towards(self.readings.start_sparsity, self.controls.sparsity, due / MASK_UPDATES)

    # An interval -----------------------------------------------------------------------------------------------------

    def _end_interval(self) -> None:
        telemetry = self.readings.telemetry(
            decision=self.progress.decision,
            budget_used=self.progress.used,
            tokens=self.tokens,
            validation_loss=self.validation_loss,
            finishing=self.progress.cooldown is not None,
            finished=self.finished,
        )
        telemetry = self.ranks.of_first(telemetry)
        self.progress.decision += 1
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
            if validation_due(self.progress.decision) and not is_lost(telemetry):
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
            self.progress.begin_cooldown(controls.batch_size)
        self.readings.switch_s = self.readings.clock() - start

    def _roll_back(self) -> None:
        self.snapshots.go_back()
        self.readings.begin_interval(self.sequences)
        self._apply(self._agreed(self.controller.rolled_back))

    # For adapters of frameworks --------------------------------------------------------------------------------------

    @property
    def peak_learning_rate(self) -> float:
        """Peak of the base schedule: the highest learning rate among the optimizer's groups at the start."""
        return self.levers.peak

    def expect_external_scheduler(self) -> None:
        """Accept that a scheduler writes the learning rate too: one that takes it from `learning_rate`."""
        self.levers.alone = False

    def apply_learning_rate(self) -> None:
        """Write the next step's learning rate into the optimizer now, before `begin_step` does, so that it is logged.

        Raises:
            ValueError: something else has written the learning rate.
        """
        self.levers.set_learning_rate(self.learning_rate)

    def autocast(self, precision: Precision | None = None) -> AbstractContextManager[object]:
        """Return the context of a forward pass in `precision`; by default in the precision of the present controls."""
        return self.levers.autocast(precision)

    def clip_gradients(self) -> torch.Tensor:
        """Clip the gradients to `settings.gradient_clip` in place, and return their total norm before."""
        clip = self.settings.gradient_clip
        return nn.utils.clip_grad_norm_(self.levers.parameters(), float("inf") if clip is None else clip)

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of all parameters that the optimizer steps by `factor`, in place."""
        for parameter in self.levers.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def gradient_norm(self) -> torch.Tensor:
        """Return the total norm of the gradients of all parameters that the optimizer steps."""
        return nn.utils.get_total_norm([p.grad for p in self.levers.parameters() if p.grad is not None])

    def pause(self) -> None:
        """Stop the clock and the energy meter: evaluating and saving are no cost of the interval."""
        self.readings.pause()

    def resume(self) -> None:
        """Start the clock and the energy meter again after `pause`; does nothing where they run."""
        self.readings.go_on()

    @staticmethod
    def saved_peaks(state: Mapping[str, Any]) -> list[float]:
        """Return the peak learning rate of each parameter group, from a state that `state_dict` returned."""
        return [state["levers"]["peak"] * ratio for ratio in state["levers"]["ratios"]]

    @staticmethod
    def saved_learning_rates(state: Mapping[str, Any]) -> list[float]:
        """Return the learning rate that was set last in each parameter group, from a state of `state_dict`."""
        return list(state["levers"]["set"])

    @staticmethod
    def saved_batch_factor(state: Mapping[str, Any]) -> float:
        """Return the batch size over the one at the start, from a state of `state_dict`."""
        return float(state["controls"]["batch_size"] / state["settings"]["batch_size"])

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
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called; load model and optimiser before.

        Raises:
            ValueError: the state is of a run with other settings.
        """
        go_on(self, state)
        self._step_open = False

    def summary(self) -> dict[str, Any]:
        """Return what was steered and what it came to, as plain JSON values."""
        return summary_of(self)

    def close(self) -> None:
        """Let go of model and optimiser, as they were but for their training; another controller may take them."""
        self.snapshots.drop()
        self.readings.let_go()
        self.levers.release()
