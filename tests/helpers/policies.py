"""Policies made by hand, as bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS


def zigzag_bundle(path: Path, **provenance: Any) -> None:
    """Write a policy that moves all it can, from inputs that repeat exactly: no seconds, joules or memory."""
    random = np.random.default_rng(5)
    noisy = {"throughput", "energy_per_token", "power", "memory"}
    weight = random.normal(0, 2, (16, N_STACK * len(OBSERVATION_FIELDS))).astype(np.float32)
    for stack in range(N_STACK):
        for index, field in enumerate(OBSERVATION_FIELDS):
            if field.name in noisy:
                weight[:, stack * len(OBSERVATION_FIELDS) + index] = 0
    n_choices = sum(len(field.choices) for field in ACTION_FIELDS)
    action = random.normal(0, 1, (n_choices, 16)).astype(np.float32)
    bias = np.zeros(n_choices, np.float32)
    bias[-1] = -100  # never finish early
    weights = {"hidden.0.weight": weight, "hidden.0.bias": np.zeros(16, np.float32)}
    PolicyBundle({**weights, "action.weight": action, "action.bias": bias}, {"decisions": 20, **provenance}).save(path)
