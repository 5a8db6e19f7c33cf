"""One change of one control at a time: the action space of algorithms that know `Discrete` actions alone, such as DQN.

`ONE_AT_A_TIME` holds the full action of each choice, `OneControl` is the Gymnasium wrapper.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete

from trainpilot.envs.action import ACTION_FIELDS, FIRST_CHOICES, KEEP
from trainpilot.llm_runtime.simulator.records import Bools, Ints

ONE_AT_A_TIME: Ints = np.array(
    [KEEP]
    + [
        [choice if index == changed else keep for index, keep in enumerate(KEEP)]
        for changed, field in enumerate(ACTION_FIELDS)
        for choice in range(len(field.choices))
        if choice != field.keep
    ]
)
"""Full action of each discrete one, shape (15, number of fields): the first keeps everything, each other changes one
control, in the order of `ACTION_FIELDS`."""


class OneControl(gymnasium.ActionWrapper[np.ndarray, np.int64, np.ndarray], gymnasium.utils.RecordConstructorArgs):
    """Gymnasium wrapper that makes the actions of an environment of this package `Discrete(15)` (`ONE_AT_A_TIME`)."""

    def __init__(self, env: gymnasium.Env[np.ndarray, np.ndarray]) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self.action_space: Any = Discrete(len(ONE_AT_A_TIME))

    def action(self, action: np.int64) -> np.ndarray:
        """Return the full action of a discrete one."""
        chosen: np.ndarray = ONE_AT_A_TIME[action]
        return chosen

    def action_masks(self) -> np.ndarray:
        """Return which discrete actions are allowed now, bool of shape (15,)."""
        masks: np.ndarray = one_at_a_time_masks(self.env.get_wrapper_attr("action_masks")()[None])[0]
        return masks


def one_at_a_time_masks(masks: Bools) -> Bools:
    """Return which of `ONE_AT_A_TIME` are allowed, shape (n_runs, 15), from the masks of all choices."""
    return np.asarray(masks[:, FIRST_CHOICES + ONE_AT_A_TIME].all(axis=2))
