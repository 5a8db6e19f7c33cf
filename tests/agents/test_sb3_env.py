"""The simulated runs as Stable-Baselines3 sees them: scalar rewards, masks, and infos at the ends only."""

from __future__ import annotations

import numpy as np
import pytest
from fake_plant_batch import ToyPlants, some_actions
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.vec_env import VecMonitor

from trainpilot.agents.sb3_env import ScalarVecEnv
from trainpilot.envs.action import KEEP, N_CHOICES
from trainpilot.envs.decision import Preference
from trainpilot.envs.environments import SimulatedTraining
from trainpilot.envs.reward import UTILITIES, ScalarReward
from trainpilot.envs.vector import VectorSimulatedTraining

PREFERENCE = Preference(quality=0.6, energy=0.3, time=0.1)


def vec_env(n_runs: int = 4, preference: Preference | None = None, utility: str = "linear") -> ScalarVecEnv:
    return ScalarVecEnv(VectorSimulatedTraining(ToyPlants(n_runs, seed=1), preference), utility)


def test_the_masks_come_as_maskable_ppo_asks_for_them() -> None:
    env = vec_env()
    env.reset()

    assert is_masking_supported(env)
    assert get_action_masks(env).tolist() == env.action_masks().tolist()
    assert env.env_method("action_masks", indices=[2])[0].tolist() == env.action_masks()[2].tolist()
    with pytest.raises(AttributeError, match="method_name must be action_masks, got 'render'"):
        env.env_method("render")


@pytest.mark.parametrize("utility", UTILITIES)
def test_rewards_are_those_of_one_run_with_a_scalar_reward(utility: str) -> None:
    many = vec_env(1, PREFERENCE, utility)
    one = ScalarReward(SimulatedTraining(PREFERENCE, make_plant=lambda seed: ToyPlants(1, seed=1)), utility)
    random = np.random.default_rng(2)
    many.reset()
    one.reset(seed=0)
    value, ended = 0.0, False
    while not ended:
        actions = some_actions(random, many.action_masks(), N_CHOICES)
        _, rewards, dones, infos = many.step(actions)
        _, reward, terminated, truncated, info = one.step(actions[0])
        ended = terminated or truncated
        value += float(reward)
        assert rewards[0] == pytest.approx(reward, abs=1e-6)  # float32
        assert dones[0] == ended

    assert infos[0]["episode"]["r"] == pytest.approx(value, abs=1e-5)
    assert infos[0]["loss"] == pytest.approx(info["loss"], abs=1e-9)
    assert infos[0]["loss_increase"] == pytest.approx(info["loss_increase"], abs=1e-9)


def test_only_what_has_ended_has_an_info() -> None:
    env = vec_env(3, PREFERENCE)
    first = np.asarray(env.reset())
    assert isinstance(env.env.plants, ToyPlants)
    for _ in range(4):
        *_, dones, infos = env.step(np.tile(KEEP, (3, 1)))
        assert not dones.any()
        assert infos == [{}, {}, {}]
    env.env.plants.diverged[1] = True
    observation, _, dones, infos = env.step(np.tile(KEEP, (3, 1)))

    assert isinstance(observation, np.ndarray)
    assert dones.tolist() == [False, True, False]
    assert (infos[0], infos[2]) == ({}, {})
    info = infos[1]
    assert (info["terminal_observation"] != first[1]).any()
    assert (observation[1] == first[1]).all()
    assert info["TimeLimit.truncated"] is False
    assert info["episode"]["l"] == 5
    # 5 of 20 intervals, quality -1: 0.6 x -1 - 0.3 x 0.25 - 0.1 x 0.25
    assert info["reward_terms"] == pytest.approx({"quality": -1.0, "energy": -0.25, "time": -0.25})
    assert info["episode"]["r"] == pytest.approx(-0.7)
    assert (info["energy_j"], info["time_s"]) == pytest.approx((400.0, 4.0))
    assert info["preference"] == pytest.approx([0.6, 0.3, 0.1])
    assert (info["diverged"], info["loss_increase"]) == (True, 10.0)


def test_end_of_the_budget_is_terminal_and_the_next_return_starts_at_zero() -> None:
    env = vec_env(2, PREFERENCE)
    env.reset()
    returns = np.zeros(2)
    for _ in range(20):
        _, rewards, dones, infos = env.step(np.tile(KEEP, (2, 1)))
        returns += rewards
    assert dones.all()
    assert not infos[0]["TimeLimit.truncated"]
    # keeping brings 0.6 x 1 - 0.3 x 1 - 0.1 x 1
    assert returns == pytest.approx(0.2, abs=1e-6)
    again = sum(env.step(np.tile(KEEP, (2, 1)))[1] for _ in range(20))
    assert again == pytest.approx(0.2, abs=1e-6)


def test_a_reset_forgets_the_returns_so_far() -> None:
    env = vec_env(2, PREFERENCE)
    env.reset()
    env.step(np.tile(KEEP, (2, 1)))
    env.reset()

    assert sum(env.step(np.tile(KEEP, (2, 1)))[1] for _ in range(20)) == pytest.approx(0.2, abs=1e-6)


def test_an_unknown_utility_is_refused() -> None:
    with pytest.raises(ValueError, match=r"utility must be one of linear, .*, got 'best'"):
        vec_env(utility="best")


@pytest.mark.parametrize("monitored", [False, True])
def test_maskable_ppo_learns_a_rollout(monitored: bool) -> None:
    env = vec_env(16)
    model = MaskablePPO(
        "MlpPolicy", VecMonitor(env) if monitored else env, n_steps=25, batch_size=100, n_epochs=1, seed=0
    )
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(400)

    assert model.num_timesteps == 400
    assert model.ep_info_buffer
    assert all(1 <= episode["l"] <= 20 for episode in model.ep_info_buffer)
    assert any((new != old).any() for new, old in zip(model.policy.parameters(), before, strict=True))
