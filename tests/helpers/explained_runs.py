"""A policy whose logits can be added up by hand, and decisions of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from decision_records import decision_record
from policies import N_CHOICES

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import DecisionRecord
from trainpilot.envs.action import ACTION_FIELDS, FIRST_CHOICES
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS

FIELDS = tuple(field.name for field in OBSERVATION_FIELDS)
N_FIELDS = len(FIELDS)
KEEP_RATE, DOUBLE_RATE = 3, 6
KEEP_BATCH = FIRST_CHOICES[1] + 1
HALF, KEPT, DOUBLE = 0, 1, 2
NOISE, CURVATURE = FIELDS.index("noise_scale"), FIELDS.index("curvature")


def planted() -> PolicyBundle:
    """Return a policy without hidden layers: logits are sums of inputs that can be added up by hand.

    The newest noise scale and the one before it speak for a doubled batch, three times and once; the newest curvature
    speaks for a doubled learning rate, five times.
    """
    weight = np.zeros((N_CHOICES, N_STACK * N_FIELDS), np.float32)
    newest, before = (N_STACK - 1) * N_FIELDS, (N_STACK - 2) * N_FIELDS
    weight[FIRST_CHOICES[1] + DOUBLE, newest + NOISE] = 3
    weight[FIRST_CHOICES[1] + DOUBLE, before + NOISE] = 1
    weight[DOUBLE_RATE, newest + CURVATURE] = 5
    bias = np.zeros(N_CHOICES, np.float32)
    bias[[KEEP_RATE, KEEP_BATCH, FIRST_CHOICES[2], FIRST_CHOICES[3], FIRST_CHOICES[4]]] = 1
    return PolicyBundle({"action.weight": weight, "action.bias": bias})


def seen(decision: int, *, masked: dict[str, str] | None = None, **fields: float) -> DecisionRecord:
    record = decision_record(decision, masked=masked or {})
    return replace(record, observation={name: fields.get(name, 0.5) for name in FIELDS})


def steered(records: list[DecisionRecord], bundle: PolicyBundle) -> list[DecisionRecord]:
    """Return the records with what the policy asks for, worked out with a stack of its own."""
    newest = [np.array([record.observation[name] for name in FIELDS]) for record in records]
    taken = []
    for index, record in enumerate(records):
        stack = np.concatenate([newest[max(index - back, 0)] for back in range(N_STACK - 1, -1, -1)])
        allowed = [f"{field.name} {choice}" not in record.masked for field in ACTION_FIELDS for choice in field.choices]
        action = bundle.act(stack, np.array(allowed))
        taken.append(replace(record, requested=action, allowed=action))
    return taken


NOISE_BY_DECISION = (0.0, 0.0, 0.9, 0.3)
