"""The decision problem: observations, actions, rewards and the Gymnasium environments. Knows no SB3.

Importing this package registers `trainpilot/LiveTraining-v0` and `trainpilot/SimulatedTraining-v0`, whose rewards are
vectors, and with scalar rewards `trainpilot/LiveTraining-Scalar-v0` and `trainpilot/SimulatedTraining-Scalar-v0`. The
public names below are imported at their first use; everything else is internal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gymnasium import register

from trainpilot.llm_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from trainpilot.envs.action import ACTION_FIELDS, KEEP, ActionField
    from trainpilot.envs.decision import Preference
    from trainpilot.envs.discrete import OneControl
    from trainpilot.envs.environments import LiveTraining, SimulatedTraining
    from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
    from trainpilot.envs.reward import UTILITIES, Reference, RewardTerms, ScalarReward
    from trainpilot.envs.vector import VectorSimulatedTraining

__all__ = [
    "ACTION_FIELDS",
    "KEEP",
    "OBSERVATION_FIELDS",
    "UTILITIES",
    "ActionField",
    "LiveTraining",
    "ObservationField",
    "OneControl",
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
    "discrete": ["OneControl"],
    "environments": ["LiveTraining", "SimulatedTraining"],
    "observation": ["OBSERVATION_FIELDS", "ObservationField"],
    "reward": ["UTILITIES", "Reference", "RewardTerms", "ScalarReward"],
    "vector": ["VectorSimulatedTraining"],
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _NAMES)

_LIVE, _SIMULATED = "trainpilot.envs.environments:LiveTraining", "trainpilot.envs.environments:SimulatedTraining"
_MANY = "trainpilot.envs.vector:vector_simulated_training"

# Live runs are nondeterministic: they measure seconds and joules. A checker that knows no reward vectors, which are
# MO-Gymnasium's convention, would warn of them.
register("trainpilot/LiveTraining-v0", _LIVE, nondeterministic=True, disable_env_checker=True)
register("trainpilot/SimulatedTraining-v0", _SIMULATED, disable_env_checker=True, vector_entry_point=_MANY)
register("trainpilot/LiveTraining-Scalar-v0", _LIVE, nondeterministic=True, kwargs={"utility": "linear"})
register("trainpilot/SimulatedTraining-Scalar-v0", _SIMULATED, kwargs={"utility": "linear"}, vector_entry_point=_MANY)
