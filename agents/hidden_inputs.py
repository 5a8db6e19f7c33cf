"""Keep observation fields and older observations from an agent, in training and in its bundle alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvStepReturn, VecEnvWrapper

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.llm_runtime.simulator.records import Bools

FIRST_LAYER = "hidden.0.weight"


def seen_inputs(hide: Sequence[str] = (), stack: int = N_STACK) -> Bools:
    """Return which inputs are left, bool of shape (N_STACK * n_fields,).

    Args:
        hide: Names of observation fields that are not seen at all.
        stack: How many of the newest observations are seen.

    Raises:
        ValueError: an unknown field, or a number of observations that there is not.
    """
    known = [field.name for field in OBSERVATION_FIELDS]
    if unknown := sorted(set(hide) - set(known)):
        raise ValueError(f"hide must name observation fields ({', '.join(known)}), got {unknown[0]!r}")
    if not 1 <= stack <= N_STACK:
        raise ValueError(f"stack must be in [1, {N_STACK}], got {stack}")
    newest = np.array([name not in hide for name in known])
    steps = np.arange(N_STACK) >= N_STACK - stack
    return np.asarray(steps[:, None] & newest).ravel()


class HiddenInputs(VecEnvWrapper):
    """An environment whose observations are 0 wherever `seen` is not."""

    def __init__(self, venv: VecEnv, seen: Bools) -> None:
        super().__init__(venv)
        self.seen = seen.astype(np.float32)

    def reset(self) -> np.ndarray:
        """Begin every run."""
        return self._hidden(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        """Train every run for one interval."""
        observation, rewards, dones, infos = self.venv.step_wait()
        return self._hidden(observation), rewards, dones, infos

    def _hidden(self, observation: object) -> np.ndarray:
        assert isinstance(observation, np.ndarray)
        return np.asarray(observation * self.seen)


def hidden_from(env: VecEnv, seen: Bools) -> VecEnv:
    """Return the environment, wrapped where anything is hidden."""
    return env if seen.all() else HiddenInputs(env, seen)


def without_inputs(bundle: PolicyBundle, seen: Bools) -> PolicyBundle:
    """Return the same policy with no weight on what it was not to see: its inputs were 0, so nothing else changes."""
    name = FIRST_LAYER if FIRST_LAYER in bundle.weights else "action.weight"
    weights = {**bundle.weights, name: np.where(seen, bundle.weights[name], np.float32(0))}
    return PolicyBundle(weights, bundle.provenance)
