"""Step environments that are processes elsewhere as one vectorised environment, such as actors of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
from gymnasium import Env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

MakeEnv = Callable[[], Env[np.ndarray, np.ndarray]]


class RemoteObject(Protocol):
    """An object in another process. Its calls are carried out one after the other."""

    def call(self, method: str, /, *arguments: Any) -> Future[Any]:
        """Begin a call of one of its methods. The future raises what the method raises."""


class HostedEnv:
    """One environment in the process that it runs in, which begins anew by itself at the end of an episode.

    Args:
        make_env: Returns the environment.
    """

    def __init__(self, make_env: MakeEnv) -> None:
        self._env = DummyVecEnv([make_env])

    def spaces(self) -> tuple[Any, Any]:
        """Return the spaces of observations and actions."""
        return self._env.observation_space, self._env.action_space

    def reset(self, seed: int | None, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; return its first observation and the info."""
        if seed is not None:  # else SB3 would draw one
            self._env.seed(seed)
        self._env.set_options(options)
        return self._env.reset(), self._env.reset_infos[0]

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, dict[str, Any], dict[str, Any]]:
        """Take an action; return observation, reward, whether the episode ended, info, and that of a reset."""
        observation, rewards, dones, infos = self._env.step(action[None])
        return observation, float(rewards[0]), bool(dones[0]), infos[0], self._env.reset_infos[0]

    def get(self, name: str) -> Any:
        """Return an attribute of the environment or of one that it wraps."""
        return self._env.get_attr(name)[0]

    def has(self, name: str) -> bool:
        """Return whether there is such an attribute."""
        return self._env.has_attr(name)

    def set(self, name: str, value: Any) -> None:
        """Set an attribute."""
        self._env.set_attr(name, value)

    def method(self, name: str, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        """Call a method of the environment."""
        return self._env.env_method(name, *arguments, **options)[0]

    def is_wrapped(self, kind: type) -> bool:
        """Return whether the environment is wrapped so."""
        return bool(self._env.env_is_wrapped(kind)[0])

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


class RemoteVecEnv(VecEnv):
    """A vectorised environment of Stable-Baselines3 whose environments are `HostedEnv` in other processes.

    Args:
        envs: The environments; their observations are arrays.
    """

    def __init__(self, envs: Sequence[RemoteObject]) -> None:
        self._envs = envs
        self._steps: list[Future[Any]] = []
        super().__init__(len(envs), *envs[0].call("spaces").result())

    def _of(self, indices: int | Iterable[int] | None) -> list[RemoteObject]:
        return [self._envs[index] for index in self._get_indices(indices)]

    def reset(self) -> VecEnvObs:
        """Begin an episode in each environment; return the observations, of shape (n_envs, n_inputs)."""
        ways = zip(self._envs, self._seeds, self._options, strict=True)
        begun = _results([env.call("reset", seed, options) for env, seed, options in ways])
        observations, infos = zip(*begun, strict=True)
        self.reset_infos = list(infos)
        self._reset_seeds()
        self._reset_options()
        return np.concatenate(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Begin a step in each environment."""
        self._steps = [env.call("step", action) for env, action in zip(self._envs, actions, strict=True)]

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for all steps; return observations, rewards, ends and infos."""
        observations, rewards, dones, infos, begun = zip(*_results(self._steps), strict=True)
        self.reset_infos = list(begun)
        return np.concatenate(observations), np.array(rewards, np.float32), np.array(dones), list(infos)

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """Return an attribute of each environment."""
        return _results([env.call("get", attr_name) for env in self._of(indices)])

    def has_attr(self, attr_name: str) -> bool:
        """Return whether every environment has an attribute, which may be one that cannot be sent, like a method."""
        return all(_results([env.call("has", attr_name) for env in self._envs]))

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Set an attribute of each environment."""
        _results([env.call("set", attr_name, value) for env in self._of(indices)])

    def env_method(
        self, method_name: str, *method_args: Any, indices: int | Iterable[int] | None = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of each environment."""
        return _results([env.call("method", method_name, method_args, method_kwargs) for env in self._of(indices)])

    def env_is_wrapped(self, wrapper_class: type, indices: int | Iterable[int] | None = None) -> list[bool]:
        """Return whether each environment is wrapped so."""
        return _results([env.call("is_wrapped", wrapper_class) for env in self._of(indices)])

    def get_images(self) -> list[None]:
        """Return no pictures: there is nobody to look at them."""
        return [None] * self.num_envs

    def close(self) -> None:
        """Close the environments."""
        _results([env.call("close") for env in self._envs])


def elsewhere(envs: Sequence[RemoteObject]) -> VecEnv:
    """Return environments in other processes, with their returns and lengths recorded as by `ppo.side_by_side`."""
    return VecMonitor(RemoteVecEnv(envs))


def _results(calls: Sequence[Future[Any]]) -> list[Any]:
    return [call.result() for call in calls]
