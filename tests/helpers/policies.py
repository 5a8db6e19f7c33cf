"""Policies made by hand, as bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS, fields_of

N_INPUTS = N_STACK * len(OBSERVATION_FIELDS)
N_CHOICES = sum(len(field.choices) for field in ACTION_FIELDS)


def zigzag_bundle(path: Path, **provenance: Any) -> None:
    """Write a policy that moves all it can, from inputs that repeat exactly: no seconds, joules or memory."""
    random = np.random.default_rng(5)
    fields = fields_of(("basic",))
    metered = np.tile([field.metered for field in fields], N_STACK)
    weight = np.where(metered, 0, random.normal(0, 2, (16, N_STACK * len(fields)))).astype(np.float32)
    action = random.normal(0, 1, (N_CHOICES, 16)).astype(np.float32)
    bias = np.zeros(N_CHOICES, np.float32)
    bias[-1] = -100  # never finish early
    weights = {"hidden.0.weight": weight, "hidden.0.bias": np.zeros(16, np.float32)}
    weights |= {"action.weight": action, "action.bias": bias}
    PolicyBundle(weights, {"decisions": 20, **provenance}, fields).save(path)


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Return a network of eight hidden units; no action is likelier than another by design."""
    random = np.random.default_rng(seed)
    return {
        "hidden.0.weight": random.normal(size=(8, N_INPUTS)).astype(np.float32),
        "hidden.0.bias": random.normal(size=8).astype(np.float32),
        "action.weight": random.normal(size=(N_CHOICES, 8)).astype(np.float32),
        "action.bias": random.normal(size=N_CHOICES).astype(np.float32),
    }
