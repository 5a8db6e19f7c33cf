"""The environments as Gymnasium's, Stable-Baselines3's and MO-Gymnasium's users make, check, step and draw them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import yaml
from fake_plant_batch import ToyPlants
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env

import trainpilot.envs  # noqa: F401, registers the environments
from trainpilot.envs.action import ACTION_FIELDS, KEEP, N_CHOICES
from trainpilot.envs.decision import DecisionState, Preference
from trainpilot.envs.discrete import ONE_AT_A_TIME, OneControl
from trainpilot.envs.environments import SimulatedTraining
from trainpilot.envs.reward import UTILITIES, ScalarReward
from trainpilot.envs.vector import VectorSimulatedTraining
from trainpilot.llm_runtime.simulator.runs import default_pool

RAW, SCALAR = "trainpilot/SimulatedTraining-v0", "trainpilot/SimulatedTraining-Scalar-v0"
FINISH = np.array([*KEEP[:-1], 1])
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "rl_zoo"


@pytest.fixture(scope="module", autouse=True)
def _few_instances() -> Any:
    """Draw from few instances: the usual pool takes seconds."""
    few = default_pool(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainpilot.envs.environments._pool", lambda: few)
        yield


def played(env: Any, action: Any, seed: int = 0) -> tuple[float, int, dict[str, Any]]:
    """Return the sum of the rewards, the length and the last info of an episode of one action."""
    env.reset(seed=seed)
    total, length, ended = 0.0, 0, False
    while not ended:
        _, reward, terminated, truncated, info = env.step(action)
        total, length, ended = total + reward, length + 1, terminated or truncated
    return total, length, info


# Checkers ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_the_scalar_id_passes_both_checkers_without_a_warning() -> None:
    check_env(gymnasium.make(SCALAR).unwrapped)
    sb3_check_env(gymnasium.make(SCALAR, utility="logarithmic", finish=False))
    sb3_check_env(OneControl(gymnasium.make(SCALAR)))


def test_of_the_raw_id_the_checker_says_only_that_the_reward_is_a_vector() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gymnasium.make(RAW).unwrapped)

    (said,) = (str(each.message) for each in caught)
    assert "The reward returned by `step()` must be a float" in said
    env: Any = gymnasium.make(RAW)
    env.reset(seed=0)
    _, reward, *_ = env.step(np.array(KEEP))
    assert reward in env.get_wrapper_attr("reward_space")
    assert (reward.shape, env.get_wrapper_attr("reward_dim")) == ((3,), 3)


def test_a_wrapped_environment_can_be_made_again_from_its_spec() -> None:
    env = ScalarReward(gymnasium.make(RAW, preference="quality=1"), utility="logarithmic")
    assert env.spec is not None
    again: Any = gymnasium.make(env.spec)

    assert played(again, np.array(KEEP))[0] == played(env, np.array(KEEP))[0]


def test_it_is_found_by_module_and_id_without_an_import() -> None:
    assert isinstance(gymnasium.make(f"trainpilot.envs:{SCALAR}").unwrapped, SimulatedTraining)


# Scalar rewards and preferences -----------------------------------------------------------------------------


@pytest.mark.parametrize("utility", UTILITIES)
def test_the_scalar_id_pays_what_the_wrapper_pays(utility: str) -> None:
    wrapped = played(ScalarReward(gymnasium.make(RAW), utility), np.array(KEEP))
    scalar = played(gymnasium.make(SCALAR, utility=utility), np.array(KEEP))

    assert scalar[:2] == wrapped[:2]
    assert sorted(scalar[2]) == sorted(wrapped[2])
    assert not hasattr(gymnasium.make(SCALAR).unwrapped, "reward_space")


@pytest.mark.parametrize(
    "given",
    ["quality=6,energy=3,time=1", (6, 3, 1), [0.6, 0.3, 0.1], np.array([6.0, 3, 1]),
     {"quality": 6, "energy": 3, "time": 1}, Preference(quality=6, energy=3, time=1)],
)  # fmt: skip
def test_a_preference_is_understood_in_every_form(given: Any) -> None:
    as_argument = gymnasium.make(SCALAR, preference=given).reset(seed=0)[1]["preference"]
    as_option = gymnasium.make(SCALAR).reset(seed=0, options={"preference": given})[1]["preference"]
    of_many = gymnasium.make_vec(SCALAR, 2, preference=given).reset(seed=0)[1]["preference"]

    for found in (as_argument, as_option, *of_many):
        assert found == pytest.approx([0.6, 0.3, 0.1])


@pytest.mark.parametrize("given", [(1, 2), {}, {"speed": 1}, 0.7])
def test_another_preference_is_refused_with_the_ways_to_write_it(given: Any) -> None:
    with pytest.raises(ValueError, match=r"preference must be text such as .* or three weights in this order, got"):
        gymnasium.make(SCALAR, preference=given)


def test_objectives_that_a_mapping_leaves_out_weigh_nothing() -> None:
    assert Preference.of({"quality": 2, "time": 2}).weights().tolist() == [0.5, 0.0, 0.5]


# No early end -----------------------------------------------------------------------------------------------


def test_without_finish_no_choice_ends_a_run_early() -> None:
    _, with_it, info = played(gymnasium.make(SCALAR), FINISH)
    _, without, refused = played(gymnasium.make(SCALAR, finish=False), FINISH)

    # allowed from a fifth of the 50 decisions on, and it takes another fifth of those so far: 10 + 2
    assert (with_it, without) == (12, 50)
    assert info["refusals"] == ["finish cool down: the cool-down has begun"]
    assert refused["refusals"] == ["finish cool down: left out of this environment (finish=False)"]


def test_without_finish_many_runs_go_to_the_end_and_masks_say_so() -> None:
    env = VectorSimulatedTraining(ToyPlants(3), finish=False)
    env.reset(seed=0)
    for step in range(25):
        assert not env.action_masks()[:, -1].any()
        *_, terminated, truncated, _ = env.step(np.tile(FINISH, (3, 1)))
        assert not terminated.any()
        assert bool(truncated.all()) == (step == 19)  # a toy has 20 decisions


def test_a_state_made_anew_still_has_no_finish() -> None:
    from fakes import make_limits

    state = DecisionState(make_limits(), Preference(), finish=False).anew()
    assert state.mask_reasons()[-1] == (None, "left out of this environment (finish=False)")


# Many runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", AutoresetMode.NEXT_STEP])
def test_make_vec_makes_many_runs_in_both_modes(mode: Any) -> None:
    made = gymnasium.make_vec(SCALAR, num_envs=4, autoreset_mode=mode)
    assert isinstance(made, VectorSimulatedTraining)
    assert made.metadata["autoreset_mode"] is AutoresetMode(mode)
    env = RecordEpisodeStatistics(made)
    first, _ = env.reset(seed=3)
    total, ended = np.zeros(4), None
    for _ in range(51):
        observation, reward, _, truncated, infos = env.step(np.tile(KEEP, (4, 1)))
        assert (reward.shape, observation.shape) == ((4,), first.shape)
        total += reward if ended is None else 0
        if truncated.all():
            ended = infos["episode"]["r"]
    assert ended == pytest.approx(total, rel=1e-5)
    assert (made.reset(seed=3)[0] == first).all()
    assert (made.reset(seed=4)[0] != first).any()


def test_the_same_runs_go_on_alike_in_both_modes() -> None:
    def told(mode: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        env = VectorSimulatedTraining(ToyPlants(3, seed=1), (6, 3, 1), utility="linear", autoreset_mode=mode)
        env.reset(seed=0)
        seen = []
        for step in range(43):
            finish = np.tile(KEEP, (3, 1))
            finish[1, -1] = step == 9  # one ends before the others
            observation, reward, terminated, truncated, _ = env.step(finish)
            seen.append((observation[1], reward[1], (terminated | truncated)[1]))
        return seen

    same, following = told("SameStep"), told("NextStep")
    end = next(step for step, (*_, ended) in enumerate(same) if ended)
    assert next(step for step, (*_, ended) in enumerate(following) if ended) == end
    assert [each[1] for each in same[: end + 1]] == [each[1] for each in following[: end + 1]]
    # the step after pays nothing and shows the first observation, whatever the action
    assert [*following[end + 1][1:]] == [0.0, False]
    assert (following[end + 1][0][-5:] == same[end][0][-5:]).all()
    assert following[end][0].tolist() != same[end][0].tolist()


def test_what_a_run_is_told_of_its_end_is_its_own_sum() -> None:
    env = gymnasium.make_vec(SCALAR, num_envs=3, autoreset_mode="NextStep", preference=(6, 3, 1))
    env.reset(seed=0)
    total = np.zeros(3)
    for _ in range(50):
        _, reward, _, truncated, infos = env.step(np.tile(KEEP, (3, 1)))
        total += reward
    assert truncated.all()
    assert infos["final_info"]["reward_terms"] @ [0.6, 0.3, 0.1] == pytest.approx(total)
    assert infos["final_info"]["length"].tolist() == [50] * 3
    assert "final_obs" not in infos
    _, reward, _, truncated, infos = env.step(np.tile(KEEP, (3, 1)))
    assert (reward.tolist(), truncated.any()) == ([0.0] * 3, False)
    assert np.isnan(infos["loss"]).all()


@pytest.mark.parametrize(("argument", "value"), [("plants", 0), ("autoreset_mode", "Disabled"), ("utility", "best")])
def test_arguments_out_of_range_are_refused_by_name(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be .*, got"):
        VectorSimulatedTraining(**{"plants": 2, argument: value})


# Algorithms -------------------------------------------------------------------------------------------------


def zoo(file: str) -> Mapping[str, Any]:
    """Return the settings of an algorithm in rl-baselines3-zoo's form, but for what they are not given to."""
    found = yaml.safe_load((EXAMPLES / file).read_text(encoding="utf-8"))[SCALAR]
    return {k: v for k, v in found.items() if k not in ("n_envs", "n_timesteps", "policy", "env_wrapper")}


def test_ppo_learns_through_make_vec_env_with_the_zoo_s_settings() -> None:
    env = make_vec_env(SCALAR, 2, seed=0, env_kwargs={"finish": False})
    settings = {**zoo("ppo.yml"), "n_steps": 8, "batch_size": 16, "n_epochs": 1}

    assert PPO("MlpPolicy", env, **settings).learn(16).num_timesteps == 16


def test_dqn_learns_one_change_of_one_control_at_a_time() -> None:
    env = make_vec_env(SCALAR, 1, seed=0, wrapper_class=OneControl)
    settings = {**zoo("dqn.yml"), "buffer_size": 100, "learning_starts": 4, "batch_size": 4}

    assert DQN("MlpPolicy", env, **settings).learn(8).num_timesteps == 8


def test_a_discrete_action_changes_one_control_or_none() -> None:
    changed = (np.array(KEEP) != ONE_AT_A_TIME).sum(axis=1)

    assert changed.tolist() == [0] + [1] * (sum(N_CHOICES) - len(ACTION_FIELDS))
    assert len({tuple(row) for row in ONE_AT_A_TIME.tolist()}) == len(ONE_AT_A_TIME) == 15
    env: Any = OneControl(gymnasium.make(SCALAR))
    env.reset(seed=0)
    assert env.action_masks()[0]
    assert not env.action_masks()[-1]  # no cool-down at the beginning


# Pictures ---------------------------------------------------------------------------------------------------


def test_a_run_is_drawn_and_the_picture_grows_with_it() -> None:
    env = gymnasium.make(SCALAR, render_mode="rgb_array")
    env.reset(seed=0)
    pictures: list[Any] = [env.render()]
    for _ in range(2):
        env.step(np.array(KEEP))
        pictures.append(env.render())

    for picture in pictures:
        assert isinstance(picture, np.ndarray)
        assert picture.shape == (480, 480, 3)
        assert picture.dtype == np.uint8
    assert all(not np.array_equal(one, other) for one, other in pairwise(pictures))


def test_without_a_render_mode_or_a_run_there_is_no_picture() -> None:
    with pytest.raises(ValueError, match="render_mode must be \"rgb_array\" or None, got 'human'"):
        SimulatedTraining(render_mode="human")
    with pytest.raises(ValueError, match="render needs a run; call reset first"):
        SimulatedTraining(render_mode="rgb_array").render()
    with pytest.warns(UserWarning, match='render needs render_mode="rgb_array"'):
        assert SimulatedTraining().render() is None
