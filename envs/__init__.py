"""The decision problem: observations, actions, rewards and the Gymnasium environments. Knows no SB3.

Importing this package registers `trainpilot/LiveTraining-v0` and `trainpilot/SimulatedTraining-v0`. The public names
below are imported at their first use; everything else is internal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gymnasium import register

from trainpilot.llm_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from trainpilot.envs.action import ACTION_FIELDS, KEEP, ActionField
    from trainpilot.envs.decision import Preference
    from trainpilot.envs.environments import LiveTraining, SimulatedTraining, VectorSimulatedTraining
    from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
    from trainpilot.envs.reward import UTILITIES, Reference, RewardTerms, ScalarReward

__all__ = [
    "ACTION_FIELDS",
    "KEEP",
    "OBSERVATION_FIELDS",
    "UTILITIES",
    "ActionField",
    "LiveTraining",
    "ObservationField",
    "Preference",
    "Reference",
    "RewardTerms",
    "ScalarReward",
    "SimulatedTraining",
    "VectorSimulatedTraining",
]

_NAMES = {
    "action": ["ACTION_FIELDS", "KEEP", "ActionField"],
    "decision": ["Preference"],
    "environments": ["LiveTraining", "SimulatedTraining", "VectorSimulatedTraining"],
    "observation": ["OBSERVATION_FIELDS", "ObservationField"],
    "reward": ["UTILITIES", "Reference", "RewardTerms", "ScalarReward"],
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _NAMES)

register(
    id="trainpilot/LiveTraining-v0",
    entry_point="trainpilot.envs.environments:LiveTraining",
    nondeterministic=True,  # it measures seconds and joules
    disable_env_checker=True,  # its reward is a vector, by MO-Gymnasium's convention
)
register(
    id="trainpilot/SimulatedTraining-v0",
    entry_point="trainpilot.envs.environments:SimulatedTraining",
    disable_env_checker=True,  # as above
)
