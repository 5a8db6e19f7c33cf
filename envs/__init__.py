"""The decision problem: observations, actions, rewards and the Gymnasium environments. Knows no SB3.

Importing this package registers `trainpilot/LiveTraining-v0` and `trainpilot/SimulatedTraining-v0`.
"""

from gymnasium import register

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
