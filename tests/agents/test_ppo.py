"""PPO starts near the base schedule, learns a toy plant whose best control is known, and resumes."""

import math
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import TOY_CASE, ToyPlant, steady_meter
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from trainpilot.agents.controller import Controller
from trainpilot.agents.ppo import PPOConfig, bundle_of, end_processes, initial_bias, make_ppo, train
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.decision import Preference
from trainpilot.envs.environments import LiveTraining
from trainpilot.envs.reward import ScalarReward
from trainpilot.llm_runtime.files import load_checkpoint, save_checkpoint
from trainpilot.llm_runtime.process import global_random_state

QUALITY_ONLY = Preference(quality=1, energy=0, time=0)


def toy_env(n_envs: int = 4) -> VecEnv:
    def make() -> ScalarReward:
        return ScalarReward(LiveTraining([TOY_CASE], preference=QUALITY_ONLY, make_plant=ToyPlant))

    return DummyVecEnv([make] * n_envs)


def test_the_untrained_policy_mostly_keeps() -> None:
    bias = initial_bias(PPOConfig(keep_probability=0.7, finish_probability=0.01))
    start = 0
    for field in ACTION_FIELDS:
        logits = bias[start : start + len(field.choices)]
        start += len(field.choices)
        shares = np.exp(logits) / np.exp(logits).sum()
        assert shares[field.keep] == pytest.approx(0.99 if field.name == "finish" else 0.7, abs=1e-5)


def test_bundle_gives_the_agents_own_greedy_actions() -> None:
    env = toy_env(1)
    model = make_ppo(env, PPOConfig(seed=3))
    layer = model.policy.action_net
    assert isinstance(layer, torch.nn.Linear)
    torch.nn.init.normal_(layer.weight)
    bundle = bundle_of(model, {})
    random = np.random.default_rng(0)
    for _ in range(20):
        observation = random.uniform(-1, 1, env.observation_space.shape).astype(np.float32)
        masks = random.random(sum(len(f.choices) for f in ACTION_FIELDS)) < 0.7
        start = 0
        for field in ACTION_FIELDS:
            masks[start + field.keep] = True
            start += len(field.choices)
        expected, _ = model.predict(observation, action_masks=masks, deterministic=True)
        assert bundle.act(observation, masks) == tuple(expected)


@pytest.mark.slow
def test_ppo_learns_the_best_learning_rate_of_a_toy(tmp_path: Path) -> None:
    config = PPOConfig(total_decisions=12_000, n_steps=200, batch_size=200, n_epochs=8, learning_rate=2e-3, seed=1)
    model, cost = train(toy_env(), config, tmp_path)
    assert cost["decisions"] >= 12_000
    plant = ToyPlant()
    controller = Controller.of_bundle(bundle_of(model, {}), plant.limits(), QUALITY_ONLY)
    telemetry, scales = None, []
    while telemetry is None or not telemetry.finished:
        controls = controller.decide(telemetry)
        scales.append(controls.learning_rate_scale)
        telemetry = plant.advance(controls, 1 / TOY_CASE.decisions)
    assert ToyPlant.BEST_SCALE / 2 < np.median(scales[5:]) < ToyPlant.BEST_SCALE * 2
    base = ToyPlant()
    while base.tokens < TOY_CASE.tokens:
        base.advance(TOY_CASE.start(), 1 / TOY_CASE.decisions)
    assert plant.work > 1.5 * base.work  # the best possible is just below 2


def test_training_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    first = PPOConfig(total_decisions=400, n_steps=50, batch_size=50)
    train(toy_env(), first, tmp_path)
    model, cost = train(toy_env(), PPOConfig(total_decisions=800, n_steps=50, batch_size=50), tmp_path)
    assert model.num_timesteps == 800
    assert cost["decisions"] == 800
    assert cost["energy_j"] == pytest.approx(2 * 0.1 * 400 * TOY_CASE.tokens / TOY_CASE.decisions, rel=0.3)
    again, _ = train(toy_env(), PPOConfig(total_decisions=800, n_steps=50, batch_size=50), tmp_path)
    for a, b in zip(model.policy.parameters(), again.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_resumed_training_draws_on_where_it_stopped(tmp_path: Path) -> None:
    config, first, second = PPOConfig(total_decisions=40, n_steps=20, batch_size=20), toy_env(2), toy_env(2)
    train(first, config, tmp_path)
    drawn = global_random_state()
    torch.rand(1)
    np.random.random()
    random.random()
    train(second, config, tmp_path)  # has nothing to do but to load the checkpoint

    states = [[each.bit_generator.state for each in env.get_attr("np_random")] for env in (first, second)]
    assert states[0] == states[1]
    now = global_random_state()
    assert now["python"] == drawn["python"]
    assert torch.equal(now["torch"], drawn["torch"])
    assert torch.equal(now["numpy"]["state"]["key"], drawn["numpy"]["state"]["key"])
    assert now["numpy"]["state"]["pos"] == drawn["numpy"]["state"]["pos"]


def test_a_checkpoint_without_random_state_is_loaded(tmp_path: Path) -> None:
    config = PPOConfig(total_decisions=20, n_steps=20, batch_size=20)
    train(toy_env(1), config, tmp_path)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint is not None
    del checkpoint["random"], checkpoint["env"]  # as version 0.2 wrote it
    save_checkpoint(tmp_path / "checkpoint.pt", checkpoint)
    model, _ = train(toy_env(1), replace(config, total_decisions=40), tmp_path)
    assert model.num_timesteps == 40


def test_processes_end_without_finishing_their_step() -> None:
    env: Any = toy_env(1)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    env.processes = [SimpleNamespace(terminate=process.terminate, join=process.wait)]
    end_processes(VecMonitor(env))
    assert process.poll() == -signal.SIGTERM


def test_the_learning_rate_falls_linearly_to_its_end(tmp_path: Path) -> None:
    config = PPOConfig(total_decisions=400, n_steps=50, batch_size=50, learning_rate=2e-3, learning_rate_end=0.25)
    assert [config.learning_rate_at(left) for left in (1.0, 0.5, 0.0, -0.1)] == pytest.approx(
        [2e-3, 1.25e-3, 5e-4, 5e-4]
    )
    model, _ = train(toy_env(), config, tmp_path)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4), "at the last update"
    assert PPOConfig(learning_rate=1e-3).learning_rate_at(0.1) == pytest.approx(1e-3), "constant by default"


def test_training_begins_with_given_weights_and_may_have_no_decisions(tmp_path: Path) -> None:
    other = make_ppo(toy_env(1), PPOConfig(seed=5)).policy.state_dict()
    model, cost = train(toy_env(1), PPOConfig(total_decisions=0), tmp_path, start=other)
    for name, value in model.policy.state_dict().items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0)
    assert cost["decisions"] == 0
    with pytest.raises(ValueError, match=r"^policy must hold value_net.bias of shape \(1,\) in torch.float32$"):
        train(
            toy_env(1),
            PPOConfig(total_decisions=0),
            tmp_path / "new",
            start={**other, "value_net.bias": torch.zeros(0)},
        )


def test_a_meter_counts_what_simulated_runs_do_not_cost(tmp_path: Path) -> None:
    config = PPOConfig(total_decisions=400, n_steps=50, batch_size=50)
    _, cost = train(toy_env(), config, tmp_path, meter=steady_meter())
    assert (cost["energy_j"], cost["time_s"]) == (10.0, 2.0), "two updates, a reading after each"


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be resumed"):
        train(toy_env(), PPOConfig(total_decisions=100, n_steps=50, batch_size=50), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_steps", 0),
        ("total_decisions", -1),
        ("keep_probability", 1.0),
        ("learning_rate", 0.0),
        ("learning_rate_end", -0.5),
        ("gae_lambda", 1.5),
    ],
)
def test_bad_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"ppo\.{name} must be .*got {value}"):
        PPOConfig(**{name: value})  # type: ignore[arg-type]


def test_a_checkpoint_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    env, config = toy_env(1), PPOConfig(total_decisions=0, hidden=(4,))
    policy = make_ppo(env, config).policy
    cost = {"decisions": 1.0, "episodes": 0.0, "energy_j": math.nan, "time_s": 1.0}
    good = {"policy": policy.state_dict(), "optimizer": policy.optimizer.state_dict(), "num_timesteps": 1,
            "n_updates": 1, "cost": cost}  # fmt: skip
    drawn = global_random_state()
    save_checkpoint(tmp_path / "checkpoint.pt", good)
    assert train(env, config, tmp_path)[0].num_timesteps == 1
    name, weights = next(iter(policy.state_dict().items()))
    changes: tuple[dict[str, Any], ...] = (
        {"policy": {}},
        {"policy": {**policy.state_dict(), name: weights * math.nan}},
        {"policy": {**policy.state_dict(), name: weights[:1]}},
        {"policy": {**policy.state_dict(), name: weights.long()}},
        {"policy": {**policy.state_dict(), "another": weights}},
        {"random": {**drawn, "numpy": {**drawn["numpy"], "state": {**drawn["numpy"]["state"], "pos": -5}}}, "env": {}},
        {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}},
        {"num_timesteps": -5},
        {"n_updates": "many"},
        {"cost": {"decisions": 1.0}},
    )
    for change in changes:
        save_checkpoint(tmp_path / "checkpoint.pt", good | change)
        with pytest.raises(
            ValueError, match=r"^out: .*checkpoint.pt cannot be resumed \(.*\); remove it to start anew$"
        ):
            train(env, config, tmp_path)
