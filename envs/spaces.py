"""The spaces that every environment here has: actions, observations, and the reward vector."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from trainpilot.envs.action import N_CHOICES
from trainpilot.envs.decision_state import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.envs.reward import DIVERGED_QUALITY, MAX_QUALITY


def action_space() -> spaces.MultiDiscrete:
    """Return one choice per control."""
    return spaces.MultiDiscrete(list(N_CHOICES))


def observation_space() -> spaces.Box:
    """Return the stacked observation, in [-1, 1]."""
    return spaces.Box(-1.0, 1.0, (N_STACK * len(OBSERVATION_FIELDS),), np.float32)


def reward_space() -> spaces.Box:
    """Return the bounds of quality, energy and time in one interval."""
    low = np.array([DIVERGED_QUALITY - MAX_QUALITY, -np.inf, -np.inf], dtype=np.float32)
    high = np.array([MAX_QUALITY, 0.0, 0.0], dtype=np.float32)
    return spaces.Box(low, high, dtype=np.float32)
