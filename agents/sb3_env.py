"""Adapt thousands of simulated runs to Stable-Baselines3's `VecEnv` interface, with scalar rewards.

Also hide observation fields and older observations from an agent, both in training and in its bundle, and show its
value network more than its policy sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import Wrapper
from gymnasium.spaces import Box
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn, VecEnvWrapper

from trainpilot.agents.bundle import FIRST_LAYER, PolicyBundle
from trainpilot.envs.array_state import check_state, restore_state, state_of
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
from trainpilot.envs.reward import OBJECTIVES, RewardInfo, Scalariser
from trainpilot.envs.vector import VectorSimulatedTraining
from trainpilot.llm_runtime.simulator.records import Bools
from trainpilot.llm_runtime.simulator.runs import PRIVILEGED, SimulatedRuns


class ScalarVecEnv(VecEnv):
    """A `VectorSimulatedTraining` whose reward is the change of a utility of each run so far.

    For speed, all runs that have not ended share one empty `info` dictionary. The `info` of a run that has ended holds
    `terminal_observation`, `episode` (as in SB3's `VecMonitor`: return, length, seconds), the sums over the episode
    `reward_terms`, `energy_j` (`None` where unknown) and `time_s`, the `preference`, and of its last interval `loss`,
    `loss_increase` and `diverged`. The end of the budget is terminal: nothing is bootstrapped there.

    Args:
        env: The simulated runs.
        utility: One of `trainpilot.envs.reward.UTILITIES`.
    """

    def __init__(self, env: VectorSimulatedTraining, utility: str = "linear") -> None:
        self.env = env
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._scalariser = Scalariser(utility, self.num_envs)
        self._start_s = time.monotonic()
        self._restored = False

    def reset(self) -> np.ndarray:
        """Start new runs, and return their observations; right after `restore`, go on with those that were restored."""
        if self._restored and self.env.runs is not None:
            self._restored = False
            return self.env.runs.states.observation()
        observation, _ = self.env.reset(seed=self._seeds[0])
        self._scalariser.begin()
        self._reset_seeds()
        self._reset_options()
        return observation

    def state(self) -> dict[str, Any]:
        """Return the state of all runs, of the random numbers that they draw, and of their rewards so far."""
        return {"env": state_of(self.env), "rewards": state_of(self._scalariser)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned for as many runs of the same pool; the next `reset` goes on from there.

        Raises:
            ValueError: it is the state of other runs, or none.
        """
        self.reset()  # makes what is filled now
        check_state(self.env, state["env"])
        check_state(self._scalariser, state["rewards"])
        restore_state(self.env, state["env"])
        restore_state(self._scalariser, state["rewards"])
        self._restored = True

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions of the next step."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Train every run for one interval, and return observations, rewards, dones and infos."""
        observation, vectors, terminated, truncated, infos = self.env.step(self._actions)
        weighing = RewardInfo(preference=infos["preference"], loss_increase=infos["loss_increase"])
        rewards = self._scalariser.rewards(vectors, weighing)
        dones = terminated | truncated
        each: list[dict[str, Any]] = [{}] * self.num_envs
        ended = np.flatnonzero(dones)
        for row in ended:
            each[row] = self._episode(int(row), infos, float(self._scalariser.values[row]))
        self._scalariser.begin(ended)
        return observation, rewards.astype(np.float32), dones, each

    def _episode(self, row: int, infos: dict[str, Any], value: float) -> dict[str, Any]:
        sums = infos["final_info"]
        energy_j = float(sums["energy_j"][row])
        return {
            "terminal_observation": infos["final_obs"][row],
            "TimeLimit.truncated": False,
            "episode": {"r": value, "l": int(sums["length"][row]), "t": round(time.monotonic() - self._start_s, 6)},
            "reward_terms": dict(zip(OBJECTIVES, sums["reward_terms"][row].tolist(), strict=True)),
            "energy_j": None if math.isnan(energy_j) else energy_j,
            "time_s": float(sums["time_s"][row]),
            "preference": infos["preference"][row],
            "loss": float(infos["loss"][row]),
            "loss_increase": float(infos["loss_increase"][row]),
            "diverged": bool(infos["diverged"][row]),
        }

    def action_masks(self) -> Bools:
        """Return which choices are allowed now, shape (n_runs, sum of choices)."""
        return self.env.action_masks()

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the shared environment once for each run."""
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the shared environment."""
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Return the action masks of each run.

        Raises:
            AttributeError: another method than `action_masks` is called.
        """
        if method_name != "action_masks":
            raise AttributeError(f"method_name must be action_masks, got {method_name!r}")
        return list(self.action_masks()[list(self._get_indices(indices))])

    def env_is_wrapped(
        self, wrapper_class: type[Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Return `False` for each run: none is wrapped."""
        return [False] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return `None` for each run: nothing is rendered."""
        return [None] * self.num_envs


class PrivilegedVecEnv(VecEnvWrapper):
    """Simulated runs whose observations end with numbers that only the value network of an agent may see.

    Args:
        venv: Adapts a `VectorSimulatedTraining`, wrapped or not.
        runs: Its simulated runs.
    """

    def __init__(self, venv: VecEnv, runs: SimulatedRuns) -> None:
        space = venv.observation_space
        assert isinstance(space, Box)
        ends = np.ones(PRIVILEGED, dtype=np.float32)
        wider = Box(np.concatenate([space.low, -ends]), np.concatenate([space.high, ends]))
        super().__init__(venv, observation_space=wider)
        self.runs = runs

    def reset(self) -> np.ndarray:
        """Start new runs, and return their observations."""
        return self._extended(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        """Train every run for one interval, and return observations, rewards, dones and infos.

        Only the observations are extended, and not the last ones of runs that have ended: PPO does not look at these.
        """
        observation, rewards, dones, infos = self.venv.step_wait()
        return self._extended(observation), rewards, dones, infos

    def _extended(self, observation: object) -> np.ndarray:
        assert isinstance(observation, np.ndarray)
        return np.concatenate([observation, self.runs.privileged().astype(np.float32)], axis=1)


def seen_inputs(
    hide: Sequence[str] = (), stack: int = N_STACK, fields: Sequence[ObservationField] = OBSERVATION_FIELDS
) -> Bools:
    """Return which inputs an agent sees, bool of shape (N_STACK * n_fields,).

    Args:
        hide: Names of observation fields to hide.
        stack: Number of the newest observations to show.
        fields: Observation fields of the agent.

    Raises:
        ValueError: a field is unknown, or `stack` is out of range.
    """
    known = [field.name for field in fields]
    if unknown := sorted(set(hide) - set(known)):
        raise ValueError(f"hide must name observation fields ({', '.join(known)}), got {unknown[0]!r}")
    if not 1 <= stack <= N_STACK:
        raise ValueError(f"stack must be in [1, {N_STACK}], got {stack}")
    newest = np.array([name not in hide for name in known])
    steps = np.arange(N_STACK) >= N_STACK - stack
    return np.asarray(steps[:, None] & newest).ravel()


class HiddenInputs(VecEnvWrapper):
    """An environment whose observations are 0 wherever `seen` is false."""

    def __init__(self, venv: VecEnv, seen: Bools) -> None:
        super().__init__(venv)
        self.seen = seen.astype(np.float32)

    def reset(self) -> np.ndarray:
        """Start new runs, and return their observations."""
        return self._hidden(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        """Train every run for one interval, and return observations, rewards, dones and infos."""
        observation, rewards, dones, infos = self.venv.step_wait()
        return self._hidden(observation), rewards, dones, infos

    def _hidden(self, observation: object) -> np.ndarray:
        assert isinstance(observation, np.ndarray)
        return np.asarray(observation * self.seen)


def hidden_from(env: VecEnv, seen: Bools) -> VecEnv:
    """Return the environment, wrapped if any input is hidden."""
    return env if seen.all() else HiddenInputs(env, seen)


def without_inputs(bundle: PolicyBundle, seen: Bools) -> PolicyBundle:
    """Return the policy with zero weights on hidden inputs; they were 0 in training, so it acts as it did there."""
    name = FIRST_LAYER if FIRST_LAYER in bundle.weights else "action.weight"
    weights = {**bundle.weights, name: np.where(seen, bundle.weights[name], np.float32(0))}
    return replace(bundle, weights=weights)
