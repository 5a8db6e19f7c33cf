"""A controller within guardrails: its decisions are bounded, and a decision that goes wrong is rolled back.

`GuardedController` wraps a `Controller`. It answers with a `GuardedDecision`, which the owner of the run carries out:
roll back, take a snapshot, apply the controls. `RollbackController` does so for a plant of ours.
`FaultTolerantPolicy` keeps the run going whatever the policy does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller, DecisionRecord
from trainpilot.agents.steering.contract import ALMOST, SMOOTHING, ContractWatch, QualityContract
from trainpilot.agents.steering.guardrails import ROUNDED, Guardrails, GuardrailSettings, is_lost
from trainpilot.agents.steering.paired import LOST, PairedWatch
from trainpilot.agents.steering.saved_state import SavedController, SavedStanding
from trainpilot.agents.steering.throughput import Throughput
from trainpilot.agents.steering.withheld import at_speed, relative_speed
from trainpilot.envs.action import ACTION_FIELDS, KEEP, Action, allow, check_action
from trainpilot.envs.decision import Decision, Preference
from trainpilot.envs.reward import RewardTerms
from trainpilot.llm_runtime.config import LEARNING_RATE_SCALE_RANGE, ControlLimits, Controls
from trainpilot.llm_runtime.telemetry import Plant, Snapshot, Telemetry


@dataclass(frozen=True)
class GuardedDecision:
    """What the owner of the run does next, in this order: roll back, take a snapshot, apply the controls."""

    controls: Controls
    """Controls of the next interval; after a rollback, those that `rolled_back` returns."""
    roll_back: bool
    """Restore the last snapshot, then call `rolled_back`."""
    snapshot: bool
    """Copy the run before the controls are applied, then call `snapshotted`."""
    fallen_back: bool
    """The run goes on under its base schedule, and the policy is no longer called."""
    reasons: tuple[str, ...]
    """Why choices were refused or the run was rolled back."""


@dataclass(frozen=True)
class RollbackPoint:
    """State of a guarded controller at the time of a snapshot, to return to after a rollback."""

    seen: tuple[int, ...]
    guardrails: dict[str, Any]
    contract: dict[str, Any] | None


POLICY_FAILED = "policy failed: "
"""How the reason of a decision begins where the policy gave none."""
MAX_FAILURES = 5
"""Consecutive failures after which the policy is disabled."""


class FaultTolerantPolicy:
    """Calls a policy that may fail, and counts its consecutive failures."""

    def __init__(self) -> None:
        self.failures = 0

    @property
    def failed_for_good(self) -> bool:
        """Whether the policy is disabled."""
        return self.failures >= MAX_FAILURES

    def ask(self, controller: Controller) -> tuple[Action, str | None]:
        """Return the requested action, or KEEP and the reason why the policy gave none."""
        try:
            if not np.isfinite(controller.state.observation()).all():
                raise ValueError("the observation is not finite")
            requested = _checked(controller.requested_action())
        except (Exception, SystemExit) as error:  # whatever a policy raises must not end the run, but for Ctrl-C
            self.failures += 1
            return KEEP, f"{POLICY_FAILED}{type(error).__name__}: {error}"
        self.failures = 0
        return requested, None


def _checked(action: Any) -> Action:
    """Return an action as whole numbers. Raises `ValueError` for anything else."""
    numbers = [float(choice) for choice in action]
    if not all(math.isfinite(number) and number == int(number) for number in numbers):
        raise ValueError(f"choices must be whole numbers, got {numbers}")
    checked = tuple(int(number) for number in numbers)
    check_action(checked)
    return checked


MAX_CORRECTIONS = 2
"""After more corrections of the learning rate the run goes on under its base schedule."""
GENTLER = 0.5
"""Factor on the learning-rate scale after a rollback. Not applied to the first rollback if no control had changed."""
SPEED = ("learning_rate_scale", "batch_size")
"""Controls that decide how fast a run learns per token."""
TOO_SLOW = "learning rate and batch held by the quality contract: slower than the reference for longer than agreed"
TOO_FAST = "learning rate and batch held by the quality contract: faster than the reference late in the budget"
FINISH = [each.name for each in ACTION_FIELDS].index("finish")


def watch_of(contract: QualityContract | None) -> ContractWatch | None:
    """Return what watches over a contract; `None` without one."""
    if contract is None:
        return None
    return ContractWatch(contract) if contract.paired is None else PairedWatch(contract)


class GuardedController:
    """A controller whose decisions are bounded by guardrails, and rolled back where they go wrong.

    Args:
        controller: Decides; not used before.
        guardrails: The bounds.
        contract: Bounds on what steering may cost in loss and time; `None` for none.
        rewinds: Returns whether a rollback would now take the data and the budget back with the weights.
        watches: Intervals that are left to the base schedule before the policy may change anything.
    """

    def __init__(
        self,
        controller: Controller,
        guardrails: Guardrails,
        contract: QualityContract | None = None,
        *,
        rewinds: Callable[[], bool] = lambda: True,
        watches: int = 0,
    ) -> None:
        self.controller = controller
        self.guardrails = guardrails
        guardrails.throughput = None if controller.state.blind else Throughput()
        least = guardrails.least_scale(controller.state.situation())
        if controller.state.controls.learning_rate_scale < least:  # a policy that begins lower keeps the bounds too
            controller.state = controller.state.anew(min(least, 1.0))
        self.watch = watch_of(contract)
        self.records: list[DecisionRecord] = []
        """Every interval that was recorded, those taken back included."""
        self.fallen_back: str | None = None
        """Why the run was left to its base schedule; `None` while it is not."""
        self.fallen_back_at: int | None = None
        """The first decision under the base schedule."""
        self._seen: list[int] = []
        """Indices in `records` of the intervals that the controller knows: those that were not rolled back."""
        self._recorded, self._rewinds, self._watches = True, rewinds, watches
        self._policy = FaultTolerantPolicy()
        self._refusals: Counter[str] = Counter()
        self._rollbacks: list[dict[str, Any]] = []
        self._before: RollbackPoint | None = None
        self._rollback_point: RollbackPoint | None = None
        self._since: list[Action] = []
        """Actions since the snapshot, including the one that it was taken before."""

    @classmethod
    def of_bundle(
        cls,
        bundle: PolicyBundle,
        limits: ControlLimits,
        preference: Preference,
        bounds: GuardrailSettings | None = None,
    ) -> GuardedController:
        """Return a bundle's policy within guardrails, by default the usual ones."""
        return cls(Controller.of_bundle(bundle, limits, preference), Guardrails(bounds))

    @property
    def controls(self) -> Controls:
        """Controls in force."""
        return self.controller.state.controls

    def decide(self, telemetry: Telemetry | None) -> GuardedDecision:
        """Return what to do next; `telemetry` is the last interval's, `None` before the first."""
        roll_back, reasons = False, list[str]()
        if telemetry is not None:
            if not self._recorded:
                self.record(telemetry)
            self._seen.append(len(self.records) - 1)
            roll_back, reasons = self._judge(telemetry)
        if roll_back:
            return GuardedDecision(self.controls, True, False, self.fallen_back is not None, tuple(reasons))
        self.controller.observe(telemetry)
        return self._decide(reasons)

    def _judge(self, telemetry: Telemetry) -> tuple[bool, list[str]]:
        """Return whether the run must be rolled back, and why; fall back to the base schedule where that is due."""
        asked, start = telemetry.requested, self.controller.state.limits.start
        broken = None
        if self.watch is not None:
            broken = self.watch.observe(telemetry, steers=asked != start, speed=relative_speed(asked, start))
        verdict = self.guardrails.judge(telemetry)
        if self.fallen_back is not None and not is_lost(telemetry):
            return False, []
        if broken is not None:
            self._fall_back(f"quality contract broken: {broken}", telemetry.decision + 1)
        elif verdict.kind == "fall_back":
            self._fall_back(verdict.reason, telemetry.decision + 1)
        if (reason := verdict.reason or broken) is None:
            return False, []
        spoilt = verdict.kind == "fall_back" or (verdict.kind == "roll_back" and not self._may_pass(telemetry))
        harmed = spoilt or (self.watch is not None and self.watch.harmed and self._is_worth_it())
        if roll_back := harmed and self._rollback_point is not None:
            self._rollbacks.append({"after_decision": telemetry.decision, "reason": reason})
        return roll_back, [reason]

    def _may_pass(self, telemetry: Telemetry) -> bool:
        """Return whether a spike is put down to a bad batch for now, so that the run goes on from it.

        That is where no control has changed since before the snapshot, and the budget would not go back: a rollback
        would lose what was trained on since. Weights that were really harmed spike in the next interval too.
        """
        if self._rewinds() or self._rollback_point is None or is_lost(telemetry):
            return False
        known = [self.records[place].telemetry for place in self._seen]
        since = known[max(len(self._rollback_point.seen) - 1, 0) :]
        if any(each.requested != telemetry.requested for each in since):
            return False
        return not self._spiked(2)

    def _spiked(self, ago: int = 1) -> bool:
        """Return whether the newest interval was a spike, or the one before that for 2."""
        if len(self._seen) < ago:
            return False
        return self.guardrails.is_spike(self.records[self._seen[-ago]].telemetry.train_loss)

    def _is_worth_it(self) -> bool:
        """Return whether to take weights back that broke the contract.

        If the budget goes back with them, always. Else what was trained on since the snapshot is lost for good, and
        they go back only if the loss is now above what it was there: weights that are better are not given away.
        """
        if self._rewinds() or self._rollback_point is None or self.watch is None:
            return True
        past = self._rollback_point.contract
        then, now = (
            [row["loss"] for row in rows[-SMOOTHING:]]
            for rows in (past["rows"] if past else [], self.watch.past_state()["rows"])
        )
        return bool(then) and fmean(now) > fmean(then)

    def _fall_back(self, reason: str | None, decision: int) -> None:
        if self.fallen_back is None:
            self.fallen_back, self.fallen_back_at = str(reason), decision

    @property
    def can_roll_back(self) -> bool:
        """Whether there is a snapshot, and the budget of rollbacks not more than used up."""
        return (
            self._rollback_point is not None
            and self.guardrails.history.rollbacks <= self.guardrails.settings.max_rollbacks
        )

    def _decide(self, reasons: list[str]) -> GuardedDecision:
        guardrails, watch = self.guardrails, self.watch
        past = watch.past_state() if watch is not None else None
        before = guardrails.past_state()
        decision, held = self._kept_up(*self._corrected(self._bounded()))
        self._refusals.update(decision.refusals)
        self._before = RollbackPoint(tuple(self._seen), before, past)
        snapshot = self._wants_snapshot(decision.allowed)
        self._carry_out(decision, held)
        reasons = [*reasons, *decision.refusals]
        return GuardedDecision(self.controls, False, snapshot, self.fallen_back is not None, tuple(reasons))

    def _corrected(self, decision: Decision) -> tuple[Decision, Controls | None]:
        """Return the decision, or "keep" and controls to hold where the learning rate has to come back."""
        if self.fallen_back is not None or (self.watch is not None and self.watch.observing):
            return decision, None
        found = self.guardrails.correction(self.controller.state.situation())
        if found is None:
            return decision, None
        (scale, reason), now = found, self.controls
        self.guardrails.corrected(now.learning_rate_scale, scale)
        if self.guardrails.history.corrections > MAX_CORRECTIONS:
            self._fall_back(f"{reason}, {MAX_CORRECTIONS + 1} times", len(self._seen))
            return Decision(decision.requested, KEEP, now, [reason]), self.base_controls()
        why = f"learning rate brought back to x{scale:.3g}: {reason}"
        return Decision(decision.requested, KEEP, now, [why]), replace(now, learning_rate_scale=scale)

    def _kept_up(self, decision: Decision, held: Controls | None) -> tuple[Decision, Controls | None]:
        """Return the decision, with the learning rate and the batch that a contract with a reference allows."""
        if self.watch is None or self.fallen_back is not None:
            return decision, held
        state, now = self.controller.state, self.controls
        chosen, start = held or state.after(decision.allowed), state.limits.start
        speed, present = relative_speed(chosen, start), relative_speed(now, start)
        least = self.watch.least_speed(speed, present, state.start_scale)
        if speed < ALMOST * least:
            chosen, reason = at_speed(least, chosen, start), TOO_SLOW
        elif speed > self.watch.most_speed(present) / ALMOST:
            chosen, reason = replace(chosen, **{name: getattr(now, name) for name in SPEED}), TOO_FAST
        else:
            return decision, held
        if chosen.learning_rate_scale > now.learning_rate_scale * ROUNDED:
            self.guardrails.raised(chosen.learning_rate_scale)
        allowed = (KEEP[0], KEEP[1], *decision.allowed[2:])
        return Decision(decision.requested, allowed, now, [*decision.refusals, reason]), chosen

    def _wants_snapshot(self, action: Action) -> bool:
        if not self.guardrails.needs_snapshot(action):
            return False
        if self._rollback_point is not None and self.fallen_back is None and self._spiked():
            return False
        if self._rollback_point is None or self.watch is None:
            return True
        if self.watch.contract.from_start:
            return False
        old = len(self._seen) - len(self._rollback_point.seen) >= self.guardrails.settings.snapshot_every
        return old and not self.guardrails.rising and not self.watch.endangered

    def _bounded(self) -> Decision:
        """Return the requested action, and the part of it that is allowed."""
        if self.fallen_back is not None:
            return Decision(KEEP, KEEP, self.base_controls(), [])
        requested, failure = self._policy.ask(self.controller)
        if failure is not None:
            if self._policy.failed_for_good:
                self._fall_back(f"{failure} ({MAX_FAILURES} times running)", len(self._seen))
            return Decision(KEEP, KEEP, self.controls, [failure])
        allowed, refusals = allow(requested, self.controller.state.mask_reasons())
        allowed, more = self._reviewed(allowed)
        return Decision(requested, allowed, self.controls, [*refusals, *more])

    def _reviewed(self, action: Action) -> tuple[Action, list[str]]:
        if self.watch is not None and self.watch.observing and action != KEEP:
            return KEEP, ["everything refused: the quality contract gathers evidence under the base schedule"]
        if len(self._seen) < self._watches and action != KEEP:
            return KEEP, [f"everything refused: the run is under way, and is watched for {self._watches} intervals"]
        if isinstance(self.watch, PairedWatch) and (held := self.watch.holds) and action != KEEP:
            return KEEP, [held]
        allowed, refusals = self.guardrails.review(action, self.controller.state.situation())
        if allowed[FINISH] != KEEP[FINISH] and (reason := self._refuses_finish()):
            allowed, refusals = (
                (*allowed[:FINISH], KEEP[FINISH], *allowed[FINISH + 1 :]),
                [*refusals, f"finish cool down refused: {reason}"],
            )
        return allowed, refusals

    def _refuses_finish(self) -> str | None:
        """Return why the run may not end early; `None` where it may."""
        if self.watch is not None and (reason := self.watch.refuses_finish()):
            return reason
        preference, course = self.controller.state.preference, self.guardrails.past.course
        if course is not None and preference.weights()[0] == 1 and course.may_learn():
            return "the loss may still fall, and nothing but the loss is asked for"
        return None

    def _carry_out(self, decision: Decision, held: Controls | None = None) -> None:
        """Make the allowed action the present decision, or the controls `held` instead."""
        state = self.controller.state
        state.apply(decision.allowed)
        if self.fallen_back is not None:
            held = self.base_controls()
        if held is not None:
            state.hold(held)
        self.guardrails.note(decision.allowed)
        self._since.append(decision.allowed)
        self.controller.decision = replace(decision, controls=state.controls)
        self._recorded = False

    def base_controls(self) -> Controls:
        """Return the controls of the base schedule; the present sparsity stays, and a cool-down goes on."""
        now, start = self.controls, self.controller.state.limits.start
        return replace(start, sparsity=now.sparsity, finish=now.finish)

    def snapshotted(self) -> None:
        """Record that the owner has copied the run, after `decide` and before the controls were applied."""
        self._rollback_point = self._before
        self._since = self._since[-1:]
        self.guardrails.snapshot_taken()

    def snapshotted_here(self) -> bool:
        """Record a snapshot in the middle of an interval, where one is of use; return whether the owner is to take it.

        For a run that goes on from a file: its last snapshot was lost with its process.
        """
        decision = self.controller.decision
        if decision is None or not self.guardrails.needs_snapshot(KEEP):
            return False
        past = self.watch.past_state() if self.watch is not None else None
        self._before = RollbackPoint(tuple(self._seen), self.guardrails.past_state(), past)
        self._since = [decision.allowed]
        self.snapshotted()
        return True

    def rolled_back(self) -> Controls:
        """Record that the owner has restored its snapshot; return the controls to go on with, which are gentler.

        Raises:
            ValueError: there was no snapshot.
        """
        point = self._rollback_point
        if point is None:
            raise ValueError("rolled_back needs a snapshot; call snapshotted where decide asked for one")
        self._go_back(point)
        self.guardrails.rolled_back(self._since)
        unchanged = all(action == KEEP for action in self._since)
        chance = unchanged and self.guardrails.history.rollbacks == 1  # once more so
        self._since = []
        factor = 1.0 if chance else GENTLER
        least = max(LEARNING_RATE_SCALE_RANGE[0], self.guardrails.least_scale(self.controller.state.situation()))
        gentler = max(self.controls.learning_rate_scale * factor, min(least, self.controls.learning_rate_scale))
        reason = f"taken back: {self._rollbacks[-1]['reason']}" if self._rollbacks else "taken back"
        decision = Decision(KEEP, KEEP, self.controls, [reason])
        self._carry_out(decision, replace(self.controls, learning_rate_scale=gentler))
        return self.controls

    def _go_back(self, point: RollbackPoint) -> None:
        self._replay(list(point.seen))
        self.guardrails.load_past_state(point.guardrails)
        if self.watch is not None and point.contract is not None:
            self.watch.load_past_state(point.contract)

    def before_decision(self) -> dict[str, Any]:
        """Return what was known before the present decision, as plain JSON values, for `take_over`."""
        point = self._before
        assert point is not None, "a trial begins with a decision"
        return {"seen": list(point.seen), "guardrails": point.guardrails, "contract": point.contract}

    def take_over(self, point: Mapping[str, Any], shadow: Sequence[Telemetry]) -> list[DecisionRecord]:
        """Go back to `before_decision`, and from there on through the intervals of a shadow; return their records.

        The last one is still to be given to `decide`. The snapshot, which may be of what was left, is forgotten.
        """
        self._go_back(RollbackPoint(tuple(point["seen"]), point["guardrails"], point["contract"]))
        self._rollback_point, self.guardrails.past.since_snapshot = None, None
        records = []
        for telemetry in shadow:
            self._carry_out(Decision(KEEP, KEEP, self.controls, [LOST]), telemetry.requested)
            records.append(self.record(telemetry))
            if telemetry is not shadow[-1]:
                self._seen.append(len(self.records) - 1)
                self._judge(telemetry)
                self.controller.observe(telemetry)
        self._since = []
        return records

    def _replay(self, seen: list[int]) -> None:
        """Give the controller a new state that has made these decisions and observed these intervals."""
        self.controller = self.controller.repeated([self.records[place] for place in seen])
        self._seen = seen

    def record(self, telemetry: Telemetry, reward: RewardTerms | None = None) -> DecisionRecord:
        """Return the record of the last decision and the interval that followed it; call it once per interval."""
        record = self.controller.record(telemetry, reward)
        self.records.append(record)
        self._recorded = True
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state as plain JSON values. The snapshot belongs to the owner and is not in it."""
        return {"records": [record.to_json() for record in self.records], **self._standing()}

    def broadcast_state(self) -> dict[str, Any]:
        """Return the state after the last decision, for `load_broadcast`, with the newest record only."""
        last = self.records[-1].to_json() if self.records else None
        return {"n_records": len(self.records), "last": last, **self._standing()}

    def load_broadcast(self, state: Mapping[str, Any]) -> None:
        """Take the state of another controller, all of whose states so far were loaded; the policy is not called."""
        standing = SavedStanding.from_json({name: state[name] for name in SavedStanding.__dataclass_fields__})
        if state["last"] is not None:
            self.records[state["n_records"] - 1 :] = [DecisionRecord.from_json(state["last"])]
        seen = list(state["seen"])
        if seen and seen[:-1] == self._seen:
            self._seen = seen
            self.controller.observe(self.records[seen[-1]].telemetry)
        else:
            self._replay(seen)
        self._load_standing(standing)

    def _standing(self) -> dict[str, Any]:
        """Return the state without the records."""
        decision = self.controller.decision
        return {
            "seen": list(self._seen),
            "recorded": self._recorded,
            "decision": asdict(decision) if decision is not None else None,
            "guardrails": self.guardrails.state_dict(),
            "contract": self.watch.state_dict() if self.watch is not None else None,
            "fallen_back": [self.fallen_back, self.fallen_back_at],
            "failures": self._policy.failures,
            "refusals": dict(self._refusals),
            "rollbacks": list(self._rollbacks),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, limits: ControlLimits | None = None) -> None:
        """Go on where `state_dict` was called. Without a snapshot, the next decision asks for one.

        Args:
            state: From `state_dict`, or what JSON made of it.
            limits: Range of each control in this run; by default as before.

        Raises:
            ValueError: it is damaged, or no such state; nothing has changed then.
        """
        _check_length(state, (limits or self.controller.state.limits).decisions, self.guardrails.settings.max_rollbacks)
        saved = SavedController.from_json(state)
        controller = self.controller.repeated([saved.records[place] for place in saved.seen], limits)
        self.records, self._seen, self.controller = saved.records, saved.seen, controller
        self._load_standing(saved)

    def _load_standing(self, saved: SavedStanding) -> None:
        """Restore what `_standing` returned, where the controller knows its records."""
        self.controller.decision = None
        if saved.decision is not None:
            self.controller.decision = decision = saved.decision.decision()
            self.controller.state.apply(decision.allowed)
            self.controller.state.hold(decision.controls)
        self._recorded = saved.recorded
        self.guardrails.past, self.guardrails.history, self.guardrails.throughput = saved.guardrails.parts()
        self.guardrails.past.since_snapshot = None
        if self.watch is not None and saved.contract is not None:
            self.watch.load_state_dict(saved.contract.to_json())
        self.fallen_back, self.fallen_back_at = saved.fallen_back
        self._policy.failures = saved.failures
        self._refusals = Counter(saved.refusals)
        self._rollbacks = [each.to_json() for each in saved.rollbacks]
        self._before = self._rollback_point = None
        self._since = []

    def summary(self) -> dict[str, Any]:
        """Return what the guardrails did, as plain JSON values."""
        return {
            "rollbacks": list(self._rollbacks),
            "refusals": dict(self._refusals),
            "fallen_back": self.fallen_back,
            "fallen_back_at_decision": self.fallen_back_at,
            "contract": self.watch.summary() if self.watch is not None else None,
        }


def _check_length(state: Mapping[str, Any], decisions: int, max_rollbacks: int) -> None:
    """Raise `ValueError` for more records than a run can have, before each of them is checked.

    Every rollback takes back less than a run, and so do the trials of a paired contract.
    """
    records, most = state.get("records"), 2 * (max_rollbacks + 2) * decisions
    if isinstance(records, list | tuple) and len(records) > most:
        raise ValueError(f"records must be at most {most} for {decisions} decisions, got {len(records)}")


class RollbackController:
    """A guarded controller that copies and restores its plant itself, so that its decisions are controls alone.

    Args:
        guarded: Decides, and asks for snapshots and rollbacks.
        plant: The run that it controls.

    Raises:
        ValueError: the contract is paired, which only `Steering` can carry out.
    """

    def __init__(self, guarded: GuardedController, plant: Plant) -> None:
        if isinstance(guarded.watch, PairedWatch):
            raise ValueError(
                "contract must be without paired for a plant, got a paired one; steer a plain loop with it"
            )
        self.guarded = guarded
        self.plant = plant
        self.snapshot: Snapshot | None = None
        """The copy of the run that a rollback restores."""

    @property
    def can_roll_back(self) -> bool:
        """Whether a run that diverged now can be restored."""
        return self.guarded.can_roll_back

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the controls of the next interval, after a rollback where one is due.

        Args:
            telemetry: The last interval's, `None` before the first.
        """
        decision = self.guarded.decide(telemetry)
        if decision.roll_back and self.snapshot is not None:
            self.plant.restore(self.snapshot)
            return self.guarded.rolled_back()
        if decision.snapshot:
            self.snapshot = self.plant.snapshot()
            self.guarded.snapshotted()
        return decision.controls
