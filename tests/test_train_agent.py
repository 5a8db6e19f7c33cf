"""Training on live runs ends in a bundle that steers, resumes after an interruption, and refuses another recipe."""

import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.experiments import train_agent as module
from trainpilot.experiments.inspect_path import inspect_path
from trainpilot.experiments.options import TrainAgentOptions
from trainpilot.experiments.recipe import load_recipe
from trainpilot.experiments.train_agent import train_agent

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


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_bundle_says_where_it_comes_from(trained: Path) -> None:
    bundle = PolicyBundle.load(trained / "out" / "policy.safetensors")
    cases = load_recipe(str(trained / "recipe.yaml")).cases()
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
