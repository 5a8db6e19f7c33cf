"""Environments in other processes are, to Stable-Baselines3, what they are in this one."""

from __future__ import annotations

from concurrent.futures import BrokenExecutor, Future
from typing import Any

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from trainpilot.agents.remote_env import HostedEnv, RemoteVecEnv, elsewhere


class Walk(gymnasium.Env[np.ndarray, np.ndarray]):
    """A random walk of three steps, which starts anywhere."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.MultiDiscrete([3, 2])
    speed = 1.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Any]:
        super().reset(seed=seed)
        self.steps = 0
        self.place = self.np_random.normal(size=2).astype(np.float32)
        return self.place, {"options": options}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.place = self.place + np.float32(self.speed) * action.astype(np.float32)
        return self.place, float(self.place.sum()), self.steps == 3, False, {"steps": self.steps}

    def action_masks(self) -> np.ndarray:
        return np.array([True, self.steps < 2, True, True, True])

    def fail(self) -> None:
        raise ValueError("place must be finite")


class Here:
    """An object of this process behind the interface of one elsewhere."""

    def __init__(self, made: Any) -> None:
        self.made = made
        self.dead = False

    def call(self, method: str, /, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            if self.dead:
                raise BrokenExecutor("the machine is gone")
            future.set_result(getattr(self.made, method)(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def both() -> tuple[RemoteVecEnv, DummyVecEnv]:
    return RemoteVecEnv([Here(HostedEnv(Walk)) for _ in range(2)]), DummyVecEnv([Walk, Walk])


def test_episodes_are_those_of_this_process() -> None:
    remote, local = both()
    for env in (remote, local):
        env.seed(5)
        env.set_options({"easy": True})
    assert np.array_equal(remote.reset(), local.reset())  # type: ignore[arg-type]
    assert remote.reset_infos == local.reset_infos == [{"options": {"easy": True}}] * 2
    rng = np.random.default_rng(0)
    for _ in range(7):
        actions = np.stack([rng.integers(3, size=2), rng.integers(2, size=2)], axis=1)
        there, here = remote.step(actions), local.step(actions)
        for one, other in zip(there[:3], here[:3], strict=True):
            assert np.array_equal(one, other)  # type: ignore[arg-type]
            assert one.dtype == other.dtype  # type: ignore[union-attr]
        assert [info["steps"] for info in there[3]] == [info["steps"] for info in here[3]]
        assert [sorted(info) for info in there[3]] == [sorted(info) for info in here[3]]
        masks, expected = (np.stack(env.env_method("action_masks")) for env in (remote, local))
        assert np.array_equal(masks, expected)
    remote.close()


def test_attributes_are_read_and_set_by_index() -> None:
    remote, _ = both()
    remote.set_attr("speed", 3.0, 1)

    assert remote.get_attr("speed") == [1.0, 3.0]
    assert remote.get_attr("speed", [1]) == [3.0]
    assert remote.has_attr("action_masks")
    assert not remote.has_attr("wings")
    assert remote.env_is_wrapped(gymnasium.wrappers.TimeLimit) == [False, False]


def test_what_an_environment_raises_and_a_dead_machine_are_raised_here() -> None:
    envs = [Here(HostedEnv(Walk)) for _ in range(2)]
    remote = elsewhere(envs)
    remote.reset()
    with pytest.raises(ValueError, match="place must be finite"):
        remote.env_method("fail")
    envs[1].dead = True
    with pytest.raises(BrokenExecutor):
        remote.step(np.zeros((2, 2), int))
