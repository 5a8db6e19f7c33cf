"""Guardrails: bounds on a policy's choices, and the rules for taking a run back.

`Guardrails.review` refuses choices that break a bound. `Guardrails.judge` says after each interval whether the run may
go on, must be rolled back, or is left to its base schedule. `LossLevel` is the recent level of a noisy training loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Literal

from trainpilot.agents.steering.course import Course
from trainpilot.agents.steering.throughput import Throughput
from trainpilot.envs.action import (
    ACTION_FIELDS,
    BATCH_FACTORS,
    FINISH_FROM,
    KEEP,
    LEARNING_RATE_FACTORS,
    Action,
    Situation,
)
from trainpilot.llm_runtime.plain_values import is_number
from trainpilot.llm_runtime.ranges import Range
from trainpilot.llm_runtime.schedules import neutral_factor
from trainpilot.llm_runtime.telemetry import Telemetry

SMOOTHING = 3
"""Intervals in a smoothed loss."""
LEVEL = 5
"""Intervals whose median loss is the recent level."""
WINDOW = 13
"""Intervals from which the swing of the losses is estimated."""
UNJUDGED = 0.5
"""A rise by this share of the level counts as a spike where the swing of the losses is unknown."""
MARGIN = 0.5
"""A new low must lie this many spreads below the lowest, or chance would set one now and then."""


@dataclass(kw_only=True)
class LossLevel:
    """Training losses of the newest intervals: their level, their spread and their lowest value."""

    losses: list[float] = field(default_factory=list)
    """Means of the intervals, in nats/token, newest last."""
    errors: list[float] = field(default_factory=list)
    """Their standard errors."""
    lowest: float | None = None
    """Lowest smoothed loss so far."""
    paid_scale: float = 1.0
    """Learning-rate scale under which the lowest loss was reached."""

    def take(self, loss: float, error: float, scale: float) -> bool:
        """Add an interval: its loss, the standard error and the learning-rate scale. Return whether it is a new low."""
        self.losses = [*self.losses, loss][-WINDOW:]
        self.errors = [*self.errors, error if math.isfinite(error) else 0.0][-WINDOW:]
        newest = self.losses[-SMOOTHING:]
        smoothed = sum(newest) / len(newest)
        if self.lowest is None or smoothed < self.lowest - MARGIN * self.spread():
            self.lowest, self.paid_scale = smoothed, scale
            return True
        return False

    def excess(self) -> float:
        """Return how many spreads the smoothed loss lies above its lowest."""
        newest = self.losses[-SMOOTHING:]
        if self.lowest is None or not newest:
            return 0.0
        return (sum(newest) / len(newest) - self.lowest) / max(self.spread(), 1e-12)

    def level(self) -> float | None:
        """Return the recent level; `None` before the first interval."""
        return median(self.losses[-LEVEL:]) if self.losses else None

    def spread(self) -> float:
        """Return how much losses differ by chance: their standard error or their swing, whichever is larger."""
        return max(median(self.errors), self._swing())

    def _swing(self) -> float:
        """Return the standard deviation that neighbouring losses show; 0 for fewer than four."""
        swings = [abs(after - before) for before, after in pairwise(self.losses)]
        return fmean(swings) * math.sqrt(math.pi) / 2 if len(swings) >= 3 else 0.0

    def rise(self, loss: float, spreads: float, share: float) -> float:
        """Return how far a loss lies above the level, over the larger of `spreads` spreads and `share` of the level."""
        level = self.level()
        if level is None:
            return 0.0
        if median(self.errors) > 0:
            least = max(spreads * self.spread(), share * abs(level))
        elif swing := self._swing():
            least = max(student(spreads, 0.7 * (len(self.losses) - 1)) * swing, share * abs(level))
        else:
            least = UNJUDGED * abs(level)
        return (loss - level) / max(least, 1e-12)


def student(spreads: float, degrees: float) -> float:
    """Return the standard deviations of equal probability where the deviation is estimated from few values.

    Student's t at the normal quantile's probability, by the first terms of its expansion (Abramowitz and Stegun 1964,
    26.7.5).
    """
    z = spreads
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


HEALTHY = 0.5
"""A loss that lies less than this part of a spike above its level is worth a snapshot."""
ROUNDED = 1.02
"""Opposite factors on the learning rate cancel within 1 %."""
BATCH = [each.name for each in ACTION_FIELDS].index("batch_size")
GROWN_BACK = "batch grown back"
"""How the reason begins for which a batch was raised that nobody asked for."""
MOVED = tuple(each.name for each in ACTION_FIELDS if each.keep > 0)
"""Controls that go both ways and so can oscillate; the others can change only a limited number of times."""
INSISTENCE = 3
"""So many requests in a row for a larger batch are heard although the batch is held after oscillating: a batch held at
its lower end would slow the run down, and one that goes up alone does not oscillate."""


@dataclass(frozen=True, kw_only=True)
class GuardrailSettings:
    """Bounds that hold for any policy."""

    learning_rate_range: tuple[float, float] | None = None
    """Bounds on the learning rate at the peak of the base schedule, scale and batch factor included; `None`: none."""
    batch_size_range: tuple[int, int] | None = None
    """Bounds on the batch in sequences, inside of what the run offers; `None`: none."""
    max_rise: float = 2.0
    """Largest factor on the learning-rate scale above the scale at which the smoothed loss last reached a new low.

    A falling loss raises this bound, so a start that is far too low is left quickly. A policy that always raises the
    learning rate stops a factor of 2 above the scale at which the run last learnt.
    """
    max_reversals: int = 3
    """After this many changes of direction within `oscillation_window` decisions, a control is held for as many."""
    oscillation_window: int = 8
    spike: float = 4.0
    """A training loss this many standard errors, and `spike_share` of the level, above the recent level is a spike."""
    spike_share: float = 0.05
    max_rollbacks: int = 3
    """After this many rollbacks the run goes on under the base schedule."""
    hold: int = 5
    """Number of decisions for which a change that led to a rollback is refused."""
    snapshot_every: int = 10
    """Largest number of decisions between two snapshots, which is what a rollback can cost."""
    finish_from: float = FINISH_FROM
    """No cool-down before this share of the budget; 1 for never."""
    cautious: bool = True
    """Whether curvature and losses must bear out a learning rate far from the starting one, a change of it that falls
    behind is taken back, and a run for quality alone does not end while its loss falls (`course.py`)."""
    throughput_floor: float = 0.85
    """No batch below the starting one that gives less than this share of the best tokens/s seen; 0 for no floor. Runs
    for quality alone under a budget in tokens have none, as clocks are hidden from them."""

    def __post_init__(self) -> None:
        _check_range("learning_rate_range", self.learning_rate_range)
        _check_range("batch_size_range", self.batch_size_range)
        for name, least in _LEAST.items():
            if not (is_number(getattr(self, name)) and getattr(self, name) >= least):
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        if not (is_number(self.finish_from) and 0 <= self.finish_from <= 1):
            raise ValueError(f"finish_from must be a share in [0, 1], got {self.finish_from!r}")
        Range(0, 1).check("throughput_floor", self.throughput_floor)
        if not isinstance(self.cautious, bool):
            raise ValueError(f"cautious must be True or False, got {self.cautious!r}")


_LEAST: Mapping[str, float] = {
    "max_rise": 1, "max_reversals": 1, "oscillation_window": 2, "spike": 1, "spike_share": 0,
    "max_rollbacks": 0, "hold": 1, "snapshot_every": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Whether the run goes on after an interval, and why not."""

    kind: Literal["go_on", "roll_back", "fall_back"]
    reason: str | None = None


@dataclass(kw_only=True)
class Past:
    """The run so far, as the guardrails know it. A rollback restores it together with the run."""

    moves: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in MOVED})
    """Direction of every decision: 1 up, -1 down, 0 none; newest last."""
    batch_requests: list[int] | None = field(default_factory=list)
    """The same of the newest requests for another batch, allowed or not; `None` in a run that began under a version
    which did not hear them, and goes on so."""
    held: dict[str, int] = field(default_factory=dict)
    """Controls that are held after oscillating, and for how many more decisions."""
    losses: LossLevel = field(default_factory=LossLevel)
    since_snapshot: int | None = None
    """Decisions since the last snapshot; `None` without one."""
    course: Course | None = None
    """How the run has learnt, for the rules against slow damage; `None` without them, as in a run that began under a
    version which did not have them."""


@dataclass(kw_only=True)
class RollbackHistory:
    """The rollbacks so far. A rollback does not restore this, or the same would happen again."""

    rollbacks: int = 0
    held: dict[str, int] = field(default_factory=dict)
    """Changes that led to a rollback, such as `learning_rate up`, and for how many more decisions they are refused."""
    corrections: int = 0
    """How often the learning rate was brought back."""
    ceiling: float = 64.0
    """Learning-rate scale above which the loss fell behind."""


class Guardrails:
    """Enforces the bounds on a policy in one run.

    Args:
        settings: The bounds.
        base_learning_rate: Peak of the base schedule; only `learning_rate_range` needs it.
    """

    def __init__(self, settings: GuardrailSettings | None = None, *, base_learning_rate: float | None = None) -> None:
        self.settings = settings or GuardrailSettings()
        self.base_learning_rate = base_learning_rate
        if (rates := self.settings.learning_rate_range) is not None:
            if base_learning_rate is None:
                raise ValueError("base_learning_rate must be given with learning_rate_range, got None")
            if base_learning_rate > rates[1] * (1 + 1e-9):
                raise ValueError(
                    f"learning_rate_range must hold the run's own learning rate, {base_learning_rate:g}, "
                    f"got {rates[0]:g} to {rates[1]:g}; raise its upper bound, or lower the rate"
                )
        self.past = Past(course=Course() if self.settings.cautious else None)
        self.history = RollbackHistory()
        self.throughput: Throughput | None = None
        """How fast each batch is, for the floor. `GuardedController` sets it unless the run is blind to clocks; `None`
        too in a run that began under a version which did not have it."""

    def review(self, action: Action, situation: Situation) -> tuple[Action, list[str]]:
        """Return the action with every choice that breaks a bound replaced by `keep`, and the reasons.

        A batch that has proven too slow grows whatever the action is.
        """
        allowed, refusals = list(KEEP), list[str]()
        insists = self._insists_on_a_larger_batch(action)
        if self.throughput is not None:
            self.throughput.begin(situation.limits)
        if grows := self._too_slow(situation):
            action = (*action[:BATCH], BATCH_FACTORS.index(2.0), *action[BATCH + 1 :])
            refusals.append(f"{GROWN_BACK} to {2 * situation.controls.batch_size}: {grows}")
            insists = True
        scale, batch_size = situation.controls.learning_rate_scale, situation.controls.batch_size
        for index, (each, choice) in enumerate(zip(ACTION_FIELDS, action, strict=True)):
            if choice == each.keep:
                continue
            to_scale = scale * LEARNING_RATE_FACTORS[choice] if each.name == "learning_rate" else scale
            to_batch = int(batch_size * BATCH_FACTORS[choice]) if each.name == "batch_size" else batch_size
            swings = not (insists and each.name == "batch_size")
            reason = self._held(each.name, choice, swings=swings) or self._leaves(situation, to_scale, to_batch)
            reason = reason or self._too_early_or_high(each.name, situation, to_scale)
            reason = reason or self._unpaid(each.name, situation, to_scale)
            if each.name == "batch_size":
                reason = reason or self._slow(situation, to_batch)
            if reason is None and swings and (reason := self._oscillates(each.name, choice)):
                self.past.held[each.name] = self.settings.oscillation_window + 1  # this decision counts down too
            if reason:
                refusals.append(f"{each.name} {each.choices[choice]} refused: {reason}")
            else:
                allowed[index], scale, batch_size = choice, to_scale, to_batch
        return tuple(allowed), refusals

    def _insists_on_a_larger_batch(self, action: Action) -> bool:
        """Record the request for another batch, and return whether it is the newest of enough for a larger one."""
        if self.past.batch_requests is None:
            return False
        self.past.batch_requests = [*self.past.batch_requests, _direction("batch_size", action[BATCH])][-INSISTENCE:]
        return sum(self.past.batch_requests) == INSISTENCE

    def _held(self, name: str, choice: int, *, swings: bool) -> str | None:
        if swings and self.past.held.get(name, 0):
            return f"held after {self.settings.max_reversals} changes of direction"
        if self.history.held.get(change_of(name, choice), 0):
            return "held after a rollback"
        return None

    def _leaves(self, situation: Situation, scale: float, batch_size: int) -> str | None:
        controls, sizes, rates = situation.controls, self.settings.batch_size_range, self.settings.learning_rate_range
        if sizes is not None and batch_size != controls.batch_size and not sizes[0] <= batch_size <= sizes[1]:
            return f"batch size would leave [{sizes[0]}, {sizes[1]}]"
        if rates is None or self.base_learning_rate is None:
            return None
        start = situation.limits.start.batch_size
        before = controls.learning_rate_scale * neutral_factor(controls.batch_size, start)
        after = scale * neutral_factor(batch_size, start)
        outside = self.base_learning_rate * after > rates[1] * (1 + 1e-9) and after > before
        outside |= self.base_learning_rate * after < rates[0] * (1 - 1e-9) and after < before
        return f"learning rate would leave [{rates[0]:g}, {rates[1]:g}]" if outside else None

    def _too_early_or_high(self, name: str, situation: Situation, scale: float) -> str | None:
        settings, past = self.settings, self.past
        if name == "finish" and situation.budget_used < settings.finish_from:
            return f"not before {settings.finish_from:.0%} of the budget"
        most = max(past.losses.paid_scale * settings.max_rise * ROUNDED, situation.controls.learning_rate_scale)
        if name == "learning_rate" and scale > most:
            return f"more than x{settings.max_rise:g} above where the loss last reached a new low"
        return None

    def _unpaid(self, name: str, situation: Situation, scale: float) -> str | None:
        """Return why a learning rate is refused that the losses speak against."""
        course, before = self.past.course, situation.controls.learning_rate_scale
        if name != "learning_rate" or course is None:
            return None
        if course.start_scale is None:
            course.start_scale = before
        if before > scale and scale < course.least() / ROUNDED:
            return f"less than x{course.least():.3g} while the loss still reaches new lows"
        batches = situation.controls.batch_size, situation.limits.start.batch_size
        if scale > before and (reason := course.too_high(scale / ROUNDED, *batches)):
            return reason
        if scale > before and scale > self.history.ceiling * ROUNDED:
            return f"more than x{self.history.ceiling:.3g}, above which the loss fell behind"
        return None

    def _slow(self, situation: Situation, batch_size: int) -> str | None:
        """Return why a smaller batch is refused that wastes the device's tokens/s."""
        floor = self.settings.throughput_floor
        return self.throughput.refuses(batch_size, situation, floor) if self.throughput is not None and floor else None

    def _too_slow(self, situation: Situation) -> str | None:
        """Return why the batch in force has to grow; `None` where it may stay."""
        floor = self.settings.throughput_floor
        return self.throughput.too_slow(situation, floor) if self.throughput is not None and floor else None

    def correction(self, situation: Situation) -> tuple[float, str] | None:
        """Return the learning-rate scale to go back to, and why; `None` where the policy may go on."""
        course = self.past.course
        return None if course is None else course.correction(situation.controls.learning_rate_scale)

    def corrected(self, before: float, scale: float) -> None:
        """Record that the run was brought from one learning-rate scale to another."""
        self.history.corrections += 1
        if scale < before:
            self.history.ceiling = min(self.history.ceiling, scale)
        if self.past.course is not None:
            if scale > before:
                self.past.course.floor = scale
            self.past.course.corrected(scale)

    def raised(self, scale: float) -> None:
        """Record that a contract brought the learning rate up to a scale, which is not on trial."""
        if self.past.course is not None:
            self.past.course.corrected(scale)

    def _oscillates(self, name: str, choice: int) -> str | None:
        settings = self.settings
        if name in MOVED and self._reversals(name, _direction(name, choice)) >= settings.max_reversals:
            return f"{settings.max_reversals} changes of direction in {settings.oscillation_window} decisions"
        return None

    def _reversals(self, name: str, next_one: int) -> int:
        recent = [*self.past.moves[name][1 - self.settings.oscillation_window :], next_one]
        moves = [move for move in recent if move]
        return sum(one != other for one, other in pairwise(moves))

    def least_scale(self, situation: Situation) -> float:
        """Return the lowest learning-rate scale allowed at the present batch size; 0 without a lower bound."""
        rates = self.settings.learning_rate_range
        if rates is None or self.base_learning_rate is None:
            return 0.0
        neutral = neutral_factor(situation.controls.batch_size, situation.limits.start.batch_size)
        return rates[0] / self.base_learning_rate / neutral

    def note(self, action: Action) -> None:
        """Record the action that is applied."""
        for each, choice in zip(ACTION_FIELDS, action, strict=True):
            if each.name in MOVED:
                moves = [*self.past.moves[each.name], _direction(each.name, choice)]
                self.past.moves[each.name] = moves[-self.settings.oscillation_window :]
        self.past.held = _counted_down(self.past.held)
        self.history.held = _counted_down(self.history.held)
        if self.past.since_snapshot is not None:
            self.past.since_snapshot += 1

    def needs_snapshot(self, action: Action) -> bool:
        """Return whether a snapshot should be taken before this action: it changes something, or the last one is old.

        While the loss rises no new snapshot is taken, and the one before serves.
        """
        if self.history.rollbacks > self.settings.max_rollbacks or not self.settings.max_rollbacks:
            return False
        since = self.past.since_snapshot
        if since is None:
            return True
        due = since + 1 >= self.settings.snapshot_every
        return (due or bool(changes_of(action))) and self._is_healthy()

    @property
    def rising(self) -> bool:
        """Whether the learning rate was raised in the last decisions."""
        return any(move > 0 for move in self.past.moves["learning_rate"])

    def snapshot_taken(self) -> None:
        """Record that the run was copied."""
        self.past.since_snapshot = 0

    def judge(self, telemetry: Telemetry) -> Verdict:
        """Record an interval, and return whether the run may go on from it."""
        if self.throughput is not None:
            self.throughput.take(telemetry)
        reason = self._fault(telemetry)
        if reason is None:
            return Verdict("go_on")
        can = self.past.since_snapshot is not None and self.history.rollbacks < self.settings.max_rollbacks
        return Verdict("roll_back" if can else "fall_back", reason)

    def _fault(self, telemetry: Telemetry) -> str | None:
        loss, past = telemetry.train_loss, self.past
        if is_lost(telemetry):
            return "training loss is not finite"
        if self.is_spike(loss):
            return f"training loss {loss:.3f} is a spike above {past.losses.level():.3f}"
        error = telemetry.train_loss_std / math.sqrt(max(telemetry.steps, 1))
        new_low = past.losses.take(loss, error, telemetry.requested.learning_rate_scale)
        if past.course is not None:
            self._follow(past.course, telemetry, new_low=new_low)
        return None

    def _follow(self, course: Course, telemetry: Telemetry, *, new_low: bool) -> None:
        controls, losses = telemetry.requested, self.past.losses
        scale = controls.learning_rate_scale
        course.take(
            loss=telemetry.train_loss,
            error=max(losses.spread(), 1e-4),
            tokens=telemetry.tokens - telemetry.interval_tokens / 2,
            scale=scale,
            rate=telemetry.learning_rate / scale / math.sqrt(controls.batch_size),
            used=telemetry.budget_used,
            new_low=new_low,
            excess=losses.excess(),
            bend=_bend(telemetry),
        )

    def is_spike(self, loss: float) -> bool:
        """Return whether a training loss lies so far above the recent level that the run may not go on from it."""
        return self._rise(loss) > 1

    def _rise(self, loss: float) -> float:
        """Return how far a loss lies above the recent level; a spike from 1 on."""
        return self.past.losses.rise(loss, self.settings.spike, self.settings.spike_share)

    def _is_healthy(self) -> bool:
        newest = self.past.losses.losses[-1:]
        return not newest or self._rise(newest[0]) <= HEALTHY

    def rolled_back(self, actions: Iterable[Action]) -> None:
        """Record that the run was restored to before `actions`: their changes are refused for a while."""
        self.history.rollbacks += 1
        for change in {"learning_rate up"}.union(*map(changes_of, actions)):
            self.history.held[change] = self.settings.hold + 1  # the decision after the rollback counts down too
        self.past.since_snapshot = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values; the rollback history has the key `scars`."""
        throughput = None if self.throughput is None else asdict(self.throughput)
        return {"past": self.past_state(), "scars": asdict(self.history), "throughput": throughput}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.load_past_state(state["past"])
        self.history = RollbackHistory(**deepcopy(dict(state["scars"])))
        self.throughput = None
        if (saved := state.get("throughput")) is not None:  # version 0.2 did not write it
            costs = {int(batch_size): cost for batch_size, cost in saved["costs"].items()}  # JSON's names are texts
            self.throughput = Throughput(**{**deepcopy(dict(saved)), "costs": costs})

    def past_state(self) -> dict[str, Any]:
        """Return the part of the state that a rollback restores, as plain JSON values."""
        return asdict(self.past)

    def load_past_state(self, state: Mapping[str, Any]) -> None:
        """Restore the part that `past_state` returned; the rollback history stays."""
        copied = {"batch_requests": None, "course": None, **deepcopy(dict(state))}
        course = None if copied["course"] is None else Course(**copied["course"])
        self.past = Past(**{**copied, "losses": LossLevel(**copied["losses"]), "course": course})


def is_lost(telemetry: Telemetry) -> bool:
    """Return whether the weights are useless: the loss is not finite."""
    return telemetry.diverged or not math.isfinite(telemetry.train_loss)


def _bend(telemetry: Telemetry) -> float | None:
    """Return what curvature adds to the loss along a step, as a share of it, over the learning rate squared.

    `None` without a probe.
    """
    if telemetry.probe_quadratic is None or not telemetry.learning_rate > 0:
        return None
    return telemetry.probe_quadratic / max(telemetry.train_loss, 1e-9) / telemetry.learning_rate**2


def change_of(name: str, choice: int) -> str:
    """Return the name of a change, such as `learning_rate up` or `pruning`."""
    if name not in MOVED:
        return name
    return f"{name} {'up' if _direction(name, choice) > 0 else 'down'}"


def changes_of(action: Action) -> set[str]:
    """Return the risky changes of an action: all changes but a lower learning rate."""
    pairs = zip(ACTION_FIELDS, action, strict=True)
    return {change_of(each.name, choice) for each, choice in pairs if choice != each.keep} - {"learning_rate down"}


def _direction(name: str, choice: int) -> int:
    keep = {each.name: each.keep for each in ACTION_FIELDS}[name]
    return (choice > keep) - (choice < keep)


def _counted_down(held: Mapping[str, int]) -> dict[str, int]:
    return {name: left - 1 for name, left in held.items() if left > 1}


def _check_range(name: str, bounds: tuple[float, float] | None) -> None:
    if bounds is None:
        return
    pair = isinstance(bounds, list | tuple) and len(bounds) == 2 and all(map(is_number, bounds))
    if not (pair and 0 < bounds[0] <= bounds[1]):
        raise ValueError(f"{name} must be two numbers above 0, the lower first, got {bounds!r}")


UNGUARDED = GuardrailSettings(max_rollbacks=0)
"""Without rollbacks, for a run under its base schedule: a rollback would lead to the same schedule again."""
