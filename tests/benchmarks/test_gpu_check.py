"""The GPU check refuses what it cannot do, counts its sweep, keeps every run, and can be tried out on a CPU."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from comparison_runs import CONFIG, made_result
from fakes import steady_meter
from policies import random_weights

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.ppo import PPOConfig, bundle_of, make_ppo
from trainpilot.experiments.compare.execute import failed
from trainpilot.experiments.results import RunResult, RunSpec
from trainpilot.experiments.run_store import run_key
from trainpilot.llm_runtime.energy.meter import RecordedMeter

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BEST = 4e-3
Losses = Callable[[RunSpec], float | None]


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield import_module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    provenance = {"decisions": 10, "base_schedule": {"schedule": "wsd", "warmup_share": 0.1}}
    PolicyBundle({name: 0.1 * value for name, value in random_weights().items()}, provenance).save(path)
    return path


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "needs an NVIDIA GPU"),
        (["--tiny"], "needs an NVIDIA GPU"),
        (["--device", "cpu"], "device cpu is for --tiny only"),
        (["--device", "cpu", "--tiny", "--parts", "basics"], "basics has no dry run"),
        (["--device", "cpu", "--tiny", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--device", "cpu", "--tiny", "--policy", "nobody"], "no policy named 'nobody'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    load: Callable[[str], ModuleType],
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        load("gpu_check").main(arguments)

    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("gpu-check: ")
    assert reason in printed.err
    assert printed.err.count("\n") == 1


def test_models_have_the_sizes_that_they_are_called_by(load: Callable[[str], ModuleType]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    setup = load("gpu.models").full_setup()
    models = {**{name: size.model for name, size in setup.sizes.items()}, "fine-tuned": setup.tuning.model}
    sizes = {}
    for name, model in models.items():
        content = {key: value for key, value in model.items() if key != "model_type"}
        config = AutoConfig.for_model(model["model_type"], vocab_size=256, **content)
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())

    assert sizes["llama-30m"] == pytest.approx(30e6, rel=0.05)
    assert sizes["llama-120m"] == pytest.approx(120e6, rel=0.05)
    assert sizes["fine-tuned"] == pytest.approx(30e6, rel=0.05)


def test_budgets_and_models_can_be_chosen(load: Callable[[str], ModuleType]) -> None:
    setup = load("gpu.models").full_setup()
    smaller = setup.smaller(0.25, ("llama-120m",))

    assert list(smaller.sizes) == ["llama-120m"]
    assert smaller.config("llama-120m").tokens == setup.config("llama-120m").tokens / 4
    assert smaller.tuning_config().tokens == setup.tuning_config().tokens / 4
    with pytest.raises(ValueError, match="models must be among llama-30m, llama-120m, got 'llama'"):
        setup.smaller(1.0, ("llama",))
    with pytest.raises(ValueError, match="budget must be a positive factor, got 0"):
        setup.smaller(0.0)


# The table -------------------------------------------------------------------------------------------------------


def planted(spec: RunSpec) -> float | None:
    """Return a loss that falls with the budget's square root, best at a rate of `BEST`; a policy does not mind."""
    off = 0.0 if spec.steering.kind == "policy" else math.log2(spec.config.base_learning_rate / BEST)
    return float(2.0 * (spec.config.tokens / CONFIG.tokens) ** -0.5 * (1 + 0.1 * off**2))


def found_by(load: Callable[[str], ModuleType], policy: Path, losses: Losses, *, seeds: int = 1) -> dict[str, Any]:
    asked: list[str] = []

    def get(name: str, spec: RunSpec) -> RunResult:
        asked.append(name)
        return made_result(spec, losses(spec))

    module = load("gpu.zero_shot")
    ask = module.Ask(name="made", config=CONFIG, seeds=tuple(range(seeds)), get=get)
    found: dict[str, Any] = {}
    module.table(ask, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), {"zero-shot": f"policy:{policy}@quality=1"}, found)
    return {**found, "asked": asked}


def test_the_sweep_is_counted_and_a_better_rate_is_worth_what_it_saves(
    load: Callable[[str], ModuleType], policy: Path
) -> None:
    found = found_by(load, policy, planted)

    assert found["sweep"]["best_learning_rate"] == BEST
    assert (found["sweep"]["n_runs"], found["sweep"]["tokens"]) == (5, 5 * CONFIG.tokens)
    assert [row["learning_rate"] for row in found["untuned"]] == [4e-4, 4e-3, 4e-2]
    # A loss 1 + 0.1 log2(10)^2 = 2.10 times as high is worth the budget over its square.
    worth = [row["multiplier"]["tokens"]["value"] for row in found["untuned"]]
    assert worth == pytest.approx([1 / 2.1035**2, 1.0, 1 / 2.1035**2], rel=0.02)
    for row in found["steered"]["zero-shot"]:
        assert row["multiplier"]["tokens"]["value"] == pytest.approx(1.0)
        assert row["multiplier_with_sweep"]["tokens"]["value"] == pytest.approx(6.0)  # five runs more
        assert row["multiplier_with_sweep"]["energy_j"]["value"] == pytest.approx(6.0)
    assert [run["share"] for run in found["best"]] == [1.0, 0.25, 0.5, 2.0]
    json.dumps(found, allow_nan=False)


def test_the_sweep_goes_on_beyond_an_edge_and_what_it_tries_is_counted(
    load: Callable[[str], ModuleType], policy: Path
) -> None:
    def falling(spec: RunSpec) -> float:
        return abs(math.log2(spec.config.base_learning_rate / 3.2e-2)) + 1

    found = found_by(load, policy, falling)

    assert found["sweep"]["best_learning_rate"] == 3.2e-2
    assert not found["sweep"]["on_edge"]
    assert found["sweep"]["n_runs"] == 7  # 3.2e-2 and, to be sure, 6.4e-2


def test_only_the_best_rate_is_run_again_with_further_seeds(load: Callable[[str], ModuleType], policy: Path) -> None:
    found = found_by(load, policy, planted, seeds=3)

    assert found["sweep"]["n_runs"] == 5
    assert [(run["seed"], run["share"]) for run in found["best"]][:3] == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert [len(row["runs"]) for row in found["steered"]["zero-shot"]] == [3, 3, 3]
    assert len(set(found["asked"])) == 5 + 3 + 3 + 2 * 3 * 3


def test_a_run_that_diverged_is_worth_least_and_a_sweep_that_did_says_so(
    load: Callable[[str], ModuleType], policy: Path
) -> None:
    found = found_by(load, policy, lambda spec: None if spec.steering.kind == "policy" else planted(spec))
    [row, *_] = found["steered"]["zero-shot"]
    assert row["multiplier"]["tokens"] == {"value": 0.0, "low": None, "high": None, "n": 1, "censored": "<"}
    assert row["runs"][0]["diverged"]

    with pytest.raises(ValueError, match="made: no run of the sweep came to an end: diverged"):
        found_by(load, policy, lambda spec: None)


# Runs ------------------------------------------------------------------------------------------------------------


def test_runs_are_kept_with_their_raw_readings_until_the_time_is_up(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("gpu.models")
    executed: list[int] = []

    def execute(spec: RunSpec, key: str, *, meter: RecordedMeter) -> RunResult:
        executed.append(spec.config.seed)
        meter.read()
        meter.read()
        return failed(spec, key, "planted") if spec.config.seed == 1 else made_result(spec)

    monkeypatch.setattr(module, "execute", execute)
    monkeypatch.setattr(module, "select_meter", lambda device: steady_meter())
    specs = [RunSpec(config=replace(CONFIG, seed=seed)) for seed in range(3)]
    runs = module.Runs(tmp_path, "cpu", math.inf)
    for index, spec in enumerate(specs[:2]):
        runs.get(f"run {index}", spec)

    late = module.Runs(tmp_path, "cpu", time.monotonic())
    assert late.get("run 0", specs[0]).usable
    with pytest.raises(module.TimeIsUpError):
        late.get("run 2", specs[2])
    module.Runs(tmp_path, "cpu", math.inf).get("run 1", specs[1])
    assert executed == [0, 1, 1]  # what failed is tried again

    played = RecordedMeter(tmp_path / "readings" / f"{run_key(specs[0])}.csv")
    assert [played.read().energy_j, played.read().energy_j] == [0.0, 5.0]
    runs.write_readings(tmp_path / "all.csv")
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["run 0", "run 0", "run 1", "run 1"]
    assert rows[1]["source"] == "estimated"


def test_fine_tuning_begins_with_the_very_policy(load: Callable[[str], ModuleType], policy: Path) -> None:
    tuning, setup = load("gpu.zero_shot"), load("gpu.models").tiny_setup("cpu")
    bundle = PolicyBundle.load(policy)
    config = tuning.ppo_config(bundle, setup, math.inf)
    cases = tuning.cases_for(bundle, setup, "fp32")
    model = make_ppo(tuning.one_live_env(cases, cases[1]), config)

    assert isinstance(config, PPOConfig)
    assert (config.hidden, config.total_decisions, config.time_limit_s) == ((8,), setup.tuning.decisions, None)
    assert [case.base_learning_rate for case in cases] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert {(case.schedule, case.warmup_tokens, case.decisions) for case in cases} == {("wsd", 1_280, 10)}
    model.policy.load_state_dict(tuning.weights_from(bundle, model))
    started = bundle_of(model, {}).weights
    assert started.keys() == bundle.weights.keys()
    assert all(np.array_equal(started[name], bundle.weights[name]) for name in started)


@pytest.mark.slow
def test_the_dry_run_fills_both_tables_and_the_second_time_runs_nothing(
    load: Callable[[str], ModuleType], policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--tiny", "--policy", str(policy), "--out", str(tmp_path)]
    load("gpu_check").main([*arguments, "--time-limit", "0"])
    assert "the same command goes on from here" in capsys.readouterr().out
    assert not json.loads((tmp_path / "results" / "zero_shot_gpu.json").read_text())["complete"]

    load("gpu_check").main(arguments)
    assert "steered fine-tuned" in capsys.readouterr().out
    first = json.loads((tmp_path / "results" / "zero_shot_gpu.json").read_text())
    found = first["models"]["llama-tiny"]
    assert first["complete"]
    assert {name: len(rows) for name, rows in found["steered"].items()} == {"zero-shot": 3, "fine-tuned": 3}
    assert found["best"][0]["energy_j"] > 0
    assert first["fine_tuned"]["cost"]["decisions"] == 60
    with (tmp_path / "results" / "zero_shot_gpu_readings.csv").open() as file:
        names = {row["run"] for row in csv.DictReader(file)}
    assert len([name for name in names if name.startswith("llama-tiny steered fine-tuned")]) == 3
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}

    load("gpu_check").main(arguments)
    assert json.loads((tmp_path / "results" / "zero_shot_gpu.json").read_text())["models"] == first["models"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == files
