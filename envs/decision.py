"""The state of a run's decisions: preference, telemetry so far, controls in force, observation and action masks.

`DecisionStates` holds many runs as arrays; `DecisionState` is one of them, with reasons in words. The environments and
the controllers of live runs use the same two classes, so that a policy sees in a run what it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainpilot.envs.action import (
    KEEP,
    N_CHOICES,
    Action,
    Choices,
    Reasons,
    Situation,
    SituationBatch,
    action_masks,
    allow,
    allow_batch,
    decode_batch,
    mask_reasons,
)
from trainpilot.envs.history import RunHistory
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField, ObservationTable, RunView
from trainpilot.envs.prices import PriceBook
from trainpilot.llm_runtime.config import ControlLimits, Controls
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.simulator.records import (
    Bools,
    ControlBatch,
    Floats,
    Ints,
    LimitBatch,
    TelemetryBatch,
)
from trainpilot.llm_runtime.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Weights on the three objectives; only their ratios count."""

    quality: float = 0.7
    """Weight of the loss reached, as compute-equivalent."""
    energy: float = 0.15
    """Weight of joules, relative to the reference run."""
    time: float = 0.15
    """Weight of seconds, relative to the reference run."""

    def __post_init__(self) -> None:
        weights = {"quality": self.quality, "energy": self.energy, "time": self.time}
        for name, weight in weights.items():
            if not (np.isfinite(weight) and weight >= 0):
                raise ValueError(f"preference {name} must be a number >= 0, got {weight}")
        if sum(weights.values()) <= 0:
            raise ValueError(
                "preference must have one weight above 0, got only zeros; try quality=0.7,energy=0.15,time=0.15"
            )

    def weights(self) -> np.ndarray:
        """Return the weights (quality, energy, time), float64 of shape (3,), which sum to 1."""
        weights = np.array([self.quality, self.energy, self.time], dtype=np.float64)
        weights /= weights.sum()
        return weights

    @classmethod
    def parse(cls, text: str) -> Preference:
        """Read `quality=0.7,energy=0.2,time=0.1`; objectives that are not named have weight 0.

        Raises:
            ValueError: an unknown name, or a weight that is not a number.
        """
        weights: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            name = name.strip()
            if name not in ("quality", "energy", "time") or not equals:
                raise ValueError(f"preference must look like quality=0.7,energy=0.15,time=0.15, got {text!r}")
            if name in weights:
                raise ValueError(f"preference must weigh {name} once, got {text!r}")
            try:
                weights[name] = float(value)
            except ValueError:
                raise ValueError(f"preference {name} must be a number, got {value!r}") from None
        return cls(**{"quality": 0.0, "energy": 0.0, "time": 0.0} | weights)

    @classmethod
    def of(cls, preference: PreferenceLike) -> Preference:
        """Return a preference, also from its text, its weights by name, or its three weights in order.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(preference, Preference):
            return preference
        if isinstance(preference, str):
            return cls.parse(preference)
        names, weights = tuple(cls.__dataclass_fields__), {}
        if isinstance(preference, Mapping):
            weights = dict(preference)
        elif np.shape(preference) == (len(names),):
            weights = dict(zip(names, preference, strict=True))
        if not weights or set(weights) - set(names):
            raise ValueError(
                "preference must be text such as quality=0.7,energy=0.15,time=0.15, a mapping of these names, "
                f"or three weights in this order, got {preference!r}"
            )
        return cls(**{name: float(weights.get(name, 0.0)) for name in names})

    @classmethod
    def draw(cls, random: np.random.Generator) -> Preference:
        """Draw a preference for training, as `draw_weights` does."""
        quality, energy, time = draw_weights(random, 1)[0].tolist()
        return cls(quality=quality, energy=energy, time=time)

    def __str__(self) -> str:
        quality, energy, time = self.weights()
        return f"quality={quality:.3g},energy={energy:.3g},time={time:.3g}"


PreferenceLike = Preference | str | Mapping[str, float] | Sequence[float]
"""A preference, its text, its weights by name (those not named are 0), or the weights of quality, energy and time."""


def draw_weights(
    random: np.random.Generator, n_runs: int, least_quality: float = 0.5, quality_alone: float = 0.0
) -> Floats:
    """Draw preferences for training: quality weighs at least `least_quality`, energy and time share the rest at random.

    Args:
        random: Random numbers.
        n_runs: Number of preferences.
        least_quality: Least weight of quality.
        quality_alone: Share of the runs that are for quality alone, and so blind to clocks and meters.

    Returns:
        Weights of quality, energy and time, which sum to 1, shape (n_runs, 3).
    """
    quality = random.uniform(least_quality, 1.0, n_runs)
    if quality_alone:
        quality = np.where(random.random(n_runs) < quality_alone, 1.0, quality)
    energy = random.uniform(0.0, 1.0 - quality)
    return np.stack([quality, energy, 1.0 - quality - energy], axis=1)


def blind_to_clocks(limits: LimitBatch, preference: Floats) -> Bools:
    """Return which runs see no clock, no meter and no memory: those with a budget in tokens and for quality alone.

    Nothing that they are asked for depends on seconds or joules; without these they repeat to the last bit on a CPU.

    Args:
        limits: Control limits of the runs.
        preference: Weights of quality, energy and time, shape (n_runs, 3).
    """
    return np.asarray((preference[:, 1:] == 0).all(axis=1) & ~limits.measured_budget)


_LAST_CHOICES = np.array(N_CHOICES) - 1
N_STACK = 6
"""Number of stacked observations, the newest last."""


class DecisionStates:
    """Decision state of many runs (history, controls, observations, masks), as arrays with one row per run.

    Args:
        limits: Control limits of the runs.
        preference: Weights of quality, energy and time, which sum to 1, shape (n_runs, 3).
        fields: Observation fields that the policy sees, in its order.
        start_scale: Learning-rate scale in force before the first decision.
        finish: Whether a cool-down may be begun before the budget's end.
        begun_at: Share of the budget that was used before the first decision.
    """

    def __init__(
        self,
        limits: LimitBatch,
        preference: Floats,
        fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
        start_scale: float = 1.0,
        *,
        finish: bool = True,
        begun_at: float = 0.0,
    ) -> None:
        n_runs = len(limits.decisions)
        self.start_scale, self.may_finish = start_scale, finish
        self.table = ObservationTable(fields)
        self.blind: Bools = blind_to_clocks(limits, preference)
        """Runs that see no clock and no meter."""
        self.limits = limits.untimed(self.blind)
        self.preference = preference
        self.controls = limits.start
        if start_scale != 1.0:
            self.controls = replace(limits.start, learning_rate_scale=np.full(n_runs, start_scale))
        groups = {field.group for field in fields}
        self.history = RunHistory(n_runs, summarised="history" in groups, begun_at=begun_at)
        self.prices = PriceBook(self.limits) if "prices" in groups else None
        self.precision_switches: Ints = np.zeros(n_runs, dtype=np.int64)
        self.last_action: Ints = np.tile(KEEP, (n_runs, 1))
        self.newest: Floats = self._encode()
        """Newest observation, shape (n_runs, n_fields)."""
        self._stack = _first_stack(self.newest)
        self._masks: Bools | None = None

    def begin(self, rows: Ints, limits: LimitBatch, preference: Floats) -> None:
        """Begin new runs in these rows; `limits` is of all runs, `preference` of the new ones."""
        fresh = DecisionStates(limits.take(rows), preference, self.table.fields, self.start_scale)
        self.preference = self.preference.copy()
        self.preference[rows] = preference
        self.blind = blind_to_clocks(limits, self.preference)
        self.limits = limits.untimed(self.blind)
        self.controls = self.controls.copy()
        self.controls.put(rows, fresh.controls)
        self.history.reset(rows)
        if self.prices is not None:
            self.prices.begin(rows, limits.take(rows))
        self.precision_switches[rows] = 0
        self.last_action[rows] = KEEP
        self.newest[rows] = fresh.newest
        self._stack = self._stack.copy()  # observations that were returned must not change
        self._stack[rows] = fresh._stack
        self._masks = None

    def observe(self, telemetry: TelemetryBatch, *, seen: bool = True) -> None:
        """Add the interval that has just ended, of every run, to the history.

        Args:
            telemetry: What was measured.
            seen: Whether any decision to come sees the observation after this interval; else it is not computed.
        """
        self.history.observe(telemetry, self.controls)
        if self.prices is not None:
            self.prices.observe(telemetry)
        self._masks = None
        if not seen:
            return
        self.newest = self._encode()
        width, before = len(self.table), self._stack
        self._stack = np.empty_like(before)
        self._stack[:, :-width] = before[:, width:]
        self._stack[:, -width:] = self.newest

    def observation(self) -> NDArray[np.float32]:
        """Return the stacked observations, float32 of shape (n_runs, N_STACK * n_fields), newest last."""
        return self._stack

    def action_masks(self) -> Bools:
        """Return which choices are allowed, shape (n_runs, sum of choices), field after field."""
        if self._masks is None:
            self._masks = action_masks(self.situation())
        return self._masks

    def situation(self) -> SituationBatch:
        """Return the state on which the mask rules depend."""
        return SituationBatch(
            limits=self.limits,
            controls=self.controls,
            budget_used=self.history.budget_used,
            precision_switches=self.precision_switches,
            may_finish=np.full(len(self.precision_switches), self.may_finish),
        )

    def decide(self, actions: Ints) -> ControlBatch:
        """Apply the allowed part of `actions`, shape (n_runs, number of fields), and return the controls.

        Raises:
            ValueError: a choice does not exist. The state is unchanged then.
        """
        return self.apply(allow_batch(actions, self.action_masks()))

    def apply(self, allowed: Ints) -> ControlBatch:
        """Apply actions returned by `allow` or `allow_batch`, and return the controls."""
        self.last_action = allowed
        self.hold(decode_batch(allowed, self.controls))
        return self.controls

    def hold(self, controls: ControlBatch) -> None:
        """Put `controls` in force, whatever the last action was."""
        self.precision_switches = self.precision_switches + (controls.precision != self.controls.precision)
        self.controls = controls
        self._masks = None

    def _encode(self) -> Floats:
        view = RunView(
            history=self.history,
            prices=self.prices,
            limits=self.limits,
            controls=self.controls,
            precision_switches=self.precision_switches,
            last_action=self.last_action / _LAST_CHOICES,
            preference=self.preference,
        )
        return self.table.blinded(self.table.encode(view), self.blind)


def _first_stack(first: Floats) -> NDArray[np.float32]:
    """Return stacks filled with the first observation."""
    return np.tile(first.astype(np.float32), (1, N_STACK))


@dataclass(frozen=True, kw_only=True)
class Advice(JsonRecord):
    """What a policy would do that may only advise. Nothing of it is carried out."""

    action: Action
    """The policy's action after masks and guardrails; every refused choice is "keep"."""
    controls: Controls
    """The controls that this action would make of those in force."""


@dataclass(frozen=True)
class Decision:
    """The requested action, and the allowed part of it."""

    requested: Action
    allowed: Action
    controls: Controls
    refusals: list[str]
    """Masked choices with their reasons."""
    advice: Advice | None = None
    """What would have been done, where the policy only advises."""


class DecisionState:
    """Decision state of one run: a row of `DecisionStates`, with the reasons of masks in words."""

    def __init__(
        self,
        limits: ControlLimits,
        preference: Preference,
        fields: Sequence[ObservationField] = OBSERVATION_FIELDS,
        start_scale: float = 1.0,
        *,
        finish: bool = True,
        begun_at: float = 0.0,
    ) -> None:
        weights, batch = preference.weights()[None], LimitBatch.of([limits])
        self._states = DecisionStates(batch, weights, fields, start_scale, finish=finish, begun_at=begun_at)
        self.limits = limits.untimed() if self.blind else limits
        self.preference = preference
        self.telemetry: list[Telemetry] = []

    def anew(self, start_scale: float | None = None, limits: ControlLimits | None = None) -> DecisionState:
        """Return the state of the same run before its first decision, with another scale or limits if given."""
        states = self._states
        scale = states.start_scale if start_scale is None else start_scale
        options: dict[str, Any] = {"finish": states.may_finish, "begun_at": states.history.begun_at}
        return DecisionState(limits or self.limits, self.preference, states.table.fields, scale, **options)

    @property
    def blind(self) -> bool:
        """Whether the run sees no clock, no meter and no memory."""
        return bool(self._states.blind[0])

    @property
    def start_scale(self) -> float:
        """Learning-rate scale in force before the first decision."""
        return self._states.start_scale

    @property
    def controls(self) -> Controls:
        """Controls in force."""
        return self._states.controls.row(0)

    @property
    def precision_switches(self) -> int:
        """Switches of precision made so far."""
        return int(self._states.precision_switches[0])

    @property
    def last_action(self) -> Action:
        """The allowed part of the last action."""
        return tuple(self._states.last_action[0].tolist())

    def observe(self, telemetry: Telemetry) -> None:
        """Add the interval that has just ended to the history."""
        self.telemetry.append(telemetry)
        self._states.observe(TelemetryBatch.of([telemetry]))

    def repeat(self, past: Sequence[tuple[Action, Telemetry]]) -> None:
        """Go through intervals that have been, each an action that was applied and what was measured after it.

        It comes out as `apply`, `hold` and `observe` one by one would, in a fraction of the time: observations that the
        stack no longer holds are not computed.
        """
        if not past:
            return
        actions = np.array([action for action, _ in past])
        measured = TelemetryBatch.of([telemetry for _, telemetry in past])
        for index, (_, telemetry) in enumerate(past):
            self._states.apply(actions[index : index + 1])
            self.hold(telemetry.requested)
            self._states.observe(measured.take(np.array([index])), seen=index >= len(past) - N_STACK)
            self.telemetry.append(telemetry)

    def observation(self) -> np.ndarray:
        """Return the stacked observation, float32 of shape (N_STACK * n_fields,), in [-1, 1], newest last."""
        observation: np.ndarray = self._states.observation()[0]
        return observation

    def fields(self) -> dict[str, float]:
        """Return the newest observation by field name, scaled."""
        return dict(zip(self._states.table.names, self._states.newest[0].tolist(), strict=True))

    def mask_reasons(self) -> Reasons:
        """Return why each choice is masked now."""
        return mask_reasons(self.situation(), self._states.situation())

    def situation(self) -> Situation:
        """Return the state on which the mask rules depend."""
        return Situation(
            limits=self.limits,
            controls=self.controls,
            budget_used=self.telemetry[-1].budget_used if self.telemetry else self._states.history.begun_at,
            precision_switches=self.precision_switches,
            may_finish=self._states.may_finish,
        )

    def action_masks(self) -> np.ndarray:
        """Return which choices are allowed, bool of shape (sum of choices,), field after field."""
        masks: np.ndarray = self._states.action_masks()[0]
        return masks

    def decide(self, action: Choices) -> Decision:
        """Apply the allowed part of `action`. Raises `ValueError` for a choice that does not exist."""
        requested = tuple(int(choice) for choice in action)
        (row,) = allow_batch(np.array([requested]), self._states.action_masks())
        allowed: Action = tuple(row.tolist())
        refusals: list[str] = []
        if allowed != requested:  # words are looked for where they are needed
            _, refusals = allow(requested, self.mask_reasons())
        self.apply(allowed)
        return Decision(requested, allowed, self.controls, refusals)

    def apply(self, allowed: Action) -> None:
        """Apply an action returned by `allow`."""
        self._states.apply(np.array([allowed]))

    def after(self, allowed: Action) -> Controls:
        """Return the controls that an action returned by `allow` would lead to. Nothing changes."""
        return decode_batch(np.array([allowed]), self._states.controls).row(0)

    def hold(self, controls: Controls) -> None:
        """Put controls in force that no action results in: those of a rollback, or of the base schedule."""
        if controls != self.controls:
            self._states.hold(ControlBatch.of([controls]))
