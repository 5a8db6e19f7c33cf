"""Training ends in a bundle that steers, resumes after an interruption, and refuses another recipe."""

import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from policies import random_weights
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.sb3_env import seen_inputs
from trainpilot.agents.simulator_training import SimulatorAgent, SimulatorStage
from trainpilot.experiments import train_agent as module
from trainpilot.experiments.inspect_run import inspect_path
from trainpilot.experiments.options import TrainAgentOptions
from trainpilot.experiments.recipe import load_recipe
from trainpilot.experiments.train_agent import train_agent
from trainpilot.llm_runtime.files import save_checkpoint

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
RECIPE = """
common: {{model: {place}/model.json, text: {place}/text.txt, tokens: 5120, batch_size: 4, sequence_length: 16,
          decisions: 8}}
vary: {{base_learning_rate: [1.0e-3, 3.0e-3]}}
ppo: {{total_decisions: 96, n_steps: 16, batch_size: 16}}
n_envs: 2
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once, with an interruption after the second update."""
    place = tmp_path_factory.mktemp("agent")
    (place / "text.txt").write_text("".join(f"line {i} says {i * i % 97}\n" for i in range(4000)))
    (place / "model.json").write_text(json.dumps(CONFIG))
    (place / "recipe.yaml").write_text(RECIPE.format(place=place))
    options = TrainAgentOptions(recipe=str(place / "recipe.yaml"), out=place / "out")
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "bundle_of", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_agent(options, Console(file=StringIO()))
    patch.undo()
    assert (place / "out" / "checkpoint.pt").exists()
    assert not (place / "out" / "policy.safetensors").exists()
    train_agent(options, Console(file=StringIO()))
    return place


def test_a_checkpoint_without_a_policy_is_one_line(tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    for policy in ({}, 5, {"action_net.weight": None}):
        save_checkpoint(tmp_path / "checkpoint.pt", {"policy": policy})
        with pytest.raises(ValueError, match="cannot be resumed"):
            module._groups(recipe, tmp_path)


def test_a_training_without_live_runs_stays_on_this_machine(tmp_path: Path) -> None:
    options = TrainAgentOptions(recipe="default", out=tmp_path / "out", on="ray")
    with pytest.raises(ValueError, match="on: recipe default has no live runs to be executed on ray; leave it out"):
        train_agent(options, Console(file=StringIO()))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_bundle_says_where_it_comes_from(trained: Path) -> None:
    bundle = PolicyBundle.load(trained / "out" / "policy.safetensors")
    cases = load_recipe(str(trained / "recipe.yaml")).live_cases()
    assert bundle.decisions == 8
    assert bundle.provenance["training_cases"] == json.loads(json.dumps([asdict(case) for case in cases]))
    cost = bundle.provenance["training_cost"]
    assert cost["decisions"] == 96
    assert cost["episodes"] >= 10
    assert cost["energy_j"] > 0
    assert (trained / "out" / "policy.safetensors").stat().st_size < 2**20


def test_tensorboard_shows_the_training(trained: Path) -> None:
    events = EventAccumulator(str(trained / "out" / "tb"))
    events.Reload()
    tags = events.Tags()
    assert {"agent/quality", "agent/energy_j", "rollout/ep_rew_mean", "train/approx_kl"} <= set(tags["scalars"])
    assert "agent/greedy_run" in tags["images"]


def test_a_trained_agent_is_not_trained_again_and_can_be_inspected(trained: Path) -> None:
    text = StringIO()
    options = TrainAgentOptions(recipe=str(trained / "recipe.yaml"), out=trained / "out")
    train_agent(options, Console(file=text, width=300))
    assert "already trained" in text.getvalue()
    inspect_path(trained / "out", Console(file=text, width=300))
    assert "tensorboard --logdir" in text.getvalue()


def test_another_recipe_in_the_same_folder_is_refused(trained: Path) -> None:
    options = TrainAgentOptions(recipe=str(trained / "recipe.yaml"), out=trained / "out", set=("ppo.seed=9",))
    with pytest.raises(ValueError, match="holds something else"):
        train_agent(options, Console(file=StringIO()))


def test_inspecting_nothing_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path must be a bundle"):
        inspect_path(tmp_path, Console(file=StringIO()))


@pytest.mark.slow
def test_live_runs_on_a_ray_cluster_train_a_policy(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options = TrainAgentOptions(
        recipe=str(trained / "recipe.yaml"),
        out=trained / "ray",
        on="ray",
        set=("ppo.total_decisions=32", "n_envs=1"),
    )
    bundle = train_agent(options, Console(file=StringIO()))

    assert bundle.provenance["training_cost"]["decisions"] == 32
    assert (trained / "ray" / "policy.safetensors").is_file()


BOTH_STAGES = """
simulator: {{n_runs: 8, instances: 16, seeds: 1, decisions: 8, hide: [curvature],
             ppo: {{total_decisions: 128, n_steps: 8, batch_size: 32}}, validation: {{instances: 8, every: 1}}}}
reference_learning_rate: 2.0e-3
"""


@pytest.fixture(scope="module")
def both(trained: Path) -> Path:
    """Train in the simulator and then live, with an interruption in between."""
    (trained / "both.yaml").write_text(BOTH_STAGES.format() + RECIPE.format(place=trained))
    options = TrainAgentOptions(recipe=str(trained / "both.yaml"), out=trained / "both", set=("n_envs=1",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "live_stage", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_agent(options, Console(file=StringIO()))
    assert (trained / "both" / "simulator" / "policy.safetensors").is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_agents", _interrupt)  # the first stage is not run again
        train_agent(options, Console(file=StringIO()))
    return trained / "both"


def test_both_stages_end_in_a_bundle_that_says_what_they_were(both: Path) -> None:
    bundle = PolicyBundle.load(both / "policy.safetensors")
    base = bundle.base_schedule
    cost = bundle.provenance["training_cost"]

    assert base is not None
    assert (base.schedule, base.warmup_share, bundle.decisions) == ("wsd", 0.1, 8)
    assert (cost["decisions"], cost["simulator"]["decisions"], cost["live"]["decisions"]) == (224, 128, 96)
    assert cost["energy_j"] == pytest.approx(cost["simulator"]["energy_j"] + cost["live"]["energy_j"])
    assert {case["schedule"] for case in bundle.provenance["training_cases"]} == {"wsd"}
    assert {case["warmup_tokens"] for case in bundle.provenance["training_cases"]} == {512}
    assert bundle.provenance["simulator"]["hide"] == ["curvature"]
    assert bundle.provenance["scores"]["simulator"]["n_runs"] == 8
    assert [each["seed"] for each in bundle.provenance["simulator_agents"]] == [0]
    inspect_path(both, Console(file=StringIO()))


def test_live_stage_moves_the_simulators_weights_and_sees_nothing_hidden(both: Path) -> None:
    before = PolicyBundle.load(both / "simulator" / "policy.safetensors").weights
    after = PolicyBundle.load(both / "policy.safetensors").weights
    seen = seen_inputs(("curvature",))

    moved = np.abs(after["hidden.0.weight"] - before["hidden.0.weight"])
    assert 0 < moved.max() < 0.1
    assert (after["hidden.0.weight"][:, ~seen] == 0).all()


def test_without_live_decisions_the_simulators_policy_is_the_policy(both: Path) -> None:
    recipe = str(both.parent / "both.yaml")
    options = TrainAgentOptions(recipe=recipe, out=both.parent / "simulated", set=("ppo.total_decisions=0",))
    text = StringIO()
    bundle = train_agent(options, Console(file=text, width=300))

    stored = PolicyBundle.load(options.out / "simulator" / "policy.safetensors")
    assert bundle.provenance == stored.provenance
    assert bundle.provenance["training_cases"] == []
    assert not (options.out / "checkpoint.pt").exists()
    assert "agent 0: compute multiplier" in text.getvalue()
    assert "128 decisions" in text.getvalue()


@pytest.mark.parametrize(
    ("keep", "kept", "says"),
    [
        (None, 1, "kept: agent 1\n"),
        (1, 1, "kept: agent 1\n"),
        (2, 2, "kept: agent 2, as simulator.keep says, though agent 1 scored 0.9 against 0.4\n"),
    ],
)
def test_the_best_agent_is_kept_or_the_report_says_that_it_is_not(
    keep: int | None, kept: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = {"decisions": 1.0, "episodes": 1.0, "energy_j": 1.0, "time_s": 1.0}
    agents = [
        SimulatorAgent(
            seed=seed, decisions=10, bundle=PolicyBundle(random_weights(seed)), score=score, cost=cost,
            scores={"multiplier": score, "multiplier_p10": score},
        )
        for seed, score in ((1, 0.9), (2, 0.4), (0, 0.1))
    ]  # fmt: skip
    monkeypatch.setattr(module, "train_agents", lambda *_: agents)
    out, stage = StringIO(), SimulatorStage(seeds=3, keep=keep)
    bundle = module.simulator_stage(stage, TrainAgentOptions(recipe="default", out=tmp_path), Console(file=out))
    assert bundle.provenance["simulator_seed"] == kept
    assert np.array_equal(bundle.weights["action.bias"], agents[0 if kept == 1 else 1].bundle.weights["action.bias"])
    assert out.getvalue().endswith(says)


def test_the_recipe_that_comes_along_keeps_the_best() -> None:
    stage = load_recipe("default").simulator
    assert stage is not None
    assert stage.keep is None
