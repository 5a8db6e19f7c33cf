"""Explain decisions: what the policy would have preferred, had it not known one field of the observation.

Ablation, without gradients: a field is replaced by its mean over the run, in all stacked observations at once. How far
the log-odds of the choice against its best rival fall, is what the field's value did for the choice. A field that never
changed did nothing that this can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import DecisionRecord
from trainpilot.envs.action import ACTION_FIELDS, FIRST_CHOICES, split_choices
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS

FIELDS = tuple(field.name for field in OBSERVATION_FIELDS)
CONTROLS = tuple(field.name for field in ACTION_FIELDS)
ROUNDING = 1e-3
"""Log-odds that come from the order of float32 sums, at most."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """What one field's value did for one choice."""

    field: str
    value: float
    """In the field's own unit, clipped to its range; the middle of the range where it was unknown."""
    mean: float
    """Over the run, in the same unit."""
    effect: float
    """Log-odds of the choice against its best rival, less those with the field at its mean; positive: for it."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What moved each decision of a run. Rows are decisions; D decisions, A controls, F fields."""

    observations: np.ndarray
    """Newest observation at each decision, scaled, float64 of shape (D, F)."""
    choices: np.ndarray
    """What was asked for, int of shape (D, A)."""
    rivals: np.ndarray
    """The best other allowed choice, int of shape (D, A); -1 where there was no other."""
    log_odds: np.ndarray
    """Of the choice against its rival, float64 of shape (D, A); nan where there was none."""
    effects: np.ndarray
    """What each field did, float64 of shape (D, A, F); nan where there was no rival."""

    @property
    def n_repeated(self) -> int:
        """Decisions that the policy would take again; fewer than all mean that another policy took them."""
        return int((~(self.log_odds < -ROUNDING)).all(axis=1).sum())

    def pushes(self, decision: int, control: str, n: int) -> list[Push]:
        """Return the `n` fields that did most for or against a choice, the strongest first; none without a rival."""
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
        field, column = OBSERVATION_FIELDS[index], self.observations[:, index]
        value, mean = (field.low + (x + 1) / 2 * (field.high - field.low) for x in (column[decision], column.mean()))
        return Push(field=field.name, value=float(value), mean=float(mean), effect=effect)

    def importance(self) -> dict[str, dict[str, float]]:
        """Return each field's mean absolute effect by control, over the decisions in which the control was free."""
        table = {}
        for index, control in enumerate(CONTROLS):
            free = self.effects[self.rivals[:, index] >= 0, index]
            if len(free):
                table[control] = dict(zip(FIELDS, np.abs(free).mean(axis=0).tolist(), strict=True))
        return table


def explain(bundle: PolicyBundle, records: Sequence[DecisionRecord]) -> Explanation:
    """Return what moved the decisions of one whole run, from its first on.

    Raises:
        ValueError: there are no decisions, or their observations have other fields than this version's.
    """
    newest = _newest(records)
    stacks = _stacks(newest)
    choices = np.array([record.requested for record in records])
    logits = bundle.logits(stacks.reshape(len(stacks), -1))
    rivals = _rivals(logits, choices, np.array([_allowed(record) for record in records]))
    odds = _log_odds(logits, choices, rivals)
    without = _log_odds(bundle.logits(_ablated(stacks)), choices[:, None], rivals[:, None])  # (D, F, A)
    return Explanation(
        observations=newest,
        choices=choices,
        rivals=rivals,
        log_odds=odds,
        effects=odds[:, :, None] - without.transpose(0, 2, 1),
    )


def input_shares(bundle: PolicyBundle) -> dict[str, float]:
    """Return each field's share of the first layer: the norm of its weights over the sum of all, largest first."""
    first = bundle.weights["hidden.0.weight" if "hidden.0.weight" in bundle.weights else "action.weight"]
    norms = np.sqrt(np.square(first.reshape(len(first), N_STACK, len(FIELDS)), dtype=np.float64).sum(axis=(0, 1)))
    shares = dict(zip(FIELDS, (norms / max(norms.sum(), 1e-30)).tolist(), strict=True))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _newest(records: Sequence[DecisionRecord]) -> np.ndarray:
    if not records:
        raise ValueError("records must hold at least one decision, got none")
    for record in records:
        if set(record.observation) != set(FIELDS):
            differing = ", ".join(sorted(set(record.observation) ^ set(FIELDS)))
            raise ValueError(f"records must have this version's observation fields, got a difference in {differing}")
    return np.array([[record.observation[name] for name in FIELDS] for record in records])


def _stacks(newest: np.ndarray) -> np.ndarray:
    """Return what the policy saw, of shape (D, N_STACK, F): the first observation stands for those before it."""
    before = np.arange(len(newest))[:, None] + np.arange(1 - N_STACK, 1)
    return np.asarray(newest[np.maximum(before, 0)])


def _ablated(stacks: np.ndarray) -> np.ndarray:
    """Return the stacks with each field in turn at its mean over the run, of shape (D, F, N_STACK * F)."""
    n, n_fields = len(stacks), stacks.shape[-1]
    means = stacks[:, -1].mean(axis=0)
    ablated = np.repeat(stacks[:, None], n_fields, axis=1)
    for index in range(n_fields):
        ablated[:, index, :, index] = means[index]
    return ablated.reshape(n, n_fields, -1)


def _allowed(record: DecisionRecord) -> list[bool]:
    return [f"{field.name} {choice}" not in record.masked for field in ACTION_FIELDS for choice in field.choices]


def _rivals(logits: np.ndarray, choices: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return the likeliest allowed choice beside the one taken, of shape (D, A); -1 where there is none."""
    rows = np.arange(len(logits))
    best = []
    for index, part in enumerate(split_choices(np.where(allowed, logits, -np.inf))):
        others = part.copy()
        others[rows, choices[:, index]] = -np.inf
        best.append(np.where(np.isfinite(others.max(axis=1)), others.argmax(axis=1), -1))
    return np.stack(best, axis=1)


def _log_odds(logits: np.ndarray, choices: np.ndarray, rivals: np.ndarray) -> np.ndarray:
    """Return the log-odds of the choices against their rivals, of shape (..., A); nan where there is no rival."""
    shape = (*logits.shape[:-1], len(CONTROLS))
    taken = np.take_along_axis(logits, np.broadcast_to(FIRST_CHOICES + choices, shape), axis=-1)
    other = np.take_along_axis(logits, np.broadcast_to(FIRST_CHOICES + np.maximum(rivals, 0), shape), axis=-1)
    return np.where(rivals >= 0, taken.astype(np.float64) - other, np.nan)
