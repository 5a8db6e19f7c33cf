"""Explain a policy's decisions by ablating one observation field at a time.

A field is replaced by its mean over the run, in all stacked observations at once. Its effect on a decision is how far
the log-odds of the chosen action against the best alternative fall. No gradients are used. A field that is constant
over the run has no effect by this measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import DecisionRecord
from trainpilot.envs.action import ACTION_FIELDS, FIRST_CHOICES, split_choices
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import ObservationField

CONTROLS = tuple(field.name for field in ACTION_FIELDS)
AT_ONCE = 512
"""Decisions that are computed at once: every field of each is replaced in a copy of all of them."""
ROUNDING = 1e-3
"""Effects below this log-odds difference may come from the summation order in float32."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """Effect of one field's value on one choice."""

    field: str
    value: float
    """Value in the field's own unit, clipped to its range; the middle of the range if it was unknown."""
    mean: float
    """Mean over the run, in the same unit."""
    effect: float
    """Log-odds of the choice against its best rival minus the same with the field at its mean; positive favours it."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Effects of all fields on all decisions of a run, as arrays over D decisions, A controls and F fields."""

    fields: tuple[ObservationField, ...]
    """Observation fields that the policy sees."""
    observations: np.ndarray
    """Newest observation at each decision, scaled, float64 of shape (D, F)."""
    choices: np.ndarray
    """Requested choices, int of shape (D, A)."""
    rivals: np.ndarray
    """The likeliest other allowed choice, int of shape (D, A); -1 if no other choice was allowed."""
    log_odds: np.ndarray
    """Log-odds of the choice against its rival, float64 of shape (D, A); nan without a rival."""
    effects: np.ndarray
    """Effect of each field, float64 of shape (D, A, F); nan without a rival."""

    @property
    def n_repeated(self) -> int:
        """Number of decisions that this policy reproduces; if some differ, another policy took them."""
        return int((~(self.log_odds < -ROUNDING)).all(axis=1).sum())

    def pushes(self, decision: int, control: str, n: int) -> list[Push]:
        """Return the `n` fields with the largest effect on a choice, the strongest first; none without a rival."""
        effects = self.effects[decision, CONTROLS.index(control)]
        if np.isnan(effects).any():
            return []
        strongest = np.argsort(-np.abs(effects), kind="stable")[:n]
        return [
            self._push(decision, int(index), float(effects[index]))
            for index in strongest
            if abs(effects[index]) > ROUNDING
        ]

    def _push(self, decision: int, index: int, effect: float) -> Push:
        field, column = self.fields[index], self.observations[:, index]
        value, mean = (field.low + (x + 1) / 2 * (field.high - field.low) for x in (column[decision], column.mean()))
        return Push(field=field.name, value=float(value), mean=float(mean), effect=effect)

    def importance(self) -> dict[str, dict[str, float]]:
        """Return each field's mean absolute effect by control, over the decisions with more than one allowed choice."""
        table = {}
        for index, control in enumerate(CONTROLS):
            free = self.effects[self.rivals[:, index] >= 0, index]
            if len(free):
                table[control] = dict(zip(names_of(self.fields), np.abs(free).mean(axis=0).tolist(), strict=True))
        return table


def explain(bundle: PolicyBundle, records: Sequence[DecisionRecord]) -> Explanation:
    """Compute the effects of all observation fields on the decisions of one complete run.

    Raises:
        ValueError: `records` is empty, or the observations do not have the fields of the policy.
    """
    newest = _newest(records, names_of(bundle.fields))
    stacks = _stacks(newest)
    choices = np.array([record.requested for record in records])
    logits = bundle.logits(stacks.reshape(len(stacks), -1))
    rivals = _rivals(logits, choices, np.array([_allowed(record) for record in records]))
    odds = _log_odds(logits, choices, rivals)
    means = stacks[:, -1].mean(axis=0)
    parts = [slice(begin, begin + AT_ONCE) for begin in range(0, len(stacks), AT_ONCE)]
    without = np.concatenate(
        [
            _log_odds(bundle.logits(_ablated(stacks[part], means)), choices[part, None], rivals[part, None])
            for part in parts
        ]
    )  # (D, F, A)
    return Explanation(
        fields=bundle.fields,
        observations=newest,
        choices=choices,
        rivals=rivals,
        log_odds=odds,
        effects=odds[:, :, None] - without.transpose(0, 2, 1),
    )


def input_shares(bundle: PolicyBundle) -> dict[str, float]:
    """Return the norm of each field's weights in the first layer over the sum of all norms, largest first."""
    first = bundle.weights["hidden.0.weight" if "hidden.0.weight" in bundle.weights else "action.weight"]
    names = names_of(bundle.fields)
    norms = np.sqrt(np.square(first.reshape(len(first), N_STACK, len(names)), dtype=np.float64).sum(axis=(0, 1)))
    shares = dict(zip(names, (norms / max(norms.sum(), 1e-30)).tolist(), strict=True))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def names_of(fields: Sequence[ObservationField]) -> tuple[str, ...]:
    """Return the names of observation fields."""
    return tuple(field.name for field in fields)


def _newest(records: Sequence[DecisionRecord], names: Sequence[str]) -> np.ndarray:
    if not records:
        raise ValueError("records must hold at least one decision, got none")
    for record in records:
        if differing := ", ".join(sorted(set(record.observation) ^ set(names))):
            raise ValueError(f"records must have the policy's observation fields, got a difference in {differing}")
    return np.array([[record.observation[name] for name in names] for record in records])


def _stacks(newest: np.ndarray) -> np.ndarray:
    """Return the stacked observations, of shape (D, N_STACK, F), padded at the start with the first observation."""
    before = np.arange(len(newest))[:, None] + np.arange(1 - N_STACK, 1)
    return np.asarray(newest[np.maximum(before, 0)])


def _ablated(stacks: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Return the stacks with each field in turn replaced by its mean over the run, of shape (D, F, N_STACK * F)."""
    n, n_fields = len(stacks), stacks.shape[-1]
    ablated = np.repeat(stacks[:, None], n_fields, axis=1)
    for index in range(n_fields):
        ablated[:, index, :, index] = means[index]
    return ablated.reshape(n, n_fields, -1)


def _allowed(record: DecisionRecord) -> list[bool]:
    return [f"{field.name} {choice}" not in record.masked for field in ACTION_FIELDS for choice in field.choices]


def _rivals(logits: np.ndarray, choices: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return the likeliest allowed choice other than the one taken, of shape (D, A); -1 if there is none."""
    rows = np.arange(len(logits))
    best = []
    for index, part in enumerate(split_choices(np.where(allowed, logits, -np.inf))):
        others = part.copy()
        others[rows, choices[:, index]] = -np.inf
        best.append(np.where(np.isfinite(others.max(axis=1)), others.argmax(axis=1), -1))
    return np.stack(best, axis=1)


def _log_odds(logits: np.ndarray, choices: np.ndarray, rivals: np.ndarray) -> np.ndarray:
    """Return the log-odds of the choices against their rivals, of shape (..., A); nan without a rival."""
    shape = (*logits.shape[:-1], len(CONTROLS))
    taken = np.take_along_axis(logits, np.broadcast_to(FIRST_CHOICES + choices, shape), axis=-1)
    other = np.take_along_axis(logits, np.broadcast_to(FIRST_CHOICES + np.maximum(rivals, 0), shape), axis=-1)
    return np.where(rivals >= 0, taken.astype(np.float64) - other, np.nan)
