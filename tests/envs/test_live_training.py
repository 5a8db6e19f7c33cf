"""The environment around a real run: it keeps Gymnasium's rules, repeats itself, and is what its docstring says."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from fakes import TOY_CASE, FixedClock, ToyPlant, make_limits, steady_meter
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env, data_equivalence
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from trainpilot.envs.action import ACTION_FIELDS, KEEP
from trainpilot.envs.decision import N_STACK, Preference
from trainpilot.envs.environments import DEFAULT_CASE, LiveTraining
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.envs.reward import OBJECTIVES, UTILITIES, ScalarReward
from trainpilot.llm_runtime import live_run, loop
from trainpilot.llm_runtime.config import ControlLimits, Controls, Pruning, RunConfig
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.telemetry import Plant, Telemetry

KEEP_ARRAY = np.array(KEEP)
PREFERENCE = Preference(quality=0.6, energy=0.3, time=0.1)


@pytest.fixture(autouse=True, scope="module")
def steady_machine() -> Iterator[None]:
    """Leave nothing to the machine: its memory use, and which precisions it measures to pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "memory_share", lambda device: 0.25)
        patch.setattr(live_run, "masked_precisions", lambda *_: {"tf32": "no GPU", "fp16": "no GPU"})
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A real run of 12 decisions of 8 steps, of a model of one layer on a small text."""
    folder = tmp_path_factory.mktemp("case")
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta", "epsilon", "zeta"], 15_000)
    (folder / "words.txt").write_text(" ".join(words), encoding="utf-8")
    model = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    (folder / "model.json").write_text(json.dumps(model | heads), encoding="utf-8")
    return RunConfig(
        model=str(folder / "model.json"),
        text=(str(folder / "words.txt"),),
        tokens=12_288,
        batch_size=4,
        sequence_length=32,
        decisions=12,
        device="cpu",
        seed=3,
    )


def steady_run(config: RunConfig) -> Plant:
    """A real run with made-up seconds and joules."""
    return LiveRun(config, meter=steady_meter(), clock=FixedClock())


def action(**choices: int) -> np.ndarray:
    """Return the action that keeps all but what is named."""
    return np.array([choices.get(field.name, field.keep) for field in ACTION_FIELDS])


def random_masked(env: Any) -> np.ndarray:
    """Return a random action among the allowed ones."""
    parts = np.split(env.action_masks().astype(np.int8), np.cumsum(env.action_space.nvec)[:-1])
    drawn: np.ndarray = env.action_space.sample(mask=tuple(parts))
    return drawn


class Scalarised(LiveTraining):
    """The environment with the weighted sum as its reward, for checkers that know no vectors."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, float(reward @ info["preference"]), terminated, truncated, info


@pytest.fixture(scope="module")
def scalarised() -> Iterator[str]:
    """Register `Scalarised` as deterministic, which it is on a steady machine, and return its id."""
    name = "trainpilot-tests/Scalarised-v0"
    make: Any = Scalarised
    gymnasium.register(name, make, nondeterministic=False, disable_env_checker=True)
    yield name
    del gymnasium.registry[name]


@pytest.mark.filterwarnings("error")
def test_gymnasium_s_checker_finds_nothing(case: RunConfig, scalarised: str) -> None:
    check_env(gymnasium.make(scalarised, cases=[case], make_plant=steady_run).unwrapped)


@pytest.mark.filterwarnings("error")
def test_the_vector_reward_is_all_that_gymnasium_s_checker_finds(case: RunConfig) -> None:
    with pytest.warns(UserWarning, match="The reward returned by `step\\(\\)` must be a float") as found:
        check_env(LiveTraining([case], make_plant=steady_run), skip_render_check=True)

    assert {str(warning.message) for warning in found} == {str(found[0].message)}


@pytest.mark.filterwarnings("error")
def test_stable_baselines_checker_finds_nothing(case: RunConfig) -> None:
    sb3_check_env(ScalarReward(LiveTraining([case], make_plant=steady_run)), warn=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("utility", UTILITIES)
def test_stable_baselines_checker_finds_nothing_whatever_the_utility(utility: str) -> None:
    sb3_check_env(ScalarReward(LiveTraining([TOY_CASE], make_plant=ToyPlant), utility), warn=True)


def test_two_environments_with_one_seed_give_equal_rollouts(case: RunConfig) -> None:
    pruned = replace(case, pruning="magnitude", seed=5)
    envs = [LiveTraining([case, pruned], make_plant=steady_run) for _ in range(2)]
    for env in envs:
        env.action_space.seed(11)
    firsts = [env.reset(seed=4, options={"case": 1}) for env in envs]
    assert data_equivalence(firsts[0], firsts[1], exact=True)

    ended = False
    while not ended:
        actions = [random_masked(env) for env in envs]
        assert (actions[0] == actions[1]).all()
        steps = [env.step(chosen) for env, chosen in zip(envs, actions, strict=True)]
        assert data_equivalence(steps[0], steps[1], exact=True)
        ended = steps[0][2] or steps[0][3]


def test_the_seed_draws_case_and_preference(case: RunConfig) -> None:
    env = LiveTraining([replace(TOY_CASE, seed=seed) for seed in range(4)], make_plant=ToyPlant)
    _, first = env.reset(seed=1)
    later = [env.reset()[1] for _ in range(20)]
    _, again = env.reset(seed=1)

    assert data_equivalence(first, again, exact=True)
    assert {info["case"] for info in later} == {0, 1, 2, 3}
    assert all(info["preference"].sum() == pytest.approx(1.0) for info in later)
    assert len({tuple(info["preference"]) for info in later}) == 20


def test_options_choose_instead_of_drawing() -> None:
    env = LiveTraining([TOY_CASE, replace(TOY_CASE, seed=1)], make_plant=ToyPlant)
    _, info = env.reset(options={"case": 1, "preference": PREFERENCE})

    assert info["case"] == 1
    assert env.case.seed == 1
    assert info["preference"] == pytest.approx([0.6, 0.3, 0.1])


@pytest.mark.parametrize("index", [-1, 2])
def test_a_case_that_is_not_there_is_refused(index: int) -> None:
    env = LiveTraining([TOY_CASE, TOY_CASE], make_plant=ToyPlant)

    with pytest.raises(ValueError, match=rf"options case must be in \[0, 2\), got {index}"):
        env.reset(options={"case": index})


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match="cases must name at least one run, got none"):
        LiveTraining([])
    with pytest.raises(ValueError, match="step needs a run; call reset first"):
        LiveTraining([TOY_CASE], make_plant=ToyPlant).step(KEEP_ARRAY)


@pytest.mark.parametrize("bad", [[7, 1, 0, 0, 0], [3, 1, 0, 0]])
def test_what_is_no_action_is_refused_and_changes_nothing(bad: list[int]) -> None:
    env = LiveTraining([TOY_CASE], make_plant=ToyPlant)
    before, _ = env.reset(seed=0)

    with pytest.raises(ValueError, match="action"):
        env.step(np.array(bad))
    assert (env.state.observation() == before).all()


def test_always_keeping_is_the_base_schedule(case: RunConfig) -> None:
    env = LiveTraining([case], PREFERENCE, make_plant=steady_run)
    env.reset(seed=0)
    total, rates, ended, truncated = np.zeros(3), [], False, False
    while not ended:
        _, reward, terminated, truncated, info = env.step(KEEP_ARRAY)
        total += reward
        rates.append(info["effective"]["learning_rate"])
        ended = terminated or truncated

    assert truncated
    assert info["loss"] == env.reference.losses[-1]
    assert rates == [telemetry.learning_rate for telemetry in env.reference.telemetry]
    assert total == pytest.approx([1.0, -1.0, -1.0], abs=1e-6)
    assert info["loss_increase"] == 0.0
    assert info["energy_source"] == "estimated"
    # 12 intervals of one reading of 5 J; the 5 that are probed have 4 ticks of 0.25 s, the others 2
    assert env.reference.time_s == 5 * 1.0 + 7 * 0.5
    assert env.reference.energy_j == 60.0


@pytest.mark.parametrize("pruning", ["none", "magnitude", "width"])
def test_a_random_masked_policy_gets_through_whole_episodes(pruning: Pruning, case: RunConfig) -> None:
    env = LiveTraining([replace(case, pruning=pruning)], make_plant=steady_run)
    env.action_space.seed(len(pruning))
    observation, info = env.reset(seed=0)
    truncated, seen = False, [observation]
    while not truncated:
        chosen = random_masked(env)
        chosen[-1] = 0  # no cool-down, so that the episode is whole
        observation, reward, terminated, truncated, info = env.step(chosen)
        seen.append(observation)
        assert not terminated
        assert info["refusals"] == []
        assert reward in env.reward_space
        assert np.isfinite(reward).all()

    assert len(seen) == 1 + 12
    assert (info["effective"]["sparsity"] > 0) == (pruning != "none")
    assert all(observation in env.observation_space for observation in seen)
    assert np.isfinite(seen).all()


def test_a_random_policy_without_masks_gets_through_as_well() -> None:
    env = LiveTraining([TOY_CASE], make_plant=ToyPlant)
    env.action_space.seed(0)
    for episode in range(20):
        env.reset(seed=episode)
        ended = False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            ended = terminated or truncated
            assert observation in env.observation_space
            assert reward in env.reward_space


def test_a_run_whose_weights_are_lost_is_terminated(case: RunConfig) -> None:
    env = LiveTraining([case], PREFERENCE, make_plant=steady_run)
    env.reset(seed=0)
    total = env.step(KEEP_ARRAY)[1]
    assert isinstance(env.plant, LiveRun)
    with torch.no_grad():
        next(env.plant.trainer.model.parameters()).fill_(math.nan)
    observation, reward, terminated, truncated, info = env.step(KEEP_ARRAY)

    assert terminated
    assert not truncated
    assert info["diverged"]
    assert (total + reward)[0] == pytest.approx(-1.0)
    assert np.isfinite(reward).all()
    assert observation in env.observation_space


class LastStepDivergingToy(ToyPlant):
    """Has finite training losses to the end, and no finite weights after it, unless nobody steers."""

    scale = 1.0

    def advance(self, controls: Controls, share: float) -> Telemetry:
        self.scale = controls.learning_rate_scale
        return super().advance(controls, share)

    def evaluate(self) -> float:
        return math.nan if self.scale > 1 else super().evaluate()


def test_a_run_lost_in_its_very_last_step_is_terminated_too() -> None:
    env = LiveTraining([TOY_CASE], PREFERENCE, make_plant=LastStepDivergingToy)
    env.reset(seed=0)
    total, terminated, truncated = np.zeros(3), False, False
    for i in range(TOY_CASE.decisions):
        assert not terminated
        assert not truncated
        _, reward, terminated, truncated, info = env.step(action(learning_rate=6) if i == 0 else KEEP_ARRAY)
        total += reward

    assert (terminated, truncated, info["diverged"]) == (True, False, True)
    assert total[0] == pytest.approx(-1.0)


def test_a_complete_cool_down_terminates(case: RunConfig) -> None:
    env = LiveTraining([case], PREFERENCE, make_plant=steady_run)
    env.reset(seed=0)
    for _ in range(5):
        *_, terminated, truncated, _ = env.step(KEEP_ARRAY)
        assert not terminated
        assert not truncated
    # 5 of 12 intervals were 160 of 384 sequences: 32 more, which is one interval
    *_, terminated, truncated, info = env.step(action(finish=1))

    assert (terminated, truncated) == (True, False)
    assert info["effective"]["finishing"]
    assert isinstance(env.plant, LiveRun)
    assert env.plant.progress.sequences == 192
    assert info["loss"] == env.plant.evaluate()


def test_a_used_up_budget_truncates() -> None:
    env = LiveTraining([TOY_CASE], make_plant=ToyPlant)
    env.reset(seed=0)
    flags = [env.step(KEEP_ARRAY)[2:4] for _ in range(TOY_CASE.decisions)]

    assert flags == [(False, False)] * (TOY_CASE.decisions - 1) + [(False, True)]


class BareToy(ToyPlant):
    """A toy whose batch may be doubled once, and whose device has fp32 only."""

    def limits(self) -> ControlLimits:
        return make_limits(
            max_batch_size=16, masked_precisions={"bf16": "not on this device"}, pruning="none", decisions=20
        )


def test_masked_choices_are_kept_and_told(case: RunConfig) -> None:
    env = LiveTraining([TOY_CASE], PREFERENCE, make_plant=BareToy)
    env.reset(seed=0)
    wish = action(learning_rate=4, batch_size=2, precision=3, pruning=1, finish=1)
    *_, info = env.step(wish)

    assert info["requested"] == {
        "learning_rate_scale": 1.19,
        "batch_size": 16,
        "precision": "fp32",
        "sparsity": 0.0,
        "finish": False,
    }
    assert info["refusals"] == [
        "precision bf16: not on this device",
        "pruning +5 %: this run does not prune",
        "finish cool down: not before 20% of the budget",
    ]
    *_, info = env.step(wish)
    assert info["requested"]["batch_size"] == 16
    assert "batch_size double: 32 sequences outside [1, 16]" in info["refusals"]


def test_the_masks_are_field_after_field() -> None:
    env = LiveTraining([TOY_CASE], make_plant=BareToy)
    env.reset(seed=0)

    assert env.action_masks().tolist() == [
        *[True] * 7,
        *[True, True, True],
        *[True, False, True, False, True],  # fp32 is in force
        *[True, False],
        *[True, False],
    ]
    assert ScalarReward(env).action_masks().tolist() == env.action_masks().tolist()


def test_references_are_run_once_and_those_of_own_plants_stay_off_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path))
    made: list[RunConfig] = []

    def make(config: RunConfig) -> Plant:
        made.append(config)
        return ToyPlant(config)

    env = LiveTraining([TOY_CASE, replace(TOY_CASE, seed=1)], make_plant=make)
    for _ in range(3):
        for index in (0, 1):
            env.reset(options={"case": index})

    assert len(made) == 6 + 2 * 3  # six episodes, and three reference runs for each case
    assert list(tmp_path.iterdir()) == []


def test_a_reference_of_a_real_run_is_found_again_on_the_disk(
    case: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path))
    short = replace(case, tokens=4 * 1_024, decisions=4)
    envs = [LiveTraining([short], threads=1) for _ in range(2)]
    for env in envs:
        env.reset(seed=0)

    assert len(list((tmp_path / "reference").iterdir())) == 1
    assert envs[0].reference == envs[1].reference


def test_it_can_be_made_by_its_id(case: RunConfig) -> None:
    import trainpilot.envs  # noqa: F401

    env: Any = gymnasium.make("trainpilot/LiveTraining-v0", cases=[case], make_plant=steady_run)
    env.reset(seed=0)
    observation, reward, *_ = env.step(KEEP_ARRAY)

    assert isinstance(env.unwrapped, LiveTraining)
    assert observation in env.observation_space
    assert np.shape(reward) == (3,)
    assert gymnasium.make("trainpilot/LiveTraining-v0").unwrapped.cases == (DEFAULT_CASE,)  # type: ignore[attr-defined]


def test_mo_gymnasium_s_linear_reward_works_on_it() -> None:
    mo_gymnasium = pytest.importorskip("mo_gymnasium")
    env = mo_gymnasium.wrappers.LinearReward(
        mo_gymnasium.make("trainpilot/LiveTraining-v0", cases=[TOY_CASE], make_plant=ToyPlant),
        weight=np.array([0.6, 0.3, 0.1]),
    )
    env.reset(seed=0)
    _, reward, _, _, info = env.step(KEEP_ARRAY)

    assert env.unwrapped.reward_dim == 3
    assert info["vector_reward"] in env.unwrapped.reward_space
    assert reward == pytest.approx(float(info["vector_reward"] @ [0.6, 0.3, 0.1]))


def docstring_table(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading of the environment's docstring, less its title rows."""
    _, _, section = inspect.getdoc(LiveTraining).partition(f"## {heading}\n")  # type: ignore[union-attr]
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_docstring_s_actions_are_the_action_space() -> None:
    text = inspect.getdoc(LiveTraining) or ""
    (sizes,) = re.findall(r"MultiDiscrete\(\[([\d, ]+)\]\)", text)
    space = LiveTraining().action_space
    assert isinstance(space, spaces.MultiDiscrete)

    assert [int(size) for size in sizes.split(",")] == space.nvec.tolist()
    assert [row[:3] for row in docstring_table("Action space")] == [
        [str(i), field.name, ", ".join(field.choices)] for i, field in enumerate(ACTION_FIELDS)
    ]


def test_the_docstring_s_observations_are_the_observation_space() -> None:
    text = inspect.getdoc(LiveTraining) or ""
    ((low, high, stack, fields),) = re.findall(r"Box\((-?\d+), (\d+), \((\d+) \* (\d+),\), float32\)", text)
    space = LiveTraining().observation_space

    assert (int(stack), int(fields)) == (N_STACK, len(OBSERVATION_FIELDS))
    assert space == spaces.Box(float(low), float(high), (int(stack) * int(fields),), np.float32)


def test_the_docstring_s_rewards_are_the_objectives() -> None:
    env = LiveTraining()
    rows = docstring_table("Reward")

    assert [row[:2] for row in rows] == [[str(i), name] for i, name in enumerate(OBJECTIVES)]
    assert env.reward_dim == len(rows)
    assert env.reward_space.shape == (len(rows),)


def test_the_docstring_s_arguments_are_the_signature() -> None:
    names = list(inspect.signature(LiveTraining).parameters)

    assert [row[0] for row in docstring_table("Arguments")] == names
