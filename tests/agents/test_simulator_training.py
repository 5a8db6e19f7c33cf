"""Agents learn in the simulator, resume, never see what is hidden, and get the same scores every time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_plant_batch import some_actions
from policies import random_weights
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.logging.tags import tags_of
from trainpilot.agents.ppo import bundle_of, make_ppo
from trainpilot.agents.sb3_env import HiddenInputs, PrivilegedVecEnv, ScalarVecEnv, hidden_from, seen_inputs
from trainpilot.agents.simulator_training import (
    START_GROUPS,
    SimulatorAgent,
    SimulatorPPOConfig,
    SimulatorStage,
    ValidationSettings,
    best_weights,
    evaluate_in_simulator,
    train_in_simulator,
)
from trainpilot.envs.action import KEEP, N_CHOICES
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS, fields_of
from trainpilot.envs.vector import VectorSimulatedTraining
from trainpilot.experiments import train_agent, workers
from trainpilot.experiments.options import TrainAgentOptions
from trainpilot.experiments.train_agent import physics_of, total_cost, train_agents
from trainpilot.llm_runtime.files import digest, load_checkpoint, save_checkpoint
from trainpilot.llm_runtime.simulator.records import Bools, Ints
from trainpilot.llm_runtime.simulator.runs import PRIVILEGED, Pool, SimulatedRuns, Start, default_pool

NAMES = [field.name for field in OBSERVATION_FIELDS]
TINY = SimulatorStage(
    n_runs=8,
    instances=16,
    seeds=1,
    hide=("curvature",),
    stack=2,
    ppo=SimulatorPPOConfig(total_decisions=800, batch_size=200, learning_rate=3e-3, hidden=(16,)),
    validation=ValidationSettings(instances=16, every=1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stage") / "0"


@pytest.fixture(scope="module")
def agent(folder: Path) -> SimulatorAgent:
    """Trained for half of its decisions, then as a whole."""
    half = replace(TINY, ppo=replace(TINY.ppo, total_decisions=400))
    first = train_in_simulator(half, 0, physics_of("shipped"), folder)
    assert first.cost["decisions"] == 400
    return train_in_simulator(TINY, 0, physics_of("shipped"), folder)


def test_training_goes_on_and_counts_what_this_machine_spent(agent: SimulatorAgent) -> None:
    assert agent.cost["decisions"] == 800
    assert agent.cost["episodes"] >= 16
    assert 0 < agent.cost["time_s"] < 120, "seconds of the clock, not of the simulated runs"
    assert agent.cost["energy_j"] > 0


class Killed(BaseException):
    """The process is gone."""


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = default_pool(16)
    monkeypatch.setattr(SimulatorStage, "pool", lambda *_: pool)
    ppo = replace(TINY.ppo, n_steps=30, batch_size=120, n_epochs=1, total_decisions=4 * 30 * 3)  # updates cut the runs
    stage = replace(TINY, n_runs=4, ppo=ppo, validation=ValidationSettings(instances=4, every=2), start_scale=0.5)

    def kill(done: int) -> None:
        if done > 4 * 75:
            raise Killed

    whole = train_in_simulator(stage, 0, (), tmp_path / "whole")
    with pytest.raises(Killed):
        train_in_simulator(stage, 0, (), tmp_path / "cut", progress=kill)
    cut = train_in_simulator(stage, 0, (), tmp_path / "cut")

    one, other = (load_checkpoint(tmp_path / each / "checkpoint.pt") for each in ("whole", "cut"))
    assert one is not None
    assert other is not None
    assert one["num_timesteps"] == 4 * 30 * 3
    assert one["cost"]["episodes"] == other["cost"]["episodes"] > 0
    for name in ("policy", "optimizer", "env", "random"):
        assert digest_of(one[name]) == digest_of(other[name]), name
    assert (whole.scores, whole.decisions) == (cut.scores, cut.decisions)


def digest_of(content: object) -> str:
    """Return a digest of nested values that tells every bit of every tensor."""
    if isinstance(content, torch.Tensor):
        return digest(content.contiguous().numpy().tobytes())
    if isinstance(content, dict):
        return digest({str(name): digest_of(value) for name, value in content.items()})
    if isinstance(content, list | tuple):
        return digest([digest_of(value) for value in content])
    return repr(content)


def test_a_trained_agent_is_not_trained_again(agent: SimulatorAgent, folder: Path) -> None:
    again = train_in_simulator(TINY, 0, physics_of("shipped"), folder)

    assert again.cost == agent.cost
    assert again.scores == agent.scores
    for name, value in agent.bundle.weights.items():
        np.testing.assert_array_equal(again.bundle.weights[name], value)


def test_a_checkpoint_of_other_runs_is_refused_before_anything_is_written(
    agent: SimulatorAgent, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = default_pool(16)
    monkeypatch.setattr(SimulatorStage, "pool", lambda *_: pool)
    content = load_checkpoint(folder / "checkpoint.pt")
    assert content is not None
    runs, validation = content["env"]["runs"]["env"], content["callbacks"]["Validation"]
    best, physics = validation["best"], runs["plants"]["instances"]["physics"]["values"]

    def refusal(holder: dict[str, Any], name: str, value: object) -> str:
        kept, holder[name] = holder[name], value
        save_checkpoint(tmp_path / "checkpoint.pt", content)
        holder[name] = kept
        with pytest.raises(ValueError, match="cannot be resumed") as caught:
            train_in_simulator(TINY, 0, (), tmp_path)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoint.pt"]
        return str(caught.value)

    states, weights = runs["runs"]["states"], best["policy"]
    assert "state.runs.states.history must be a dictionary of" in refusal(states, "history", [states["history"]])
    assert "slow_noise must be float64 of shape" in refusal(physics, "slow_noise", physics["slow_noise"][None])
    assert "outcome must be float64 of shape (8, 3)" in refusal(runs["runs"], "outcome", torch.zeros(8, 3))
    assert "policy must hold value_net.bias" in refusal(weights, "value_net.bias", torch.zeros(0))
    assert "score" in refusal(best, "score", math.nan)
    assert "best fields missing" in refusal(validation, "best", {"x": None})


def test_the_best_weights_are_kept_with_those_of_the_value_network(agent: SimulatorAgent, folder: Path) -> None:
    n_inputs = N_STACK * len(NAMES)
    weights = best_weights(folder, n_inputs)

    first = [value for name, value in weights.items() if name.endswith("_net.0.weight")]
    assert [tuple(value.shape) for value in first] == [(16, n_inputs)] * 2  # policy and value, less what is privileged
    kept = weights["action_net.weight"].numpy()
    np.testing.assert_array_equal(kept, agent.bundle.weights["action.weight"])
    assert agent.scores["n_runs"] == 16
    with pytest.raises(ValueError, match="is gone"):
        best_weights(folder / "nowhere", n_inputs)


def test_only_the_value_network_sees_what_is_privileged() -> None:
    runs = SimulatedRuns(4, 0, default_pool(8))
    env = PrivilegedVecEnv(ScalarVecEnv(VectorSimulatedTraining(runs)), runs)
    model = make_ppo(env, SimulatorPPOConfig(hidden=(8,)), PRIVILEGED)
    seen = torch.as_tensor(env.reset())
    other = seen.clone()
    other[:, -PRIVILEGED:] += 0.5

    assert seen.shape == (4, N_STACK * len(NAMES) + PRIVILEGED)
    asked: list[Any] = [model.policy.get_distribution(each) for each in (seen, other)]
    actor = [each.distributions[0].logits for each in asked]
    torch.testing.assert_close(*actor, rtol=0, atol=0)
    assert (model.policy.predict_values(seen) != model.policy.predict_values(other)).all()
    bundle = bundle_of(model, {})
    logits = torch.as_tensor(bundle.logits(seen[:, :-PRIVILEGED].numpy())[:, : N_CHOICES[0]])
    torch.testing.assert_close(logits.log_softmax(dim=1), actor[0], rtol=0, atol=1e-5)


def test_what_is_privileged_tells_one_instance_from_another() -> None:
    runs = SimulatedRuns(64, 0, default_pool(64))
    known = runs.privileged()

    assert known.shape == (64, PRIVILEGED)
    assert (np.abs(known) <= 1).all()
    rate = np.clip(np.log2(runs.best_learning_rate / runs.start_learning_rate) / 6, -1, 1)
    np.testing.assert_allclose(known[:, 2], rate)
    assert (known[:, 0] == 1).all()  # tiny models, without an edge within reach
    assert (known[:, 4] == 1).all()


def test_the_bundle_ignores_exactly_what_was_hidden(agent: SimulatorAgent) -> None:
    seen = seen_inputs(TINY.hide, TINY.stack)
    random = np.random.default_rng(0)
    observation = random.uniform(-1, 1, (50, seen.size)).astype(np.float32)
    other = np.where(seen, observation, random.uniform(-1, 1, observation.shape)).astype(np.float32)

    np.testing.assert_array_equal(agent.bundle.logits(observation), agent.bundle.logits(other))
    np.testing.assert_array_equal(agent.bundle.weights["hidden.0.weight"][:, ~seen], 0.0)
    assert (agent.bundle.weights["hidden.0.weight"][:, seen] != 0).all()


def test_what_is_seen_is_the_newest_observations_less_the_hidden_fields() -> None:
    seen = seen_inputs(("curvature",), stack=2).reshape(N_STACK, len(NAMES))

    assert not seen[:-2].any()
    assert [name for name, is_seen in zip(NAMES, seen[-1], strict=True) if not is_seen] == ["curvature"]
    assert seen[-2].tolist() == seen[-1].tolist()
    assert seen_inputs().all()


def test_hidden_inputs_are_zero_and_all_others_as_they_were() -> None:
    def env() -> ScalarVecEnv:
        return ScalarVecEnv(VectorSimulatedTraining(SimulatedRuns(4, 0, default_pool(8))))

    plain, seen = env(), seen_inputs(("budget_used",), stack=3)
    hidden = hidden_from(env(), seen)
    actions = np.tile([3, 1, 0, 0, 0], (4, 1))
    for wrapped in (plain, hidden):
        wrapped.seed(1)
    for got, whole in ((hidden.reset(), plain.reset()), (hidden.step(actions)[0], plain.step(actions)[0])):
        np.testing.assert_array_equal(got, np.where(seen, np.asarray(whole), np.float32(0)))

    assert isinstance(hidden, HiddenInputs)
    assert hidden.env_method("action_masks")[0].tolist() == plain.action_masks()[0].tolist()
    assert hidden_from(plain, seen_inputs()) is plain


@pytest.mark.usefixtures("agent")
def test_tensorboard_shows_validation_and_episodes(folder: Path) -> None:
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    written = set(events.Tags()["scalars"])

    table = {tag.name for tag in tags_of("simulator")}
    assert {name for name in table if "/from_" not in name} <= written, "a group of starts may be empty"
    assert {name for name in written if name.startswith("validation/")} <= table
    assert {"agent/quality", "agent/diverged_share", "action/batch_size/keep", "train/learning_rate"} <= written
    assert events.Scalars("agent/length")[0].value <= 50
    best = [event.value for event in events.Scalars("validation/best_score")]
    assert best == sorted(best)


def test_agents_train_side_by_side_and_the_best_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_agent, "available_cores", lambda: 2)
    monkeypatch.setattr(workers, "REPORT_EVERY_S", 0.01)
    text = StringIO()
    agents = train_agents(replace(TINY, seeds=2), tmp_path, Console(file=text))

    assert sorted(agent.seed for agent in agents) == [0, 1]
    assert agents[0].score >= agents[1].score
    assert (tmp_path / "1" / "checkpoint.pt").is_file()
    assert "PPO on simulated runs, decisions 100%" in text.getvalue()


@pytest.mark.parametrize(("keep", "kept"), [(None, 1), (0, 0)])
def test_the_best_agent_is_kept_or_the_one_that_the_recipe_names(
    keep: int | None, kept: int, agent: SimulatorAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(TINY, seeds=2, keep=keep)
    trained = [replace(agent, seed=1, score=2.0), replace(agent, seed=0, score=1.0)]
    monkeypatch.setattr(train_agent, "train_agents", lambda *_: trained)
    bundle = train_agent.simulator_stage(
        stage, TrainAgentOptions(recipe="mine", out=tmp_path), Console(file=StringIO())
    )
    assert bundle.provenance["simulator_seed"] == kept
    assert bundle.provenance["scores"]["simulator"]["highest_score"] == 2.0


def test_only_an_agent_that_is_trained_can_be_kept() -> None:
    with pytest.raises(ValueError, match=r"simulator.keep must be the seed of an agent, \[0, 1\], got 2"):
        replace(TINY, seeds=2, keep=2)


def test_costs_add_up_and_one_unknown_part_makes_the_sum_unknown() -> None:
    one = {"decisions": 1.0, "episodes": 2.0, "energy_j": 3.0, "time_s": 4.0}

    assert total_cost([one, one]) == {"decisions": 2.0, "episodes": 4.0, "energy_j": 6.0, "time_s": 8.0}
    assert total_cost([one, {**one, "energy_j": float("nan")}])["energy_j"] is None
    assert total_cost([{**one, "energy_j": None}])["energy_j"] is None


def test_a_calibration_that_is_not_there_is_one_clear_line() -> None:
    assert len(physics_of(("shipped", "shipped"))) == 2 * len(physics_of("shipped"))
    with pytest.raises(ValueError, match=r"calibrations must be .*, got nowhere\.json"):
        physics_of(("nowhere.json",))


# Scores -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Pool:
    return default_pool(24, seed=7)


def keep(observations: np.ndarray, masks: Bools) -> Ints:
    return np.tile(KEEP, (len(observations), 1))


def first_then_keep(**choices: int) -> Callable[[np.ndarray, Bools], Ints]:
    """Return a policy that takes other choices at its first decision only."""
    fields = ("learning_rate", "batch_size", "precision", "pruning", "finish")
    calls: list[int] = []

    def act(observations: np.ndarray, masks: Bools) -> Ints:
        actions = keep(observations, masks)
        for name, choice in choices.items() if not calls else ():
            actions[:, fields.index(name)] = choice
        calls.append(1)
        return actions

    return act


def test_keeping_the_best_learning_rate_comes_near_the_tuned_static(pool: Pool) -> None:
    scores = evaluate_in_simulator(keep, pool, n_runs=48, start=Start(rates=(1.0, 1.0)))

    assert scores.learning_rate_over_best == pytest.approx([1.0] * 50)
    assert scores.batch_over_start == pytest.approx([1.0] * 50)
    assert scores.diverged_share == 0
    assert scores.by_start == {**dict.fromkeys(START_GROUPS), "near": scores.multiplier}
    assert 0 <= scores.multiplier_p10 <= scores.multiplier <= 1.2
    assert scores.score == pytest.approx((scores.multiplier + scores.multiplier_p10) / 2)


def test_a_wrong_start_costs_and_a_step_towards_the_best_rate_pays(pool: Pool) -> None:
    low = Start(rates=(0.1, 0.1))
    wrong = evaluate_in_simulator(keep, pool, n_runs=48, start=low)
    better = evaluate_in_simulator(first_then_keep(learning_rate=6), pool, n_runs=48, start=low)

    assert wrong.by_start["far_below"] == wrong.multiplier
    assert better.learning_rate_over_best == pytest.approx([0.2] * 50)
    assert better.multiplier > wrong.multiplier


def test_a_run_that_finishes_early_is_scored_as_it_ended(pool: Pool) -> None:
    def finish(observations: np.ndarray, masks: Bools) -> Ints:
        actions = keep(observations, masks)
        actions[:, 4] = 1
        return actions

    early = evaluate_in_simulator(finish, pool, n_runs=16)
    full = evaluate_in_simulator(keep, pool, n_runs=16)

    assert len(early.learning_rate_over_best) < 50
    assert early.time_over_reference < full.time_over_reference / 2
    assert early.multiplier < full.multiplier


def test_the_record_is_plain_json_and_the_same_every_time(pool: Pool) -> None:
    bundle = PolicyBundle(random_weights())
    one = evaluate_in_simulator(bundle, pool, seed=3, n_runs=8)

    assert one == evaluate_in_simulator(bundle, pool, seed=3, n_runs=8)
    assert one != evaluate_in_simulator(bundle, pool, seed=4, n_runs=8)
    assert json.loads(json.dumps(one.to_json(), allow_nan=False))["n_runs"] == 8


def test_many_rows_are_decided_as_one_is() -> None:
    bundle, random = PolicyBundle(random_weights()), np.random.default_rng(0)
    observations = random.uniform(-1, 1, (20, bundle.weights["hidden.0.weight"].shape[1])).astype(np.float32)
    masks = random.random((20, sum(N_CHOICES))) < 0.6
    masks[:, np.cumsum([0, *N_CHOICES[:-1]]) + np.array(KEEP)] = True

    actions = bundle.choose(observations, masks)

    assert [tuple(row) for row in actions] == [bundle.act(o, m) for o, m in zip(observations, masks, strict=True)]
    assert some_actions(random, masks, N_CHOICES).shape == actions.shape


def test_no_runs_are_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match="n_runs must be at least 1, got 0"):
        evaluate_in_simulator(keep, pool, n_runs=0)


def test_a_stage_selects_groups_of_observation_fields() -> None:
    without_prices = replace(TINY, observe=("law", "history"), hide=())

    assert {field.group for field in without_prices.fields} == {"basic", "law", "history"}
    assert without_prices.seen().size == N_STACK * len(without_prices.fields)
    assert SimulatorStage().fields == OBSERVATION_FIELDS
    with pytest.raises(ValueError, match="observe must name groups"):
        replace(TINY, observe=("mood",))
    with pytest.raises(ValueError, match="hide must name observation fields"):
        replace(TINY, observe=(), hide=("seconds_half",))


def test_an_agent_s_bundle_lists_the_fields_that_it_saw(tmp_path: Path) -> None:
    stage = replace(TINY, observe=("law",), hide=(), quality_alone=0.5)
    agent = train_in_simulator(stage, 1, physics_of("shipped"), tmp_path / "agent")
    agent.bundle.save(tmp_path / "policy.safetensors")

    assert PolicyBundle.load(tmp_path / "policy.safetensors").fields == fields_of(("law",))
