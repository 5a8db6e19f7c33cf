"""Wrong settings are refused in one line where they are given, and the folder stays free for the corrected command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from policies import random_weights
from safetensors.numpy import save_file
from torch import nn

from trainpilot.agents.bundle import field_tables
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.experiments import cli
from trainpilot.experiments.compare.methods import choose_methods
from trainpilot.experiments.recipe import Recipe
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.models import load_model
from trainpilot.llm_runtime.ranges import ranges_of

TINY = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
MISSPELT = {("hidden_sise" if name == "hidden_size" else name): value for name, value in TINY.items()}
BERT = {"model_type": "bert", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("all work and no play makes a dull boy. " * 200)
    Path("no-calibration.json").write_text("{}")
    return tmp_path


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["trainpilot", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.startswith("trainpilot: ")
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()
    assert sorted(Path().rglob("*")) == before
    return said


TRAIN = ("train-agent", "--recipe", "default", "--out", "o", "--set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("simulator.ppo.total_decisions=[1", "set: simulator.ppo.total_decisions is not readable YAML"),
        ('ppo.seed=!!python/object/apply:os.system ["x"]', "set: ppo.seed is not readable YAML"),
        ("ppo.seed=" + "[" * 5_000, "it is nested more than 32 levels deep"),
        ("ppo.seed=2020-01-01", "it holds a date"),
        ("simulator.ppo.gamma=2", "ppo.gamma must be in [0, 1], got 2"),
        ("simulator.ppo.clip_range=-1", "ppo.clip_range must be in (0, 1], got -1"),
        ("simulator.ppo.max_grad_norm=-1", "ppo.max_grad_norm must be a positive number, got -1"),
        ("simulator.ppo.vf_coef=-1", "ppo.vf_coef must be in [0, 100], got -1"),
        ("simulator.ppo.hidden=[0]", "must be a whole number of at least 1, got 0"),
        ("simulator.ppo.hidden=[-5]", "must be a whole number of at least 1, got -5"),
        ("simulator.ppo.learning_rate=1e30", "ppo.learning_rate must be in (0, 1], got"),
        ("simulator.ppo.total_decisions=true", "total_decisions must be a whole number of at least 1, got True"),
        ("simulator.ppo.seed=-1", "ppo.seed must be a whole number of at least 0, got -1"),
        ("simulator.ppo.seed=99999999999999999999", "whole numbers must be at most"),
        ("simulator.ppo.seed=4294967295", "must leave room for 2 seeds"),
        ("simulator.ppo.batch_size=1", "ppo.batch_size must be a whole number of at least 2, got 1"),
        ("simulator.widening.spread=1e30", "widening.spread must be in [0, 10], got"),
        ("simulator.start_rates=[1e-300,1e300]", "must be in [1e-06, 1000000], got 1e-300"),
        ("simulator.calibrations=[/nonexistent]", "/nonexistent, which is not there"),
        ("simulator.calibrations=[no-calibration.json]", "no-calibration.json: ValueError"),
    ],
)
def test_recipe(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert message in refused(monkeypatch, capsys, *TRAIN, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [("common.text=[/nonexistent]", "/nonexistent"), ("common.model=nosuch.json", "no file nosuch.json")],
)
def test_texts_and_models_of_a_recipe_are_read_before_anything_starts(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert message in refused(monkeypatch, capsys, "train-agent", "--recipe", "demo", "--out", "o", "--set", change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("replay", "--out", ""), "--out: it must name a file or a folder"),
        (("inspect", ""), "it must name a file or a folder, got an empty text"),
        (("inspect", "a", " "), "it must name a file or a folder"),
        (("inspect", "loop", "other/loop"), "path must hold a run's telemetry.jsonl, got loop"),
        (("report", "", "--out", "o.html"), "it must name a file or a folder"),
        (("report", "loop", "--reference", "loop", "--out", "o.html"), "path must hold a run's telemetry.jsonl"),
        (("report", "run", "--out", ""), "--out: it must name a file or a folder"),
        (("report", "run", "--reference", "", "--out", "o.html"), "--reference: it must name a file or a folder"),
        (("cut", "", "--out", "o", "--ffn", "0.5"), "it must name a file or a folder"),
        (("cut", "loop", "--out", "o", "--ffn", "0.5"), "path must be a run's folder or a model folder, got loop"),
        (("export", "", "--out", "o"), "it must name a file or a folder"),
        (("export", "loop", "--out", "o"), "path must be a run's folder or a model folder, got loop"),
        (("fit-sweep", "", "--out", "o"), "it must name a file or a folder"),
        (("fit-sweep", "sweep.csv", "--predict", "", "--out", "o"), "--predict: it must name a file or a folder"),
        (("replay", "--out", "o", "--device", "cpu:1"), "device: 'cpu:1' is not there, as torch sees 1 of that type"),
        (("replay", "--out", "o", "--threads", "1000000"), "threads must be a whole number of at most 1024"),
        (("replay", "--out", "o", "--device", "meta"), "device must be auto, cpu, cuda or mps, got 'meta'"),
        (("replay", "--out", "o", "--seed", "-1"), "seed must be a whole number of at least 0, got -1"),
        (("replay", "--out", "o", "--base-learning-rate", "1e300"), "base_learning_rate must be at most 1000"),
        (("replay", "--out", "o", "--preference", "quality=1,quality=2"), "preference must weigh quality once"),
        (("replay", "--out", "o", "--grid-intensity", "inf"), "grid_intensity must be a number >= 0, got inf"),
        (("compare", "--out", "o", "--methods", "tuned,,cosine"), "methods must be names with commas between them"),
        (("compare", "--out", "o", "--seeds", "0"), "seeds must be a whole number of at least 1, got 0"),
        (("compare", "--out", "o", "--cases", "long.json"), "name must be made of at most 64 of a-z"),
        (("compare", "--out", "o", "--cases", "deep.yaml"), "is not readable YAML: it is nested more than 32"),
        (("compare", "--out", "o", "--cases", "deep.json"), "is not readable JSON: it is nested more than"),
        (("compare", "--out", "o", "--cases", "bomb.yaml"), "it holds more than 100,000 values"),
        (("compare", "--out", "o", "--cases", "large.yaml"), "it is larger than"),
        (("calibrate", "--out", "/proc/x"), "/proc"),
        (("calibrate", "--out", "o", "--base-learning-rate", "1e300"), "base_learning_rate must be at most 1000"),
        (("fit-sweep", "sweep.csv", "--out", "/proc/x"), "/proc"),
        (("train-agent", "--recipe", "deep.yaml", "--out", "o"), "is not readable YAML: it is nested more than 32"),
        (("replay", "--model", "deep.json", "--text", "text.txt", "--out", "o"), "it is nested more than"),
        (("replay", "--model", "nan.json", "--text", "text.txt", "--out", "o"), "values that are not finite"),
        (("calibrate", "--model", "none.json", "--text", "text.txt", "--out", "o"), "at least one layer, got 0"),
        (("cut", "model", "--out", "o", "--sequence-length", "0"), "sequence_length must be a whole number of at"),
        (("export", "model", "--out", "o", "--sequence-length", "0"), "sequence_length must be a whole number of at"),
        (("demo", "--out", "o", "--seed", "-1"), "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_options(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    Path("long.json").write_text(json.dumps({"cases": [{"name": "a" * 300}]}))
    Path("deep.yaml").write_text("cases: " + "[" * 5_000)
    Path("deep.json").write_text("[" * 100_000)
    anchors = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    Path("bomb.yaml").write_text("a0: &a0 [x]\n" + anchors)
    Path("large.yaml").write_text("#" * 70_000)
    Path("nan.json").write_text(json.dumps(TINY | {"rms_norm_eps": float("nan")}))
    Path("none.json").write_text(json.dumps(TINY | {"num_hidden_layers": 0}))
    Path("other").mkdir()
    for link in ("loop", "other/loop"):
        Path(link).symlink_to("loop")
    assert message in refused(monkeypatch, capsys, *arguments)


def test_a_bundle_is_refused_alike_wherever_it_is_given(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {"format": 1, "fields": field_tables(), "provenance": {"decisions": 0}}
    save_file(random_weights(), "p.safetensors", {"trainpilot": json.dumps(header)})
    message = "decisions must be a whole number"
    for method in ("policy:p.safetensors", "open-loop:p.safetensors"):
        assert message in refused(monkeypatch, capsys, "compare", "--out", "o", "--methods", method)
    assert message in refused(monkeypatch, capsys, "replay", "--out", "o", "--policy", "p.safetensors")
    assert message in refused(monkeypatch, capsys, "inspect", "p.safetensors")
    model = nn.Linear(2, 1)
    settings = SteeringSettings(sequences=100, batch_size=2, policy="p.safetensors")
    with pytest.raises(ValueError, match=message):
        Steering(model, torch.optim.AdamW(model.parameters()), settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BERT, "sees the tokens that it is to predict"),
        (MISSPELT, "'hidden_sise' in model.json is unknown to llama, which has 'hidden_size'; correct it"),
        (TINY | {"num_hidden_layers": 0}, "must have at least one layer, got 0"),
        (TINY | {"num_hidden_layers": -1}, "layer"),
        (TINY | {"rms_norm_eps": float("nan")}, "computes values that are not finite"),
        (TINY | {"model_type": ["llama"]}, "must be a transformers config with a 'model_type'"),
    ],
)
def test_model_config(place: Path, capfd: pytest.CaptureFixture[str], config: dict[str, Any], message: str) -> None:
    Path("model.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        load_model("model.json", 0)
    assert message in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_config_with_fields_of_older_transformers_is_built(place: Path) -> None:
    Path("model.json").write_text(json.dumps(TINY | {"pretraining_tp": 1, "_name": "x", "task_specific_params": {}}))
    assert load_model("model.json", 0).model.training


def test_the_default_methods_are_still_found() -> None:
    assert choose_methods("cosine, linear").names == ("cosine", "linear")


@pytest.mark.parametrize(
    ("command", "ranges"),
    [
        ("replay", ("--threads INT [0, 1024]", "--seed INT >= 0", "--warmup-share FLOAT [0, 1)")),
        ("compare", ("--seeds INT [1, 1000]", "--jobs INT [0, 1024]")),
        ("calibrate", ("--base-learning-rate FLOAT (0, 1000]", "--decisions INT [1, 100000]")),
        ("fit-sweep", ("--warmup-steps INT [0, 1e+09]", "--initial-loss FLOAT (0, 100]")),
        ("export", ("--prompt-tokens INT [1, 1000000]",)),
    ],
)
def test_help_says_the_ranges(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, ranges: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trainpilot", command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(each in said for each in ranges)


def holds_numbers(hint: Any) -> bool:
    return hint in (int, float) or (get_origin(hint) is not Literal and any(map(holds_numbers, get_args(hint))))


def records_in(hint: Any) -> Iterator[type]:
    """Yield the dataclasses of trainpilot in a type."""
    if isinstance(hint, type) and is_dataclass(hint) and hint.__module__.startswith("trainpilot"):
        yield hint
    for each in get_args(hint):
        yield from records_in(each)


@pytest.mark.parametrize("kind", [*cli.COMMANDS.values(), RunConfig, Recipe])
def test_every_number_declares_its_range(kind: Any) -> None:
    todo, missing = [kind], []
    while todo:
        record = todo.pop()
        for name, hint in get_type_hints(record, include_extras=True).items():
            if holds_numbers(hint) and name not in ranges_of(record):
                missing.append(f"{record.__name__}.{name}")
            todo += records_in(hint)
    assert missing == []


def test_true_is_no_number() -> None:
    with pytest.raises(ValueError, match="decisions must be a whole number of at least 1"):
        RunConfig(decisions=True)
