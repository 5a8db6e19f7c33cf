"""An agent learns in the simulator, goes on where it was, and never sees what is hidden from it."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainpilot.agents.logging.tags import tags_of
from trainpilot.agents.sb3_env import HiddenInputs, ScalarVecEnv, hidden_from, seen_inputs
from trainpilot.agents.simulator_training import (
    SimulatorAgent,
    SimulatorPPOConfig,
    SimulatorStage,
    ValidationSettings,
    best_weights,
    train_in_simulator,
)
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.environments import VectorSimulatedTraining
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.experiments import train_agent, workers
from trainpilot.experiments.options import TrainAgentOptions
from trainpilot.experiments.train_agent import physics_of, total_cost, train_agents
from trainpilot.llm_runtime.simulator.runs import SimulatedRuns, default_pool

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


def test_a_trained_agent_is_not_trained_again(agent: SimulatorAgent, folder: Path) -> None:
    again = train_in_simulator(TINY, 0, physics_of("shipped"), folder)

    assert again.cost == agent.cost
    assert again.scores == agent.scores
    for name, value in agent.bundle.weights.items():
        np.testing.assert_array_equal(again.bundle.weights[name], value)


def test_the_best_weights_are_kept_with_those_of_the_value_network(agent: SimulatorAgent, folder: Path) -> None:
    weights = best_weights(folder)

    assert any("value_net" in name for name in weights)
    kept = weights["action_net.weight"].numpy()
    np.testing.assert_array_equal(kept, agent.bundle.weights["action.weight"])
    assert agent.scores["n_runs"] == 16
    with pytest.raises(ValueError, match="is gone"):
        best_weights(folder / "nowhere")


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
